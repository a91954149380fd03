"""Busy polling: an event loop that expects its next event within microseconds looks for it before it goes to sleep.

To sleep and to be woken costs both ends: the sender's system call wakes a processor, and the receiver goes on with cold
caches. In a chain of hand-overs, which a single synchronous write is, that was more than half of the time. The idea is
QEMU's (``poll-max-ns`` of its AioContext) and KVM's (``halt_poll_ns``).

A process polls only while it pays: after ``ENOUGH`` waits in a row that were shorter than the limit, and no longer once
waits get longer. An idle process sleeps. Between two looks it yields its processor to whoever wants it.
"""

from __future__ import annotations

import os
import selectors
import time
from typing import Final

ENOUGH: Final = 4
"""Short waits in a row before polling begins."""
MOST: Final = 16
"""A long wait halves the count of short ones, which stops here: so a busy process is idle after three long waits."""

_clock: Final = time.perf_counter
_yield: Final = os.sched_yield


class PollingSelector(selectors.EpollSelector):
    """An epoll selector for ``asyncio.SelectorEventLoop`` that may poll for up to ``limit_s`` seconds; 0: never."""

    def __init__(self) -> None:
        super().__init__()
        self.limit_s = 0.0
        self.polled_s = 0.0
        """Seconds spent polling in vain or not."""
        self._short = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See ``selectors.BaseSelector``; ``timeout`` in seconds, None: for ever."""
        look = super().select
        limit = self.limit_s
        if not limit or (timeout is not None and timeout <= 0):
            return look(timeout)
        started = _clock()
        if self._short >= ENOUGH:
            end = started + (limit if timeout is None else min(limit, timeout))
            while True:
                ready = look(0)
                now = _clock()
                if ready or now >= end:
                    break
                _yield()
            self.polled_s += now - started
            if ready:
                if self._short < MOST:
                    self._short += 1
                return ready
            self._short >>= 1
            return look(timeout if timeout is None else max(0.0, timeout - (now - started)))
        ready = look(timeout)
        if _clock() - started < limit:
            self._short += 1
        else:
            self._short >>= 1
        return ready
