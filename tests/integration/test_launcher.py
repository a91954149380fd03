"""The launcher with the real processes: up, status, deaths, up again, down; no orphan however it is interrupted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.child import python_environment
from common.config import write_config
from common.errors import AddressInUse, ConfigError, NeedsForce, NoSpaceError, NotRunning, PeerRefused, TandemDiskError
from common.keys import generate_keys
from common.nbd_client import NbdClient
from common.process import Lifecycle
from common.settings import Role
from deploy.launcher import Supervisor
from deploy.layout import PairDirectory, PairOptions
from deploy.pair import Pair
from tests import pairs
from tests.conftest import is_gone, wait_until

SIZE = 16 << 20
OPTIONS = PairOptions(size=SIZE, overrides={"replication": {"heartbeat_s": 0.1, "peer_timeout_s": 1.0}})


def tandemdisk(*arguments: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """The command, as a process of its own."""
    command = [sys.executable, "-P", "-m", "deploy", *map(str, arguments)]
    return subprocess.run(
        command, env=python_environment(), capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.fixture
def pair(short_dir: Path) -> Iterator[Pair]:
    with Pair.create(short_dir / "p", OPTIONS) as made:
        made.up()
        made.wait_protected()
        yield made


def pids(status: dict[str, Any]) -> list[int]:
    found = (status["primary"]["pid"], status["secondary"]["pid"], status["secondary"].get("export_pid"))
    return [pid for pid in found if pid is not None]


def all_gone(pids: list[int]) -> bool:
    return all(is_gone(pid) for pid in pids)


def test_up_status_checkpoint_down_by_command(short_dir: Path) -> None:
    directory = short_dir / "p"
    up = tandemdisk("up", "--dir", directory, "--size", "16M", "--volumes", "2", "--detach")
    assert up.returncode == 0, up.stderr
    assert "nbd+unix:///disk1?socket=" in up.stdout
    assert directory.stat().st_mode & 0o777 == 0o700

    status = json.loads(tandemdisk("status", "--dir", directory, "--json").stdout)
    assert status["state"] == "protected"
    assert status["mode"] == "sync"
    assert status["primary"]["role"] == "primary"
    assert status["secondary"]["role"] == "secondary"
    assert status["primary"]["nbd_uri"] == f"nbd+unix:///disk0?socket={directory}/a/nbd.sock"
    assert status["secondary"]["nbd_uri"] == f"nbd+unix:///disk0?socket={directory}/b/nbd.sock"
    assert len(pids(status)) == 3
    assert isinstance(status["generation"], int)
    assert set(status["lag"]) == {"bytes", "seconds"}
    assert {"bytes", "percent"} <= set(status["buffer"])
    assert [volume["size"] for volume in status["volumes"]] == [SIZE, SIZE]
    for path in (directory / "a" / "nbd.sock", directory / "a" / "primary.control", directory / "supervisor.control"):
        assert path.stat().st_mode & 0o777 == 0o600

    taken = json.loads(tandemdisk("checkpoint", "--dir", directory, "--json").stdout)
    assert taken["checkpoint"] > 0
    assert taken["seconds"] < 10
    assert "protected" in tandemdisk("status", "--dir", directory).stdout

    down = tandemdisk("down", "--dir", directory)
    assert down.returncode == 0, down.stderr
    assert "Stopped primary and secondary." in down.stdout
    assert all_gone(pids(status))
    assert not Path(Pair(directory).settings("secondary").buffer.directory).exists()
    assert tandemdisk("down", "--dir", directory).returncode == 0


def test_a_dead_primary_is_seen_and_started_again(pair: Pair) -> None:
    before = pair.status()
    os.kill(before["primary"]["pid"], signal.SIGKILL)
    dead = pair.wait_for(lambda now: now["primary"]["pid"] is None, "without its primary", 20)
    assert dead["state"] == "primary_lost"
    assert dead["primary"]["state"] == "dead"
    assert dead["primary"]["reason"] == "killed by SIGKILL"
    assert dead["secondary"]["pid"] == before["secondary"]["pid"]
    with pytest.raises(NotRunning):
        pair.checkpoint()

    pair.up()
    pair.wait_protected(30)
    again = pair.status()
    assert again["primary"]["pid"] != before["primary"]["pid"]
    assert again["secondary"]["pid"] == before["secondary"]["pid"]
    assert not again["primary"]["reason"]


def test_data_survives_down_and_up(pair: Pair) -> None:
    with NbdClient(pair.status()["primary"]["nbd_uri"]) as client:
        client.write(4096, b"x" * 8192)
    pair.down()
    pair.up()
    pair.wait_protected(30)
    with NbdClient(pair.status()["secondary"]["nbd_uri"]) as client:
        assert client.read(4096, 8192) == b"x" * 8192


def test_a_second_supervisor_is_refused(pair: Pair) -> None:
    (pair.directory.path / "supervisor.control").unlink()  # so that it cannot simply be asked
    with pytest.raises(AddressInUse, match="Another supervisor"):
        Pair(pair.directory.path).up()
    assert pair.status()["state"] == "protected"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_foreground_leaves_nothing_behind(short_dir: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-P", "-m", "deploy", "up", "--dir", str(short_dir / "p"), "--size", "16M"]
    with subprocess.Popen(command, env=python_environment(), stdout=subprocess.DEVNULL) as foreground:
        pair = Pair(short_dir / "p")
        wait_until(pair.directory.holds_a_pair, what="the configuration")
        status = pair.wait_for(lambda now: now["state"] == "protected", "protected", 30)
        foreground.send_signal(number)
        assert foreground.wait(30) == (0 if number != signal.SIGKILL else -9)
    running = [*pids(status), status["supervisor"]["pid"]]
    wait_until(lambda: all_gone(running), 30, "the end of all processes")


def test_a_supervisor_whose_disk_is_full_keeps_what_lives(short_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It cannot write down that a side died; that must not end it, and the other side with it."""
    directory = PairDirectory(short_dir / "p")
    directory.create(OPTIONS)
    directory.supervisor_state.with_suffix(".json.new").mkdir()  # as good as full: nothing can be written there

    async def stop() -> dict[str, Any]:
        return await Supervisor(directory, Lifecycle("supervisor")).stop()

    assert asyncio.run(stop())["killed"] == []
    assert "state not kept" in caplog.text


