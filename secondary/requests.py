"""CowRequest: who has a byte range of a volume in flight, across threads and processes.

The interface is QEMU's (``backup_wait_for_overlapping_requests``, ``backup_cow_request_begin``,
``backup_cow_request_end``), made for real concurrency. The table of requests is the kernel's: open-file-description
(OFD) locks on byte ranges of a small file that all processes of a secondary open. Nothing of it is in shared memory,
so nothing can be left behind: a process that is killed releases what it held at that moment.

How it works
------------
A request owns a file description of its own, taken from a free list. That meets two properties of OFD locks: requests
of one description do not exclude each other, and unlocking a range frees it whoever locked it. With a description a
request, two threads exclude each other like two processes do, and one unlock of everything ends a request, however
many ranges it has. Requests are exclusive (COW, guest writes, checkpoints) or shared (guest reads).

``try_begin`` never waits. A ``begin`` that cannot be granted at once tries again a few times within half a millisecond
(the usual request is held for less), then waits in the kernel: a helper thread makes the blocking call, because such a
call cannot be given a timeout; the caller waits for the thread. A wait that is abandoned (timeout, cancelled task)
leaves the helper behind until the kernel grants it the lock, which it gives back at once. Behind a holder that is
stopped these would become more and more: beyond ``MAX_LENT`` descriptions a wait looks again and again instead.

Fairness
--------
The kernel grants whatever does not conflict *now*, so a steady stream of readers would starve a checkpoint that waits
for [0, size). Hence a waiter announces itself: it locks its ranges in a second space, ``INTENT``, far behind the disk,
and publishes a deadline in the shared word ``waiting``. While that lies in the future, each begin asks the kernel
whether an intent overlaps it, and if so queues up behind it; the kernel's queue is first come, first served. The word
is only a hint: a waiter that dies leaves a stale one, which expires by itself within 100 ms. A waiter gives its intent
up for a while when it was not granted within ``PATIENCE_S``: then the obstacle is not a stream but one stuck holder (a
stopped process, a hung device), and everybody outside that holder's range should go on. A waiter that is stopped itself
keeps its intent: who is behind it looks from then on whether its ranges are free, turn or no turn.

A request of several ranges is taken all or nothing: first all intents in ascending order, then all ranges in ascending
order, and nobody holds a range while waiting for an intent. So there is no cycle of waiters. A thread that begins a
second request while it holds one must do it at higher offsets, or in a volume of a higher number.

Presence
--------
Readers and guest writers hold a shared lock on the ``PRESENCE`` byte from their first request until ``leave``. The
backup job tries an exclusive one for the length of a batch (``try_alone``): if it gets that, there is nobody to
exclude and it needs no request per range.

Fork: a child shares the descriptions of its parent, so it closes all of them at once and starts with none; requests in
flight remain the parent's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Final

from common.disk import FLOCK
from common.errors import TimedOut
from secondary.holders import Ranges, find_holders
from secondary.locks import RDLCK, SETLK, UNLOCK_ALL, WRLCK, Description
from secondary.waits import ANNOUNCE_S, INTENT, AsyncWait, Wait

_pack = FLOCK.pack
_fcntl = fcntl.fcntl

PRESENCE: Final = 1 << 62
ALLOCATION: Final = PRESENCE + 1
"""Held by whoever moves the bump pointer of the active disk."""
HOLD: Final = PRESENCE + 2
"""Held shared by a snapshot that cannot finish while checkpoints go on; a checkpoint takes it exclusively."""

SPINS_S: Final = (0.00002, 0.00005, 0.0001, 0.0003)
"""Pauses before a contended begin goes to the kernel's queue: most requests are held for less than this."""


MAX_LENT: Final = 128
"""Descriptions in the hands of helper threads, two each."""


class CowRequest:
    """A range in flight. A context manager; ``end`` may be called more than once."""

    __slots__ = ("_description", "_table", "end_offset", "shared", "start")

    def __init__(self, table: RequestTable, description: Description, start: int, end: int, shared: bool) -> None:
        self._table = table
        self._description: Description | None = description
        self.start = start
        self.end_offset = end
        self.shared = shared

    def covers(self, table: RequestTable, start: int, end: int) -> bool:
        """True if it is in flight, on ``table``, and [start, end) is within its range."""
        return self._description is not None and table is self._table and self.start <= start <= end <= self.end_offset

    def end(self) -> None:
        """The range is free again; waiters go on."""
        description, self._description = self._description, None
        if description is not None:
            self._table.release(description)

    def __enter__(self) -> CowRequest:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()


