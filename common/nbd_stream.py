"""The client's side of an NBD connection below its requests: connecting, a receive buffer, and option haggling."""

from __future__ import annotations

import contextlib
import select
import socket
from typing import Final

from common import limits, nbd
from common.errors import NbdError, NotRunning, TimedOut
from common.nbd_uri import NbdUri

_RECEIVE: Final = 256 * limits.KIB
_SOCKET_BUFFER: Final = 4 * limits.MIB
"""Asked of the kernel, which gives what net.core.wmem_max allows: the more fits, the more a server drains at once."""

_ANSWERS: Final = 4 * limits.MIB
"""Bytes of all replies to one option, together."""


class NbdStream:
    """A connection that has seen the server's greeting. What arrived stands in ``_view[_start:_end]``."""

    def __init__(self, uri: NbdUri, timeout_s: float) -> None:
        self.uri = uri
        self.timeout_s = timeout_s
        self._view = memoryview(bytearray(_RECEIVE))
        self._start = self._end = 0
        self._socket = _connect(uri, timeout_s)
        try:
            self._greet()
        except BaseException:
            self._socket.close()
            raise

    def _greet(self) -> None:
        self._fill(nbd.GREETING.size)
        magic, options, flags = nbd.GREETING.unpack_from(self._view, self._start)
        if magic != nbd.NBDMAGIC or options != nbd.IHAVEOPT or not flags & nbd.NBD_FLAG_FIXED_NEWSTYLE:
            raise NbdError(f"What listens at {self.uri} is not an NBD server of the fixed newstyle.")
        self._start += nbd.GREETING.size
        self._send_all(nbd.CLIENT_FLAGS.pack(nbd.NBD_FLAG_C_FIXED_NEWSTYLE | (flags & nbd.NBD_FLAG_C_NO_ZEROES)))

    def _send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except (BlockingIOError, InterruptedError):
                self._wait(select.POLLOUT)
            except OSError as error:
                raise NbdError(f"The NBD server hung up: {error.strerror or error}.") from None

    def _wait(self, events: int) -> int:
        """The events, of ``events`` or errors, that came; TimedOut if none did."""
        poll = select.poll()
        poll.register(self._socket, events)
        ready = poll.poll(self.timeout_s * 1000)
        if not ready:
            raise TimedOut(f"The NBD server at {self.uri} did not answer within {self.timeout_s:g} s.")
        return ready[0][1]

    def interrupt(self) -> None:
        """Break the connection, from any thread: whoever waits for an answer gets an NbdError."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; its replies as (type, data), the final one last."""
        self._send_all(nbd.OPTION.pack(nbd.IHAVEOPT, option, len(data)) + data)
        replies = []
        room = _ANSWERS
        while True:
            self._fill(nbd.OPTION_REPLY.size)
            magic, answered, kind, length = nbd.OPTION_REPLY.unpack_from(self._view, self._start)
            if magic != nbd.NBD_REP_MAGIC or answered != option or length > limits.MIB:
                raise NbdError("The NBD server sent an option reply that cannot be one.")
            self._start += nbd.OPTION_REPLY.size
            self._fill(length)
            room -= nbd.OPTION_REPLY.size + length
            if room < 0:
                raise NbdError("The NBD server answers an option without end.")
            replies.append((kind, bytes(self._view[self._start : self._start + length])))
            self._start += length
            if kind == nbd.NBD_REP_ACK or kind & nbd.NBD_REP_FLAG_ERROR:
                return replies

    def _fill(self, needed: int) -> None:
        """Receive until ``needed`` bytes stand at ``_start``; makes the buffer larger if they can never fit."""
        while self._end - self._start < needed:
            if len(self._view) - self._start < needed or self._start == self._end:
                rest = bytes(self._view[self._start : self._end])
                if needed > len(self._view):
                    self._view = memoryview(bytearray(needed))
                self._view[: len(rest)] = rest
                self._start, self._end = 0, len(rest)
            self._end += self._receive_into(self._view[self._end :])

    def _take(self, target: memoryview) -> None:
        """Move the next bytes of the stream into ``target``: what is buffered, then straight from the socket."""
        there = min(self._end - self._start, len(target))
        target[:there] = self._view[self._start : self._start + there]
        self._start += there
        while there < len(target):
            there += self._receive_into(target[there:])

    def _receive_into(self, view: memoryview) -> int:
        try:
            while True:
                try:
                    count = self._socket.recv_into(view)
                    break
                except (BlockingIOError, InterruptedError):
                    self._wait(select.POLLIN)
        except OSError as error:
            raise NbdError(f"The connection to the NBD server broke: {error.strerror or error}.") from None
        if not count:
            raise NbdError("The NBD server closed the connection.")
        return count


def _connect(uri: NbdUri, timeout_s: float) -> socket.socket:
    try:
        if uri.socket is not None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(timeout_s)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
            try:
                connection.connect(uri.socket)
            except BaseException:
                connection.close()
                raise
        else:
            connection = socket.create_connection((uri.host or "localhost", uri.port), timeout_s)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except TimeoutError:
        raise TimedOut(f"The NBD server at {uri} did not accept a connection within {timeout_s:g} s.") from None
    except OSError as error:
        raise NotRunning(f"No NBD server answers at {uri}: {error.strerror or error}.") from None
    except ValueError:  # an empty label, one of more than 63 characters, or NUL
        raise NotRunning(f"No NBD server answers at {uri}: that is no name of a host.") from None
    connection.setblocking(
        False
    )  # with a timeout of Python's each call would poll first, and a full socket would block
    return connection


def list_exports(uri: str | NbdUri, *, timeout_s: float = 30.0) -> list[str]:
    """The names that the server at ``uri`` offers (NBD_OPT_LIST); the name in ``uri`` does not matter.

    Raises what ``NbdClient`` raises.
    """
    stream = NbdStream(NbdUri.parse(uri) if isinstance(uri, str) else uri, timeout_s)
    with stream._socket:
        replies = stream.option(nbd.NBD_OPT_LIST)
        stream.option(nbd.NBD_OPT_ABORT)
    if replies[-1][0] != nbd.NBD_REP_ACK:
        raise NbdError(f"The NBD server does not tell its exports: {replies[-1][1].decode(errors='replace')}.")
    offered = [body for kind, body in replies if kind == nbd.NBD_REP_SERVER]
    return [body[4 : 4 + int.from_bytes(body[:4], "big")].decode(errors="replace") for body in offered]
