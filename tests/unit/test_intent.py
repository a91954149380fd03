"""The write-intent bitmap: what was marked is found after any crash; what is damaged counts as marked."""

from __future__ import annotations

import fcntl
import os
import random
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.bitmap import DirtyBitmap
from common.disk import FLOCK
from common.errors import DiskError
from common.intent import PAGE, IntentFile, marked_bytes
from tests.conftest import wait_until

SIZES = (1 << 20, 300_000)
REGION = 1024


def marked(intent: IntentFile) -> list[list[tuple[int, int]]]:
    bitmaps = [DirtyBitmap(size, 512) for size in SIZES]
    intent.add_to(bitmaps)
    return [list(bitmap.runs()) for bitmap in bitmaps]


def test_marks_survive_and_are_rounded_to_regions(tmp_path: Path) -> None:
    path = str(tmp_path / "intent")
    intent = IntentFile(path, SIZES, REGION)
    assert not intent.found
    assert not intent.covers(0, 0, 1)
    intent.set_ranges([(0, 1023, 2), (1, 299_999, 1)])
    assert intent.covers(0, 0, 2048)
    assert not intent.covers(0, 2047, 2)
    assert intent.covers(1, 299_500, 500)
    assert intent.synchronous_writes == 2
    intent.close()
    again = IntentFile(path, SIZES, REGION)
    assert again.found
    assert marked(again) == [[(0, 2048)], [(299_008, 992)]]
    assert os.stat(path).st_mode & 0o777 == 0o600
    again.close()


