"""The guest of the follower, which writes to its export between checkpoints, beside the load on the leader.

What it wrote is there until the next checkpoint (I1), and is kept by a failover to the checkpoint that it was written
on (I3). Which one that was it asks before and after every batch: only what was answered between two equal answers is
certain. All else is in doubt: it may be there or not.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from common.errors import TandemDiskError
from common.nbd_client import NbdClient
from deploy.chaos.expectation import APART, BLOCK, ZEROES, Breach, contents_of

PAUSE_S: Final = 0.004
"""Between two batches; the processes under test need the machine more."""
PATIENCE_S: Final = 20.0


class Guest:
    """``begin`` at a follower's export, ``end``, then ask what has to be there."""

    def __init__(self, blocks: int, seed: int) -> None:
        self.acknowledged = 0
        self.kept = 0
        """Blocks that were found again after a failover to the checkpoint that they were written on."""
        self.reads = 0
        self.number = 0
        self.wrong = ""
        self._blocks = blocks
        self._chance = random.Random(seed)
        self._certain: dict[int, tuple[int, int]] = {}
        """By block: the checkpoint on which it was written, and the number of the write."""
        self._doubt: set[int] = set()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._client: NbdClient | None = None

    def begin(self, uri: str, checkpoint: Callable[[], int | None], number: int) -> None:
        """Write to ``uri`` from now on, with numbers that the load, which has come to ``number``, does not reach."""
        self.forget()
        self.number = number + APART
        self._ending.clear()
        self._thread = threading.Thread(target=self._run, args=(uri, checkpoint), name="guest", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """No more writes; what is not answered yet is in doubt."""
        self._ending.set()
        if self._client is not None:
            self._client.interrupt()
        if self._thread is not None:
            self._thread.join(PATIENCE_S)
            self._thread = None

    def forget(self) -> None:
        """What was written is gone, or is the load's to know."""
        self._certain.clear()
        self._doubt.clear()

    def touched(self, checkpoint: int | None = None) -> set[int]:
        """Blocks that may hold a write of the guest's, on ``checkpoint`` or on any."""
        return self._doubt | {block for block, (on, _) in list(self._certain.items()) if checkpoint in (None, on)}

    def certain(self, checkpoint: int) -> dict[int, int]:
        """What has to be there on ``checkpoint``: the write of each block."""
        return {
            block: number
            for block, (on, number) in self._certain.items()
            if on == checkpoint and block not in self._doubt
        }

    def lost(self, checkpoint: int, found: npt.NDArray[np.int64]) -> list[int]:
        """Blocks that a failover to ``checkpoint`` did not keep."""
        certain = self.certain(checkpoint)
        lost = [block for block, number in certain.items() if int(found[block]) != number]
        self.kept += len(certain) - len(lost)
        return lost

    def judge(self, target: str, number: int, found: npt.NDArray[np.int64]) -> None:
        """A failover to ``target``, done without force, with checkpoint ``number``: nothing of it may be gone."""
        if target == "latest" and self.certain(number):
            raise Breach("A failover to latest dropped writes of the guest without anybody's word.", 1)
        if target == "checkpoint" and (lost := self.lost(number, found)):
            raise Breach(
                f"{len(lost)} blocks that the guest wrote on checkpoint {number} are not there after a failover to it: "
                f"block {lost[0]} holds write {int(found[lost[0]])}.", len(lost),
            )  # fmt: skip

    def _run(self, uri: str, checkpoint: Callable[[], int | None]) -> None:
        while not self._ending.is_set() and not self.wrong:
            try:
                self._client = NbdClient(uri, timeout_s=PATIENCE_S)
                with self._client as client:
                    while not self._ending.is_set() and not self.wrong:
                        self._batch(client, checkpoint)
                        self._ending.wait(PAUSE_S)
            except TandemDiskError:
                time.sleep(PAUSE_S)
            finally:
                self._client = None

    def _batch(self, client: NbdClient, checkpoint: Callable[[], int | None]) -> None:
        """Some writes of different blocks, and a look at one that is certain. Block 0 is left to the load."""
        chance = self._chance
        before = checkpoint()
        writes: dict[int, int] = {}
        for _ in range(chance.choice((1, 2, 8))):
            first = chance.randrange(1, self._blocks)
            blocks = range(first, min(first + chance.choice((1, 1, 3)), self._blocks))
            if writes.keys() & set(blocks):
                continue
            self.number += 1 + (self.number % ZEROES == ZEROES - 1)
            writes |= dict.fromkeys(blocks, self.number)
            client.submit_write(first * BLOCK, contents_of(self.number, first, len(blocks)))
        former = {block: block in self._doubt for block in writes}
        self._doubt.update(writes)
        there = [block for block in self._certain if block not in self._doubt]
        looked = chance.choice(there) if there else None
        cookie = client.submit_read(looked * BLOCK, BLOCK) if looked is not None else None
        data, failed = None, False
        while client.in_flight:
            for completion in client.collect(1):
                failed |= completion.error is not None
                if completion.cookie == cookie:
                    data = completion.data
        now = checkpoint()
        if failed or now is None or now != before:
            return
        if looked is not None and self._certain[looked][0] == now:
            self.reads += 1
            if bytes(data or b"") != contents_of(self._certain[looked][1], looked, 1):
                self.wrong = f"the guest's own write to block {looked} is not there, on checkpoint {now}"
        self.acknowledged += len(writes)
        for block, number in writes.items():
            self._certain[block] = (now, number)
            if not former[block]:
                self._doubt.discard(block)
