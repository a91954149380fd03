"""A begin that is not granted at once: who waits in the kernel's queue, and who keeps the time meanwhile.

The essay of ``secondary.requests`` says how waiting and fairness work; this is their machinery.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import threading
import time
from typing import TYPE_CHECKING, Final

from common.disk import FLOCK
from secondary.holders import Ranges
from secondary.locks import RDLCK, SETLK, WRLCK, Description

if TYPE_CHECKING:
    from secondary.requests import CowRequest, RequestTable

INTENT: Final = 1 << 61
"""Offset of the space in which waiters announce themselves."""
PATIENCE_S: Final = 0.5
"""How long a waiter keeps newcomers from overtaking it, before it lets them by for as long."""
ANNOUNCE_S: Final = 0.05
"""How often a waiter renews its hint; a hint is valid for twice as long."""
LOOK_S: Final = 0.005
"""How often a waiter looks for itself that waits for its turn for longer than ``PATIENCE_S``: who is in front may be
stopped, and hold nothing but its place."""


class Wait:
    """One contended begin: a helper thread in the kernel's queue, and the caller that keeps the time."""

    def __init__(self, table: RequestTable, ranges: Ranges, kind: int) -> None:
        self._table = table
        self._ranges = ranges
        self._kind = kind
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._abandoned = False
        self._granted: Description | None = None
        self._error: OSError | None = None
        self._queued = False
        """The helper holds its intents and waits for the ranges."""
        self._intent = table.lend()
        try:
            self._range = table.lend()
        except BaseException:  # too many open files: one that is lost at each attempt would make that last
            table.take_back(self._intent)
            raise

    def result(self, limit_s: float) -> Description:
        self._table.announce()
        try:
            threading.Thread(target=self._run, name=f"cow wait {self._table.name}", daemon=True).start()
        except BaseException:
            self._table.take_back(self._intent)
            self._table.take_back(self._range)
            raise
        try:
            self._keep_time(limit_s)
        except BaseException:
            self._abandon()
            if self._granted is not None:
                self._table.release(self._granted)
            raise
        if self._granted is None:
            raise self._error or self._table.timed_out(self._ranges, shared=self._kind == RDLCK)
        return self._granted

    def _keep_time(self, limit_s: float) -> None:
        start = time.monotonic()
        queued_at = 0.0
        intents_held = True
        tick = ANNOUNCE_S
        while not self._done.wait(min(tick, max(0.0, start + limit_s - time.monotonic()))):
            now = time.monotonic()
            if now - start >= limit_s:
                self._abandon()
                break
            tick = ANNOUNCE_S
            if not self._queued:
                queued_at = now
                if now - start >= PATIENCE_S:
                    if self._look():
                        break
                    tick = LOOK_S
                    continue
            elif now - queued_at >= PATIENCE_S:
                intents_held = self._toggle_intents(intents_held)
                queued_at = now
            if intents_held:
                self._table.announce()

    def _run(self) -> None:
        granted = False
        try:
            for start, end in self._ranges:
                _lock_waiting(self._intent.fd, WRLCK, INTENT + start, end - start)
            with self._lock:
                self._queued = not self._abandoned
            if self._queued:
                for start, end in self._ranges:
                    _lock_waiting(self._range.fd, self._kind, start, end - start)
                    if self._abandoned:
                        break  # or it would hold this one until the next is granted, which nobody wants any more
                granted = True
        except OSError as error:
            self._error = error
        with self._lock:
            self._queued = False
            kept = granted and not self._abandoned
            self._table.take_back(self._intent)
            self._table.take_back(self._range, locked=kept)
            if kept:
                self._granted = self._range
            self._done.set()

    def _look(self) -> bool:
        """Without a turn: True if the ranges are free, and ours now. The helper gives its place up when it gets one."""
        description = self._table.take()
        try:
            for start, end in self._ranges:
                fcntl.fcntl(description.fd, SETLK, FLOCK.pack(self._kind, 0, start, end - start, 0))
            with self._lock:
                if self._granted is None and not self._queued:
                    self._abandoned = True
                    self._granted = description
                    return True
        except (BlockingIOError, PermissionError):
            pass
        finally:
            if self._granted is not description:
                self._table.release(description)
        return False

    def _abandon(self) -> None:
        with self._lock:
            self._abandoned = self._granted is None
            if self._abandoned and self._queued:
                self._intent.unlock()
                self._range.unlock()  # those before the one that the helper waits for

    def _toggle_intents(self, held: bool) -> bool:
        """Let newcomers by, or keep them back again; True if they are kept back now."""
        with self._lock:
            if not self._queued:
                return held
            if held:
                self._intent.unlock()
                return False
            try:
                for start, end in self._ranges:
                    fcntl.fcntl(self._intent.fd, SETLK, FLOCK.pack(WRLCK, 0, INTENT + start, end - start, 0))
            except (BlockingIOError, PermissionError):
                self._intent.unlock()
                return False
            return True


class AsyncWait:
    """One contended begin of an event loop: a thread begins, the task awaits, and whoever comes last cleans up."""

    def __init__(self, table: RequestTable, start: int, end: int, shared: bool) -> None:
        self._begin = functools.partial(table.cow_request_begin, start, end, shared=shared)
        self._name = table.name
        self._lock = threading.Lock()
        self._cancelled = False
        self._request: CowRequest | None = None
        self._error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()

    async def result(self) -> CowRequest:
        threading.Thread(target=self._run, name=f"cow request {self._name}", daemon=True).start()
        try:
            await self._done.wait()
        except asyncio.CancelledError:
            with self._lock:
                self._cancelled = True
                if self._request is not None:
                    self._request.end()
            raise
        if self._error is not None:
            raise self._error
        assert self._request is not None
        return self._request

    def _run(self) -> None:
        request: CowRequest | None = None
        try:
            request = self._begin()
        except Exception as error:
            self._error = error
        with self._lock:
            # A loop that ends may never run what is scheduled here: a cancelled request is ended by this thread.
            if self._cancelled and request is not None:
                request.end()
            self._request = request
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._done.set)


def _lock_waiting(fd: int, kind: int, start: int, length: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, FLOCK.pack(kind, 0, start, length, 0))
