"""A pair on two hosts made of network namespaces: up, commands from outside, every fault of the cable.

Faults last until a condition is seen, never for a time that was guessed; every test ends with equal disks or with the
contents that a failover promised.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.nbd_client import NbdClient
from deploy.examples import guest_failover, guest_machine
from deploy.examples.haproxy import require_haproxy
from deploy.faults import Cut, Fault, Flapping, Killed, OneWayCut, Paused, SlowLink, Unplugged
from deploy.hosts import NetnsHosts, found
from deploy.pair import Pair, PairOptions
from tests import pairs
from tests.conftest import wait_until
from tests.pairs import MIB, tandemdisk

pytestmark = [pytest.mark.root, pytest.mark.local_hosts]
SIZE = 16 * MIB
SPAN = (0, 4 * MIB)
"""Where guests write while the cable is cut: a resync that moved everything would be seen."""
REPLICATION = {"heartbeat_s": 0.1, "peer_timeout_s": 0.7}


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """In sync mode; tests share it as long as they leave it protected."""
    options = PairOptions(size=SIZE, hosts="netns", mode="sync", overrides={"replication": REPLICATION})
    with tempfile.TemporaryDirectory(prefix="td-", dir="/tmp") as directory:
        with pairs.running(Path(directory) / "p", options) as made:
            with NbdClient(pairs.primary_uri(made)) as client:
                pairs.write_all(client, pairs.random_bytes(1, SIZE))
            yield made


@pytest.fixture
def hosts(pair: Pair) -> NetnsHosts:
    made = pair.directory.hosts()
    assert made is not None
    return made


def protected(pair: Pair) -> None:
    pair.wait_protected(30)
    status = pair.status()
    assert status["secondary"]["peer"]["connected"]


def cut_noticed(pair: Pair) -> None:
    pair.wait_for(lambda now: now["primary"]["state"] not in ("protected", "syncing"), "cut off", 10)


def test_the_hosts_see_each_other_and_nothing_else(pair: Pair, hosts: NetnsHosts) -> None:
    status = pair.status()
    for side, role in (("a", "primary"), ("b", "secondary")):
        host = hosts.hosts["a" if side == "a" else "b"]
        assert status[role]["pid"] in host.pids()
        interfaces = {link["ifname"] for link in json.loads(host.run("ip", "-j", "link"))}
        assert interfaces == {"lo", "link0"}
    assert status["primary"]["peer"]["address"] == "tcp://198.18.0.2:10810"
    settings = pair.settings("primary").replication
    assert settings.secret_key is not None, "CURVE is on unless it was turned off"
    assert Path(settings.secret_key).stat().st_mode & 0o777 == 0o600


def test_nobody_without_the_key_gets_in(pair: Pair, hosts: NetnsHosts) -> None:
    """What crosses the cable is not readable, and a stranger's HELLO is not heard."""
    program = """
import sys, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.linger = 0
monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
socket.connect(sys.argv[1])
assert monitor.poll(10000), "nothing happened"
from zmq.utils.monitor import recv_monitor_message
print(recv_monitor_message(monitor)["event"].name)
"""
    said = hosts.hosts["a"].run(sys.executable, "-c", program, "tcp://198.18.0.2:10810")
    assert "SUCCEEDED" not in said
    protected(pair)


def faults(hosts: NetnsHosts) -> dict[str, Fault]:
    return {
        "cut": Cut(hosts),
        "to b": OneWayCut(hosts, to="b"),
        "to a": OneWayCut(hosts, to="a"),
        "unplugged": Unplugged(hosts, "b"),
    }


@pytest.mark.parametrize("fault", ["cut", "to b", "to a", "unplugged"])
def test_writes_go_on_through_a_cut_and_both_disks_have_them_after_it(
    pair: Pair, hosts: NetnsHosts, fault: str
) -> None:
    before = pairs.contents(pairs.primary_uri(pair))
    pairs.through_a_fault(pair, faults(hosts)[fault], before, span=SPAN, seed=len(fault))


@pytest.mark.slow
def test_the_same_while_side_b_leads(pair: Pair, hosts: NetnsHosts) -> None:
    pair.switchover()
    protected(pair)
    model = pairs.contents(pairs.guest_uri(pair))
    for fault in ("cut", "to b", "to a"):
        model = pairs.through_a_fault(pair, faults(hosts)[fault], model, span=SPAN, seed=len(fault))
    pair.switchover()
    protected(pair)
    assert pairs.contents(pairs.primary_uri(pair)) == model


@pytest.mark.slow
def test_flapping_and_a_slow_link(pair: Pair, hosts: NetnsHosts) -> None:
    with pairs.Load(pairs.primary_uri(pair), seed=5) as load:
        with Flapping(hosts, down_s=0.15, up_s=0.1) as flapping:
            wait_until(lambda: flapping.flaps >= 5, 20, "five flaps")
        with SlowLink(hosts, "2mbit"):
            load.wait_for(load.answered + 50)
        protected(pair)
        load.wait_for(load.answered + 200)
        load.stop()
        assert not load.errors
    pair.checkpoint()
    pairs.compare_disks(pair)


