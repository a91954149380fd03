"""What the secondary's heart costs, in one process and without a network: `tandemdisk bench --heart`.

    requests     lock and unlock of a CowRequest
    do_cow       a batch of 32 random blocks, first touch and not, with readers present and not; per GiB in long extents
    reads        one guest read of 4 KiB from each layer, and with copy-before-write running in another process
    checkpoint   over the size of the disk (sparse) and over the dirty set: both must be flat
    failover     until the guest's view is writable, over the dirty set: flat
    copies       out of the mapped pool against preadv from its file

Times are medians of many calls, in microseconds unless it says otherwise. Disks and buffer are on the memory file
system. Where a figure is to be compared over the dirty set, the caches are swept before each call, whatever the set:
else it would show how much of them the preparation left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from common.disk import FileDisk
from common.settings import BufferSettings
from secondary.attach import attach
from secondary.backup import PairBackup
from secondary.buffer import Blocks, BufferVolume, DiskBuffer
from secondary.commit import failover_checkpoint
from secondary.replica import GuestVolume

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40
BATCH: Final = 32

Figures = dict[str, float]


class Heart:
    """A pair's heart over one disk of ``size`` bytes, in a directory of its own."""

    def __init__(
        self, size: int, *, block_size: int = 4 * KIB, buffer_bytes: int = 256 * MIB, sparse: bool = True
    ) -> None:
        parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.directory = tempfile.mkdtemp(prefix="tandemdisk-bench-", dir=parent)
        path = f"{self.directory}/disk.raw"
        with open(path, "wb") as file:
            if sparse:
                file.truncate(size)
            for _ in range(0 if sparse else size // MIB):
                file.write(b"\x5a" * MIB)
        settings = BufferSettings(f"{self.directory}/buffer", buffer_bytes, block_size)
        self.size = size
        self.block_size = block_size
        self.buffer = DiskBuffer.create(settings, [BufferVolume("disk0", size, path)], pair_id="bench")
        self.buffer.start(syncing=False)
        self.disk = FileDisk(path)
        self.pair = PairBackup(self.buffer, [self.disk])
        self.job = self.pair.jobs[0]
        self.guest = GuestVolume(self.buffer.volumes[0], FileDisk(path, exclusive=False))
        self.checkpoints = 0

    def checkpoint(self) -> None:
        self.checkpoints += 1
        self.pair.do_checkpoint_nowait(self.checkpoints, self.checkpoints)

    def close(self) -> None:
        self.disk.close()
        self.guest.disk.close()
        self.buffer.close()
        shutil.rmtree(self.directory)


@contextmanager
def heart(
    size: int, *, block_size: int = 4 * KIB, buffer_bytes: int = 256 * MIB, sparse: bool = True
) -> Iterator[Heart]:
    made = Heart(size, block_size=block_size, buffer_bytes=buffer_bytes, sparse=sparse)
    try:
        yield made
    finally:
        made.close()


def median_us(call: Callable[[], object], *, calls: int = 2000, before: Callable[[], object] | None = None) -> float:
    """Median duration of ``call`` in microseconds; ``before`` is not timed."""
    times: list[int] = []
    for _ in range(calls):
        if before is not None:
            before()
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1000


def sweep(memory: Blocks) -> None:
    """Leave nothing of the last step in the processor's caches."""
    memory += np.uint64(1)


def measure_requests() -> Figures:
    with heart(64 * MIB) as made:
        table = made.buffer.volumes[0].requests
        one = ((8192, 12288),)
        many = [(block * 65536, block * 65536 + 4096) for block in range(BATCH)]

        def raw() -> None:
            held = table.try_ranges(one, shared=True)
            assert held is not None
            table.release(held)

        def batch() -> None:
            held = table.try_ranges(many, shared=False)
            assert held is not None
            table.release(held)

        return {
            "lock + unlock": median_us(raw),
            "CowRequest as a context manager": median_us(lambda: table.cow_request_begin(8192, 12288).end()),
            "wait_for_overlapping_requests": median_us(lambda: table.wait_for_overlapping_requests(8192, 12288)),
            f"lock + unlock of {BATCH} ranges": median_us(batch),
        }


def measure_do_cow() -> Figures:
    figures: Figures = {}
    with heart(256 * MIB, buffer_bytes=512 * MIB, sparse=False) as made:
        generator = np.random.default_rng(1)
        lengths: Blocks = np.full(BATCH, made.block_size, dtype=np.uint64)
        blocks = made.size // made.block_size
        offsets: Blocks = lengths

        def fresh() -> None:
            nonlocal offsets
            made.checkpoint()
            picked = generator.choice(blocks, BATCH, replace=False).astype(np.uint64)
            offsets = picked * np.uint64(made.block_size)

        def reads_only() -> None:
            """The floor: 32 preadv into consecutive slots, nothing else."""
            pool, fd, position = made.buffer.volumes[0].hidden.pool, made.disk.fileno(), 0
            for offset in offsets.tolist():
                os.preadv(fd, (pool[position : position + 4096],), offset)
                position += 4096

        def cow() -> None:
            made.job.do_cow_nowait(offsets, lengths)

        for _ in range(500):  # map every page of the pool and the map once
            fresh()
            cow()
        figures[f"{BATCH} preadv alone"] = median_us(reads_only, before=fresh)
        figures[f"{BATCH} blocks, first touch, no reader present"] = median_us(cow, before=fresh)
        figures[f"{BATCH} blocks, already stamped"] = median_us(cow)
        view = memoryview(bytearray(1))
        made.guest.read_into(0, view)
        figures[f"{BATCH} blocks, first touch, readers present"] = median_us(cow, before=fresh)
        figures["per block, first touch, no reader present"] = (
            figures[f"{BATCH} blocks, first touch, no reader present"] / BATCH
        )
        figures["per block, already stamped"] = figures[f"{BATCH} blocks, already stamped"] / BATCH
        made.buffer.volumes[0].requests.leave()
        whole: Blocks = np.array([made.size], dtype=np.uint64)
        made.checkpoint()
        start = time.perf_counter()
        made.job.do_cow(whole - whole, whole)
        figures["ms per GiB, first use of the pool's memory"] = (time.perf_counter() - start) * 1000 * GIB / made.size
        for name, length in (("1 MiB", MIB), ("64 KiB", 64 * KIB)):
            extents = [np.array([offset], dtype=np.uint64) for offset in range(0, made.size, length)]
            one: Blocks = np.array([length], dtype=np.uint64)
            for touch in ("first touch", "already stamped"):
                if touch == "first touch":
                    made.checkpoint()
                start = time.perf_counter()
                for extent in extents:
                    made.job.do_cow_nowait(extent, one)
                figures[f"ms per GiB in {name} extents, {touch}"] = (
                    (time.perf_counter() - start) * 1000 * GIB / made.size
                )
    return figures


STREAM = """
import sys, time
import numpy as np
from common.disk import FileDisk
from secondary.backup import PairBackup
from secondary.buffer import DiskBuffer
buffer = DiskBuffer.attach(sys.argv[1])
disk = FileDisk(buffer.volumes[0].disk_path, exclusive=False)
pair = PairBackup(buffer, [disk])
generator = np.random.default_rng(2)
lengths = np.full(32, 4096, dtype=np.uint64)
data = bytes(4096)
print("ready", flush=True)
number = 0
while True:
    offsets = generator.choice(disk.size // 4096, 32, replace=False).astype(np.uint64) * np.uint64(4096)
    try:
        pair.jobs[0].do_cow_nowait(offsets, lengths)
    except BlockingIOError:
        pair.jobs[0].do_cow(offsets, lengths)
    for offset in offsets.tolist():
        disk.write(offset, data)
    if pair.jobs[0].free_blocks < 64:
        number += 1
        pair.do_checkpoint(number, number)
"""


def measure_reads() -> Figures:
    figures: Figures = {}
    with heart(256 * MIB, buffer_bytes=512 * MIB, sparse=False) as made:
        view = memoryview(bytearray(4096))
        big = memoryview(bytearray(MIB))
        blocks = random.Random(1).sample(range(made.size // 4096 - 256), 4000)
        position = 0

        def read() -> None:
            nonlocal position
            position = (position + 1) % len(blocks)
            try:
                made.guest.read_into(blocks[position] * 4096, view)
            except BlockingIOError:
                made.guest.read_blocking(blocks[position] * 4096, view)

        def plain() -> None:
            nonlocal position
            position = (position + 1) % len(blocks)
            made.disk.read_nowait(blocks[position] * 4096, view)

        figures["4 KiB of a plain disk"] = median_us(plain, calls=8000)
        figures["4 KiB through the view, secondary disk"] = median_us(read, calls=8000)
        figures["1 MiB through the view, secondary disk"] = median_us(lambda: made.guest.read_into(0, big), calls=500)
        made.job.do_cow(np.array([0], dtype=np.uint64), np.array([made.size], dtype=np.uint64))
        figures["4 KiB through the view, hidden disk"] = median_us(read, calls=8000)
        figures["1 MiB through the view, hidden disk"] = median_us(lambda: made.guest.read_into(0, big), calls=500)
        for block in blocks:
            made.guest.write(block * 4096, view)
        figures["4 KiB through the view, active disk"] = median_us(read, calls=8000)
        figures["guest write of 4 KiB, in place"] = median_us(lambda: made.guest.write(blocks[0] * 4096, view))
        made.checkpoint()
        fresh = iter(blocks)
        figures["guest write of 4 KiB, first touch"] = median_us(
            lambda: made.guest.write(next(fresh) * 4096, view), calls=4000
        )
        process = subprocess.Popen(
            [sys.executable, "-c", STREAM, made.buffer.directory], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            figures["4 KiB through the view, COW running at full speed beside"] = median_us(read, calls=40000)
        finally:
            process.kill()
            process.communicate()
    return figures


def measure_checkpoint_by_size() -> Figures:
    figures: Figures = {}
    for size, block_size in ((GIB, 4 * KIB), (64 * GIB, 4 * KIB), (TIB, 64 * KIB), (16 * TIB, MIB)):
        with contextlib.ExitStack() as stack:
            made = stack.enter_context(heart(size, block_size=block_size))
            name = f"{size // GIB} GiB" if size < TIB else f"{size // TIB} TiB"
            figures[f"{name}, blocks of {block_size // KIB} KiB"] = median_us(made.checkpoint)
    return figures


def measure_checkpoint_by_dirty() -> Figures:
    figures: Figures = {}
    with heart(128 * MIB, sparse=False) as made:
        one: Blocks = np.array([0], dtype=np.uint64)
        memory: Blocks = np.zeros(64 * MIB // 8, dtype=np.uint64)
        for percent in (0, 1, 10, 50, 100):

            def dirty(percent: int = percent) -> None:
                if percent:
                    made.job.do_cow(one, np.array([made.size * percent // 100], dtype=np.uint64))
                sweep(memory)

            figures[f"{percent} % of {made.size // MIB} MiB dirty"] = median_us(made.checkpoint, calls=9, before=dirty)
    return figures


def measure_failover() -> Figures:
    figures: Figures = {}
    memory: Blocks = np.zeros(64 * MIB // 8, dtype=np.uint64)
    for percent in (0, 1, 10, 50, 100):
        times: list[float] = []
        for _ in range(3):
            with heart(128 * MIB, sparse=False) as made:
                if percent:
                    length: Blocks = np.array([made.size * percent // 100], dtype=np.uint64)
                    made.job.do_cow(np.array([0], dtype=np.uint64), length)
                sweep(memory)
                start = time.perf_counter()
                failover_checkpoint(made.pair)
                made.guest.write(5000, b"the first write after the failover")
                times.append((time.perf_counter() - start) * 1e6)
        figures[f"{percent} % of 128 MiB dirty, until the first write is done"] = statistics.median(times)
    return figures


def measure_copies() -> Figures:
    figures: Figures = {}
    with heart(64 * MIB) as made:
        layer = made.buffer.volumes[0].hidden
        fd = os.open(layer.path, os.O_RDONLY)
        start = layer.geometry.pool_at
        target = memoryview(bytearray(MIB))
        layer.pool[: 32 * MIB] = bytes(32 * MIB)
        position = 0
        for length in (4 * KIB, 64 * KIB, MIB):

            def mapped(length: int = length) -> None:
                nonlocal position
                position = (position + 7919 * 4096) % (31 * MIB)
                target[:length] = layer.pool[position : position + length]

            def read(length: int = length) -> None:
                nonlocal position
                position = (position + 7919 * 4096) % (31 * MIB)
                os.preadv(fd, (target[:length],), start + position)

            figures[f"{length // KIB} KiB out of the mapping"] = median_us(mapped)
            figures[f"{length // KIB} KiB with preadv"] = median_us(read)
        os.close(fd)
    return figures


def measure_snapshot() -> Figures:
    with heart(512 * MIB, sparse=False) as made, attach(made.buffer.directory) as view:
        target = f"{made.directory}/image.raw"
        start = time.perf_counter()
        view.snapshot({"disk0": target})
        return {"MiB per second": made.size / MIB / (time.perf_counter() - start)}


MEASUREMENTS: Final[dict[str, Callable[[], Figures]]] = {
    "requests": measure_requests,
    "do_cow": measure_do_cow,
    "reads": measure_reads,
    "checkpoint over disk size": measure_checkpoint_by_size,
    "checkpoint over dirty set": measure_checkpoint_by_dirty,
    "failover": measure_failover,
    "copies": measure_copies,
    "snapshot": measure_snapshot,
}


def show_heart(json_path: str | None = None, only: Sequence[str] = ()) -> None:
    """Measure and print; the figures as JSON into ``json_path`` too, or instead if that is ``-``."""
    results: dict[str, Figures] = {}
    for name in only or MEASUREMENTS:
        results[name] = MEASUREMENTS[name]()
        if json_path == "-":
            continue
        print(name)
        for what, figure in results[name].items():
            print(f"    {what:60} {figure:10.1f}", flush=True)
    if json_path == "-":
        print(json.dumps(results, indent=1))
    elif json_path:
        Path(json_path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="What the secondary's heart costs, in microseconds")
    parser.add_argument("--only", nargs="*", choices=list(MEASUREMENTS), default=(), help="these groups")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too; - prints nothing else")
    options = parser.parse_args()
    show_heart(options.json, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
