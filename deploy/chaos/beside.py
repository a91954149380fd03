"""The second volume of a pair that has two: a load of its own, and what it may hold after each step of the first one's.

Both volumes are one consistency group: a checkpoint is taken of both at one point, and a failover is of both. So
whatever is asked of the first volume is asked of this one, by the same command.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deploy.chaos.expectation import Expectation, Numbers, Wrong, none_wrong
from deploy.chaos.writer import Writer


class Beside:
    """Writes to the volume ``name`` of ``blocks`` blocks wherever ``aim`` says."""

    def __init__(self, name: str, path: Path, blocks: int, seed: int, witness: Callable[[str], int | None]) -> None:
        self.name = name
        self.expectation = Expectation(path, blocks)
        self.writer = Writer(self.expectation, seed, witness)
        self._low: Numbers = self.expectation.snapshot()[0]
        self._known: tuple[int, Numbers, Numbers] | None = None
        self._errors = 0

    @property
    def failed(self) -> bool:
        """The leader refused a write since the last comparison: both disks may differ there."""
        return self.writer.errors != self._errors

    def begin_checkpoint(self) -> None:
        """It is about to be asked for."""
        self._low = self.expectation.snapshot()[0]

    def end_checkpoint(self, number: int) -> None:
        """It was taken."""
        self._known = (number, self._low, self.expectation.snapshot()[1])

    def judge_view(self, number: int, found: npt.NDArray[np.int64]) -> None:
        """What the follower's guest saw on checkpoint ``number``, which was the last one."""
        if self._known is not None and self._known[0] == number:
            none_wrong(
                self.expectation.out_of_range(found, *self._known[1:]), f"in the guest's view of {number}", self.name
            )

    def judge_failover(self, target: str, number: int, found: npt.NDArray[np.int64], mode: str) -> None:
        """What was found after it; from now on it stays."""
        expectation = self.expectation
        if target == "checkpoint":
            if self._known is not None and number >= self._known[0]:
                _, low, high = self._known
                high = high if number == self._known[0] else expectation.snapshot()[1]
                none_wrong(
                    expectation.out_of_range(found, low, high), f"after a failover to checkpoint {number}", self.name
                )
        else:
            if not self.failed:
                none_wrong(expectation.not_a_beginning(found), "after a failover to latest: no beginning", self.name)
            if mode == "sync":
                none_wrong(expectation.wrong(found), "after a failover to latest", self.name)
        expectation.settle(found)
        self._known = None

    def compare(self, exported: bytes, disks: tuple[bytes, bytes], view: bytes) -> None:
        """At rest, right after a checkpoint: what the leader exports, both disks, and the guest's view."""
        found = self.expectation.decode(exported)
        none_wrong(self.expectation.wrong(found), "in the leader's export", self.name)
        for where, data in (("the leader's disk", disks[0]), ("the follower's disk", disks[1]), ("the view", view)):
            other = self.expectation.decode(data)
            at = np.flatnonzero(other != found)
            none_wrong([Wrong(int(i), int(other[i]), int(found[i])) for i in at], f"in {where}", self.name)
        self.expectation.settle(found)
        self._known = self._known and (self._known[0], *self.expectation.snapshot())
        self._errors = self.writer.errors
