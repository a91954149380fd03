"""The resync at work: finds out what differs, and sends it, in the stream, while guests write.

Two sets of marks, and nothing else, say what is left to do:

    suspects    may differ: asked about by hashes (``primary.questions``)        64 KiB a bit
    bitmaps     differ, as far as anybody knows: sent                            the pair's blocks

First the questions, so that it is known how much differs before a byte is copied; then the copies, as
``primary.resync`` plans them. A mark of either kind goes only when its answer is there or its piece is in the
session's hands, which gives it back if the secondary is lost. So a resync that is interrupted, wherever, is a resync
with fewer marks.

After a start that was not clean there are samples before all that (``primary.samples``): outside both sets nothing may
differ, and if anything does, everything is suspect.

Where nearly every answer is "differs" (a new disk), asking costs more than it saves: then a stretch is taken for
different unasked, twice as long each time, with a sample between.

Holes, and data that is all zeroes, travel as zeroes without data and become holes on the secondary.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from common import limits
from common.batch import ZERO
from common.bitmap import DirtyBitmap
from common.disk import HOLE
from common.wire import EXTENT_STRUCT, RESYNC_DATA
from primary.mirror import Mirror
from primary.questions import LOOK, PIECE, QUESTION_BYTES, Inquiry, Pace, Reader, woken
from primary.resync import DecayingRate, Piece, ResyncLimits, ResyncPlan, thin_extents
from primary.samples import sample_ranges

SAMPLE: Final = 256
"""Answers by which it is judged whether asking pays."""
HOPELESS: Final = 0.9
"""Part of a sample that has to differ for the next stretch to go unasked."""
STRETCH: Final = 64 * limits.MIB
LONGEST_STRETCH: Final = 4096 * limits.MIB
RUNS: Final = 256
"""Marked ranges that one turn of the loop walks over: a few milliseconds."""
KEEP_MEMORY: Final = 16
"""Read buffers that are kept for the next pieces."""


class _Carried:
    """A piece with the session; ``unpin`` when the secondary has it."""

    __slots__ = ("_owner", "memory", "piece", "plan", "weight")

    def __init__(
        self, owner: Synchroniser, plan: ResyncPlan, piece: Piece, memory: memoryview | None, weight: int
    ) -> None:
        self._owner = owner
        self.plan = plan
        self.piece = piece
        self.memory = memory
        self.weight = weight

    def unpin(self) -> None:
        self._owner.confirmed(self)

    def fail(self, code: int) -> None:
        """A resync has no client to tell; the session is lost next, and what it held becomes dirty again."""


def make_suspects(mirror: Mirror) -> list[DirtyBitmap]:
    """Empty marks of the kind that is asked about."""
    return [DirtyBitmap(volume.size, QUESTION_BYTES) for volume in mirror.volumes]


def limits_status(limits: ResyncLimits) -> dict[str, float]:
    """For ``status``: bytes a second and seconds, 0 for none."""
    return {"floor": limits.floor, "ceiling": limits.ceiling, "deadline_s": limits.deadline_s}


class Synchroniser:
    """One resync: empties ``suspects`` and the mirror's bitmaps. ``run`` it as a task."""

    def __init__(
        self,
        mirror: Mirror,
        suspects: Sequence[DirtyBitmap],
        limits: ResyncLimits | None = None,
        distrust: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        """``distrust``: samples are asked about first; it is told how many differ, if any do, and has to mark all."""
        self.mirror = mirror
        self.suspects = suspects
        self.phase = "copying"
        self.differing_bytes = 0
        """Of those asked about."""
        self.moved_bytes = 0
        """Bytes of data that travelled: less than what differed where there are holes."""
        self.started = time.monotonic()
        self._limits = limits or ResyncLimits()
        self._plan = ResyncPlan([], self._limits, self.started)
        self._comparing = DecayingRate(self.started)
        self._reading: Piece | None = None
        self._pace = Pace(mirror, self._limits, lambda: self.left_bytes)
        self._inquiry = Inquiry(mirror, Reader(mirror), self._pace, self._heard)
        self.sampling = distrust is not None
        """The samples are not all answered yet."""
        self.surprises = 0
        """Samples that differ, where nothing should."""
        self._distrust = distrust
        self._answers: deque[bool] = deque(maxlen=SAMPLE)
        self._stretch = self._stretch_left = STRETCH
        self._free: list[memoryview] = []
        self._carried = 0
        """Bytes with the session."""
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.total_bytes = self.left_bytes

    @property
    def left_bytes(self) -> int:
        """Bytes that are still marked, of either kind."""
        return sum(bitmap.dirty_bytes() for bitmap in (*self.suspects, *self.mirror.bitmaps))

    @property
    def asked_bytes(self) -> int:
        """Bytes that the secondary was asked about."""
        return self._inquiry.asked_bytes

    def status(self) -> dict[str, Any]:
        """For ``status``: progress in bytes; bytes a second that the phase does lately, and seconds that it takes at
        this rate: how much comparing will find is not known before its end."""
        left = self.left_bytes
        total = max(self.total_bytes, left)
        rate, seconds_left = self._pace_of_phase(time.monotonic())
        return {
            "active": True,
            "phase": self.phase,
            "done_bytes": total - left,
            "total_bytes": total,
            "rate": rate,
            "seconds_left": seconds_left,
            "asked_bytes": self.asked_bytes,
            "differing_bytes": self.differing_bytes,
            "moved_bytes": self.moved_bytes,
            **limits_status(self._limits),
        }

    def _pace_of_phase(self, now: float) -> tuple[float, float | None]:
        """Bytes a second, and seconds left, of what it is doing."""
        if self.phase == "copying":
            progress = self._plan.progress(now)
            return progress.rate, progress.left_s
        self._comparing.note(0, now)
        suspects = sum(bitmap.dirty_bytes() for bitmap in self.suspects)
        return self._comparing.value, self._comparing.left_s(suspects)

    async def run(self) -> None:
        """Ask and send until nothing is marked. OSError if the primary disk cannot be read."""
        if self.sampling:
            await self._sample()
        while True:
            if any(self.suspects):
                self.phase, self._comparing = "comparing", DecayingRate(time.monotonic())
                await self._compare()
                continue
            self.phase = "copying"
            if not any(self.mirror.bitmaps):
                return
            await self.copy()

    # Asking

    async def _sample(self) -> None:
        """Ask about samples of what is not marked."""
        assert self._distrust is not None
        self.phase = "sampling"
        inquiry = Inquiry(self.mirror, Reader(self.mirror), self._pace, self._sampled)
        wanted = sample_ranges(self.mirror.volumes, self.mirror.carrier.session.stream)
        for first in range(0, len(wanted), PIECE // QUESTION_BYTES):
            await self._pace.room()
            together = wanted[first : first + PIECE // QUESTION_BYTES]
            await inquiry.ask_together([range_ for range_ in together if not self._is_marked(*range_)])
        await self._pace.drained()
        if self.surprises:
            await self._distrust(self.surprises)
            self.total_bytes = self.left_bytes
        self.sampling = False

    def _sampled(self, index: int, offset: int, length: int, differs: bool | None) -> None:
        # a write that failed on one side marks what it made different, perhaps only now
        self.surprises += bool(differs) and not self._is_marked(index, offset, length)

    def _is_marked(self, index: int, offset: int, length: int) -> bool:
        return any(bitmaps[index].any_in(offset, length) for bitmaps in (self.suspects, self.mirror.bitmaps))

    async def _compare(self) -> None:
        """Once over all suspects; returns when every question has its answer."""
        for volume, suspects, known in zip(self.mirror.volumes, self.suspects, self.mirror.bitmaps, strict=True):
            for number, (offset, length) in enumerate(known.runs()):
                suspects.clear_range(offset, length)
                if number % RUNS == RUNS - 1:
                    await asyncio.sleep(0)  # there may be a million of them
            position = 0
            while (found := suspects.next_run(position, LOOK)) is not None:
                await self._pace.room()
                offset, length = found
                if self._hopeless():
                    length = min(length, self._stretch_left)
                    known.set_range(offset, length)
                    suspects.clear_range(offset, length)
                    self.differing_bytes += length
                    self._unasked(length)
                    position = offset + length
                else:
                    position = offset + await self._inquiry.ask(volume, offset, length)
        await self._pace.drained()

    def _heard(self, index: int, offset: int, length: int, differs: bool | None) -> None:
        if differs is None:
            return  # still a suspect: asked again in the next round
        self.suspects[index].clear_range(offset, length)
        self._comparing.note(length, time.monotonic())
        self._answers.append(differs)
        if differs:
            self.differing_bytes += length
            self.mirror.bitmaps[index].set_range(offset, length)

    def _hopeless(self) -> bool:
        return len(self._answers) == SAMPLE and sum(self._answers) >= HOPELESS * SAMPLE

    def _unasked(self, length: int) -> None:
        """A stretch went unasked; when it is used up, a new sample decides."""
        self._stretch_left -= length
        if self._stretch_left <= 0:
            self._answers.clear()
            self._stretch = min(2 * self._stretch, LONGEST_STRETCH)
            self._stretch_left = self._stretch

    # Sending

    async def copy(self) -> None:
        """Send everything that is marked; returns when all of it is in the session's hands."""
        now = time.monotonic()
        limits = self._limits
        if limits.deadline_s:
            limits = replace(limits, deadline_s=max(0.001, limits.deadline_s - (now - self.started)))
        plan = self._plan = ResyncPlan(self.mirror.bitmaps, limits, now)
        self.mirror.overlap = plan.wrote
        try:
            while not plan.all_sent:
                piece = plan.next_piece(self._guest_share(), time.monotonic())
                if piece is None:
                    await woken(self._wake, plan.pause_s(time.monotonic()) or 0.02)
                    continue
                self._reading = piece
                await self._send(plan, piece)
                self._reading = None
                await asyncio.sleep(0)
        finally:
            self.stop()

    def stop(self) -> None:
        """Stop for good; at once, not when the task comes round to it: what is being read is marked again."""
        if self._reading is not None:
            self._plan.give_back(self._reading)
            self._reading = None
        if self.mirror.overlap == self._plan.wrote:
            self.mirror.overlap = None

    async def confirm_all(self) -> None:
        """Wait until the secondary has every piece."""
        while self._carried:
            await woken(self._wake, 1.0)

    def confirmed(self, carried: _Carried) -> None:
        """The secondary has a piece, or it was given back and is marked again."""
        self._carried -= carried.weight
        if carried.memory is not None and len(self._free) < KEEP_MEMORY:
            self._free.append(carried.memory)
        carried.plan.confirm(carried.piece, time.monotonic())
        self._wake.set()

    def _guest_share(self) -> float:
        session = self.mirror.carrier.session
        return max(0.0, (session.lag_bytes() - self._carried) / session.config.window_bytes)

    async def _send(self, plan: ResyncPlan, piece: Piece) -> None:
        """Read a piece and give it to the session, unless a guest's write overtook it."""
        volume = self.mirror.volumes[piece.volume]
        size, flags = volume.disk.extents(piece.offset, piece.length)[0]
        if flags & HOLE and size == piece.length:
            plan.hand_over(piece)
            extents = EXTENT_STRUCT.pack(piece.offset, piece.length, 0, piece.volume, ZERO, 0, 0)
            self._carry(plan, piece, extents, None, 0)
            return
        memory = self._free.pop() if self._free else memoryview(bytearray(PIECE))
        view = memory[: piece.length]
        try:
            volume.disk.read_nowait(piece.offset, view)
        except BlockingIOError:
            await self._loop.run_in_executor(None, volume.disk.read_into, piece.offset, view)
        if not plan.hand_over(piece):
            self._free.append(memory)
            return
        extents, data = thin_extents(piece.volume, piece.offset, view, self.mirror.bitmaps[piece.volume].block_size)
        self._carry(plan, piece, extents, memory, data)

    def _carry(
        self, plan: ResyncPlan, piece: Piece, extents: bytes, memory: memoryview | None, data: int
    ) -> None:
        mirror = self.mirror
        payload: Any = memory[: piece.length] if memory is not None and data else b""
        carried = _Carried(self, plan, piece, memory, len(payload) + len(extents))
        self._carried += carried.weight
        self.moved_bytes += data
        blocks = sum(mirror.blocks_touched(offset, length) for offset, length, *_ in EXTENT_STRUCT.iter_unpack(extents))
        session = mirror.carrier.session
        mirror.carrier.send(session.write(extents, payload, blocks, RESYNC_DATA, carried, time.monotonic()))
