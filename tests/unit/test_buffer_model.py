"""Property test of the disk buffer: every operation in any order against the oracle, at every block size (I1, I2, I3).

The machine also runs out of slots on both layers, steps over the epoch's wrap-around, restarts, fails over and commits
in part.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common import limits
from common.batch import DISCARD, ZERO
from common.disk import Fault, FaultDisk
from common.errors import NoSpaceError, OperationFailed
from secondary import header as h
from secondary.commit import CommitJob, failover_checkpoint, held_extents
from secondary.header import Failure, Stage
from tests.heart import Rig, pattern, u64

BLOCKS = 24
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


NUMBERS = st.integers(0, 1 << 40)
"""Turned into an offset or a length by ``BufferMachine.span``."""


class BufferMachine(RuleBasedStateMachine):
    """One volume; ``fresh`` and ``owned`` are the blocks that hidden and active disk must hold by now."""

    rig: Rig
    patch: pytest.MonkeyPatch

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="tandemdisk-test-", dir=MEMORY))
        self.patch = pytest.MonkeyPatch()
        self.hidden: set[int] = set()
        self.active: set[int] = set()
        self.seed = 0

    @initialize(
        block_size=st.sampled_from([512, 512, 1024, 4096, 4096, 65536, limits.MAX_BLOCK]),
        tail=st.integers(1, 512),
        slots=st.integers(2, BLOCKS + 2),
        epoch=st.sampled_from([1, 1, 2, 77, h.LAST_EPOCH - 3]),
        before=st.lists(st.tuples(st.booleans(), NUMBERS, NUMBERS), max_size=10),
        promote=st.booleans(),
    )
    def start(
        self,
        block_size: int,
        tail: int,
        slots: int,
        epoch: int,
        before: list[tuple[bool, int, int]],
        promote: bool,
    ) -> None:
        self.block = block_size
        blocks = BLOCKS if block_size < limits.MAX_BLOCK else 5
        # Pools of a few slots need a smaller minimum than what a batch of the real stream requires.
        self.patch.setattr(limits, "MIN_POOL", 2 * block_size)
        size = blocks * block_size + min(tail, block_size) - block_size // 2
        self.rig = Rig(self.directory, (size,), block_size=block_size, buffer_bytes=2 * slots * block_size)
        self.size = size
        self.slots = min(slots, -(-size // block_size))
        self.rig.buffer.header.store_state(Stage.RUNNING, epoch, syncing=False)
        assert self.rig.buffer.volumes[0].hidden.slots == self.slots
        for from_guest, where, length in before:
            (self.guest if from_guest else self.stream)(where, length, "write")
        if promote:
            self.failover()

    def span(self, where: int, length: int) -> tuple[int, int]:
        """An offset and a length of up to five blocks, in bytes, on a block's border as often as not."""
        offset = where % self.size
        if where % 2:
            offset -= offset % self.block
        count = 1 + length % (5 * self.block)
        if length % 2:
            count = self.block * (1 + length % 5)
        return offset, min(count, self.size - offset)

    def blocks(self, offset: int, length: int) -> set[int]:
        return set(range(offset // self.block, (offset + length - 1) // self.block + 1))

    def data(self, length: int) -> bytes:
        self.seed += 1
        return pattern(length, self.seed)

    @property
    def stage(self) -> Stage:
        return self.rig.buffer.header.stage

    @precondition(lambda self: self.stage is Stage.RUNNING)
    @rule(where=NUMBERS, length=NUMBERS)
    def stream_write(self, where: int, length: int) -> None:
        self.stream(where, length, "write")

    @precondition(lambda self: self.stage is Stage.RUNNING)
    @rule(where=NUMBERS, length=NUMBERS, kind=st.sampled_from(["write", "zero", "discard"]))
    def stream(self, where: int, length: int, kind: str) -> None:
        offset, count = self.span(where, length)
        new = self.blocks(offset, count) - self.hidden
        job, disk, oracle = self.rig.pair.jobs[0], self.rig.disks[0], self.rig.oracle
        if len(self.hidden) + len(new) > self.slots:
            with pytest.raises(NoSpaceError):
                job.do_cow(u64(offset), u64(count))
            return
        assert job.do_cow(u64(offset), u64(count)) == len(new)
        assert job.do_cow_nowait(u64(offset, offset), u64(count, count)) == 0
        self.hidden |= new
        if kind == "write":
            data = self.data(count)
            disk.write(offset, data)
            oracle.stream(offset, data)
        elif kind == "zero":
            disk.zero(offset, count)
            oracle.stream(offset, bytes(count))
        else:
            disk.discard(offset, count)
            contents = bytearray(count)
            disk.read_into(offset, memoryview(contents))  # what a discard leaves behind is the disk's choice
            oracle.stream(offset, bytes(contents))

    @precondition(lambda self: self.stage is Stage.RUNNING)
    @rule(where=NUMBERS, length=NUMBERS)
    def guest_write(self, where: int, length: int) -> None:
        self.guest(where, length, "write")

    @precondition(lambda self: self.stage is Stage.RUNNING)
    @rule(where=NUMBERS, length=NUMBERS, kind=st.sampled_from(["write", "zero", "discard"]))
    def guest(self, where: int, length: int, kind: str) -> None:
        offset, count = self.span(where, length)
        guest = self.rig.guest
        if kind == "discard":
            guest.operate(DISCARD, offset, count)
            return
        new = self.blocks(offset, count) - self.active
        data = self.data(count) if kind == "write" else bytes(count)
        full = len(self.active) + len(new) > self.slots
        code = 0
        try:
            if kind == "write":
                guest.write(offset, data)
            else:
                guest.operate(ZERO, offset, count)
        except OSError as error:
            code = error.errno or -1
        assert code == (errno.ENOSPC if full else 0)
        if full:
            return
        self.active |= new
        self.rig.oracle.guest(offset, data)

    @precondition(lambda self: self.stage is Stage.RUNNING and bool(self.hidden or self.active))
    @rule(years_pass=st.booleans())
    def checkpoint(self, years_pass: bool) -> None:
        header = self.rig.buffer.header
        if years_pass:
            # What four billion checkpoints leave behind: entries and pointers of the same small epochs that come again.
            self.rig.checkpoint()
            header.store_state(Stage.RUNNING, h.LAST_EPOCH - 1, syncing=False)
        self.rig.checkpoint()
        self.hidden.clear()
        self.active.clear()
        assert header.checkpoint.number == self.rig.number
        assert header.epoch not in (0, h.LAST_EPOCH)

    @precondition(lambda self: bool(self.hidden or self.active))
    @rule()
    def restart(self) -> None:
        number = self.rig.buffer.header.checkpoint.number
        self.rig.reopen()
        assert self.rig.buffer.header.checkpoint.number == number

    @precondition(lambda self: self.stage is Stage.RUNNING and len(self.hidden | self.active) > 2)
    @rule()
    def failover(self) -> None:
        failover_checkpoint(self.rig.pair)
        held = {block for extent in held_extents(self.rig.buffer.volumes[0]) for block in self.blocks(*extent)}
        assert held == self.hidden | self.active

    @precondition(lambda self: self.stage > Stage.RUNNING)
    @rule(where=NUMBERS, length=NUMBERS)
    def promoted_guest_write(self, where: int, length: int) -> None:
        self.promoted_guest(where, length, "write")

    @precondition(lambda self: self.stage > Stage.RUNNING)
    @rule(where=NUMBERS, length=NUMBERS, kind=st.sampled_from(["write", "zero", "discard"]))
    def promoted_guest(self, where: int, length: int, kind: str) -> None:
        offset, count = self.span(where, length)
        guest, oracle = self.rig.guest, self.rig.oracle
        if kind == "write":
            data = self.data(count)
            guest.write(offset, data)
            oracle.guest(offset, data)
        elif kind == "zero":
            guest.operate(ZERO, offset, count)
            oracle.guest(offset, bytes(count))
        else:
            guest.operate(DISCARD, offset, count)
            after = self.rig.read(offset, count)
            # Within the range anything goes; the invariant checks that nothing around it changed.
            oracle.guest(offset, after)

    @precondition(lambda self: self.stage > Stage.RUNNING)
    @rule(after=st.integers(1, 3), fails=st.booleans())
    def commit(self, after: int, fails: bool) -> None:
        disk = FaultDisk(self.rig.disks[0])
        job = CommitJob(self.rig.buffer, [disk])
        steps = 0

        def progress(done: int, total: int) -> None:
            nonlocal steps
            steps += 1
            assert 0 < done <= total
            if steps == after:
                job.stopping.set()

        job.progress = progress
        if fails and self.stage is not Stage.DONE:
            disk.fail(Fault(frozenset({"write", "flush"}), errno.EIO, first=after))
        try:
            finished = job.run()
        except OperationFailed:
            assert fails
            assert self.stage is Stage.FAILOVER_FAILED
            error = self.rig.buffer.header.get_error()
            assert error is not None
            assert error.case is Failure.FAILOVER
            return
        assert finished == (self.stage is Stage.DONE)

    @invariant()
    def as_the_oracle_says(self) -> None:
        if not hasattr(self, "rig"):
            return
        oracle, guest = self.rig.oracle, self.rig.guest
        assert self.rig.read(0, self.size) == oracle.view
        middle = self.size // 3
        assert self.rig.read(middle, self.block) == oracle.view[middle : middle + self.block]
        assert sum(length for length, _ in guest.block_status(0, self.size)) == self.size
        if self.stage is Stage.RUNNING:
            assert Path(self.rig.paths[0]).read_bytes() == oracle.disk
            assert self.rig.pair.jobs[0].used_blocks == len(self.hidden)
            assert self.rig.buffer.guest_has_written == bool(self.active)
        elif self.stage is Stage.DONE:
            assert Path(self.rig.paths[0]).read_bytes() == oracle.view

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.close()
        self.patch.undo()
        shutil.rmtree(self.directory)


TestBuffer = BufferMachine.TestCase
TestBuffer.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
