"""Failover to both targets, and the commit: resumed, refused by the disk, raced by the guest."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import secondary.commit
import secondary.replica
from common.batch import ZERO
from common.disk import Bytes, CountingDisk, Disk, DiskLayer, Fault, FaultDisk
from common.errors import NeedsForce, OperationFailed, TandemDiskError
from secondary.buffer import Layer
from secondary.commit import RUN_BYTES, CommitJob, failover_checkpoint, failover_latest, held_extents
from secondary.header import Failure, Stage
from tests.heart import Rig, pattern, rig, u64

BLOCK = 4096
SIZES = (1 << 21, (1 << 19) + 700)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Rig]:
    """After a checkpoint, with old contents and guest writes on both volumes, some in the same blocks."""
    with rig(tmp_path / "rig", SIZES) as made:
        made.stream(0, pattern(50_000, 1))
        made.checkpoint()
        random_ = random.Random(1)
        for volume, size in enumerate(SIZES):
            for seed in range(60):
                offset, length = random_.randrange(size - 20_000), random_.randrange(1, 20_000)
                made.stream(offset, pattern(length, seed), volume)
                offset = random_.randrange(size - 20_000)
                made.guest_write(offset, pattern(length // 3 + 1, seed + 100), volume)
            made.stream(size - 1, b"t", volume)
        yield made


def committed(pair: Rig) -> None:
    """The disks hold what the guest saw, and the guest still sees it."""
    assert pair.buffer.header.stage is Stage.DONE
    for index, oracle in enumerate(pair.oracles):
        assert Path(pair.paths[index]).read_bytes() == oracle.view
        assert pair.read(0, len(oracle.view), index) == oracle.view


def test_the_checkpoint_becomes_the_disk(pair: Rig) -> None:
    failover_checkpoint(pair.pair)
    failover_checkpoint(pair.pair)
    for index, oracle in enumerate(pair.oracles):
        assert pair.read(0, len(oracle.view), index) == oracle.view
    seen: list[tuple[int, int]] = []
    job = CommitJob(pair.buffer, pair.disks, progress=lambda done, total: seen.append((done, total)))
    assert job.run()
    committed(pair)
    assert seen[-1][0] == seen[-1][1] == job.statistics[1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert job.run()


def test_the_end_of_a_commit_is_noted_when_all_is_on_the_disks_and_before_the_stage_says_so(pair: Rig) -> None:
    failover_checkpoint(pair.pair)
    noted: list[Stage] = []

    def complete() -> None:
        noted.append(pair.buffer.header.stage)
        for index, oracle in enumerate(pair.oracles):
            assert Path(pair.paths[index]).read_bytes() == oracle.view
        if len(noted) == 1:
            raise OSError(errno.ENOSPC, "no space for the metadata")

    job = CommitJob(pair.buffer, pair.disks, complete=complete)
    with pytest.raises(OperationFailed, match="no space for the metadata"):
        job.run()
    assert pair.buffer.header.stage is Stage.FAILOVER_FAILED
    assert job.run()
    assert noted == [Stage.FAILOVER] * 2
    committed(pair)


class Forgetful(DiskLayer):
    """Its first flush fails, and everything since it was made is gone: what the kernel does with what it cannot
    write."""

    def __init__(self, lower: Disk, path: str) -> None:
        super().__init__(lower)
        self._path = path
        self._stable: bytes | None = Path(path).read_bytes()

    def flush(self) -> None:
        if self._stable is None:
            super().flush()
            return
        with open(self._path, "r+b") as file:
            file.write(self._stable)
        self._stable = None
        raise OSError(errno.EIO, "lost")


def test_a_flush_that_fails_loses_nothing_beside_a_partial_write_of_the_guest(pair: Rig) -> None:
    failover_checkpoint(pair.pair)
    disks: list[Disk] = [Forgetful(disk, path) for disk, path in zip(pair.disks, pair.paths, strict=True)]
    for volume, data in enumerate((b"guest", b"guests")):
        offset, _ = next(held_extents(pair.buffer.volumes[volume]))
        pair.guest_write(offset + 100, data, volume)
        pair.guests[volume].operate(ZERO, offset + 200, 50)
        pair.oracles[volume].guest(offset + 200, bytes(50))
    job = CommitJob(pair.buffer, disks)
    for _ in disks:
        with pytest.raises(OperationFailed, match="lost"):
            job.run()
    assert job.run()
    committed(pair)


def test_what_a_commit_writes_is_known_before(pair: Rig) -> None:
    failover_checkpoint(pair.pair)
    announced = [list(held_extents(volume)) for volume in pair.buffer.volumes]
    hooked: list[tuple[int, int, int]] = []
    CommitJob(pair.buffer, pair.disks, on_write=lambda *extent: hooked.append(extent)).run()
    for index, oracle in enumerate(pair.oracles):
        covered, told = bytearray(len(oracle.view)), bytearray(len(oracle.view))
        for offset, length in announced[index]:
            covered[offset : offset + length] = b"1" * length
        for volume, offset, length in hooked:
            if volume == index:
                told[offset : offset + length] = b"1" * length
        assert covered == told


def test_latest_keeps_the_disk_and_drops_the_buffer(pair: Rig) -> None:
    with pytest.raises(NeedsForce, match="guest has written"):
        failover_latest(pair.pair)
    assert pair.buffer.header.stage is Stage.RUNNING
    for index, oracle in enumerate(pair.oracles):
        assert pair.read(0, len(oracle.view), index) == oracle.view
    failover_latest(pair.pair, force=True)
    failover_latest(pair.pair)
    for oracle in pair.oracles:
        oracle.checkpoint()
    pair.check()
    committed(pair)
    assert pair.buffer.header.checkpoint.number == 1


def test_targets_exclude_each_other(pair: Rig) -> None:
    failover_checkpoint(pair.pair)
    with pytest.raises(OperationFailed, match="begun already"):
        failover_latest(pair.pair, force=True)
    with pytest.raises(TandemDiskError, match="stage FAILOVER"):
        pair.pair.jobs[0].do_cow(u64(0), u64(1))
    with pytest.raises(TandemDiskError, match="stage FAILOVER"):
        pair.pair.do_checkpoint(5, 5)


def test_a_synchronisation_leaves_no_checkpoint_and_latest_only_by_force(tmp_path: Path) -> None:
    made = Rig(tmp_path)
    with pytest.raises(OperationFailed, match="stage RUNNING"):
        CommitJob(made.buffer, made.disks).run()
    made.pair.begin_sync()
    with pytest.raises(OperationFailed, match="no checkpoint"):
        failover_checkpoint(made.pair)
    with pytest.raises(NeedsForce, match="being synchronised"):
        failover_latest(made.pair)
    failover_latest(made.pair, force=True)
    made.check()
    made.close()


def test_a_commit_that_is_stopped_or_killed_goes_on_where_it_was(pair: Rig) -> None:
    failover_checkpoint(pair.pair)
    runs = 0
    for _ in range(1000):
        job = CommitJob(pair.buffer, pair.disks)
        job.progress = lambda done, total, job=job: job.stopping.set()
        runs += 1
        if job.run():
            break
        for index, oracle in enumerate(pair.oracles):
            assert pair.read(0, len(oracle.view), index) == oracle.view
        if runs % 3 == 0:
            pair.reopen()  # another process goes on
            assert pair.buffer.header.stage is Stage.FAILOVER
    assert runs > 5
    committed(pair)


@pytest.mark.parametrize("kind", ["write", "flush"])
def test_case_7_a_failed_commit_leaves_every_byte_usable_and_can_be_repeated(pair: Rig, kind: str) -> None:
    failover_checkpoint(pair.pair)
    fault = Fault(frozenset({"write", "flush"} & {kind}), errno.EIO, first=3 if kind == "write" else 1)  # type: ignore[arg-type]
    faulty = FaultDisk(pair.disks[0], fault)
    job = CommitJob(pair.buffer, [faulty, pair.disks[1]])
    with pytest.raises(OperationFailed, match="Input/output error"):
        job.run()
    assert pair.buffer.header.stage is Stage.FAILOVER_FAILED
    error = pair.buffer.header.get_error()
    assert error is not None
    assert error.case is Failure.FAILOVER
    pair.guest_write(10_000, pattern(100_000, 77))
    pair.guest_write(100, pattern(100_000, 78), 1)
    for index, oracle in enumerate(pair.oracles):
        assert pair.read(0, len(oracle.view), index) == oracle.view
    faulty.heal()
    assert job.run()
    committed(pair)


class ForgetfulDisk(DiskLayer):
    """A page cache whose first flush fails, and that forgets what was written since the one before."""

    def __init__(self, inner: Disk) -> None:
        super().__init__(inner)
        self.failures = 1
        self._before: list[tuple[int, bytearray]] = []

    def write(self, offset: int, data: Bytes) -> None:
        old = bytearray(len(data))
        self.inner.read_into(offset, memoryview(old))
        self._before.append((offset, old))
        self.inner.write(offset, data)

    def flush(self) -> None:
        if self.failures:
            self.failures -= 1
            for offset, old in reversed(self._before):
                self.inner.write(offset, old)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._before.clear()
        self.inner.flush()


@pytest.mark.parametrize("settle", [1, 64 << 20])
def test_what_a_failed_flush_forgot_is_committed_again(
    pair: Rig, monkeypatch: pytest.MonkeyPatch, settle: int
) -> None:
    monkeypatch.setattr(secondary.commit, "SETTLE_BYTES", settle)
    failover_checkpoint(pair.pair)
    job = CommitJob(pair.buffer, [ForgetfulDisk(disk) for disk in pair.disks])
    for _ in pair.disks:
        with pytest.raises(OperationFailed, match="Input/output error"):
            job.run()
        for index, oracle in enumerate(pair.oracles):
            assert pair.read(0, len(oracle.view), index) == oracle.view
    assert job.run()
    committed(pair)


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("by", ["commit", "guest"])
def test_a_process_that_is_killed_between_two_marks_leaves_the_guests_contents(
    pair: Rig, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    failover_checkpoint(pair.pair)
    volume, least = pair.buffer.volumes[0], pair.buffer.header.epoch << 32
    block = next(
        block
        for block in range(volume.blocks)
        if volume.hidden.position(block, least) >= 0 and volume.active.position(block, least) >= 0
    )
    cleared = 0

    def clear(layer: Layer, first: int, last: int) -> None:
        nonlocal cleared
        if first <= block <= last and layer in (volume.hidden, volume.active):
            cleared += 1
            if cleared == 2:
                raise Killed
        real(layer, first, last)

    real = secondary.replica.clear_marks
    for module in (secondary.commit, secondary.replica):
        monkeypatch.setattr(module, "clear_marks", clear)
    with pytest.raises(Killed):
        if by == "commit":
            CommitJob(pair.buffer, pair.disks).run()
        else:
            offset = block * BLOCK
            pair.guest.write(offset, bytes(pair.oracle.view[offset : offset + BLOCK]))  # what is there already
    monkeypatch.undo()
    pair.reopen()
    for index, oracle in enumerate(pair.oracles):
        assert pair.read(0, len(oracle.view), index) == oracle.view
    assert CommitJob(pair.buffer, pair.disks).run()
    committed(pair)


def test_the_guest_writes_while_the_commit_runs(pair: Rig) -> None:
    failover_checkpoint(pair.pair)
    random_ = random.Random(5)
    problems: list[str] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            offset, length = random_.randrange(SIZES[0] - 9000), random_.randrange(1, 9000)
            pair.guest_write(offset, pattern(length, random_.randrange(1000)))
            view = bytearray(length)
            pair.guest.read_blocking(offset, memoryview(view))
            if view != pair.oracle.view[offset : offset + length]:
                problems.append(f"at {offset}")

    thread = threading.Thread(target=write)
    thread.start()
    assert CommitJob(pair.buffer, pair.disks).run()
    stop.set()
    thread.join(20)
    assert not problems
    committed(pair)


def test_a_commit_writes_in_the_order_of_the_disk_in_bounded_runs(tmp_path: Path) -> None:
    with rig(tmp_path / "rig", (4 * RUN_BYTES,)) as made:
        for block in random.Random(3).sample(range(4 * RUN_BYTES // BLOCK), 4 * RUN_BYTES // BLOCK):
            made.stream(block * BLOCK, pattern(BLOCK, block))
        failover_checkpoint(made.pair)
        disk = CountingDisk(made.disks[0])
        offsets: list[int] = []
        CommitJob(made.buffer, [disk], on_write=lambda volume, offset, length: offsets.append(offset)).run()
        assert offsets == sorted(offsets)
        assert disk.bytes["write"] == 4 * RUN_BYTES
        committed(made)


def test_an_empty_buffer_is_committed_at_once(tmp_path: Path) -> None:
    with rig(tmp_path / "rig") as made:
        failover_checkpoint(made.pair)
        assert CommitJob(made.buffer, made.disks).run()
        committed(made)
        assert os.path.getsize(made.paths[0]) == 1 << 20
