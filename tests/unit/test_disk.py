"""Disks and their layers: against real files, and a loop device where root allows it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.disk import (
    BLKZEROOUT,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    HOLE,
    ZERO,
    CountingDisk,
    DelayDisk,
    Disk,
    Fault,
    FaultDisk,
    FileDisk,
)
from common.errors import DiskError

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def read(disk: Disk, offset: int, length: int) -> bytes:
    contents = bytearray(length)
    disk.read_into(offset, memoryview(contents))
    return bytes(contents)


def test_reads_what_was_written_at_any_offset(image: Path) -> None:
    disk = FileDisk(str(image))
    disk.write(12345, b"hello")
    disk.flush()
    assert read(disk, 12344, 7) == bytes([12344 % 256]) + b"hello" + bytes([12350 % 256])
    contents = bytearray(100)
    disk.read_nowait(SIZE - 100, memoryview(contents))
    assert contents == image.read_bytes()[-100:]
    assert (disk.size, disk.read_only) == (SIZE, False)
    disk.close()
    disk.close()


def test_a_file_that_was_truncated_meanwhile_is_an_io_error_not_zeroes(image: Path) -> None:
    disk = FileDisk(str(image))
    os.truncate(image, SIZE // 2)
    with pytest.raises(OSError) as caught:
        read(disk, SIZE // 2 - 10, 20)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError) as caught:
        disk.read_nowait(SIZE - 10, memoryview(bytearray(10)))
    assert caught.value.errno in (errno.EIO, errno.EAGAIN)
    disk.close()


@pytest.mark.parametrize("may_unmap", [True, False])
@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (5, 10), (4000, 9000), (SIZE - 3, 3), (7, 0)])
def test_zero_zeroes_exactly_the_range(image: Path, offset: int, length: int, may_unmap: bool) -> None:
    expected = bytearray(image.read_bytes())
    expected[offset : offset + length] = bytes(length)
    disk = FileDisk(str(image))
    disk.zero(offset, length, may_unmap=may_unmap)
    disk.close()
    assert image.read_bytes() == expected


def test_zero_on_a_file_system_without_zero_range_writes_or_says_so(tmp_path: Path) -> None:
    """tmpfs punches holes but has no ZERO_RANGE."""
    path = Path("/dev/shm") / f"tandemdisk-test-{os.getpid()}"
    path.write_bytes(b"x" * 8192)
    try:
        disk = FileDisk(str(path))
        disk.zero(1, 4096, may_unmap=False)
        assert path.read_bytes() == b"x" + bytes(4096) + b"x" * 4095
        with pytest.raises(OSError) as caught:
            disk.zero(0, 100, may_unmap=False, fast=True)
        assert caught.value.errno == errno.EOPNOTSUPP
        disk.zero(0, 8192, may_unmap=True, fast=True)
        assert path.read_bytes() == bytes(8192)
        disk.close()
    finally:
        path.unlink()


@pytest.mark.parametrize("may_unmap", [True, False])
def test_a_fast_zero_of_a_device_never_writes(image: Path, monkeypatch: pytest.MonkeyPatch, may_unmap: bool) -> None:
    """BLKZEROOUT writes zeroes where the device has no command for them, and nobody hears of it (blkdev_fallocate)."""
    asked: list[tuple[str, int]] = []

    def told(_fd: int, what: int, *_more: object) -> None:
        asked.append(("ioctl", what))

    def refused(_fd: int, mode: int, _offset: int, _length: int) -> None:
        asked.append(("fallocate", mode))
        raise OSError(errno.EOPNOTSUPP, "no command for it")

    monkeypatch.setattr("common.disk.fcntl.ioctl", told)
    monkeypatch.setattr("common.disk.fallocate", refused)
    disk = FileDisk(str(image))
    disk._device = True
    with pytest.raises(OSError) as caught:
        disk.zero(0, 4096, may_unmap=may_unmap, fast=True)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert asked == [("fallocate", FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)] * may_unmap
    asked.clear()
    disk.zero(0, 4096, may_unmap=may_unmap)
    assert asked == [("ioctl", BLKZEROOUT)]
    disk.close()


def test_extents_tell_holes_from_data(tmp_path: Path) -> None:
    path = tmp_path / "sparse.raw"
    with open(path, "wb") as file:
        file.truncate(SIZE)
        file.seek(SIZE // 4)
        file.write(b"x" * (SIZE // 4))
    disk = FileDisk(str(path))
    assert disk.extents(0, SIZE) == [(SIZE // 4, HOLE | ZERO), (SIZE // 4, 0), (SIZE // 2, HOLE | ZERO)]
    assert disk.extents(SIZE // 4 - 10, 20) == [(10, HOLE | ZERO), (10, 0)]
    assert disk.extents(SIZE - 5, 5) == [(5, HOLE | ZERO)]
    disk.discard(SIZE // 4, SIZE // 4)
    assert disk.extents(0, SIZE) == [(SIZE, HOLE | ZERO)]
    disk.close()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "neither a file nor a block device"),
        (lambda path: (path.write_bytes(b"x"), path.chmod(0o444)), "cannot be opened for this use"),
    ],
)
def test_a_disk_that_cannot_be_used_says_why(tmp_path: Path, make: object, words: str) -> None:
    path = tmp_path / "disk.raw"
    assert callable(make)
    make(path)
    with pytest.raises(DiskError, match=words) as caught:
        FileDisk(str(path))
    assert str(path) in str(caught.value)


def test_exclusive_use_is_against_other_processes_and_other_opens(image: Path) -> None:
    disk = FileDisk(str(image))
    with pytest.raises(DiskError, match="in use by another process"):
        FileDisk(str(image))
    with pytest.raises(DiskError, match="in use"):
        FileDisk(str(image), read_only=True)
    code = f"from common.disk import FileDisk\nFileDisk({str(image)!r})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "in use by another process" in other.stderr
    FileDisk(str(image), exclusive=False).close()
    disk.close()
    FileDisk(str(image)).close()


def test_readers_share(image: Path) -> None:
    first, second = FileDisk(str(image), read_only=True), FileDisk(str(image), read_only=True)
    with pytest.raises(DiskError, match="in use"):
        FileDisk(str(image))
    with pytest.raises(OSError) as caught:
        first.write(0, b"x")
    assert caught.value.errno == errno.EBADF
    first.close()
    second.close()


def test_layers_stack_and_count(image: Path) -> None:
    counting = CountingDisk(FileDisk(str(image)))
    top = CountingDisk(counting)
    top.write(0, b"12345")
    assert read(top, 0, 5) == b"12345"
    top.zero(0, 4)
    top.discard(0, 4096)
    top.flush()
    assert (top.size, top.read_only, top.fileno()) == (SIZE, False, -1)
    assert top.preferred_block == counting.inner.preferred_block
    assert top.extents(0, 10)
    assert counting.calls == {"write": 1, "read": 1, "zero": 1, "discard": 1, "flush": 1, "extents": 1}
    assert counting.bytes["write"] == 5
    top.close()


def test_a_fault_hits_the_calls_that_it_describes(image: Path) -> None:
    disk = FaultDisk(
        FileDisk(str(image)),
        Fault(frozenset({"write"}), errno.ENOSPC, first=2, count=2, start=1000, end=2000),
    )
    disk.write(0, b"x" * 1000)  # ends where the fault starts
    disk.write(999, b"xx")  # the first that counts
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            disk.write(1999, b"x")
        assert caught.value.errno == errno.ENOSPC
    disk.write(1500, b"x")
    disk.fail(Fault(frozenset({"flush", "read"})))
    with pytest.raises(OSError) as caught:
        disk.flush()
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError):
        disk.read_nowait(0, memoryview(bytearray(1)))
    disk.heal()
    disk.flush()
    disk.close()


def test_a_delayed_disk_lets_nobody_by_before_the_gate_opens(image: Path) -> None:
    gate = threading.Event()
    disk = DelayDisk(FileDisk(str(image)), gate=gate)
    with pytest.raises(BlockingIOError):
        disk.read_nowait(0, memoryview(bytearray(1)))
    done: list[bytes] = []
    thread = threading.Thread(target=lambda: done.append(read(disk, 0, 2)))
    thread.start()
    assert not done
    gate.set()
    thread.join(10)
    assert done == [b"\x00\x01"]
    disk.close()


def test_a_disk_that_was_grown_is_used_when_that_is_said(image: Path) -> None:
    disk = FileDisk(str(image))
    before = disk.size
    os.truncate(image, before + 8192)
    assert (disk.size, disk.capacity()) == (before, before + 8192)
    disk.use(before + 4096)
    disk.write(before, b"x" * 4096)
    assert disk.size == before + 4096
    with pytest.raises(DiskError, match=f"has {before + 8192} bytes, and {before + 8193} are needed"):
        disk.use(before + 8193)
    assert disk.size == before + 4096
    disk.close()
