"""A small synchronous NBD client: what the demo, the tests and the benchmark's own engine write and read through.

One connection, one thread. Simple calls (``read``, ``write``, ...) are a request and its reply. For speed, requests are
pipelined: ``submit_*`` queues one and returns its cookie, ``collect`` sends what is queued and returns the next
completions, in whatever order the server finished them; ``write_many`` and ``read_many`` do that at a given depth.

Sending never waits for the server alone: while the socket takes nothing more, replies are received, so a server that
waits for its replies to be read and a client that waits for its requests to be read cannot wait for each other.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NamedTuple

from common import limits, nbd
from common.errors import NbdError, OperationFailed, TimedOut
from common.nbd_stream import NbdStream, list_exports
from common.nbd_uri import NbdUri

__all__ = ["Completion", "NbdClient", "NbdClientError", "list_exports"]

Data = bytes | bytearray | memoryview

_SEND: Final = 256 * limits.KIB
"""Queued bytes at which ``submit_*`` starts to send."""
_IOV: Final = 512
_COOKIE: Final = struct.Struct(">Q")


class NbdClientError(OperationFailed):
    """The server answered a request with an error; ``errno`` is the NBD error value, which is Linux' number too."""

    def __init__(self, command: str, number: int, message: str = "") -> None:
        self.command = command
        self.errno = number
        self.message = message
        name = nbd.ERROR_NAMES.get(number) or os.strerror(number)
        hint = f"It says: {message}." if message else ""
        super().__init__(f"The server refused {command}: {name} ({number}).", hint=hint)


class Completion(NamedTuple):
    """A request that was answered. ``data`` is what a read brought, ``extents`` what a block status told."""

    cookie: int
    offset: int
    length: int
    error: NbdClientError | None
    data: bytearray | None
    extents: list[tuple[int, int]] | None


@dataclass(slots=True)
class _Request:
    command: int
    offset: int
    length: int
    data: bytearray | None = None
    covered: int = 0
    """Bytes of a read that the server has told of."""
    extents: list[tuple[int, int]] | None = None
    error: NbdClientError | None = None


_NAMES: Final = {
    nbd.NBD_CMD_READ: "read",
    nbd.NBD_CMD_WRITE: "write",
    nbd.NBD_CMD_FLUSH: "flush",
    nbd.NBD_CMD_TRIM: "trim",
    nbd.NBD_CMD_CACHE: "cache",
    nbd.NBD_CMD_WRITE_ZEROES: "zero",
    nbd.NBD_CMD_BLOCK_STATUS: "block status",
}


