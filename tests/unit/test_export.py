"""The export on real sockets: replies that come late, clients that vanish or never receive, buffers that run out."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from common import limits, nbd, nbd_connection
from common.disk import DelayDisk, Fault, FaultDisk, FileDisk
from common.errors import AddressInUse, ConfigError, NbdError, NotRunning, TandemDiskError, TimedOut
from common.export import NbdServer
from common.nbd_client import NbdClient, NbdClientError, list_exports
from common.nbd_uri import NbdUri
from common.settings import ExportSettings
from tests.conftest import wait_until
from tests.serving import Served, raw, serving
from tests.volumes import HeldVolume, PlainVolume

MIB = 1 << 20
SIZE = 80 * MIB


@pytest.fixture
def disk(shm_dir: Path) -> Iterator[FileDisk]:
    path = shm_dir / "disk.raw"
    path.touch()
    os.truncate(path, SIZE)
    disk = FileDisk(str(path))
    yield disk
    disk.close()


@pytest.fixture
def plain(disk: FileDisk) -> PlainVolume:
    return PlainVolume(disk)


@pytest.fixture
def served(short_dir: Path, plain: PlainVolume) -> Iterator[Served]:
    with serving(short_dir, plain) as running:
        yield running


def contents(disk: FileDisk, offset: int, length: int) -> bytes:
    data = bytearray(length)
    disk.read_into(offset, memoryview(data))
    return bytes(data)


def request(kind: int, offset: int, length: int, cookie: int = 0, flags: int = 0) -> bytes:
    return nbd.REQUEST.pack(nbd.REQUEST_HEAD | flags << 16 | kind, struct.pack(">Q", cookie), offset, length)


def receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        assert piece, "the server hung up"
        data += piece
    return data


# The client library against the server


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("length", [1, 511, 4096, 2 * MIB - 1, 2 * MIB + 1, 32 * MIB])
def test_any_length_at_any_offset(served: Served, disk: FileDisk, structured: bool, length: int) -> None:
    data = os.urandom(length)
    with NbdClient(served.uri(), structured=structured) as client:
        assert client.structured is structured
        for offset in (0, 12345, SIZE - length):
            client.write(offset, data)
            assert contents(disk, offset, length) == data
            assert client.read(offset, length) == data


def test_zero_trim_status_cache_and_flush(served: Served, disk: FileDisk) -> None:
    with NbdClient(served.uri()) as client:
        assert (client.size, client.name, client.read_only, client.multi_conn) == (SIZE, "disk", False, True)
        assert (client.minimum_block, client.maximum_payload) == (1, limits.MAX_PAYLOAD)
        client.write(0, b"\xff" * MIB, fua=True)
        client.zero(4096, 8192)
        client.zero(100, 50, no_hole=True, fua=True)
        client.trim(65536, 65536)
        client.cache(0, SIZE)
        client.flush()
        assert contents(disk, 4096, 8192) == bytes(8192)
        assert contents(disk, 100, 50) == bytes(50)
        assert contents(disk, 99, 1) + contents(disk, 150, 1) == b"\xff\xff"
        assert client.block_status(0, MIB, one=True) == [(4096, 0)]
        assert client.block_status(4096, 8192) == [(8192, 3)]
        extents = list(client.extents())
        assert sum(length for _, length, _ in extents) == SIZE
        assert extents[-1] == (MIB, SIZE - MIB, 3)


@pytest.mark.parametrize("structured", [True, False])
def test_errors_name_the_request_and_leave_the_connection_usable(served: Served, structured: bool) -> None:
    with NbdClient(served.uri(), structured=structured) as client:
        for call, number in (
            (lambda: client.read(SIZE - 1, 2), errno.EINVAL),
            (lambda: client.write(SIZE - 1, b"xx"), errno.ENOSPC),
            (lambda: client.zero(SIZE - 1, 2), errno.ENOSPC),
            (lambda: client.trim(SIZE - 1, 2), errno.EINVAL),
            (lambda: client.read(0, limits.MAX_PAYLOAD + 1), errno.EOVERFLOW if structured else errno.EINVAL),
            (lambda: client.write(0, bytes(limits.MAX_PAYLOAD + 1)), errno.EINVAL),
        ):
            with pytest.raises(NbdClientError, match="The server refused a ") as caught:
                call()
            assert caught.value.errno == number
        client.write(0, b"fine")
        assert client.read(0, 4) == b"fine"


def test_pipelines(served: Served, plain: PlainVolume) -> None:
    plain.keep_batches = True
    data = [os.urandom(4096) for _ in range(64)]
    with NbdClient(served.uri()) as client:
        assert client.write_many(((index * 4096, data[index % 64]) for index in range(4096)), depth=64) == 4096
        read = dict(client.read_many(((index * 4096, 4096) for index in range(4096)), depth=64))
        assert len(read) == 4096
        assert all(read[index * 4096] == data[index % 64] for index in range(4096))
        assert len(plain.batches) < 4096, "requests that arrive together are one batch"
        assert sum(map(len, plain.batches)) == 4096
        with pytest.raises(NbdClientError):
            client.write_many([(0, b"x"), (SIZE, b"x"), (1, b"y")], depth=1)
        assert client.in_flight == 0
        assert client.read(0, 1) == b"x"
    statistics = served.call(served.server.statistics)
    assert (statistics.writes, statistics.bytes_written) == (4097, 4096 * 4096 + 1)
    assert (statistics.reads, statistics.refused) == (4097, 1)


def test_reads_and_writes_both_ways_at_full_speed_do_not_lock_up(served: Served) -> None:
    """Both socket buffers fill up: the client must receive while it cannot send."""
    data = os.urandom(MIB)
    with NbdClient(served.uri()) as client:
        for index in range(40):
            client.submit_write(index * MIB, data)
            client.submit_read(index * MIB, MIB)
        completions = client.collect(80)
        assert len(completions) == 80
        assert not [completion for completion in completions if completion.error]


@pytest.mark.parametrize("seed", [1, 2])
def test_random_requests_against_a_model(served: Served, seed: int) -> None:
    """Every kind of request, any alignment, two connections in turn; the model is a bytearray."""
    rng = random.Random(seed)
    span = 3 * MIB
    model = bytearray(span)
    with NbdClient(served.uri()) as one, NbdClient(served.uri(), structured=False) as other:
        for _ in range(600):
            client = rng.choice((one, other))
            length = min(int(rng.paretovariate(0.5)), MIB)
            offset = rng.randrange(span - length)
            match rng.randrange(6):
                case 0 | 1:
                    data = rng.randbytes(length)
                    client.write(offset, data, fua=rng.random() < 0.05)
                    model[offset : offset + length] = data
                case 2:
                    client.zero(offset, length, no_hole=rng.random() < 0.5)
                    model[offset : offset + length] = bytes(length)
                case 3:
                    client.trim(offset, length)  # FileDisk punches holes, so the contents are known
                    model[offset : offset + length] = bytes(length)
                case 4:
                    extents = list(one.extents(offset, length))
                    assert sum(extent[1] for extent in extents) == length
                    for start, size, flags in extents:
                        assert not flags & nbd.NBD_STATE_ZERO or not any(model[start : start + size])
                case _:
                    assert client.read(offset, length) == model[offset : offset + length]
        assert one.read(0, span) == model


def test_block_status_of_much_is_told_in_steps(short_dir: Path, shm_dir: Path) -> None:
    path = shm_dir / "huge"
    path.touch()
    os.truncate(path, 1 << 40)
    huge = FileDisk(str(path))
    huge.write(1 << 39, b"x" * 4096)
    with serving(short_dir, PlainVolume(huge)) as served, NbdClient(served.uri()) as client:
        assert client.block_status(0, 1 << 31) == [(nbd_connection.STATUS_SPAN, 3)]
        assert client.block_status(1 << 39, 1 << 20) == [(4096, 0), ((1 << 20) - 4096, 3)]
    huge.close()


def test_several_exports(short_dir: Path, shm_dir: Path, plain: PlainVolume) -> None:
    path = shm_dir / "other.raw"
    path.write_bytes(b"other" * 1000)
    other = FileDisk(str(path), read_only=True)
    with serving(short_dir, plain, PlainVolume(other, "größe"), tcp=True) as running:
        assert list_exports(running.uri()) == ["disk", "größe"]
        with NbdClient(running.uri("größe")) as client:
            assert (client.size, client.read_only, client.name) == (5000, True, "größe")
            with pytest.raises(NbdClientError) as caught:
                client.write(0, b"x")
            assert caught.value.errno == errno.EPERM
        with NbdClient(running.uri("")) as client:
            assert client.name == "disk"
        tcp = running.call(lambda: running.server.uris("größe"))[1]
        with NbdClient(tcp) as client:
            assert client.read(0, 10) == b"otherother"
        with pytest.raises(NbdClientError, match="there is no export 'missing' here"):
            NbdClient(running.uri("missing"))
    other.close()


def test_client_errors(short_dir: Path) -> None:
    with pytest.raises(NotRunning, match="No NBD server answers"):
        NbdClient(f"nbd+unix:///x?socket={short_dir / 'nobody'}")
    for text in ("http://x/y", "nbd+unix:///x", "nbd+unix://host/x?socket=/y", "nbd://host:port/x"):
        with pytest.raises(ConfigError):
            NbdClient(text)
    for host in ("x" * 64, "an..empty.label"):
        with pytest.raises(NotRunning, match="no name of a host"):
            NbdClient(f"nbd://{host}/x")
    path = str(short_dir / "silent")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(TimedOut, match="did not answer within"):
            NbdClient(f"nbd+unix:///x?socket={path}", timeout_s=0.05)


@pytest.mark.parametrize("path", ["/tmp/a+b c", "/tmp/100%&x=y;z#?", "/tmp/größe"])
def test_uris_of_sockets(path: str) -> None:
    """The specification leaves quoting to RFC 3986, which knows no plus for a blank."""
    uri = NbdUri("disk/0+1 2", socket=path)
    assert NbdUri.parse(str(uri)) == uri
    assert NbdUri.parse("nbd+unix:///a+b?socket=/run/c+d%20e%2Bf").socket == "/run/c+d e+f"
    assert NbdUri.parse("nbd+unix:///a+b?socket=/run/x").name == "a+b"


# Replies that come late


@pytest.fixture
def held(short_dir: Path, disk: FileDisk) -> Iterator[tuple[HeldVolume, Served]]:
    volume = HeldVolume(disk)
    with serving(short_dir, volume) as running:
        yield volume, running
        running.call(volume.let_go)


def test_replies_wait_for_the_volume_and_reads_go_on_meanwhile(held: tuple[HeldVolume, Served]) -> None:
    volume, served = held
    with NbdClient(served.uri()) as client:
        cookies = []
        for index in range(50):
            cookies.append(client.submit_write(index * 512, bytes([index]) * 512))
            client.send()
        wait_until(lambda: volume.held, what="a batch")
        client.submit_read(0, 512)
        (completion,) = client.collect(1)
        assert completion.data is not None
        assert completion.cookie not in cookies
        assert client.in_flight == 50
        served.call(lambda: volume.let_go(1))
        assert client.collect(1)[0].cookie == cookies[0]
        while client.in_flight:
            served.call(volume.let_go)
            client.collect(1)
        client.submit_flush()
        client.send()
        wait_until(lambda: volume.held, what="the flush")
        served.call(volume.let_go)
        assert client.collect(1)[0].error is None


def test_a_flush_parts_batches(held: tuple[HeldVolume, Served]) -> None:
    volume, served = held
    connection = raw(served)
    writes = b"".join(request(nbd.NBD_CMD_WRITE, index, 1, index) + b"x" for index in range(3))
    connection.sendall(writes + request(nbd.NBD_CMD_FLUSH, 0, 0, 9) + request(nbd.NBD_CMD_TRIM, 0, 512, 10))
    wait_until(lambda: len(volume.held) == 3, what="batch, flush, batch")
    served.call(volume.let_go)
    replies = receive(connection, 5 * 16)
    assert [reply[2] for reply in struct.iter_unpack(">IIQ", replies)] == [0, 1, 2, 9, 10]
    connection.close()


def test_a_client_that_vanishes_with_batches_in_flight(held: tuple[HeldVolume, Served], disk: FileDisk) -> None:
    volume, served = held
    connection = raw(served)
    connection.sendall(request(nbd.NBD_CMD_WRITE, 0, 5) + b"hello" + request(nbd.NBD_CMD_WRITE, 100, 5000) + b"half")
    wait_until(lambda: len(volume.held) == 1, what="the batch")
    connection.close()
    assert volume.clients == 1, "a client is there until its requests are finished"
    served.call(volume.let_go)
    wait_until(lambda: volume.clients == 0, what="the client's leave")
    assert contents(disk, 0, 5) == b"hello"
    assert contents(disk, 100, 4) == bytes(4)
    statistics = served.call(served.server.statistics)
    assert (statistics.connections, statistics.writes) == (0, 1)
    assert served.call(lambda: served.server.pool.used) == 0


def test_disconnect_waits_for_what_is_in_flight(held: tuple[HeldVolume, Served]) -> None:
    volume, served = held
    connection = raw(served)
    connection.sendall(request(nbd.NBD_CMD_WRITE, 0, 1, 7) + b"x" + request(nbd.NBD_CMD_DISC, 0, 0))
    wait_until(lambda: len(volume.held) == 1, what="the batch")
    served.call(volume.let_go)
    assert receive(connection, 16) == struct.pack(">IIQ", nbd.NBD_SIMPLE_REPLY_MAGIC, 0, 7)
    assert connection.recv(1) == b""
    connection.close()


def test_half_closed_clients_still_get_their_replies(held: tuple[HeldVolume, Served]) -> None:
    volume, served = held
    connection = raw(served)
    connection.sendall(request(nbd.NBD_CMD_WRITE, 0, 1, 7) + b"x")
    connection.shutdown(socket.SHUT_WR)
    wait_until(lambda: len(volume.held) == 1, what="the batch")
    served.call(volume.let_go)
    assert len(receive(connection, 16)) == 16
    assert connection.recv(1) == b""
    connection.close()


# Bounds


def test_a_client_that_never_receives_is_not_read_any_more(served: Served) -> None:
    connection = raw(served)
    connection.settimeout(0.3)
    asked = 0
    burst = request(nbd.NBD_CMD_READ, 0, 256 * 1024) * 100
    with pytest.raises(TimeoutError):
        while True:
            connection.sendall(burst)
            asked += 100
            assert asked < 200_000
    statistics = served.call(served.server.statistics)
    assert statistics.bytes_read <= 8 * MIB
    with NbdClient(served.uri()) as other:
        assert other.read(0, 4096) == bytes(4096), "others are served meanwhile"
    connection.settimeout(20)
    receive(connection, 40 * (256 * 1024 + 16))
    connection.close()
    wait_until(lambda: served.call(served.server.statistics).connections == 0, what="the client's leave")


def test_replies_that_were_held_back_are_right_and_in_one_piece(served: Served, disk: FileDisk) -> None:
    """A slow reader: its reply buffer must not be reused for others before it took all of it."""
    data = os.urandom(8 * MIB)
    disk.write(0, data)
    slow = raw(served)
    slow.sendall(b"".join(request(nbd.NBD_CMD_READ, index * MIB, MIB, index) for index in range(8)))
    with NbdClient(served.uri()) as other:
        for index in range(200):
            assert other.read(40 * MIB + index, 100_000) == bytes(100_000)
    for index in range(8):
        reply = receive(slow, 16 + MIB)
        assert reply[:16] == struct.pack(">IIQ", nbd.NBD_SIMPLE_REPLY_MAGIC, 0, index)
        assert reply[16:] == data[index * MIB : (index + 1) * MIB]
    slow.close()


def test_a_pool_that_runs_out_makes_clients_wait(short_dir: Path, disk: FileDisk) -> None:
    volume = HeldVolume(disk)
    with serving(short_dir, volume) as served:
        served.call(lambda: setattr(served.server.pool, "_limit", 2))
        data = os.urandom(MIB)
        with NbdClient(served.uri()) as client:

            def push() -> None:
                client.write_many(((index * MIB, data) for index in range(20)), depth=20)

            pusher = threading.Thread(target=push)
            pusher.start()

            def stuck() -> bool:
                return served.call(lambda: served.server.pool.used) == 3 and len(volume.held) > 0

            wait_until(stuck, what="a pool in use")
            assert len(volume.held) < 20
            while pusher.is_alive():
                served.call(volume.let_go)
                pusher.join(0.001)
        assert all(contents(disk, index * MIB, MIB) == data for index in range(20))
        wait_until(lambda: served.call(lambda: served.server.pool.used) == 0, what="all buffers back")


def test_large_requests_share_a_few_large_buffers(short_dir: Path, disk: FileDisk) -> None:
    volume = HeldVolume(disk)
    with serving(short_dir, volume) as served:
        data = os.urandom(20 * MIB)
        with NbdClient(served.uri()) as client:
            pusher = threading.Thread(target=lambda: client.write_many(((i, data) for i in range(20)), depth=20))
            pusher.start()
            wait_until(lambda: len(volume.held) >= 8, what="eight large writes in flight")
            while pusher.is_alive():
                assert len(volume.held) <= 8
                served.call(volume.let_go)
                pusher.join(0.001)
        assert contents(disk, 19, len(data)) == data


def test_pause_and_resume(served: Served, plain: PlainVolume) -> None:
    plain.keep_batches = True
    with NbdClient(served.uri()) as client:
        client.write(0, b"x")
        served.call(served.server.pause_reading)
        client.submit_write(1, b"y")
        client.send()
        with NbdClient(served.uri()) as other:
            other.submit_write(2, b"z")
            other.send()
            assert list_exports(served.uri()) == ["disk"], "handshakes go on"
            assert len(plain.batches) == 1
            served.call(served.server.resume_reading)
            assert other.collect(1)[0].error is None
        assert client.collect(1)[0].error is None
    assert len(plain.batches) == 3


def test_a_volume_may_pause_from_within_submit(short_dir: Path, disk: FileDisk) -> None:
    servers: list[NbdServer] = []

    class Narrow(HeldVolume):
        def submit(self, work):  # type: ignore[no-untyped-def]
            super().submit(work)
            servers[0].pause_reading()

    volume = Narrow(disk)
    with serving(short_dir, volume) as served:
        servers.append(served.server)
        connection = raw(served)
        flush = request(nbd.NBD_CMD_FLUSH, 0, 0, 5)
        connection.sendall((request(nbd.NBD_CMD_WRITE, 0, 1) + b"x" + flush) * 3)
        for turn in range(3):
            # a write, and from the second turn on the flush behind it, which comes before the pause takes effect
            wait_until(lambda turn=turn: len(volume.held) == 2 if turn else volume.held, what="a batch")  # type: ignore[misc]
            served.call(volume.let_go)
            served.call(served.server.resume_reading)
        assert len(receive(connection, 6 * 16)) == 96
        connection.close()


# Disks that are slow or fail


@pytest.mark.parametrize("structured", [True, False])
def test_reads_that_would_block_go_to_threads(short_dir: Path, disk: FileDisk, structured: bool) -> None:
    gate = threading.Event()
    disk.write(0, b"a" * 4096 + b"b" * 4096)
    volume = PlainVolume(DelayDisk(disk, kinds=frozenset({"read"}), gate=gate))
    with serving(short_dir, volume) as served, NbdClient(served.uri(), structured=structured) as client:
        first, second = client.submit_read(0, 4096), client.submit_read(4096, 4096)
        client.submit_write(8192, b"c")
        (written,) = client.collect(1)
        assert written.offset == 8192, "writes do not wait for reads in threads"
        gate.set()
        found = {completion.cookie: bytes(completion.data or b"") for completion in client.collect(2)}
        assert found == {first: b"a" * 4096, second: b"b" * 4096}


def test_reads_in_threads_are_bounded(short_dir: Path, disk: FileDisk) -> None:
    gate = threading.Event()
    volume = PlainVolume(DelayDisk(disk, kinds=frozenset({"read"}), gate=gate))
    with serving(short_dir, volume) as served, NbdClient(served.uri()) as client:
        for index in range(60):
            client.submit_read(index * MIB, MIB)
            client.send()
        wait_until(lambda: served.call(served.server.statistics).reads >= 32, what="reads in threads")
        assert served.call(served.server.statistics).reads <= 35
        gate.set()
        assert len([None for completion in client.collect(60) if completion.data]) == 60


@pytest.mark.parametrize("kind", [nbd.NBD_CMD_READ, nbd.NBD_CMD_CACHE, nbd.NBD_CMD_FLUSH])
def test_small_requests_in_threads_are_bounded_by_their_number(
    short_dir: Path, disk: FileDisk, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    """28 bytes ask for each, and each costs a kilobyte while it waits for the disk."""
    monkeypatch.setattr(nbd_connection, "MAX_DEFERRED", 64 * nbd_connection.LEAST_DEFERRED)
    gate = threading.Event()
    volume = HeldVolume(DelayDisk(disk, kinds=frozenset({"read"}), gate=gate))
    length = 0 if kind == nbd.NBD_CMD_FLUSH else 1
    with serving(short_dir, volume) as served, raw(served) as connection:

        def taken() -> int:
            now = served.call(served.server.statistics)
            return now.reads + now.others + now.flushes

        try:
            for cookie in range(65):
                connection.sendall(request(kind, 0, length, cookie))
                wait_until(partial(lambda count: taken() == count, cookie + 1), what="requests with threads")
            connection.sendall(b"".join(request(kind, 0, length, cookie) for cookie in range(65, 200)))
            for _ in range(3):
                served.call(lambda: None)
            assert taken() == 65
        finally:
            gate.set()

        def all_taken() -> bool:
            served.call(volume.let_go)
            return taken() == 200

        wait_until(all_taken, what="the others")
        served.call(volume.let_go)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(("code", "seen"), [(errno.EIO, 5), (errno.ENOSPC, 28), (errno.EDQUOT, 28), (errno.EROFS, 1)])
def test_errors_of_the_disk_reach_the_request_that_they_belong_to(
    short_dir: Path, disk: FileDisk, structured: bool, code: int, seen: int
) -> None:
    bad = FaultDisk(
        disk,
        Fault(frozenset({"write", "read", "zero", "discard"}), code, start=4096, end=8192),
        Fault(frozenset({"flush", "extents"}), code),
    )
    with serving(short_dir, PlainVolume(bad)) as served, NbdClient(served.uri(), structured=structured) as client:
        for index in range(4):
            client.submit_write(index * 4096, b"x" * 4096)
            client.submit_read(index * 4096, 4096)
            client.submit_zero(index * 4096, 4096)
            client.submit_trim(index * 4096, 4096)
        for completion in client.collect(16):
            if completion.offset == 4096:
                assert completion.error is not None
                assert completion.error.errno == seen
            else:
                assert completion.error is None
        with pytest.raises(NbdClientError) as caught:
            client.flush()
        assert caught.value.errno == seen
        if structured:
            with pytest.raises(NbdClientError) as caught:
                client.block_status(0, 4096)
            assert caught.value.errno == seen
            assert "It says: " in str(caught.value)


def test_a_fast_zero_that_cannot_be(short_dir: Path, disk: FileDisk) -> None:
    bad = FaultDisk(disk, Fault(frozenset({"zero"}), errno.EOPNOTSUPP))
    with serving(short_dir, PlainVolume(bad)) as served, NbdClient(served.uri()) as client:
        with pytest.raises(NbdClientError) as caught:
            client.zero(0, 4096, fast=True)
        assert caught.value.errno == errno.ENOTSUP
        with pytest.raises(NbdClientError) as caught:
            client.zero(0, 4096)
        assert caught.value.errno == errno.EINVAL


def test_an_error_of_ours_is_an_input_output_error(short_dir: Path, disk: FileDisk) -> None:
    class Locked(PlainVolume):
        def __init__(self) -> None:
            super().__init__(disk)
            self.read_into = self.refuse

        def refuse(self, offset: int, view: memoryview) -> None:
            raise TandemDiskError("somebody holds the lock")

    with serving(short_dir, Locked()) as served, NbdClient(served.uri()) as client:
        with pytest.raises(NbdClientError) as caught:
            client.read(0, 4096)
        assert caught.value.errno == errno.EIO


def test_a_volume_that_takes_no_client(short_dir: Path, disk: FileDisk) -> None:
    class Closed(PlainVolume):
        def client_connected(self) -> None:
            raise TandemDiskError("not now")

        def client_gone(self) -> None:
            raise AssertionError("it never came")

    with serving(short_dir, Closed(disk)) as served:
        client = NbdClient(served.uri())
        with pytest.raises(NbdError):
            client.read(0, 1)
        client.close()


# Breaches


@pytest.mark.parametrize("junk", [b"\x12" * 28, b"\x25\x60\x95\x14" + bytes(24), bytes(range(256)) * 20])
def test_junk_ends_that_connection_only_and_the_reason_is_logged(
    served: Served, plain: PlainVolume, junk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with NbdClient(served.uri()) as other:
        connection = raw(served)
        with caplog.at_level(logging.WARNING):
            connection.sendall(request(nbd.NBD_CMD_WRITE, 0, 4) + b"kept" + junk)
            assert receive(connection, 16)[:8] == nbd.SIMPLE_OK
            with pytest.raises((AssertionError, ConnectionResetError)):
                receive(connection, 1)
        connection.close()
        assert "it broke the protocol: a request starts with" in caplog.text
        assert other.read(0, 4) == b"kept"
        wait_until(lambda: plain.clients == 1, what="the end of the one")


@pytest.mark.parametrize(
    "junk", [b"\xff" * 4, struct.pack(">I", 3) + b"GET / HTTP/1.1\r\n\r\n", bytes(range(100, 200))]
)
def test_junk_in_the_handshake(served: Served, junk: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(served.server.uris("disk")[0].partition("socket=")[2])
        assert len(receive(connection, 18)) == 18
        connection.sendall(junk)
        with pytest.raises((AssertionError, ConnectionResetError)):
            receive(connection, 1)
    assert "it broke the protocol" in caplog.text
    assert list_exports(served.uri()) == ["disk"]


def test_byte_by_byte(served: Served, disk: FileDisk) -> None:
    connection = raw(served)
    message = request(nbd.NBD_CMD_WRITE, 3, 40, 1) + b"y" * 40 + request(nbd.NBD_CMD_READ, 0, 50, 2)
    for place in range(len(message)):
        connection.send(message[place : place + 1])
    assert receive(connection, 16 + 16 + 50)[-50:] == bytes(3) + b"y" * 40 + bytes(7)
    connection.close()


def test_a_handshake_that_never_ends_is_ended(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_connection, "HANDSHAKE_TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(served.server.uris("disk")[0].partition("socket=")[2])
        assert len(receive(connection, 18)) == 18
        assert connection.recv(1) == b""


# Listening


def listen(*settings: ExportSettings, volume: PlainVolume) -> None:
    """Listen on all ``settings``, then close."""

    async def run() -> None:
        server = NbdServer([volume], default=volume.name)
        try:
            for setting in settings:
                await server.listen(setting)
        finally:
            await server.close()

    asyncio.run(run())


def test_the_socket_is_for_its_owner_only_and_goes_away(short_dir: Path, plain: PlainVolume) -> None:
    with serving(short_dir, plain) as served:
        path = short_dir / "nbd.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert served.uri("a b") == f"nbd+unix:///a%20b?socket={path}"
    assert not path.exists()


def test_a_stale_socket_is_replaced(short_dir: Path, plain: PlainVolume) -> None:
    path = short_dir / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    with serving(short_dir, plain) as served:
        assert list_exports(served.uri()) == ["disk"]


def test_a_socket_in_use_is_not(served: Served, short_dir: Path, plain: PlainVolume) -> None:
    path = short_dir / "nbd.sock"
    with pytest.raises(AddressInUse, match="Another process listens on"):
        listen(ExportSettings(unix=str(path)), volume=plain)
    assert list_exports(served.uri()) == ["disk"]
    (short_dir / "file").write_text("precious")
    with pytest.raises(AddressInUse, match="is not a socket"):
        listen(ExportSettings(unix=str(short_dir / "file")), volume=plain)
    assert (short_dir / "file").read_text() == "precious"


def test_a_port_in_use(short_dir: Path, plain: PlainVolume) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        both = ExportSettings(unix=str(short_dir / "x"), host="127.0.0.1", port=port)
        with pytest.raises(AddressInUse, match=f"Port {port} of 127.0.0.1 is taken"):
            listen(both, volume=plain)
    assert not (short_dir / "x").exists(), "nothing stays behind"


@pytest.mark.parametrize(
    "settings",
    [
        ExportSettings(),
        ExportSettings(unix="/nonexistent/directory/socket"),
        ExportSettings(unix="/tmp/" + "x" * 200),
        ExportSettings(host="192.0.2.1"),
        ExportSettings(host="no-such-host.invalid"),
        ExportSettings(host="an..empty.label"),
        ExportSettings(host="x" * 64),
        ExportSettings(host="a\0b"),
    ],
)
def test_addresses_that_cannot_be(settings: ExportSettings, plain: PlainVolume) -> None:
    with pytest.raises(ConfigError):
        listen(settings, volume=plain)


def test_close_answers_what_is_in_flight_and_cuts_what_never_ends(short_dir: Path, disk: FileDisk) -> None:
    async def run() -> None:
        volume = HeldVolume(disk)
        server = NbdServer([volume], default="disk")
        await server.listen(ExportSettings(unix=str(short_dir / "s")))
        client = await asyncio.to_thread(NbdClient, server.uris("disk")[0])
        client.submit_write(0, b"x")
        client.send()
        await asyncio.to_thread(wait_until, lambda: volume.held)
        closing = asyncio.create_task(server.close(20))
        await asyncio.to_thread(wait_until, lambda: not server._listeners)
        volume.let_go()
        await closing
        assert (await asyncio.to_thread(client.collect, 1))[0].error is None
        client.close()

        server = NbdServer([volume], default="disk")
        await server.listen(ExportSettings(unix=str(short_dir / "s")))
        client = await asyncio.to_thread(NbdClient, server.uris("disk")[0])
        client.submit_write(0, b"x")
        client.send()
        await asyncio.to_thread(wait_until, lambda: volume.held)
        await server.close(0.01)
        with pytest.raises(NbdError):
            await asyncio.to_thread(client.collect, 1)
        client.close()
        volume.let_go()
        assert volume.clients == 0
        assert server.pool.used == 0

    asyncio.run(run())
