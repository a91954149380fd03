"""The NBD server of a process: listens, accepts, and holds what its connections share.

``NbdServer`` serves any number of volumes on a Unix socket and a TCP port at once. All of it lives on one event loop;
only reads that would block, and NBD_CMD_CACHE, go to a few threads. The protocol is in ``common.nbd_handshake`` and
``common.nbd_transmission``, a client's life in ``common.nbd_connection``.

A volume that cannot take more (the replication window is full) calls ``pause_reading``: the sockets of all clients are
left alone until ``resume_reading``, and the kernel makes the clients wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

from common import limits
from common.addresses import UnixPath, bind_unix
from common.batch import Volume
from common.errors import AddressInUse, ConfigError, OperationFailed
from common.nbd_connection import Connection
from common.nbd_host import REPLY_BUFFER, Counters
from common.nbd_uri import NbdUri
from common.pool import BufferPool
from common.settings import ExportSettings

MAX_CONNECTIONS: Final = 256
"""Clients at once. Each may hold a receive buffer and a reply buffer."""
READ_THREADS: Final = 8
REPLY_BUFFERS_KEPT: Final = 4
SOCKET_BUFFER: Final = 2 * limits.MIB
"""Asked of the kernel for replies; it gives what net.core.wmem_max allows. With the usual default of 208 KiB the
replies to 32 reads of 4 KiB just do not fit in one send."""
CLOSE_TIMEOUT_S: Final = 5.0
_ACCEPT_AGAIN_S: Final = 1.0
_BACKLOG: Final = 128

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a server has done since it was made; ``connections`` are open now."""

    connections: int
    connections_total: int
    reads: int
    writes: int
    zeroes: int
    trims: int
    flushes: int
    others: int
    refused: int
    bytes_read: int
    bytes_written: int


