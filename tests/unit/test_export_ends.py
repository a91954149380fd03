"""Ends of an export's connections: buffers that are full to the last byte, clients that left with more to do, and
buffers that outlive the clients who filled them."""

from __future__ import annotations

import logging
import socket
import struct
from pathlib import Path

import pytest

from common import nbd, nbd_connection
from common.batch import WriteBatch
from common.disk import FileDisk
from common.nbd_client import NbdClient
from common.pool import PooledBuffer
from tests.conftest import wait_until
from tests.serving import Served, raw, serving
from tests.volumes import HeldVolume, PlainVolume

MIB = 1 << 20
REPLY = 16


def request(kind: int, offset: int, length: int) -> bytes:
    return nbd.REQUEST.pack(nbd.REQUEST_HEAD | kind, struct.pack(">Q", offset), offset, length)


def write(offset: int, size: int) -> bytes:
    """A write that takes ``size`` bytes on the wire."""
    length = size - nbd.REQUEST.size
    return request(nbd.NBD_CMD_WRITE, offset, length) + bytes([offset % 251]) * length


def answered(served: Served, volume: HeldVolume, connection: socket.socket) -> int:
    """Bytes of replies, when all that is held so far is let go."""
    served.call(volume.let_go)
    try:
        return len(connection.recv(1 << 16, socket.MSG_PEEK))
    except BlockingIOError:
        return 0


def test_a_buffer_full_to_its_last_byte_is_no_goodbye_when_there_is_no_other(
    short_dir: Path, disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last receive brings two requests that end where the buffer does: there is nowhere to receive again."""
    monkeypatch.setattr(nbd_connection, "SHORT_TAIL", 1000)
    volume = HeldVolume(disk)
    with serving(short_dir, volume) as served:
        pool = served.server.pool
        served.call(lambda: setattr(pool, "_limit", 1))  # and one for each connection
        other = served.call(pool.acquire)
        assert other is not None
        connection = raw(served)
        connection.sendall(write(0, pool.size - 2000))
        wait_until(lambda: len(volume.held) == 1, what="a batch that pins the buffer")
        connection.sendall(write(1, 1000) + write(2, 1000))
        wait_until(lambda: len(volume.held) == 2, what="the batch that fills it")
        connection.sendall(write(3, 1000))
        served.call(other.unpin)
        connection.setblocking(False)
        wait_until(lambda: answered(served, volume, connection) == 4 * REPLY, what="the write behind them")
        replies = connection.recv(4 * REPLY)
        assert [reply[2] for reply in struct.iter_unpack(">IIQ", replies)] == [0, 1, 2, 3]
        connection.close()


FLUSH = request(nbd.NBD_CMD_FLUSH, 0, 0)


@pytest.mark.parametrize(
    "requests",
    [
        write(0, 100) + FLUSH,
        write(0, 100) + request(nbd.NBD_CMD_DISC, 0, 0),
        write(0, 100) + request(nbd.NBD_CMD_CACHE, 0, 512),
        FLUSH + write(0, 100),
        request(nbd.NBD_CMD_READ, 0, 512) + FLUSH + request(nbd.NBD_CMD_READ, 0, 512),
    ],
    ids=["flush", "disconnect", "cache", "write", "read"],
)
def test_a_client_that_left_is_no_error_of_ours_whatever_it_had_asked_for(
    short_dir: Path, disk: FileDisk, requests: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The reply to the first request finds nobody; the others are in the buffer already."""
    volume = PlainVolume(disk)
    with serving(short_dir, volume) as served:
        connection = raw(served)
        served.call(served.server.pause_reading)
        connection.sendall(requests)
        connection.close()
        served.call(served.server.resume_reading)
        wait_until(lambda: volume.clients == 0, what="the client's leave")
        statistics = served.call(served.server.statistics)
        assert statistics.connections == 0
        assert served.call(lambda: served.server.pool.used) == 0
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


class Mirrored(PlainVolume):
    """Answers at once and keeps the payloads, as ``mode = async`` does until the secondary has them."""

    def __init__(self, disk: FileDisk) -> None:
        super().__init__(disk)
        self.unacknowledged: list[PooledBuffer] = []

    def submit(self, work: WriteBatch) -> None:
        work.buffer.pin()
        self.unacknowledged.append(work.buffer)  # type: ignore[arg-type]
        super().submit(work)

    def acknowledge(self) -> None:
        done, self.unacknowledged = self.unacknowledged, []
        for buffer in done:
            buffer.unpin()


def test_a_client_waits_for_the_buffers_of_those_who_left(
    short_dir: Path, disk: FileDisk, caplog: pytest.LogCaptureFixture
) -> None:
    volume = Mirrored(disk)
    with serving(short_dir, volume) as served:
        pool = served.server.pool
        served.call(lambda: setattr(pool, "_limit", 2))
        for left in range(3):
            with NbdClient(served.uri()) as client:
                client.write(0, b"x")
            wait_until(lambda: volume.clients == 0, what=f"the leave of client {left}")
        with socket.socket(socket.AF_UNIX) as early:
            early.connect(str(short_dir / "nbd.sock"))
            served.call(lambda: None)
            early.setblocking(False)
            with pytest.raises(BlockingIOError):  # neither greeted nor turned away
                early.recv(1)
            assert served.call(lambda: pool.used) == 3
            served.call(volume.acknowledge)
            early.settimeout(20)
            assert early.recv(8) == nbd.NBDMAGIC
            with NbdClient(served.uri()) as client:
                client.write(0, b"y")
        served.call(volume.acknowledge)
        wait_until(lambda: served.call(lambda: pool.used) == 0, what="all buffers back")
        wait_until(lambda: served.call(lambda: pool._limit) == 2, what="the clients' leave")
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
