"""A disk buffer whose volume grows: what each process sees of it, whether it looks at the new size or not."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import secondary.buffer
from common.disk import FileDisk
from common.errors import NoSpaceError
from common.metadata import Metadata
from common.record import Record
from common.settings import ExportSettings, NodeSettings, ReplicationSettings
from secondary.attach import attach
from secondary.buffer import DiskBuffer
from secondary.growth import Growth
from secondary.replica import GuestVolume
from tests.heart import Rig, pattern, rig

OLD = 50 * 4096 + 1000  # the last block is short
NEW = 61 * 4096 + 7


def grow(made: Rig, beyond: bytes) -> None:
    """As the secondary does it: longer disks, then the buffer with nothing in flight."""
    with open(made.paths[0], "r+b") as file:
        file.seek(OLD)
        file.write(beyond)
    with made.pair.stopped(wait=True):
        made.disks[0].use(OLD + len(beyond))
        made.buffer.volumes[0].grow(made.disks[0])
    for kept in ("disk", "view"):
        setattr(made.oracle, kept, getattr(made.oracle, kept) + beyond)


@pytest.mark.parametrize("who", ["secondary", "guest"])
def test_a_short_last_block_is_completed_in_the_middle_of_an_epoch(tmp_path: Path, who: str) -> None:
    """The pools are full of another epoch's bytes; one end of the block is held, the other is new."""
    beyond = pattern(NEW - OLD, 9)
    with rig(tmp_path, [OLD]) as made:
        made.stream(0, pattern(OLD, 5))
        made.guest_write(0, pattern(OLD, 6))
        made.checkpoint()
        other = DiskBuffer.attach(made.settings.directory)  # as the export process has it
        disk = FileDisk(made.paths[0], exclusive=False)
        disk.use(OLD)
        export = GuestVolume(other.volumes[0], disk)
        if who == "secondary":
            made.stream(OLD - 10, b"x" * 10)
        else:
            export.write(OLD - 10, b"x" * 10)
            made.oracle.guest(OLD - 10, b"x" * 10)
        grow(made, beyond)
        export.write(OLD - 5, b"yyyyy")  # by a client that knows only the old size
        made.oracle.guest(OLD - 5, b"yyyyy")
        assert export.size == NEW
        made.check()
        assert export.read(0, NEW) == made.oracle.view
        made.stream(OLD - 3, b"z" * (NEW - OLD + 3))
        export.write(NEW - 9, b"the end..")
        made.oracle.guest(NEW - 9, b"the end..")
        made.check()
        assert export.read(OLD - 100, NEW - OLD + 100) == made.oracle.view[OLD - 100 :]
        made.checkpoint()
        made.check()
        other.close()
        disk.close()
        made.reopen()
        made.check()


def test_who_attached_before_sees_the_old_size_and_its_checkpoint(tmp_path: Path) -> None:
    with rig(tmp_path, [OLD]) as made, attach(made.settings.directory) as reader:
        before = made.oracle.view
        grow(made, pattern(NEW - OLD, 9))
        made.stream(OLD - 5000, b"s" * (NEW - OLD + 5000))
        view = reader.volumes["disk0"]
        assert view.size == OLD
        assert view.read(0, OLD) == before
        with pytest.raises(ValueError, match="outside a volume"):
            view.read(OLD, 1)
        image = tmp_path / "image"
        reader.snapshot({"disk0": str(image)})
        assert image.read_bytes() == before
        with attach(made.settings.directory) as late:
            assert late.volumes["disk0"].read(0, NEW) == made.oracle.view
        made.checkpoint()
        assert view.read(0, OLD) == before[:-5000] + b"s" * 5000


def test_a_crash_between_the_files_and_the_header_changes_nothing(tmp_path: Path) -> None:
    with rig(tmp_path, [OLD]) as made:
        made.guest_write(OLD - 10, b"x" * 10)
        made.buffer.volumes[0].allocate(NEW)
        made.reopen()
        assert made.buffer.volumes[0].size == OLD
        made.check()
        grow(made, bytes(NEW - OLD))
        made.reopen()
        assert made.buffer.volumes[0].size == NEW
        made.check()


@pytest.mark.parametrize("volume", [0, 1])
def test_a_file_that_cannot_be_mapped_ends_a_resize_before_it_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, volume: int
) -> None:
    """Too many maps or files of one process: what is noted, the header, and each process agree on the old size."""
    with rig(tmp_path, [OLD, OLD]) as made:
        for path in made.paths:
            os.truncate(path, NEW)
        metadata = Metadata("rig", "b", "secondary", (("disk0", OLD), ("disk1", OLD)))
        settings = NodeSettings("rig", "b", str(tmp_path), (), ExportSettings(), ReplicationSettings(), made.settings)
        record = Record(str(tmp_path / "metadata"), metadata)
        growth = Growth(settings, record, made.buffer, made.disks, made.pair)
        wanted = [OLD, OLD]
        wanted[volume] = NEW

        def fails(*_args: object) -> None:
            raise OSError(errno.ENOMEM, "too many maps")

        monkeypatch.setattr(secondary.buffer, "mmap", SimpleNamespace(mmap=fails))
        assert growth.resize(wanted, exact=True) == ((OLD, OLD), "side b could not grow its volumes: too many maps")
        monkeypatch.undo()
        assert record.value == metadata
        assert [geometry.size for geometry in made.buffer.header.volumes()] == [OLD, OLD]
        assert [disk.size for disk in made.disks] == [OLD, OLD]
        assert growth.resize(wanted, exact=True) == (tuple(wanted), "")
        assert [size for _, size in record.value.volumes] == wanted
        assert [geometry.size for geometry in made.buffer.header.volumes()] == wanted
        record.close()


def test_no_memory_for_the_map_is_said_and_changes_nothing(tmp_path: Path) -> None:
    with rig(tmp_path, [OLD]) as made:
        made.guest_write(0, b"x" * OLD)
        with pytest.raises(NoSpaceError, match=r"The disk buffer needs \d+ bytes"):
            made.buffer.volumes[0].allocate(1 << 62)
        made.check()
        assert os.path.getsize(made.buffer.volumes[0].hidden.path) < 1 << 20
