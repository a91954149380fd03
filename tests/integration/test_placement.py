"""`tandemdisk up --hosts FILE`: hosts that are here start, for the others it is said what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.nbd_client import NbdClient
from deploy.hosts import ADDRESSES
from deploy.pair import Pair, PairOptions
from tests import pairs
from tests.pairs import MIB, tandemdisk

pytestmark = pytest.mark.local_hosts


def pair_file(directory: Path, east: str, west: str, port: int = 17420) -> Path:
    for name in ("east", "west"):
        with (directory / f"{name}.raw").open("wb") as disk:
            disk.truncate(8 * MIB)
    path = directory / "pair.toml"
    path.write_text(f"""
pair_id = "placed"
mode = "async"
initial_sync = "assume"
[hosts.west]
address = "{west}"
starts_as = "secondary"
[hosts.east]
address = "{east}"
starts_as = "primary"
[[volumes]]
name = "root"
disks = {{ east = "{directory}/east.raw", west = "{directory}/west.raw" }}
[replication]
port = {port}
compression = "zstd"
heartbeat_s = 0.2
peer_timeout_s = 1.0
[buffer]
size_bytes = "64M"
directory = "{directory}/buffer"
""")
    return path


@pytest.mark.parametrize(
    "addresses", [("127.0.0.1", "127.0.0.2"), pytest.param(tuple(ADDRESSES.values()), marks=pytest.mark.root)]
)
def test_both_hosts_are_here(short_dir: Path, addresses: tuple[str, str]) -> None:
    """Addresses of this machine, or of the laboratory: encrypted, with the disks that the file names."""
    path = pair_file(short_dir, *addresses)
    directory = short_dir / "p"
    up = tandemdisk("up", "--dir", directory, "--hosts", path, "--detach")
    assert up.returncode == 0, up.stderr
    pair = Pair(directory)
    try:
        status = pair.status()
        assert status["state"] == "protected"
        assert status["mode"] == "async"
        assert status["primary"]["peer"]["address"] == f"tcp://{addresses[1]}:17420"
        assert pair.settings("primary").replication.secret_key == f"{directory}/a/east.key_secret"
        with NbdClient(status["volumes"][0]["primary_uri"]) as client:
            client.write(0, b"to both")
        pair.checkpoint()
        pairs.compare_disks(pair)
        assert (short_dir / "west.raw").read_bytes()[:7] == b"to both"
        again = tandemdisk("up", "--dir", directory, "--hosts", path, "--detach")
        assert again.returncode == 0, again.stderr
    finally:
        assert tandemdisk("down", "--dir", directory, "--purge").returncode == 0


@pytest.mark.slow
def test_the_other_host_is_another_machine(short_dir: Path) -> None:
    """The side that is here serves; the operator reads what to do on the other one."""
    path = pair_file(short_dir, "127.0.0.1", "192.0.2.7")
    directory = short_dir / "p"
    up = tandemdisk("up", "--dir", directory, "--hosts", path, "--detach")
    try:
        assert up.returncode == 0, up.stderr
        assert f"tandemdisk deploy render {path} --host west" in up.stdout
        assert "sh FILES/install.sh" in up.stdout
        assert "tandemdisk failover --dir /etc/tandemdisk/placed" in up.stdout
        assert f"tandemdisk failover --dir {directory}" not in up.stdout, "nothing here could take over"
        assert "None" not in up.stdout
        assert "192.0.2.7:17420 does not answer yet" in up.stdout
        status = json.loads(tandemdisk("status", "--dir", directory, "--json").stdout)
        assert status["secondary"]["state"] == "elsewhere"
        with NbdClient(status["volumes"][0]["primary_uri"]) as client:
            client.write(0, b"alone for now")
    finally:
        assert tandemdisk("down", "--dir", directory, "--purge").returncode == 0


def test_what_cannot_be_started_is_refused(short_dir: Path) -> None:
    path = pair_file(short_dir, "192.0.2.6", "192.0.2.7")
    refused = tandemdisk("up", "--dir", short_dir / "p", "--hosts", path)
    assert refused.returncode == 2
    assert "No host in" in refused.stderr
    assert "--host east" in refused.stderr
    assert "--host west" in refused.stderr
    one_address = pair_file(short_dir, "127.0.0.1", "127.0.0.1")
    for options, sentence in (
        (PairOptions(hosts=str(one_address)), "an address of its own"),
        (PairOptions(hosts=str(one_address), size=MIB), "Leave --size out"),
        (PairOptions(hosts=str(short_dir / "none.toml")), "No such file"),
    ):
        with pytest.raises(ConfigError) as told:
            Pair.create(short_dir / "p", options)
        assert sentence in str(told.value)
    assert not (short_dir / "p").exists()
