"""Between session and socket, where compression is on: replaces payloads by zstd frames, and keeps the order.

A batch that would take the compressor longer than ``INLINE_S`` goes to a thread (zstd lets go of the interpreter's
lock); all that is sent meanwhile waits behind it, whatever it is, because the stream is one order. ``primary.thrift``
decides which batches are compressed at all.

The checksum of a message is that of its original payload and is made before the thread begins, when the session still
holds the buffer. So if a buffer were used again before it is compressed (its batch was handed back, the connection is
about to go), the other end would refuse what was made of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from common import wire
from common.compression import make_compressor
from common.wire import Frames
from primary.thrift import Thrift

INLINE_S: Final = 0.001


class _Waiting:
    """A message that has its place in the order; ``frames`` is None while the thread is at work on it."""

    __slots__ = ("frames", "future", "length")

    def __init__(self, frames: Frames | None, length: int) -> None:
        self.frames = frames
        self.future: asyncio.Future[tuple[bytes, float]] | None = None
        self.length = length
        """Of the original payload, for batches."""


class Packer:
    """Compresses for any number of connections, one at a time: ``attach`` one, ``detach`` it."""

    def __init__(self) -> None:
        self._compress = make_compressor()
        self._compress_in_thread = make_compressor()
        self.thrift = Thrift(self._compress)
        self._transmit: Callable[[Frames], bool] | None = None
        self._failed: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="zstd")
        self._queue: deque[_Waiting] = deque()
        self._pending = 0
        """Bytes that are in the thread, or wait for it."""

    def attach(self, transmit: Callable[[Frames], bool], failed: Callable[[], None]) -> None:
        """A new connection: ``transmit`` takes messages, False if it cannot; ``failed`` is called when that happens to
        a message that had to wait."""
        self.detach()
        self._transmit, self._failed = transmit, failed

    def detach(self) -> None:
        """The connection is gone; what waited for it is dropped."""
        self._transmit = None
        for waiting in self._queue:
            if waiting.future is not None:
                waiting.future.cancel()  # the next connection's must not wait for what nobody wants any more
        self._queue.clear()
        self._pending = 0
        self.thrift.reset()

    def close(self) -> None:
        self.detach()
        self._executor.shutdown(wait=False)

    def send(self, frames: Frames) -> bool:
        """Send a message of the session after all that came before; False if the connection cannot take it."""
        if len(frames) == 1:
            return self._pass(frames, 0)
        payload = frames[1]
        view = memoryview(payload)
        length = len(view)
        if not self.thrift.worthwhile(view, self._pending):
            return self._pass(frames, length)
        check = wire.payload_check(view)
        if not self._queue and length <= INLINE_S * self.thrift.speed:
            begun = time.thread_time()
            packed = self._compress(view)
            self.thrift.took(length, time.thread_time() - begun)
            return self._pass(_smaller(frames, packed, check), length)
        waiting = _Waiting(None, length)
        self._queue.append(waiting)
        self._pending += length
        future = waiting.future = self._loop.run_in_executor(self._executor, self._work, view)
        future.add_done_callback(lambda done: self._back(waiting, frames, check, done))
        return True

    def acknowledged(self, applied: int, now: float) -> None:
        """The secondary has everything up to ``applied``."""
        self.thrift.acknowledged(applied, now)

    def statistics(self) -> dict[str, Any]:
        """For status: what was sent since the process started, and what of it crossed the wire."""
        thrift = self.thrift
        return {
            "original_bytes": thrift.original_bytes,
            "wire_bytes": thrift.wire_bytes,
            "ratio": thrift.original_bytes / thrift.wire_bytes if thrift.wire_bytes else 1.0,
            "compressed_batches": thrift.compressed,
        }

    def _work(self, payload: memoryview) -> tuple[bytes, float]:
        begun = time.thread_time()
        packed = self._compress_in_thread(payload)
        return packed, time.thread_time() - begun

    def _back(self, waiting: _Waiting, frames: Frames, check: int, done: asyncio.Future[tuple[bytes, float]]) -> None:
        if waiting not in self._queue:
            return  # for a connection that is gone
        packed, seconds = done.result()
        self._pending -= waiting.length
        self.thrift.took(waiting.length, seconds)
        waiting.frames = _smaller(frames, packed, check)
        queue = self._queue
        while queue and queue[0].frames is not None:
            head = queue.popleft()
            assert head.frames is not None
            if not self._transmit_now(head.frames, head.length):
                self._failed()
                return

    def _pass(self, frames: Frames, length: int) -> bool:
        if self._queue:
            self._queue.append(_Waiting(frames, length))
            return True
        return self._transmit_now(frames, length)

    def _transmit_now(self, frames: Frames, length: int) -> bool:
        if self._transmit is None:
            return False
        if length:
            self.thrift.sent(wire.sequence_of(frames[0]), length, len(frames[1]), time.monotonic())
        return self._transmit(frames)


def _smaller(frames: Frames, packed: bytes, check: int) -> Frames:
    """The message with ``packed`` as its payload, unless that is no gain."""
    header, payload = frames
    length = len(payload)
    return wire.compress_batch(header, packed, length, check) if len(packed) < length * 9 // 10 else frames
