"""Faults of hosts and cable with a failover in them, and the way back: rejoin, switchover, equal disks at the end.

One pair goes through all of it; every test leaves it protected, led by side a, its disks compared.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import NeedsForce, PeerRefused
from common.nbd_client import NbdClient
from deploy.faults import Cut, Flapping, HostGone, Killed, OneWayCut, SlowLink
from deploy.hosts import NetnsHosts
from deploy.pair import Pair, PairOptions
from tests import pairs
from tests.conftest import wait_until
from tests.pairs import MIB, tandemdisk

pytestmark = [pytest.mark.root, pytest.mark.local_hosts]
SIZE = 16 * MIB
REPLICATION = {"heartbeat_s": 0.1, "peer_timeout_s": 0.7}


@pytest.fixture(scope="module")
def shared() -> Iterator[Pair]:
    options = PairOptions(size=SIZE, hosts="netns", mode="sync", overrides={"replication": REPLICATION})
    with tempfile.TemporaryDirectory(prefix="td-", dir="/tmp") as directory:
        with pairs.running(Path(directory) / "p", options) as made:
            yield made


@pytest.fixture
def pair(shared: Pair) -> Pair:
    """Protected and led by side a, its contents known: none."""
    assert shared.status()["primary"]["role"] == "primary"
    with NbdClient(pairs.primary_uri(shared)) as client:
        client.zero(0, SIZE)
    return shared


@pytest.fixture
def hosts(pair: Pair) -> NetnsHosts:
    made = pair.directory.hosts()
    assert made is not None
    return made


def equal(pair: Pair) -> None:
    pair.wait_protected(30)
    pair.checkpoint()
    pairs.compare_disks(pair)


def back_to_a(pair: Pair) -> None:
    """Equal disks, led by side b; then the same led by side a."""
    equal(pair)
    assert pair.status()["secondary"]["role"] == "primary"
    before = pairs.contents(pairs.guest_uri(pair))
    told = tandemdisk("switchover", "--dir", pair.directory.path)
    assert told.returncode == 0, told.stderr
    equal(pair)
    assert pairs.contents(pairs.primary_uri(pair)) == before


def alone(status: dict[str, Any]) -> bool:
    """Side a goes on alone; once promoted, it is its engine that says so."""
    return bool(status["primary"].get("engine", status["primary"]["state"]) == "alone")


def write(uri: str, text: bytes, offset: int = 0) -> None:
    with NbdClient(uri) as client:
        client.write(offset, text)
        assert client.read(offset, len(text)) == text


def test_the_host_of_the_primary_is_gone(pair: Pair, hosts: NetnsHosts) -> None:
    """Power failure under load: no answered write is lost; commands work from outside; the host comes back."""
    guest = pairs.guest_uri(pair)
    with pairs.Load(pairs.primary_uri(pair), seed=8) as load:
        load.wait_for(300)
        with pytest.raises(NeedsForce):
            pair.failover("latest")
        with HostGone(hosts, "a"):
            load.join()
            told = tandemdisk("failover", "--dir", pair.directory.path, "--json")
            assert told.returncode == 0, told.stderr
            assert load.check(pairs.contents(guest)) >= load.answered
            write(guest, b"goes on")
    status = json.loads(tandemdisk("status", "--dir", pair.directory.path, "--json").stdout)
    assert status["secondary"]["role"] == "primary"
    assert status["primary"]["state"] == "dead"
    assert pair.status()["secondary"]["pid"] in hosts.hosts["b"].pids()
    assert pair.rejoin()["side"] == "a"
    write(guest, b"and on", MIB)
    back_to_a(pair)


def test_the_host_of_the_secondary_is_gone(pair: Pair, hosts: NetnsHosts) -> None:
    with pairs.Load(pairs.primary_uri(pair), seed=9) as load:
        load.wait_for(200)
        with HostGone(hosts, "b"):
            pair.wait_for(alone, "alone", 15)
            load.wait_for(load.answered + 200)
        pair.up()
        pair.wait_protected(30)
        load.stop()
        assert not load.errors
        assert load.end is None
    equal(pair)
    assert pairs.contents(pairs.primary_uri(pair)) == load.model(size=SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["both", pytest.param("to the primary", marks=pytest.mark.soak)])
def test_a_cut_that_both_sides_lead_through(pair: Pair, hosts: NetnsHosts, way: str) -> None:
    """Split brain on purpose: nobody rejoins by himself, and the operator's choice is what both disks are then."""
    guest = pairs.guest_uri(pair)
    with Cut(hosts) if way == "both" else OneWayCut(hosts, to="a"):
        write(pairs.primary_uri(pair), b"of side a")
        pair.wait_for(alone, "alone", 15)
        pair.failover("latest", primary_dead=True)
        write(guest, b"of side b", MIB)
    with pytest.raises(PeerRefused, match="discard"):
        pair.rejoin()
    assert pair.rejoin(discard="a", dry_run=True)["split_brain"]
    pair.rejoin(discard="a")
    equal(pair)
    found = pairs.contents(guest)
    assert found[MIB : MIB + 9] == b"of side b"
    assert found[:9] in (bytes(9), b"of side a" if way != "both" else b"")
    back_to_a(pair)


@pytest.mark.slow
def test_a_failover_and_a_rejoin_over_a_flapping_link(pair: Pair, hosts: NetnsHosts) -> None:
    guest = pairs.guest_uri(pair)
    with pairs.Load(pairs.primary_uri(pair), seed=10) as load:
        load.wait_for(200)
        with Flapping(hosts, down_s=0.1, up_s=0.15) as flapping:
            wait_until(lambda: flapping.flaps >= 2, 20, "two flaps")
            with Killed(pair.status()["primary"]["pid"]):
                load.join()
            pair.failover("latest")
            assert load.check(pairs.contents(guest)) >= 200
            pair.rejoin()
            flaps = flapping.flaps
            write(guest, b"through it", MIB)
            wait_until(lambda: flapping.flaps >= flaps + 3, 20, "three more flaps")
    back_to_a(pair)


def test_a_switchover_over_a_slow_link(pair: Pair, hosts: NetnsHosts) -> None:
    """Not before all is there that was answered."""
    with SlowLink(hosts, "20mbit"):
        with pairs.Load(pairs.primary_uri(pair), seed=11) as load:
            load.wait_for(60)
            pair.wait_protected()  # on a machine with much to do the slow link may look dead for a while
            pair.switchover()
            load.join()
        assert load.check(pairs.contents(pairs.guest_uri(pair))) >= load.answered
    back_to_a(pair)
