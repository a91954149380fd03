"""The runner's ways with peers that fail and time that runs out, and the scratch directory's with killed runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.errors import ConfigError, NoSpaceError, OperationFailed
from deploy.bench import peers, runner, scratch
from deploy.bench.engines import Figures, Stream
from deploy.bench.peers import Peer
from deploy.bench.runner import Options, Runner

MIB = 1 << 20


class InstantEngine:
    """Answers at once; fails for the URIs in ``broken``."""

    name = "instant"

    def __init__(self, *broken: str) -> None:
        self.broken = broken
        self.asked: list[Stream] = []

    def run(self, streams: Sequence[Stream], directory: Path) -> list[Figures]:
        self.asked += streams
        if any(stream.uri in self.broken for stream in streams):
            raise OperationFailed("It broke.")
        return [Figures(100, stream.io_bytes or 100 * stream.load.block, 1.0, 1.0, 2.0, 3.0) for stream in streams]


class PaperPeer(Peer):
    """A peer without processes."""

    replicated = True
    stopped: list[str]

    def start(self, directory: Path, size: int) -> None:
        super().start(directory, size)
        self.uri = self.guest_uri = f"paper://{self.name}"

    def checkpoint(self) -> None:
        self.checkpoints = getattr(self, "checkpoints", 0) + 1

    def stop(self) -> None:
        self.stopped.append(self.name)
        super().stop()


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "BUSY_LOAD", float("inf"))


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the paper peers that were stopped; two of them, ``left`` and ``right``, are all there is."""
    names: list[str] = []

    def make(name: str) -> peers.Maker:
        def made() -> Peer:
            peer = PaperPeer(name, name)
            peer.stopped = names
            return peer

        return made

    monkeypatch.setattr(peers, "PEERS", {name: make(name) for name in ("left", "right")})
    return names


def options(directory: Path, **changes: object) -> Options:
    chosen: dict[str, object] = {
        "peers": ("left", "right"),
        "jobs": ("write-4k-d32", "first-touch", "again"),
        "rounds": 2,
        "seconds": 1.0,
        "size": 64 * MIB,
        "directory": str(directory),
        "limit_s": 100.0,
        "probes": False,
    }
    return Options(**{**chosen, **changes})  # type: ignore[arg-type]


def quiet(_: str) -> None:
    pass


def test_every_job_runs_on_every_peer_in_every_round(tmp_path: Path, stopped: list[str]) -> None:
    run = Runner(options(tmp_path), InstantEngine(), quiet).run()
    order = [(sample.round, sample.job, sample.peer) for sample in run.samples]
    assert len(order) == len(set(order)) == 2 * 3 * 2
    assert [peer for _, _, peer in order[:2]] == ["right", "left"]  # another one begins each round
    assert [peer for _, _, peer in order[6:8]] == ["left", "right"]
    assert sorted(stopped) == ["left", "right"]
    assert list(tmp_path.iterdir()) == []


def test_again_asks_for_the_very_bytes_of_first_touch(tmp_path: Path, stopped: list[str]) -> None:
    engine = InstantEngine()
    Runner(options(tmp_path, peers=("left",), rounds=1), engine, quiet).run()
    first, again = engine.asked[-2:]
    assert (first.io_bytes, again.io_bytes) == (32 * MIB, 32 * MIB)
    assert (first.seed, first.load) == (again.seed, again.load)


def test_a_peer_that_fails_is_left_out_and_said_so(tmp_path: Path, stopped: list[str]) -> None:
    run = Runner(options(tmp_path), InstantEngine("paper://left"), quiet).run()
    assert {sample.peer for sample in run.samples} == {"right"}
    assert run.failures == ["left: It broke."]
    assert sorted(stopped) == ["left", "right"]


def test_no_job_begins_when_the_time_is_up(tmp_path: Path, stopped: list[str]) -> None:
    run = Runner(options(tmp_path, limit_s=0.0), InstantEngine(), quiet).run()
    assert run.samples == []
    assert "time was up" in run.failures[0]
    assert sorted(stopped) == ["left", "right"]


def test_an_interrupt_stops_the_peers_and_removes_the_disks(tmp_path: Path, stopped: list[str]) -> None:
    class Interrupted(InstantEngine):
        def run(self, streams: Sequence[Stream], directory: Path) -> list[Figures]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runner(options(tmp_path), Interrupted(), quiet).run()
    assert stopped == ["left"]
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_memory_there_is_is_refused_first(tmp_path: Path, stopped: list[str]) -> None:
    with pytest.raises(NoSpaceError, match="smaller --size"):
        Runner(options(tmp_path, size=1 << 50), InstantEngine(), quiet).run()
    assert stopped == []


def test_unknown_peers_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)drdb.*nfs"):
        peers.expand(["drdb", "nbdkit", "nfs"])


def test_a_group_becomes_its_members_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "TOOLS", {})
    assert peers.expand(["qemu-colo", "qemu-colo-tcp"]) == ("qemu-colo-unix", "qemu-colo-tcp")


def test_disks_are_alike_and_incompressible(tmp_path: Path) -> None:
    import zlib

    paths = [tmp_path / "a", tmp_path / "b"]
    scratch.fill(paths, 9 * MIB)
    contents = paths[0].read_bytes()
    assert contents == paths[1].read_bytes()
    assert len(contents) == 9 * MIB
    assert len(zlib.compress(contents[:MIB], 1)) > 0.99 * MIB


def test_left_overs_of_a_killed_run_go_with_the_next(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, signal, sys\n"
        "from deploy.bench import scratch\n"
        "with scratch.scratch_directory(pathlib.Path(sys.argv[1])) as directory:\n"
        "    (directory / 'disk').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=60)
    (left,) = tmp_path.iterdir()
    with scratch.scratch_directory(tmp_path) as running:
        assert not left.exists()
        with scratch.scratch_directory(tmp_path):
            assert running.exists()  # a run that lives is left alone
    assert list(tmp_path.iterdir()) == []


def test_a_busy_machine_is_said_so(tmp_path: Path, stopped: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "BUSY_LOAD", -1.0)
    run = Runner(options(tmp_path, rounds=1), InstantEngine(), quiet).run()
    assert "busy with other work" in run.failures[0]


def test_the_environment_says_what_figures_depend_on() -> None:
    around = runner.environment(InstantEngine())
    assert {"kernel", "processor", "CPUs", "memory", "Python", "engine"} <= around.keys()
