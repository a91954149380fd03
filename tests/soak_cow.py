"""Copy-before-write under concurrent readers, with an oracle: `python -m tests.soak_cow --operations 5000000`.

One process streams writes, zeroes and discards into a small, hot secondary disk through the backup job and makes
checkpoints at random moments. Other processes read at the same time:

* readers of the guest's view, and of the bare checkpoint (attached, read-only);
* guest writers, each with sectors of its own in blocks that it shares with everybody, so that each write is a partial
  one;
* from time to time a reader is killed in the middle of whatever it does, and replaced.

The oracle is a brute-force model per epoch, in shared memory: what every sector of the view holds in each of the last
epochs. A reader looks at the epoch before and after its read; the bytes that it got, all of them, must be those of one
epoch in between (I1). A guest writer knows in addition what it wrote itself. At the end the pair fails over to the
checkpoint; the guests go on, still checked, while the buffer is committed.

``--variant unserialised`` takes the requests away from the readers, ``--variant outside`` looks the blocks up before
the request begins. Both must be found out within seconds; the suite runs them to show that this test can fail.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from common.batch import WRITE, ZERO
from common.disk import FileDisk
from common.settings import BufferSettings
from secondary import header as h
from secondary.backup import PairBackup
from secondary.buffer import Blocks, BufferVolume, DiskBuffer
from secondary.commit import CommitJob, failover_checkpoint
from secondary.header import Stage
from secondary.holders import Ranges
from secondary.locks import Description
from secondary.replica import GuestVolume
from secondary.requests import RequestTable
from secondary.view import VolumeView

SECTOR: Final = 512
BLOCK: Final = 4096
BLOCKS: Final = 96
SECTORS: Final = BLOCKS * (BLOCK // SECTOR) + 3
"""The last block is a short one."""
SIZE: Final = SECTORS * SECTOR
EPOCHS: Final = 16
"""Epochs that the oracle remembers."""
CHILDREN: Final = 16
STOP: Final = 0
IMAGES_AT: Final = 1 + CHILDREN


def guest_of(sector: int, guests: int) -> int:
    """Which guest writer a sector belongs to, or -1. Their runs of six sectors lie across the borders of blocks."""
    return (sector // 16) % guests if guests and 5 <= sector % 16 <= 10 else -1


class Oracle:
    """The shared model: ``images[epoch % EPOCHS][sector]`` is the value in every word of that sector."""

    def __init__(self, path: str, *, create: bool = False) -> None:
        length = 8 * (IMAGES_AT + EPOCHS * SECTORS)
        with open(path, "w+b" if create else "r+b") as file:
            if create:
                file.truncate(length)
            self._map = mmap.mmap(file.fileno(), length)
        self.words: Blocks = np.frombuffer(self._map, dtype=np.uint64)
        self.images = self.words[IMAGES_AT:].reshape(EPOCHS, SECTORS)

    @property
    def stopping(self) -> bool:
        return bool(self.words[STOP])

    @property
    def operations(self) -> int:
        return int(self.words[1:IMAGES_AT].sum())


class Unserialised(RequestTable):
    """Requests that serialise nothing."""

    def try_ranges(self, ranges: Ranges, *, shared: bool) -> Description | None:
        return self.take()


class LookUpOutside(GuestVolume):
    """The look-up first, then the request, then the read of what the look-up said."""

    def _read(self, offset: int, view: memoryview, *, wait: bool) -> None:
        segments = self.look_up(offset, len(view), self.least(self._words[h.W_STATE]))
        mask = self._mask
        request = self._begin((((offset & ~mask), (offset + len(view) + mask) & ~mask),), wait, shared=True)
        try:
            self.copy_segments(segments, view, wait=wait)
        finally:
            self.requests.release(request)


class Child:
    """What readers and guest writers have in common."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = random.Random(options.seed * 1000 + options.child)
        self.buffer = DiskBuffer.attach(f"{options.directory}/buffer", timeout_s=60)
        self.header = self.buffer.header
        self.oracle = Oracle(f"{options.directory}/oracle")
        volume = self.buffer.volumes[0]
        disk = FileDisk(volume.disk_path, exclusive=False)
        if options.variant == "unserialised":
            volume.requests = Unserialised(
                volume.requests.path, volume.size, BLOCK, waiting=memoryview(bytearray(8)).cast("Q")
            )
        guest = LookUpOutside if options.variant == "outside" else GuestVolume
        self.guest = guest(volume, disk)
        self.view: VolumeView = VolumeView(volume, disk, overlay=False) if options.role == "attached" else self.guest
        others = [guest_of(sector, options.guests) for sector in range(SECTORS)]
        self.exact = np.array([options.role == "attached" or other < 0 for other in others])
        self.own = [sector for sector, other in enumerate(others) if other == options.child]
        # Own sectors: what was written last, in which epoch, and whether it is certain that it was that epoch.
        self.written: dict[int, tuple[int, int, bool]] = {}
        self.count = 0

    def run(self) -> str:
        """Until told to stop; returns what was wrong, or nothing."""
        words, me = self.oracle.words, 1 + self.options.child
        while not self.oracle.stopping:
            if self.options.role == "guest" and self.random.random() < 0.5:
                self.write()
            else:
                problem = self.read()
                if problem:
                    return problem
            words[me] += 1
        return ""

    def fetch(self, first: int, count: int) -> tuple[int, int, Blocks] | None:
        """(epoch before, epoch after, words by sector), or None if there was no view to read from."""
        contents = bytearray(count * SECTOR)
        before = self.header.epoch
        try:
            try:
                self.view.read_into(first * SECTOR, memoryview(contents))
            except BlockingIOError:
                self.view.read_blocking(first * SECTOR, memoryview(contents))
        except OSError:
            assert self.options.role == "attached"
            assert self.header.stage is not Stage.RUNNING
            time.sleep(0.01)
            return None
        return before, self.header.epoch, np.frombuffer(contents, dtype=np.uint64).reshape(count, -1)

    def read(self) -> str:
        count = self.random.choice((1, 2, 8, 9, 64, 200))
        first = self.random.randrange(SECTORS - count + 1)
        if self.options.role == "guest":
            first, count = self.own_span()
        fetched = self.fetch(first, count)
        if fetched is None:
            return ""
        before, after, words = fetched
        torn = np.flatnonzero((words != words[:, :1]).any(axis=1))
        problem = f"sector {first + int(torn[0])} is torn: {words[torn[0]]}" if len(torn) else ""
        for epoch in range(before, after + 1):
            mismatch = self.compare(first, words[:, 0], epoch, before == after)
            if not mismatch and not len(torn):
                return ""
            problem = problem or mismatch
        if self.header.epoch - before >= EPOCHS - 2:
            return ""  # so slow that the oracle has forgotten
        return f"{self.options.role} {self.options.child}: epochs {before} to {after}: {problem}"

    def compare(self, first: int, values: Blocks, epoch: int, certain: bool) -> str:
        image = self.oracle.images[epoch % EPOCHS][first : first + len(values)]
        wrong = (values != image) & self.exact[first : first + len(values)]
        for sector in np.flatnonzero(wrong):
            return f"sector {first + int(sector)} holds {int(values[sector]):#x}, not {int(image[sector]):#x}"
        if self.options.role != "guest":
            return ""
        for index, got in enumerate(values.tolist()):
            value, when, sure = self.written.get(first + index, (0, 0, False))
            allowed = {int(image[index])}
            if when == epoch:
                allowed = {value} if sure else allowed | {value}
            if certain and got not in allowed:
                return f"own sector {first + index} holds {got:#x}, not {[hex(one) for one in allowed]}"
        return ""

    def own_span(self) -> tuple[int, int]:
        start = self.random.randrange(len(self.own))
        count = 1
        while start + count < len(self.own) and count < 6 and self.own[start + count] == self.own[start] + count:
            count += 1
        return self.own[start], self.random.randint(1, count)

    def write(self) -> None:
        first, count = self.own_span()
        self.count += 1
        value = 1 << 63 | self.options.child << 48 | self.count
        zero = self.random.random() < 0.1
        data = np.full(count * SECTOR // 8, 0 if zero else value, dtype=np.uint64).tobytes()
        before = self.header.epoch
        if zero:
            self.guest.operate(ZERO, first * SECTOR, count * SECTOR)
        else:
            operation = (WRITE, first * SECTOR, count * SECTOR, 0, 0)
            try:
                errors = self.guest.apply([operation], memoryview(data), wait=False)
            except BlockingIOError:
                errors = self.guest.apply([operation], memoryview(data), wait=True)
            assert not errors, errors
        after = self.header.epoch
        for sector in range(first, first + count):
            self.written[sector] = (0 if zero else value, after, before == after)


@dataclass
class Result:
    """What a run found."""

    operations: int
    checkpoints: int
    seconds: float
    killed: int
    problems: list[str]


class Soak:
    """The streaming process, which also runs the others."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = random.Random(options.seed)
        self.directory = Path(tempfile.mkdtemp(prefix="tandemdisk-soak-", dir=options.parent))
        path = str(self.directory / "disk.raw")
        self.model: Blocks = np.arange(1, SECTORS + 1, dtype=np.uint64)
        Path(path).write_bytes(np.repeat(self.model, SECTOR // 8).tobytes())
        settings = BufferSettings(str(self.directory / "buffer"), 1 << 26, BLOCK)
        self.buffer = DiskBuffer.create(settings, [BufferVolume("disk0", SIZE, path)], pair_id="soak", timeout_s=60)
        self.oracle = Oracle(str(self.directory / "oracle"), create=True)
        self.oracle.images[1] = self.model
        self.buffer.start(syncing=False)
        self.disk = FileDisk(path)
        self.pair = PairBackup(self.buffer, [self.disk])
        self.children: dict[int, subprocess.Popen[str]] = {}
        self.killed = 0
        self.sequence = 1 << 32

    def spawn(self, child: int, role: str) -> None:
        options = self.options
        self.children[child] = subprocess.Popen(
            [
                sys.executable, "-m", "tests.soak_cow", "--role", role, "--child", str(child),
                "--directory", str(self.directory), "--seed", str(options.seed + self.killed),
                "--guests", str(options.guests), "--variant", options.variant,
            ],
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def run(self) -> Result:
        options = self.options
        roles = ["guest"] * options.guests + ["reader"] * options.readers + ["attached"] * options.attached
        for child, role in enumerate(roles):
            self.spawn(child, role)
        started = time.monotonic()
        checkpoints = 0
        problems: list[str] = []
        try:
            while not problems:
                for _ in range(50):
                    self.stream()
                    if self.random.random() < options.checkpoint_odds:
                        checkpoints += 1
                        self.checkpoint(checkpoints)
                self.oracle.words[IMAGES_AT - 1] += 50
                if self.random.random() < options.kill_odds:
                    self.kill(roles)
                problems = self.problems()
                if self.oracle.operations >= options.operations or time.monotonic() - started > options.seconds:
                    break
            if not problems and options.variant == "right":
                self.fail_over()
                problems = self.problems()
        finally:
            self.oracle.words[STOP] = 1
            for process in self.children.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
            problems = problems or self.problems()
            for process in self.children.values():
                process.kill()
                process.communicate()
        return Result(self.oracle.operations, checkpoints, time.monotonic() - started, self.killed, problems)

    def stream(self) -> None:
        """A batch of the primary: COW, then the writes."""
        extents: list[tuple[int, int]] = []
        for _ in range(self.random.choice((1, 1, 2, 8))):
            count = self.random.choice((1, 3, 8, 8, 24))
            extents.append((self.random.randrange(SECTORS - count + 1), count))
        offsets = np.array([first * SECTOR for first, _ in extents], dtype=np.uint64)
        lengths = np.array([count * SECTOR for _, count in extents], dtype=np.uint64)
        job = self.pair.jobs[0]
        try:
            job.do_cow_nowait(offsets, lengths)
        except BlockingIOError:
            job.do_cow(offsets, lengths)
        for first, count in extents:
            kind = self.random.random()
            self.sequence += 1
            value = self.sequence if kind < 0.9 else 0
            if kind < 0.9:
                self.disk.write(first * SECTOR, np.full(count * SECTOR // 8, value, dtype=np.uint64).tobytes())
            else:
                self.disk.zero(first * SECTOR, count * SECTOR, may_unmap=kind < 0.95)
            self.model[first : first + count] = value

    def checkpoint(self, number: int) -> None:
        self.oracle.images[(self.buffer.header.epoch + 1) % EPOCHS] = self.model
        try:
            self.pair.do_checkpoint_nowait(number, number)
        except BlockingIOError:
            self.pair.do_checkpoint(number, number)

    def kill(self, roles: Sequence[str]) -> None:
        """A reader dies in the middle of what it does. Guest writers stay: they know what nobody else does."""
        child = self.random.randrange(self.options.guests, len(roles))
        self.children[child].kill()
        self.children[child].communicate()
        self.killed += 1
        self.spawn(child, roles[child])

    def fail_over(self) -> None:
        """The guests go on while the buffer is committed, and a little beyond."""
        for _ in range(20):
            self.stream()
        failover_checkpoint(self.pair)
        operations = self.oracle.operations
        assert CommitJob(self.buffer, [self.disk]).run()
        deadline = time.monotonic() + 10
        while self.oracle.operations < operations + 500 and not self.problems() and time.monotonic() < deadline:
            time.sleep(0.01)

    def problems(self) -> list[str]:
        found = []
        for process in self.children.values():
            if process.poll():
                assert process.stderr is not None
                found.append(process.stderr.read().strip())
        return found

    def close(self) -> None:
        self.disk.close()
        self.buffer.close()
        shutil.rmtree(self.directory)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Copy-before-write under concurrent readers, checked against a model")
    parser.add_argument(
        "--operations", type=int, default=1_000_000, help="stop after so many, of all processes together"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--variant", choices=("right", "unserialised", "outside"), default="right")
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--attached", type=int, default=1)
    parser.add_argument("--guests", type=int, default=2)
    parser.add_argument("--checkpoint-odds", type=float, default=0.02, help="after each batch")
    parser.add_argument("--kill-odds", type=float, default=0.002, help="after each 50 batches")
    parser.add_argument("--parent", default="/dev/shm" if os.access("/dev/shm", os.W_OK) else None, help="directory")
    for name in ("--role", "--directory"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def soak(options: argparse.Namespace) -> Result:
    """One whole run."""
    made = Soak(options)
    try:
        return made.run()
    finally:
        made.close()


def main() -> int:
    options = parse()
    if options.role:
        problem = Child(options).run()
        if problem:
            print(problem, file=sys.stderr)
        return 1 if problem else 0
    print(f"seed {options.seed}", flush=True)
    result = soak(options)
    print(
        f"{result.operations} operations, {result.checkpoints} checkpoints, {result.killed} readers killed, "
        f"{result.seconds:.1f} s, {result.operations / result.seconds:.0f} operations/s"
    )
    for problem in result.problems:
        print(f"WRONG (seed {options.seed}): {problem}")
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
