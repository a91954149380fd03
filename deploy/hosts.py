"""Hosts: where the sides of a pair run, and two of them made out of nothing on one machine.

    Local      this machine, as it is
    Namespace  a network namespace: addresses, routes, firewall and sockets of its own; files and processes are shared
    Machine    another machine: `tandemdisk deploy render` prints what it needs, systemd runs it there

``NetnsHosts`` is the laboratory: two namespaces joined by one cable (a veth pair) and by nothing else, so whatever one
side knows of the other came through that cable. It can be made slow (tbf), cut in either direction (nftables) and
unplugged; ``deploy.faults`` does that. Unix sockets are files, so control, status, failover and the exports on Unix
sockets work from outside.

    td-TAG-a  198.18.0.1/30  link0 ══ tbf ═══════ tbf ══ link0  198.18.0.2/30  td-TAG-b

All laboratories have the same addresses (of RFC 2544's range for benchmarks, which nobody routes): they cannot meet.

Whoever made namespaces holds a lock on their record in /run/tandemdisk and removes them at its end; should it be
killed, ``deploy.guardian`` does. What outlives that one too (a machine out of memory) lies there with the lock free:
the next maker, or ``tandemdisk hosts down``, removes it. Hosts that are kept (``hosts up``) have no maker any more:
whoever runs a pair on them holds a shared lock, and nobody removes them under it unless they are named. Namespaces need
root; nothing else here does.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

from common.child import python_command, python_environment
from common.errors import ConfigError, NotRunning, OperationFailed

Side = Literal["a", "b"]
SIDES: Final[tuple[Side, Side]] = ("a", "b")

PREFIX: Final = "td-"
INTERFACE: Final = "link0"
ADDRESSES: Final[dict[Side, str]] = {"a": "198.18.0.1", "b": "198.18.0.2"}
REPLICATION_PORT: Final = 10810
RECORDS: Final = Path("/run/tandemdisk")
NAMESPACES: Final = Path("/run/netns")
COMMAND_TIMEOUT_S: Final = 20.0
TAKE_OVER_S: Final = 5.0
"""For the guardian of a maker that was killed to remove what it watches."""
SUDO: Final = "Give the command with sudo."
SUDO_OR_LOCAL: Final = f"{SUDO[:-1]}, or leave --hosts out: both sides then run on this machine as it is."

_CAPABILITIES: Final = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
"""By their bits in CapEff (capabilities(7)): what ip netns and tc ask for."""
_RECORD_BYTES: Final = 160
_RATE: Final = re.compile(r"(\d+(?:\.\d+)?)(k|m|g)bit", re.IGNORECASE)
_SCALE: Final = {"k": 1e3, "m": 1e6, "g": 1e9}
_TAG: Final = re.compile(r"[A-Za-z0-9]{1,10}")
_LEAST_BURST: Final = 128 * 1024
"""Two segments as the kernel builds them (64 KiB): a smaller bucket would take them apart."""
_BURST_S: Final = 0.002
_QUEUE: Final = "50ms"


class Host(Protocol):
    """Where a process can be started."""

    @property
    def name(self) -> str: ...

    @property
    def address(self) -> str:
        """Where other hosts reach it."""

    def prefix(self) -> tuple[str, ...]:
        """What has to stand before a command so that it runs there. ConfigError if this machine cannot run it."""


@dataclass(frozen=True, slots=True)
class Local:
    """This machine."""

    name: str = "localhost"
    address: str = "127.0.0.1"

    def prefix(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class Machine:
    """Another machine, which an operator or a deployment tool sets up."""

    name: str
    address: str

    def prefix(self) -> tuple[str, ...]:
        raise ConfigError(
            f"Host {self.name} is another machine: nothing is started there from here.",
            hint=f"`tandemdisk deploy render CONFIG --host {self.name}` prints what it needs.",
        )


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace of this machine."""

    name: str
    address: str

    def prefix(self) -> tuple[str, ...]:
        # nsenter and not `ip netns exec`: it changes nothing but the network, and mounts stay visible everywhere.
        return ("nsenter", f"--net={NAMESPACES / self.name}", "--")

    def exists(self) -> bool:
        return (NAMESPACES / self.name).exists()

    def run(self, *command: str, text: str = "", check: bool = True) -> str:
        """Standard output of ``command`` in this namespace."""
        return run([*self.prefix(), *command], text=text, check=check)

    def pids(self) -> list[int]:
        """Every process that is in this namespace."""
        return [int(pid) for pid in run(["ip", "netns", "pids", self.name], check=False).split()]

    def kill_processes(self) -> None:
        """SIGKILL everything in it."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def run(command: Sequence[str], *, text: str = "", check: bool = True) -> str:
    """Standard output of a network tool; OperationFailed with what it said if it failed."""
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise _missing([command[0]]) from None
    except subprocess.TimeoutExpired:
        raise OperationFailed(f"{' '.join(command)} did not end within {COMMAND_TIMEOUT_S:g} s.") from None
    if check and done.returncode != 0:
        raise OperationFailed(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def require_root(what: str = "Network namespaces", hint: str = SUDO) -> None:
    """ConfigError unless this process may make namespaces and has the tools for them."""
    if os.geteuid() != 0:
        raise ConfigError(f"{what} need root.", hint=hint)
    if lacking := [name for name, bit in _CAPABILITIES.items() if not _effective_capabilities() >> bit & 1]:
        raise ConfigError(
            f"{what} need {' and '.join(lacking)}, which root does not have here.",
            hint="Start the container with --privileged.",
        )
    missing = [tool for tool in ("ip", "tc", "nft", "nsenter") if shutil.which(tool) is None]
    if missing:
        raise _missing(missing)


def _effective_capabilities() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)


def _missing(tools: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{', '.join(tools)} must be installed for network namespaces.", hint="apt-get install iproute2 nftables"
    )


def parse_rate(text: str) -> str | None:
    """A rate as tc takes it (``100mbit``), None for ``unlimited``. ValueError that says what is accepted."""
    if text.lower() == "unlimited":
        return None
    if not _RATE.fullmatch(text):
        raise ValueError(f"{text!r} is no rate; write something like 100mbit, 1gbit, or unlimited")
    return text.lower()


def rate_bits(rate: str) -> float:
    """Bits a second of ``100mbit``."""
    match = _RATE.fullmatch(rate)
    assert match is not None, "checked by parse_rate"
    return float(match[1]) * _SCALE[match[2].lower()]


class NetnsHosts:
    """Two namespaces and the cable between them. ``up`` and ``down`` may be called whatever is there."""

    def __init__(self, tag: str | None = None, rate: str | None = None) -> None:
        self.tag = tag or secrets.token_hex(4)
        if not _TAG.fullmatch(self.tag):
            raise ConfigError(f"{self.tag!r} cannot name hosts; use up to 10 letters and digits.")
        self.rate = rate
        self.hosts: dict[Side, Namespace] = {
            side: Namespace(f"{PREFIX}{self.tag}-{side}", ADDRESSES[side]) for side in SIDES
        }
        self._lease = -1
        self._guardian: subprocess.Popen[bytes] | None = None
        self._pipe = -1
        """Open as long as this process lives: what its guardian waits for is its end."""

    # Records

    @property
    def record(self) -> Path:
        return RECORDS / f"{self.tag}.json"

    @property
    def owned(self) -> bool:
        """True if this object made the namespaces and will remove them."""
        return self._lease >= 0

    def _take_lease(self) -> bool:
        RECORDS.mkdir(mode=0o755, parents=True, exist_ok=True)
        while True:
            lease = os.open(self.record, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_record(lease):
                    self._lease = lease
                    return True
            except BlockingIOError:
                os.close(lease)
                return False
            os.close(lease)  # its holder has just removed it: a lock on it would keep nobody out

    def _is_record(self, lease: int) -> bool:
        try:
            return os.path.samestat(os.fstat(lease), self.record.stat())
        except FileNotFoundError:
            return False

    def _take_over(self) -> bool:
        """The lease, once nobody holds it; False if somebody does who lives. A guardian at its work is waited for."""
        deadline = time.monotonic() + TAKE_OVER_S
        while not self._take_lease():
            recorded = self._recorded()
            settled = recorded.get("kept") and self.exists()
            if settled or _alive(recorded.get("maker")) or time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def _drop_lease(self) -> None:
        if self._lease >= 0:
            os.close(self._lease)
            self._lease = -1

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        """Hold kept hosts against ``hosts down`` of all; others have a maker. NotRunning if they are gone."""
        if not self._recorded().get("kept"):
            yield
            return
        lease = os.open(self.record, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lease, fcntl.LOCK_SH)  # who looks at kept hosts or removes them has the other lock for a moment
            if not self._is_record(lease) or not self.exists():
                raise NotRunning(f"The hosts {self.tag} were removed.", hint="`tandemdisk hosts list` shows them.")
            yield
        finally:
            os.close(lease)

    # Life

    def exists(self) -> bool:
        return all(host.exists() for host in self.hosts.values())

    def up(self, *, keep: bool = False) -> bool:
        """Make what is missing; True if they are ours to remove (at exit at the latest), False if somebody else's.

        ``keep``: they stay when this process ends, until ``down``.
        """
        require_root()
        if self.owned:
            return True
        sweep()
        if not self._take_over():
            return False
        if self._recorded().get("kept") and self.exists():
            self._drop_lease()
            return False
        try:
            self._record(kept=False)
            self._guardian, self._pipe = _start_guardian(self.tag, self._lease)
            self._remove()
            self._make()
        except BaseException:
            self.down()
            raise
        if keep:
            self._record(kept=True)  # not before: a maker that is stopped halfway leaves nothing
            self._dismiss_guardian()
            self._drop_lease()
        else:
            atexit.register(self.down)
        return True

    def _busy(self) -> bool:
        """Somebody started something in hosts that were made to stay."""
        return bool(self._recorded().get("kept")) and any(host.pids() for host in self.hosts.values() if host.exists())

    def _recorded(self) -> dict[str, Any]:
        try:
            recorded: dict[str, Any] = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return {}
        return recorded

    def _record(self, *, kept: bool) -> None:
        said = {"tag": self.tag, "kept": kept, "rate": self.rate, "maker": None if kept else os.getpid()}
        self._write_record(said)

    def _write_record(self, said: dict[str, Any]) -> None:
        # One write of one length: who reads it without the lock never finds it empty or cut off.
        fd = os.open(self.record, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, json.dumps(said).ljust(_RECORD_BYTES).encode(), 0)
        finally:
            os.close(fd)

    def _dismiss_guardian(self) -> None:
        """Close the pipe: it finds that there is nothing to do for it, and ends."""
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            os.close(self._pipe)
            guardian.wait(COMMAND_TIMEOUT_S)

    def _make(self) -> None:
        one, other = self.hosts["a"], self.hosts["b"]
        run(["ip", "-batch", "-"], text=f"netns add {one.name}\nnetns add {other.name}\n")
        run(["ip", "link", "add", INTERFACE, "netns", one.name, "type", "veth",
             "peer", "name", INTERFACE, "netns", other.name])  # fmt: skip
        for host in (one, other):
            lines = (f"address add {host.address}/30 dev {INTERFACE}", "link set lo up", f"link set {INTERFACE} up")
            run(["ip", "-n", host.name, "-batch", "-"], text="\n".join(lines) + "\n")
        self.set_rate(self.rate)

    def down(self) -> None:
        """End every process in them, remove them and their record. Idempotent."""
        atexit.unregister(self.down)
        self._remove()
        self.record.unlink(missing_ok=True)
        self._dismiss_guardian()
        self._drop_lease()

    def down_if_left(self, lease: int | None = None) -> bool:
        """``down`` if their maker is gone and did not mean to keep them; True if so.

        ``lease``: that of the maker, which the caller shares. Without it the caller takes it, if it is free.
        """
        if not self.record.exists():
            return False
        if lease is not None and self._is_record(lease):
            self._lease = lease
        elif lease is not None or not self._take_over():
            return False
        if self._recorded().get("kept", True):
            self._drop_lease()
            return False
        self.down()
        return True

    def _remove(self) -> None:
        for host in self.hosts.values():
            if host.exists():
                host.kill_processes()
                run(["ip", "-n", host.name, "link", "delete", INTERFACE], check=False)
                run(["ip", "netns", "delete", host.name], check=False)

    @contextlib.contextmanager
    def held(self) -> Iterator[Self]:
        """The hosts for the time of the context: made if they are missing, and then removed at its end.

        NotRunning if somebody removes them just now.
        """
        if self.up():
            try:
                yield self
            finally:
                self.down()
        else:
            with self._used():
                yield self

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.owned:
            self.down()

    # The cable

    def set_rate(self, rate: str | None, sides: Sequence[Side] = SIDES) -> None:
        """Limit what each of ``sides`` sends (None: no limit); takes effect at once."""
        for side in sides:
            host = self.hosts[side]
            if rate is None:
                host.run("tc", "qdisc", "delete", "dev", INTERFACE, "root", check=False)
                continue
            burst = max(_LEAST_BURST, int(rate_bits(rate) / 8 * _BURST_S))
            host.run("tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", "rate", rate,
                     "burst", str(burst), "latency", _QUEUE)  # fmt: skip
        if set(sides) == set(SIDES):
            self.rate = rate
            if recorded := self._recorded():
                self._write_record({**recorded, "rate": rate})

    def current_rate(self) -> str | None:
        """What the cable carries now, whoever said so last."""
        rate: str | None = self._recorded().get("rate", self.rate)
        return rate

    def set_plugged(self, side: Side, plugged: bool) -> None:
        """Take ``side``'s end of the cable out, or put it back."""
        self.hosts[side].run("ip", "link", "set", INTERFACE, "up" if plugged else "down")

    def describe(self) -> dict[str, Any]:
        """What ``tandemdisk hosts list`` shows."""
        held = self.owned
        if not held and self.record.exists():
            held = not self._take_lease()
            self._drop_lease()
        recorded = self._recorded()
        return {
            "tag": self.tag,
            "kept": bool(recorded.get("kept")),
            "in_use": held,
            "rate": recorded.get("rate"),
            "hosts": {
                side: {"namespace": host.name, "address": host.address, "processes": len(host.pids())}
                for side, host in self.hosts.items()
            },
        }


