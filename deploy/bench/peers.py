"""Who is measured: one class a server, all with the same disks and the same way to ask.

    tandemdisk-sync, tandemdisk-async     our pair, `mode = sync` and `mode = async`
    qemu-colo-tcp, qemu-colo-unix         QEMU's COLO block replication (colo.py), as across hosts and in its best case
    qemu-nbd, nbdkit                      a raw file behind one NBD server, not replicated

Peers are named like this on the command line and in every result.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Final, Literal

import psutil

from common import limits
from common.control import ControlClient
from common.errors import ConfigError, NeedsForce, NotRunning
from common.settings import Mode
from deploy.bench import scratch
from deploy.bench.servers import Servers, listens, wait_until
from deploy.layout import PairOptions
from deploy.pair import Pair

Failover = Literal["latest", "checkpoint"]
SETTLE_TIMEOUT_S: Final = 60.0


class Peer:
    """One measured server or pair. ``start`` first; then ``uri`` takes any NBD client until ``stop``.

    ``replicated`` peers also have ``guest_uri`` (the secondary's view), ``checkpoint``, ``kill_primary``, ``failover``.
    """

    replicated: ClassVar[bool] = False
    failovers: ClassVar[tuple[Failover, ...]] = ("checkpoint",)

    def __init__(self, name: str, title: str) -> None:
        self.name = name
        self.title = title
        self.uri = ""
        self.guest_uri = ""
        self.directory = Path()
        self.size = 0
        self.servers = Servers(Path())

    @staticmethod
    def footprint(size: int) -> int:
        """Bytes of memory file system that the peer may fill with disks of ``size`` bytes."""
        return size

    def start(self, directory: Path, size: int) -> None:
        """Make the disks in ``directory`` (of this peer alone) and bring the server up."""
        self.directory, self.size = directory, size
        directory.mkdir(mode=0o700)
        self.servers = Servers(directory)

    def disks(self, count: int) -> list[Path]:
        """``count`` prefilled disks, all alike."""
        paths = [self.directory / f"disk{number}.raw" for number in range(count)]
        scratch.fill(paths, self.size)
        return paths

    def pids(self) -> dict[str, int]:
        """Every server process there is, by its part."""
        return self.servers.pids()

    def commands(self) -> list[str]:
        """The command lines in use."""
        return self.servers.commands

    def memory_bounds(self) -> str:
        """What bounds the memory of its processes, in words."""
        return ""

    def checkpoint(self) -> None:
        """Make one, and return when the secondary has it. Nothing to do where nothing is replicated."""

    def settle(self) -> None:
        """Return when the secondary has applied every write acknowledged so far."""

    def kill_primary(self) -> None:
        raise NotRunning(f"{self.title} is not replicated.")

    def failover(self, target: Failover) -> None:
        raise NotRunning(f"{self.title} is not replicated.")

    def wait_committed(self) -> None:
        """Return when the work that a failover left in the background is done."""

    def stop(self) -> None:
        """End the processes and remove the disks."""
        self.servers.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class QemuNbd(Peer):
    """`qemu-nbd` on a raw file, with the options that are best for it here (its default cache mode, writeback)."""

    def __init__(self) -> None:
        super().__init__("qemu-nbd", "qemu-nbd, not replicated")

    def start(self, directory: Path, size: int) -> None:
        super().start(directory, size)
        (disk,) = self.disks(1)
        socket = directory / "nbd.sock"
        command = ["qemu-nbd", "-t", "-k", str(socket), "-f", "raw", "--cache=writeback", "--shared=16", str(disk)]
        self.servers.start("server", command, ready=lambda: listens(socket))
        self.uri = f"nbd+unix:///?socket={socket}"


class Nbdkit(Peer):
    """`nbdkit file`, with its defaults: 16 threads a connection, the kernel's page cache."""

    def __init__(self) -> None:
        super().__init__("nbdkit", "nbdkit file, not replicated")

    def start(self, directory: Path, size: int) -> None:
        super().start(directory, size)
        (disk,) = self.disks(1)
        socket = directory / "nbd.sock"
        self.servers.start(
            "server", ["nbdkit", "-f", "-U", str(socket), "file", str(disk)], ready=lambda: listens(socket)
        )
        self.uri = f"nbd+unix:///?socket={socket}"


class TandemDisk(Peer):
    """Our pair on this machine: the processes that `tandemdisk up` starts, and the supervisor beside them.

    Half of a disk buffer is the hidden disk, so with twice the disk's size it holds every block, as QEMU's does.
    """

    replicated = True
    failovers = ("checkpoint", "latest")

    def __init__(self, mode: Mode) -> None:
        super().__init__(f"tandemdisk-{mode}", f"tandemdisk, {mode}")
        self._mode: Mode = mode
        self._pair: Pair | None = None
        self._primary: ControlClient
        self._secondary: ControlClient
        self._known: dict[str, int] = {}

    @staticmethod
    def footprint(size: int) -> int:
        return 4 * size

    @property
    def pair(self) -> Pair:
        if self._pair is None:
            raise NotRunning(f"{self.title} was not started.")
        return self._pair

    def start(self, directory: Path, size: int) -> None:
        super().start(directory, size)
        primary_disk, secondary_disk = self.disks(2)
        options = PairOptions(
            primary_disks=(primary_disk,),
            secondary_disks=(secondary_disk,),
            assume_synced=True,
            mode=self._mode,
            buffer_bytes=2 * size,
            overrides={"buffer": {"directory": str(directory / "buffer")}},
        )
        self._pair = Pair.create(directory / "pair", options)
        self._pair.up()
        self._pair.wait_protected()
        # Kept, as a program that makes checkpoints would: a new client reads the pair's configuration first.
        self._primary = self._pair.client("primary")
        self._secondary = self._pair.client("secondary")
        status = self._pair.status()
        self.uri = status["primary"]["nbd_uri"]
        self.guest_uri = status["secondary"]["nbd_uri"]
        self._known = {
            "primary": status["primary"]["pid"],
            "secondary": status["secondary"]["pid"],
            "export": status["secondary"]["export_pid"],
            "supervisor": status["supervisor"]["pid"],
        }

    def pids(self) -> dict[str, int]:
        return {name: pid for name, pid in self._known.items() if pid and psutil.pid_exists(pid)}

    def commands(self) -> list[str]:
        return [" ".join(psutil.Process(pid).cmdline()) for pid in self.pids().values()]

    def memory_bounds(self) -> str:
        settings = self.pair.settings("secondary")
        window, buffer = settings.replication.window_bytes, settings.buffer.size_bytes
        pool = limits.RECEIVE_BUFFERS * limits.RECEIVE_BUFFER
        return (
            f"private memory is bounded by the receive buffers ({pool // limits.MIB} MiB a process) and the window of "
            f"unacknowledged batches ({window // limits.MIB} MiB), shared memory by the disk buffer, set to "
            f"{buffer // limits.MIB} MiB here, and its map (8 bytes a block)."
        )

    def checkpoint(self) -> None:
        self._primary.call("checkpoint")

    def settle(self) -> None:
        def settled() -> bool:
            return not self._primary.call("status")["lag"]["bytes"]

        wait_until(settled, SETTLE_TIMEOUT_S, f"{self.title}: settling")

    def batches(self) -> int:
        """Batches that the primary has sent so far."""
        return int(self._primary.call("status")["counters"]["batches"])

    def kill_primary(self) -> None:
        os.kill(self._known["primary"], signal.SIGKILL)

    def failover(self, target: Failover) -> None:
        """Given again for as long as the secondary takes to notice that its primary is gone."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            try:
                self._secondary.call("failover", to=target, force=False)
            except NeedsForce:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
            else:
                return

    def wait_committed(self) -> None:
        def committed() -> bool:
            status = self._secondary.call("status")
            return status["role"] == "primary" and not (status.get("commit") or {}).get("active")

        wait_until(committed, SETTLE_TIMEOUT_S, f"{self.title}: the commit")

    def stop(self) -> None:
        if self._pair is not None:
            pair, self._pair = self._pair, None
            try:
                pair.down(purge=True)
            finally:
                super().stop()
        else:
            super().stop()


Maker = Callable[[], Peer]


def _colo(between: Literal["tcp", "unix"]) -> Maker:
    def make() -> Peer:
        from deploy.bench.colo import QemuColo  # colo.py builds on this module

        return QemuColo(between)

    return make


PEERS: Final[dict[str, Maker]] = {
    "tandemdisk-sync": lambda: TandemDisk("sync"),
    "tandemdisk-async": lambda: TandemDisk("async"),
    "qemu-colo-unix": _colo("unix"),
    "qemu-colo-tcp": _colo("tcp"),
    "qemu-nbd": QemuNbd,
    "nbdkit": Nbdkit,
}
OURS: Final = ("tandemdisk-sync", "tandemdisk-async")
GROUPS: Final = {"qemu-colo": ("qemu-colo-unix", "qemu-colo-tcp")}
TOOLS: Final[dict[str, tuple[str, ...]]] = {
    "qemu-colo-unix": ("qemu-system-x86_64", "qemu-img"),
    "qemu-colo-tcp": ("qemu-system-x86_64", "qemu-img"),
    "qemu-nbd": ("qemu-nbd",),
    "nbdkit": ("nbdkit",),
}
PACKAGES: Final = {
    "qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "qemu-nbd": "qemu-utils", "nbdkit": "nbdkit",
}  # fmt: skip


def make_peer(name: str) -> Peer:
    """The peer of that name (a key of PEERS), not started."""
    return PEERS[name]()


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """Names from the command line (peers or groups) as peers. ConfigError naming every one that cannot run here."""
    problems = []
    found: list[str] = []
    for name in names:
        members = GROUPS.get(name, (name,))
        if name not in GROUPS and name not in PEERS:
            problems.append(f"{name}: there is no such peer; there are {', '.join([*GROUPS, *PEERS])}")
            continue
        missing = sorted({tool for member in members for tool in TOOLS.get(member, ()) if shutil.which(tool) is None})
        if missing:
            packages = sorted({PACKAGES[tool] for tool in missing})
            problems.append(f"{name}: needs {', '.join(missing)} (apt-get install {' '.join(packages)})")
        found += members
    if problems:
        raise ConfigError("Not every peer can be measured:", problems=tuple(problems))
    return tuple(dict.fromkeys(found))


def tool_versions() -> dict[str, str]:
    """First lines of what the installed tools say about themselves."""
    found = {}
    for tool in sorted({tool for tools in TOOLS.values() for tool in tools}):
        if shutil.which(tool):
            said = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
            found[tool] = said.splitlines()[0] if said else "?"
    return found
