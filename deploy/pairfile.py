"""A pair file: one TOML file that names both hosts of a pair, from which ``deploy.render`` makes what each one needs.

    pair_id = "mail"
    mode = "sync"                        # any key of a side's configuration that both sides share

    [hosts.east]                         # exactly two
    address = "10.0.0.1"                 # where the other one reaches it
    starts_as = "primary"
    export = "10.0.0.1:10809"            # the NBD export on TCP, beside its Unix socket (optional)
    agent = "10.0.0.1:10811"             # says to HAProxy whether this host leads (optional; haproxy.cfg)

    [hosts.west]
    address = "10.0.0.2"
    starts_as = "secondary"

    [[volumes]]
    name = "root"
    disks = { east = "/dev/vg0/mail", west = "/dev/vg1/mail" }

    [replication]                        # optional, as in a side's configuration; port is 10810 unless given here
    port = 10810
    [buffer]                             # optional, as in a side's configuration
    size_bytes = "1G"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from common.config import make_settings, read_toml
from common.errors import ConfigError
from common.settings import NodeSettings, Role
from deploy.hosts import REPLICATION_PORT, SIDES, Machine, Side

ETC: Final = Path("/etc/tandemdisk")
STATE: Final = Path("/var/lib/tandemdisk")
RUN: Final = Path("/run/tandemdisk")
"""Sockets for clients: a side's own directory is closed to them."""
_OWN_KEYS: Final = frozenset({"hosts", "volumes", "replication"})
_HOST_KEYS: Final = frozenset({"address", "starts_as", "export", "agent"})
_PORT: Final = re.compile(r"[0-9]{1,9}")
_AGENT: Final = re.compile(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:.]+\]:\d{1,5}")
_NOT_SHARED: Final = frozenset({"side", "directory", "export"})
"""Keys of a side's configuration that follow from the host."""


@dataclass(frozen=True, slots=True)
class PairHost:
    """One of the two hosts: which side it is, and the settings it runs with."""

    machine: Machine
    side: Side
    role: Role
    settings: NodeSettings
    """With the paths that the files have on that host."""
    agent: str | None
    """Where it says whether it leads, ``HOST:PORT``."""


@dataclass(frozen=True, slots=True)
class PairFile:
    """Both hosts, by name."""

    pair_id: str
    port: int
    hosts: Mapping[str, PairHost]

    def host(self, name: str) -> PairHost:
        """ConfigError unless ``name`` is one of the two."""
        if name not in self.hosts:
            raise ConfigError(f"There is no host {name!r} in the file.", hint=f"There are {' and '.join(self.hosts)}.")
        return self.hosts[name]

    def peer(self, name: str) -> PairHost:
        """The other one."""
        return next(host for other, host in self.hosts.items() if other != name)


def load_pair_file(path: Path) -> PairFile:
    """The hosts in the file at ``path``. Raises ConfigError whose ``problems`` name everything that is wrong."""
    raw = read_toml(path, hint="See deploy/examples/pair.toml.")
    problems = _problems(raw)
    if problems:
        raise ConfigError(f"{path} does not describe a pair of hosts:", problems=tuple(problems))
    replication = dict(raw.get("replication", {}))
    port = replication.pop("port", REPLICATION_PORT)
    names = sorted(raw["hosts"], key=lambda name: str(raw["hosts"][name]["starts_as"]))  # the primary is side a
    hosts: dict[str, PairHost] = {}
    for side, name in zip(SIDES, names, strict=True):
        other = next(one for one in names if one != name)
        role: Role = "primary" if raw["hosts"][name]["starts_as"] == "primary" else "secondary"
        settings = make_settings(
            _side(raw, side, name, other, port, replication), base=STATE, role=role, source=f"{path}, host {name},"
        )
        host = raw["hosts"][name]
        machine = Machine(name, host["address"])
        hosts[name] = PairHost(machine, side, role, _keyed(settings, name, other), host.get("agent"))
    return PairFile(str(raw["pair_id"]), port, hosts)


