"""Two machines, each with files of its own, as `deploy render` and its install.sh lay them out, and commands only.

Each machine is a network namespace and a directory that stands for its root. Its side runs as systemd would run it,
`tandemdisk primary|secondary --config FILE`, and every command is given on one of the two, with the `--dir` that the
rendered instructions name. So whatever one side knows of the other came over the wire.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.child import python_environment
from common.errors import OperationFailed, PeerRefused
from common.nbd_client import NbdClient
from common.settings import Role
from deploy.faults import Cut, HostGone
from deploy.hosts import ADDRESSES, NetnsHosts, Side
from deploy.pair import Pair
from tests import pairs
from tests.conftest import TEST_MARK, wait_until
from tests.pairs import MIB, TANDEMDISK

pytestmark = [pytest.mark.root, pytest.mark.local_hosts]
SIZE = 16 * MIB
PAIR_FILE = """
pair_id = "lab"
initial_sync = "assume"
keep_diverged = true
[hosts.east]
address = "{a}"
starts_as = "primary"
[hosts.west]
address = "{b}"
starts_as = "secondary"
[[volumes]]
name = "disk0"
disks = {{ east = "{root}/east/disk.raw", west = "{root}/west/disk.raw" }}
[replication]
heartbeat_s = 0.1
peer_timeout_s = 0.7
[buffer]
size_bytes = "64M"
"""


class Machine:
    """One of the two."""

    def __init__(self, lab: Path, name: str, side: Side, role: Role, hosts: NetnsHosts) -> None:
        self.side, self.role, self.root = side, role, lab / name
        self.directory = self.root / "etc/tandemdisk/lab"
        self.disk = self.root / "disk.raw"
        self._prefix = hosts.hosts[side].prefix()
        self._process: subprocess.Popen[bytes] | None = None
        files = lab / f"{name}-files"
        rendered = pairs.tandemdisk("deploy", "render", lab / "pair.toml", "--host", name, "--output", files)
        assert rendered.returncode == 0, rendered.stderr
        subprocess.run(["sh", files / "install.sh"], env={**os.environ, "DESTDIR": str(self.root)}, check=True)
        config = self.directory / f"{role}.toml"
        text = config.read_text()
        for top in ("etc", "var/lib", "run"):
            text = text.replace(f'"/{top}/tandemdisk/', f'"{self.root}/{top}/tandemdisk/')
        config.write_text(text.replace("/dev/shm/tandemdisk-lab", f"{self.root}/buffer"))
        (self.root / "run/tandemdisk/lab").mkdir(parents=True)  # as RuntimeDirectory= does
        with self.disk.open("wb") as disk:
            disk.truncate(SIZE)

    def command(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._prefix, *TANDEMDISK, *arguments], env=python_environment(), capture_output=True, text=True,
            timeout=30, check=False, **options,
        )  # fmt: skip

    def told(self, command: str, *options: str) -> dict[str, Any]:
        """What the command answers, given with --dir."""
        done = self.command(command, "--dir", str(self.directory), "--json", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def refused(self, command: str, *options: str) -> str:
        done = self.command(command, "--dir", str(self.directory), *options)
        assert done.returncode in (OperationFailed.exit_code, PeerRefused.exit_code), done.stdout + done.stderr
        return done.stderr

    def run_as(self, role: str) -> list[str]:
        return [role, "--config", str(self.directory / f"{self.role}.toml")]

    def start(self) -> None:
        """What the unit does that was enabled first, whichever role the side has by now."""
        environment = python_environment()
        environment.pop(TEST_MARK, None)  # it may outlive the test, not the lab
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, *TANDEMDISK, *self.run_as(self.role)], env=environment, stdout=log, stderr=log
            )
        socket = self.root / "run/tandemdisk/lab/nbd.sock"

        def open_to_the_group() -> bool:
            return socket.exists() and socket.stat().st_mode & 0o777 == 0o660

        wait_until(lambda: open_to_the_group() or self.ended(), 20, "a start")
        assert not self.ended(), (self.root / "log").read_text()[-2000:]

    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def down(self) -> None:
        if self._process is not None:
            wait_until(self.ended, 20, "its end")
            self._process = None
        (self.root / "run/tandemdisk/lab/nbd.sock").unlink(missing_ok=True)  # as a restart of the machine does

    def restart(self) -> None:
        """`systemctl restart`."""
        assert self._process is not None
        self._process.terminate()
        self.down()
        self.start()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///disk0?socket={self.root}/run/tandemdisk/lab/nbd.sock"

    def write(self, offset: int, text: bytes) -> None:
        with NbdClient(self.uri) as client:
            client.write(offset, text)

    @property
    def pair(self) -> Pair:
        """For looking, which a command for each look would make slow."""
        return Pair(self.directory)


class Lab:
    """Both machines and what is between them."""

    def __init__(self, directory: Path, hosts: NetnsHosts) -> None:
        (directory / "pair.toml").write_text(PAIR_FILE.format(root=directory, **ADDRESSES))
        self.hosts = hosts
        self.east = Machine(directory, "east", "a", "primary", hosts)
        self.west = Machine(directory, "west", "b", "secondary", hosts)

    def equal(self, leader: Machine) -> bytes:
        """Protected, led by ``leader``, and both disks the same; their contents."""
        leader.pair.wait_protected(20)
        leader.pair.checkpoint()
        one, other = self.east.disk.read_bytes(), self.west.disk.read_bytes()
        assert one == other
        return one


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Protected, led by east."""
    with tempfile.TemporaryDirectory(prefix="td-", dir="/tmp") as directory, NetnsHosts().held() as hosts:
        made = Lab(Path(directory), hosts)
        try:
            made.west.start()
            made.east.start()
            made.east.pair.wait_protected(20)
            yield made
        finally:
            made.east.kill()
            made.west.kill()