class NbdServer:
    """Serves ``volumes`` by their names; clients that ask for the empty name get ``default``."""

    def __init__(self, volumes: Sequence[Volume], *, default: str) -> None:
        self.volumes = {volume.name: volume for volume in volumes}
        assert len(self.volumes) == len(volumes), "two volumes of one name"
        assert default in self.volumes
        self.default = default
        self.pool = BufferPool()
        self.reply_view = memoryview(bytearray(REPLY_BUFFER))
        self.paused = False
        self._reply_views: list[memoryview] = []
        self._executor: ThreadPoolExecutor | None = None
        self._connections: dict[Connection, None] = {}
        """The oldest first."""
        self._connections_total = 0
        self._departed = Counters()
        self._listeners: list[socket.socket] = []
        self._unix: UnixPath | None = None
        self._closing = False
        self._empty = asyncio.Event()
        self._empty.set()

    # Listening

    async def listen(self, settings: ExportSettings) -> None:
        """Accept clients where ``settings`` says.

        Raises AddressInUse if another process listens there, ConfigError if the address cannot be one of this machine.
        """
        if settings.unix is None and settings.host is None:
            raise ConfigError("The export has neither a Unix socket nor a host to listen on.")
        sockets = []
        try:
            if settings.unix is not None:
                sockets.append(self._listen_unix(settings.unix, group_access=settings.group_access))
            if settings.host is not None:
                sockets += await _listen_tcp(settings.host, settings.port)
        except BaseException:
            for listener in sockets:
                listener.close()
            self._remove_unix()
            raise
        loop = asyncio.get_running_loop()
        for listener in sockets:
            listener.setblocking(False)
            listener.listen(_BACKLOG)
            loop.add_reader(listener, self._accept, listener)
        self._listeners += sockets

    def _listen_unix(self, path: str, *, group_access: bool) -> socket.socket:
        """Bind ``path`` with mode 0600, or 0660. A socket file that nobody listens on is a crash's left-over: it is
        replaced."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._unix = bind_unix(listener, path, "Stop it, or choose another path for the export.")
            if group_access:
                os.chmod(path, 0o660)  # whatever the umask
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(f"{path} is taken by another process.") from None
            raise ConfigError(
                f"The export cannot listen on the Unix socket {path}: {error.strerror or error}.",
                hint="The directory must exist and be writable, and the path may have up to 107 bytes.",
            ) from None
        except BaseException:
            listener.close()
            raise
        return listener

    def _remove_unix(self) -> None:
        if self._unix is not None:
            self._unix.remove()
            self._unix = None

    @property
    def tcp_port(self) -> int | None:
        """The TCP port in use, also when port 0 asked for any."""
        for listener in self._listeners:
            if listener.family != socket.AF_UNIX:
                port: int = listener.getsockname()[1]
                return port
        return None

    def uris(self, name: str) -> list[str]:
        """The URIs under which the volume ``name`` is served, the Unix socket's first."""
        found = []
        for listener in self._listeners:
            if listener.family == socket.AF_UNIX:
                found.append(str(NbdUri(name, socket=listener.getsockname())))
            else:
                host, port = listener.getsockname()[:2]
                found.append(str(NbdUri(name, host=host, port=port)))
        return found

    def _accept(self, listener: socket.socket) -> None:
        if self.pool.overdrawn:
            # By those who wrote and left while the secondary takes nothing: the client waits in the backlog.
            asyncio.get_running_loop().remove_reader(listener)
            self.pool.wait(partial(self._accept_again, listener))
            return
        try:
            connection, address = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of file descriptors or memory: the client waits in the backlog, the loop must not spin on it.
            _log.warning("cannot accept an nbd client: %s; trying again in %g s", error, _ACCEPT_AGAIN_S)
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(_ACCEPT_AGAIN_S, self._accept_again, listener)
            return
        if len(self._connections) >= MAX_CONNECTIONS and not self._make_room():
            _log.warning("an nbd client is turned away: there are %d already", MAX_CONNECTIONS)
            connection.close()
            return
        connection.setblocking(False)
        _tune(connection)
        self.pool.admit()
        buffer = self.pool.acquire()
        assert buffer is not None, "an admitted connection always finds a buffer"
        self._connections_total += 1
        peer = f"#{self._connections_total}" + (f" from {address[0]}:{address[1]}" if address else "")
        client = Connection(self, connection, peer, buffer)
        self._connections[client] = None
        self._empty.clear()
        client.greet()

    def _make_room(self) -> bool:
        """Close the oldest connection that has not agreed on anything yet: who only holds connections keeps nobody
        out. False if every one is a client's."""
        oldest = next((connection for connection in self._connections if connection.haggling), None)
        if oldest is not None:
            oldest.abort(f"there are {MAX_CONNECTIONS} connections, and another client came")
        return oldest is not None

    def _accept_again(self, listener: socket.socket) -> None:
        if not self._closing:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    # Flow

    def pause_reading(self) -> None:
        """Read no more requests from any client until ``resume_reading``; handshakes and replies go on."""
        self.paused = True
        for connection in self._connections:
            connection.pause()

    def resume_reading(self) -> None:
        """Undo ``pause_reading``."""
        self.paused = False
        for connection in self._connections:
            connection.resume()

    # What connections share

    @property
    def executor(self) -> Executor:
        """Threads for calls that may block on a disk or a lock."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="nbd-read")
        return self._executor

    def replace_reply_view(self) -> None:
        """A connection keeps ``reply_view`` until its client took the replies; the others get another one."""
        self.reply_view = self._reply_views.pop() if self._reply_views else memoryview(bytearray(REPLY_BUFFER))

    def give_back_reply_view(self, view: memoryview) -> None:
        """A kept reply buffer is free."""
        if len(self._reply_views) < REPLY_BUFFERS_KEPT:
            self._reply_views.append(view)

    def forget(self, connection: Connection) -> None:
        """The connection is closed and nothing of it is in flight."""
        if connection in self._connections:
            del self._connections[connection]
            self._departed.add(connection.counters)
            self.pool.dismiss()
            if not self._connections:
                self._empty.set()

    # Reporting and ending

    def statistics(self) -> Statistics:
        """A snapshot."""
        total = Counters()
        total.add(self._departed)
        for connection in self._connections:
            total.add(connection.counters)
        counted = {name: getattr(total, name) for name in Counters.__slots__}
        return Statistics(len(self._connections), self._connections_total, **counted)

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Accept nothing more, answer what is in flight for up to ``timeout_s``, then close all connections."""
        self._closing = True
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()
        self._remove_unix()
        for connection in list(self._connections):
            connection.shut_down()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        for connection in list(self._connections):
            connection.abort("the server shuts down")
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


async def _listen_tcp(host: str, port: int) -> list[socket.socket]:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"The export cannot listen on {host!r}: {error.strerror or error}.") from None
    except ValueError:  # an empty label, one of more than 63 characters, or NUL
        raise ConfigError(f"The export cannot listen on {host[:100]!r}: that is no name of a host.") from None
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
    except OSError as error:
        for listener in sockets:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"Port {port} of {host} is taken by another process.", hint="Choose another port for the export."
            ) from None
        if error.errno in (errno.EADDRNOTAVAIL, errno.EACCES):
            raise ConfigError(f"The export cannot listen on {host}:{port}: {error.strerror}.") from None
        raise OperationFailed(f"The export cannot listen on {host}:{port}: {error.strerror or error}.") from None
    return sockets


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
