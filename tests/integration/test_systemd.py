"""Two machines that systemd runs, set up by the install.sh of `deploy render`: the units as they are, hardening,
readiness, watchdog and all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import PeerRefused
from deploy.hosts import ADDRESSES, NetnsHosts
from tests import pairs
from tests.booted import CGROUPS, SYSTEMD, Booted
from tests.conftest import wait_until
from tests.pairs import MIB

pytestmark = [
    pytest.mark.root,
    pytest.mark.local_hosts,
    pytest.mark.slow,
    pytest.mark.xdist_group("systemd"),  # one after the other, on the same two machines
    pytest.mark.skipif(not SYSTEMD.exists(), reason="systemd is not installed"),
    pytest.mark.skipif(not os.access(CGROUPS[0], os.W_OK), reason=f"{CGROUPS[0]} is not for us to write"),
]
SIZE = 16 * MIB
PAIR_FILE = """
pair_id = "lab"
initial_sync = "assume"
[hosts.east]
address = "{a}"
starts_as = "primary"
agent = "{a}:10811"
[hosts.west]
address = "{b}"
starts_as = "secondary"
agent = "{b}:10811"
[[volumes]]
name = "disk0"
disks = {{ east = "/srv/disk.raw", west = "/srv/disk.raw" }}
[buffer]
size_bytes = "64M"
"""


class Machine(Booted):
    """One of the two; ``unit`` is its service."""

    def __init__(self, lab: Path, name: str, role: str, hosts: NetnsHosts) -> None:
        host = hosts.hosts["a" if name == "east" else "b"]
        super().__init__(lab / name, name, host.prefix())
        self.address = host.address
        self.service = f"tandemdisk-{role}@lab.service"
        files = self.changes / "root/files"
        rendered = pairs.tandemdisk("deploy", "render", lab / "pair.toml", "--host", name, "--output", files)
        assert rendered.returncode == 0, rendered.stderr
        (self.changes / "srv").mkdir()
        with (self.changes / "srv/disk.raw").open("wb") as disk:
            disk.truncate(SIZE)

    def install(self) -> None:
        done = self.command("sh", "/root/files/install.sh")
        assert done.returncode == 0, done.stdout + done.stderr + self.journal()

    def told(self, command: str, *options: str) -> dict[str, Any]:
        done = self.command("tandemdisk", command, "--dir", "/etc/tandemdisk/lab", "--json", *options)
        assert done.returncode == 0, done.stdout + done.stderr + self.journal()
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def protected(self) -> bool:
        return bool(self.told("status")["state"] == "protected")

    def active(self) -> bool:
        return self.unit(self.service, "ActiveState") == "active"

    def main_pid(self) -> int:
        return int(self.unit(self.service, "MainPID"))

    def write(self, offset: int, fill: int) -> None:
        """64 KiB of one byte, as root, whom the socket lets in like the group."""
        done = self.command("qemu-io", "-f", "raw", "-c", f"write -P {fill} {offset} 64k", "-c", "flush", self.uri)
        assert done.returncode == 0, done.stdout + done.stderr

    def holds(self, offset: int, fill: int) -> bool:
        done = self.command("qemu-io", "-f", "raw", "-c", f"read -P {fill} {offset} 64k", self.uri)
        return done.returncode == 0 and "Pattern verification failed" not in done.stdout

    def leads(self) -> bool:
        """What HAProxy is told."""
        program = f"import socket; print(socket.create_connection(('{self.address}', 10811), 5).makefile().read())"
        return self.run("/opt/python/bin/python3", "-c", program).strip() == "ready up"

    uri = "nbd+unix:///disk0?socket=/run/tandemdisk/lab/nbd.sock"


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    """East, which leads, and west."""
    with tempfile.TemporaryDirectory(prefix="td-", dir="/tmp") as directory, NetnsHosts().held() as hosts:
        lab = Path(directory)
        (lab / "pair.toml").write_text(PAIR_FILE.format(**ADDRESSES))
        east, west = Machine(lab, "east", "primary", hosts), Machine(lab, "west", "secondary", hosts)
        try:
            for machine in (west, east):
                machine.switch_on()
                machine.install()
            wait_until(east.protected, 30, "a protected pair")
            yield east, west
        finally:
            east.switch_off()
            west.switch_off()


def test_the_units_start_as_they_were_rendered(machines: tuple[Machine, Machine]) -> None:
    for machine in machines:
        assert machine.unit(machine.service, "SubState") == "running"
        assert machine.unit(machine.service, "WatchdogUSec") == "15s"
        assert machine.unit("tandemdisk-firewall@lab.service", "ActiveState") == "active"
        user = machine.run("ps", "-o", "user=", "-p", machine.main_pid()).strip()
        assert user.startswith("tandemd"), user
        assert "tcp dport 10810 drop" in machine.run("nft", "list", "ruleset")
    east, west = machines
    east.write(0, 1)
    assert east.told("checkpoint")
    assert east.told("verify")["differing"] == 0
    assert (east.leads(), west.leads()) == (True, False)


@pytest.mark.parametrize("number", ["KILL", "STOP"])
def test_a_side_that_dies_or_hangs_is_started_again(machines: tuple[Machine, Machine], number: str) -> None:
    """One that hangs by the watchdog."""
    east, _ = machines
    east.write(0, 1)
    before = [machine.main_pid() for machine in machines]
    for machine, pid in zip(machines, before, strict=True):
        machine.run("kill", f"-{number}", pid)
    for machine, pid in zip(machines, before, strict=True):
        wait_until(lambda here=machine, old=pid: here.main_pid() not in (0, old), 60, "a new process")  # type: ignore[misc]
        wait_until(machine.active, 30, "a start")
    wait_until(east.protected, 30, "a protected pair")
    assert east.holds(0, 1)
    east.write(65536, 2)
    assert east.told("verify")["differing"] == 0


def test_a_machine_that_lost_its_power_rejoins(machines: tuple[Machine, Machine]) -> None:
    """It boots, is refused, and stays down until an operator has it rejoin and gives the command that this names."""
    east, west = machines
    east.write(131072, 3)
    east.switch_off()
    west.told("failover", "--primary-dead")
    assert west.holds(131072, 3)
    west.write(196608, 4)
    east.switch_on()
    wait_until(lambda: east.unit(east.service, "ActiveState") == "failed", 60, "a refusal")
    assert east.unit(east.service, "ExecMainStatus") == str(PeerRefused.exit_code)
    assert east.unit(east.service, "NRestarts") == "0"
    assert "side a has to rejoin as secondary" in east.journal()
    assert east.command(*east.told("rejoin")["start"].split()).returncode == 0
    wait_until(west.protected, 30, "a protected pair")
    assert (east.leads(), west.leads()) == (False, True)
    assert west.command(*west.told("switchover")["start"].split()).returncode == 0
    wait_until(east.protected, 30, "a protected pair")
    assert east.holds(196608, 4)
    assert east.told("verify")["differing"] == 0


def test_a_stop_is_clean(machines: tuple[Machine, Machine]) -> None:
    for machine in machines:
        assert machine.command("systemctl", "stop", machine.service).returncode == 0
        assert machine.unit(machine.service, "Result") == "success"
    east, west = ((machine.changes / "srv/disk.raw").read_bytes() for machine in machines)
    assert east == west
