"""The load of a chaos run: writes and zeroes at random over one connection to whichever side leads, each noted before
and after.

No two writes in flight touch the same block, so what NBD leaves open about their order does not matter. A connection
that breaks leaves its writes in doubt; the writer comes back as soon as somebody listens there.

A writer that is ``watch``ed knows the generation of each acknowledgement, by what its side has on disk when it is
there: what was acknowledged in any other generation than the one that counts is a ``stray``, and stays in doubt.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from common.errors import NbdError, NotRunning, TandemDiskError, TimedOut
from common.nbd_client import Completion, NbdClient
from deploy.chaos.expectation import BLOCK, ZEROES, Expectation

SAMPLE_S: Final = 0.02
"""Pause between looks at which generation the writes are acknowledged in."""
READ: Final = 0
"""Instead of a write's number."""
PAUSE_S: Final = 0.003
READS: Final = 0.06
FUA: Final = 0.05
"""Shares of the requests that read a block instead, and of the writes that ask for being durable."""
REST_S: Final = 40.0


class Stray(NamedTuple):
    """A write that was acknowledged in a generation that does not count."""

    number: int
    first: int
    length: int
    """In blocks."""
    generation: int | None


class Writer:
    """``aim`` at an export, ``rest`` before anybody reads, ``aim`` again. ``trouble``: what must not be."""

    def __init__(self, expectation: Expectation, seed: int, witness: Callable[[str], int | None]) -> None:
        self.expectation = expectation
        self.acknowledged = 0
        self.errors = 0
        """Writes that the server refused, all of them in doubt."""
        self.writers: dict[int, set[str]] = {}
        """By generation: the sides that acknowledged writes in it."""
        self.strays: list[Stray] = []
        self.trouble: TandemDiskError | None = None
        self.wrong = ""
        """What a read brought that it may not bring."""
        self.reads = self.errors_of_reads = 0
        self._witness = witness
        self._counts: Callable[[int | None], bool] | None = None
        self._chance = random.Random(seed)
        self._target: tuple[str, str] | None = None
        self._client: NbdClient | None = None
        self._changed = threading.Condition()
        self._idle = True
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def aim(self, side: str, uri: str) -> None:
        """Write to the export ``uri`` of ``side`` from now on."""
        with self._changed:
            self._target = (side, uri)
            self._idle = False
            self._changed.notify_all()

    def watch(self, counts: Callable[[int | None], bool] | None) -> None:
        """From now on only what is acknowledged in a generation that ``counts``; None: all does."""
        self._counts = counts

    def rest(self, patience_s: float = REST_S, *, abandon: bool = False) -> None:
        """No more writes; returns when none is in flight, TimedOut after ``patience_s``. With ``abandon`` answers are
        not waited for."""
        with self._changed:
            self._target = None
            if abandon and self._client is not None:
                self._client.interrupt()
            if not self._changed.wait_for(lambda: self._idle, patience_s):
                raise TimedOut(f"Writes were not answered within {patience_s:g} s although all was healed.")

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._ending, self._target = True, None
            if self._client is not None:
                self._client.interrupt()
            self._changed.notify_all()
        self._thread.join(REST_S)

    def _run(self) -> None:
        while not self._ending:
            with self._changed:
                target = self._target
                if target is None:
                    self._idle = True
                    self._changed.notify_all()
                    self._changed.wait()
                    continue
            try:
                self._client = NbdClient(target[1], timeout_s=REST_S)
                with self._client:
                    self._write(self._client, target)
            except TimedOut as error:
                self.trouble = error
            except (NotRunning, NbdError):
                time.sleep(PAUSE_S)
            except TandemDiskError:  # an export that refuses for now
                time.sleep(PAUSE_S)
            finally:
                self._client = None

    def _look(self, block: int, completion: Completion) -> None:
        """At what a read brought of a block that nobody wrote to meanwhile."""
        if completion.data is None or completion.error is not None:
            self.errors_of_reads += 1
            return
        self.reads += 1
        if not self.expectation.allows(block, completion.data):
            found = sorted(set(np.frombuffer(completion.data, np.uint64)[::2].tolist()))[:4]
            acknowledged, doubts = int(self.expectation.acknowledged[block]), self.expectation.doubt.get(block, ())
            self.wrong = (
                f"a read of block {block} brought {', '.join(map(str, found))} instead of write {acknowledged}, with "
                f"{', '.join(map(str, doubts)) or 'none'} in doubt"
            )

    def _acknowledged(self, side: str, number: int, first: int, count: int) -> None:
        self.acknowledged += 1
        counts = self._counts
        if counts is not None:
            now = self._witness(side)  # a generation is on disk before anything is acknowledged in it
            if now is not None:
                self.writers.setdefault(now, set()).add(side)
            if not counts(now):
                self.strays.append(Stray(number, first, count, now))
                return
        self.expectation.acknowledge(number, first, count)

    def _write(self, client: NbdClient, target: tuple[str, str]) -> None:
        expectation, chance = self.expectation, self._chance
        flying: dict[int, tuple[int, int, int]] = {}
        busy: set[int] = set()
        depth = chance.choice((1, 4, 16, 32))
        sample = (self._witness(target[0]), time.monotonic(), self.acknowledged)
        while self._target == target or flying:
            while self._target == target and len(flying) < depth:
                count = min(chance.choice((1, 1, 1, 2, 8)), expectation.blocks)
                first = chance.randrange(expectation.blocks - count + 1)
                cells = range(first, first + count)
                if busy.intersection(cells):
                    break
                if chance.random() < READS:
                    flying[client.submit_read(first * BLOCK, BLOCK)] = (READ, first, 1)
                    busy.add(first)
                    continue
                number, data = expectation.begin(first, count)
                fua = chance.random() < FUA
                if number % ZEROES:
                    cookie = client.submit_write(first * BLOCK, data, fua=fua)
                else:
                    cookie = client.submit_zero(first * BLOCK, len(data), fua=fua)
                flying[cookie] = (number, first, count)
                busy.update(cells)
            for completion in client.collect(max(1, len(flying) // 2)):
                number, first, count = flying.pop(completion.cookie)
                busy.difference_update(range(first, first + count))
                if number == READ:
                    self._look(first, completion)
                elif completion.error is None:
                    self._acknowledged(target[0], number, first, count)
                else:
                    self.errors += 1
                    time.sleep(PAUSE_S)
            if time.monotonic() - sample[1] > SAMPLE_S:
                now = self._witness(target[0])
                if now is not None and now == sample[0] and self.acknowledged > sample[2]:
                    self.writers.setdefault(now, set()).add(target[0])
                sample = (now, time.monotonic(), self.acknowledged)
            time.sleep(0.0005)  # the processes under test need the machine more
