"""What a chaos run breaks, beyond ``deploy.faults``: the cable of a pair that has none of its own, and its files.

A pair on this machine as it is replicates through two faulty proxies (``deploy.proxy``), one a direction of dialling; a
pair between namespaces has a cable that nftables and tbf break. ``FileLimit`` makes every write(2) of a process to a
file fail beyond a size (EFBIG), metadata and logs included: RLIMIT_FSIZE, taken away again by ``heal``.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import psutil

from common.config import write_config
from common.keys import generate_keys
from deploy.faults import Cut, Fault, Flapping, OneWayCut, SlowLink, Unplugged
from deploy.hosts import NetnsHosts
from deploy.layout import ROLES, SIDES
from deploy.pair import Pair
from deploy.proxy import Direction, Proxy

TRACE: Final = b"Traceback (most recent call last)"
"""Not meant: what asyncio prints when a second signal comes while its loop is being closed; the process ends well."""


class ProxyCut(Fault):
    """What goes one way, or both, stays in the proxies."""

    def __init__(self, proxies: list[Proxy], direction: Direction) -> None:
        self.proxies, self.direction = proxies, direction

    def begin(self) -> None:
        for proxy in self.proxies:
            proxy.cut(self.direction)

    def heal(self) -> None:
        for proxy in self.proxies:
            proxy.heal()


class ProxySlow(Fault):
    """Few bytes a second, and late."""

    def __init__(self, proxies: list[Proxy]) -> None:
        self.proxies = proxies

    def begin(self) -> None:
        for proxy in self.proxies:
            proxy.rate, proxy.delay_s = 256 * 1024, 0.02

    def heal(self) -> None:
        for proxy in self.proxies:
            proxy.heal()


class ProxyReset(Fault):
    """Every connection breaks once."""

    def __init__(self, proxies: list[Proxy]) -> None:
        self.proxies = proxies

    def begin(self) -> None:
        for proxy in self.proxies:
            proxy.reset()

    def heal(self) -> None:
        return None


class FileLimit(Fault):
    """Files of process ``pid`` do not grow beyond ``size`` bytes, and cannot be written there."""

    def __init__(self, pid: int, size: int) -> None:
        self.pid, self.size = pid, size

    def begin(self) -> None:
        self._limit(self.size)

    def heal(self) -> None:
        self._limit(resource.RLIM_INFINITY)

    def _limit(self, size: int) -> None:
        """Of the process and of what it started meanwhile, which inherits the limit."""
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process = psutil.Process(self.pid)
            for one in (process, *process.children(recursive=True)):
                _, hard = resource.prlimit(one.pid, resource.RLIMIT_FSIZE)
                soft = hard if size == resource.RLIM_INFINITY else size
                resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def cable(pair: Pair) -> Iterator[dict[str, Fault]]:
    """What can happen to the pair's cable, by name; proxies are put into the configuration of a pair without one."""
    hosts: NetnsHosts | None = pair.directory.hosts()
    if hosts is not None:
        yield {
            "cut": Cut(hosts), "cut to a": OneWayCut(hosts, "a"), "cut to b": OneWayCut(hosts, "b"),
            "slow link": SlowLink(hosts, "2mbit"), "unplugged a": Unplugged(hosts, "a"),
            "unplugged b": Unplugged(hosts, "b"), "flapping": Flapping(hosts, 0.1, 0.15),
        }  # fmt: skip
        return
    with contextlib.ExitStack() as stack:
        proxies: list[Proxy] = []
        for role in ROLES:
            settings = pair.settings(role)
            address = settings.replication.connect
            assert address is not None
            proxy = stack.enter_context(Proxy(address.removeprefix("ipc://")))
            proxies.append(proxy)
            host, port = proxy.address
            changed = replace(settings, replication=replace(settings.replication, connect=f"tcp://{host}:{port}"))
            write_config(changed, pair.directory.config(role), role)
        yield {
            "cut": ProxyCut(proxies, "both"), "cut forward": ProxyCut(proxies, "forward"),
            "cut backward": ProxyCut(proxies, "backward"), "slow link": ProxySlow(proxies),
            "reset": ProxyReset(proxies),
        }  # fmt: skip


def encrypt(pair: Pair) -> None:
    """CURVE on the stream of a pair on this machine, which has none by itself. Before it runs."""
    for side in SIDES.values():
        generate_keys(pair.directory.path / side, side)
    for role in ROLES:
        settings = pair.settings(role)
        peer = next(side for side in SIDES.values() if side != settings.side)
        home = pair.directory.path
        keyed = replace(
            settings.replication,
            secret_key=str(home / settings.side / f"{settings.side}.key_secret"),
            peer_key=str(home / peer / f"{peer}.key"),
        )
        write_config(replace(settings, replication=keyed), pair.directory.config(role), role)


def new_tracebacks(directory: Path, seen: dict[Path, int]) -> str:
    """What the logs say of errors that nobody caught, since the last call with the same ``seen``."""
    for path in (directory / "a" / "log", directory / "b" / "log", directory / "supervisor.log"):
        if not path.exists():
            continue
        text = path.read_bytes()
        start, seen[path] = seen.get(path, 0), len(text)
        at = text.find(TRACE, start)
        while at >= 0 and b"_sighandler_noop" in text[at : at + 400]:
            at = text.find(TRACE, at + 1)
        if at >= 0:
            return f"{path}: {text[at : at + 3000].decode(errors='replace')}"
    return ""
