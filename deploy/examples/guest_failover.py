"""A guest that lives on while its primary's host dies (root):

    python -m deploy.examples.guest_failover [--haproxy] [--machine]

    files, fsync ──▶ ext4 ──▶ loop ──▶ FUSE ──▶ QEMU's NBD client, reconnecting ──▶ redirect or HAProxy ──▶ who leads

Two hosts (network namespaces), a pair between them with CURVE, a file system on its export. A program writes files and
fsyncs each, as a database would. The primary's host loses power in the midst of it; the operator fails over; the
program's write takes as long as that takes, and goes on. At the end the file system is checked and every file compared.

QEMU's block layer is the client, as it is under a virtual machine: ``qemu-storage-daemon`` with ``reconnect-delay``. A
virtual machine takes the same words, and ``--machine`` is one that boots from the pair (``guest_machine``): ``-blockdev
driver=nbd,server.type=inet,server.host=…,server.port=…,export=disk0,reconnect-delay=60,node-name=disk0``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from common.errors import ConfigError, OperationFailed, TandemDiskError, TimedOut
from common.limits import KIB, MIB
from deploy.examples.guest_machine import Machine, install, require_qemu
from deploy.examples.haproxy import Haproxy, require_haproxy
from deploy.faults import HostGone
from deploy.hosts import require_root, run
from deploy.layout import PairOptions
from deploy.pair import Pair
from deploy.redirect import Redirector

SIZE: Final = 64 * MIB
TOOLS: Final = {
    "qemu-storage-daemon": "qemu-system-common", "mkfs.ext4": "e2fsprogs", "losetup": "mount", "mount": "mount",
}  # fmt: skip
RECONNECT_S: Final = 60
WAIT_S: Final = 60.0
FILES_KEPT: Final = 200
"""After that many the program begins to overwrite, so that it never fills the disk."""
MAX_FILE: Final = 64 * KIB
SECTORS: Final = 100
"""What a machine writes before the failover, and after it."""


def require_tools() -> None:
    """ConfigError unless the example can run here."""
    require_root("Namespaces and mounts")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        packages = " ".join(sorted({TOOLS[tool] for tool in missing}))
        raise ConfigError(f"{', '.join(missing)} must be installed.", hint=f"apt-get install {packages}")
    if not os.path.exists("/dev/fuse") or not os.path.exists("/dev/loop-control"):
        raise ConfigError("The kernel here has no FUSE or no loop devices.")


@contextlib.contextmanager
def mounted(address: tuple[str, int], export: str, directory: Path) -> Iterator[Path]:
    """A fresh ext4 on ``export`` at an NBD server's TCP address; the directory where it is mounted."""
    disk, mount = directory / "disk", directory / "mnt"
    disk.touch()
    mount.mkdir()
    server = f"server.type=inet,server.host={address[0]},server.port={address[1]}"
    qemu = subprocess.Popen(
        [
            "qemu-storage-daemon",
            "--blockdev",
            f"driver=nbd,node-name=disk,{server},export={export},reconnect-delay={RECONNECT_S}",
            "--export", f"type=fuse,id=fuse,node-name=disk,mountpoint={disk},writable=on",
        ]
    )  # fmt: skip
    try:
        wait_for(lambda: disk.stat().st_size > 0, "the FUSE export", qemu)
        run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", str(disk)])
        device = run(["losetup", "--find", "--show", "--direct-io=on", str(disk)]).strip()
        try:
            run(["mount", device, str(mount)])
            try:
                yield mount
            finally:
                run(["umount", str(mount)])
            run(["e2fsck", "-f", "-n", device])
        finally:
            run(["losetup", "--detach", device])
    finally:
        qemu.send_signal(signal.SIGTERM)
        try:
            qemu.wait(10)
        except subprocess.TimeoutExpired:
            qemu.kill()
            qemu.wait()


