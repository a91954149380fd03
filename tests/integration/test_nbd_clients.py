"""The real NBD clients against our export of a plain file: every byte compared with the file behind it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.disk import FileDisk
from tests import nbd_tools
from tests.serving import Served, serving
from tests.volumes import PlainVolume

MIB = 1 << 20
SIZE = 24 * MIB + 1536
"""Not a multiple of a block: the last bytes are where clients and servers disagree."""


@pytest.fixture
def image(shm_dir: Path) -> Path:
    """The file behind the export, all holes."""
    path = shm_dir / "disk.raw"
    path.touch()
    os.truncate(path, SIZE)
    return path


@pytest.fixture
def served(short_dir: Path, image: Path) -> Iterator[Served]:
    """The export of ``image`` on a Unix socket and on TCP."""
    disk = FileDisk(str(image), exclusive=False)
    with serving(short_dir, PlainVolume(disk), tcp=True) as running:
        yield running
    disk.close()


def sparse_file(path: Path, seed: int = 1) -> bytes:
    """Write a file of SIZE bytes: random data, zeroes written out and holes in turn; its contents."""
    rng = random.Random(seed)
    contents = bytearray(SIZE)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for start in range(0, SIZE, 3 * MIB):
            length = min(rng.randrange(1, 2 * MIB), SIZE - start)
            contents[start : start + length] = rng.randbytes(length)
            file.seek(start)
            file.write(contents[start : start + length])
    return bytes(contents)


def test_nbdinfo(served: Served) -> None:
    export = nbd_tools.nbdinfo(served.uri())
    assert export["export-size"] == SIZE
    assert export["contexts"] == ["base:allocation"]
    assert not export["is_read_only"]
    for ability in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{ability}"], ability
    assert export["block_size_minimum"] == 1
    assert export["block_size_maximum"] == 32 * MIB
    assert nbd_tools.nbdinfo_list(served.uri()) == ["disk"]
    assert nbd_tools.nbdinfo_map(served.uri()) == [(0, SIZE, 3)]


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_there_and_back(served: Served, image: Path, shm_dir: Path, connections: int) -> None:
    contents = sparse_file(shm_dir / "source")
    nbd_tools.nbdcopy(shm_dir / "source", served.uri(), connections=connections)
    assert image.read_bytes() == contents
    nbd_tools.nbdcopy(served.uri(), shm_dir / "target", connections=connections)
    assert (shm_dir / "target").read_bytes() == contents
    assert (shm_dir / "target").stat().st_blocks * 512 < SIZE, "holes stay holes"


def test_nbdcopy_over_tcp(served: Served, image: Path, shm_dir: Path) -> None:
    contents = sparse_file(shm_dir / "source", seed=2)
    uri = served.call(lambda: served.server.uris("disk"))[1]
    nbd_tools.nbdcopy(shm_dir / "source", uri)
    assert image.read_bytes() == contents


def test_qemu_img(served: Served, image: Path, shm_dir: Path) -> None:
    source = shm_dir / "source"
    contents = sparse_file(source, seed=3)
    uri = served.uri()
    nbd_tools.qemu_img_convert(source, uri)
    assert image.read_bytes() == contents
    nbd_tools.qemu_img_compare(source, uri)
    nbd_tools.qemu_img_convert(uri, shm_dir / "target")
    assert (shm_dir / "target").read_bytes() == contents
    told = [(extent["start"], extent["length"], extent["data"]) for extent in nbd_tools.qemu_img_map(uri)]
    real = [(extent["start"], extent["length"], extent["data"]) for extent in nbd_tools.qemu_img_map(image)]
    assert told == real
    with image.open("r+b") as file:
        file.seek(SIZE - 1)
        file.write(bytes([contents[-1] ^ 1]))
    with pytest.raises(nbd_tools.ClientFailed, match="mismatch"):
        nbd_tools.qemu_img_compare(source, uri)


def test_qemu_img_bench(served: Served) -> None:
    nbd_tools.qemu_img_bench(served.uri(), write=True)
    nbd_tools.qemu_img_bench(served.uri(), write=False)


def test_qemu_io_patterns(served: Served, image: Path) -> None:
    nbd_tools.qemu_io(
        served.uri(),
        "write -P 0x11 0 1M", "write -P 0x22 1000 3000", "write -f -P 0x33 1M 64k", "write -z 512k 256k",
        "write -z -u 768k 64k", "discard 2M 1M", "flush", "aio_write -P 0x44 4M 2M", "aio_flush",
        "read -P 0x11 0 1000", "read -P 0x22 1000 3000", "read -P 0x33 1M 64k", "read -P 0 512k 320k",
        "read -P 0x11 832k 192k", "read -P 0 2M 1M", "read -P 0x44 4M 2M", f"read -P 0 {SIZE - 513} 513",
    )  # fmt: skip
    contents = image.read_bytes()
    assert contents[1000:4000] == b"\x22" * 3000
    assert contents[MIB : MIB + 65536] == b"\x33" * 65536
    nbd_tools.qemu_io(served.uri(), "read -P 0x12 0 4k", fails=True)


def test_read_only_export(short_dir: Path, image: Path) -> None:
    disk = FileDisk(str(image), read_only=True)
    with serving(short_dir, PlainVolume(disk)) as running:
        assert nbd_tools.nbdinfo(running.uri())["is_read_only"]
        nbd_tools.qemu_io(running.uri(), "read -P 0 0 1M", read_only=True)
        nbd_tools.libnbd_python(
            running.uri(),
            "h.set_strict_mode(0)\n"
            "for call in (lambda: h.pwrite(bytes(512), 0), lambda: h.trim(512, 0), lambda: h.zero(512, 0)):\n"
            "    try: call()\n"
            "    except nbd.Error as error: assert error.errnum == errno.EPERM, error\n"
            "    else: raise SystemExit('a read-only export was written to')\n",
        )
    disk.close()


@pytest.mark.parametrize(("block", "pattern"), [("4k", "randwrite"), ("64k", "write"), ("3k", "randrw")])
def test_fio_verifies(served: Served, tmp_path: Path, block: str, pattern: str) -> None:
    nbd_tools.fio_verify(served.uri(), size=12 * MIB, depth=32, block=block, pattern=pattern, directory=tmp_path)


def test_libnbd_asks_for_everything_it_knows(served: Served) -> None:
    """Errors that a well-behaved client never provokes: libnbd's own checks are off."""
    nbd_tools.libnbd_python(
        served.uri(),
        f"""
size = {SIZE}
def fails(number, call, *args):
    try: call(*args)
    except nbd.Error as error: assert error.errnum == number, (call, args, error)
    else: raise SystemExit(f'{{call}}{{args}} succeeded')
assert h.get_size() == size and h.get_structured_replies_negotiated()
h.set_strict_mode(0)
h.pwrite(b'abc' * 1000, 77, nbd.CMD_FLAG_FUA)
assert h.pread(3000, 77) == b'abc' * 1000
assert h.pread(3000, 77, nbd.CMD_FLAG_DF) == b'abc' * 1000
h.cache(1000000, 5); h.cache(size, 0); h.flush(); h.trim(4096, 4096, nbd.CMD_FLAG_FUA)
h.zero(100, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
fails(errno.ENOSPC, h.pwrite, bytes(2), size - 1)
fails(errno.ENOSPC, h.zero, 2, size - 1)
fails(errno.EINVAL, h.pread, 2, size - 1)
fails(errno.EINVAL, h.trim, 2, size - 1)
fails(errno.EINVAL, h.cache, 2, size - 1)
fails(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_REQ_ONE)
found = []
h.block_status(size, 0, lambda name, offset, entries, error: found.append((name, offset, list(entries))))
h.block_status(1000, 5000, lambda name, offset, entries, error: found.append(list(entries)), nbd.CMD_FLAG_REQ_ONE)
assert found[0][0] == 'base:allocation' and sum(found[0][2][::2]) == size, found
assert len(found[1]) == 2 and 0 < found[1][0] <= 1000, found
""",
    )


def test_libnbd_without_structured_replies(served: Served) -> None:
    nbd_tools.require_libnbd_python()
    nbd_tools.run(
        [
            nbd_tools.SYSTEM_PYTHON,
            "-c",
            "import nbd\nh = nbd.NBD(); h.set_request_structured_replies(False); h.set_opt_mode(True)\n"
            f"h.connect_uri({served.uri()!r}); h.opt_go()\n"
            "assert not h.get_structured_replies_negotiated() and not h.can_df()\n"
            "h.pwrite(b'x' * 70000, 123); assert h.pread(70000, 123) == b'x' * 70000\nh.shutdown()\n",
        ]
    )
