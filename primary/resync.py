"""Which piece of a resync goes next, when, and how far it is: decisions only, no disks and no clock.

    pending   marked in the bitmaps
    reading   taken by ``next_piece``; its bits are cleared, a guest's write may overtake it
    moving    handed to the session by ``hand_over``, until ``confirm``

A resync must send what the disk holds *at the point of the stream where it is sent*. A guest's write that comes while
a piece is being read (``wrote``) would be undone by that piece: such a piece is *overtaken*, ``hand_over`` says so,
and it is pending again. A guest's write to blocks that are still pending clears the ones it covers whole: it travels
in the stream itself.

Guests go first. What a resync may have in flight shrinks with the square of the share of the window that guests use,
down to nothing when they use half of it, so that a guest that waits never waits for more than a few pieces. Two bounds
shift that: ``ceiling`` caps the rate; ``floor`` (or what a ``deadline`` demands) is kept whatever guests do, by always
allowing a piece when the rate is below it.

Interrupted at any point, ``unfinished`` has everything that is not confirmed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from common.batch import WRITE, ZERO
from common.bitmap import DirtyBitmap
from common.limits import MIB
from common.wire import EXTENT_STRUCT

RATE_HALF_LIFE_S: Final = 2.0
"""How fast the reported rate forgets."""
GUESTS_FIRST: Final = 0.5
"""Share of the window in use by guests from which on the resync stands still (unless it has a floor)."""


@dataclass(frozen=True, slots=True)
class ResyncLimits:
    """Sizes in bytes, rates in bytes a second, 0 = none; ``deadline_s`` counts from the start."""

    piece: int = MIB
    in_flight: int = 8 * MIB
    floor: float = 0.0
    ceiling: float = 0.0
    deadline_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a resync is. ``left_s`` is None while there is no rate to tell it from."""

    total_bytes: int
    done_bytes: int
    rate: float
    left_s: float | None


class DecayingRate:
    """Bytes a second that forget what was long ago: half of it every ``RATE_HALF_LIFE_S``."""

    def __init__(self, now: float) -> None:
        self.value = 0.0
        self._at = now
        self._since = 0
        """Bytes since ``_at``."""

    def note(self, length: int, now: float) -> None:
        """``length`` bytes are done; 0: only time has gone by."""
        self._since += length
        elapsed = now - self._at
        if elapsed >= 0.1:
            keep = 0.5 ** (elapsed / RATE_HALF_LIFE_S) if self.value else 0.0
            self.value = keep * self.value + (1.0 - keep) * (self._since / elapsed)
            self._at, self._since = now, 0

    def left_s(self, left: int) -> float | None:
        """How long ``left`` bytes take at this rate; None while there is none to tell."""
        return left / self.value if self.value > 0 else None


class Piece:
    """A range on its way."""

    __slots__ = ("length", "offset", "overtaken", "volume")

    def __init__(self, volume: int, offset: int, length: int) -> None:
        self.volume = volume
        self.offset = offset
        self.length = length
        self.overtaken = False


