"""Receive buffers that are handed on instead of copied.

An export receives into a large buffer; the payloads of a batch stay where ``recv`` put them, in the primary's pwrite
and in the message to the secondary. So a buffer lives until its last user is done: each user holds a pin, and the last
``unpin`` brings the buffer back. Allocating (and zeroing, and faulting in) megabytes per batch instead cost a factor of
three in a sketch.

The pool is bounded: ``count`` buffers plus one for each connection that was ``admit``-ted. An idle connection keeps at
most one buffer, so ``count`` buffers are always left for work in flight, and whoever finds none free can wait for a
batch to finish: nobody can wait for a buffer that only an idle client could give back. A connection that is gone leaves
its buffer behind while its writes are on their way to the secondary, so a new one may have to wait before it is
accepted. Requests that no pooled buffer can hold get one of a few ``large`` ones. Those are held by clients in the
middle of a request, too, so a client that stalls there is bounded by a ``Patience`` as soon as others wait. All of it
belongs to one event loop; nothing here is safe to call from another thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from common import limits

SLACK: Final = 64 * limits.KIB
"""A buffer holds this much more than its nominal size, so that a request of exactly that size fits with its header."""
LARGE_SIZE: Final = limits.MAX_PAYLOAD + SLACK
LARGE_COUNT: Final = 8
LARGE_KEPT: Final = 2
"""Free large buffers that are kept; the others go back to the system."""
PATIENCE_S: Final = 30.0
"""How long a client may stall inside a large request while others wait; the time that Linux gives a request."""
PATIENCE_BYTES: Final = limits.MIB
"""Less than this in ``PATIENCE_S`` is a stall, so that a buffer is held for a quarter of an hour at most."""


class PooledBuffer:
    """Memory with a count of its users. ``view`` is all of it, writable."""

    __slots__ = ("_pool", "pins", "view")

    def __init__(self, pool: BufferPool, size: int) -> None:
        self._pool = pool
        self.pins = 0
        self.view = memoryview(bytearray(size))

    def pin(self) -> None:
        """Keep the contents as they are until the matching ``unpin``."""
        self.pins += 1

    def unpin(self) -> None:
        """Let go; the last one gives the buffer back to the pool."""
        self.pins -= 1
        if not self.pins:
            self._pool.release(self)
        elif self.pins == 1 and len(self.view) > self._pool.size:
            # a client that waits for another large one can go on in this
            self._pool.wake(large=True)
        assert self.pins >= 0, "unpinned more often than pinned"


class BufferPool:
    """Buffers of ``size`` (plus ``SLACK``) bytes, ``count`` and one for each admitted connection, and large ones."""

    def __init__(self, size: int = limits.RECEIVE_BUFFER, count: int = limits.RECEIVE_BUFFERS) -> None:
        self.size = size + SLACK
        self._limit = count
        self._used = 0
        self._large_used = 0
        self._free: list[PooledBuffer] = []
        self._free_large: list[PooledBuffer] = []
        self._waiting: deque[Callable[[], None]] = deque()
        self._waiting_large: deque[Callable[[], None]] = deque()

    @property
    def used(self) -> int:
        """Buffers of both kinds that somebody has pinned."""
        return self._used + self._large_used

    @property
    def large_wanted(self) -> bool:
        """Somebody waits for a large buffer."""
        return bool(self._waiting_large)

    @property
    def overdrawn(self) -> bool:
        """No connection can be admitted: too many buffers outlive those who filled them."""
        return self._used > self._limit

    def admit(self) -> None:
        """A connection opens: it may keep one buffer. Not while the pool is ``overdrawn``."""
        self._limit += 1

    def dismiss(self) -> None:
        """A connection that was admitted is gone."""
        self._limit -= 1

    def acquire(self, needed: int = 0) -> PooledBuffer | None:
        """A buffer of at least ``needed`` bytes, pinned once for the caller; None if all are in use (see ``wait``).

        Its contents are whatever the last user left. ``needed`` is at most ``LARGE_SIZE``.
        """
        assert needed <= LARGE_SIZE
        if needed <= self.size:
            if self._used >= self._limit:
                return None
            self._used += 1
            buffer = self._free.pop() if self._free else PooledBuffer(self, self.size)
        else:
            if self._large_used >= LARGE_COUNT:
                return None
            self._large_used += 1
            buffer = self._free_large.pop() if self._free_large else PooledBuffer(self, LARGE_SIZE)
        buffer.pins = 1
        return buffer

    def wait(self, callback: Callable[[], None], needed: int = 0) -> None:
        """Call ``callback`` once when it is worth while to ``acquire`` a buffer of ``needed`` bytes again. It runs
        inside somebody's ``unpin``: it only schedules."""
        (self._waiting if needed <= self.size else self._waiting_large).append(callback)

    def release(self, buffer: PooledBuffer) -> None:
        """What the last ``unpin`` does."""
        if len(buffer.view) == self.size:
            self._used -= 1
            if len(self._free) < self._limit:
                self._free.append(buffer)
        else:
            self._large_used -= 1
            if len(self._free_large) < LARGE_KEPT:
                self._free_large.append(buffer)
        self.wake(large=len(buffer.view) > self.size)

    def wake(self, *, large: bool) -> None:
        """Call those that wait for a buffer of this kind."""
        waiting = self._waiting_large if large else self._waiting
        while waiting:
            waiting.popleft()()


class Patience:
    """How long a client that is in the middle of a large request may let others wait for its buffer.

    ``arrived`` tells the bytes that have come from it so far, or None while it is not the client that holds things up;
    ``lose`` cuts it off.
    """

    __slots__ = ("_arrived", "_loop", "_lose", "_pool", "_seen", "_timer")

    def __init__(self, pool: BufferPool, arrived: Callable[[], int | None], lose: Callable[[str], None]) -> None:
        self._pool = pool
        self._arrived = arrived
        self._lose = lose
        self._seen: int | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """The client has a large buffer now."""
        if self._timer is None:
            self._seen = self._arrived()
            self._timer = self._loop.call_later(PATIENCE_S, self._look)

    def stop(self) -> None:
        """It has none any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        before = self._seen
        self.start()
        stalls = before is not None and self._seen is not None and self._seen - before < PATIENCE_BYTES
        if stalls and self._pool.large_wanted:
            self._lose(f"it stalled for {PATIENCE_S:g} s inside a large request while others wait for its buffer")