def _alive(pid: object) -> bool:
    """Whether ``pid`` runs: a zombie has let go of everything already."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _start_guardian(tag: str, lease: int) -> tuple[subprocess.Popen[bytes], int]:
    """The guardian of ``tag``, and the end of the pipe that says that its maker lives."""
    reading, writing = os.pipe()
    try:
        command = [*python_command("deploy.guardian"), tag, str(lease)]
        guardian = subprocess.Popen(
            command, stdin=reading, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(lease,), cwd="/",
            env=python_environment(), start_new_session=True,
        )  # fmt: skip
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    return guardian, writing


def found() -> list[NetnsHosts]:
    """Every laboratory of which a record or a namespace is there."""
    tags = {path.stem for path in RECORDS.glob("*.json")} if RECORDS.is_dir() else set()
    if NAMESPACES.is_dir():
        tags |= {path.name[len(PREFIX) : -2] for path in NAMESPACES.glob(f"{PREFIX}*-[ab]")}
    return [NetnsHosts(tag) for tag in sorted(tags) if _TAG.fullmatch(tag)]


def sweep() -> list[str]:
    """Remove what makers that were killed have left behind; its tags."""
    swept: list[str] = []
    for hosts in found():
        if not hosts.record.exists() or not hosts._take_lease():
            continue
        if hosts._recorded().get("kept", True) or any(host.pids() for host in hosts.hosts.values() if host.exists()):
            hosts._drop_lease()  # somebody's on purpose, or somebody who has not noticed yet that he is alone
            continue
        hosts.down()
        swept.append(hosts.tag)
    return swept


def remove_all(tags: Sequence[str] = ()) -> list[str]:
    """Remove hosts by tag, or all that nobody holds and in which nothing runs on purpose; what was removed.

    NotRunning if a tag is not there.
    """
    require_root()
    there = {hosts.tag: hosts for hosts in found()}
    if unknown := [tag for tag in tags if tag not in there]:
        raise NotRunning(f"There are no hosts {', '.join(unknown)}.", hint="`tandemdisk hosts list` shows them.")
    removed: list[str] = []
    for tag, hosts in there.items():
        if tag in tags or (not tags and hosts._take_lease() and not hosts._busy()):
            hosts.down()
            removed.append(tag)
        hosts._drop_lease()
    return removed
