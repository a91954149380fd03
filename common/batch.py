"""What passes between an NBD export and the volume that it serves.

The export drains a socket into a pooled ``Buffer``; all write-like requests of one drain are one ``WriteBatch``. The
volume takes the batch as a whole (one message to the secondary, one reply to the client) and never copies its payload:
the buffer stays pinned until nobody needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

WRITE: Final = 0
ZERO: Final = 1
DISCARD: Final = 2

FUA: Final = 1
NO_HOLE: Final = 2
FAST_ZERO: Final = 4

Operation = tuple[int, int, int, int, int]
"""(kind, offset, length, position of the payload in ``buffer.view``, flags)"""


class Buffer(Protocol):
    """A receive buffer with a count of its users; back to its pool when the count reaches zero."""

    view: memoryview

    def pin(self) -> None: ...

    def unpin(self) -> None: ...


class WriteBatch:
    """The write-like requests of one drain of one connection, in the order in which the client sent them.

    ``operations[i]`` are checked against the volume's bounds already. The volume calls ``finish`` exactly once, on the
    event loop, with the errno of each operation that failed (none: all succeeded); the export then answers the client
    and unpins the buffer once. Whoever needs the payload longer pins it before.
    """

    __slots__ = ("_finish", "buffer", "end", "fua", "operations", "start")

    def __init__(
        self,
        operations: list[Operation],
        buffer: Buffer,
        start: int,
        end: int,
        fua: bool,
        finish: Callable[[Mapping[int, int] | None], None],
    ) -> None:
        self.operations = operations
        self.buffer = buffer
        self.start = start
        """First byte in ``buffer.view`` of the span that holds all payloads; ``start == end`` if there is none."""
        self.end = end
        self.fua = fua
        """True if any operation asks for FUA."""
        self._finish = finish

    def finish(self, errors: Mapping[int, int] | None = None) -> None:
        """Answer the client: ``errors`` maps the index of a failed operation to its errno."""
        self._finish(errors)


class Volume(Protocol):
    """What an export serves: the primary's MirroredDisk, the guest's view, a promoted disk, or a plain file."""

    name: str
    read_only: bool
    multi_conn: bool
    """True if a flush on one connection covers writes acknowledged on all (NBD_FLAG_CAN_MULTI_CONN)."""
    preferred_block: int

    @property
    def size(self) -> int:
        """Bytes now; a client keeps the size that it was told when it connected."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view``. Raises BlockingIOError where it would have to wait: then call ``read_blocking`` in a
        thread."""

    def read_blocking(self, offset: int, view: memoryview) -> None:
        """Like ``read_into``, may block; safe to call from any thread."""

    def submit(self, batch: WriteBatch) -> None:
        """Take the batch over; ``batch.finish`` is called once, now or later."""

    def flush(self, done: Callable[[int], None]) -> None:
        """Make every write finished so far durable; then ``done(errno or 0)`` on the event loop."""

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, flags) of consecutive extents from ``offset``; flags: NBD_STATE_HOLE 1, NBD_STATE_ZERO 2."""

    def client_connected(self) -> None:
        """A client entered transmission on this volume."""

    def client_gone(self) -> None:
        """That client left."""