def test_children_die_with_their_supervisor(pair: Pair) -> None:
    status = pair.status()
    os.kill(status["supervisor"]["pid"], signal.SIGKILL)
    wait_until(lambda: all_gone(pids(status)), 30, "the end of all processes")
    assert pair.status()["state"] == "stopped"


def test_up_right_after_the_supervisor_was_killed(pair: Pair) -> None:
    os.kill(pair.status()["supervisor"]["pid"], signal.SIGKILL)
    again = Pair(pair.directory.path)
    wait_until(lambda: again.status()["supervisor"]["pid"] is None, 20, "the supervisor's end")
    again.up()
    again.wait_protected(30)
    again.down()


def test_a_start_that_fails_leaves_nothing(short_dir: Path) -> None:
    huge = PairOptions(size=1 << 40, buffer_bytes=1 << 40)
    with pytest.raises(NoSpaceError) as caught:
        Pair(short_dir / "p").create_or_resume(huge)
    assert "/dev/shm" in str(caught.value)
    assert not (short_dir / "p").exists()


@pytest.mark.local_hosts
def test_a_port_in_use_is_named(short_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=str(port)):
            Pair(short_dir / "p").create_or_resume(PairOptions(size=SIZE, listen=("127.0.0.1", port)))
    assert not (short_dir / "p").exists()


def test_disks_that_differ_are_brought_in_line(short_dir: Path) -> None:
    contents = os.urandom(1 << 20) + bytes(6 << 20) + os.urandom(1 << 20)
    a, b = short_dir / "a.raw", short_dir / "b.raw"
    a.write_bytes(contents)
    b.write_bytes(os.urandom(len(contents)))
    options = PairOptions(primary_disks=(a,), secondary_disks=(b,), overrides=OPTIONS.overrides)
    with Pair.create(short_dir / "p", options) as pair:
        pair.up()
        states = [step.state for step in pair.progress(0.01)]
        assert states[-1] == "protected"
        with NbdClient(pair.status()["secondary"]["nbd_uri"]) as client:
            assert client.read(0, len(contents)) == contents
    assert b.read_bytes() == contents


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_busy_disk_is_named(pair: Pair, short_dir: Path, role: str) -> None:
    busy = Path(pair.settings("primary").volumes[0].disk)
    other = short_dir / "other.raw"
    other.write_bytes(bytes(SIZE))
    mine, theirs = (busy, other) if role == "primary" else (other, busy)
    with pytest.raises(TandemDiskError) as caught:
        Pair(short_dir / "q").create_or_resume(PairOptions(primary_disks=(mine,), secondary_disks=(theirs,)))
    assert caught.value.exit_code == 3
    assert str(busy) in str(caught.value)