@pytest.mark.slow
def test_a_slow_link_carries_more_compressed(short_dir: Path) -> None:
    """Guests' writes and those of a resync; the disks are equal, and status tells the ratio."""
    options = PairOptions(
        size=SIZE, hosts="netns", mode="async", compression="zstd", overrides={"replication": REPLICATION}
    )
    text = b"".join(b"line %d of many, and each says much the same\n" % number for number in range(120_000))[: 4 * MIB]
    with pairs.running(short_dir / "p", options) as pair:
        hosts = pair.directory.hosts()
        assert hosts is not None
        with SlowLink(hosts, "40mbit"), NbdClient(pairs.primary_uri(pair)) as client:
            for offset in range(0, len(text), 64 * 1024):
                client.submit_write(offset, text[offset : offset + 64 * 1024])
            client.collect(client.in_flight)
            pair.wait_for(lambda now: not now["lag"]["bytes"], "drained", 30)
            before = pair.status()["compression"]
            assert before["ratio"] > 1.5, before
            with Cut(hosts):
                pair.wait_for(lambda now: now["primary"]["state"] == "alone", "alone", 15)
                client.write(8 * MIB, text)
            protected(pair)
        after = pair.status()["compression"]
        assert after["wire_bytes"] - before["wire_bytes"] < len(text) // 2, "a resync is compressed, too"
        pair.checkpoint()
        pairs.compare_disks(pair)


def test_a_paused_secondary_is_waited_for_or_left(pair: Pair) -> None:
    with pairs.Load(pairs.primary_uri(pair), seed=6) as load:
        load.wait_for(100)
        with Paused(pair.status()["secondary"]["pid"]):
            wait_until(lambda: pair.client("primary").call("status")["state"] == "alone", 15, "being alone")
            load.wait_for(load.answered + 100)
        protected(pair)
        load.stop()
        assert not load.errors
    pair.checkpoint()
    pairs.compare_disks(pair)


def test_a_killed_secondary_comes_back_on_its_host(pair: Pair, hosts: NetnsHosts) -> None:
    before = pair.status()["secondary"]["pid"]
    with pairs.Load(pairs.primary_uri(pair), seed=7) as load:
        load.wait_for(100)
        with Killed(before):
            pair.wait_for(lambda now: now["secondary"]["pid"] is None, "without its secondary", 10)
        pair.up()
        protected(pair)
        load.stop()
        assert not load.errors
    assert pair.status()["secondary"]["pid"] in hosts.hosts["b"].pids()
    pair.checkpoint()
    pairs.compare_disks(pair)


def test_hosts_are_gone_when_the_pair_is(short_dir: Path) -> None:
    """By command, with a rate and without CURVE; the namespaces live exactly as long as the pair."""
    directory = short_dir / "p"
    options = ("--size", "16M", "--hosts", "netns", "--rate", "100mbit", "--plaintext", "--detach")
    up = tandemdisk("up", "--dir", directory, *options)
    assert up.returncode == 0, up.stderr
    hosts = Pair(directory).directory.hosts()
    assert hosts is not None
    assert hosts.exists()
    assert Pair(directory).settings("primary").replication.plaintext
    assert "rate 100Mbit" in hosts.hosts["a"].run("tc", "qdisc", "show", "dev", "link0")
    listed = json.loads(tandemdisk("hosts", "list", "--json").stdout)["hosts"]
    (mine,) = [one for one in listed if one["tag"] == hosts.tag]
    assert mine["in_use"]
    assert mine["hosts"]["b"]["processes"] == 2
    assert tandemdisk("up", "--dir", directory, "--hosts", "local").returncode == 2
    down = tandemdisk("down", "--dir", directory)
    assert down.returncode == 0, down.stderr
    assert not hosts.exists()
    assert hosts.tag not in {one.tag for one in found()}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("haproxy", [False, True], ids=["redirect", "haproxy"])
def test_a_guest_goes_on_across_a_failover(short_dir: Path, haproxy: bool) -> None:
    """ext4 through QEMU's NBD client; the primary's host dies under it. The example is the test."""
    try:
        guest_failover.require_tools()
        if haproxy:
            require_haproxy()
    except ConfigError as error:
        pytest.skip(str(error))
    lines: list[str] = []
    program = guest_failover.story(short_dir, lines.append, haproxy=haproxy)
    assert program.error is None
    assert program.written >= 60
    assert any("equal" in line for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_machine_goes_on_across_a_failover(short_dir: Path) -> None:
    """A QEMU (TCG) that boots from the pair: its BIOS, virtio-blk, and every sector that it was told is written."""
    try:
        guest_machine.require_qemu()
    except ConfigError as error:
        pytest.skip(str(error))
    lines: list[str] = []
    assert guest_failover.machine_story(short_dir, lines.append) >= 2 * guest_failover.SECTORS
    assert any("host is gone" in line for line in lines)
