"""Long zeroes and discards are done in pieces, between which the loop turns."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.batch import DISCARD, FUA, ZERO, Operation, WriteBatch
from common.disk import Disk, Fault, FaultDisk, FileDisk
from common.limits import MIB, ZERO_CHUNK
from common.nbd_client import NbdClient, NbdClientError
from common.pieces import Pieces
from tests.serving import serving
from tests.volumes import HeldVolume, PlainVolume

SIZE = 160 * MIB


class Turning(PlainVolume):
    """Notes which pieces it gets, and when the loop turns behind one."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk)
        self.seen: list[list[Operation] | str] = []
        self.durable: list[bool] = []

    def submit(self, work: WriteBatch) -> None:
        self.seen.append(work.operations)
        self.durable.append(work.fua)
        asyncio.get_running_loop().call_soon(self.seen.append, "turn")
        super().submit(work)


@contextmanager
def sparse(directory: Path) -> Iterator[FileDisk]:
    path = directory / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    disk = FileDisk(str(path))
    try:
        yield disk
    finally:
        disk.close()


def test_the_loop_turns_between_the_pieces_of_a_long_zero(short_dir: Path, shm_dir: Path) -> None:
    start, length = ZERO_CHUNK - 5, 3 * ZERO_CHUNK
    with sparse(shm_dir) as disk:
        for edge in (start, start + length):
            disk.write(edge - 10, b"x" * 20)
        volume = Turning(disk)
        with serving(short_dir, volume) as served, NbdClient(served.uri()) as client:
            client.submit_zero(start, length, fua=True)
            client.submit_write(0, b"after")
            assert [done.error for done in client.collect_all()] == [None, None]
            assert bytes(client.read(0, 5)) == b"after"
            assert bytes(client.read(start - 2, 4)) == b"xx\0\0"
            assert bytes(client.read(start + length - 2, 4)) == b"\0\0xx"
        pieces = [seen for seen in volume.seen if isinstance(seen, list)]
        zeroes = [(offset, length) for piece in pieces for kind, offset, length, _, _ in piece if kind == ZERO]
        assert zeroes == [
            (start, 5), (ZERO_CHUNK, ZERO_CHUNK), (2 * ZERO_CHUNK, ZERO_CHUNK), (3 * ZERO_CHUNK, ZERO_CHUNK - 5),
        ]  # fmt: skip
        assert volume.seen == [part for piece in pieces for part in (piece, "turn")]
        assert volume.durable == [False] * (len(pieces) - 1) + [True]


def test_one_piece_that_fails_fails_its_request_alone(short_dir: Path, shm_dir: Path) -> None:
    with sparse(shm_dir) as disk:
        bad = FaultDisk(disk, Fault(frozenset({"zero"}), errno.EIO, start=2 * ZERO_CHUNK, end=3 * ZERO_CHUNK))
        with serving(short_dir, PlainVolume(bad)) as served, NbdClient(served.uri()) as client:
            good = [client.submit_trim(0, 4 * ZERO_CHUNK)]
            failing = client.submit_zero(0, 4 * ZERO_CHUNK)
            good += [client.submit_write(0, b"x"), client.submit_zero(4 * ZERO_CHUNK, 2 * ZERO_CHUNK)]
            told = {done.cookie: done.error for done in client.collect_all()}
        assert [told[cookie] for cookie in good] == [None] * 3
        assert isinstance(told[failing], NbdClientError)


def test_many_short_ones_are_no_better_than_a_long_one(short_dir: Path, shm_dir: Path) -> None:
    with sparse(shm_dir) as disk:
        volume = Turning(disk)
        with serving(short_dir, volume) as served, NbdClient(served.uri()) as client:
            for number in range(20):
                client.submit_trim(number * 4 * MIB, 4 * MIB)
            assert [done.error for done in client.collect_all()] == [None] * 20
        pieces = [seen for seen in volume.seen if isinstance(seen, list)]
        assert sum(len(piece) for piece in pieces) == 20
        assert max(sum(operation[2] for operation in piece) for piece in pieces) == ZERO_CHUNK


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_a_client_that_is_gone_is_given_no_more_pieces(shm_dir: Path, answered: int) -> None:
    """The batch is finished all the same, once, when the volume has answered what it has."""
    told: list[dict[int, int]] = []

    async def go() -> None:
        gone = False
        volume = HeldVolume(disk)
        operations: list[Operation] = [(DISCARD, 0, 6 * ZERO_CHUNK, 0, FUA)]
        memory = SimpleNamespace(view=memoryview(b""))
        whole = WriteBatch(operations, memory, 0, 0, True, lambda errors: told.append(dict(errors or {})))
        Pieces(volume, whole, lambda: gone).submit()
        await asyncio.sleep(0)
        assert len(volume.held) == 2
        volume.let_go(answered)
        gone = True
        await asyncio.sleep(0)
        assert bool(told) == (answered == 2)
        volume.let_go()
        await asyncio.sleep(0)
        assert not volume.held

    with sparse(shm_dir) as disk:
        asyncio.run(go())
    assert told == [{0: errno.EIO}]