def _problems(raw: Mapping[str, Any]) -> list[str]:
    """What keeps the file from being taken apart; the rest is for the validator of a side's configuration."""
    problems = [f"`{key}` follows from the host: leave it out" for key in _NOT_SHARED & raw.keys()]
    if not isinstance(raw.get("pair_id"), str):
        problems.append("`pair_id` is missing")
    hosts = raw.get("hosts")
    if not isinstance(hosts, dict) or len(hosts) != 2 or not all(isinstance(host, dict) for host in hosts.values()):
        return [*problems, "`hosts` must be two tables, [hosts.NAME] each"]
    for name, host in hosts.items():
        problems += [f"`hosts.{name}.{key}` is not known" for key in sorted(host.keys() - _HOST_KEYS)]
        if not isinstance(host.get("address"), str):
            problems.append(f"`hosts.{name}.address` is missing")
        if not isinstance(host.get("export", ""), str):
            problems.append(f"`hosts.{name}.export` must be \"HOST:PORT\"")
        agent = host.get("agent", "0:1")
        if not isinstance(agent, str) or not _AGENT.fullmatch(agent) or not 0 < int(agent.rpartition(":")[2]) < 65536:
            problems.append(f"`hosts.{name}.agent` must be HOST:PORT")
    if [host.get("starts_as") for host in hosts.values()] not in (["primary", "secondary"], ["secondary", "primary"]):
        problems.append("one host's `starts_as` must be primary, the other one's secondary")
    volumes = raw.get("volumes")
    if not isinstance(volumes, list) or not volumes:
        return [*problems, "`volumes` is missing: [[volumes]] with name and disks"]
    for number, volume in enumerate(volumes):
        disks = volume.get("disks") if isinstance(volume, dict) else None
        if not isinstance(disks, dict) or disks.keys() != hosts.keys():
            problems.append(f"`volumes[{number}].disks` must name one disk for each of {' and '.join(hosts)}")
    replication = raw.get("replication", {})
    port = replication.get("port", REPLICATION_PORT) if isinstance(replication, dict) else None
    if not isinstance(port, int) or not 0 < port < 65536:
        problems.append("`replication.port` is no port")
    return problems


def _side(
    raw: Mapping[str, Any], side: Side, name: str, other: str, port: int, replication: Mapping[str, Any]
) -> dict[str, Any]:
    """What a configuration file of that side would hold, except keys: they need not exist where this is rendered."""
    directory = STATE / str(raw["pair_id"])
    export: dict[str, Any] = {"unix": str(RUN / str(raw["pair_id"]) / "nbd.sock"), "group_access": True}
    buffer = raw.get("buffer", {})
    if isinstance(buffer, dict):  # beside the disks the unit may write nothing
        buffer = {"spill_directory": str(directory)} | buffer
    if "export" in raw["hosts"][name]:
        host, _, number = str(raw["hosts"][name]["export"]).rpartition(":")
        export |= {"host": host.strip("[]"), "port": int(number) if _PORT.fullmatch(number) else number}
    addresses = {one: _bracketed(raw["hosts"][one]["address"]) for one in (name, other)}
    return {
        **{key: value for key, value in raw.items() if key not in _OWN_KEYS},
        "side": side,
        "directory": str(directory),
        "volumes": [
            {key: value for key, value in volume.items() if key != "disks"} | {"disk": volume["disks"][name]}
            for volume in raw["volumes"]
        ],
        "export": export,
        "buffer": buffer,
        "replication": {
            **replication,
            "listen": f"tcp://{addresses[name]}:{port}",
            "connect": f"tcp://{addresses[other]}:{port}",
            "plaintext": True,
        },
    }


def _keyed(settings: NodeSettings, name: str, other: str) -> NodeSettings:
    replication = replace(
        settings.replication,
        plaintext=False,
        secret_key=str(ETC / settings.pair_id / f"{name}.key_secret"),
        peer_key=str(ETC / settings.pair_id / f"{other}.key"),
    )
    return replace(settings, replication=replication)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