def take_over(lab: Lab, old: Machine, new: Machine) -> None:
    """The machine that leads loses its power under load, the other one takes over with every answered write."""
    before = pairs.contents(old.uri)
    with pairs.Load(old.uri, seed=ord(old.side)) as load:
        load.wait_for(200)
        with HostGone(lab.hosts, old.side):
            load.join()
            old.down()
            new.told("failover", "--primary-dead")
            assert load.check(pairs.contents(new.uri), before) >= load.answered
            new.write(0, b"goes on")


def come_back(old: Machine, new: Machine) -> None:
    """The one that was left behind follows."""
    assert old.told("rejoin")["start"].endswith(" ".join(old.run_as(old.role)))
    old.start()
    new.pair.wait_protected(20)


@pytest.mark.slow
def test_from_start_to_failover_rejoin_and_back(lab: Lab) -> None:
    east, west = lab.east, lab.west
    take_over(lab, east, west)
    for role in ("primary", "secondary"):
        done = east.command(*east.run_as(role))
        assert done.returncode == PeerRefused.exit_code, done.stdout + done.stderr
        assert "side a has to rejoin as secondary" in done.stderr
    memory = east.root / "var/lib/tandemdisk/lab/metadata"
    before = memory.read_bytes()
    asked = east.told("rejoin", "--dry-run")
    assert (asked["side"], asked["split_brain"], memory.read_bytes()) == ("a", False, before)
    come_back(east, west)
    west.told("checkpoint")
    assert lab.equal(west)[:7] == b"goes on"
    take_over(lab, west, east)
    come_back(west, east)
    assert east.told("verify")["differing"] == 0
    lab.equal(east)


@pytest.mark.slow
def test_a_switchover_is_one_command_and_a_start(lab: Lab) -> None:
    """What was answered is there on the other machine, which leads when the command returns."""
    east, west = lab.east, lab.west
    before = pairs.contents(east.uri)
    with pairs.Load(east.uri, seed=3) as load:
        load.wait_for(200)
        done = east.told("switchover")
        load.join()
    assert done["start"].endswith(" ".join(east.run_as("primary")))
    assert load.check(pairs.contents(west.uri), before) >= load.answered
    west.write(0, b"led by west")
    east.down()
    east.start()
    assert lab.equal(west)[:11] == b"led by west"
    status = west.told("status")
    assert (status["secondary"]["role"], status["primary"]["state"]) == ("primary", "elsewhere")
    assert "the one that leads is on the other host" in east.refused("switchover")
    west.restart()
    assert "was started as secondary and runs as primary" in (west.root / "log").read_text()
    lab.equal(west)


@pytest.mark.slow
def test_split_brain_between_machines(lab: Lab) -> None:
    """Both hosts are told what each side would lose; what the loser alone wrote is saved."""
    old, new = (lab.west, lab.east) if lab.west.pair.leader() == "secondary" else (lab.east, lab.west)
    with Cut(lab.hosts):
        old.write(MIB, b"of the old one")
        old.pair.wait_for(lambda now: now["state"] == "alone", "alone", 15)
        new.told("failover", "--primary-dead")
        new.write(2 * MIB, b"of the new one")
    for machine in (old, new):
        said = machine.refused("rejoin")
        assert "side a went on" in said
        assert "side b went on" in said
        assert said.count("would lose") == 2
        assert "would lose 0 blocks" not in said
    asked = new.told("rejoin", "--dry-run", "--discard", old.side)
    assert (asked["side"], asked["split_brain"]) == (old.side, True)
    assert "is on the other host" in new.refused("rejoin", "--discard", old.side)
    done = old.told("rejoin", "--discard", old.side)
    assert Path(done["saved"][0]).read_bytes()[MIB : MIB + 14] == b"of the old one"
    old.down()
    old.start()
    found = lab.equal(new)
    assert found[2 * MIB : 2 * MIB + 14] == b"of the new one"
    assert found[MIB : MIB + 14] != b"of the old one"