def wait_for(condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Until ``condition`` holds. TimedOut that names ``what``; OperationFailed if ``process`` ends before."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if process is not None and process.poll() is not None:
            raise OperationFailed(f"{process.args!r} ended with {process.returncode} before {what}.")
        if time.monotonic() > deadline:
            raise TimedOut(f"{what} did not happen within {WAIT_S:g} s.")
        time.sleep(0.01)


@dataclass
class Program:
    """Writes files one after another, each with fsync, and remembers what each must hold."""

    directory: Path
    digests: dict[str, str] = field(default_factory=dict)
    """By file, once its fsync has returned."""
    written: int = 0
    longest_s: float = 0.0
    """The slowest file: the one that a failover was in."""
    error: OSError | None = None
    _ending: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Program:
        self._thread = threading.Thread(target=self._run, name="program", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ending.set()
        self._thread.join(WAIT_S)

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                self._write(f"file{self.written % FILES_KEPT}")
        except OSError as error:
            self.error = error

    def _write(self, name: str) -> None:
        data = os.urandom(1 + self.written * 7919 % MAX_FILE)
        begun = time.monotonic()
        self.digests.pop(name, None)
        with (self.directory / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.longest_s = max(self.longest_s, time.monotonic() - begun)
        self.digests[name] = hashlib.sha256(data).hexdigest()
        self.written += 1

    def wait_written(self, count: int) -> None:
        """Until ``count`` more files were written. OperationFailed if one could not be."""
        wanted = self.written + count
        wait_for(lambda: self.written >= wanted or self.error is not None, f"{count} more files")
        if self.error is not None:
            raise OperationFailed(f"The program got an error: {self.error}")

    def check(self) -> int:
        """Compare every file with what was written; their number. OperationFailed names the first that differs."""
        for name, digest in self.digests.items():
            with (self.directory / name).open("rb") as file:
                # What the page cache holds proves nothing: have it read from the disk again.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                found = file.read()
            if hashlib.sha256(found).hexdigest() != digest:
                raise OperationFailed(f"{name} is not what was written.")
        return len(self.digests)


Say = Callable[[str], None]
Way = Haproxy | Redirector


@contextlib.contextmanager
def stage(directory: Path, *, haproxy: bool) -> Iterator[tuple[Pair, Way]]:
    """A protected pair on two hosts, and the way to whoever leads."""
    overrides = {"replication": {"heartbeat_s": 0.2, "peer_timeout_s": 1.0}}
    options = PairOptions(size=SIZE, hosts="netns", mode="sync", overrides=overrides)
    with Pair.create(directory / "p", options) as pair:
        pair.up()
        pair.wait_protected()
        way: Way = Haproxy(pair, directory) if haproxy else Redirector(pair)
        with way:
            yield pair, way


def lose_primary(pair: Pair, say: Say) -> None:
    """Its host loses power; the operator sees that and fails over."""
    hosts = pair.directory.hosts()
    assert hosts is not None
    HostGone(hosts, "a").begin()
    say("the primary's host is gone")
    pair.wait_for(lambda now: now["primary"]["pid"] is None, "without its primary", WAIT_S)
    done = pair.failover("latest")
    say(f"failed over in {done['seconds'] * 1000:.0f} ms")


def story(directory: Path, say: Say, *, haproxy: bool = False) -> Program:
    """The whole example in ``directory``; what the program did."""
    with (
        stage(directory, haproxy=haproxy) as (pair, way),
        mounted(way.address, "disk0", directory) as mount,
    ):
        say(f"a pair on two hosts; clients go to {way.uri()}; ext4 is mounted on it")
        with Program(mount) as program:
            program.wait_written(30)
            say(f"{program.written} files written")
            lose_primary(pair, say)
            program.wait_written(30)
            say(f"the program goes on: {program.written} files; one of them took {program.longest_s:.2f} s")
        run(["sync", "-f", str(mount)])
        say(f"all {program.check()} files compared: equal")
    return program


def machine_story(directory: Path, say: Say, *, haproxy: bool = False) -> int:
    """The same with a virtual machine that boots from the pair; how many sectors it wrote, each compared."""
    with stage(directory, haproxy=haproxy) as (pair, way):
        install(pair.status()["volumes"][0]["primary_uri"])
        with Machine(way.address, "disk0", directory) as machine:
            say(f"a pair on two hosts; a machine boots from {way.uri()}")
            wait_for(lambda: machine.written >= SECTORS, "the machine's first writes", machine.process)
            say(f"{machine.written} sectors written")
            lose_primary(pair, say)
            wanted = machine.written + SECTORS
            wait_for(lambda: machine.written >= wanted, "more of the machine's writes", machine.process)
            say(f"the machine goes on: {machine.written} sectors")
        checked = machine.check(pair.status()["volumes"][0]["secondary_uri"])
        say(f"all {checked} sectors compared: equal")
    return checked


def main() -> int:
    """Run it, telling each step."""
    begun = time.monotonic()
    try:
        haproxy, machine = (option in sys.argv[1:] for option in ("--haproxy", "--machine"))
        if machine:
            require_root("Namespaces")
            require_qemu()
        else:
            require_tools()
        if haproxy:
            require_haproxy()
        tell = machine_story if machine else story
        with tempfile.TemporaryDirectory(prefix="td-", dir="/tmp") as directory:
            tell(Path(directory), lambda line: print(f"{time.monotonic() - begun:6.2f} s  {line}", flush=True),
                 haproxy=haproxy)  # fmt: skip
    except TandemDiskError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
