"""The backup job: what is copied, what fails and how, checkpoints."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common import limits
from common.disk import CountingDisk, DelayDisk, Disk, Fault, FaultDisk, FileDisk
from common.errors import DiskError, NoSpaceError, TandemDiskError, TimedOut
from secondary.backup import BackupJob, PairBackup
from secondary.buffer import SMALL
from secondary.header import Failure, Stage
from tests.conftest import wait_until
from tests.heart import Rig, pattern, rig, u64

BLOCK = 4096


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path / "rig", (1 << 20, (1 << 18) + 700)) as made:
        yield made


def layered(pair: Rig, disk: Disk) -> BackupJob:
    """The backup job of the first volume with a layer on its disk."""
    return BackupJob(pair.buffer.volumes[0], disk)


def test_old_contents_are_kept_and_never_overwritten(pair: Rig) -> None:
    before = bytes(pair.oracle.view)
    for seed in range(5):
        pair.stream(100, pattern(10000, seed))
        assert pair.read(0, 20000) == before[:20000]
    assert pair.pair.jobs[0].used_blocks == 3
    assert pair.pair.jobs[0].free_blocks == 256  # a slot for each block: nothing can be asked for that is not there
    pair.check()


def test_slots_that_a_crash_leaked_are_missed_until_the_next_checkpoint(pair: Rig) -> None:
    layer = pair.buffer.volumes[0].hidden
    layer.store_used(pair.buffer.header.epoch, 5)  # as if a process had died between the pointer and the copies
    job = layered(pair, pair.pair.jobs[0].disk)
    assert job.free_blocks == 256 - 5
    pair.pair.do_checkpoint(1, 1)
    assert job.free_blocks == 256


def test_the_short_last_block(pair: Rig) -> None:
    size = len(pair.oracles[1].view)
    pair.stream(size - 1, b"x", 1)
    pair.guest_write(size - 3, b"yz", 1)
    pair.check()
    pair.checkpoint()
    pair.check()


@pytest.mark.parametrize("count", [0, 1, SMALL, SMALL + 1, 200])
@pytest.mark.parametrize("most", [1, BLOCK, 3 * BLOCK])
def test_small_and_large_batches_find_the_same_blocks(pair: Rig, count: int, most: int) -> None:
    random_ = random.Random(count)
    held: set[int] = set()
    job = pair.pair.jobs[0]
    for _ in range(3):
        lengths = [random_.randint(1, most) for _ in range(count)]
        offsets = [random_.randrange((1 << 20) - length + 1) for length in lengths]
        touched = {
            block
            for offset, length in zip(offsets, lengths, strict=True)
            for block in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1)
        }
        assert job.do_cow(u64(*offsets), u64(*lengths)) == len(touched - held)
        held |= touched
    assert set(job.buffer.hidden.held(1)[0].tolist()) == held
    pair.disks[0].write(0, bytes(1 << 20))
    got = pair.read(0, 1 << 20)
    for block in held:
        assert got[block * BLOCK : (block + 1) * BLOCK] == pair.oracle.view[block * BLOCK : (block + 1) * BLOCK]


def test_strided_fields_of_a_structured_array_are_taken_as_they_are(pair: Rig) -> None:
    extents = np.zeros(3, dtype=[("offset", "<u8"), ("length", "<u4")])
    extents["offset"] = [0, 9000, 50]
    extents["length"] = [1, 5000, 12]
    job = pair.pair.jobs[0]
    assert job.do_cow_nowait(extents["offset"], extents["length"].astype(np.uint64)) == 3


def test_runs_are_one_read(pair: Rig) -> None:
    disk = CountingDisk(pair.disks[0])
    job = layered(pair, disk)
    job.do_cow(u64(0, 4 * BLOCK, 5 * BLOCK, 100 * BLOCK), u64(4 * BLOCK, BLOCK, BLOCK, 1))
    assert disk.calls["read"] == 2
    assert job.do_cow(u64(0), u64(6 * BLOCK)) == 0
    assert disk.calls["read"] == 2


def test_a_full_hidden_disk_is_an_error_that_changed_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MIN_POOL", 4 * BLOCK)
    made = Rig(tmp_path, (1 << 20,), buffer_bytes=8 * BLOCK)
    made.stream(0, pattern(3 * BLOCK, 1))
    with pytest.raises(NoSpaceError, match="disk0 has 1 blocks free, 2 are needed"):
        made.pair.jobs[0].do_cow(u64(0, 10 * BLOCK), u64(BLOCK, 2 * BLOCK))
    made.stream(2 * BLOCK, pattern(2 * BLOCK, 2))
    assert made.pair.jobs[0].free_blocks == 0
    made.check()
    made.checkpoint()
    made.stream(10 * BLOCK, pattern(2 * BLOCK, 3))
    made.check()
    made.close()


def test_case_3_the_backup_job_cannot_read_and_goes_on_when_it_can_again(pair: Rig) -> None:
    disk = FaultDisk(pair.disks[0], Fault(frozenset({"read"}), errno.EIO, start=8 * BLOCK, end=9 * BLOCK))
    job = layered(pair, disk)
    with pytest.raises(OSError) as caught:
        job.do_cow(u64(0, 8 * BLOCK), u64(BLOCK, BLOCK))
    assert caught.value.errno == errno.EIO
    error = pair.buffer.header.get_error()
    assert error is not None
    assert error.case is Failure.BACKUP
    assert "disk0" in error.sentence
    assert job.used_blocks == 0
    disk.heal()
    assert job.do_cow(u64(0, 8 * BLOCK), u64(BLOCK, BLOCK)) == 2
    pair.check()


def test_a_disk_that_was_cut_short_is_a_failure_not_zeroes(tmp_path: Path) -> None:
    made = Rig(tmp_path)
    os.truncate(made.paths[0], 1 << 19)
    for batch in (made.pair.jobs[0].do_cow, made.pair.jobs[0].do_cow_nowait):
        with pytest.raises(OSError):
            batch(u64((1 << 20) - BLOCK), u64(BLOCK))
    assert made.pair.jobs[0].used_blocks == 0
    made.close()


def test_nowait_does_nothing_where_it_would_wait(pair: Rig) -> None:
    job = pair.pair.jobs[0]
    request = pair.buffer.volumes[0].requests.cow_request_begin(BLOCK, 2 * BLOCK, shared=True)
    with pytest.raises(BlockingIOError):
        job.do_cow_nowait(u64(0), u64(2 * BLOCK))
    assert job.used_blocks == 0
    assert job.do_cow_nowait(u64(2 * BLOCK), u64(BLOCK)) == 1
    with pytest.raises(BlockingIOError):
        pair.pair.do_checkpoint_nowait(1, 1)
    assert pair.buffer.header.epoch == 1
    request.end()
    assert job.do_cow_nowait(u64(0), u64(2 * BLOCK)) == 2
    pair.pair.do_checkpoint_nowait(1, 1)
    assert pair.buffer.header.epoch == 2


def test_nowait_does_not_wait_for_the_device_either(pair: Rig) -> None:
    gate = threading.Event()
    job = layered(pair, DelayDisk(pair.disks[0], gate=gate))
    with pytest.raises(BlockingIOError):
        job.do_cow_nowait(u64(0), u64(BLOCK))
    assert job.used_blocks == 0
    thread = threading.Thread(target=job.do_cow, args=(u64(0), u64(BLOCK)))
    thread.start()
    wait_until(job._mutex.locked, what="the copy to start")
    with pytest.raises(BlockingIOError):
        job.do_cow_nowait(u64(5 * BLOCK), u64(BLOCK))
    gate.set()
    thread.join(10)
    assert job.used_blocks == 1


def test_a_copy_waits_for_a_reader_of_its_blocks(pair: Rig) -> None:
    job = pair.pair.jobs[0]
    request = pair.buffer.volumes[0].requests.cow_request_begin(0, BLOCK, shared=True)
    thread = threading.Thread(target=job.do_cow, args=(u64(0), u64(BLOCK)))
    thread.start()
    assert job.used_blocks == 0
    request.end()
    thread.join(10)
    assert job.used_blocks == 1


def test_a_checkpoint_covers_all_volumes_at_once(pair: Rig) -> None:
    pair.stream(0, pattern(5000, 1), 0)
    pair.stream(0, pattern(5000, 2), 1)
    pair.guest_write(3000, pattern(5000, 3), 1)
    pair.check()
    assert pair.buffer.guest_has_written
    pair.checkpoint()
    assert not pair.buffer.guest_has_written
    pair.check()
    checkpoint = pair.buffer.header.checkpoint
    assert (checkpoint.number, checkpoint.sequence) == (1, 10)


def test_case_6_a_checkpoint_that_cannot_be_made_says_who_is_in_the_way(pair: Rig) -> None:
    pair.stream(0, pattern(5000, 1))
    with pair.buffer.volumes[1].requests.cow_request_begin(0, 1, shared=True), pytest.raises(TimedOut):
        pair.pair.do_checkpoint(1, 1, timeout_s=0.1)
    error = pair.buffer.header.get_error()
    assert error is not None
    assert error.case is Failure.EMPTYING
    assert str(os.getpid()) in error.sentence
    pair.check()
    pair.checkpoint()
    pair.check()


def test_during_a_synchronisation_nothing_is_copied_and_nothing_shown(pair: Rig) -> None:
    pair.stream(0, pattern(5000, 1))
    pair.pair.begin_sync()
    assert pair.buffer.header.syncing
    assert pair.pair.jobs[0].do_cow(u64(0), u64(1 << 20)) == 0
    with pytest.raises(OSError) as caught:
        pair.read(0, 10)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError):
        pair.guest.write(0, b"x")
    pair.checkpoint()
    assert not pair.buffer.header.syncing
    pair.check()


def test_errors_before_start(tmp_path: Path) -> None:
    """QEMU's test-replication: reads, writes and checkpoints of a secondary that was not started fail."""
    made = Rig(tmp_path, start=False)
    with pytest.raises(TandemDiskError, match="stage NONE"):
        made.pair.jobs[0].do_cow(u64(0), u64(1))
    with pytest.raises(TandemDiskError, match="stage NONE"):
        made.pair.do_checkpoint(1, 1)
    for attempt in (lambda: made.read(0, 1), lambda: made.guest.write(0, b"x")):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EIO
    made.buffer.start(syncing=False)
    assert made.buffer.header.stage is Stage.RUNNING
    made.check()
    made.close()


def test_a_disk_of_another_size_is_refused(pair: Rig, tmp_path: Path) -> None:
    (tmp_path / "other.raw").write_bytes(bytes(BLOCK))
    disk = FileDisk(str(tmp_path / "other.raw"))
    with pytest.raises(DiskError, match="has 1048576 bytes, its secondary disk 4096"):
        PairBackup(pair.buffer, [disk, disk])
    disk.close()


def test_the_seed_s_example(pair: Rig) -> None:
    """xxx_co_readv of the commit message, in this interface."""
    job, view = pair.pair.jobs[0], bytearray(100)
    job.wait_for_overlapping_requests(0, 100)
    request = job.cow_request_begin(0, 100)
    job.read_no_serialising(0, memoryview(view))
    job.cow_request_end(request)
    assert view == pair.oracle.disk[:100]
