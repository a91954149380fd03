"""The benchmark with real servers: that QEMU's pair does replicate, and a whole short run."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from common.child import python_command, python_environment
from common.nbd_client import NbdClient
from deploy.bench import hotpath, runner, scratch, wayback
from deploy.bench.colo import Between, QemuColo
from deploy.bench.engines import BuiltIn, Engine, choose_engine
from deploy.bench.peers import TOOLS
from deploy.bench.runner import Options, Runner

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture(autouse=True)
def one_probe_each_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PROBE_ROUNDS", 1)
    monkeypatch.setattr(runner, "BUSY_LOAD", float("inf"))


def require(*peers: str) -> None:
    for tool in sorted({tool for peer in peers for tool in TOOLS[peer]}):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


@pytest.mark.parametrize("between", ["tcp", "unix"])
def test_qemus_pair_replicates_and_keeps_the_checkpoint(shm_dir: Path, between: Between) -> None:
    require("qemu-colo-unix")
    peer = QemuColo(between)
    with scratch.scratch_directory(shm_dir) as directory:
        try:
            peer.start(directory / "p", SIZE)
            primary_disk, secondary_disk = (directory / "p" / f"disk{number}.raw" for number in range(2))
            before = secondary_disk.read_bytes()
            assert primary_disk.read_bytes() == before
            peer.checkpoint()
            with NbdClient(peer.uri) as client, NbdClient(peer.guest_uri) as guest:
                for offset in range(0, SIZE, 4 * MIB):
                    client.write(offset + 4096, b"\xaa" * 8192)
                client.flush()
                after = secondary_disk.read_bytes()
                assert after == primary_disk.read_bytes() != before
                assert guest.read(0, 4 * MIB) == before[: 4 * MIB]  # what the checkpoint had
                peer.checkpoint()
                assert guest.read(0, 4 * MIB) == after[: 4 * MIB]
                client.write(0, bytes(4096))
                peer.kill_primary()
                peer.failover("checkpoint")
                peer.wait_committed()
                assert guest.read(0, 4 * MIB) == after[: 4 * MIB]
                guest.write(0, b"\xbb" * 4096)
                assert guest.read(0, 4096) == b"\xbb" * 4096
        finally:
            peer.stop()


def short_run(directory: Path, engine: Engine, *peers: str) -> None:
    jobs = ("write-4k-d32", "mixed-4k-d32", "guest-read-4k-d32", "first-touch", "again")
    options = Options(
        peers, jobs, rounds=1, seconds=0.3, size=SIZE, directory=str(directory), limit_s=100.0, probes=True
    )
    run = Runner(options, engine, lambda _: None).run()
    assert run.failures == []
    expected = {
        (job, peer)
        for peer in peers
        for job in jobs
        if peer.startswith(("qemu-colo", "tandem")) or "4k-d32" in job[-6:]
    }
    expected -= {("guest-read-4k-d32", peer) for peer in peers if not peer.startswith(("qemu-colo", "tandem"))}
    assert {(sample.job, sample.peer) for sample in run.samples} == expected
    for sample in run.samples:
        assert sample.figures.requests > 0
        assert 0 < sample.figures.p50_us <= sample.figures.p99_us <= sample.figures.p999_us
    for facts in run.peers:
        assert all(held.peak > MIB for held in facts.memory.values())
        assert facts.commands
    assert list(directory.iterdir()) == []


@pytest.mark.soak
def test_a_short_run_of_unreplicated_servers_with_the_built_in_client(shm_dir: Path) -> None:
    require("qemu-nbd", "nbdkit")
    short_run(shm_dir, BuiltIn(), "qemu-nbd", "nbdkit")


@pytest.mark.slow
def test_a_short_run_of_qemus_pair(shm_dir: Path) -> None:
    require("qemu-colo-unix")
    short_run(shm_dir, choose_engine(), "qemu-colo-unix")


@pytest.mark.soak
def test_a_short_run_of_our_own_pair_with_the_built_in_client(shm_dir: Path) -> None:
    short_run(shm_dir, BuiltIn(), "tandemdisk-sync")  # the hot path's test has the other mode


@pytest.mark.slow
def test_the_hot_path_is_told_step_by_step(shm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotpath, "LOAD_S", 0.3)
    monkeypatch.setattr(hotpath, "ROUND_TRIPS", 100)
    console = Console(file=io.StringIO(), width=200)
    hotpath.show_hot_path(console, shm_dir)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in (
        "| primary ",
        "| secondary ",
        "COW: lock and unlock",
        "async, depth 32",
        "over libzmq",
    ):
        assert expected in text, expected
    assert list(shm_dir.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_no_process(shm_dir: Path, number: signal.Signals) -> None:
    """The fixture ``no_process_survives`` looks after the processes; the disks of a SIGKILL go with the next run."""
    command = [*python_command("deploy"), "bench", "--only", "tandemdisk-sync", "--size", "64M", "--engine", "built-in",
               "--directory", str(shm_dir)]  # fmt: skip
    with subprocess.Popen(command, env=python_environment(), stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "round 1" in line:
                break
        child.send_signal(number)
        child.stderr.close()
        child.wait(30)
    left = list(shm_dir.iterdir())
    assert bool(left) == (number == signal.SIGKILL)
    with scratch.scratch_directory(shm_dir) as fresh:
        assert list(shm_dir.iterdir()) == [fresh]


def test_fio_has_its_nbd_engine() -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    listed = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, timeout=10, check=True).stdout
    if "nbd" not in listed.split():
        pytest.skip("fio is installed without its nbd engine")
    assert choose_engine("fio").name.startswith("fio")


@pytest.mark.slow
def test_the_way_back_in_short(shm_dir: Path) -> None:
    """One round: every figure is there, the bitmap was waited for where there is one, and nothing is left behind."""
    memory, disk = shm_dir / "memory", shm_dir / "disk"  # no real disk: this measures nothing
    memory.mkdir()
    disk.mkdir()
    options = wayback.Options(
        memory, 32 * MIB, disk_directory=disk, rounds=1, seconds=0.3, intent_size=512 * MIB, engine="built-in"
    )
    found = wayback.measure(options, lambda _: None)
    names = {"raw stream", "resync, dirty bits", "resync, checksums"}
    assert set(found.resync_mib_s) - {"nbdcopy"} == names
    assert all(rate.low == rate.median == rate.high > 0 for rate in found.resync_mib_s.values())
    assert set(found.intents) == {f"{kind}, depth {depth}" for kind in wayback.KINDS for depth in wayback.DEPTHS}
    for kind, kept in wayback.KINDS.items():  # at depth 32 every region may be marked before it is counted
        waits = [found.intents[f"{kind}, depth {depth}"].waits.median for depth in wayback.DEPTHS]
        assert any(waits) == kept, (kind, waits)
    assert all(one.p99_us.median >= one.p50_us.median > 0 < one.writes_s.median for one in found.intents.values())
    assert " on " in found.intent_disk["file_system"]
    assert found.intent_disk["regions"] == 128
    assert json.loads(found.to_json())["rounds"] == 1
    assert not list(memory.iterdir()) + list(disk.iterdir())
