"""The resync at work: sends what the dirty bitmaps mark, in the stream, while guests write.

A piece is read from the primary disk and handed to the session in one step of the loop, so it takes its place in the write
history like any guest's write: what a guest writes later is sent later. A piece that has to be read in a thread (it is not in the
page cache) may be overtaken; writes that touch it meanwhile are noticed, and it is read again.

Holes travel as zeroes without data and become holes on the secondary. Guests go first: the resync keeps only a small part of
the window in flight, and none of it while guests fill the rest.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from common import limits
from common.batch import WRITE, ZERO
from common.disk import HOLE
from common.wire import EXTENT_STRUCT, RESYNC_DATA
from primary.mirror import Mirror, MirroredDisk

PIECE: Final = 1 * limits.MIB
LOOK: Final = 64 * limits.MIB
"""How far ahead a marked range is looked at: the longest hole that travels as one message."""
IN_FLIGHT: Final = 8 * limits.MIB
"""Bytes of the resync that are unacknowledged at most."""
GUEST_SHARE: Final = 0.5
"""Above this part of the window in use by anybody, the resync waits."""


class _Piece:
    """A read buffer on its way; ``unpin`` when the secondary has it."""

    __slots__ = ("_owner", "length", "memory")

    def __init__(self, owner: Synchroniser, length: int, memory: memoryview | None) -> None:
        self._owner = owner
        self.length = length
        self.memory = memory

    def unpin(self) -> None:
        self._owner.confirmed(self)

    def fail(self, code: int) -> None:
        """A resync has no client to tell; the session is lost next, and what it held becomes dirty again."""


class Synchroniser:
    """One resync, from the bitmaps as they are when it starts. ``run`` it as a task."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.total_bytes = sum(bitmap.dirty_bytes() for bitmap in mirror.bitmaps)
        self.done_bytes = 0
        self.moved_bytes = 0
        """Bytes of data that travelled: less than ``done_bytes`` where there are holes."""
        self.started = time.monotonic()
        self._in_flight = 0
        self._free: list[memoryview] = []
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._reading: tuple[int, int, int] | None = None
        self._overtaken = False

    @property
    def rate(self) -> float:
        """Bytes a second since the start."""
        return self.done_bytes / max(1e-9, time.monotonic() - self.started)

    async def run(self) -> None:
        """Send everything that is marked. Bits are cleared as their piece is handed to the session."""
        self.mirror.overlap = self._overlap
        try:
            for volume, bitmap in zip(self.mirror.volumes, self.mirror.bitmaps, strict=True):
                position = 0
                while (found := bitmap.next_run(position, LOOK)) is not None:
                    await self._room()
                    position = found[0] + await self._send(volume, *found)
        finally:
            self.mirror.overlap = None

    def confirmed(self, piece: _Piece) -> None:
        """The secondary has a piece."""
        self._in_flight -= piece.length
        if piece.memory is not None and len(self._free) < IN_FLIGHT // PIECE:
            self._free.append(piece.memory)
        self._wake.set()

    async def _room(self) -> None:
        """Wait until the resync may send. Guests' own use of the window is looked at as it changes, at every loop turn."""
        session = self.mirror.carrier.session
        while self._in_flight >= IN_FLIGHT or session.lag_bytes() - self._in_flight > GUEST_SHARE * session.config.window_bytes:
            self._wake.clear()
            try:
                async with asyncio.timeout(0.02):
                    await self._wake.wait()
            except TimeoutError:
                continue
        await asyncio.sleep(0)

    async def _send(self, volume: MirroredDisk, offset: int, length: int) -> int:
        """Send the beginning of a marked range: one hole, or data of at most ``PIECE`` bytes. Returns how many bytes that were.

        Between the look at the disk and the hand-over nothing else runs, unless ``_read`` notices and repeats it.
        """
        bitmap = self.mirror.bitmaps[volume.index]
        size, flags = volume.disk.extents(offset, length)[0]
        if flags & HOLE:
            bitmap.clear_range(offset, size)
            self._hand_over(volume, offset, size, None)
        else:
            size = min(size, PIECE)
            memory = self._free.pop() if self._free else memoryview(bytearray(PIECE))
            await self._read(volume, offset, memory[:size])
            bitmap.clear_range(offset, size)
            self._hand_over(volume, offset, size, memory)
        self.done_bytes += size
        return size

    async def _read(self, volume: MirroredDisk, offset: int, view: memoryview) -> None:
        """Fill ``view`` with what is there at the moment of return."""
        while True:
            try:
                volume.disk.read_nowait(offset, view)
                return
            except BlockingIOError:
                self._reading = (volume.index, offset, offset + len(view))
                self._overtaken = False
                try:
                    await self._loop.run_in_executor(None, volume.disk.read_into, offset, view)
                finally:
                    self._reading = None
                if not self._overtaken:
                    return

    def _overlap(self, index: int, offset: int, length: int) -> None:
        reading = self._reading
        if reading is not None and reading[0] == index and offset < reading[2] and offset + length > reading[1]:
            self._overtaken = True

    def _hand_over(self, volume: MirroredDisk, offset: int, length: int, memory: memoryview | None) -> None:
        mirror = self.mirror
        kind = ZERO if memory is None else WRITE
        extent = EXTENT_STRUCT.pack(offset, length, 0, volume.index, kind, 0, 0)
        payload: Any = b"" if memory is None else memory[:length]
        piece = _Piece(self, len(payload), memory)
        self._in_flight += piece.length
        self.moved_bytes += piece.length
        blocks = mirror.blocks_touched(offset, length)
        session = mirror.carrier.session
        mirror.carrier.send(session.write(extent, payload, blocks, RESYNC_DATA, piece, time.monotonic()))
