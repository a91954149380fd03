"""What a resync and a verification share: their place behind the guests, reading in step, and asking by hashes.

*In step*: a piece is read from the primary disk and handed to the session in one step of the loop, so it has its place
in the write history like any guest's write: what a guest writes later is sent later. Of a VERIFY that is as true as of
a write, which is why a question can have no false answer, whatever guests do meanwhile. A piece that has to be read in
a thread (it is not in the page cache) may be overtaken; writes that touch it are noticed, and it is read again.

*Behind the guests*: ``Pace`` keeps only a small part of the window in flight, a smaller one while guests write, none
of it while they fill the window, and keeps to a ceiling in bytes a second if there is one. A floor and a deadline are
kept whatever guests do.

A question is the xxh3-64 of ``QUESTION_BYTES``; a hole is one question of up to ``HOLE_QUESTION``, whose hash is known
without reading.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from xxhash import xxh3_64_intdigest

from common import limits
from common.disk import HOLE, hash_of_zeroes
from common.wire import QUESTION
from primary.mirror import Mirror, MirroredDisk
from primary.resync import ResyncLimits

QUESTION_BYTES: Final = 64 * limits.KIB
PIECE: Final = 1 * limits.MIB
"""Read and asked about, or sent, in one step."""
HOLE_QUESTION: Final = 4 * limits.MIB
LOOK: Final = 64 * limits.MIB
"""How far ahead a marked range is looked at: the longest hole that travels as one message."""
IN_FLIGHT: Final = 8 * limits.MIB
"""Bytes of a resync or verification that are unanswered at most."""
BUSY_IN_FLIGHT: Final = 2 * limits.MIB
"""The same while guests write."""
GUEST_SHARE: Final = 0.5
"""Above this part of the window in use by guests, nothing of ours is sent."""
BUSY_S: Final = 0.1
"""How long after a guest's write the disk counts as busy."""

TICK_S: Final = 1e-6
"""A shorter wait may be none: it is lost in the rounding of the clock."""

Range = tuple[int, int, int]
"""(index of the volume, offset, length)"""


async def woken(wake: asyncio.Event, seconds: float) -> None:
    """Until ``wake`` is set from now on, or ``seconds`` are over."""
    wake.clear()
    try:
        async with asyncio.timeout(max(seconds, TICK_S)):
            await wake.wait()
    except TimeoutError:
        return


class Pace:
    """When the next piece may go, within ``limits``. ``left`` tells how many bytes there are still to ask about, for a
    deadline."""

    def __init__(self, mirror: Mirror, limits: ResyncLimits, left: Callable[[], int] = lambda: 0) -> None:
        self.mirror = mirror
        self.in_flight = 0
        self._limits = limits
        self._ceiling = limits.ceiling
        self._left = left
        self._begun = 0
        self._started = time.monotonic()
        self._due = 0.0
        self._wake = asyncio.Event()
        self._written = mirror.written
        self._busy_until = 0.0

    def begin(self, length: int) -> None:
        """A piece goes out."""
        self.in_flight += length
        self._begun += length
        if self._ceiling:
            self._due = max(self._due, time.monotonic()) + length / self._ceiling

    def end(self, length: int) -> None:
        """A piece is answered."""
        self.in_flight -= length
        self._wake.set()

    async def room(self) -> None:
        """Wait until a piece may go; gives way to the loop in any case."""
        while True:
            now = time.monotonic()
            wait = self._due - now
            if wait <= 0:
                if not self._full(now):
                    break
                wait = 0.02
            await woken(self._wake, wait)
        await asyncio.sleep(0)

    async def drained(self) -> None:
        """Wait until everything is answered."""
        while self.in_flight:
            await woken(self._wake, 1.0)

    def _full(self, now: float) -> bool:
        mirror = self.mirror
        if mirror.written != self._written:
            self._written = mirror.written
            self._busy_until = now + BUSY_S
        if self.in_flight >= (BUSY_IN_FLIGHT if now < self._busy_until else IN_FLIGHT):
            return True
        session = mirror.carrier.session
        if session.lag_bytes() - self.in_flight <= GUEST_SHARE * session.config.window_bytes:
            return False
        return self.in_flight > PIECE or not self._behind(now)

    def _behind(self, now: float) -> bool:
        """Slower than the floor, or than what the deadline demands of the rest."""
        limits, elapsed = self._limits, max(1e-9, now - self._started)
        if self._begun < limits.floor * elapsed:
            return True
        if not limits.deadline_s:
            return False
        remaining_s = limits.deadline_s - elapsed
        return remaining_s <= 0 or self._left() / remaining_s > self._begun / elapsed


