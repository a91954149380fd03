"""The cable between the sides cut and healed, without root: proxies in the way of the stream (``deploy.proxy``).

Whoever leads, and whichever direction is cut: writes go on, both disks have all of them afterwards, and what was moved
is what was written meanwhile. A cut that the window outlasts moves nothing at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.nbd_client import NbdClient
from deploy.chaos.breakage import ProxySlow, cable
from deploy.layout import PairOptions
from deploy.pair import Pair
from tests import pairs
from tests.conftest import wait_until
from tests.pairs import MIB, Load, Moves, contents, guest_uri, primary_uri, random_bytes

pytestmark = pytest.mark.local_hosts
SIZE = 32 * MIB
SPAN = (0, 4 * MIB)
"""Where guests write."""


def filled(pair: Pair) -> bytes:
    data = random_bytes(1, SIZE)
    with NbdClient(primary_uri(pair)) as client:
        pairs.write_all(client, data)
    return data


CUTS = ("cut", "cut forward", "cut backward")


@pytest.mark.parametrize(
    "table",
    [
        pytest.param({"primary": CUTS[1:], "secondary": CUTS[:1]}, id="some", marks=pytest.mark.slow),
        pytest.param({"primary": CUTS, "secondary": CUTS}, id="all", marks=pytest.mark.soak),
    ],
)
def test_each_direction_cut_whoever_leads(shm_dir: Path, table: dict[str, tuple[str, ...]]) -> None:
    overrides = {"replication": {"heartbeat_s": 0.2, "peer_timeout_s": 1.0}}
    with Pair.create(shm_dir / "p", PairOptions(size=SIZE, overrides=overrides)) as pair, cable(pair) as faults:
        pair.up()
        pair.wait_protected()
        model = filled(pair)
        for leads, names in table.items():
            if pair.leader() != leads:
                pair.switchover()
                pair.wait_protected()
            assert pair.leader() == leads
            for name in names:
                model = pairs.through_a_fault(pair, faults[name], model, span=SPAN, seed=len(name + leads))


def stands_still(pair: Pair) -> Callable[[], bool]:
    """Whether the primary has sent what has not been confirmed for longer than a heartbeat."""
    client = pair.client("primary")
    applied, since = -1, 0.0

    def look() -> bool:
        nonlocal applied, since
        now = client.call("status")["counters"]
        if now["applied"] != applied:
            applied, since = now["applied"], time.monotonic()
        return bool(now["sequence"] > applied and time.monotonic() - since > 0.3)

    return look


def test_a_cut_that_the_window_outlasts_moves_nothing(shm_dir: Path) -> None:
    """What was on its way is gone, the connections break, all of it before the secondary is given up."""
    overrides = {"replication": {"heartbeat_s": 0.2, "peer_timeout_s": 60.0}}
    with Pair.create(shm_dir / "p", PairOptions(size=SIZE, overrides=overrides)) as pair, cable(pair) as faults:
        pair.up()
        pair.wait_protected()
        model = filled(pair)
        moves = Moves(pair)
        before = pair.status()["counters"]["primary"]
        with Load(primary_uri(pair), span=SPAN) as load:
            load.wait_for(100)
            for name in CUTS:
                with faults[name]:
                    wait_until(stands_still(pair), 30, "writes that wait for the cable")
                    faults["reset"].begin()
                load.wait_for(load.answered + 200)
        pair.wait_protected()
        model = load.model(model)
        pair.checkpoint()
        assert contents(primary_uri(pair)) == contents(guest_uri(pair)) == model
        pairs.compare_disks(pair)
        found = moves.check(0, slack=0)
        assert found["resyncs"] == 0
        after = pair.status()["counters"]["primary"]
        assert after["cuts"] + after["sessions"] > before["cuts"] + before["sessions"], "there was a cut"
        assert after["replayed"] > before["replayed"], "and the window was sent again"


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        {"on_congestion": "pull-ahead", "replication": {"window_bytes": 40 * MIB}},
        pytest.param({"max_lag_seconds": 1.0, "replication": {"window_bytes": 64 * MIB}}, marks=pytest.mark.soak),
    ],
    ids=["pull-ahead", "lag"],
)
def test_a_slow_link_does_not_hold_writers_up(shm_dir: Path, policy: dict[str, Any]) -> None:
    """20 Mbit/s. All is written before half of it could have crossed; the rest crosses later, once."""
    written, size = 56 * MIB, 64 * MIB
    stream = {"heartbeat_s": 0.5, "peer_timeout_s": 60.0} | policy["replication"]
    options = PairOptions(size=size, mode="async", overrides={**policy, "replication": stream})
    model = random_bytes(2, written) + bytes(size - written)
    with Pair.create(shm_dir / "p", options) as pair, cable(pair) as faults:
        pair.up()
        pair.wait_protected()
        moves = Moves(pair)
        slow = faults["slow link"]
        assert isinstance(slow, ProxySlow)
        with slow, NbdClient(primary_uri(pair)) as client:
            for proxy in slow.proxies:
                proxy.rate = 20e6 / 8
            before = sum(proxy.forwarded for proxy in slow.proxies)
            pairs.write_all(client, model[:written])
            assert sum(proxy.forwarded for proxy in slow.proxies) - before < written // 2
            asked = pair.client("primary")
            wait_until(lambda: asked.call("status")["state"] in ("alone", "syncing"), 30, "pulling ahead")
        pair.wait_protected()
        pair.checkpoint()
        assert contents(primary_uri(pair)) == contents(guest_uri(pair)) == model
        pairs.compare_disks(pair)
        found = moves.check(written, asked_bytes=written)
        assert found["resync_moved_bytes"] > written // 4
