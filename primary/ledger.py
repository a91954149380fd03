"""Which blocks the secondary would lack if its host lost its memory now.

What the secondary has applied is in its page cache and may be gone after a power cut; what it calls *recorded* is on
stable storage and noted in its metadata. So every batch that is sent stays in the account until the secondary has
recorded it, and is part of the dirty bitmaps of a resync.

The account is a row of buckets. Batches go into the open one; a checkpoint barrier closes it under the barrier's
sequence; when the secondary has recorded that sequence, the bucket is dropped whole. Noting a batch is one
``list.append`` of its packed extents, which exist anyway. Only when a bucket holds more than ``FOLD_BYTES`` of them
are they folded into bitmaps (about 0.1 us an extent).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np

from common import wire
from common.bitmap import DirtyBitmap
from common.wire import Frame

FOLD_BYTES: Final = 512 * 1024
MAX_BUCKETS: Final = 4
"""Closed buckets that are kept apart; more are merged, which keeps blocks dirty for longer than needed."""


class _Bucket:
    """Extents of batches up to sequence ``last``: packed, and folded."""

    __slots__ = ("bitmaps", "extents", "last", "size")

    def __init__(self) -> None:
        self.last = 0
        self.extents: list[Frame] = []
        self.size = 0
        self.bitmaps: list[DirtyBitmap] | None = None

    def fold(self, sizes: Sequence[int], block_size: int) -> None:
        if self.bitmaps is None:
            self.bitmaps = [DirtyBitmap(size, block_size) for size in sizes]
        mark(self.bitmaps, b"".join(self.extents))
        self.extents = []
        self.size = 0


class Ledger:
    """A ``primary.window.Ledger`` for volumes of ``sizes`` bytes, in blocks of ``block_size``."""

    def __init__(self, sizes: Sequence[int], block_size: int) -> None:
        self._sizes = tuple(sizes)
        self._block_size = block_size
        self._open = _Bucket()
        self._closed: deque[_Bucket] = deque()

    def sent(self, sequence: int, extents: Frame) -> None:
        """A batch goes out under ``sequence``."""
        bucket = self._open
        bucket.last = sequence
        bucket.extents.append(extents)
        bucket.size += len(extents)
        if bucket.size > FOLD_BYTES:
            bucket.fold(self._sizes, self._block_size)

    def barrier(self, sequence: int) -> None:
        """A checkpoint goes out under ``sequence``: close the bucket, under the last batch before it."""
        if not self._open.last:
            return
        self._closed.append(self._open)
        self._open = _Bucket()
        if len(self._closed) > MAX_BUCKETS:
            older, newer = self._closed.popleft(), self._closed.popleft()
            newer.extents = older.extents + newer.extents
            newer.size += older.size
            if older.bitmaps is not None:
                if newer.bitmaps is None:
                    newer.bitmaps = older.bitmaps
                else:
                    for mine, theirs in zip(newer.bitmaps, older.bitmaps, strict=True):
                        mine.union(theirs)
            self._closed.appendleft(newer)

    def recorded(self, sequence: int) -> None:
        """The secondary will remember, whatever happens, that it has everything up to ``sequence``."""
        while self._closed and self._closed[0].last <= sequence:
            self._closed.popleft()
        if not self._closed and self._open.last <= sequence:
            self._open = _Bucket()

    def add_to(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        """Mark the whole account in ``bitmaps``, one for each volume."""
        for bucket in (*self._closed, self._open):
            mark(bitmaps, b"".join(bucket.extents))
            for bitmap, folded in zip(bitmaps, bucket.bitmaps or (), strict=False):
                bitmap.union(folded)

    def grow(self, sizes: Sequence[int]) -> None:
        """The volumes have ``sizes`` bytes from now on."""
        self._sizes = tuple(sizes)
        for bucket in (*self._closed, self._open):
            for bitmap, size in zip(bucket.bitmaps or (), sizes, strict=False):
                bitmap.grow(size)

    def clear(self) -> None:
        """Forget everything: the caller has it in its own bitmaps now."""
        self._closed.clear()
        self._open = _Bucket()


def mark(bitmaps: Sequence[DirtyBitmap], extents: Frame) -> None:
    """Mark packed extents in the bitmaps of their volumes."""
    if not len(extents):
        return
    array = wire.extents_array(extents)
    for volume, bitmap in enumerate(bitmaps):
        mine = array if len(bitmaps) == 1 else array[array["volume"] == volume]
        bitmap.set_ranges(mine["offset"], mine["length"].astype(np.uint64))