class Reader:
    """Reads pieces so that they are true at the moment of return."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._loop = asyncio.get_running_loop()
        self._range: Range = (0, 0, 0)
        self._overtaken = False

    async def read(self, volume: MirroredDisk, offset: int, view: memoryview) -> None:
        """Fill ``view`` with what is there at the moment of return; OSError if the disk fails."""
        try:
            volume.disk.read_nowait(offset, view)
            return
        except BlockingIOError:
            pass
        self._range = (volume.index, offset, offset + len(view))
        self._overtaken = True
        while self._overtaken:
            self._overtaken = False
            self._mirror.overlap = self._overlap
            try:
                await self._loop.run_in_executor(None, volume.disk.read_into, offset, view)
            finally:
                if self._mirror.overlap == self._overlap:  # else a resync has begun meanwhile
                    self._mirror.overlap = None

    def _overlap(self, index: int, offset: int, length: int) -> None:
        mine, start, end = self._range
        if mine == index and offset < end and offset + length > start:
            self._overtaken = True


class _Asked:
    """A VERIFY on its way; the engine calls ``answered``."""

    __slots__ = ("_owner", "ranges", "weight")

    def __init__(self, owner: Inquiry, ranges: list[Range], weight: int) -> None:
        self._owner = owner
        self.ranges = ranges
        self.weight = weight

    def answered(self, differing: bytes | None) -> None:
        """One byte a range, 1 = differs; None: the answer was lost."""
        self._owner.answered(self, differing)


class Inquiry:
    """Asks about ranges; ``heard(volume, offset, length, differs)`` tells each answer, None for one that was lost."""

    def __init__(
        self, mirror: Mirror, reader: Reader, pace: Pace, heard: Callable[[int, int, int, bool | None], None]
    ) -> None:
        self.asked_bytes = 0
        self._mirror = mirror
        self._reader = reader
        self._pace = pace
        self._heard = heard
        self._memory = memoryview(bytearray(PIECE))

    async def ask(
        self, volume: MirroredDisk, offset: int, length: int, unit: int = QUESTION_BYTES, *, exactly: bool = False
    ) -> int:
        """Ask about the beginning of a range, in questions of ``unit`` bytes, and of a whole hole in one unless
        ``exactly``; returns how many bytes that was.

        Await ``Pace.room`` before. OSError if the primary disk cannot be read.
        """
        size, flags = volume.disk.extents(offset, length)[0]
        if flags & HOLE and (size >= unit or size == length):
            size = min(size if size == length else size // unit * unit, HOLE_QUESTION)
            step = unit if exactly else size
            ranges = [(volume.index, offset + at, min(step, size - at)) for at in range(0, size, step)]
            self._send(ranges, [hash_of_zeroes(length) for _, _, length in ranges], QUESTION_BYTES)
            return size
        size = min(length, PIECE)
        view = self._memory[:size]
        await self._reader.read(volume, offset, view)
        ranges = [(volume.index, offset + at, min(unit, size - at)) for at in range(0, size, unit)]
        self._send(ranges, [xxh3_64_intdigest(view[at : at + unit]) for at in range(0, size, unit)], size)
        return size

    async def ask_together(self, ranges: Sequence[Range]) -> None:
        """Ask about ranges in many places, ``QUESTION_BYTES`` each at most, ``PIECE`` together, in one message; about
        those that a device has to be asked for one by one. Await ``Pace.room`` before; OSError as in ``ask``."""
        asked: list[Range] = []
        hashes: list[int] = []
        cold: list[Range] = []
        view = self._memory
        for index, offset, length in ranges:
            disk = self._mirror.volumes[index].disk
            size, flags = disk.extents(offset, length)[0]
            if flags & HOLE and size == length:
                digest = hash_of_zeroes(length)
            else:
                try:
                    disk.read_nowait(offset, view[:length])
                except BlockingIOError:
                    cold.append((index, offset, length))
                    continue
                digest = xxh3_64_intdigest(view[:length])
            asked.append((index, offset, length))
            hashes.append(digest)
        if asked:
            self._send(asked, hashes, sum(length for _, _, length in asked))
        for index, offset, length in cold:
            await self._pace.room()
            await self.ask(self._mirror.volumes[index], offset, length)

    def _send(self, ranges: list[Range], hashes: list[int], weight: int) -> None:
        questions = np.zeros(len(ranges), dtype=QUESTION)
        questions["volume"], questions["offset"], questions["length"] = zip(*ranges, strict=True)
        questions["hash"] = hashes
        self.asked_bytes += sum(length for _, _, length in ranges)
        self._pace.begin(weight)
        carrier = self._mirror.carrier
        carrier.send(carrier.session.verify(questions.tobytes(), _Asked(self, ranges, weight), time.monotonic()))

    def answered(self, asked: _Asked, differing: bytes | None) -> None:
        """An answer came, or it is known that none will."""
        self._pace.end(asked.weight)
        for number, (index, offset, length) in enumerate(asked.ranges):
            self._heard(index, offset, length, None if differing is None else bool(differing[number]))
