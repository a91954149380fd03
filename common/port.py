"""The two ZeroMQ sockets of the replication stream on an asyncio loop: the primary dials, the secondary listens.

Not ``zmq.asyncio``: its futures cost more than the messages. ZeroMQ shows its state on one descriptor (``zmq.FD``)
that is
*edge-triggered*: any call on the socket, a send too, may consume the edge that told of a received message. So whoever
touched the socket looks at it again. A send looks for events only if the socket was left alone for about a
millisecond before
(ZeroMQ reads its clock to decide), and what it swallows then is a message that happened to arrive in that instant. So
one
look ``LOOK_AGAIN_S`` later is enough: one per millisecond under load instead of one a send, and each costs as much as
a message.

Copy or not: a payload that is sent without a copy costs a message object, a reference that ZeroMQ's I/O thread gives
back through another socket, and a wake-up for that. Measured on two cores (``ipc``, two processes): 128 KiB a message
is 5 to 10 % faster copied, 1 MiB 5 to 25 % faster not copied. Received payloads are never copied.

A connection's ups and downs come from ZeroMQ's socket monitor, so that a peer which was killed is noticed at once and
not after a heartbeat. Nothing else is believed of them: who the peer is, and where it stands, the session finds out.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import zmq
import zmq.backend
import zmq.utils.monitor
from zmq.auth.thread import ThreadAuthenticator

from common import limits
from common.errors import AddressInUse, ConfigError
from common.keys import CurveKeys

Frame = bytes | bytearray | memoryview

# Plain integers: combining the enum members costs more than the call that takes them.
DONTWAIT: Final = int(zmq.DONTWAIT)
SNDMORE: Final = int(zmq.SNDMORE)

# What zmq.Socket.send and .recv end in. The methods in between serve options that are not used here, at 1 to 2 us a
# frame.
_send: Final = zmq.backend.Socket.send
_recv: Final = zmq.backend.Socket.recv

COPY_BELOW: Final = 512 * limits.KIB
MESSAGES_PER_TURN: Final = 64
QUEUED_MESSAGES: Final = 16384
"""High-water mark of a socket: above what a window can hold, so that the window, not ZeroMQ, is what bounds memory."""
LOOK_AGAIN_S: Final = 0.001
RECONNECT_MS: Final = 50
RECONNECT_MAX_MS: Final = 1000
CONNECT_TIMEOUT_MS: Final = 2000
"""A dial into a cut network is given up and begun anew: the kernel alone would double its pauses up to minutes, and a
link that was cut for 25 s took 13 s to be found whole again."""
HANDSHAKE_TIMEOUT_MS: Final = 5000
"""The same for a connection whose other direction is cut."""
SILENT: Final = "the peer did not finish ZeroMQ's handshake in time"
"""A process that hangs, or a link of which a direction is cut: no stranger, who would hang up."""

log = logging.getLogger("port")


class Watcher(Protocol):
    """Hears what happens on a dialer's connection."""

    def connection_up(self) -> None:
        """The transport stands (for CURVE: and is authenticated)."""

    def connection_down(self, reason: str) -> None:
        """The transport broke or was refused; ZeroMQ goes on trying."""


