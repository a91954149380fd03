"""The write-intent bitmap: where a primary that crashes may have written what its secondary lacks.

A small file beside the metadata holds one bit for each *region* (4 MiB) of the volumes. The bit is on stable storage
before the first write to the region is acknowledged, and is cleared lazily, when nothing in the region is dirty any
more. So a primary that comes back after a crash finds all its dirtiness in here, rounded out to regions, at the price
of one small synchronous write when guests move to a region that they had not touched lately (DRBD's activity log,
HAST's extents).

    page 0        magic, region size, sizes of the volumes; checksum
    page 1 …      8 bytes xxh3-64 of the rest, seeded with the page's number; 4088 bytes of bits

A page is written whole. One that was torn by a crash fails its checksum and counts as all bits set: too much is then
moved, never too little. The same holds for a file of another layout.

``covers`` is for the hot path: a look into memory. ``set_ranges`` blocks for the disk: call it in a thread. Both may
be used at once with ``keep_only``; a lock orders the two that write.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
from xxhash import xxh3_64_intdigest

from common.bitmap import DirtyBitmap
from common.disk import FLOCK
from common.errors import DiskError
from common.limits import MIB

INTENT_FILE: Final = "intent"
"""Its name in a side's directory. On a secondary: what that side wrote by itself, until a resync is complete."""
REGION: Final = 4 * MIB
PAGE: Final = 4096
_BYTES: Final = PAGE - 8
_MAGIC: Final = b"TDINTENT"
# magic, format, number of volumes, region size; then the volumes' sizes
_HEADER: Final = struct.Struct("<8sIIQ")
_FORMAT: Final = 1
_CHECKSUM: Final = struct.Struct("<Q")
assert _HEADER.size == 24


