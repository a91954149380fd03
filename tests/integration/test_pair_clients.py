"""The clients that people use, on both exports of a running pair in ``mode = sync``; both disks compared by cmp(1).

What a client writes to the primary's export is on both disks when it ends. What it writes to the guest's export is in
the active disk only: the disks do not change, and the next checkpoint drops it.
"""

from __future__ import annotations

import errno
import hashlib
import random
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import TandemDiskError
from common.nbd_client import NbdClient, NbdClientError
from deploy.pair import Pair, PairOptions
from tests import nbd_tools, pairs
from tests.pairs import MIB

SIZE = 16 * MIB + 1536
"""No multiple of a block of 4 KiB: the last bytes are where clients, servers and blocks disagree."""


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two volumes, the primary's export on TCP too. Tests share it: each writes what it checks."""
    options = PairOptions(size=SIZE, volumes=2, buffer_bytes=72 * MIB, listen=("127.0.0.1", 0), mode="sync")
    with tempfile.TemporaryDirectory(prefix="td-", dir="/tmp") as directory:
        with pairs.running(Path(directory) / "p", options) as made:
            yield made


@pytest.fixture(params=["primary", "guest"])
def uri(request: pytest.FixtureRequest, pair: Pair) -> Iterator[str]:
    """An export of the first volume; afterwards what has to hold for the disks behind it is checked."""
    if request.param == "primary":
        yield pairs.primary_uri(pair)
        pairs.compare_disks(pair)
        return
    pair.checkpoint()
    before = digest(pairs.secondary_disk(pair))
    yield pairs.guest_uri(pair)
    assert digest(pairs.secondary_disk(pair)) == before, "a guest's writes stay in the active disk"
    pairs.compare_disks(pair)
    assert pair.status()["buffer"]["hidden_bytes"] == 0
    pair.checkpoint()
    seen = hashlib.sha256(pairs.contents(pairs.guest_uri(pair))).digest()
    assert seen == before, "a checkpoint drops a guest's writes"


def digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def source(path: Path, seed: int, size: int = SIZE) -> Path:
    """A sparse file: random data, written zeroes and holes in turn."""
    chance = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for start in range(0, size, 2 * MIB):
            length = min(chance.randrange(1, MIB), size - start)
            file.seek(start)
            file.write(chance.randbytes(length) if start % (8 * MIB) else bytes(length))
        file.seek(size - 1)
        file.write(b"\x5a")
    return path


def test_nbdinfo(uri: str) -> None:
    export = nbd_tools.nbdinfo(uri)
    assert export["export-size"] == SIZE
    assert export["contexts"] == ["base:allocation"]
    assert not export["is_read_only"]
    for ability in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{ability}"], ability
    assert export["block_size_minimum"] == 1
    assert nbd_tools.nbdinfo_list(uri) == ["disk0", "disk1"]


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_both_directions(uri: str, tmp_path: Path, connections: int) -> None:
    original = source(tmp_path / "source", seed=connections)
    nbd_tools.nbdcopy(original, uri, connections=connections)
    nbd_tools.nbdcopy(uri, tmp_path / "target", connections=connections)
    assert (tmp_path / "target").read_bytes() == original.read_bytes()


