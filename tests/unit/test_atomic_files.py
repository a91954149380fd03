"""The small files of a side are the old one or the new one, whatever call fails and whenever the host goes down.

``Tape`` stands in for ``os`` in the module under test: it does the real thing, and writes down what a loss of power
could make of it. A file system is taken at its word and no further: contents are stable when the file was synced, and
names when their directory was. Until then each write is there, or not, or torn, and of the changes of a directory the
first ones are.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import common.intent
import common.metadata
from common.errors import DiskError
from common.generation import extend
from common.intent import IntentFile
from common.metadata import load, save
from tests.unit.test_metadata import SAMPLE

REGION = 4096
COUNTED = ("open", "write", "pwrite", "fsync", "fdatasync", "replace", "unlink")


@dataclass
class Inode:
    stable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def images(self) -> Iterator[bytes]:
        """What a loss of power may leave of the contents."""
        for parts in itertools.product((0.0, 0.5, 1.0), repeat=len(self.pending)):
            image = bytearray(self.stable)
            for part, (at, whole) in zip(parts, self.pending, strict=True):
                data = whole[: int(part * len(whole))]
                if data:
                    image.extend(bytes(max(0, at + len(data) - len(image))))
                    image[at : at + len(data)] = data
            yield bytes(image)


class Tape:
    """See the module. ``fail_at``: number of the call that fails, from 1; with ``sticky`` all later ones do, too."""

    def __init__(self, path: str, code: int = errno.EIO) -> None:
        self.file = path
        self.code = code
        self.fail_at, self.sticky, self.calls = 0, False, 0
        self.after_each: Callable[[], None] = lambda: None
        self._now: dict[str, Inode] = {}
        self._stable: dict[str, Inode] = {}
        self._changes: list[tuple[str, Inode | None]] = []
        self._files: dict[int, Inode | None] = {}
        self._ends: dict[int, int] = {}
        if os.path.exists(path):
            self._now[path] = self._stable[path] = Inode(Path(path).read_bytes())

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in COUNTED:
            return real

        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at or (self.sticky and 0 < self.fail_at < self.calls):
                raise OSError(self.code, os.strerror(self.code))
            result = real(*args, **options)
            getattr(self, f"_{name}")(result, *args)
            self.after_each()
            return result

        return call

    # What the calls do

    def _change(self, name: str, inode: Inode | None) -> None:
        self._changes.append((name, inode))
        if inode is None:
            self._now.pop(name, None)
        else:
            self._now[name] = inode

    def _open(self, descriptor: int, path: str, flags: int, _mode: int = 0) -> None:
        if flags & os.O_DIRECTORY:
            self._files[descriptor] = None
            return
        if path not in self._now:
            self._change(path, Inode())
        inode = self._files[descriptor] = self._now[path]
        if flags & os.O_TRUNC:
            inode.stable, inode.pending = b"", []  # nobody reads the temporary file
        self._ends[descriptor] = 0

    def _write(self, count: int, descriptor: int, data: Any) -> None:
        self._pwrite(count, descriptor, data, self._ends[descriptor])
        self._ends[descriptor] += count

    def _pwrite(self, count: int, descriptor: int, data: Any, offset: int) -> None:
        inode = self._files[descriptor]
        assert inode is not None
        inode.pending.append((offset, bytes(data)[:count]))

    def _fsync(self, _result: None, descriptor: int) -> None:
        inode = self._files[descriptor]
        if inode is None:
            self._stable, self._changes = dict(self._now), []
        else:
            inode.stable, inode.pending = Path(f"/proc/self/fd/{descriptor}").read_bytes(), []

    _fdatasync = _fsync

    def _replace(self, _result: None, source: str, target: str) -> None:
        self._change(target, self._now[source])
        self._change(source, None)

    def _unlink(self, _result: None, path: str) -> None:
        self._change(path, None)

    # What is left of it

    def left(self) -> set[bytes | None]:
        """The contents of the file after a loss of power now, each that may be; None: it is not there."""
        found: set[bytes | None] = set()
        for count in range(len(self._changes) + 1):
            inode = self._stable.get(self.file)
            for name, changed in self._changes[:count]:
                if name == self.file:
                    inode = changed
            found |= {None} if inode is None else set(inode.images())
        return found


def metadata_tape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tape:
    save(str(tmp_path / "metadata"), SAMPLE)
    tape = Tape(str(tmp_path / "metadata"))
    monkeypatch.setattr(common.metadata, "os", tape)
    return tape


NEW = replace(SAMPLE, history=extend(SAMPLE.history, 99, "a"), clean=False)


def test_metadata_are_the_old_or_the_new_ones_after_each_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tape = metadata_tape(tmp_path, monkeypatch)
    old, new = common.metadata.serialise(SAMPLE), common.metadata.serialise(NEW)
    seen: list[set[bytes | None]] = []
    tape.after_each = lambda: seen.append(tape.left())
    save(tape.file, NEW)
    assert len(seen) == 6  # open, write, fsync, replace, and the directory's open and fsync
    assert all(states <= {old, new} for states in seen)
    assert {old, new} in seen
    assert tape.left() == {new}, "saved, and a crash could undo it"


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_any_call_of_a_save_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sticky: bool, code: int) -> None:
    tape = metadata_tape(tmp_path, monkeypatch)
    tape.code = code
    old, new = common.metadata.serialise(SAMPLE), common.metadata.serialise(NEW)
    for number in range(1, 20):
        tape.fail_at, tape.sticky, tape.calls = 0, False, 0
        save(tape.file, SAMPLE)
        tape.fail_at, tape.sticky, tape.calls = number, sticky, 0
        failed = False
        try:
            save(tape.file, NEW)
        except DiskError:
            failed = True
        assert load(tape.file) in (SAMPLE, NEW)
        assert tape.left() <= {old, new}
        if not failed:
            assert tape.left() == {new}
            assert number == 7, "a call that failed was passed over"
            return
        tape.fail_at = 0
        save(tape.file, NEW)
        assert tape.left() == {new}, "saved behind a failure, and a crash could undo it"
    raise AssertionError("no end")


# The write-intent file

OLD_SIZES, NEW_SIZES = (3 * REGION, 2 * REGION), (5 * REGION, 2 * REGION)
MARK = (1, REGION, 10)


@pytest.fixture
def intents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tape:
    """A file with one bit set, on stable storage."""
    file = IntentFile(str(tmp_path / "intent"), OLD_SIZES, REGION)
    file.set_ranges([MARK])
    file.close()
    tape = Tape(str(tmp_path / "intent"))
    monkeypatch.setattr(common.intent, "os", tape)
    return tape


def read(tape: Tape, image: bytes | None, sizes: tuple[int, ...], scratch: Path) -> list[tuple[int, int, int]]:
    """What a file with these contents says to whoever has volumes of these sizes."""
    assert image is not None, "the file is gone"
    scratch.write_bytes(image)
    armed, tape.fail_at = tape.fail_at, 0
    file = IntentFile(str(scratch), sizes, REGION, read_only=True)
    tape.fail_at = armed
    assert file.found or file.ranges() == [(index, 0, size) for index, size in enumerate(sizes)]
    ranges = file.ranges()
    file.close()
    return ranges


def covers(ranges: list[tuple[int, int, int]], wanted: tuple[int, int, int]) -> bool:
    volume, offset, length = wanted
    return any(index == volume and at <= offset and offset + length <= at + size for index, at, size in ranges)


def test_a_larger_intent_file_is_the_old_or_the_new_one_after_each_call(intents: Tape, tmp_path: Path) -> None:
    file = IntentFile(intents.file, OLD_SIZES, REGION)
    states: set[bytes | None] = set()
    intents.after_each = lambda: states.update(intents.left())
    before = Path(intents.file).read_bytes()
    file.grow(NEW_SIZES)
    after = Path(intents.file).read_bytes()
    assert states == {before, after}
    assert intents.left() == {after}
    grown = [(0, 3 * REGION, 2 * REGION), (1, REGION, REGION)]
    for image in states:
        assert read(intents, image, NEW_SIZES, tmp_path / "scratch") == grown


def test_a_bit_is_there_when_it_is_said_to_be_whatever_failed_before(intents: Tape, tmp_path: Path) -> None:
    """Growing fails at each of its calls; a mark behind that is found in each file that a crash may leave, for the old
    sizes and for the new ones."""
    for sticky, number in itertools.product((False, True), range(1, 12)):
        intents.unlink(intents.file)
        intents.fail_at, intents.sticky = 0, False
        start = IntentFile(intents.file, OLD_SIZES, REGION)
        start.set_ranges([MARK])
        intents.calls, intents.fail_at, intents.sticky = 0, number, sticky
        with suppress(DiskError):
            start.grow(NEW_SIZES)
        intents.fail_at = 0
        start.set_ranges([(0, 0, 1)])
        for image in intents.left():
            for sizes in (OLD_SIZES, NEW_SIZES):
                ranges = read(intents, image, sizes, tmp_path / "scratch")
                assert covers(ranges, MARK), (sticky, number, sizes, ranges)
                assert covers(ranges, (0, 0, 1)), (sticky, number, sizes, ranges)
        start.close()


def test_a_bit_that_could_not_be_made_durable_does_not_count(intents: Tape, tmp_path: Path) -> None:
    file = IntentFile(intents.file, OLD_SIZES, REGION)
    for number in (1, 2):  # pwrite, fdatasync
        intents.calls, intents.fail_at = 0, number
        with pytest.raises(DiskError, match="cannot be written"):
            file.set_ranges([(0, 0, 1)])
        intents.fail_at = 0
        assert not file.covers(0, 0, 1)
        assert all(covers(read(intents, image, OLD_SIZES, tmp_path / "scratch"), MARK) for image in intents.left())
    file.set_ranges([(0, 0, 1)])
    assert file.covers(0, 0, 1)
    for image in intents.left():
        assert covers(read(intents, image, OLD_SIZES, tmp_path / "scratch"), (0, 0, 1))


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from then on"])
def test_a_file_that_could_not_be_made_was_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sticky: bool
) -> None:
    """Else the next one to look would find that nothing was written."""
    for number in range(1, 20):
        path = str(tmp_path / f"intent-{number}")
        tape = Tape(path)
        monkeypatch.setattr(common.intent, "os", tape)
        tape.fail_at, tape.sticky = number, sticky
        try:
            IntentFile(path, OLD_SIZES, REGION).close()
        except DiskError:
            tape.fail_at = 0
            if sticky and os.path.exists(path):
                continue  # it could not be removed either
            again = IntentFile(path, OLD_SIZES, REGION)
            assert not again.found, f"call {number} failed, and the file is said to have been there"
            again.close()
        else:
            assert number == 9  # behind eight calls
            return
    raise AssertionError("no end")