def marked_ranges(path: str, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """(volume, offset, length) of what the file at ``path`` marks, of everything if there is none; its owner may run.
    DiskError if it cannot be read."""
    if not os.path.exists(path):
        return [(index, 0, size) for index, size in enumerate(sizes)]
    file = IntentFile(path, sizes, everything=True, read_only=True)
    try:
        return file.ranges()
    finally:
        file.close()


def marked_bytes(path: str, sizes: Sequence[int]) -> int:
    """Bytes of ``marked_ranges``."""
    return sum(length for _, _, length in marked_ranges(path, sizes))


class IntentFile:
    """The file at ``path`` for volumes of ``sizes`` bytes. ``found``: it was there and of this layout."""

    def __init__(
        self, path: str, sizes: Sequence[int], region: int = REGION, *, shared: bool = False, everything: bool = False,
        read_only: bool = False,
    ) -> None:  # fmt: skip
        """``shared``: other processes mark in it at the same time. ``everything``: a file that was not there begins
        with all bits set. ``read_only``: the process that it belongs to may run, and keeps the file that it has."""
        assert region > 0
        self._shared = shared
        self._read_only = read_only
        self._everything = everything
        self.path = path
        self.region = region
        self._lay_out(sizes)
        self._lock = threading.Lock()
        self._unsettled = False
        """The file was replaced, and the directory could not be synced: a crash leaves one or the other."""
        self.damaged_pages = 0
        self.synchronous_writes = 0
        try:
            mode = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
            self._file = os.open(path, mode | os.O_CLOEXEC, 0o600)
            fresh = not os.fstat(self._file).st_size
            try:
                with self._alone():  # half of a page that somebody writes would be taken for a damaged one: all set
                    self.found = self._load()
            except (OSError, DiskError):
                if not read_only and fresh:
                    os.unlink(path)  # else it would say that it was there all the time, and that nothing was written
                os.close(self._file)
                raise
        except OSError as error:
            raise DiskError(f"The write-intent file {path} cannot be used: {error.strerror}.") from error

    def _lay_out(self, sizes: Sequence[int]) -> None:
        """No bit set."""
        self._sizes = tuple(sizes)
        self._first: list[int] = []
        """Number of each volume's first bit."""
        bits = 0
        for size in sizes:
            self._first.append(bits)
            bits += -(-size // self.region)
        self._pages = max(1, -(-bits // (_BYTES * 8)))
        self._bits = bytearray(self._pages * _BYTES)

    # The hot path

    def covers(self, volume: int, offset: int, length: int) -> bool:
        """Whether every region that [offset, offset + length) touches is marked durably. Else ``set_ranges`` first."""
        first = self._first[volume]
        bits = self._bits
        region = self.region
        for bit in range(first + offset // region, first + (offset + length - 1) // region + 1):
            if not bits[bit >> 3] >> (bit & 7) & 1:
                return False
        return True

    def set_ranges(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        """Mark (volume, offset, length) ranges; on stable storage when it returns. DiskError if that cannot be done:
        then nothing counts as marked that was not before."""
        try:
            self._set_ranges(ranges)
        except OSError as error:  # of reading what others marked, or of the lock
            raise DiskError(f"The write-intent file {self.path} cannot be used: {error.strerror}.") from error

    def _set_ranges(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        with self._lock, self._alone():
            pages: dict[int, bytearray] = {}
            for volume, offset, length in ranges:
                first = self._first[volume]
                for bit in range(first + offset // self.region, first + (offset + length - 1) // self.region + 1):
                    number, at = divmod(bit >> 3, _BYTES)
                    if number not in pages:
                        if self._shared:
                            self._read(number)
                        pages[number] = self._bits[number * _BYTES : (number + 1) * _BYTES]
                    pages[number][at] |= 1 << (bit & 7)
            self._write(pages, durable=True)
            for number, page in pages.items():
                self._bits[number * _BYTES : (number + 1) * _BYTES] = page

    # Clearing

    def keep_only(self, bitmaps: Sequence[DirtyBitmap]) -> int:
        """Clear every region in which ``bitmaps`` (one a volume: all that the secondary may lack, writes in progress
        included) mark nothing. Not synced: a bit that a crash leaves set costs time only. Returns the regions left."""
        flags = np.zeros(8 * len(self._bits), dtype=np.uint8)
        for first, bitmap in zip(self._first, bitmaps, strict=True):
            regions = DirtyBitmap(bitmap.size, self.region)
            regions.union(bitmap)
            flags[first : first + regions.blocks] = regions.flags()
        wanted = np.packbits(flags, bitorder="little")
        with self._lock:
            pages: dict[int, bytearray] = {}
            both = np.bitwise_and(np.frombuffer(self._bits, np.uint8), wanted)
            kept = bytearray(both.tobytes())
            for number in range(self._pages):
                span = slice(number * _BYTES, (number + 1) * _BYTES)
                if kept[span] != self._bits[span]:
                    pages[number] = kept[span]
                    # from here on ``covers`` says no: a write that comes now waits for ``set_ranges``
                    self._bits[span] = kept[span]
            self._write(pages, durable=False)
        return int.from_bytes(kept, "little").bit_count()

    def add_to(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        """Mark every region of the file in ``bitmaps``, one a volume: what a primary after a crash begins with."""
        for first, size, bitmap in zip(self._first, self._sizes, bitmaps, strict=True):
            for index in range(-(-size // self.region)):
                bit = first + index
                if self._bits[bit >> 3] >> (bit & 7) & 1:
                    offset = index * self.region
                    bitmap.set_range(offset, min(self.region, size - offset))

    def ranges(self) -> list[tuple[int, int, int]]:
        """(volume, offset, length) of what is marked, neighbouring regions as one."""
        bitmaps = [DirtyBitmap(size, self.region) for size in self._sizes]
        self.add_to(bitmaps)
        return [(volume, offset, length) for volume, bitmap in enumerate(bitmaps) for offset, length in bitmap.runs()]

    def grow(self, sizes: Sequence[int]) -> None:
        """The volumes have ``sizes`` bytes from now on; what is new is marked. On stable storage when it returns; after
        a crash the file is the old or the new one. DiskError if it cannot be replaced: then it is the old one."""
        assert not self._shared
        with self._lock:
            before = self._sizes, self._first, self._pages, self._bits
            try:
                self._take_over(self.ranges(), before[0], sizes)
            except (OSError, DiskError) as error:
                self._sizes, self._first, self._pages, self._bits = before
                if isinstance(error, DiskError):
                    raise
                raise DiskError(f"The write-intent file {self.path} cannot be replaced: {error.strerror}.") from error

    def _take_over(self, marked: Sequence[tuple[int, int, int]], old: Sequence[int], sizes: Sequence[int]) -> None:
        """Replace the file by one for ``sizes`` with the marks of one for ``old``, and what is new marked."""
        self._lay_out(sizes)
        grown = ((volume, was, now - was) for volume, (was, now) in enumerate(zip(old, sizes, strict=True)))
        for volume, offset, length in (*marked, *(range_ for range_ in grown if range_[2] > 0)):
            for index in range(offset // self.region, -(-min(offset + length, sizes[volume]) // self.region)):
                bit = self._first[volume] + index
                self._bits[bit >> 3] |= 1 << (bit & 7)
        self._replace()

    def _replace(self) -> None:
        """Put a file of the bits in memory in the place of the one that is open; whole or not at all. OSError or
        DiskError: it is the old one, or nobody knows, and the next write begins with a whole one."""
        if self._read_only:
            return
        pages = {number: self._bits[number * _BYTES : (number + 1) * _BYTES] for number in range(self._pages)}
        temporary = f"{self.path}.new"
        kept = self._file
        self._file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self._write_pages(pages)
            if os.pwrite(self._file, self._header(), 0) != PAGE:
                raise DiskError(f"The write-intent file {self.path} cannot be replaced: the disk is full.")
            os.fsync(self._file)
            self.synchronous_writes += 1
            os.replace(temporary, self.path)
        except BaseException:
            os.close(self._file)
            self._file = kept
            raise
        os.close(kept)
        self._unsettled = True
        directory = os.open(os.path.dirname(self.path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._unsettled = False

    def close(self) -> None:
        """Close the file; what it says stays."""
        os.close(self._file)

    # The file

    def _header(self) -> bytes:
        return self._header_for(self._sizes)

    def _header_for(self, sizes: Sequence[int]) -> bytes:
        head = _HEADER.pack(_MAGIC, _FORMAT, len(sizes), self.region)
        head += b"".join(_CHECKSUM.pack(size) for size in sizes)
        return (head + _CHECKSUM.pack(xxh3_64_intdigest(head))).ljust(PAGE, b"\0")

    def _load(self) -> bool:
        """Read the file; make it if it is empty or of another layout (then everything counts as written)."""
        found = os.fstat(self._file).st_size > 0
        if os.pread(self._file, PAGE, 0) == self._header():
            for number in range(self._pages):
                self._read(number)
            if not self._read_only:
                os.fdatasync(self._file)  # the process before may have been killed before it did
            return True
        if found and self._resized():
            return True
        if found or self._everything:
            self._bits[:] = b"\xff" * len(self._bits)
        self._replace()
        return False

    def _resized(self) -> bool:
        """Take over a file for the same volumes in other sizes: a crash came between the metadata and this file."""
        sizes, page = self._sizes, os.pread(self._file, PAGE, 0)
        if len(page) != PAGE or page[: _HEADER.size] != _HEADER.pack(_MAGIC, _FORMAT, len(sizes), self.region):
            return False
        old = [size for (size,) in _CHECKSUM.iter_unpack(page[_HEADER.size : _HEADER.size + 8 * len(sizes)])]
        if page != self._header_for(old):
            return False
        self._lay_out(old)
        for number in range(self._pages):
            self._read(number)
        self._take_over(self.ranges(), old, sizes)
        return True

    def _read(self, number: int) -> None:
        page = os.pread(self._file, PAGE, (number + 1) * PAGE)
        body = page[8:]
        if len(page) == PAGE and _CHECKSUM.unpack_from(page)[0] == xxh3_64_intdigest(body, number):
            self._bits[number * _BYTES : (number + 1) * _BYTES] = body
        else:
            self.damaged_pages += 1
            self._bits[number * _BYTES : (number + 1) * _BYTES] = b"\xff" * _BYTES

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else changes the file meanwhile, if anybody could. The lock is the open file description's: one of the
        process would end when another thread closes the file, having only looked at it."""
        if self._shared:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLKW, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        try:
            yield
        finally:
            if self._shared:
                fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))

    def _write(self, pages: dict[int, bytearray], *, durable: bool) -> None:
        try:
            if pages and self._unsettled:
                self._replace()
            self._write_pages(pages)
            if durable and pages:
                os.fdatasync(self._file)
                self.synchronous_writes += 1
        except OSError as error:
            raise DiskError(f"The write-intent file {self.path} cannot be written: {error.strerror}.") from error

    def _write_pages(self, pages: dict[int, bytearray]) -> None:
        for number, page in pages.items():
            data = _CHECKSUM.pack(xxh3_64_intdigest(page, number)) + page
            if os.pwrite(self._file, data, (number + 1) * PAGE) != PAGE:
                raise DiskError(f"The write-intent file {self.path} cannot be written: the disk is full.")
