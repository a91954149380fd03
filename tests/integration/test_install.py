"""The install.sh of `deploy render`, run for real: on a copy of /etc, in mounts and a network of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from common.config import load_config
from common.settings import NodeSettings
from deploy.peer import as_owner
from tests.pairs import tandemdisk

pytestmark = pytest.mark.root

PAIR_FILE = """
pair_id = "in-stall"
[hosts.east]
address = "192.0.2.1"
starts_as = "primary"
agent = "192.0.2.1:10811"
[hosts.west]
address = "192.0.2.2"
starts_as = "secondary"
[[volumes]]
name = "disk0"
disks = {{ east = "{root}/east.raw", west = "{root}/west.raw" }}
"""

SYSTEMCTL = """#!/bin/sh
# Remembers what it is told, and does with the firewall what systemd would.
echo "$@" >> "$CALLS"
case "$*" in
*firewall*) exec nft -f /etc/nftables.d/tandemdisk-in-stall.nft ;;
esac
"""

PROGRAM = """
set -eu
mount --make-rprivate /
cp -a /etc/. "$1/etc"
mount --bind "$1/etc" /etc
mount --bind "$1/lib" /usr/local/lib
sh "$1/files/install.sh"
sh "$1/files/install.sh"
nft list ruleset
"""


@pytest.fixture
def laid_out(short_dir: Path) -> Path:
    (short_dir / "pair.toml").write_text(PAIR_FILE.format(root=short_dir))
    for name in ("etc", "lib", "bin"):
        (short_dir / name).mkdir()
    (short_dir / "bin/systemctl").write_text(SYSTEMCTL)
    (short_dir / "bin/systemctl").chmod(0o755)
    options = ("--host", "east", "--output", short_dir / "files", "--command", "/bin/true")
    rendered = tandemdisk("deploy", "render", short_dir / "pair.toml", *options)
    assert rendered.returncode == 0, rendered.stderr
    return short_dir


def run(root: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{root}/bin:/usr/sbin:/usr/bin:/sbin:/bin", "CALLS": str(root / "calls")}
    return subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", PROGRAM, "sh", str(root)],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_host_is_set_up_and_set_up_again(laid_out: Path) -> None:
    (laid_out / "east.raw").write_bytes(bytes(1 << 20))
    done = run(laid_out)
    assert done.returncode == 0, done.stdout + done.stderr
    passwd = (laid_out / "etc/passwd").read_text().splitlines()
    (user,) = [line.split(":") for line in passwd if line.startswith("tandemdisk:")]
    uid, gid = int(user[2]), int(user[3])
    directory = laid_out / "etc/tandemdisk/in-stall"
    for path, mode, owner in (
        (directory / "primary.toml", 0o640, (0, gid)),
        (directory / "east.key_secret", 0o600, (uid, gid)),
        (directory / "west.key", 0o644, (0, 0)),
        (laid_out / "lib/tandemdisk/leads.sh", 0o755, (0, 0)),
        (laid_out / "etc/systemd/system/tandemdisk-primary@.service", 0o644, (0, 0)),
        (laid_out / "etc/systemd/system/tandemdisk-primary@in-stall.service.d/disks.conf", 0o644, (0, 0)),
    ):
        status = path.stat()
        assert (status.st_mode & 0o777, (status.st_uid, status.st_gid)) == (mode, owner), path
    assert (laid_out / "east.raw").stat().st_uid == uid
    calls = (laid_out / "calls").read_text().splitlines()
    assert calls == calls[: len(calls) // 2] * 2, "the second time like the first"
    assert calls[: len(calls) // 2] == [
        "daemon-reload",
        "restart tandemdisk-firewall@in-stall.service",
        "enable --now tandemdisk-leads-in-stall.socket",
        "enable --now tandemdisk-primary@in-stall.service",
    ]
    assert done.stdout.count("ip saddr 192.0.2.2 accept") == 1, "loaded twice, there once"
    assert done.stdout.count("tcp dport 10810 drop") == 1


def test_nothing_is_begun_without_the_disk(laid_out: Path) -> None:
    done = run(laid_out)
    assert done.returncode == 1
    assert f"There is no disk {laid_out}/east.raw" in done.stderr
    assert not (laid_out / "calls").exists()
    assert not (laid_out / "etc/tandemdisk").exists()


def test_what_root_writes_for_a_side_stays_its_users(short_dir: Path) -> None:
    disk, directory = short_dir / "disk.raw", short_dir / "a"
    disk.write_bytes(bytes(1 << 20))
    disk.chmod(0o660)
    os.chown(disk, 0, 65532)  # as a block device belongs to the group disk
    directory.mkdir()
    os.chown(directory, 65533, 65533)
    (short_dir / "a.toml").write_text(
        f'pair_id = "p"\nside = "a"\ndirectory = "{directory}"\n[[volumes]]\nname = "disk0"\ndisk = "{disk}"\n'
    )
    settings: NodeSettings = load_config(short_dir / "a.toml")
    short_dir.chmod(0o755)
    before = os.getgroups()
    with as_owner(settings):
        (directory / "metadata").write_bytes(disk.read_bytes())
    assert (directory / "metadata").stat().st_uid == 65533
    assert (os.geteuid(), os.getegid(), os.getgroups()) == (0, os.getgid(), before)
