"""ZeroMQ's wire protocol, ZMTP 3.1 with the NULL mechanism, without sockets (RFC 37, https://rfc.zeromq.org/spec/37).

    greeting (64 bytes, both ways) ─▶ READY command (both ways) ─▶ messages of one or more frames

An ``Inbox`` is the receiving half: the socket's owner receives into ``room()`` and gets whole messages from
``received()``. Their frames lie where they were received. A buffer is used again when nobody holds a frame of it any
more, so what is done with at once always comes into the same memory, which the processor's cache still has.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from common import limits
from common.errors import ProtocolError

VERSION: Final = (3, 1)
GREETING_SIZE: Final = 64
PEERS: Final = {b"DEALER": (b"ROUTER", b"DEALER", b"REP"), b"ROUTER": (b"DEALER", b"ROUTER", b"REQ")}
"""With whom a socket type may talk (RFC 28)."""

BUFFER: Final = 256 * limits.KIB
ROOM: Final = 64 * limits.KIB
"""Least room for a ``recv`` when nothing is half received."""
SPARES: Final = 8
"""Buffers that are kept for later use; more are given back to the system."""
MAX_COMMAND: Final = 4096
MAX_FRAMES: Final = 8
"""Frames of a message; the replication stream has two."""

MORE: Final = 1
LONG: Final = 2
COMMAND: Final = 4

_long: Final = struct.Struct(">BQ")
_SHORT: Final = [bytes((0, size)) for size in range(256)]
_SHORT_MORE: Final = [bytes((MORE, size)) for size in range(256)]

Frame = bytes | bytearray | memoryview


class ZmtpError(ProtocolError):
    """The peer does not speak this protocol; ``sentence`` says what it did. The connection is over."""


def greeting() -> bytes:
    """What both ends say first: signature, version, mechanism NULL."""
    return b"\xff" + bytes(8) + b"\x7f" + bytes(VERSION) + b"NULL".ljust(20, b"\0") + bytes(32)


def ready(socket_type: bytes) -> bytes:
    """The READY command, which ends the handshake."""
    return command(b"READY", _property(b"Socket-Type", socket_type) + _property(b"Identity", b""))


def error(reason: str) -> bytes:
    """The ERROR command: the handshake failed for ``reason``."""
    text = reason.encode("ascii", "replace")[:255]
    return command(b"ERROR", bytes((len(text),)) + text)


def command(name: bytes, body: bytes) -> bytes:
    """A command frame."""
    content = bytes((len(name),)) + name + body
    return prefix(len(content), flags=COMMAND) + content


def prefix(size: int, flags: int = 0) -> bytes:
    """What precedes a frame of ``size`` bytes; ``flags``: MORE if another one of the same message follows."""
    if size < 256:
        return _SHORT[size] if not flags else _SHORT_MORE[size] if flags == MORE else bytes((flags, size))
    return _long.pack(flags | LONG, size)


def pieces(frames: Sequence[Frame]) -> list[Frame]:
    """A message as it goes on the wire, the frames themselves among the pieces: for ``sendmsg``."""
    found: list[Frame] = []
    following = len(frames)
    for frame in frames:
        following -= 1
        found.append(prefix(len(frame), MORE if following else 0))
        found.append(frame)
    return found


def peer_type(content: memoryview) -> bytes:
    """The socket type in a peer's READY; ZmtpError if it sent another command, or an ERROR, or nonsense."""
    name, body = split_command(content)
    if name == b"ERROR":
        raise ZmtpError(f"the peer refused the connection: {body[1:].decode('ascii', 'replace')}")
    if name != b"READY":
        raise ZmtpError(f"expected READY, got the command {name!r}")
    while body:
        key, rest = _take(body, 1)
        value, body = _take(rest, 4)
        if key.lower() == b"socket-type":
            return value
    raise ZmtpError("the peer's READY names no socket type")


def split_command(content: memoryview) -> tuple[bytes, bytes]:
    """Name and body of a command frame."""
    return _take(bytes(content), 1)


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + struct.pack(">I", len(value)) + value


def _take(body: bytes, width: int) -> tuple[bytes, bytes]:
    """A text behind its length of ``width`` bytes, and what follows it."""
    end = width + int.from_bytes(body[:width], "big")
    if len(body) < width or len(body) < end:
        raise ZmtpError("a command of the handshake ends in the middle")
    return body[width:end], body[end:]


