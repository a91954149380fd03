"""The replication stream without encryption: ZMTP on sockets that the event loop itself reads and writes.

libzmq does the same in threads of its own, and every message changes threads twice on each side: of the eight wake-ups
of a synchronous write at depth 1 four were those (`tandemdisk bench --hot-path` has the round trips). Here the loop
that has a batch puts it on the socket, payload from where it lies, and the loop that waits for one takes it off. On the
wire it is ZeroMQ's own protocol (common.zmtp), so a libzmq peer is served as well as one of ours.

CURVE is libzmq's (common.port): whoever has keys uses that.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from common import limits, zmtp
from common.addresses import Endpoint, UnixPath, bind_unix, endpoints
from common.errors import AddressInUse, ConfigError
from common.port import (
    CONNECT_TIMEOUT_MS,
    HANDSHAKE_TIMEOUT_MS,
    QUEUED_MESSAGES,
    RECONNECT_MAX_MS,
    RECONNECT_MS,
    SILENT,
    Frame,
    Watcher,
)
from common.zmtp import Inbox, ZmtpError

LARGEST_FRAME: Final = limits.MAX_BATCH_PAYLOAD + limits.MAX_HEADER
SOCKET_BUFFER: Final = limits.MIB
VECTOR: Final = 256
"""Pieces that one sendmsg takes from the queue."""
UNREAD_PONGS: Final = 1024
"""Pieces that may wait to be sent when a peer asks for one more that nobody needs."""
MAX_CONNECTIONS: Final = 64
STRANGERS_MESSAGE: Final = limits.MAX_HEADER
"""Bytes of the longest message that a listener takes from a peer that the session does not know: of a HELLO at most."""
STRANGERS_SIP: Final = 4096
"""Bytes that such a peer is listened to at a time: as many empty messages as go into more hold everybody else up."""
_BACKLOG: Final = 64

log = logging.getLogger("plain")


class Connection:
    """A connected socket: the handshake, then messages. Not told of anything after ``close``.

    ``on_ready()`` when the peer has said who it is; ``on_message(frames)`` and, when all that was received is handed
    out, ``on_drained()``; ``on_closed(reason)`` once, when the peer is gone or cannot be talked to. Frames are valid
    for as long as somebody holds them.
    """

    def __init__(
        self,
        connected: socket.socket,
        socket_type: bytes,
        on_ready: Callable[[], None],
        on_message: Callable[[list[memoryview]], None],
        on_drained: Callable[[], None],
        on_closed: Callable[[str], None],
        *,
        stranger: bool = False,
    ) -> None:
        self.ready = False
        self._stranger = stranger
        self._loop = asyncio.get_running_loop()
        self._socket = connected
        self._type = socket_type
        self._on_ready = on_ready
        self._on_message = on_message
        self._on_drained = on_drained
        self._on_closed = on_closed
        self._inbox = Inbox(STRANGERS_MESSAGE if stranger else LARGEST_FRAME)
        self._queue: deque[Frame] = deque()
        self._closed = False
        self._broken = ""
        connected.setblocking(False)
        if connected.family == socket.AF_UNIX:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        else:  # TCP finds the size of its buffers itself, as long as nobody sets it
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.add_reader(connected, self._readable)
        self._timeout = self._loop.call_later(HANDSHAKE_TIMEOUT_MS / 1000, self._break, SILENT)
        self._put([zmtp.greeting() + zmtp.ready(socket_type)])

    def send(self, frames: Sequence[Frame]) -> bool:
        """Send one message; False if it cannot be: no handshake yet, a broken connection, or a peer that takes nothing.

        The frames stay as they are until the peer has answered to them or ``on_closed`` was called.
        """
        if not self.ready or self._broken or len(self._queue) > 2 * QUEUED_MESSAGES:
            return False
        self._put(zmtp.pieces(frames))
        return True

    def close(self) -> None:
        """Close the socket; what the kernel has taken is still delivered."""
        if not self._closed:
            self._closed = True
            self._timeout.cancel()
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._queue.clear()
            self._socket.close()

    def trust(self) -> None:
        """The peer is no stranger any more."""
        self._stranger = False
        self._inbox.limit = LARGEST_FRAME

    def turn_out(self, reason: str) -> None:
        """Close it, and say so (``on_closed``)."""
        self._break(reason)

    # Out

    def _put(self, pieces: list[Frame]) -> None:
        queue = self._queue
        if queue:
            queue.extend(pieces)
            return
        left = self._transmit(pieces)
        if left:
            queue.extend(left)
            self._loop.add_writer(self._socket, self._writable)

    def _writable(self) -> None:
        queue = self._queue
        left = self._transmit([queue.popleft() for _ in range(min(len(queue), VECTOR))])
        queue.extendleft(reversed(left))
        if not queue:
            self._loop.remove_writer(self._socket)

    def _transmit(self, pieces: list[Frame]) -> list[Frame]:
        """Give ``pieces`` to the kernel; what it did not take. Nothing is left for a connection that is broken."""
        try:
            sent = self._socket.sendmsg(pieces)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._fail(_lost(error))
            return []
        return _rest(pieces, sent)

    # In

    def _readable(self) -> None:
        inbox = self._inbox
        try:
            room = inbox.room()
            count = self._socket.recv_into(room[:STRANGERS_SIP] if self._stranger else room)
            del room  # else nothing could be received there again
            if not count:
                self._break("the connection broke")
                return
            messages = inbox.received(count)
            if inbox.commands:
                self._obey()
            if messages and not self.ready:
                raise ZmtpError("the peer sent a message before its READY")
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(_lost(error))
            return
        except ZmtpError as error:
            self._break(error.sentence)
            return
        for frames in messages:
            if self._closed:
                return
            self._on_message(frames)
        if not self._closed:
            self._on_drained()

    def _obey(self) -> None:
        commands, self._inbox.commands = self._inbox.commands, []
        for content in commands:
            if not self.ready:
                theirs = zmtp.peer_type(content)
                if theirs not in zmtp.PEERS[self._type]:
                    self._put([zmtp.error("Invalid socket type")])
                    raise ZmtpError(f"the peer's socket is a {theirs!r}, which does not talk to a {self._type!r}")
                self.ready = True
                self._timeout.cancel()
                self._on_ready()
                continue
            name, body = zmtp.split_command(content)
            if name == b"PING":
                if len(self._queue) > UNREAD_PONGS:
                    raise ZmtpError("the peer asks and does not read the answers")
                self._put([zmtp.command(b"PONG", body[2:18])])

    # The end

    def _fail(self, reason: str) -> None:
        """The same as ``_break``, for callers who must not be called back in the middle of what they do. What was
        received is still handed out."""
        if not self._broken:
            self._broken = reason
            self._queue.clear()
            self._loop.remove_writer(self._socket)
            self._loop.call_soon(self._drain_and_break)

    def _drain_and_break(self) -> None:
        """A peer that is gone may have said something before."""
        for _ in range(SOCKET_BUFFER // zmtp.ROOM):
            if not self._closed:
                self._readable()
        self._break(self._broken)

    def _break(self, reason: str) -> None:
        if not self._closed:
            self.close()
            self._on_closed(reason)


class PlainDialer:
    """The primary's end, a DEALER: connected to ``address``, and again whenever the connection breaks.

    The same interface as ``port.Dialer``.
    """

    def __init__(
        self, address: str, on_frames: Callable[[list[bytes]], None], on_drained: Callable[[], None], watcher: Watcher
    ) -> None:
        self._address = address
        self._on_frames = on_frames
        self._on_drained = on_drained
        self._watcher = watcher
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = None
        self._pause_ms = RECONNECT_MS
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._told = False
        self._dial()

    def send(self, frames: Sequence[Frame]) -> bool:
        """Send one message; False if there is no connection, or it takes nothing more."""
        return self._connection is not None and self._connection.send(frames)

    def close(self) -> None:
        """Close, and dial no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _dial(self) -> None:
        self._timer = None
        self._task = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            connected = await _connected(self._loop, self._address)
        except socket.gaierror as error:
            if not self._told:
                log.warning("cannot look up %s: %s; correct replication.connect", self._address, error.strerror)
            self._told = True
            self._again()
        except OSError as error:  # and TimeoutError: nobody is there yet, which is nothing to tell of
            log.debug("no connection address=%s reason=%r", self._address, str(error))
            self._again()
        else:
            self._connection = Connection(
                connected, b"DEALER", self._ready, self._received, self._on_drained, self._failed
            )
        self._task = None

    def _ready(self) -> None:
        self._pause_ms = RECONNECT_MS
        self._watcher.connection_up()

    def _received(self, frames: list[memoryview]) -> None:
        self._on_frames([bytes(frame) for frame in frames])

    def _failed(self, reason: str) -> None:
        self._connection = None
        self._again()
        self._watcher.connection_down(reason)

    def _again(self) -> None:
        self._timer = self._loop.call_later(self._pause_ms / 1000, self._dial)
        self._pause_ms = min(2 * self._pause_ms, RECONNECT_MAX_MS)