def test_qemu_img(uri: str, tmp_path: Path) -> None:
    original = source(tmp_path / "source", seed=7)
    nbd_tools.qemu_img_convert(original, uri)
    nbd_tools.qemu_img_compare(original, uri)
    nbd_tools.qemu_img_convert(uri, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == original.read_bytes()
    told = nbd_tools.qemu_img_map(uri)
    assert sum(extent["length"] for extent in told) == SIZE
    data = original.read_bytes()
    for extent in told:
        if extent["zero"]:
            start = extent["start"]
            assert not any(data[start : start + extent["length"]]), extent
    with NbdClient(uri) as client:
        client.write(SIZE - 1, bytes([data[-1] ^ 1]))
    with pytest.raises(nbd_tools.ClientFailed, match="mismatch"):
        nbd_tools.qemu_img_compare(original, uri)


def test_qemu_img_bench(uri: str) -> None:
    nbd_tools.qemu_img_bench(uri, count=1000, write=True)
    nbd_tools.qemu_img_bench(uri, count=1000, write=False)


def test_qemu_io_patterns(uri: str) -> None:
    nbd_tools.qemu_io(
        uri,
        "write -P 0x11 0 1M", "write -P 0x22 1000 3000", "write -f -P 0x33 1M 64k", "write -z 512k 256k",
        "write -z -u 768k 64k", "write -P 0x55 2M 1M", "write -z 2M 1M", "flush",
        "aio_write -P 0x44 4M 2M", "aio_flush", f"write -P 0x66 {SIZE - 700} 700",
        "read -P 0x11 0 1000", "read -P 0x22 1000 3000", "read -P 0x33 1M 64k", "read -P 0 512k 320k",
        "read -P 0x11 832k 192k", "read -P 0 2M 1M", "read -P 0x44 4M 2M", f"read -P 0x66 {SIZE - 700} 700",
    )  # fmt: skip
    nbd_tools.qemu_io(uri, "read -P 0x12 0 4k", fails=True)


def test_qemu_io_reads_only(uri: str) -> None:
    """A client that opens the export for reading only."""
    with NbdClient(uri) as client:
        client.write(8192, b"\x77" * 8192)
    nbd_tools.qemu_io(uri, "read -P 0x77 8k 8k", read_only=True)
    nbd_tools.qemu_io(uri, "read -P 0x78 8k 8k", read_only=True, fails=True)


@pytest.mark.parametrize("block", ["4k", "3k"])
def test_fio_verifies(uri: str, tmp_path: Path, block: str) -> None:
    nbd_tools.fio_verify(uri, size=8 * MIB, depth=32, block=block, pattern="randwrite", directory=tmp_path)


@pytest.mark.local_hosts
def test_tcp_export_and_unix_export_are_one_disk(pair: Pair, tmp_path: Path) -> None:
    uris = pair.client("primary").call("status")["volumes"][0]["uris"]
    assert [uri.split(":")[0] for uri in uris] == ["nbd+unix", "nbd"]
    original = source(tmp_path / "source", seed=9)
    nbd_tools.nbdcopy(original, uris[1], connections=3)
    nbd_tools.qemu_img_compare(original, uris[0])
    pairs.compare_disks(pair)


def test_volumes_are_disks_of_their_own_and_one_checkpoint_covers_them(pair: Pair) -> None:
    images = [pairs.random_bytes(volume, SIZE) for volume in (0, 1)]
    for volume, image in enumerate(images):
        with NbdClient(pairs.primary_uri(pair, volume)) as client:
            pairs.write_all(client, image)
    taken = pair.checkpoint()
    half = SIZE // 2  # more would fill the buffer to the point where a checkpoint is taken by itself
    later = [pairs.random_bytes(10 + volume, half) + image[half:] for volume, image in enumerate(images)]
    for volume, image in enumerate(later):
        with NbdClient(pairs.primary_uri(pair, volume)) as client:
            pairs.write_all(client, image[:half])
    assert pair.status()["checkpoint"] == taken.number
    for volume in (0, 1):
        assert pairs.contents(pairs.guest_uri(pair, volume)) == images[volume], "a checkpoint is what the guest sees"
    pair.checkpoint()
    for volume in (0, 1):
        assert pairs.contents(pairs.guest_uri(pair, volume)) == later[volume]
    pairs.compare_disks(pair)


def test_overlapping_writes_in_flight_end_up_the_same_on_both_disks(pair: Pair) -> None:
    """Four connections write, zero and trim the same 256 KiB, at a depth of 64 each."""
    uri = pairs.primary_uri(pair)
    failures: list[BaseException] = []

    def hammer(seed: int) -> None:
        chance = random.Random(seed)
        try:
            with NbdClient(uri) as client:
                for _ in range(1500):
                    offset = chance.randrange(256 * 1024)
                    length = chance.choice((1, 511, 4096, 9000))
                    what = chance.random()
                    if what < 0.8:
                        client.submit_write(offset, chance.randbytes(length), fua=what < 0.01)
                    elif what < 0.9:
                        client.submit_zero(offset, length, no_hole=what < 0.85)
                    else:
                        client.submit_trim(offset, length)
                    if client.in_flight >= 64:
                        failures.extend(done.error for done in client.collect(32) if done.error)
                failures.extend(done.error for done in client.collect(client.in_flight) if done.error)
        except TandemDiskError as error:
            failures.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    pairs.compare_disks(pair)


def test_an_export_that_may_only_be_read(short_dir: Path) -> None:
    """By the configuration of one side and one volume: clients get EPERM, and nothing reaches a disk."""
    pair = Pair.create(short_dir / "p", PairOptions(size=4 * MIB, volumes=2, buffer_bytes=72 * MIB))
    for role, name in (("primary", "disk1"), ("secondary", "disk0")):
        config = pair.directory.path / f"{role}.toml"
        text = config.read_text()
        config.write_text(text.replace(f'name = "{name}"', f'name = "{name}"\nread_only = true'))
    with pair:
        pair.up()
        pair.wait_protected()
        first, second = pair.status()["volumes"]
        for uri, reads_only in ((first["primary_uri"], False), (second["primary_uri"], True),
                                (first["secondary_uri"], True), (second["secondary_uri"], False)):
            assert nbd_tools.nbdinfo(uri)["is_read_only"] == reads_only
            with NbdClient(uri) as client:
                if not reads_only:
                    client.write(4096, b"data")
                    continue
                cookies = [client.submit_write(0, b"x"), client.submit_zero(0, 512), client.submit_trim(0, 512)]
                errors = {done.cookie: done.error for done in client.collect(3)}
                for cookie in cookies:
                    error = errors[cookie]
                    assert isinstance(error, NbdClientError)
                    assert error.errno == errno.EPERM
                assert client.read(0, 4) == bytes(4)
        pairs.compare_disks(pair)


def test_a_disk_of_any_number_of_bytes(short_dir: Path, tmp_path: Path) -> None:
    """Not even a multiple of a sector; the two sides differ at first."""
    size = 3 * MIB + 777
    original = pairs.random_bytes(3, size)
    (short_dir / "a.raw").write_bytes(pairs.random_bytes(1, size))
    (short_dir / "b.raw").write_bytes(pairs.random_bytes(2, size))
    options = PairOptions(primary_disks=(short_dir / "a.raw",), secondary_disks=(short_dir / "b.raw",))
    with pairs.running(short_dir / "p", options) as pair:
        pairs.compare_disks(pair)
        uri = pairs.primary_uri(pair)
        (tmp_path / "source").write_bytes(original)
        nbd_tools.nbdcopy(tmp_path / "source", uri)
        pairs.compare_disks(pair)
        assert pairs.primary_disk(pair).read_bytes() == original
        assert nbd_tools.nbdinfo(pairs.guest_uri(pair))["export-size"] == size
        pair.checkpoint()
        with NbdClient(uri) as client:
            client.write(size - 3, b"end")
        nbd_tools.nbdcopy(pairs.guest_uri(pair), tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == original
        pairs.compare_disks(pair)
