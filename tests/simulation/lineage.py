"""What the clients of one stretch of the primary's life wrote, in order: see ``oracle``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Versions = NDArray[np.uint64]
Extent = tuple[int, int, int]
"""(first sector, sector behind the last, version)"""


@dataclass(slots=True)
class ClientBatch:
    """A batch of a client of the primary."""

    index: int
    extents: list[Extent]
    fua: bool
    process: Any
    lineage: Lineage
    risky: bool = False
    """The primary disk was failing: what it refused is not replicated."""
    finished: bool = False


@dataclass
class Lineage:
    """See the module. ``owed``: the secondary has everything up to this batch, clients were told."""

    base: Versions
    batches: list[ClientBatch] = field(default_factory=list)
    owed: int = 0
    written: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """version -> (number of its batch, first sector, sector behind the last)"""
    zeroed: list[tuple[int, int, int]] = field(default_factory=list)
    """The same of each zero and discard."""

    def sort(self, place: Callable[[ClientBatch], int]) -> None:
        """Let the batches be in order of ``place``, and of their numbers where that is the same."""
        batches, self.batches = sorted(self.batches, key=place), []
        self.zeroed.clear()
        for number, batch in enumerate(batches, 1):
            batch.index = number
            self.append(batch)

    def append(self, batch: ClientBatch) -> None:
        self.batches.append(batch)
        for first, last, version in batch.extents:
            if version:
                self.written[version] = batch.index, first, last
            else:
                self.zeroed.append((batch.index, first, last))

    def wrote(self, sector: int, version: int, since: int) -> bool:
        """Whether batch number ``since``, or one behind it, gives the sector that version."""
        if version:
            index, first, last = self.written.get(version, (0, 0, 0))
            return index >= since and first <= sector < last
        for index, first, last in reversed(self.zeroed):
            if index < since:
                return False
            if first <= sector < last:
                return True
        return False

    def apply(self, model: Versions, count: int, loose: NDArray[np.bool_]) -> None:
        """Batch number ``count`` (from 1) onto ``model``. ``loose`` becomes true where it may not have come that
        far."""
        batch = self.batches[count - 1]
        for first, last, version in batch.extents:
            model[first:last] = version
            loose[first:last] = batch.risky


@dataclass
class Tracked:
    """Where the secondary disk is: ``model`` is ``lineage`` after ``count`` batches."""

    lineage: Lineage
    count: int
    model: Versions
    loose: NDArray[np.bool_]