class NbdClient(NbdStream):
    """A connection in transmission phase. Use it as a context manager, or ``close`` it.

    Raises NotRunning if nobody listens, NbdClientError if the export is refused, TimedOut if the server keeps silent
    for ``timeout_s``, NbdError if it breaks the protocol or hangs up.
    """

    def __init__(self, uri: str | NbdUri, *, timeout_s: float = 30.0, structured: bool = True) -> None:
        self.size = 0
        self.flags = 0
        self.minimum_block = 1
        self.preferred_block = 4096
        self.maximum_payload = limits.MAX_PAYLOAD
        self.structured = False
        self.allocation = False
        """``block_status`` can be asked."""
        self._next = 1
        self._requests: dict[bytes, _Request] = {}
        self._done: list[Completion] = []
        self._outgoing: list[Data] = []
        self._outgoing_bytes = 0
        super().__init__(NbdUri.parse(uri) if isinstance(uri, str) else uri, timeout_s)
        self.name = self.uri.name
        """The server's canonical name of the export."""
        try:
            self._handshake(structured)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def read_only(self) -> bool:
        """The export takes no writes."""
        return bool(self.flags & nbd.NBD_FLAG_READ_ONLY)

    @property
    def multi_conn(self) -> bool:
        """A flush on one connection covers the writes of all."""
        return bool(self.flags & nbd.NBD_FLAG_CAN_MULTI_CONN)

    @property
    def in_flight(self) -> int:
        """Requests submitted and not answered yet."""
        return len(self._requests)

    def close(self) -> None:
        """Tell the server goodbye (NBD_CMD_DISC) and close; harmless if the connection is dead or closed already."""
        if self._socket.fileno() < 0:
            return
        try:
            self._queue(nbd.NBD_CMD_DISC, 0, 0, 0)
            self.send()
        except (OSError, NbdError, TimedOut):
            pass  # the server is gone, which is what was wanted
        self._socket.close()

    # One request at a time

    def read(self, offset: int, length: int) -> bytearray:
        """``length`` bytes from ``offset``. Raises NbdClientError."""
        self.submit_read(offset, length)
        data = self._only().data
        assert data is not None
        return data

    def write(self, offset: int, data: Data, *, fua: bool = False) -> None:
        """Write ``data``; with ``fua`` it is durable on return. Raises NbdClientError."""
        self.submit_write(offset, data, fua=fua)
        self._only()

    def zero(self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False) -> None:
        """Make the range read as zeroes (WRITE_ZEROES). Raises NbdClientError, with ENOTSUP if ``fast`` cannot be."""
        self.submit_zero(offset, length, fua=fua, no_hole=no_hole, fast=fast)
        self._only()

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """The contents of the range are no longer needed. Raises NbdClientError."""
        self.submit_trim(offset, length, fua=fua)
        self._only()

    def cache(self, offset: int, length: int) -> None:
        """The range will be read soon. Raises NbdClientError."""
        self._queue(nbd.NBD_CMD_CACHE, 0, offset, length)
        self._only()

    def flush(self) -> None:
        """Make every write answered so far durable. Raises NbdClientError."""
        self.submit_flush()
        self._only()

    def block_status(self, offset: int, length: int, *, one: bool = False) -> list[tuple[int, int]]:
        """(length, flags) of ``base:allocation`` from ``offset`` on, maybe for less than ``length``."""
        self._queue(nbd.NBD_CMD_BLOCK_STATUS, nbd.NBD_CMD_FLAG_REQ_ONE if one else 0, offset, length)
        extents = self._only().extents
        if not extents:
            raise NbdError("The server told no extent for a block status request.")
        return extents

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int, int]]:
        """(offset, length, flags) of all of the range, asking as often as it takes."""
        end = self.size if length is None else offset + length
        while offset < end:
            for extent_length, flags in self.block_status(offset, min(end - offset, 1 << 30)):
                extent_length = min(extent_length, end - offset)
                yield offset, extent_length, flags
                offset += extent_length

    # Many requests in flight

    def submit_read(self, offset: int, length: int, *, df: bool = False) -> int:
        """Queue a read; its cookie."""
        return self._queue(nbd.NBD_CMD_READ, nbd.NBD_CMD_FLAG_DF if df else 0, offset, length)

    def submit_write(self, offset: int, data: Data, *, fua: bool = False) -> int:
        """Queue a write; its cookie. ``data`` must stay as it is until the request was collected."""
        cookie = self._queue(nbd.NBD_CMD_WRITE, nbd.NBD_CMD_FLAG_FUA if fua else 0, offset, len(data))
        self._outgoing.append(data)
        self._outgoing_bytes += len(data)
        if self._outgoing_bytes >= _SEND:
            self.send()
        return cookie

    def submit_zero(
        self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> int:
        """Queue a WRITE_ZEROES; its cookie."""
        flags = nbd.NBD_CMD_FLAG_FUA if fua else 0
        flags |= nbd.NBD_CMD_FLAG_NO_HOLE if no_hole else 0
        flags |= nbd.NBD_CMD_FLAG_FAST_ZERO if fast else 0
        return self._queue(nbd.NBD_CMD_WRITE_ZEROES, flags, offset, length)

    def submit_trim(self, offset: int, length: int, *, fua: bool = False) -> int:
        """Queue a TRIM; its cookie."""
        return self._queue(nbd.NBD_CMD_TRIM, nbd.NBD_CMD_FLAG_FUA if fua else 0, offset, length)

    def submit_flush(self) -> int:
        """Queue a FLUSH; its cookie."""
        return self._queue(nbd.NBD_CMD_FLUSH, 0, 0, 0)

    def collect(self, minimum: int = 1) -> list[Completion]:
        """Send what is queued; the completions that are there, waiting until there are ``minimum`` of them.

        Fewer come back only if fewer are in flight. An error of the server is in its completion, not raised.
        """
        self.send()
        while len(self._done) < minimum and self._requests:
            self._receive()
        done, self._done = self._done, []
        return done

    def collect_all(self) -> list[Completion]:
        """Send what is queued and wait for everything in flight; the completions that were not collected yet."""
        return self.collect(len(self._requests) + len(self._done))

    def write_many(self, writes: Iterable[tuple[int, Data]], *, depth: int = 32, fua: bool = False) -> int:
        """Write all (offset, data), up to ``depth`` in flight; how many. The first error is raised at the end."""
        count = 0
        failed: NbdClientError | None = None
        for offset, data in writes:
            self.submit_write(offset, data, fua=fua)
            count += 1
            if len(self._requests) >= depth:
                failed = failed or _first_error(self.collect(max(1, depth // 2)))
                if failed:
                    break
        rest = self.collect_all()
        failed = failed or _first_error(rest)
        if failed:
            raise failed
        return count

    def read_many(self, reads: Iterable[tuple[int, int]], *, depth: int = 32) -> Iterator[tuple[int, bytearray]]:
        """(offset, data) of all (offset, length), up to ``depth`` in flight, in the order in which they come back."""
        for offset, length in reads:
            self.submit_read(offset, length)
            if len(self._requests) >= depth:
                yield from self._read_results(1)
        while self._requests or self._done:
            yield from self._read_results(1)

    def _read_results(self, minimum: int) -> Iterator[tuple[int, bytearray]]:
        for completion in self.collect(minimum):
            if completion.error:
                raise completion.error
            if completion.data is not None:
                yield completion.offset, completion.data

    def _only(self) -> Completion:
        """The one completion of a call that is not pipelined."""
        completions = self.collect(1)
        assert len(completions) == 1, "a simple call was made while requests were in flight"
        if completions[0].error:
            raise completions[0].error
        return completions[0]

    # Sending

    def _queue(self, command: int, flags: int, offset: int, length: int) -> int:
        number = self._next
        self._next = number + 1
        cookie = _COOKIE.pack(number)
        head = nbd.REQUEST_HEAD | flags << 16 | command
        if command != nbd.NBD_CMD_DISC:
            self._requests[cookie] = _Request(command, offset, length)
        self._outgoing.append(nbd.REQUEST.pack(head, cookie, offset, length))
        self._outgoing_bytes += nbd.REQUEST.size
        return number

    def send(self) -> None:
        """Send all that is queued; receive while the socket takes nothing."""
        while self._outgoing:
            parts = self._outgoing[:_IOV]
            try:
                sent = self._socket.sendmsg(parts)
            except (BlockingIOError, InterruptedError):
                if self._wait(select.POLLIN | select.POLLOUT) & ~select.POLLOUT:
                    self._receive()
                continue
            except OSError as error:
                raise NbdError(f"The server hung up: {error.strerror or error}.") from None
            self._outgoing_bytes -= sent
            whole = 0
            while whole < len(parts) and sent >= len(parts[whole]):
                sent -= len(parts[whole])
                whole += 1
            del self._outgoing[:whole]
            if sent:
                self._outgoing[0] = memoryview(self._outgoing[0])[sent:]

    # Receiving

    def _receive(self) -> None:
        """Wait for at least one reply and take in all that are complete."""
        self._one_reply()
        while self._end - self._start >= nbd.SIMPLE_REPLY.size and self._complete():
            self._one_reply()

    def _complete(self) -> bool:
        """Whether the next message is all in the buffer, so that taking it in cannot block."""
        there = self._end - self._start
        magic, _, cookie = nbd.SIMPLE_REPLY.unpack_from(self._view, self._start)
        if magic == nbd.NBD_STRUCTURED_REPLY_MAGIC:
            return there >= nbd.CHUNK.size and there >= nbd.CHUNK.size + int.from_bytes(
                self._view[self._start + 16 : self._start + 20], "big"
            )
        request = self._requests.get(cookie)
        return request is None or request.command != nbd.NBD_CMD_READ or there >= nbd.SIMPLE_REPLY.size + request.length

    def _one_reply(self) -> None:
        self._fill(nbd.SIMPLE_REPLY.size)
        magic, error, cookie = nbd.SIMPLE_REPLY.unpack_from(self._view, self._start)
        if magic == nbd.NBD_STRUCTURED_REPLY_MAGIC:
            self._chunk()
            return
        request = self._requests.get(cookie)
        if magic != nbd.NBD_SIMPLE_REPLY_MAGIC or request is None:
            raise NbdError(f"The server sent a reply to nothing (magic {magic:#010x}, cookie {cookie.hex()}).")
        self._start += nbd.SIMPLE_REPLY.size
        if error:
            request.error = NbdClientError(_describe(request), error)
        elif request.command == nbd.NBD_CMD_READ:
            if self.structured:
                raise NbdError("The server sent a simple reply to a read although structured replies were agreed.")
            request.data = bytearray(request.length)
            self._take(memoryview(request.data))
            request.covered = request.length
        self._finish(cookie, request)

    def _chunk(self) -> None:
        self._fill(nbd.CHUNK.size)
        _, flags, kind, cookie, length = nbd.CHUNK.unpack_from(self._view, self._start)
        request = self._requests.get(cookie)
        if request is None or not self.structured:
            raise NbdError(f"The server sent a structured reply that answers nothing (cookie {cookie.hex()}).")
        self._start += nbd.CHUNK.size
        if kind == nbd.NBD_REPLY_TYPE_OFFSET_DATA and request.command == nbd.NBD_CMD_READ and length > 8:
            self._fill(8)
            self._take(self._target(request, length - 8))
        else:
            if length > limits.MAX_PAYLOAD:
                raise NbdError(f"The server sent a chunk of type {kind:#x} with {length} bytes.")
            self._fill(length)
            body = bytes(self._view[self._start : self._start + length])
            self._start += length
            self._small_chunk(request, kind, body)
        if flags & nbd.NBD_REPLY_FLAG_DONE:
            self._finish(cookie, request)

    def _target(self, request: _Request, length: int) -> memoryview:
        """Where ``length`` bytes at the absolute offset that stands next in the stream belong."""
        offset = int.from_bytes(self._view[self._start : self._start + 8], "big") - request.offset
        self._start += 8
        if offset < 0 or offset + length > request.length:
            raise NbdError("The server sent data outside of what was asked for.")
        return memoryview(self._cover(request, length))[offset : offset + length]

    def _cover(self, request: _Request, length: int) -> bytearray:
        """What a read has brought so far, of which the server tells ``length`` bytes more."""
        request.covered += length
        if request.covered > request.length:
            raise NbdError("The server sent more data than was asked for.")
        if request.data is None:
            request.data = bytearray(request.length)
        return request.data

    def _small_chunk(self, request: _Request, kind: int, body: bytes) -> None:
        if kind & nbd.NBD_REPLY_TYPE_FLAG_ERROR and len(body) >= nbd.ERROR_CHUNK.size:
            error, length = nbd.ERROR_CHUNK.unpack_from(body)
            message = body[nbd.ERROR_CHUNK.size :][:length].decode(errors="replace")
            request.error = NbdClientError(_describe(request), error or nbd.NBD_EINVAL, message)
        elif kind == nbd.NBD_REPLY_TYPE_OFFSET_HOLE and request.command == nbd.NBD_CMD_READ and len(body) == 12:
            start, length = int.from_bytes(body[:8], "big") - request.offset, int.from_bytes(body[8:], "big")
            if start < 0 or start + length > request.length:
                raise NbdError("The server told of a hole outside of what was asked for.")
            self._cover(request, length)
        elif kind == nbd.NBD_REPLY_TYPE_BLOCK_STATUS and len(body) >= 12 and len(body) % 8 == 4:
            request.extents = list(nbd.DESCRIPTOR.iter_unpack(body[4:]))
            if not all(length for length, _ in request.extents):
                raise NbdError("The server told of an extent without a length.")
        elif kind != nbd.NBD_REPLY_TYPE_NONE or body:
            raise NbdError(f"The server sent a chunk of type {kind:#x} with {len(body)} bytes that has no place here.")

    def _finish(self, cookie: bytes, request: _Request) -> None:
        del self._requests[cookie]
        if request.command == nbd.NBD_CMD_READ and request.error is None:
            # no byte twice, and all of them: else what is missing would look like zeroes
            if request.covered != request.length:
                raise NbdError(f"The server told {request.covered} bytes of {_describe(request)}.")
            if request.data is None:
                request.data = bytearray()
        self._done.append(
            Completion(
                _COOKIE.unpack(cookie)[0], request.offset, request.length, request.error, request.data, request.extents
            )
        )

    # Handshake

    def _handshake(self, structured: bool) -> None:
        if structured and self.option(nbd.NBD_OPT_STRUCTURED_REPLY)[-1][0] == nbd.NBD_REP_ACK:
            self.structured = True
            name = self.uri.name.encode()
            query = len(nbd.BASE_ALLOCATION).to_bytes(4, "big") + nbd.BASE_ALLOCATION
            data = len(name).to_bytes(4, "big") + name + (1).to_bytes(4, "big") + query
            replies = self.option(nbd.NBD_OPT_SET_META_CONTEXT, data)
            self.allocation = replies[-1][0] == nbd.NBD_REP_ACK and len(replies) > 1
        self._go()

    def _go(self) -> None:
        name = self.uri.name.encode()
        asked = (nbd.NBD_INFO_NAME, nbd.NBD_INFO_BLOCK_SIZE)
        data = len(name).to_bytes(4, "big") + name + struct.pack(">HHH", len(asked), *asked)
        replies = self.option(nbd.NBD_OPT_GO, data)
        kind, message = replies[-1]
        if kind != nbd.NBD_REP_ACK:
            number = nbd.NBD_ESHUTDOWN if kind == nbd.NBD_REP_ERR_SHUTDOWN else nbd.NBD_EINVAL
            raise NbdClientError(f"the export {self.uri.name!r}", number, message.decode(errors="replace"))
        for kind, body in replies[:-1]:
            info = int.from_bytes(body[:2], "big")
            if kind == nbd.NBD_REP_INFO and info == nbd.NBD_INFO_EXPORT and len(body) == nbd.INFO_EXPORT.size:
                _, self.size, self.flags = nbd.INFO_EXPORT.unpack(body)
            elif kind == nbd.NBD_REP_INFO and info == nbd.NBD_INFO_BLOCK_SIZE and len(body) == nbd.INFO_BLOCK_SIZE.size:
                _, self.minimum_block, self.preferred_block, self.maximum_payload = nbd.INFO_BLOCK_SIZE.unpack(body)
            elif kind == nbd.NBD_REP_INFO and info == nbd.NBD_INFO_NAME:
                self.name = body[2:].decode(errors="replace")
        if not self.flags & nbd.NBD_FLAG_HAS_FLAGS:
            raise NbdError("The server accepted the export without a word on its size and flags.")


def _describe(request: _Request) -> str:
    name = _NAMES[request.command]
    if request.command == nbd.NBD_CMD_FLUSH:
        return f"a {name}"
    return f"a {name} of {request.length} bytes at {request.offset}"


def _first_error(completions: Sequence[Completion]) -> NbdClientError | None:
    return next((completion.error for completion in completions if completion.error), None)