def test_cleared_lazily_but_never_what_is_dirty(tmp_path: Path) -> None:
    path = str(tmp_path / "intent")
    intent = IntentFile(path, SIZES, REGION)
    rng = random.Random(1)
    dirty = [DirtyBitmap(size, 512) for size in SIZES]
    for _ in range(300):
        volume = rng.randrange(2)
        offset = rng.randrange(SIZES[volume])
        length = rng.randint(1, min(5000, SIZES[volume] - offset))
        if not intent.covers(volume, offset, length):
            intent.set_ranges([(volume, offset, length)])
        dirty[volume].set_range(offset, length)
        if rng.random() < 0.1:
            for bitmap in dirty:
                bitmap.clear_range(rng.randrange(bitmap.size // 2), bitmap.size // 3)
            regions = intent.keep_only(dirty)
            assert regions == sum(len(r) for r in ({o // REGION for o, _ in bitmap.runs(512)} for bitmap in dirty))
        found = [DirtyBitmap(size, 512) for size in SIZES]
        other = IntentFile(path, SIZES, REGION)
        other.add_to(found)
        other.close()
        for mine, theirs in zip(dirty, found, strict=True):
            assert all(theirs.any_in(o, n) for o, n in mine.runs(512))
    intent.close()


def test_torn_pages_and_other_layouts_count_as_marked(tmp_path: Path) -> None:
    path = str(tmp_path / "intent")
    intent = IntentFile(path, SIZES, 16)  # several pages of bits
    intent.set_ranges([(0, 0, 1)])
    intent.close()
    data = bytearray(Path(path).read_bytes())
    assert len(data) > 3 * PAGE
    data[PAGE + 100] ^= 1
    Path(path).write_bytes(data)
    torn = IntentFile(path, SIZES, 16)
    assert torn.found
    assert torn.damaged_pages == 1
    assert torn.covers(0, 0, 4088 * 8 * 16)
    assert not torn.covers(1, 200_000, 1)
    torn.close()
    Path(path).write_bytes(bytes(data[: PAGE + 50]))
    cut = IntentFile(path, SIZES, 16)
    assert cut.covers(0, 0, SIZES[0])
    cut.close()
    other = IntentFile(path, (SIZES[0],), 16)
    assert not other.found
    assert other.covers(0, 0, SIZES[0]), "nothing is known: everything may have been written"
    other.close()


def test_growth_keeps_the_marks_and_marks_what_is_new(tmp_path: Path) -> None:
    path = str(tmp_path / "intent")
    intent = IntentFile(path, SIZES, REGION)
    intent.set_ranges([(0, 1023, 2), (1, 7, 1)])
    larger = (SIZES[0] + 5000, SIZES[1])
    intent.grow(larger)
    found = intent.ranges()
    assert found == [(0, 0, 2048), (0, SIZES[0], 5000), (1, 0, 1024)]
    intent.set_ranges([(1, 299_999, 1)])
    intent.close()
    again = IntentFile(path, larger, REGION)
    assert again.found
    assert again.ranges() == [*found, (1, 299_008, 992)]
    assert not Path(f"{path}.new").exists()
    again.close()
    # the metadata were replaced, and then the host went down: the file has yet to follow, or the other way round
    for sizes, at_least in (((larger[0], SIZES[1] + REGION), (1, SIZES[1], REGION)), (SIZES, (1, 299_999, 1))):
        late = IntentFile(path, sizes, REGION)
        assert late.found
        assert late.covers(*at_least)
        assert late.covers(0, 1023, 2)
        assert not late.covers(0, 2048, 1)
        late.close()
    with pytest.raises(DiskError, match="cannot be"):
        IntentFile(str(tmp_path / "gone" / "intent"), SIZES, REGION)


def test_every_flipped_bit_leads_to_too_much_never_too_little(tmp_path: Path) -> None:
    path = str(tmp_path / "intent")
    intent = IntentFile(path, SIZES, REGION)
    intent.set_ranges([(0, 5000, 3000), (1, 7, 7)])
    intent.close()
    good = Path(path).read_bytes()
    rng = random.Random(2)
    for index in [*range(60), *(rng.randrange(len(good)) for _ in range(300))]:
        data = bytearray(good)
        data[index] ^= 1 << rng.randrange(8)
        Path(path).write_bytes(data)
        found = IntentFile(path, SIZES, REGION)
        assert found.covers(0, 5000, 3000)
        assert found.covers(1, 7, 7)
        found.close()


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=str(tmp_path)):
        IntentFile(str(tmp_path), SIZES)
    intent = IntentFile(str(tmp_path / "intent"), SIZES)
    intent.close()
    with pytest.raises(DiskError, match="cannot be written"):
        intent.set_ranges([(0, 0, 1)])
    assert not intent.covers(0, 0, 1)


@contextmanager
def no_room_in_files() -> Iterator[None]:
    """No file may have a byte more than a page; the kernel says EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_be_made_whole_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "intent"
    with no_room_in_files(), pytest.raises(DiskError):
        IntentFile(str(path), SIZES, REGION, everything=True)
    assert not path.exists()
    again = IntentFile(str(path), SIZES, REGION, everything=True)
    assert not again.found
    assert marked(again) == [[(0, 1 << 20)], [(0, 300_000)]]
    again.close()


def test_a_file_that_was_never_written_says_nothing_of_what_was_not(tmp_path: Path) -> None:
    path = tmp_path / "intent"
    path.touch()  # as the loss of power leaves it
    file = IntentFile(str(path), SIZES, REGION, everything=True)
    assert marked(file) == [[(0, 1 << 20)], [(0, 300_000)]]
    file.close()


def test_a_file_of_another_layout_is_kept_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "intent"
    IntentFile(str(path), SIZES, REGION).close()
    before = path.read_bytes()
    with no_room_in_files(), pytest.raises(DiskError):
        IntentFile(str(path), SIZES, 2 * REGION)
    assert path.read_bytes() == before


def test_growing_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "intent"
    file = IntentFile(str(path), SIZES, REGION)
    file.set_ranges([(0, 0, 1)])
    before = marked(file)
    with no_room_in_files(), pytest.raises(DiskError):
        file.grow((1 << 21, 300_000))
    assert marked(file) == before
    file.close()


@pytest.mark.parametrize("layout", ["grown", "another"])
def test_who_only_looks_leaves_the_file_to_the_process_that_has_it_open(tmp_path: Path, layout: str) -> None:
    """A resize has the new sizes in the metadata before they are in this file, and any command may look then."""
    path = str(tmp_path / "intent")
    owner = IntentFile(path, SIZES, REGION)
    owner.set_ranges([(0, 0, 1)])
    before = os.stat(path)
    sizes = (SIZES[0] + 3 * REGION, SIZES[1]) if layout == "grown" else (*SIZES, 4096)
    seen = IntentFile(path, sizes, REGION, everything=True, read_only=True)
    everything = [(volume, 0, size) for volume, size in enumerate(sizes)]
    assert seen.ranges() == ([(0, 0, REGION), (0, SIZES[0], 3 * REGION)] if layout == "grown" else everything)
    seen.close()
    assert os.stat(path).st_ino == before.st_ino, "the owner marks in a file that nobody will find"
    owner.set_ranges([(1, 0, 1)])
    owner.close()
    found = IntentFile(path, SIZES, REGION)
    assert marked(found) == [[(0, REGION)], [(0, REGION)]]
    found.close()


def test_who_only_looks_does_not_end_the_lock_of_who_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of the same process looks: a lock of the process' would end there, and another process would mark in
    the same page meanwhile. What it wrote, or what this one writes, would be lost."""
    path = str(tmp_path / "intent")
    file = IntentFile(path, SIZES, shared=True)
    refused: list[bool] = []

    def look_and_write(pages: dict[int, bytearray], *, durable: bool) -> None:
        marked_bytes(path, SIZES)
        other = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.fcntl(other, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except BlockingIOError:
            refused.append(True)
        os.close(other)
        real(pages, durable=durable)

    real = file._write
    monkeypatch.setattr(file, "_write", look_and_write)
    file.set_ranges([(0, 0, 1)])
    assert refused == [True]
    assert file.covers(0, 0, 1)
    monkeypatch.undo()
    other = IntentFile(path, SIZES, shared=True)
    other.set_ranges([(1, 0, 1)])  # the lock is free again
    other.close()
    file.close()
    assert marked_bytes(path, SIZES) == sum(SIZES)


def test_a_page_that_another_process_is_writing_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export process opens the file for its guest's first write, as the commit marks in it. It would believe that
    all is marked, and mark nothing more."""
    path = str(tmp_path / "intent")
    writer = IntentFile(path, SIZES, 16, shared=True)
    opened: list[IntentFile] = []
    waits = threading.Event()
    opener = threading.Thread(target=lambda: opened.append(IntentFile(path, SIZES, 16, shared=True)))
    pwrite, lock = os.pwrite, fcntl.fcntl

    def lock_seen(fd: int, command: int, argument: bytes) -> bytes | int:
        if threading.current_thread() is opener:
            waits.set()
        return lock(fd, command, argument)

    def in_two_halves(fd: int, data: bytes, offset: int) -> int:
        pwrite(fd, data[: PAGE // 2], offset)
        opener.start()
        wait_until(lambda: waits.is_set() or not opener.is_alive(), what="the other process to open the file")
        return PAGE // 2 + pwrite(fd, data[PAGE // 2 :], offset + PAGE // 2)

    monkeypatch.setattr(fcntl, "fcntl", lock_seen)
    monkeypatch.setattr(os, "pwrite", in_two_halves)
    writer.set_ranges([(0, 0, 1), (0, 400_000, 1)])  # in both halves of a page
    monkeypatch.undo()
    opener.join(10)
    (other,) = opened
    assert not other.damaged_pages
    assert other.covers(0, 400_000, 1)
    assert not other.covers(0, 100_000, 1), "what is written there would not be marked"
    other.close()
    writer.close()


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("shared", [False, True])
def test_a_mark_that_a_killed_process_left_in_the_page_cache_survives_a_loss_of_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """The next process finds it and need not mark: what it writes there would be known to nobody."""
    path = tmp_path / "intent"
    first = IntentFile(str(path), SIZES, REGION, shared=shared)
    durable = path.read_bytes()

    def killed(fd: int) -> None:
        raise Killed

    def sync(fd: int) -> None:
        nonlocal durable
        durable = path.read_bytes()

    monkeypatch.setattr(os, "fdatasync", killed)
    with pytest.raises(Killed):
        first.set_ranges([(0, 0, 1)])
    first.close()
    monkeypatch.setattr(os, "fdatasync", sync)
    second = IntentFile(str(path), SIZES, REGION, shared=shared)
    if not second.covers(0, 0, 1):
        second.set_ranges([(0, 0, 1)])
    second.close()
    monkeypatch.undo()
    path.write_bytes(durable)
    third = IntentFile(str(path), SIZES, REGION)
    assert third.covers(0, 0, 1)
    third.close()
