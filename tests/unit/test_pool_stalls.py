"""Large buffers are few: a client that stalls inside a large request does not keep the others from theirs."""

from __future__ import annotations

import itertools
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common import nbd, pool
from common.disk import FileDisk
from common.nbd_client import NbdClient
from tests.conftest import wait_until
from tests.serving import Served, raw, serving
from tests.volumes import HeldVolume, PlainVolume

MIB = 1 << 20
LARGE = 3 * MIB
REPLY = 16


@pytest.fixture(autouse=True)
def two_large_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that hold one and a half of the requests here; who stalls loses patience soon."""
    monkeypatch.setattr(pool, "LARGE_COUNT", 2)
    monkeypatch.setattr(pool, "LARGE_SIZE", LARGE * 3 // 2)
    monkeypatch.setattr(pool, "PATIENCE_S", 0.05)


def write(offset: int, data: bytes) -> bytes:
    return nbd.REQUEST.pack(nbd.REQUEST_HEAD | nbd.NBD_CMD_WRITE, bytes(8), offset, len(data)) + data


def stalled(served: Served, count: int) -> list[socket.socket]:
    """Clients that have sent half of a large write."""
    connections = [raw(served) for _ in range(count)]
    for connection in connections:
        connection.sendall(write(0, b"s" * LARGE)[: LARGE // 2])
    wait_until(lambda: served.call(lambda: served.server.pool._large_used) == count, what="large buffers in use")
    return connections


def replies(connection: socket.socket, count: int) -> list[int]:
    """The errors of so many replies; fewer if the server hangs up."""
    data = b""
    while len(data) < count * REPLY:
        try:
            piece = connection.recv(count * REPLY - len(data))
        except ConnectionError:
            break
        if not piece:
            break
        data += piece
    return [error for _, error, _ in struct.iter_unpack(">II8s", data)]


def finished(connection: socket.socket) -> bool:
    """Whether the rest of its large write is still taken."""
    try:
        connection.sendall(write(0, b"s" * LARGE)[LARGE // 2 :])
    except ConnectionError:
        return False
    return replies(connection, 1) == [0]


def test_a_stalled_client_is_cut_off_when_another_waits(short_dir: Path, disk: FileDisk) -> None:
    with serving(short_dir, PlainVolume(disk)) as served:
        connections = stalled(served, 2)
        with NbdClient(served.uri(), timeout_s=20) as client:
            client.write(4 * MIB, b"x" * LARGE)
            assert client.read(4 * MIB, LARGE) == b"x" * LARGE
        assert sorted(map(finished, connections)) == [False, True], "one buffer was wanted, one is given up"
        for connection in connections:
            connection.close()


def test_a_stalled_client_that_nobody_waits_for_may_stall(
    short_dir: Path, disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = itertools.count()
    look = pool.Patience._look

    def counted(patience: pool.Patience) -> None:
        next(looks)
        look(patience)

    monkeypatch.setattr(pool, "PATIENCE_S", 0.005)
    monkeypatch.setattr(pool.Patience, "_look", counted)
    with serving(short_dir, PlainVolume(disk)) as served:
        connections = stalled(served, 2)
        wait_until(lambda: next(looks) > 10, what="looks at both")
        assert all(map(finished, connections))
        for connection in connections:
            connection.close()


def test_a_client_that_is_slow_but_goes_on_is_waited_for(
    short_dir: Path, disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "PATIENCE_S", 0.2)
    monkeypatch.setattr(pool, "PATIENCE_BYTES", 1)
    with serving(short_dir, PlainVolume(disk)) as served, ThreadPoolExecutor(1) as threads:
        slow = stalled(served, 2)
        with NbdClient(served.uri(), timeout_s=20) as client:
            waiting = threads.submit(client.write, 4 * MIB, b"x" * LARGE)
            wait_until(lambda: served.call(lambda: served.server.pool.large_wanted), what="one that waits")
            rest = memoryview(write(0, b"s" * LARGE))[LARGE // 2 :]
            for begin in range(0, len(rest), 64 * 1024):
                for connection in slow:
                    connection.sendall(rest[begin : begin + 64 * 1024])
            assert [replies(connection, 1) for connection in slow] == [[0], [0]]
            waiting.result(20)
        for connection in slow:
            connection.close()


def test_clients_that_each_need_a_second_large_buffer_do_not_wait_for_one_another(
    short_dir: Path, disk: FileDisk
) -> None:
    volume = HeldVolume(disk)
    with serving(short_dir, volume) as served, ThreadPoolExecutor(2) as threads:
        connections = stalled(served, 2)
        pool_ = served.server.pool
        rest = (2 * write(0, b"s" * LARGE))[LARGE // 2 :]
        sent = [threads.submit(one.sendall, rest) for one in connections]
        wait_until(
            lambda: served.call(lambda: len(volume.held) == 2 and len(pool_._waiting_large) == 2),
            what="both wait for a second buffer while their first is in flight",
        )
        for _ in range(2):
            wait_until(lambda: len(volume.held) == 2, what="a write of each")
            served.call(volume.let_go)
        for future in sent:
            future.result(20)
        assert [replies(connection, 2) for connection in connections] == [[0, 0], [0, 0]]
        for connection in connections:
            connection.close()
