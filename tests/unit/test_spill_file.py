"""The spill file on a device that fails: an error for whoever needs what is there, and for nobody else."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import secondary.spill
from common import limits
from common.disk import FileDisk
from common.errors import OperationFailed
from secondary.backup import BackupError
from secondary.commit import CommitJob, failover_checkpoint
from secondary.header import Failure, Stage
from secondary.view import VolumeView
from tests.heart import Rig, pattern

BLOCK = 4096
SLOTS = 8
SIZE = 64 * BLOCK


@pytest.fixture
def spilling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Old contents of blocks 0 to 23 are kept: those of the last 16 in the spill file."""
    monkeypatch.setattr(limits, "MIN_POOL", SLOTS * BLOCK)
    made = Rig(tmp_path, (SIZE,), buffer_bytes=2 * SLOTS * BLOCK, spill_bytes=SIZE)
    made.pair.begin_spill()
    made.stream(0, pattern(6 * BLOCK, 1))
    made.stream(6 * BLOCK, pattern(10 * BLOCK, 2))  # across the end of the pool
    made.stream(16 * BLOCK, pattern(8 * BLOCK, 3))
    assert made.pair.jobs[0].spilled_blocks == 16
    yield made
    made.close()


def view_of(rig: Rig) -> VolumeView:
    return VolumeView(rig.buffer.volumes[0], FileDisk(rig.paths[0], read_only=True, exclusive=False), overlay=False)


def cut_short(rig: Rig) -> str:
    """Where a mapping would meet its end with SIGBUS, as it does where a device cannot read."""
    path = str(rig.directory / "0.spill")
    os.truncate(path, BLOCK)
    return path


def test_what_is_kept_is_read_and_committed_wherever_it_lies(spilling: Rig) -> None:
    spilling.check()
    assert view_of(spilling).read(0, SIZE) == spilling.oracle.view
    assert view_of(spilling).read(7 * BLOCK + 100, 3 * BLOCK) == spilling.oracle.view[7 * BLOCK + 100 :][: 3 * BLOCK]
    spilling.reopen()
    assert view_of(spilling).read(0, SIZE) == spilling.oracle.view
    failover_checkpoint(spilling.pair)
    spilling.guest_write(12 * BLOCK + 100, b"x" * 50)  # a part of a block in the file: the rest is committed with it
    assert CommitJob(spilling.buffer, spilling.disks).run()
    assert Path(spilling.paths[0]).read_bytes() == spilling.oracle.view


def test_a_checkpoint_behind_a_restart_gives_the_space_back(spilling: Rig) -> None:
    """The process before this one was killed between the end of the resync and its checkpoint."""
    path = spilling.directory / "0.spill"
    spilling.reopen()
    assert view_of(spilling).read(0, SIZE) == spilling.oracle.view
    assert path.stat().st_blocks * 512 >= 16 * BLOCK
    try:
        spilling.pair.do_checkpoint_nowait(1, 1)
    except BlockingIOError:
        spilling.pair.do_checkpoint(1, 1)
    spilling.oracle.checkpoint()
    spilling.check()
    assert not path.stat().st_blocks


def test_what_cannot_be_read_is_an_error_for_its_reader_alone(spilling: Rig) -> None:
    path = cut_short(spilling)
    view = view_of(spilling)
    for broken in (9 * BLOCK, 23 * BLOCK):  # slot 8 is the first of the file, and still there
        with pytest.raises(OSError, match=f"the spill file {path} cannot be read: it has become shorter") as caught:
            view.read(broken, BLOCK)
        assert caught.value.errno == errno.EIO
    with pytest.raises(OSError):
        spilling.guest.write(20 * BLOCK + 1, b"part of a block")
    for whole in (0, 5 * BLOCK, 8 * BLOCK, 24 * BLOCK, 63 * BLOCK):
        assert view.read(whole, BLOCK) == spilling.oracle.view[whole : whole + BLOCK]
    error = spilling.buffer.header.get_error()
    assert error is not None
    assert error.case is Failure.BACKUP
    assert path in error.sentence
    # the next checkpoint puts it right
    spilling.checkpoint()
    spilling.stream(0, pattern(SLOTS * BLOCK, 4))
    spilling.check()


def test_a_commit_that_cannot_read_it_has_failed_and_may_go_on(spilling: Rig) -> None:
    kept = (spilling.directory / "0.spill").read_bytes()
    path = cut_short(spilling)
    failover_checkpoint(spilling.pair)
    with pytest.raises(OperationFailed, match=f"the spill file {path} cannot be read"):
        CommitJob(spilling.buffer, spilling.disks).run()
    assert spilling.buffer.header.stage is Stage.FAILOVER_FAILED
    Path(path).write_bytes(kept)
    assert CommitJob(spilling.buffer, spilling.disks).run()
    assert Path(spilling.paths[0]).read_bytes() == spilling.oracle.view


def test_a_write_that_fails_ends_the_room_for_more(spilling: Rig) -> None:
    job = spilling.pair.jobs[0]
    layer = spilling.buffer.volumes[0].hidden
    refusing = os.open(layer.spill_path, os.O_RDONLY)
    os.dup2(refusing, layer._spill)
    os.close(refusing)
    assert job.free_blocks > 0
    with pytest.raises(BackupError, match=r"disk0 cannot be copied: the spill file .* written"):
        spilling.stream(30 * BLOCK, pattern(BLOCK, 5))
    assert job.free_blocks == 0
    assert job.spill is not None
    assert "cannot be written" in job.spill.trouble
    spilling.check()
    spilling.checkpoint()
    assert job.free_blocks == SLOTS


def test_a_file_that_cannot_be_emptied_is_not_used_and_stops_nothing(
    spilling: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file system went bad: everything is in the secondary disk, or dropped, and that is what counts."""

    def refuse(*_args: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(secondary.spill, "fallocate", refuse)
    job = spilling.pair.jobs[0]
    spilling.checkpoint()
    spilling.check()
    assert job.spill is not None
    assert "cannot be emptied: Read-only file system" in job.spill.trouble
    spilling.pair.begin_spill()
    assert job.free_blocks == SLOTS  # no room is promised
    spilling.stream(0, pattern(SLOTS * BLOCK, 6))
    spilling.reopen()
    spilling.pair.begin_sync()
    monkeypatch.undo()
    spilling.checkpoint()
    job = spilling.pair.jobs[0]
    assert job.spill is not None
    assert not job.spill.trouble
    assert os.stat(spilling.directory / "0.spill").st_blocks == 0
