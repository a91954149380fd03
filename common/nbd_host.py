"""What the connections of an NBD server share with it: the interface ``Host``, counters, and reasons not to read."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Final, Protocol

from common import limits
from common.batch import Volume
from common.pool import BufferPool

if TYPE_CHECKING:
    from common.nbd_connection import Connection

REPLY_BUFFER: Final = limits.RECEIVE_BUFFER + 64 * limits.KIB
"""Where read replies are assembled: a read of RECEIVE_BUFFER bytes fits, and so do its headers."""


class Block:
    """Reasons for not reading from a client, as bits."""

    PAUSED: Final = 1
    """The server was told to stop (``pause_reading``)."""
    STARVED: Final = 2
    """No receive buffer is free."""
    SENDING: Final = 4
    """Replies wait for room in the socket."""
    DEFERRED: Final = 8
    """Too many bytes of reads, or too many reads and flushes, are with threads."""
    CLOSING: Final = 16
    """The client said goodbye, or the server shuts down: what is in flight is finished, nothing else accepted."""
    TURN: Final = 32
    """It haggles on and on, or asked for a block status: others get their turn first."""


class Counters:
    """What a connection, or a server over all connections that left, has done."""

    __slots__ = ("bytes_read", "bytes_written", "flushes", "others", "reads", "refused", "trims", "writes", "zeroes")

    def __init__(self) -> None:
        self.reads = self.writes = self.zeroes = self.trims = self.flushes = self.others = self.refused = 0
        self.bytes_read = self.bytes_written = 0

    def add(self, other: Counters) -> None:
        """Add all of ``other`` to these."""
        for name in Counters.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Host(Protocol):
    """What a connection needs of its server."""

    default: str
    pool: BufferPool
    reply_view: memoryview
    """Where any connection assembles replies to reads: empty between two callbacks of the loop."""
    paused: bool

    @property
    def volumes(self) -> Mapping[str, Volume]: ...

    @property
    def executor(self) -> Executor: ...

    def replace_reply_view(self) -> None:
        """The caller keeps the current ``reply_view``; there is a fresh one for the others."""

    def give_back_reply_view(self, view: memoryview) -> None:
        """A view that a caller kept is free."""

    def forget(self, connection: Connection) -> None:
        """The connection is closed and nothing of it is in flight."""