async def _connected(loop: asyncio.AbstractEventLoop, address: str) -> socket.socket:
    """A socket that is connected to ``address``, which may be a name with several addresses. A look-up takes as long as
    name servers make it take; each address has its own time to answer in, or one that leads nowhere hides the next."""
    if address.startswith("ipc://"):
        found = endpoints(address)
    else:
        found = await _looked_up(loop, address)
    trouble = OSError(errno.EADDRNOTAVAIL, "the name has no address")
    for endpoint in found:
        try:
            return await _connected_to(loop, endpoint)
        except OSError as error:  # TimeoutError, too
            trouble = error
    raise trouble


async def _looked_up(loop: asyncio.AbstractEventLoop, address: str) -> list[Endpoint]:
    """``endpoints``, in a thread that nobody waits for: one of the loop's own would hold a stop up for as long as name
    servers that cannot be reached do."""
    found: asyncio.Future[list[Endpoint]] = loop.create_future()

    def tell(outcome: list[Endpoint] | Exception) -> None:
        if found.done():
            return  # the dialer was closed
        if isinstance(outcome, Exception):
            found.set_exception(outcome)
        else:
            found.set_result(outcome)

    def look_up() -> None:
        outcome: list[Endpoint] | Exception
        try:
            outcome = endpoints(address)
        except Exception as error:
            outcome = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, outcome)

    threading.Thread(target=look_up, name="look-up", daemon=True).start()
    return await found


