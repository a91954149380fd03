"""`tandemdisk bench --hosts netns`: replication across a network, beside what the same network carries without it.

    link         plain TCP, plain ZeroMQ, ZeroMQ with CURVE, each in the same run over the same cable
    throughput   what arrived at the secondary: async and sync, CURVE on and off, one volume and four
    compression  the same, async with CURVE, zstd on and off, for contents that compress to a third and that do not
    latency      one write of 4 KiB at a time: sync, async, and the same primary once its secondary is gone
    resync       half of the disk, written while the cable was cut
    growth       volumes 1 → 8, disk size, dirty set: throughput, CPU, checkpoint

Rates are taken at the receiver, for both sides of the comparison: bytes of payload over the time in which they came.
What a window holds back at the sender does not count as sent.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from common.child import python_command, python_environment
from common.control import ControlClient
from common.errors import OperationFailed, TandemDiskError, TimedOut
from common.limits import KIB, MIB
from common.settings import Compression, Mode
from deploy.bench import scratch
from deploy.bench.engines import Engine, Figures, Stream
from deploy.bench.runner import environment
from deploy.bench.servers import cpu_seconds, die_with_parent
from deploy.bench.workloads import Load
from deploy.faults import Cut
from deploy.hosts import NetnsHosts, parse_rate, rate_bits
from deploy.layout import PairOptions
from deploy.pair import Pair

FORMAT: Final = 1
RATES: Final = ("100mbit", "1gbit", "unlimited")
RAW_PORT: Final = 10900
RAW_KINDS: Final = ("tcp", "zeromq", "curve")
SETTLE_TIMEOUT_S: Final = 90.0
SAMPLE_S: Final = 0.05
"""Between looks at what arrived; each costs the secondary about a millisecond of its CPU."""
LARGEST: Final = 1024 * MIB
"""Of the disks that are made to see what size costs."""

LARGE: Final = Load("random", 0, 64 * KIB, 16)
SMALL: Final = Load("random", 0, 4 * KIB, 32)
SINGLE: Final = Load("random", 0, 4 * KIB, 1)


PAIRS: Final[tuple[tuple[Mode, bool, int], ...]] = (
    ("async", False, 1), ("sync", False, 1), ("async", True, 1), ("sync", True, 1), ("async", True, 4),
    ("sync", True, 4),
)  # fmt: skip
"""Mode, CURVE, volumes."""
_PLAINEST: Final[tuple[Mode, bool, int]] = ("async", True, 1)
"""The pair that resync and compression are measured with."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure."""

    rates: tuple[str, ...] = RATES
    seconds: float = 3.0
    rounds: int = 3
    """Of each throughput; the median counts."""
    size: int = 256 * MIB
    growth: bool = True
    directory: str = "/dev/shm"
    pairs: tuple[tuple[Mode, bool, int], ...] = PAIRS
    compression: bool = True
    """Beside the pair that is async with CURVE."""
    dirty_s: float = 4.0
    """A resync is given as much to do as a limited link carries in this time."""
    load_bytes: int | None = None
    """The most that one load of a throughput writes: what waits for a slow link takes long to settle."""


