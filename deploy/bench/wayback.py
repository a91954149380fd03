"""What the way back costs, in one run on one machine: resyncs beside the raw stream and a copy of the same disk by
nbdcopy, and the write-intent bitmap on random writes, on beside off. In alternating rounds; medians, and from the
lowest to the highest.

    raw stream          half of the disk written through an async pair, 1 MiB each, until the secondary has applied it
    resync, dirty bits  the same bytes, written while the secondary was dead: from its first piece to the end
    resync, checksums   the whole of equal disks compared on command, nothing sent
    nbdcopy             the whole disk from the primary's export into a file; of both, the half that is a hole is not
                        counted
    write-intent        random writes of 4 KiB over the whole of a sparse disk, on two pairs

The bitmap's price is a synchronous write, so that part runs where such a write costs something: on a real disk, whose
file system the report names. It is paid when guests come to a region that is not marked. So the disk has far more
regions than writes get to in a sample, and a sample lasts longer than it takes until marks are cleared again
(``FORGET_INTERVAL_S``): nearly every write meets a region without a mark, which is the worst that there is. Guests that
stay in one place for ten seconds pay next to nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil
from rich.console import Console
from rich.table import Table

from common.errors import TimedOut
from common.intent import REGION
from common.limits import KIB, MIB
from common.nbd_client import NbdClient
from deploy.bench.engines import Engine, Stream, choose_engine
from deploy.bench.scratch import scratch_directory
from deploy.bench.workloads import Load
from deploy.layout import PairOptions
from deploy.pair import Pair
from primary.knowledge import FORGET_INTERVAL_S

PATIENCE_S: Final = 60.0
DEPTHS: Final = (1, 32)
OPTIONS: Final[dict[str, Any]] = {"replication": {"heartbeat_s": 0.2, "peer_timeout_s": 2.0}}
KINDS: Final = {"with write-intent bitmap": True, "without": False}


@dataclass(frozen=True, slots=True)
class Options:
    """``directory`` is in memory and takes the disks of the resyncs, of ``size`` bytes; ``disk_directory`` those of the
    write-intent bitmap, sparse."""

    directory: Path
    size: int
    disk_directory: Path = Path(tempfile.gettempdir())
    rounds: int = 3
    seconds: float = 1.5 * FORGET_INTERVAL_S
    """Of each sample of the write-intent bitmap."""
    intent_size: int = 32 * 1024 * MIB
    engine: str = "auto"


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of the rounds, the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        return cls(statistics.median(samples), min(samples), max(samples))

    def __str__(self) -> str:
        return f"{self.median:,.0f} ({self.low:,.0f} to {self.high:,.0f})"


@dataclass(frozen=True, slots=True)
class Intent:
    """One kind of pair at one depth."""

    writes_s: Spread
    p50_us: Spread
    p99_us: Spread
    waits: Spread
    """Times that writes were held for a bit, for each 1000 writes."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a run found."""

    rounds: int
    resync_mib_s: dict[str, Spread]
    intents: dict[str, Intent]
    intent_disk: dict[str, Any]
    """``directory``, ``file_system``, ``regions``, ``seconds`` of each sample, ``engine``."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def measure(options: Options, progress: Callable[[str], None]) -> Found:
    """Run it all. Nothing is left in the directories."""
    engine = choose_engine(options.engine)
    with scratch_directory(options.directory) as directory:
        rates = _resyncs(directory, options, progress)
    with scratch_directory(options.disk_directory) as directory:
        where = {
            "directory": str(options.disk_directory),
            "file_system": file_system(directory),
            "regions": -(-options.intent_size // REGION),
            "seconds": options.seconds,
            "engine": engine.name,
        }
        intents = _intents(directory, options, engine, progress)
    return Found(options.rounds, rates, intents, where)


def show(console: Console, options: Options, json_path: str | None) -> None:
    """Measure and print, as tables or as JSON."""
    found = measure(options, lambda what: console.print(what, style="dim") if json_path is None else None)
    if json_path == "-":
        print(found.to_json())
        return
    if json_path is not None:
        Path(json_path).write_text(found.to_json() + "\n", encoding="utf-8")
    table = Table("", "MiB/s", box=None, header_style="bold")
    for name, rate in found.resync_mib_s.items():
        table.add_row(name, str(rate))
    console.print(table)
    where = found.intent_disk
    title = f"4 KiB at random over {where['regions']} regions, {where['file_system']}"
    table = Table(title, "writes/s", "p50 µs", "p99 µs", "waits in 1000", box=None, header_style="bold")
    for name, one in found.intents.items():
        table.add_row(name, *map(str, (one.writes_s, one.p50_us, one.p99_us, one.waits)))
    console.print(table)
    console.print(f"median of {found.rounds} rounds (lowest to highest)", style="dim")


def file_system(directory: Path) -> str:
    """``ext4 on /dev/sda1``: what holds the directory."""
    there = directory.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if there.is_relative_to(part.mountpoint)]
    if not mounts:
        return "unknown"
    mount = max(mounts, key=lambda part: len(part.mountpoint))
    return f"{mount.fstype} on {mount.device}"


# Resync


def _resyncs(directory: Path, options: Options, progress: Callable[[str], None]) -> dict[str, Spread]:
    half = options.size // 2
    noise = memoryview(os.urandom(MIB))
    with Pair.create(directory / "p", PairOptions(size=options.size, mode="async", overrides=OPTIONS)) as pair:
        pair.up()
        pair.wait_protected()
        uri = str(pair.status()["primary"]["nbd_uri"])
        _write(uri, half, noise)  # the disk has its blocks: all that is measured overwrites
        pair.checkpoint()
        measures: dict[str, Callable[[], float]] = {
            "raw stream": partial(_raw_stream, pair, uri, half, noise),
            "resync, dirty bits": partial(_after_a_death, pair, uri, half, noise),
            "resync, checksums": lambda: half / MIB / float(pair.resync(full=True)["seconds"]),
        }
        if shutil.which("nbdcopy") is not None:
            measures["nbdcopy"] = partial(_nbdcopy, uri, directory / "copy.raw", half)
        samples: dict[str, list[float]] = {name: [] for name in measures}
        for number in range(options.rounds):
            for name in _turned(list(measures), number):
                progress(f"round {number + 1}: {name}")
                samples[name].append(measures[name]())
    return {name: Spread.of(found) for name, found in samples.items()}


def _turned(names: list[str], number: int) -> list[str]:
    """Another one first in each round."""
    first = number % len(names)
    return names[first:] + names[:first]


def _write(uri: str, length: int, noise: memoryview) -> None:
    with NbdClient(uri) as client:
        client.write_many(((offset, noise) for offset in range(0, length, MIB)), depth=8)


def _raw_stream(pair: Pair, uri: str, length: int, noise: memoryview) -> float:
    started = time.perf_counter()
    _write(uri, length, noise)
    pair.checkpoint()
    return length / MIB / (time.perf_counter() - started)


def _nbdcopy(uri: str, target: Path, counted: int) -> float:
    parts = urlsplit(uri)
    started = time.perf_counter()
    subprocess.run(["nbdcopy", f"{parts.scheme}://{parts.path}?{parts.query}", str(target)], check=True)
    seconds = time.perf_counter() - started
    target.unlink()
    return counted / MIB / seconds


def _after_a_death(pair: Pair, uri: str, length: int, noise: memoryview) -> float:
    """MiB/s of a resync of ``length`` bytes, from the first that moved to the end."""
    os.kill(pair.status()["secondary"]["pid"], signal.SIGKILL)
    client = pair.client("primary")
    _until(lambda: client.call("status")["state"] == "alone")
    _write(uri, length, noise)
    before = int(client.call("status")["counters"]["resync_moved_bytes"])
    starter = threading.Thread(target=pair.up)  # a resync may be over before it returns
    starter.start()
    seen: list[tuple[float, int]] = []

    def over() -> bool:
        status = client.call("status")
        seen.append((time.perf_counter(), int(status["counters"]["resync_moved_bytes"]) - before))
        return status["state"] == "protected" and seen[-1][1] > 0

    _until(over)
    starter.join()
    begun = max((when for when, moved in seen if moved == 0), default=seen[0][0])
    return seen[-1][1] / MIB / (seen[-1][0] - begun)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimedOut(f"The pair did not get there within {PATIENCE_S:g} s.")
        time.sleep(0.002)


# The write-intent bitmap


def _intents(directory: Path, options: Options, engine: Engine, progress: Callable[[str], None]) -> dict[str, Intent]:
    """Two pairs in turns, each depth in each round, the same blocks for both."""
    pairs: dict[str, Pair] = {}
    samples: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {}
    try:
        for number, (name, kept) in enumerate(KINDS.items()):
            made = PairOptions(size=options.intent_size, assume_synced=True, overrides={"write_intent": kept})
            pairs[name] = Pair.create(directory / f"w{number}", made)
            pairs[name].up()
            pairs[name].wait_protected()
        for number in range(options.rounds):
            for depth in DEPTHS:
                for name in _turned(list(pairs), number):
                    progress(f"round {number + 1}: {name}, depth {depth}")
                    found = _random_writes(pairs[name], depth, 100 * number + depth, directory, options, engine)
                    samples.setdefault((name, depth), []).append(found)
    finally:
        for pair in pairs.values():
            pair.down(purge=True)
    return {
        f"{name}, depth {depth}": Intent(*map(Spread.of, map(list, zip(*samples[name, depth], strict=True))))
        for depth in DEPTHS
        for name in KINDS
    }


def _random_writes(
    pair: Pair, depth: int, seed: int, directory: Path, options: Options, engine: Engine
) -> tuple[float, float, float, float]:
    """Writes a second, percentiles in microseconds, waits in 1000 writes; nothing is on its way before."""
    pair.checkpoint()
    before = pair.status()
    load = Load("random", 0, 4 * KIB, depth)
    uri = str(before["primary"]["nbd_uri"])
    stream = Stream(load, uri, options.intent_size, options.seconds, seed=seed)
    (figures,) = engine.run([stream], directory)
    waits = pair.status()["counters"]["primary"]["intent_waits"] - before["counters"]["primary"]["intent_waits"]
    return figures.iops, figures.p50_us, figures.p99_us, 1000 * waits / max(1, figures.requests)