class Inbox:
    """The receiving half of a connection."""

    def __init__(self, limit: int) -> None:
        self.commands: list[memoryview] = []
        """Commands among what ``received`` just took; its caller empties the list."""
        self.limit = limit
        """Bytes of the longest message that is accepted, its frames together."""
        self._buffer = bytearray(BUFFER)
        self._spares: list[bytearray] = []
        self._start = self._end = 0
        self._need = GREETING_SIZE
        """Bytes from ``_start`` on without which nothing can be said."""
        self._greeted = False
        self._frames: list[memoryview] = []
        self._gathered = 0
        """Bytes in ``_frames``."""

    def room(self) -> memoryview:
        """Where to receive; at least a byte, and all that is missing of a frame whose length is known."""
        start, end = self._start, self._end
        if start == end:
            if _unused(self._buffer):
                self._start = self._end = 0
            elif len(self._buffer) - end < ROOM:
                self._replace(0)
        elif start + self._need > len(self._buffer):
            self._replace(self._need)
        return memoryview(self._buffer)[self._end :]

    def received(self, count: int) -> list[list[memoryview]]:
        """``count`` bytes came into ``room()``: the messages that they complete, each a list of frames.

        Raises ZmtpError if they are no ZMTP.
        """
        self._end += count
        view = memoryview(self._buffer)
        if not self._greeted and not self._take_greeting(view):
            return []
        messages = []
        start, end = self._start, self._end
        while (have := end - start) > 1:
            flags = view[start]
            if flags & LONG:
                if have < 9:
                    self._need = 9
                    break
                size = _long.unpack_from(view, start)[1]
                body = start + 9
            else:
                size = view[start + 1]
                body = start + 2
            if flags > 6 or flags & (MORE | COMMAND) == MORE | COMMAND:
                raise ZmtpError(f"a frame has the flags {flags:#x}")
            if size > (MAX_COMMAND if flags & COMMAND else self.limit - self._gathered):
                raise ZmtpError(f"a frame of {size} bytes is too long")
            stop = body + size
            if stop > end:
                self._need = stop - start
                break
            frame = view[body:stop]
            start = stop
            if flags & COMMAND:
                self.commands.append(frame)
                continue
            self._frames.append(frame)
            if not flags & MORE:
                messages.append(self._frames)
                self._frames = []
                self._gathered = 0
                continue
            self._gathered += size
            if len(self._frames) == MAX_FRAMES:
                raise ZmtpError(f"a message has more than {MAX_FRAMES} frames")
        else:
            self._need = 2
        self._start = start
        return messages

    def _take_greeting(self, view: memoryview) -> bool:
        if (self._end and view[0] != 0xFF) or (self._end > 9 and not view[9] & 1):
            raise ZmtpError("the peer does not speak ZeroMQ's protocol")
        if self._end < GREETING_SIZE:
            return False
        if view[10] < VERSION[0]:
            raise ZmtpError(f"the peer speaks version {view[10]} of ZeroMQ's protocol, and {VERSION[0]} is needed")
        mechanism = bytes(view[12:32]).rstrip(b"\0")
        if mechanism != b"NULL":
            name = mechanism.decode("ascii", "replace")
            raise ZmtpError(f"the peer wants a connection secured by {name}, and this side has no keys")
        self._greeted = True
        self._start = GREETING_SIZE
        return True

    def _replace(self, need: int) -> None:
        """Go on in another buffer that has room for ``need`` bytes, and for what usually follows."""
        old, pending = self._buffer, self._end - self._start
        size = max(BUFFER, (need + 2 * ROOM - 1) // ROOM * ROOM)
        spares = self._spares
        for index, spare in enumerate(spares):
            if len(spare) >= size and _unused(spare):
                self._buffer, spares[index] = spare, old
                break
        else:
            self._buffer = bytearray(size)
            if len(spares) == SPARES:
                spares.pop(0)
            spares.append(old)
        memoryview(self._buffer)[:pending] = memoryview(old)[self._start : self._end]
        self._start, self._end = 0, pending


def _unused(buffer: bytearray) -> bool:
    """True if no view of the buffer lives: only then it lets itself be resized."""
    try:
        buffer.append(0)
    except BufferError:
        return False
    buffer.pop()
    return True