class Port:
    """One ZeroMQ socket on the running loop. Subclasses say which frames belong to whom."""

    def __init__(self, kind: int, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = context
        socket = context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, QUEUED_MESSAGES)
        socket.setsockopt(zmq.RCVHWM, QUEUED_MESSAGES)
        socket.setsockopt(zmq.MAXMSGSIZE, limits.MAX_BATCH_PAYLOAD + limits.MAX_HEADER)
        socket.setsockopt(zmq.IPV6, 1)
        self.socket = socket
        self._drain_scheduled = False
        self._closed = False

    def _watch(self) -> None:
        self._loop.add_reader(self.socket.FD, self._drain)
        self._loop.call_soon(self._drain)

    def _watch_connections(self, events: int) -> None:
        self._monitor = self.socket.get_monitor_socket(events)
        self._loop.add_reader(self._monitor.FD, self._monitored)
        self._loop.call_soon(self._monitored)

    def _monitored(self) -> None:
        raise AssertionError("a subclass watches")

    def _look_again(self) -> None:
        if not self._drain_scheduled:
            self._drain_scheduled = True
            self._loop.call_later(LOOK_AGAIN_S, self._drain_once)

    def _drain_once(self) -> None:
        self._drain_scheduled = False
        self._drain()

    def _drain(self) -> None:
        """Take what has arrived, a bounded number of messages a turn."""
        if self._closed:
            return
        for _ in range(MESSAGES_PER_TURN):
            try:
                self._receive_one()
            except zmq.Again:
                self._drained()
                return
            if self._closed:
                return
        self._loop.call_soon(self._drain)
        self._drained()

    def _receive_one(self) -> None:
        raise AssertionError("a subclass receives")

    def _drained(self) -> None:
        raise AssertionError("a subclass knows what follows")

    def _send(self, frames: Sequence[Frame]) -> bool:
        """Hand the frames to ZeroMQ; False if its queue is full or the peer unknown (then nothing was sent)."""
        socket = self.socket
        last = len(frames) - 1
        try:
            for index, frame in enumerate(frames):
                flags = DONTWAIT | SNDMORE if index < last else DONTWAIT
                if len(frame) < COPY_BELOW:
                    _send(socket, frame, flags)
                else:
                    _send(socket, frame, flags, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, errno.EHOSTUNREACH):
                raise
            return False
        self._look_again()
        return True

    def close(self) -> None:
        """Drop whatever is unsent and close."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._monitor.FD)
            self.socket.disable_monitor()
            self._monitor.close(0)
            self._loop.remove_reader(self.socket.FD)
            self.socket.close(0)


class Dialer(Port):
    """The primary's end: one DEALER socket, connected to one address, reconnecting by itself."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        keys: CurveKeys | None,
        on_frames: Callable[[list[bytes]], None],
        on_drained: Callable[[], None],
        watcher: Watcher,
    ) -> None:
        super().__init__(zmq.DEALER, context)
        self._on_frames = on_frames
        self._on_drained = on_drained
        self._watcher = watcher
        self._encrypted = keys is not None
        self._handshaken = False
        self._connected_at = 0.0
        socket = self.socket
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
        if keys is not None:
            socket.curve_publickey = keys.public
            socket.curve_secretkey = keys.secret
            socket.curve_serverkey = keys.peer_public
        self._watch_connections(
            zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        socket.connect(address)
        self._watch()

    def send(self, frames: Sequence[Frame]) -> bool:
        """Send one message; False if the queue is full, which a window below it rules out."""
        return self._send(frames)

    def _receive_one(self) -> None:
        socket = self.socket
        frame = _recv(socket, DONTWAIT, False)
        frames = [frame.bytes]
        while frame.more:
            frame = _recv(socket, 0, False)
            frames.append(frame.bytes)
        self._on_frames(frames)

    def _drained(self) -> None:
        self._on_drained()

    def _monitored(self) -> None:
        while not self._closed:
            try:
                event = zmq.utils.monitor.recv_monitor_message(self._monitor, DONTWAIT)
            except zmq.Again:
                return
            kind = event["event"]
            if kind == zmq.EVENT_CONNECTED:
                self._connected_at = self._loop.time()
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._handshaken = True
                self._watcher.connection_up()
            elif kind == zmq.EVENT_DISCONNECTED and (self._handshaken or not self._encrypted):
                self._handshaken = False
                self._watcher.connection_down("the connection broke")
            elif self._loop.time() - self._connected_at > HANDSHAKE_TIMEOUT_MS / 1000 / 2:
                # who hangs up does so at once
                self._watcher.connection_down(SILENT)
            else:
                # a peer that cannot read what our keys encrypted just hangs up
                self._watcher.connection_down("the peer's keys do not match ours")


class Listener(Port):
    """The secondary's end: one ROUTER socket. ``on_frames(peer, frames)``; ``peer`` names the connection."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        keys: CurveKeys | None,
        on_frames: Callable[[bytes, list[Frame]], None],
        on_drained: Callable[[], None],
        on_disconnected: Callable[[], None],
    ) -> None:
        super().__init__(zmq.ROUTER, context)
        self._on_frames = on_frames
        self._on_drained = on_drained
        self._on_disconnected = on_disconnected
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._authenticator: ThreadAuthenticator | None = None
        if keys is not None:
            self._authenticate(keys)
        try:
            _bind(self.socket, address)
        except BaseException:
            if self._authenticator is not None:
                self._authenticator.stop()
            self.socket.close(0)
            raise
        self._watch_connections(zmq.EVENT_DISCONNECTED)
        self._watch()

    def _authenticate(self, keys: CurveKeys) -> None:
        """Let in the holder of exactly one key (ZAP, ZeroMQ RFC 27)."""
        self.socket.curve_server = True
        self.socket.curve_publickey = keys.public
        self.socket.curve_secretkey = keys.secret
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", credentials_provider=_OnlyPeer(keys.peer_public))

    def trust(self, peer: bytes) -> None:
        """The session is with ``peer``. Nothing to do: libzmq lets in nobody who has not the right key."""

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """Send one message to ``peer``; False if it is gone."""
        return self._send((peer, *frames))

    def _monitored(self) -> None:
        """A connection broke; ZeroMQ does not say whose. Everything that had arrived over it is taken first."""
        broken = False
        while not self._closed:
            try:
                zmq.utils.monitor.recv_monitor_message(self._monitor, DONTWAIT)
            except zmq.Again:
                break
            broken = True
        while broken and not self._closed:
            try:
                self._receive_one()
            except zmq.Again:
                self._on_drained()
                self._on_disconnected()
                return

    def _receive_one(self) -> None:
        socket = self.socket
        frame = _recv(socket, DONTWAIT, False)
        peer = frame.bytes
        frames: list[Frame] = []
        while frame.more:
            frame = _recv(socket, 0, False)
            frames.append(frame.buffer)
        self._on_frames(peer, frames)

    def _drained(self) -> None:
        self._on_drained()

    def close(self) -> None:
        super().close()
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None


class _OnlyPeer:
    """Credentials provider of ``zmq.auth``: one key, the peer's."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        if key == self._public:
            return True
        log.warning("refused a peer with an unknown key key=%s domain=%s", key.decode("ascii", "replace"), domain)
        return False


def _bind(socket: zmq.Socket[bytes], address: str) -> None:
    mask = os.umask(0o177)  # an ipc socket is its owner's alone
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"The replication address {address} is in use by another process.",
                hint="Stop that process, or give replication.listen another address.",
            ) from error
        raise ConfigError(
            f"Cannot listen for replication on {address}: {error.strerror}.", hint="Correct replication.listen."
        ) from error
    finally:
        os.umask(mask)


@contextlib.contextmanager
def zmq_context() -> Any:
    """A ZeroMQ context with one I/O thread; destroyed with whatever it still holds on leaving."""
    context = zmq.Context()
    try:
        yield context
    finally:
        context.destroy(0)
