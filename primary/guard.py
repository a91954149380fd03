"""The write-intent bitmap at work: nothing is written to a region, on either side, before its bit is durable.

The mirror looks into ``marks``, a byte a region, as it packs a batch. A batch that touches a region without a mark is
held, with all that come after it, until ``require`` has put the bits on stable storage; that happens once a region,
and a few regions ahead, so that a sequential writer does not stop at every one.

``forget`` clears lazily, and in this order: the marks in memory (who writes now waits again), then what the metadata
says of how far the bits reach back, durably, then the bits. So the file always knows at least what the metadata
promises.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from common.batch import Operation
from common.bitmap import DirtyBitmap
from common.errors import DiskError
from common.intent import REGION, IntentFile

REGION_SHIFT: Final = REGION.bit_length() - 1
AHEAD: Final = 4
"""Regions that are marked together, from the one that is needed on."""

log = logging.getLogger("guard")


class IntentGuard:
    """Of volumes of ``sizes`` bytes, over ``file``, which it owns."""

    def __init__(self, file: IntentFile, sizes: Sequence[int]) -> None:
        self.file = file
        self.marks = [bytearray((size >> REGION_SHIFT) + 1) for size in sizes]
        """One byte a region: 1 if its bit is durable."""
        self.waits = 0
        """Times that writes were held for a bit."""
        self._sizes = tuple(sizes)
        self._requiring: list[list[tuple[int, int, int]]] = []
        """Ranges whose bits are on their way to the disk."""
        self._loop = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="intent")
        for volume, offset, length in file.ranges():
            self._mark(volume, offset, length)

    def _mark(self, volume: int, offset: int, length: int) -> None:
        first, stop = offset >> REGION_SHIFT, ((offset + length - 1) >> REGION_SHIFT) + 1
        self.marks[volume][first:stop] = b"\1" * (stop - first)

    def covers(self, volume: int, offset: int, length: int) -> bool:
        """Whether a write there may go on."""
        marks = self.marks[volume]
        return 0 not in marks[offset >> REGION_SHIFT : ((offset + length - 1) >> REGION_SHIFT) + 1]

    def require(self, volume: int, operations: Sequence[Operation], done: Callable[[int], None]) -> None:
        """Make the bits for ``operations`` durable, then ``done(errno or 0)`` on the loop."""
        self.waits += 1
        size = self._sizes[volume]
        ranges = [
            (volume, offset, min(length + (AHEAD - 1) * REGION, size - offset))
            for _, offset, length, _, _ in operations
            if not self.covers(volume, offset, length)
        ]
        self._requiring.append(ranges)
        future = self._loop.run_in_executor(self._executor, self.file.set_ranges, ranges)
        future.add_done_callback(lambda finished: self._required(finished, ranges, done))

    def _required(
        self, finished: asyncio.Future[None], ranges: list[tuple[int, int, int]], done: Callable[[int], None]
    ) -> None:
        self._requiring.remove(ranges)
        error = finished.exception()
        if error is not None:
            log.error("write-intent file: %s", error)
            if not isinstance(error, DiskError):
                raise error
            done(errno.EIO)
            return
        for volume, offset, length in ranges:
            self._mark(volume, offset, length)
        done(0)

    async def mark(self, ranges: Sequence[tuple[int, int, int]]) -> None:
        """The bits for (volume, offset, length) are durable when it returns: there is something that a crash may not
        make this side forget. DiskError if they cannot be."""
        lacking = [marked for marked in ranges if not self.covers(*marked)]
        if not lacking:
            return
        self._requiring.append(lacking)
        try:
            await self._loop.run_in_executor(self._executor, self.file.set_ranges, lacking)
        finally:
            self._requiring.remove(lacking)
        for volume, offset, length in lacking:
            self._mark(volume, offset, length)

    async def forget(self, wanted: Sequence[DirtyBitmap], promise: Callable[[], Awaitable[None]]) -> int:
        """Clear every region in which ``wanted`` marks nothing; ``promise`` makes durable from where on the bits know
        every write. Returns the regions that are left. DiskError if a file cannot be written. ``wanted`` is given away:
        regions that are written to meanwhile are marked in it."""
        for marks, bitmap in zip(self.marks, wanted, strict=True):
            regions = DirtyBitmap(bitmap.size, REGION)
            regions.union(bitmap)
            seen = np.frombuffer(marks, dtype=np.uint8)[: regions.blocks]
            seen &= regions.flags()
            del seen  # ``marks`` may grow
        await promise()
        # who waited again since then has its bit by now, or is in the queue of the thread, before what is queued here
        for volume, marks in enumerate(self.marks):
            size = self._sizes[volume]
            seen = np.frombuffer(marks, dtype=np.uint8)[: -(-size // REGION)]
            offsets = np.flatnonzero(seen).astype(np.uint64) << np.uint64(REGION_SHIFT)
            wanted[volume].set_ranges(offsets, np.minimum(np.uint64(REGION), np.uint64(size) - offsets))
            del seen
        for ranges in self._requiring:
            for volume, offset, length in ranges:
                self._want(wanted, volume, offset, length)
        return await self._loop.run_in_executor(self._executor, self.file.keep_only, wanted)

    async def grow(self, sizes: Sequence[int]) -> None:
        """The volumes have ``sizes`` bytes from now on; what is new is marked, durably. Not beside ``forget``.
        DiskError if the file cannot be replaced."""
        await self._loop.run_in_executor(self._executor, self.file.grow, sizes)
        before, self._sizes = self._sizes, tuple(sizes)
        for volume, (old, size) in enumerate(zip(before, self._sizes, strict=True)):
            marks = self.marks[volume]
            marks.extend(bytes((size >> REGION_SHIFT) + 1 - len(marks)))
            if size > old:
                self._mark(volume, old, size - old)

    def _want(self, wanted: Sequence[DirtyBitmap], volume: int, offset: int, length: int) -> None:
        if offset < self._sizes[volume]:
            wanted[volume].set_range(offset, min(length, self._sizes[volume] - offset))

    def close(self) -> None:
        """Wait for what is being written."""
        self._executor.shutdown(wait=True)
        self.file.close()
