"""Durability on request: many callers, one fdatasync at a time, none on the event loop.

A flush must begin after the writes that it is to cover. So whoever asks while one is running waits for the next one,
and all who wait share it. Unless the one that runs fails: the kernel tells only once of what it lost, which may be what
those wrote who wait, and the next flush would succeed. So they fail with it.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol


class Flushable(Protocol):
    """Something with a blocking, thread-safe ``flush`` that raises OSError."""

    def flush(self) -> None: ...


class Flusher:
    """Runs ``flush`` of some disks in a thread and tells every caller how it went."""

    def __init__(self, disks: list[Flushable], on_error: Callable[[OSError], None]) -> None:
        self._disks = disks
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._waiting: list[Callable[[int], None]] = []
        self._running = False
        self._ended = asyncio.Event()
        self._ended.set()
        self.count = 0

    def request(self, done: Callable[[int], None]) -> None:
        """Call ``done(errno or 0)`` on the loop once everything written before this call is durable, or failed to
        be."""
        self._waiting.append(done)
        if not self._running:
            self._start()

    def _start(self) -> None:
        self._running = True
        self._ended.clear()
        covered, self._waiting = self._waiting, []
        future = self._loop.run_in_executor(self._executor, self._flush_all)
        future.add_done_callback(lambda finished: self._finished(finished, covered))

    def _flush_all(self) -> None:
        for disk in self._disks:
            disk.flush()

    def _finished(self, future: asyncio.Future[None], covered: list[Callable[[int], None]]) -> None:
        self._running = False
        self.count += 1
        error = None if future.cancelled() else future.exception()
        code = 0
        if error is not None:
            code = (error.errno or errno.EIO) if isinstance(error, OSError) else errno.EIO
            self._on_error(error if isinstance(error, OSError) else OSError(errno.EIO, str(error)))
            covered, self._waiting = covered + self._waiting, []
        if self._waiting:
            self._start()
        for done in covered:
            done(code)
        if not self._running:
            self._ended.set()

    async def settle(self) -> None:
        """Before ``close``: until the flush that runs has told how it went. Those that wait for another one fail."""
        self._turn_away()
        await self._ended.wait()

    def _turn_away(self) -> None:
        waiting, self._waiting = self._waiting, []
        for done in waiting:
            done(errno.EIO)

    def close(self) -> None:
        """Wait for a flush that runs; no more are taken, and those that wait for another one fail."""
        self._turn_away()
        self._executor.shutdown(wait=True)
