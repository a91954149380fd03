"""The run: all peers up, jobs in rounds, each job on all peers in turn, then the probes; bounded, always cleaned up."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import psutil

from common.errors import TandemDiskError
from deploy.bench import probes, scratch, servers
from deploy.bench.engines import Engine, Figures, Stream
from deploy.bench.peers import Failover, Peer, make_peer, tool_versions
from deploy.bench.results import PeerFacts, Run, Sample
from deploy.bench.servers import Memory
from deploy.bench.workloads import BY_NAME, WARM_UP, Job, Load

WARM_UP_S: Final = 0.5
PROBE_ROUNDS: Final = 3
BUSY_LOAD: Final = 0.3
"""Load average a CPU from which on other work shows in the figures."""
_PEER_ERRORS: Final = (TandemDiskError, OSError, subprocess.SubprocessError, psutil.Error)


@dataclass(frozen=True, slots=True)
class Options:
    """What to run; ``peers`` are names of single peers (see peers.PEERS)."""

    peers: tuple[str, ...]
    jobs: tuple[str, ...]
    rounds: int
    seconds: float
    """Of each job."""
    size: int
    """Of each disk, in bytes."""
    directory: str
    """On a memory file system: disks, buffers and sockets go there."""
    limit_s: float
    """When this much time is gone no further job begins; the report is made from what is there."""
    probes: bool = True


class Runner:
    """One run. ``progress`` is told what happens next, in a few words."""

    def __init__(self, options: Options, engine: Engine, progress: Callable[[str], None]) -> None:
        self._options = options
        self._engine = engine
        self._progress = progress
        self._up: list[Peer] = []
        self._directory = Path()
        self._deadline = 0.0
        self._peaks: dict[str, dict[str, Memory]] = {}
        self.found = Run(environment(engine), asdict(options))

    def run(self) -> Run:
        """Everything, in order; what cannot be had is a sentence in ``failures``, never an exception of a peer."""
        begun = time.monotonic()
        self._deadline = begun + self._options.limit_s
        self._note_other_work()
        footprint = sum(make_peer(name).footprint(self._options.size) for name in self._options.peers)
        with scratch.scratch_directory(Path(self._options.directory)) as self._directory:
            scratch.require_space(self._directory, footprint)
            try:
                self._start_peers()
                self._rounds()
                if self._options.probes:
                    self._checkpoint_probes()
                self._take_facts()
                self._stop_peers()
                if self._options.probes:
                    self._probes_of_fresh_peers()
            finally:
                self._stop_peers()
        self.found.seconds = time.monotonic() - begun
        return self.found

    def _note_other_work(self) -> None:
        """Ratios of neighbours bear a busy machine, figures do not: say that it was busy."""
        load = os.getloadavg()[0]
        if load > BUSY_LOAD * len(os.sched_getaffinity(0)):
            sentence = f"The machine was busy with other work when the run began: its load average was {load:.1f}."
            self.found.failures.append(sentence)

    def _start_peers(self) -> None:
        for name in self._options.peers:
            peer = make_peer(name)
            self._progress(f"{peer.title}: start")
            self.found.peers.append(PeerFacts(peer.name, peer.title, peer.replicated))
            with self._dropping(peer):
                self._up.append(peer)
                peer.start(self._directory / name, self._options.size)
                self._engine.run([self._stream(peer, WARM_UP, seconds=WARM_UP_S)], self._directory)

    def _stop_peers(self) -> None:
        while self._up:
            self._up.pop().stop()

    @contextlib.contextmanager
    def _dropping(self, peer: Peer) -> Iterator[None]:
        """A peer that fails is stopped, its failure noted, and the others go on."""
        try:
            yield
        except _PEER_ERRORS as error:
            self.found.failures.append(f"{peer.title}: {error}")
            self._progress(f"{peer.title}: failed, left out from here on")
            if peer in self._up:
                self._up.remove(peer)
            peer.stop()

    def _time_is_up(self, what: str) -> bool:
        if time.monotonic() < self._deadline:
            return False
        self.found.failures.append(f"Left out because the run's time was up: {what}.")
        return True

    def _stream(self, peer: Peer, load: Load, *, seconds: float, io_bytes: int | None = None, seed: int = 1) -> Stream:
        uri = peer.uri if load.target == "primary" else peer.guest_uri
        return Stream(load, uri, peer.size, seconds, io_bytes, seed)

    def _rounds(self) -> None:
        for number in range(1, self._options.rounds + 1):
            for name in self._options.jobs:
                if self._time_is_up(f"round {number} from {name} on"):
                    return
                # Each job begins with another peer each round, so that nobody always follows the same neighbour.
                first = number % len(self._up) if self._up else 0
                for peer in [*self._up[first:], *self._up[:first]]:
                    job = BY_NAME[name]
                    if job.replicated_only and not peer.replicated:
                        continue
                    self._progress(f"round {number} of {self._options.rounds}: {job.title} · {peer.title}")
                    with self._dropping(peer):
                        self.found.samples.append(self._sample(number, job, peer))

    def _sample(self, number: int, job: Job, peer: Peer) -> Sample:
        io_bytes = None if job.disk_part is None else probes.whole_mib(peer.size * job.disk_part)
        checkpoint_s = None
        if job.repeats is not None:
            io_bytes = self._bytes_of(number, job.repeats, peer)
        elif peer.replicated:
            begun = time.perf_counter()
            peer.checkpoint()
            checkpoint_s = time.perf_counter() - begun
        loads = [job.load, *([job.beside] if job.beside else [])]
        seconds = self._options.seconds
        streams = [self._stream(peer, load, seconds=seconds, io_bytes=io_bytes, seed=number) for load in loads]
        before = {name: servers.cpu_seconds(pid) for name, pid in peer.pids().items()}
        figures = self._engine.run(streams, self._directory)
        ended = time.perf_counter()
        peer.settle()
        settle_s = time.perf_counter() - ended
        used = {name: servers.cpu_seconds(pid) - before.get(name, 0.0) for name, pid in peer.pids().items()}
        self._note_memory(peer)
        beside: Figures | None = figures[1] if job.beside else None
        return Sample(number, job.name, peer.name, figures[0], beside, checkpoint_s, settle_s, used)

    def _bytes_of(self, number: int, job: str, peer: Peer) -> int:
        for sample in reversed(self.found.samples):
            if (sample.round, sample.job, sample.peer) == (number, job, peer.name):
                return sample.figures.bytes
        return probes.whole_mib(peer.size * (BY_NAME[job].disk_part or 1.0))

    def _note_memory(self, peer: Peer) -> None:
        peaks = self._peaks.setdefault(peer.name, {})
        for name, pid in peer.pids().items():
            held = servers.memory(pid)
            if held is None:
                continue
            peaks[name] = held.most(peaks.get(name, held))

    def _take_facts(self) -> None:
        up = {peer.name: peer for peer in self._up}
        for facts in self.found.peers:
            facts.memory = self._peaks.get(facts.name, {})
            if peer := up.get(facts.name):
                facts.commands = [command.replace(str(self._directory), "DIR") for command in peer.commands()]
                facts.bounds = peer.memory_bounds()

    def _checkpoint_probes(self) -> None:
        """Over the dirty set, on the peers that are up."""
        for _ in range(PROBE_ROUNDS):
            for dirty in probes.dirty_sets(self._options.size, self._options.size):
                if self._time_is_up("checkpoints over the dirty set"):
                    return
                self._checkpoint_of_each([peer for peer in self._up if peer.replicated], dirty)

    def _checkpoint_of_each(self, peers: Sequence[Peer], dirty: int) -> None:
        for peer in peers:
            self._progress(f"checkpoint with {dirty >> 20} MiB dirty of {peer.size >> 20} · {peer.title}")
            with self._dropping(peer):
                self.found.checkpoints.append(self._prober(peer).checkpoint(dirty))

    def _prober(self, peer: Peer) -> probes.Prober:
        return probes.Prober(self._engine, self._directory, peer)

    def _probes_of_fresh_peers(self) -> None:
        """Checkpoints over the disk size, and failovers: each on a pair of its own."""
        names = [facts.name for facts in self.found.peers if facts.replicated]
        for part in probes.SIZE_PARTS:
            size = probes.whole_mib(self._options.size * part)
            for name in names:
                if self._time_is_up("checkpoints over the disk size"):
                    return
                self._on_fresh(name, size, self._checkpoints_at_size)
        size = probes.whole_mib(self._options.size * probes.FAILOVER_SIZE_PART)
        for _ in range(self._options.rounds):
            for name in names:
                for target in make_peer(name).failovers:
                    if self._time_is_up("failovers"):
                        return
                    self._progress(f"failover to {target} · {self.found.title(name)}")
                    self._on_fresh(name, size, functools.partial(self._failover, target))

    def _on_fresh(self, name: str, size: int, work: Callable[[Peer], None]) -> None:
        peer = make_peer(name)
        try:
            with self._dropping(peer):
                peer.start(self._directory / f"{name}-{size}", size)
                work(peer)
        finally:
            peer.stop()

    def _checkpoints_at_size(self, peer: Peer) -> None:
        for _ in range(PROBE_ROUNDS):
            for dirty in probes.dirty_sets(peer.size, self._options.size):
                self._checkpoint_of_each([peer], dirty)

    def _failover(self, target: Failover, peer: Peer) -> None:
        self.found.failovers.append(self._prober(peer).failover(target))


def environment(engine: Engine) -> dict[str, str]:
    """What the figures depend on, for the report."""
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "CPUs": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total >> 30} GiB",
        "Python": platform.python_version(),
        "engine": engine.name,
        **tool_versions(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
