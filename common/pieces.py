"""Long zeroes and discards, or many of them, given to a volume piece by piece.

A disk that has to write its zeroes takes half a minute for the 4 GiB that one request may ask for, and a volume does
its work in one step of the loop: no sign of life would leave the process meanwhile, to its peer or to systemd. So such
a batch becomes several with at most ``limits.ZERO_CHUNK`` bytes of them, and the loop turns in between. Nobody is
promised an order among requests in flight; each piece has its place in the write history like any batch.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from common.batch import WRITE, Operation, Volume, WriteBatch
from common.limits import MIB, ZERO_CHUNK

Numbered = tuple[int, Operation]
"""An operation, or a piece of one, and its index in the batch."""


def is_long(operations: Sequence[Operation]) -> bool:
    """Whether a batch is to be done in pieces."""
    return sum(length for kind, _, length, _, _ in operations if kind != WRITE) > ZERO_CHUNK


class Pieces:
    """``batch`` in pieces for ``volume``; it is finished when all are. ``given_up``: nobody waits for it any more."""

    def __init__(self, volume: Volume, batch: WriteBatch, given_up: Callable[[], bool]) -> None:
        self._volume = volume
        self._batch = batch
        self._given_up = given_up
        self._loop = asyncio.get_running_loop()
        self._rest = _cut(batch.operations)
        self._following: list[Numbered] | None = next(self._rest)
        self._unfinished = 0
        """Pieces that the volume has."""
        self._errors: dict[int, int] = {}

    def submit(self) -> None:
        """Give the volume the next piece, and the others soon."""
        piece = self._following
        assert piece is not None
        if self._given_up():
            self._following = None
            self._errors |= dict.fromkeys(range(len(self._batch.operations)), errno.EIO)
            self._settle()
            return
        self._following = next(self._rest, None)
        self._unfinished += 1
        data = [(position, position + length) for _, (kind, _, length, position, _) in piece if kind == WRITE]
        start, end = min((first for first, _ in data), default=0), max((stop for _, stop in data), default=0)
        # a flush behind the last piece makes all of them durable
        fua = self._batch.fua and self._following is None
        finish = partial(self._finished, [index for index, _ in piece])
        self._volume.submit(WriteBatch([o for _, o in piece], self._batch.buffer, start, end, fua, finish))
        if self._following is not None:
            self._loop.call_soon(self.submit)

    def _finished(self, indices: Sequence[int], errors: Mapping[int, int] | None) -> None:
        for at, code in (errors or {}).items():
            self._errors.setdefault(indices[at], code)
        self._unfinished -= 1
        self._settle()

    def _settle(self) -> None:
        if not self._unfinished and self._following is None:
            self._batch.finish(self._errors or None)


def read_through(volume: Volume, offset: int, length: int) -> None:
    """NBD_CMD_CACHE: read the range, so that it is in the page cache of this machine. From any thread."""
    scratch = memoryview(bytearray(min(length, MIB)))
    end = offset + length
    while offset < end:
        step = min(len(scratch), end - offset)
        volume.read_blocking(offset, scratch[:step])
        offset += step


def _cut(operations: Sequence[Operation]) -> Iterator[list[Numbered]]:
    """The operations in order, the long ones cut; at most ``ZERO_CHUNK`` bytes of zeroes and discards a piece."""
    piece: list[Numbered] = []
    room = ZERO_CHUNK
    for index, operation in enumerate(operations):
        kind, offset, length, position, flags = operation
        if kind == WRITE:
            piece.append((index, operation))
            continue
        end = offset + length
        while offset < end:
            step = min(end - offset, ZERO_CHUNK - offset % ZERO_CHUNK)
            if step > room:
                yield piece
                piece, room = [], ZERO_CHUNK
            piece.append((index, (kind, offset, step, position, flags)))
            offset += step
            room -= step
    yield piece
