"""A machine that systemd runs: its own processes, mounts and host name on this kernel, its network a namespace.

The root is an overlay on this machine's: all of it is there, and what the machine changes stays below ``directory``,
also when it is switched off and on again. Of this machine's units only those of systemd itself are left, without what
would reach into the kernel that both share (sysctl, modules, clocks).
"""

from __future__ import annotations

import contextlib
import os
import signal
import site
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from tests.conftest import TEST_MARK, wait_until

SYSTEMD: Final = Path("/lib/systemd/systemd")
_CGROUP: Final = Path("/sys/fs/cgroup")
CGROUPS: Final = [_CGROUP / "systemd", _CGROUP / "unified"] if (_CGROUP / "unified").is_dir() else [_CGROUP]
_KEPT: Final = ("systemd-journald.service", "systemd-tmpfiles-setup.service")
"""What the system is made of, beside what a test enables."""
_ROOT: Final = Path(__file__).parents[1]

BOOT: Final = """
set -eu
base=$1 python=$2 packages=$3 project=$4
root=$base/root
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/changes,workdir=$base/work" "$root"
mount -t proc proc "$root/proc"
mount --bind -o ro /proc/sys "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/sys/fs/cgroup"
if [ -d /sys/fs/cgroup/unified ]; then
    mkdir "$root/sys/fs/cgroup/systemd" "$root/sys/fs/cgroup/unified"
    mount -t cgroup -o none,name=systemd cgroup "$root/sys/fs/cgroup/systemd"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup/unified"
else
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
fi
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for node in null zero full random urandom tty; do
    touch "$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount --bind -o ro "$python" "$root/opt/python"
mount --bind -o ro "$packages" "$root/opt/packages"
mount --bind -o ro "$project" "$root/opt/tandemdisk"
hostname "$5"
cd "$root"
mkdir -p .before
pivot_root . .before
umount -l .before
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin "$6" --system --unit=multi-user.target --show-status=no
"""

TANDEMDISK: Final = """#!/bin/sh
# The interpreter and the project of the test, where ProtectHome= does not hide them.
PYTHONPATH=/opt/tandemdisk:/opt/packages exec /opt/python/bin/python3 -P -B -m deploy "$@"
"""


class Booted:
    """One machine; ``prefix`` is what has to stand before a command so that it runs in its network."""

    def __init__(self, directory: Path, name: str, prefix: tuple[str, ...]) -> None:
        self.directory, self.name = directory, name
        self.changes = directory / "changes"
        self._prefix = prefix
        self._init: subprocess.Popen[bytes] | None = None
        for part in ("changes", "work", "root"):
            (directory / part).mkdir(parents=True)
        for units in ("/etc/systemd/system", "/usr/lib/systemd/system"):
            for unit in Path(units).glob("*.wants/*"):
                if unit.name not in _KEPT:
                    self._hide(unit)
        for place in ("python", "packages", "tandemdisk"):
            (self.changes / "opt" / place).mkdir(parents=True)
        command = self.changes / "usr/bin/tandemdisk"
        command.parent.mkdir(parents=True, exist_ok=True)
        command.write_text(TANDEMDISK)
        command.chmod(0o755)

    def _hide(self, path: Path) -> None:
        """A device with the numbers 0 is how an overlay says that something is not there."""
        target = self.changes / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mknod(target, 0o600 | 0o020000, os.makedev(0, 0))

    # Power

    def switch_on(self) -> None:
        """Boot, until systemd says that it is done."""
        for place in self._cgroups():
            place.mkdir(exist_ok=True)
        program = "".join(f"echo $$ > {place}/cgroup.procs; " for place in self._cgroups())
        packages = site.getsitepackages()[0]
        given = map(str, (self.directory, sys.base_prefix, packages, _ROOT, self.name, SYSTEMD))
        apart = ("--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--cgroup")
        mortal = ("setpriv", "--pdeathsig", "KILL")
        command = [*self._prefix, *mortal, "unshare", *apart, "sh", "-c", BOOT, "sh", *given]
        environment = {name: value for name, value in os.environ.items() if name != TEST_MARK}  # it may outlive a test
        with (self.directory / "console").open("ab") as log:
            self._init = subprocess.Popen(
                ["sh", "-c", program + 'exec "$@"', "sh", *command],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        wait_until(lambda: self.run("systemctl", "is-system-running").strip() in ("running", "degraded"), 60, "a boot")

    def switch_off(self) -> None:
        """As when the plug is pulled: all its processes are gone at once. What it has written stays."""
        if self._init is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid(), signal.SIGKILL)
        self._init.wait(20)
        self._init = None
        for place in self._cgroups():
            wait_until(lambda place=place: _removed(place), 10, f"{place} without processes")  # type: ignore[misc]

    def _cgroups(self) -> list[Path]:
        return [place / f"tandemdisk-{self.name}-{os.getpid()}" for place in CGROUPS]

    def _pid(self) -> int:
        """Of its systemd, for this machine."""
        assert self._init is not None
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
        if not children:
            raise ProcessLookupError(self.name)
        return int(children[0])

    # Commands

    def command(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run there as root would."""
        entered = ("--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup", "--root")
        return subprocess.run(
            ["nsenter", "-t", str(self._pid()), *entered, *map(str, arguments)],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, capture_output=True, text=True, timeout=60, check=False,
            **options,
        )  # fmt: skip

    def run(self, *arguments: object, **options: Any) -> str:
        """Standard output of a command; empty while there is no machine to ask."""
        try:
            return self.command(*arguments, **options).stdout
        except ProcessLookupError:
            return ""

    def unit(self, name: str, what: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={what}", name).strip()

    def journal(self) -> str:
        """What its services said."""
        return self.run("journalctl", "--no-pager", "--output=cat")


def _removed(place: Path) -> bool:
    """Remove control groups that have no processes, the innermost first."""
    for directory, _, _ in os.walk(place, topdown=False):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()
    return not place.exists()