async def _connected_to(loop: asyncio.AbstractEventLoop, endpoint: Endpoint) -> socket.socket:
    family, where = endpoint
    dialing = socket.socket(family, socket.SOCK_STREAM)
    try:
        dialing.setblocking(False)
        if family == socket.AF_UNIX:
            # at once or not at all: the loop would take a full backlog for a connection
            dialing.connect(where)  # type: ignore[arg-type]
        else:
            async with asyncio.timeout(CONNECT_TIMEOUT_MS / 1000):
                await loop.sock_connect(dialing, where)  # type: ignore[arg-type]
    except BaseException:
        dialing.close()
        raise
    return dialing


class PlainListener:
    """The secondary's end, a ROUTER on ``address``. ``on_frames(peer, frames)``; ``peer`` names the connection.

    The same interface as ``port.Listener``. Raises AddressInUse, ConfigError.
    """

    def __init__(
        self,
        address: str,
        on_frames: Callable[[bytes, list[Frame]], None],
        on_drained: Callable[[], None],
        on_disconnected: Callable[[], None],
    ) -> None:
        self._on_frames = on_frames
        self._on_drained = on_drained
        self._on_disconnected = on_disconnected
        self._loop = asyncio.get_running_loop()
        self._connections: dict[bytes, Connection] = {}
        self._accepted = 0
        self._known = b""
        """The peer that the session is with."""
        self._unix: UnixPath | None = None
        self._socket = self._listen(address)
        self._loop.add_reader(self._socket, self._accept)

    @property
    def port(self) -> int:
        """The TCP port, also when ``*`` asked for any; 0 for a Unix socket."""
        return 0 if self._socket.family == socket.AF_UNIX else int(self._socket.getsockname()[1])

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """Send one message to ``peer``; False if it is gone."""
        connection = self._connections.get(peer)
        return connection is not None and connection.send(frames)

    def trust(self, peer: bytes) -> None:
        """The session is with ``peer``: it may send what is long, and never has to make room for another one."""
        self._known = peer
        if peer in self._connections:
            self._connections[peer].trust()

    def close(self) -> None:
        """Close every connection and listen no more."""
        self._loop.remove_reader(self._socket)
        self._socket.close()
        if self._unix is not None:
            self._unix.remove()
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _listen(self, address: str) -> socket.socket:
        try:
            found = endpoints(address, passive=True)
            # "*" over IPv6 listens on both; a name is the first address that it has
            family, where = next((e for e in found if e[0] == socket.AF_INET6 and "//*:" in address), found[0])
            listener = socket.socket(family, socket.SOCK_STREAM)
            try:
                self._bind(listener, (family, where))
            except BaseException:
                listener.close()
                raise
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(
                    f"The replication address {address} is in use by another process.",
                    hint="Stop that process, or give replication.listen another address.",
                ) from error
            raise ConfigError(
                f"Cannot listen for replication on {address}: {error.strerror or error}.",
                hint="Correct replication.listen.",
            ) from error
        return listener

    def _bind(self, listener: socket.socket, endpoint: Endpoint) -> None:
        family, where = endpoint
        if family == socket.AF_UNIX and not str(where).startswith("\0"):
            self._unix = bind_unix(listener, str(where), "Stop it, or give replication.listen another address.")
        else:
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            if family != socket.AF_UNIX:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)  # type: ignore[arg-type]
        listener.setblocking(False)
        listener.listen(_BACKLOG)

    def _accept(self) -> None:
        try:
            accepted, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("cannot accept a primary: %s; trying again in a second", error)
            self._loop.remove_reader(self._socket)
            self._loop.call_later(1.0, self._accept_again)
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            self._make_room()
        self._accepted += 1
        peer = self._accepted.to_bytes(8, "big")

        def received(frames: list[memoryview]) -> None:
            self._on_frames(peer, frames)  # type: ignore[arg-type]  # a list that nobody appends to

        def closed(reason: str) -> None:
            connection = self._connections.pop(peer, None)
            if connection is not None and connection.ready:
                self._on_drained()
                self._on_disconnected()
            else:
                log.info("a connection was closed before its handshake: %s", reason)

        self._connections[peer] = Connection(
            accepted, b"ROUTER", _nothing, received, self._on_drained, closed, stranger=True
        )

    def _make_room(self) -> None:
        """Close the connection that is least likely to be a primary's: the oldest whose peer has not even said what it
        is, else the oldest stranger's. Who only holds connections keeps nobody out."""
        strangers = [peer for peer in self._connections if peer != self._known]
        oldest = next((peer for peer in strangers if not self._connections[peer].ready), strangers[0])
        self._connections[oldest].turn_out(f"there are {MAX_CONNECTIONS} connections, and another peer came")

    def _accept_again(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._accept)


def _rest(pieces: list[Frame], sent: int) -> list[Frame]:
    """What is left of ``pieces`` after ``sent`` bytes."""
    for index, piece in enumerate(pieces):
        if sent < len(piece):
            return [memoryview(piece)[sent:], *pieces[index + 1 :]] if sent else pieces[index:]
        sent -= len(piece)
    return []


def _lost(error: OSError) -> str:
    return f"the connection broke ({error.strerror or error})"


def _nothing() -> None:
    pass
