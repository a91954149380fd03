"""Online verification: asks about the whole of both disks, in the stream, while guests write.

First in questions of 64 KiB; what differs is asked again block by block, so that the answer is a list of extents.
Differing blocks are marked in the mirror's bitmaps: the next resync sends them, or the caller does so at once. The
caller also notes them in the write-intent bitmap, so that the next resync may be one after a crash.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from common.bitmap import DirtyBitmap
from primary.mirror import Mirror
from primary.questions import LOOK, QUESTION_BYTES, Inquiry, Pace, Range, Reader
from primary.resync import ResyncLimits


class Verifier:
    """One verification. ``run`` it as a task; cancel it when the secondary is lost or resynchronised."""

    def __init__(self, mirror: Mirror, limits: ResyncLimits | None = None) -> None:
        self.mirror = mirror
        self.started = time.monotonic()
        self.total_bytes = sum(volume.size for volume in mirror.volumes)
        self._unit = min(mirror.bitmaps[0].block_size, QUESTION_BYTES)
        self._open = [DirtyBitmap(volume.size, QUESTION_BYTES) for volume in mirror.volumes]
        self._coarse = [DirtyBitmap(volume.size, QUESTION_BYTES) for volume in mirror.volumes]
        self._differing = [DirtyBitmap(volume.size, self._unit) for volume in mirror.volumes]
        self._fine = False
        self._lost: set[tuple[int, int]] = set()
        """(volume, offset) of the pieces of which an answer was lost in this round over them."""
        self._pace = Pace(mirror, limits or ResyncLimits())
        self._inquiry = Inquiry(mirror, Reader(mirror), self._pace, self._heard)

    def status(self) -> dict[str, Any]:
        """For ``status``."""
        left = sum(bitmap.dirty_bytes() for bitmap in self._open) if not self._fine else 0
        done = self.total_bytes - left
        return {
            "active": True,
            "done_bytes": done,
            "total_bytes": self.total_bytes,
            "differing_bytes": self._bytes(self._differing if self._fine else self._coarse),
            "rate": done / max(1e-9, time.monotonic() - self.started),
        }

    async def run(self) -> list[Range]:
        """The extents that differ, in order. OSError if the primary disk cannot be read."""
        for bitmap in self._open:
            bitmap.set_all()
        await self._ask(QUESTION_BYTES)
        self._fine = True
        for bitmap, coarse in zip(self._open, self._coarse, strict=True):
            bitmap.union(coarse)
        await self._ask(self._unit)
        for bitmap, differing in zip(self.mirror.bitmaps, self._differing, strict=True):
            differing.grow(bitmap.size)  # the volume may have grown meanwhile; what is new is compared by itself
            bitmap.union(differing)
        return [
            (index, offset, length) for index, bitmap in enumerate(self._differing) for offset, length in bitmap.runs()
        ]

    async def _ask(self, unit: int) -> None:
        """Until nothing is open: a question whose answer was lost is asked again."""
        while any(self._open):
            self._lost.clear()
            for volume, todo in zip(self.mirror.volumes, self._open, strict=True):
                position = 0
                while (found := todo.next_run(position, LOOK)) is not None:
                    position, end = found[0], found[0] + found[1]
                    while position < end:  # ``next_run`` would begin again at the start of the piece
                        await self._pace.room()
                        position += await self._inquiry.ask(volume, position, end - position, unit, exactly=self._fine)
            await self._pace.drained()

    def _heard(self, index: int, offset: int, length: int, differs: bool | None) -> None:
        start = offset // QUESTION_BYTES * QUESTION_BYTES
        if differs is None:
            self._lost.add((index, start))
            return
        if not self._fine:
            self._open[index].clear_range(offset, length)
            if differs:
                self._coarse[index].set_range(offset, length)
            return
        if differs:
            self._differing[index].set_range(offset, length)
        last = (offset + length) % QUESTION_BYTES == 0 or offset + length == self._open[index].size
        if last and (index, start) not in self._lost:
            # answers come in order: this was the last block of its piece
            self._open[index].clear_range(start, offset + length - start)

    @staticmethod
    def _bytes(bitmaps: Sequence[DirtyBitmap]) -> int:
        return sum(bitmap.dirty_bytes() for bitmap in bitmaps)