def short(options: Options, *, seconds: float | None = None, rounds: int | None = None) -> Options:
    """What a look of ten or twenty seconds at each of ``options.rates`` takes."""
    return dataclasses.replace(
        options, seconds=seconds or 0.5, rounds=rounds or 1, growth=False, pairs=(_PLAINEST, ("sync", True, 1)),
        dirty_s=0.7, load_bytes=16 * MIB,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LinkSample:
    """The link without us."""

    rate: str
    kind: str
    mib_s: float


@dataclass(frozen=True, slots=True)
class ThroughputSample:
    """Writes of 64 KiB, 16 in flight a volume."""

    rate: str
    mode: str
    curve: bool
    volumes: int
    mib_s: float
    share: float
    """Of what plain TCP carried."""
    cpu_s_per_gib: float


@dataclass(frozen=True, slots=True)
class CompressionSample:
    """Writes of 64 KiB, async, CURVE; ``mib_s`` counts what was written, not what travelled."""

    rate: str
    compression: str
    compressible: bool
    mib_s: float
    cpu_s_per_gib: float
    ratio: float
    """What was written to what travelled."""


@dataclass(frozen=True, slots=True)
class LatencySample:
    """Writes of 4 KiB, one at a time; ``mode`` alone: the same primary without a secondary."""

    rate: str
    mode: str
    curve: bool
    p50_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class ResyncSample:
    """From the healing of the cable to ``protected``."""

    rate: str
    dirty_bytes: int
    seconds: float
    mib_s: float
    share: float


@dataclass(frozen=True, slots=True)
class GrowthSample:
    """Random 4 KiB writes, 32 in flight, sync; ``axis`` is volumes, size or dirty."""

    axis: str
    value: int
    iops: float
    cpu_s_per_gib: float
    checkpoint_s: float


@dataclass(slots=True)
class HostsRun:
    """A whole run."""

    environment: dict[str, str]
    options: dict[str, Any]
    links: list[LinkSample] = field(default_factory=list)
    throughput: list[ThroughputSample] = field(default_factory=list)
    compression: list[CompressionSample] = field(default_factory=list)
    latency: list[LatencySample] = field(default_factory=list)
    resyncs: list[ResyncSample] = field(default_factory=list)
    growth: list[GrowthSample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def raw(self, rate: str, kind: str) -> float:
        """MiB/s of the link by itself; 0.0 if it was not measured."""
        return next((s.mib_s for s in self.links if (s.rate, s.kind) == (rate, kind)), 0.0)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "kind": "hosts", **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> HostsRun:
        """What ``to_json`` wrote (of the same FORMAT)."""
        raw = json.loads(text)
        assert (raw.pop("format"), raw.pop("kind")) == (FORMAT, "hosts")
        records = {"links": LinkSample, "throughput": ThroughputSample, "latency": LatencySample,
                   "compression": CompressionSample, "resyncs": ResyncSample, "growth": GrowthSample}  # fmt: skip
        for name, record in records.items():
            raw[name] = [record(**sample) for sample in raw[name]]
        return cls(**raw)


def measure_link(hosts: NetnsHosts, kind: str, seconds: float) -> float:
    """MiB/s from host a to host b."""
    address = hosts.hosts["b"].address
    command = python_command("deploy.bench.raw")
    environ = python_environment()
    receiver = subprocess.Popen(
        [*hosts.hosts["b"].prefix(), *command, "receive", kind, address, str(RAW_PORT)],
        stdout=subprocess.PIPE, text=True, env=environ, preexec_fn=die_with_parent,
    )  # fmt: skip
    assert receiver.stdout is not None
    try:
        if receiver.stdout.readline().strip() != "ready":
            raise OperationFailed(f"The receiver of the {kind} probe did not start.")
        subprocess.run(
            [*hosts.hosts["a"].prefix(), *command, "send", kind, address, str(RAW_PORT), str(seconds)],
            env=environ, timeout=seconds + SETTLE_TIMEOUT_S, check=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        told = json.loads(receiver.communicate(timeout=SETTLE_TIMEOUT_S)[0])
    except (subprocess.SubprocessError, ValueError) as error:
        raise OperationFailed(f"The {kind} probe failed: {error}") from error
    finally:
        receiver.kill()
        receiver.wait()
        receiver.stdout.close()
    return float(told["bytes"]) / MIB / float(told["seconds"])


class Arrivals:
    """What arrives at the secondary over time, sampled beside a load."""

    def __init__(self, secondary: ControlClient) -> None:
        self._secondary = secondary
        self._points: list[tuple[float, int]] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="arrivals")

    def __enter__(self) -> Arrivals:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ending.set()
        self._thread.join()

    def _look(self) -> None:
        payload = int(self._secondary.call("status")["counters"]["payload_bytes"])
        self._points.append((time.perf_counter(), payload))

    def _sample(self) -> None:
        while not self._ending.wait(SAMPLE_S):
            try:
                self._look()
            except TandemDiskError:
                continue  # the secondary is busy or gone; the load's own result says what that means

    @property
    def bytes(self) -> int:
        return self._points[-1][1] - self._points[0][1]

    def mib_s(self) -> float:
        """While it flowed: the look before which the flow had ended does not count, if there are enough of them."""
        growing = [now for last, now in zip(self._points, self._points[1:], strict=False) if now[1] > last[1]]
        if len(growing) < 2:
            return 0.0
        (begun, first), (ended, last) = growing[0], growing[-2 if len(growing) > 4 else -1]
        return (last - first) / MIB / (ended - begun)


class Bench:
    """A run: the hosts stay up for all of it, pairs come and go."""

    def __init__(self, options: Options, engine: Engine, progress: Callable[[str], None]) -> None:
        self._options = options
        self._engine = engine
        self._progress = progress
        self.found = HostsRun(environment(engine), dataclasses.asdict(options))
        self._directory = Path()
        self._hosts = NetnsHosts()

    def run(self) -> HostsRun:
        """Everything; what failed is a sentence in ``failures``. Namespaces and disks are gone afterwards."""
        begun = time.monotonic()
        options = self._options
        with scratch.scratch_directory(Path(options.directory)) as self._directory, self._hosts:
            scratch.require_space(self._directory, 4 * options.size)
            for rate in options.rates:
                self._try(f"{rate}: the link itself", functools.partial(self._link, rate))
            for mode, curve, volumes in options.pairs:
                what = f"{mode}, CURVE {'on' if curve else 'off'}, {volumes} volume(s)"
                self._try(what, functools.partial(self._pair, mode, curve, volumes))
                if options.compression and (mode, curve, volumes) == _PLAINEST:
                    self._try("compression", self._zstd)
            if options.growth:
                self._growth()
        self.found.seconds = time.monotonic() - begun
        return self.found

    def _try(self, what: str, work: Callable[[], None]) -> None:
        self._progress(what)
        try:
            work()
        except (TandemDiskError, OSError, subprocess.SubprocessError) as error:
            self.found.failures.append(f"{what}: {error}")

    def _set_rate(self, rate: str) -> None:
        self._hosts.set_rate(parse_rate(rate))

    def _link(self, rate: str) -> None:
        self._set_rate(rate)
        for kind in RAW_KINDS:
            measured = [measure_link(self._hosts, kind, self._options.seconds) for _ in range(self._options.rounds)]
            self.found.links.append(LinkSample(rate, kind, statistics.median(measured)))

    # Pairs

    @contextmanager
    def _running(
        self, mode: Mode, curve: bool, volumes: int, size: int, compression: Compression = "off"
    ) -> Iterator[Pair]:
        """A protected pair on the hosts, ``size`` bytes over all volumes; the cable is unlimited while it starts."""
        self._set_rate("unlimited")
        place = self._directory / "place"
        place.mkdir()
        directory = place / "pair"
        disks = [[place / f"{side}{i}.raw" for i in range(volumes)] for side in "ab"]
        scratch.fill([disk for side in disks for disk in side], size // volumes)
        options = PairOptions(
            primary_disks=tuple(disks[0]),
            secondary_disks=tuple(disks[1]),
            assume_synced=True,
            mode=mode,
            buffer_bytes=max(2 * size, 128 * MIB),
            hosts=f"netns:{self._hosts.tag}",
            encrypt=curve,
            compression=compression,
            overrides={
                "buffer": {"directory": str(place / "buffer")},
                "replication": {"heartbeat_s": 0.5, "peer_timeout_s": 2.0},  # so that a cut is soon noticed
            },
        )
        try:
            with Pair.create(directory, options) as pair:
                pair.up()
                pair.wait_protected()
                yield pair
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _pair(self, mode: Mode, curve: bool, volumes: int) -> None:
        """All of one pair: throughput and latency at every rate; for the plainest one also resync and being alone."""
        with self._running(mode, curve, volumes, self._options.size) as pair:
            for rate in self._options.rates:
                self._set_rate(rate)
                self._throughput(pair, rate, mode, curve, volumes)
                if volumes == 1:
                    self._latency(pair, rate, mode, curve)
                if (mode, curve, volumes) == _PLAINEST:
                    self._compressed(pair, rate, "off")
                    self._resync(pair, rate)
            if volumes == 1 and mode == "sync":
                os.kill(pair.status()["secondary"]["pid"], signal.SIGKILL)
                pair.wait_for(lambda now: now["primary"]["state"] == "alone", "alone", 30)
                self._latency(pair, "none", "alone", curve)

    def _zstd(self) -> None:
        """The plainest pair once more, right after the one without: what else the machine does is the same for both."""
        with self._running(*_PLAINEST, self._options.size, "zstd") as pair:
            for rate in self._options.rates:
                self._set_rate(rate)
                self._compressed(pair, rate, "zstd")

    def _compressed(self, pair: Pair, rate: str, compression: Compression) -> None:
        if self._options.compression:
            for compressible in (True, False):
                self._contents(pair, rate, compression, compressible)

    def _contents(self, pair: Pair, rate: str, compression: Compression, compressible: bool) -> None:
        what = "compressible" if compressible else "incompressible"
        self._progress(f"{rate}: compression {compression}, {what} contents")
        rates, costs, ratios = [], [], []
        for _ in range(self._options.rounds):
            before = pair.status()["compression"]
            _, arrivals, used = self._load(pair, LARGE, compressible)
            after = pair.status()["compression"]
            rates.append(arrivals.mib_s())
            costs.append(used / (arrivals.bytes / (1 << 30)) if arrivals.bytes else 0.0)
            travelled = after["wire_bytes"] - before["wire_bytes"] if after else 0
            ratios.append((after["original_bytes"] - before["original_bytes"]) / travelled if travelled else 1.0)
        figures = (statistics.median(each) for each in (rates, costs, ratios))
        self.found.compression.append(CompressionSample(rate, compression, compressible, *figures))

    def _streams(self, pair: Pair, load: Load, seconds: float, part: float = 1.0) -> list[Stream]:
        """One for each volume, over ``part`` of it: at least a block."""
        volumes = pair.status()["volumes"]
        lengths = [max(1, int(volume["size"] * part) // load.block) * load.block for volume in volumes]
        return [
            Stream(load, volume["primary_uri"], length, seconds, seed=n)
            for n, (volume, length) in enumerate(zip(volumes, lengths, strict=True), 1)
        ]

    def _settle(self, pair: Pair) -> None:
        primary = pair.client("primary")
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while primary.call("status")["lag"]["bytes"]:
            if time.monotonic() > deadline:
                raise TimedOut(f"Settling did not happen within {SETTLE_TIMEOUT_S:g} s.")
            time.sleep(SAMPLE_S)

    def _load(self, pair: Pair, load: Load, compressible: bool = False) -> tuple[list[Figures], Arrivals, float]:
        """Figures of the clients, what arrived, and the CPU seconds that all processes used."""
        pair.checkpoint()
        status = pair.status()
        pids = (status["primary"]["pid"], status["secondary"]["pid"])
        with Arrivals(pair.client("secondary")) as arrivals:
            before = sum(map(cpu_seconds, pids))
            streams = self._streams(pair, load, self._options.seconds)
            most = self._options.load_bytes and self._options.load_bytes // len(streams)
            streams = [dataclasses.replace(stream, compressible=compressible, io_bytes=most) for stream in streams]
            figures = self._engine.run(streams, self._directory)
            self._settle(pair)
            used = sum(map(cpu_seconds, pids)) - before
        return figures, arrivals, used

    def _throughput(self, pair: Pair, rate: str, mode: Mode, curve: bool, volumes: int) -> None:
        self._progress(f"{rate}: {mode}, CURVE {'on' if curve else 'off'}, {volumes} volume(s), throughput")
        rates, costs = [], []
        for _ in range(self._options.rounds):
            _, arrivals, used = self._load(pair, LARGE)
            rates.append(arrivals.mib_s())
            costs.append(used / (arrivals.bytes / (1 << 30)) if arrivals.bytes else 0.0)
        mib_s, raw = statistics.median(rates), self.found.raw(rate, "tcp")
        share = mib_s / raw if raw else 0.0
        self.found.throughput.append(
            ThroughputSample(rate, mode, curve, volumes, mib_s, share, statistics.median(costs))
        )

    def _latency(self, pair: Pair, rate: str, mode: str, curve: bool) -> None:
        self._progress(f"{rate}: {mode}, CURVE {'on' if curve else 'off'}, latency")
        (figures,) = self._engine.run(self._streams(pair, SINGLE, min(2.0, self._options.seconds)), self._directory)
        self.found.latency.append(LatencySample(rate, mode, curve, figures.p50_us, figures.p99_us))
        if mode != "alone":
            self._settle(pair)

    def _resync(self, pair: Pair, rate: str) -> None:
        """Dirty the disk while the cable is cut; the time from healing until the pair is protected again."""
        self._progress(f"{rate}: resync")
        limit = parse_rate(rate)
        part = min(0.5, rate_bits(limit) / 8 * self._options.dirty_s / self._options.size) if limit else 0.5
        with Cut(self._hosts):
            pair.wait_for(lambda now: now["primary"]["state"] == "alone", "alone", 30)
            sequential = Load("sequential", 0, MIB, 8)
            (stream,) = self._streams(pair, sequential, 60.0, part)
            self._engine.run([dataclasses.replace(stream, io_bytes=stream.size)], self._directory)
        begun = time.perf_counter()
        with Arrivals(pair.client("secondary")) as arrivals:
            pair.wait_protected(SETTLE_TIMEOUT_S)
            seconds = time.perf_counter() - begun
        mib_s, raw = arrivals.mib_s(), self.found.raw(rate, "tcp")
        self.found.resyncs.append(ResyncSample(rate, arrivals.bytes, seconds, mib_s, mib_s / raw if raw else 0.0))

    # Growth

    def _growth(self) -> None:
        size = self._options.size
        for volumes in (1, 2, 4, 8):
            self._try(f"growth: {volumes} volume(s)", functools.partial(self._grown, "volumes", volumes, volumes, size))
        for each in sorted({size // 4, size, max(size, min(4 * size, LARGEST))}):
            self._try(f"growth: {each // MIB} MiB", functools.partial(self._grown, "size", each, 1, each))
        self._try("growth: dirty set", self._dirty_sets)

    def _grown(self, axis: str, value: int, volumes: int, size: int) -> None:
        scratch.require_space(self._directory, 4 * size)
        with self._running("sync", True, volumes, size) as pair:
            depth = dataclasses.replace(SMALL, depth=SMALL.depth // volumes)
            figures, arrivals, used = self._load(pair, depth)
            iops = sum(one.iops for one in figures)
            checkpoints = [pair.checkpoint().seconds for _ in range(9)]
            gib = arrivals.bytes / (1 << 30)
            self.found.growth.append(
                GrowthSample(axis, value, iops, used / gib if gib else 0.0, statistics.median(checkpoints))
            )

    def _dirty_sets(self) -> None:
        with self._running("sync", True, 1, self._options.size) as pair:
            for percent in (1, 10, 50, 100):
                (stream,) = self._streams(pair, Load("sequential", 0, MIB, 8), 60.0, percent / 100)
                taken = []
                for _ in range(3):
                    (figures,) = self._engine.run([dataclasses.replace(stream, io_bytes=stream.size)], self._directory)
                    taken.append(pair.checkpoint().seconds)
                self.found.growth.append(
                    GrowthSample("dirty", stream.size, figures.iops, 0.0, statistics.median(taken))
                )