@pytest.mark.local_hosts
def test_processes_by_themselves(short_dir: Path) -> None:
    """As on two hosts: each with its configuration file, no supervisor."""
    pair = Pair.create(short_dir / "p", OPTIONS)
    running: list[subprocess.Popen[bytes]] = []
    try:
        for role in ("secondary", "primary"):
            with (short_dir / f"{role}.log").open("wb") as log:
                command = [sys.executable, "-P", "-m", "deploy", role, "--config", str(pair.directory.config(role))]
                running.append(subprocess.Popen(command, env=python_environment(), stderr=log))
        status = pair.wait_for(lambda now: now["state"] == "protected", "protected", 30)
        assert status["primary"]["pid"] == running[1].pid
        assert status["supervisor"]["pid"] is None
        assert pair.checkpoint().number > 0
        assert set(pair.down()["stopped"]) == {"primary", "secondary"}
        assert [process.wait(30) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_a_wrong_edit_is_refused_before_anything_starts(pair: Pair) -> None:
    pair.down()
    config = pair.directory.config("primary")
    good = config.read_text()
    config.write_text(good + "\nspeed = 11\n")
    with pytest.raises(ConfigError, match="speed"):
        pair.up()
    config.write_text(good)


def test_down_is_quick(pair: Pair) -> None:
    begin = time.monotonic()
    pair.down()
    assert time.monotonic() - begin < 15


def test_failover_in_the_instant_of_a_kill(short_dir: Path) -> None:
    """Nobody has noticed yet, and no answered write is missing: three pairs, three instants."""
    for number in range(3):
        with pairs.running(short_dir / f"p{number}", PairOptions(size=8 * pairs.MIB, mode="sync")) as pair:
            with pairs.Load(pairs.primary_uri(pair), seed=number) as load:
                load.wait_for(300)
                guest = pairs.guest_uri(pair)
                os.kill(pair.status()["primary"]["pid"], signal.SIGKILL)
                done = pair.failover("latest")
                assert done["state"] == "DONE"
                load.join()
            load.check_answered(pairs.contents(guest))


@pytest.mark.slow
def test_failover_from_a_primary_that_nobody_here_looks_after(short_dir: Path) -> None:
    """Its host is gone without a word: the secondary still calls it connected, the operator knows better."""
    options = PairOptions(size=8 * pairs.MIB, mode="sync", overrides={"replication": {"peer_timeout_s": 8.0}})
    pair = Pair.create(short_dir / "p", options)
    with pairs.started(pair, "secondary", "primary") as children:
        pair.wait_protected()
        os.kill(children["primary"].pid, signal.SIGSTOP)
        try:
            with pytest.raises(NeedsForce, match="alive and connected"):
                pair.failover("latest")
            told = tandemdisk("failover", "--dir", pair.directory.path, "--primary-dead", "--json")
            assert told.returncode == 0, told.stderr
            assert json.loads(told.stdout)["state"] == "DONE"
        finally:
            os.kill(children["primary"].pid, signal.SIGCONT)


def test_failover_while_the_primary_is_alive_needs_force(pair: Pair) -> None:
    refused = tandemdisk("failover", "--dir", pair.directory.path, "--json")
    assert refused.returncode == 6
    assert json.loads(refused.stdout)["error"]["exit_code"] == 6
    assert "--force" in refused.stderr
    assert pair.status()["state"] == "protected"


def test_latest_with_guest_writes_needs_force(pair: Pair) -> None:
    status = pair.status()
    with NbdClient(status["secondary"]["nbd_uri"]) as guest:
        guest.write(0, b"guest" * 100)
    os.kill(status["primary"]["pid"], signal.SIGKILL)
    pair.wait_for(lambda now: now["primary"]["pid"] is None, "without its primary", 20)
    with pytest.raises(NeedsForce, match="guest"):
        pair.failover("latest")
    pair.failover("checkpoint")
    with NbdClient(status["secondary"]["nbd_uri"]) as guest:
        assert guest.read(0, 500) == b"guest" * 100


@pytest.mark.parametrize("target", ["latest", "checkpoint"])
def test_a_promoted_side_goes_on_alone(pair: Pair, target: str) -> None:
    """Failover, then down and up: the old primary stays away, the disk is what the failover made of it."""
    before = pair.status()
    with NbdClient(before["primary"]["nbd_uri"]) as client:
        client.write(0, b"1" * 4096)
        pair.checkpoint()
        client.write(0, b"2" * 4096)
    os.kill(before["primary"]["pid"], signal.SIGKILL)
    pair.wait_for(lambda now: now["primary"]["pid"] is None, "without its primary", 20)
    pair.failover(target)
    now = pair.wait_for(lambda now: now["state"] == "done", "committed", 20)
    assert now["secondary"]["role"] == "primary"
    assert now["generation"] > before["generation"]
    expected = (b"2" if target == "latest" else b"1") * 4096
    with NbdClient(now["secondary"]["nbd_uri"]) as client:
        assert client.read(0, 4096) == expected
        client.write(8192, b"3" * 512)
        client.flush()

    up = tandemdisk("up", "--dir", pair.directory.path, "--detach")
    assert up.returncode == 0, up.stderr
    assert "The old primary stays down" in up.stdout
    pair.down()
    pair.up()
    again = pair.status()
    assert again["primary"]["pid"] is None
    assert again["secondary"]["role"] == "primary"
    with NbdClient(again["secondary"]["nbd_uri"]) as client:
        assert client.read(0, 4096) == expected
        assert client.read(8192, 512) == b"3" * 512


def test_a_buffer_with_a_checkpoint_survives_down_without_a_primary(pair: Pair) -> None:
    status = pair.status()
    with NbdClient(status["primary"]["nbd_uri"]) as client:
        client.write(0, b"1" * 4096)
        pair.checkpoint()
        client.write(0, b"2" * 4096)
    (given_back,) = pair.down()["buffers"]
    assert not given_back["kept"], "a final checkpoint was taken"
    pair.up()
    status = pair.status()
    with NbdClient(status["primary"]["nbd_uri"]) as client:
        client.write(0, b"3" * 4096)
    os.kill(status["primary"]["pid"], signal.SIGKILL)
    pair.wait_for(lambda now: now["primary"]["pid"] is None, "without its primary", 20)
    (buffer,) = pair.down()["buffers"]
    assert buffer["kept"]
    assert "last checkpoint" in buffer["why"]
    assert Path(buffer["directory"]).is_dir()
    (purged,) = pair.down(purge=True)["buffers"]
    assert not purged["kept"]
    assert not Path(buffer["directory"]).exists()


def with_keys(pair: Pair, directory: Path, peer_of_secondary: str) -> None:
    """Have the pair talk over TCP with CURVE; the secondary expects the key called ``peer_of_secondary``."""
    for name in ("a", "b", "stranger"):
        generate_keys(directory, name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    keys: dict[Role, tuple[str, str]] = {"primary": ("a", "b"), "secondary": ("b", peer_of_secondary)}
    for role, (own, peer) in keys.items():
        settings = pair.settings(role)
        replication = replace(
            settings.replication,
            listen=address if role == "secondary" else None,
            connect=address if role == "primary" else None,
            secret_key=str(directory / f"{own}.key_secret"),
            peer_key=str(directory / f"{peer}.key"),
        )
        write_config(replace(settings, replication=replication), pair.directory.config(role), role)


@pytest.mark.local_hosts
def test_keys_that_match(short_dir: Path) -> None:
    with Pair.create(short_dir / "p", OPTIONS) as pair:
        with_keys(pair, short_dir / "keys", "a")
        pair.up()
        pair.wait_protected(30)
        assert pair.checkpoint().number > 0


@pytest.mark.local_hosts
def test_keys_that_do_not_match(short_dir: Path) -> None:
    with Pair.create(short_dir / "p", OPTIONS) as pair:
        with_keys(pair, short_dir / "keys", "stranger")
        with pytest.raises(PeerRefused, match="tandemdisk keygen"):
            pair.up()
        assert pair.status()["state"] == "stopped"