class RequestTable:
    """The requests in flight on one volume; every thread and process that opens the same file sees the same table.

    ``waiting`` is a cell of shared memory for the fairness hint (one 64-bit word); without one, fairness holds within
    this table object only. Ranges are rounded out to blocks. All methods may be called from any thread.
    """

    def __init__(
        self,
        path: str,
        size: int,
        block_size: int,
        *,
        name: str = "",
        timeout_s: float = 10.0,
        waiting: memoryview | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.size = size
        self.timeout_s = timeout_s
        self._mask = block_size - 1
        self._end = (size + block_size - 1) & ~self._mask
        self._waiting = waiting if waiting is not None else memoryview(bytearray(8)).cast("Q")
        self._free: list[Description] = []
        self._all: list[Description] = []
        self._lent: set[Description] = set()
        """Those that a helper thread uses, perhaps for longer than the table is open: the helper closes them then."""
        self._lent_lock = threading.Lock()
        self._present: Description | None = None
        self._presence_lock = threading.Lock()
        self._closed = False
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        _tables.add(self)

    # The exported interface

    def wait_for_overlapping_requests(self, start: int, end: int, *, timeout_s: float | None = None) -> None:
        """Return when no request in flight overlaps [start, end). Another may begin right after: ``begin`` is atomic.

        Raises TimedOut, which names the process that holds one.
        """
        ranges = self._round(start, end)
        if not self._conflict(WRLCK, ranges):
            return
        self.release(self.wait_ranges(ranges, shared=False, timeout_s=timeout_s))

    def cow_request_begin(
        self, start: int, end: int, *, shared: bool = False, timeout_s: float | None = None
    ) -> CowRequest:
        """Register [start, end) as in flight, once no overlapping request is (shared ones do not exclude each other).

        End it with ``cow_request_end`` or by leaving its ``with`` block. Raises TimedOut, which names the holder.
        """
        ranges = self._round(start, end)
        description = self.try_ranges(ranges, shared=shared)
        if description is None:
            description = self.wait_ranges(ranges, shared=shared, timeout_s=timeout_s)
        return CowRequest(self, description, *ranges[0], shared)

    def try_begin(self, start: int, end: int, *, shared: bool = False) -> CowRequest:
        """Like ``cow_request_begin`` where that need not wait; else BlockingIOError."""
        ranges = self._round(start, end)
        description = self.try_ranges(ranges, shared=shared)
        if description is None:
            raise BlockingIOError(errno.EAGAIN, f"a request in flight overlaps [{start}, {end})")
        return CowRequest(self, description, *ranges[0], shared)

    def cow_request_end(self, request: CowRequest) -> None:
        """The range of ``request`` is free again."""
        request.end()

    async def wait_for_overlapping_requests_async(self, start: int, end: int) -> None:
        """``wait_for_overlapping_requests`` for an event loop; the wait is in a thread."""
        if self._conflict(WRLCK, self._round(start, end)):
            (await self.cow_request_begin_async(start, end)).end()

    async def cow_request_begin_async(self, start: int, end: int, *, shared: bool = False) -> CowRequest:
        """``cow_request_begin`` for an event loop: granted at once if possible, else a thread waits.

        A task that is cancelled meanwhile gets nothing and leaves nothing locked.
        """
        try:
            return self.try_begin(start, end, shared=shared)
        except BlockingIOError:
            pass
        return await AsyncWait(self, start, end, shared).result()

    # What the layers of the secondary use: several ranges at once, no object a request

    def try_ranges(self, ranges: Ranges, *, shared: bool) -> Description | None:
        """Lock all ``ranges`` at once, or nothing and return None. End with ``release``. Enters (see Presence)."""
        if self._present is None and not self._enter(wait=False):
            return None
        description = self.try_absent(ranges, shared=shared)
        if description is not None and self._present is None and not self._enter(wait=False):
            self.release(description)  # another thread left in between
            return None
        return description

    def try_absent(self, ranges: Ranges, *, shared: bool = False) -> Description | None:
        """``try_ranges`` for the process of the backup job, which excludes itself by other means and need not be
        present.
        """
        kind = RDLCK if shared else WRLCK
        if self._waiting[0] and self._must_queue(kind, ranges):
            return None
        try:
            description = self._free.pop()
        except IndexError:
            description = self._open()
        fd = description.fd
        try:
            for start, end in ranges:
                _fcntl(fd, SETLK, _pack(kind, 0, start, end - start, 0))
        except (BlockingIOError, PermissionError):
            self.release(description)
            return None
        except BaseException:  # the kernel has no memory for a lock: those before it must not stay
            self.release(description)
            raise
        return description

    def wait_ranges(self, ranges: Ranges, *, shared: bool, timeout_s: float | None = None) -> Description:
        """Lock all ``ranges``, waiting as long as it takes up to ``timeout_s``.

        Raises TimedOut naming the holder. Enters.
        """
        if self._present is None:
            self._enter(wait=True)
        description = self.wait_absent(ranges, shared=shared, timeout_s=timeout_s)
        if self._present is None:
            self._enter(wait=True)
        return description

    def wait_absent(self, ranges: Ranges, *, shared: bool = False, timeout_s: float | None = None) -> Description:
        """``wait_ranges`` for the process of the backup job."""
        for pause in SPINS_S:
            description = self.try_absent(ranges, shared=shared)
            if description is not None:
                return description
            time.sleep(pause)
        limit = self.timeout_s if timeout_s is None else timeout_s
        if len(self._lent) >= MAX_LENT:
            look = partial(self.try_absent, ranges, shared=shared)
            return self._look_again(look, ranges, limit, "a CowRequest", shared=shared)
        return Wait(self, ranges, RDLCK if shared else WRLCK).result(limit)

    def release(self, description: Description) -> None:
        """End a request made by ``try_ranges`` or ``wait_ranges``."""
        fd = description.fd
        if fd >= 0:
            _fcntl(fd, SETLK, UNLOCK_ALL)
            self._free.append(description)

    def leave(self) -> None:
        """No requests from this process until further notice: the backup job need not mind us. The next begin enters
        again.

        Does nothing while a request of this process is in flight.
        """
        if not self._presence_lock.acquire(blocking=False):
            return
        try:
            present, self._present = self._present, None
            if present is None:
                return
            # From here on a begin in another thread finds out that it must enter; one that did before is in flight.
            if len(self._free) + 1 < len(self._all):
                self._present = present
            else:
                self.release(present)
        finally:
            self._presence_lock.release()

    def try_alone(self) -> Description | None:
        """If no reader or writer is present in any process, keep them out until ``release``; else None."""
        if self._waiting[0] > time.monotonic_ns():
            return None  # somebody waits to come in: give way
        return self.try_byte(PRESENCE)

    def try_byte(self, byte: int, *, shared: bool = False) -> Description | None:
        """Lock one of the bytes behind the disk, or return None. End with ``release``."""
        description = self.take()
        try:
            _fcntl(description.fd, SETLK, _pack(RDLCK if shared else WRLCK, 0, byte, 1, 0))
        except (BlockingIOError, PermissionError):
            self._free.append(description)
            return None
        except BaseException:
            self._free.append(description)
            raise
        return description

    def wait_byte(self, byte: int, *, shared: bool = False, timeout_s: float | None = None) -> Description:
        """Like ``try_byte``, waiting. Raises TimedOut naming the holder."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        look = partial(self.try_byte, byte, shared=shared)
        return self._look_again(look, [(byte, byte + 1)], limit, "an internal lock", shared=shared)

    def whole(self) -> Ranges:
        """The range of all blocks, what a checkpoint locks."""
        return ((0, self._end),)

    def grow(self, size: int) -> None:
        """The volume has ``size`` bytes from now on. Requests in flight stay what they are."""
        assert size >= self.size
        self._end = (size + self._mask) & ~self._mask
        self.size = size

    def close(self) -> None:
        """Close all descriptions, which ends all requests of this table; abandoned waits close theirs when they end."""
        _tables.discard(self)
        with self._lent_lock:
            self._closed = True
            self._all = [description for description in self._all if description not in self._lent]
        self._drop()

    def timed_out(self, ranges: Ranges, what: str = "a CowRequest", *, shared: bool = False) -> TimedOut:
        """The error for a wait that took too long; names who is in the way of it."""
        holders = find_holders(self.path, ranges, shared=shared)
        named = ", ".join(f"process {pid} ({command})" for pid, command in holders) or "a process that cannot be seen"
        volume = f" of volume {self.name}" if self.name else ""
        return TimedOut(
            f"Waited too long for {what} on bytes {ranges[0][0]} to {ranges[-1][1]}{volume}, held by {named}.",
            hint="If that process is stopped, let it go on (kill -CONT) or end it (kill -KILL).",
        )

    # Inside

    def _look_again(
        self, look: Callable[[], Description | None], ranges: Ranges, limit_s: float, what: str, *, shared: bool
    ) -> Description:
        """Until ``look`` finds that it may. Raises TimedOut."""
        deadline = time.monotonic() + limit_s
        pause = 0.00002
        while (description := look()) is None:
            if time.monotonic() > deadline:
                raise self.timed_out(ranges, what, shared=shared)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.005)
        return description

    def _round(self, start: int, end: int) -> tuple[tuple[int, int]]:
        mask = self._mask
        if not 0 <= start < end <= self._end:
            raise ValueError(f"[{start}, {end}) is no range of a volume of {self.size} bytes")
        return ((start & ~mask, (end + mask) & ~mask),)

    def take(self) -> Description:
        """A description that nothing is locked with."""
        try:
            return self._free.pop()
        except IndexError:
            return self._open()

    def lend(self) -> Description:
        """``take`` for a helper thread, which gives it back in the end."""
        description = self.take()
        with self._lent_lock:
            self._lent.add(description)
        return description

    def take_back(self, description: Description, *, locked: bool = False) -> None:
        """A helper thread is done with it. ``locked``: what it locked is a request of somebody else's now."""
        with self._lent_lock:
            self._lent.discard(description)
            if self._closed:
                description.close()
            elif not locked:
                self.release(description)

    def _open(self) -> Description:
        with _fork_lock:  # a child of a fork in between would keep a description that it does not know of
            assert not self._closed
            description = Description(os.open(self.path, os.O_RDWR | os.O_CLOEXEC))
            self._all.append(description)
        return description

    def _conflict(self, kind: int, ranges: Ranges, space: int = 0) -> bool:
        description = self.take()
        try:
            for start, end in ranges:
                answer = _fcntl(description.fd, fcntl.F_OFD_GETLK, _pack(kind, 0, space + start, end - start, 0))
                assert isinstance(answer, bytes)
                if FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                    return True
            return False
        finally:
            self._free.append(description)

    def _must_queue(self, kind: int, ranges: Ranges) -> bool:
        return self._waiting[0] > time.monotonic_ns() and self._conflict(kind, ranges, INTENT)

    def announce(self) -> None:
        """Publish that somebody waits; valid for two ``ANNOUNCE_S``."""
        self._waiting[0] = time.monotonic_ns() + int(2e9 * ANNOUNCE_S)

    def _enter(self, *, wait: bool) -> bool:
        if not self._presence_lock.acquire(blocking=wait):
            return False  # another thread waits to enter
        try:
            if self._present is None:
                if wait:
                    byte = [(PRESENCE, PRESENCE + 1)]
                    self._present = self._look_again(
                        self._announce_and_try, byte, self.timeout_s, "an internal lock", shared=True
                    )
                else:
                    self._present = self.try_byte(PRESENCE, shared=True)
            return self._present is not None
        finally:
            self._presence_lock.release()

    def _announce_and_try(self) -> Description | None:
        """Each time: a backup job that is alone for longer than that is valid would be alone again before we look."""
        self.announce()
        return self.try_byte(PRESENCE, shared=True)

    def _drop(self) -> None:
        """Close every description.

        In a child of fork that leaves the parent's locks alone: they go with the last close.
        """
        self._present = None
        self._free = []
        everything, self._all = self._all, []
        for description in everything:
            description.close()

    def _after_fork(self) -> None:
        self._presence_lock = threading.Lock()
        self._lent_lock = threading.Lock()
        self._lent.clear()
        self._drop()


# What a fork must find: register_at_fork has no way to take a hook back, so there is one for all tables.
_tables: weakref.WeakSet[RequestTable] = weakref.WeakSet()
_fork_lock = threading.Lock()


def _after_fork_in_child() -> None:
    _fork_lock.release()
    for table in list(_tables):
        table._after_fork()


os.register_at_fork(before=_fork_lock.acquire, after_in_parent=_fork_lock.release, after_in_child=_after_fork_in_child)