class ResyncPlan:
    """See the module. It owns ``bitmaps`` (one a volume) while it lives: writes of guests go to ``wrote``."""

    def __init__(self, bitmaps: Sequence[DirtyBitmap], limits: ResyncLimits, now: float) -> None:
        self.limits = limits
        self._bitmaps = list(bitmaps)
        self._started = now
        self._volume = 0
        self._cursor = 0
        self._reading: set[Piece] = set()
        self._moving: set[Piece] = set()
        self._taken = 0
        """Bytes that are being read or moved."""
        self._confirmed = 0
        self._rate = DecayingRate(now)
        self._tokens = float(limits.piece)
        self._tokens_at = now

    # Pieces

    def next_piece(self, guest_share: float, now: float) -> Piece | None:
        """A piece to read now; None if nothing is left or it is not the time (``finished`` and ``pause_s`` tell).

        ``guest_share``: part of the stream's window that guests' writes take, 0 to 1.
        """
        if self._taken and self._taken + self.limits.piece > self._allowance(guest_share, now):
            return None
        if not self._taken and guest_share >= GUESTS_FIRST and not self._behind(now):
            return None
        if self.pause_s(now) > 0.0:
            return None
        run = self._find()
        if run is None:
            return None
        volume, offset, length = run
        self._bitmaps[volume].clear_range(offset, length)
        self._volume, self._cursor = volume, offset + length
        self._taken += length
        if self.limits.ceiling:
            self._tokens -= length
        piece = Piece(volume, offset, length)
        self._reading.add(piece)
        return piece

    def hand_over(self, piece: Piece) -> bool:
        """The piece is read. True: give it to the session now, in this step. False: it was overtaken, drop it."""
        self._reading.remove(piece)
        if piece.overtaken:
            self._taken -= piece.length
            self._mark(piece)
            return False
        self._moving.add(piece)
        return True

    def confirm(self, piece: Piece, now: float) -> None:
        """The secondary has a piece."""
        self._moving.remove(piece)
        self._taken -= piece.length
        self._confirmed += piece.length
        self._rate.note(piece.length, now)

    def give_back(self, piece: Piece) -> None:
        """A piece could not be read or was handed back by the session: it is pending again."""
        (self._reading if piece in self._reading else self._moving).remove(piece)
        self._taken -= piece.length
        self._mark(piece)

    def wrote(self, volume: int, offset: int, length: int) -> None:
        """A guest writes, in the stream, from here on."""
        end = offset + length
        for piece in self._reading:
            if piece.volume == volume and piece.offset < end and offset < piece.offset + piece.length:
                piece.overtaken = True
        self._bitmaps[volume].clear_range(offset, length)

    def mark(self, volume: int, offset: int, length: int) -> None:
        """More to move: a verify found a difference, or a write failed on one side."""
        self._bitmaps[volume].set_range(offset, length)

    # Questions

    @property
    def finished(self) -> bool:
        """Nothing is pending, being read or moving."""
        return not self._taken and not any(self._bitmaps)

    @property
    def all_sent(self) -> bool:
        """Everything is with the session: what follows in the stream comes behind the whole resync."""
        return not self._reading and not any(self._bitmaps)

    def pause_s(self, now: float) -> float:
        """How long the ceiling forbids another piece; 0.0 if it does not."""
        ceiling = self.limits.ceiling
        if not ceiling:
            return 0.0
        burst = max(float(self.limits.piece), ceiling / 10)
        self._tokens = min(burst, self._tokens + (now - self._tokens_at) * ceiling)
        self._tokens_at = now
        return max(0.0, -self._tokens / ceiling)

    def unfinished(self) -> list[DirtyBitmap]:
        """Copies of the bitmaps with everything that the secondary has not confirmed."""
        copies = [bitmap.copy() for bitmap in self._bitmaps]
        for piece in (*self._reading, *self._moving):
            copies[piece.volume].set_range(piece.offset, piece.length)
        return copies

    def progress(self, now: float) -> Progress:
        """For status. The total moves: guests' writes take pieces off the list, overtaken ones come back."""
        self._rate.note(0, now)
        left = sum(bitmap.dirty_bytes() for bitmap in self._bitmaps) + self._taken
        return Progress(self._confirmed + left, self._confirmed, self._rate.value, self._rate.left_s(left))

    # Parts

    def _find(self) -> tuple[int, int, int] | None:
        """The next marked range behind the cursor, over all volumes, then from the beginning again."""
        count = len(self._bitmaps)
        for step in range(count + 1):
            volume = (self._volume + step) % count
            run = self._bitmaps[volume].next_run(self._cursor if step == 0 else 0, self.limits.piece)
            if run is not None:
                return volume, *run
        return None

    def _mark(self, piece: Piece) -> None:
        self._bitmaps[piece.volume].set_range(piece.offset, piece.length)

    def _allowance(self, guest_share: float, now: float) -> float:
        """Bytes that may be taken in all."""
        free = max(0.0, 1.0 - guest_share / GUESTS_FIRST)
        allowed = self.limits.in_flight * free * free
        return max(allowed, 2.0 * self.limits.piece) if self._behind(now) else allowed

    def _behind(self, now: float) -> bool:
        """Whether the rate since the start is below the floor, or below what the deadline demands of the rest."""
        elapsed = max(1e-9, now - self._started)
        if self.limits.floor and self._confirmed + self._taken < self.limits.floor * elapsed:
            return True
        if not self.limits.deadline_s:
            return False
        left = sum(bitmap.dirty_bytes() for bitmap in self._bitmaps)
        remaining_s = self.limits.deadline_s - elapsed
        return left > 0 and (remaining_s <= 0 or left / remaining_s > self._confirmed / elapsed)


def thin_extents(volume: int, offset: int, view: memoryview, block_size: int) -> tuple[bytes, int]:
    """Packed extents that move what ``view`` holds at ``offset``: zero blocks as ZERO, the rest as WRITE with positions
    in ``view``. Returns (extents, bytes of data): if there are none, the payload need not be sent."""
    whole = len(view) // block_size * block_size
    array = np.frombuffer(view, dtype=np.uint8)
    filled: list[bool] = array[:whole].reshape(-1, block_size).max(axis=1, initial=0).astype(bool).tolist()
    if whole < len(view):
        filled.append(bool(array[whole:].any()))
    bounds = [0, *(i for i in range(1, len(filled)) if filled[i] != filled[i - 1]), len(filled)]
    extents = []
    data = 0
    for first, stop in pairwise(bounds):
        start, end = first * block_size, min(stop * block_size, len(view))
        if filled[first]:
            data += end - start
            extents.append(EXTENT_STRUCT.pack(offset + start, end - start, start, volume, WRITE, 0, 0))
        else:
            extents.append(EXTENT_STRUCT.pack(offset + start, end - start, 0, volume, ZERO, 0, 0))
    return b"".join(extents), data
