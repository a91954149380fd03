"""Dirty bitmaps: one bit a block, set where two disks may differ.

Bits are packed eight to a byte, lowest bit first, in a NumPy array, so that a terabyte in 4 KiB blocks costs 32 MiB.
Setting a range touches whole bytes in the middle and two masks at its ends; many small ranges are set at once by
``set_ranges``. Ranges given in bytes are rounded **outwards** when they are set and **inwards** when they are cleared:
a block is clean only if all of it is known to be.

Above the bits is a summary: for each *stride* of 64 KiB of them how many are set, and whether it was touched since
they were counted. A change only notes that its strides are touched; who asks how many are set counts those again, a few
microseconds each. So ``count`` and ``bool`` cost what changed since the last time, not what the disk has: they run on
event loops, several times for a status and once for each piece of a resync, and counting 4 TiB took 80 to 140 ms.
Searching and copying pass over strides that are known to be clear, and do not touch their memory.

Serialised (``to_bytes``): a header with size, block size and checksum, then the bits compressed by zlib.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from common.errors import WireError

# magic, size in bytes, block size in bytes; then the xxh3-64 of these and of the bits
_HEADER: Final = struct.Struct("<8sQQ")
_CHECKSUM: Final = struct.Struct("<Q")
_MAGIC: Final = b"TDBITS01"
_STRIDE_SHIFT: Final = 16
_STRIDE: Final = 1 << _STRIDE_SHIFT
"""Bytes of bits that are counted together."""
_BLOCK_SHIFT: Final = _STRIDE_SHIFT + 3
_MAX_BITS: Final = 1 << 40


class DirtyBitmap:
    """Bits for a disk of ``size`` bytes in blocks of ``block_size`` bytes; the last block may be short."""

    __slots__ = ("_bits", "_bytes", "_counted", "_counts", "_touched", "block_size", "blocks", "size")

    def __init__(self, size: int, block_size: int) -> None:
        assert size >= 0
        assert block_size > 0
        self.size = size
        self.block_size = block_size
        self.blocks = -(-size // block_size)
        self._allocate()

    def _allocate(self) -> None:
        """Clear bits. They take no memory until they are touched."""
        self._bits: npt.NDArray[np.uint8] = np.zeros(-(-self.blocks // 8), dtype=np.uint8)
        self._bytes = self._bits.data
        """The same memory: a single byte is cheaper this way than through NumPy."""
        strides = -(-len(self._bits) // _STRIDE)
        self._touched = bytearray(strides)
        """1 for a stride that ``_counts`` may be wrong about."""
        self._counts = [0] * strides
        self._counted = 0
        """The sum of ``_counts``."""

    # Marking

    def set_range(self, offset: int, length: int) -> None:
        """Mark every block that [offset, offset + length) touches."""
        if length <= 0:
            return
        first, last = offset // self.block_size, (offset + length - 1) // self.block_size
        assert 0 <= first <= last < self.blocks, (offset, length)
        if first == last:
            self._bytes[first >> 3] |= 1 << (first & 7)
            self._touched[first >> _BLOCK_SHIFT] = 1
        else:
            self._fill(first, last + 1, value=True)

    def clear_range(self, offset: int, length: int) -> None:
        """Clear every block that [offset, offset + length) covers wholly (the disk's end completes its last block)."""
        end = offset + length
        first = -(-offset // self.block_size)
        stop = self.blocks if end >= self.size else end // self.block_size
        if first < stop:
            self._fill(first, stop, value=False)

    def set_all(self) -> None:
        """Mark the whole disk."""
        if self.blocks:
            self._fill(0, self.blocks, value=True)

    def clear_all(self) -> None:
        """Clear the whole disk."""
        self._allocate()

    def set_ranges(self, offsets: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64]) -> None:
        """Mark many ranges at once; lengths are at least 1."""
        if not len(offsets):
            return
        first = (offsets // np.uint64(self.block_size)).astype(np.int64)
        last = ((offsets + lengths - np.uint64(1)) // np.uint64(self.block_size)).astype(np.int64)
        assert int(last.max()) < self.blocks
        wide = last - first > 8
        for begin, end in zip(first[wide].tolist(), last[wide].tolist(), strict=True):
            self._fill(begin, end + 1, value=True)
        first, counts = first[~wide], (last - first)[~wide] + 1
        if not len(first):
            return
        ends = np.cumsum(counts)
        blocks = np.arange(int(ends[-1])) + np.repeat(first - (ends - counts), counts)
        np.bitwise_or.at(self._bits, blocks >> 3, (1 << (blocks & 7)).astype(np.uint8))
        np.frombuffer(self._touched, dtype=np.uint8)[blocks >> _BLOCK_SHIFT] = 1

    def _fill(self, first: int, stop: int, *, value: bool) -> None:
        """Set or clear the blocks [first, stop), first < stop."""
        bits = self._bytes
        head, tail = first >> 3, (stop - 1) >> 3
        one, other = head >> _STRIDE_SHIFT, tail >> _STRIDE_SHIFT
        self._touched[one] = 1
        if one != other:
            self._touched[one : other + 1] = b"\1" * (other + 1 - one)
        head_mask, tail_mask = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - ((stop - 1) & 7))
        if head == tail:
            head_mask &= tail_mask
        if value:
            bits[head] |= head_mask
        else:
            bits[head] &= ~head_mask & 0xFF
        if head == tail:
            return
        if tail - head > 1:
            self._bits[head + 1 : tail] = 0xFF if value else 0
        if value:
            bits[tail] |= tail_mask
        else:
            bits[tail] &= ~tail_mask & 0xFF

    # Asking

    def __contains__(self, offset: int) -> bool:
        """Whether the block that holds the byte at ``offset`` is marked."""
        block = offset // self.block_size
        return bool(self._bytes[block >> 3] >> (block & 7) & 1)

    def any_in(self, offset: int, length: int) -> bool:
        """Whether [offset, offset + length) touches a marked block."""
        if length <= 0:
            return False
        found = self._find(offset // self.block_size, (offset + length - 1) // self.block_size + 1, value=True)
        return found is not None

    def count(self) -> int:
        """Marked blocks."""
        touched, counts = self._touched, self._counts
        stride = touched.find(1)
        while stride >= 0:
            bits = self._bits[stride << _STRIDE_SHIFT : (stride + 1) << _STRIDE_SHIFT]
            words = bits[: len(bits) & ~7].view(np.uint64)
            found = int(np.bitwise_count(words).sum()) + int(np.bitwise_count(bits[len(bits) & ~7 :]).sum())
            self._counted += found - counts[stride]
            counts[stride] = found
            touched[stride] = 0
            stride = touched.find(1, stride + 1)
        return self._counted

    def dirty_bytes(self) -> int:
        """Bytes in marked blocks."""
        count = self.count()
        if count and (self.size - 1) in self:
            return (count - 1) * self.block_size + (self.size - (self.blocks - 1) * self.block_size)
        return count * self.block_size

    def __bool__(self) -> bool:
        return self.count() > 0

    def next_run(self, offset: int, limit: int | None = None) -> tuple[int, int] | None:
        """The first marked range at or after ``offset``, in bytes (offset, length), cut to at most ``limit`` bytes (at
        least a block); None if there is none, as at the end. An ``offset`` inside a marked block counts from that
        block's start."""
        if offset >= self.size:
            return None
        first = self._find(offset // self.block_size, self.blocks, value=True)
        if first is None:
            return None
        stop = self.blocks if limit is None else min(self.blocks, first + max(1, limit // self.block_size))
        clear = self._find(first, stop, value=False)
        end = min(self.size, (stop if clear is None else clear) * self.block_size)
        return first * self.block_size, end - first * self.block_size

    def runs(self, limit: int | None = None) -> Iterator[tuple[int, int]]:
        """All marked ranges as (offset, length) in bytes; the bitmap may change while they are walked."""
        offset = 0
        while offset < self.size:
            run = self.next_run(offset, limit)
            if run is None:
                return
            yield run
            offset = run[0] + run[1]

    def _find(self, first: int, stop: int, *, value: bool) -> int | None:
        """The first block in [first, stop) whose bit is ``value``."""
        position = first
        touched, counts = self._touched, self._counts
        useless = 0 if value else 1 << _BLOCK_SHIFT
        while position < stop:
            stride = position >> _BLOCK_SHIFT
            if counts[stride] == useless and not touched[stride]:
                position = (stride + 1) << _BLOCK_SHIFT
                continue
            byte = position >> 3
            chunk = self._bits[byte : min((stride + 1) << _STRIDE_SHIFT, (stop + 7) >> 3)]
            if position & 7:
                # the rest of a byte that was begun
                rest = (int(chunk[0]) if value else ~int(chunk[0])) >> (position & 7)
                rest &= 0xFF >> (position & 7)
                if rest:
                    found = position + (rest & -rest).bit_length() - 1
                    return found if found < stop else None
                position = (byte + 1) << 3
                continue
            hits = chunk != (0 if value else 0xFF)
            index = int(hits.argmax())
            if hits[index]:
                content = int(chunk[index]) if value else ~int(chunk[index]) & 0xFF
                found = ((byte + index) << 3) + (content & -content).bit_length() - 1
                return found if found < stop else None
            position = (byte + len(chunk)) << 3
        return None

    def flags(self) -> npt.NDArray[np.uint8]:
        """A byte for each block, 1 if it is marked: for bitmaps of large blocks."""
        return np.unpackbits(self._bits, count=self.blocks, bitorder="little")

    # Combining

    def union(self, other: DirtyBitmap) -> None:
        """Mark what ``other`` (of the same disk, in any block size) marks."""
        assert self.size == other.size
        if self.block_size == other.block_size:
            for stride in other._strides_in_use():
                begin, end = stride << _STRIDE_SHIFT, (stride + 1) << _STRIDE_SHIFT
                self._bits[begin:end] |= other._bits[begin:end]
                self._touched[stride] = 1
            return
        ratio, rest = divmod(self.block_size, other.block_size)
        if not rest and 1 < ratio <= _STRIDE and not ratio & (ratio - 1):
            self._union_finer(other, ratio)
            return
        for offset, length in other.runs():
            self.set_range(offset, length)

    def _union_finer(self, other: DirtyBitmap, ratio: int) -> None:
        """``union`` with one that has ``ratio`` blocks, a power of two, in each of ours, without looking at runs."""
        for stride in other._strides_in_use():
            bits = other._bits[stride << _STRIDE_SHIFT : (stride + 1) << _STRIDE_SHIFT]
            if len(bits) < _STRIDE:
                bits = np.concatenate((bits, np.zeros(_STRIDE - len(bits), dtype=np.uint8)))
            if ratio < 8:
                marked = np.unpackbits(bits, bitorder="little").reshape(-1, ratio).any(axis=1)
            elif ratio <= 64:
                marked = bits.view(f"u{ratio // 8}") != 0
            else:
                marked = bits.view(np.uint64).reshape(-1, ratio // 64).any(axis=1)
            first = (stride << _STRIDE_SHIFT) // ratio
            mine = self._bits[first : first + _STRIDE // ratio]
            mine |= np.packbits(marked, bitorder="little")[: len(mine)]
            self._touched[first >> _STRIDE_SHIFT] = 1

    def copy(self) -> DirtyBitmap:
        """An independent copy."""
        twin = DirtyBitmap(self.size, self.block_size)
        twin.union(self)
        return twin

    def _strides_in_use(self) -> list[int]:
        """Those with bits that are set."""
        self.count()
        return [stride for stride, count in enumerate(self._counts) if count]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        alike = (self.size, self.block_size) == (other.size, other.block_size)
        return alike and bool((self._bits == other._bits).all())

    __hash__ = None  # type: ignore[assignment]  # mutable

    def grow(self, size: int) -> None:
        """The disk has grown to ``size`` bytes; what is new is clean. All who share the bitmap see it."""
        assert size >= self.size
        before, strides = self._bits, self._strides_in_use()
        self.size = size
        self.blocks = -(-size // self.block_size)
        self._allocate()
        for stride in strides:
            bits = before[stride << _STRIDE_SHIFT : (stride + 1) << _STRIDE_SHIFT]
            self._bits[stride << _STRIDE_SHIFT : (stride << _STRIDE_SHIFT) + len(bits)] = bits
            self._touched[stride] = 1

    # Storing

    def to_bytes(self) -> bytes:
        """For a file or a message; ``from_bytes`` reads it back."""
        bits = self._bits.tobytes()
        header = _HEADER.pack(_MAGIC, self.size, self.block_size)
        return header + _CHECKSUM.pack(xxh3_64_intdigest(bits, xxh3_64_intdigest(header))) + zlib.compress(bits, 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> DirtyBitmap:
        """Read ``to_bytes``; WireError if it is anything else."""
        start = _HEADER.size + _CHECKSUM.size
        if len(data) < start:
            raise WireError("a dirty bitmap is cut short")
        magic, size, block_size = _HEADER.unpack_from(data)
        (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
        if magic != _MAGIC or not block_size or -(-size // block_size) > _MAX_BITS:
            raise WireError("this is no dirty bitmap")
        length = (-(-size // block_size) + 7) // 8
        try:
            inflater = zlib.decompressobj()
            bits = inflater.decompress(data[start:], length + 1)
        except zlib.error as error:
            raise WireError(f"a dirty bitmap does not decompress: {error}") from None
        whole = len(bits) == length and inflater.eof and not inflater.unused_data
        if not whole or xxh3_64_intdigest(bits, xxh3_64_intdigest(data[: _HEADER.size])) != checksum:
            raise WireError("a dirty bitmap is damaged")
        bitmap = cls(size, block_size)
        bitmap._bits[:] = np.frombuffer(bits, dtype=np.uint8)
        bitmap._touched[:] = b"\1" * len(bitmap._touched)
        if bitmap.blocks & 7 and int(bitmap._bits[-1]) >> (bitmap.blocks & 7):
            raise WireError("a dirty bitmap marks blocks beyond its disk")
        return bitmap
