"""``tandemdisk up --hosts FILE``: which hosts of a pair file are here, what they run with, and what the others need.

    address of the laboratory (198.18.0.1 and .2)     a network namespace: both sides start, each in its own
    address of this machine                           that side starts here, in DIR
    any other                                         said, command by command; asked whether it answers

Keys are those that ``deploy render`` makes beside the file, so either way of setting a host up goes with the other.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil

from common.errors import ConfigError
from common.keys import PUBLIC_SUFFIX, SECRET_SUFFIX
from common.settings import NodeSettings, Role
from deploy.hosts import ADDRESSES, NetnsHosts
from deploy.pairfile import ETC, PairFile, PairHost, load_pair_file
from deploy.render import make_keys

ANSWER_TIMEOUT_S: Final = 1.0


def names_a_file(word: str) -> bool:
    """True if ``--hosts WORD`` means a pair file."""
    return word.endswith(".toml") or os.path.sep in word or os.path.isfile(word)


@dataclass(frozen=True, slots=True)
class Placement:
    """A pair file, and which of its hosts are here."""

    path: Path
    pair: PairFile
    laboratory: bool
    """Both hosts are network namespaces of this machine."""
    here: tuple[PairHost, ...]
    elsewhere: tuple[PairHost, ...]

    @classmethod
    def load(cls, path: Path) -> Placement:
        """Raises ConfigError if the file does not describe a pair, or two sides that cannot share this machine."""
        pair = load_pair_file(path)
        hosts = tuple(pair.hosts.values())
        if {host.machine.address for host in hosts} == set(ADDRESSES.values()):
            return cls(path, pair, True, hosts, ())
        here = tuple(host for host in hosts if is_here(host.machine.address))
        if len(here) == 2 and here[0].machine.address == here[1].machine.address:
            raise ConfigError(
                f"Both hosts in {path} have the address {here[0].machine.address}: they would share one port.",
                hint="Give each an address of its own; 127.0.0.1 and 127.0.0.2 do for a trial.",
            )
        return cls(path, pair, False, here, tuple(host for host in hosts if host not in here))

    def hosts(self, rate: str | None) -> NetnsHosts | None:
        """The namespaces, if it is a laboratory; not made yet."""
        return NetnsHosts(None, rate) if self.laboratory else None

    def settings(self, directory: Path) -> dict[Role, NodeSettings]:
        """What the sides that are here run with; their paths are those of a pair in ``directory``."""
        return {host.role: _moved(host, self._peer(host), directory / host.side) for host in self.here}

    def key_files(self, directory: Path) -> Mapping[Path, bytes]:
        """Path and contents of the keys of the sides that are here; made beside the file if they are missing."""
        keys = self.path.parent / "keys"
        make_keys(self.pair, keys)
        found: dict[Path, bytes] = {}
        for host in self.here:
            for name in (f"{host.machine.name}{SECRET_SUFFIX}", f"{self._peer(host).machine.name}{PUBLIC_SUFFIX}"):
                found[directory / host.side / name] = (keys / name).read_bytes()
        return found

    def instructions(self) -> list[str]:
        """For every host that is another machine: what has to be done there, and whether it answers by now."""
        lines: list[str] = []
        for host in self.elsewhere:
            name, address = host.machine.name, host.machine.address
            lines += [
                f"Host {name} ({address}) is another machine. What it needs, keys included:",
                f"    tandemdisk deploy render {self.path} --host {name} --output FILES    # then copy FILES there",
                "    sh FILES/install.sh                                                  # there, as root",
                f"    tandemdisk status --dir {ETC / self.pair.pair_id}                    # and so other commands",
                *self._when_alone(host),
                f"Its replication port: {_answer(address, self.pair.port)}.",
            ]
        return lines

    def _when_alone(self, host: PairHost) -> list[str]:
        if host.role == "primary":
            return []
        return [f"    tandemdisk failover --dir {ETC / self.pair.pair_id}                  # there, if this host dies"]

    def _peer(self, host: PairHost) -> PairHost:
        return self.pair.peer(host.machine.name)


def _moved(host: PairHost, peer: PairHost, directory: Path) -> NodeSettings:
    """The host's settings with the paths of ``directory`` in place of those that systemd's units use."""
    settings = host.settings
    replication = replace(
        settings.replication,
        secret_key=str(directory / f"{host.machine.name}{SECRET_SUFFIX}"),
        peer_key=str(directory / f"{peer.machine.name}{PUBLIC_SUFFIX}"),
    )
    export = replace(settings.export, unix=str(directory / "nbd.sock"), group_access=False)
    buffer = settings.buffer
    if buffer.spill_directory == settings.directory:
        buffer = replace(buffer, spill_directory=None)
    return replace(settings, directory=str(directory), replication=replication, export=export, buffer=buffer)


def is_here(address: str) -> bool:
    """True if ``address``, or what it is a name of, belongs to this machine."""
    own = {one.address.partition("%")[0] for all_of in psutil.net_if_addrs().values() for one in all_of}
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(address, None)}
    except OSError:
        return False
    return bool(found & own) or any(one.startswith("127.") for one in found)


def _answer(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), ANSWER_TIMEOUT_S).close()
    except OSError as error:
        return f"{address}:{port} does not answer yet ({error.strerror or error})"
    return f"{address}:{port} answers"
