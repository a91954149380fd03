"""The way back: a side that was left behind rejoins, roles are swapped, split brain is refused and resolved."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from common.errors import NotRunning, OperationFailed, PeerRefused
from common.export import CLOSE_TIMEOUT_S
from common.generation import extend
from common.inquiry import ask, remembered_standing
from common.keys import generate_keys
from common.nbd_client import NbdClient
from deploy.layout import PairOptions
from deploy.pair import Pair
from tests.conftest import is_gone, wait_until
from tests.pairs import (
    MIB,
    QUICK,
    Load,
    Moves,
    compare_disks,
    contents,
    guest_uri,
    kill,
    kill_primary,
    primary_disk,
    primary_uri,
    random_bytes,
    running,
    start_side,
    tandemdisk,
)

SIZE = 64 * MIB
REGION = 4 * MIB


def put(uri: str, offset: int, data: bytes) -> None:
    with NbdClient(uri) as client:
        for at in range(0, len(data), MIB):
            client.write(offset + at, data[at : at + MIB])


def settled(pair: Pair) -> None:
    pair.wait_protected()
    pair.checkpoint()
    compare_disks(pair)


def led_by_b(pair: Pair) -> dict[str, Any]:
    return pair.wait_for(lambda now: now["secondary"].get("engine"), "led by side b", 20)


@pytest.mark.parametrize("target", ["latest", pytest.param("checkpoint", marks=pytest.mark.soak)])
def test_failover_rejoin_and_back(short_dir: Path, target: str) -> None:
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
        put(primary_uri(pair), 0, random_bytes(1, 4 * MIB))
        pair.checkpoint()
        put(primary_uri(pair), 8 * MIB, random_bytes(2, 1 * MIB))
        with NbdClient(guest_uri(pair)) as guest:  # one connection, from before the failover to after the rejoin
            kill_primary(pair)
            pair.failover(target)
            guest.write(20 * MIB, random_bytes(3, 1 * MIB))
            led_by_b(pair)
            pair.clear_error()
            guest.write(24 * MIB, random_bytes(4, 1 * MIB))
            told = pair.rejoin()
            assert told["side"] == "a"
            guest.write(28 * MIB, random_bytes(5, 1 * MIB))
            pair.wait_protected()
            guest.write(32 * MIB, random_bytes(6, 1 * MIB))
            guest.flush()
            settled(pair)
            now = pair.status()
            assert now["primary"]["role"] == "secondary"
            assert now["secondary"]["role"] == "primary"
            assert now["counters"]["secondary"]["full_resyncs"] == 0
            assert now["counters"]["secondary"]["resync_moved_bytes"] <= 5 * MIB
            assert pair.verify()["differing"] == 0
        # and back: side b dies, side a takes over, b rejoins
        before = contents(guest_uri(pair))
        put(guest_uri(pair), 40 * MIB, random_bytes(7, 1 * MIB))
        kill(pair.status()["secondary"]["pid"])
        pair.wait_for(lambda now: now["secondary"]["pid"] is None, "without side b", 20)
        pair.failover("checkpoint")
        assert contents(primary_uri(pair)) == before
        put(primary_uri(pair), 44 * MIB, random_bytes(8, 1 * MIB))
        assert pair.rejoin()["side"] == "b"
        settled(pair)
        assert pair.status()["primary"]["role"] == "primary"
        # a restart goes on with the roles as they are
        pair.down()
        pair.up()
        settled(pair)


def test_clients_of_the_promoted_side_never_stop(short_dir: Path) -> None:
    """Writes at every moment of commit, taking the lead, and resync: none is unknown to the engine."""
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
        put(primary_uri(pair), 0, random_bytes(1, 8 * MIB))
        pair.checkpoint()
        put(primary_uri(pair), 4 * MIB, random_bytes(2, 8 * MIB))
        kill_primary(pair)
        pair.failover("checkpoint")
        with Load(guest_uri(pair), seed=9) as load:
            pair.rejoin()
            pair.wait_protected()
            load.wait_for(load.answered + 50)
        assert not load.end
        assert not load.errors
        settled(pair)
        before = random_bytes(1, 8 * MIB) + bytes(SIZE - 8 * MIB)
        assert contents(guest_uri(pair)) == load.model(before)


@pytest.mark.slow
def test_a_promoted_side_is_dead_at_once_when_its_process_is_killed(short_dir: Path) -> None:
    """Its export process leads. With a write that nobody could answer it lived on for 5 s, beside whoever took over,
    and in the way of its own restart (chaos, seed 132)."""
    with running(short_dir / "p", PairOptions(size=MIB, overrides={**QUICK, "on_peer_loss": "block"})) as pair:
        kill_primary(pair)
        pair.failover()
        pair.rejoin()
        pair.wait_protected()
        kill(pair.status()["primary"]["pid"])
        pair.wait_for(lambda now: now["state"] == "blocked", "blocked", 20)
        with NbdClient(guest_uri(pair)) as stuck, NbdClient(guest_uri(pair)) as other:
            stuck.submit_write(0, random_bytes(1, 4096))
            stuck.send()
            other.read(MIB // 2, 4096)  # the write was taken before
            leads = pair.status()["secondary"]["export_pid"]
            kill(pair.status()["secondary"]["pid"])
            wait_until(lambda: is_gone(leads), CLOSE_TIMEOUT_S / 2, "the end of the export process")
        pair.up()
        settled(pair)


def test_switchover_loses_nothing_and_goes_both_ways(short_dir: Path) -> None:
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
        with Load(primary_uri(pair), seed=5) as load:
            load.wait_for(200)
            told = tandemdisk("switchover", "--dir", pair.directory.path)
            assert told.returncode == 0, told.stderr
            load.join()
        load.check(contents(guest_uri(pair)))
        settled(pair)
        now = pair.status()
        assert now["secondary"]["role"] == "primary"
        assert now["counters"]["secondary"]["resync_moved_bytes"] == 0
        put(guest_uri(pair), 0, random_bytes(1, 2 * MIB))
        pair.checkpoint()
        pair.down()
        pair.up()
        settled(pair)
        assert pair.status()["secondary"]["role"] == "primary", "as it was"
        pair.switchover()
        settled(pair)
        assert pair.status()["primary"]["role"] == "primary"


@pytest.mark.slow
def test_a_fenced_primary_rejoins(short_dir: Path) -> None:
    """It was stopped for so long that it was left; awake again it acknowledges nothing, and rejoins alive."""
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
        pid = pair.status()["primary"]["pid"]
        with NbdClient(primary_uri(pair)) as client:
            client.write(0, random_bytes(1, MIB))
            os.kill(pid, signal.SIGSTOP)
            wait_until(
                lambda: not pair.client("secondary").call("status")["peer"]["connected"], 20, "noticing the silence"
            )
            pair.client("secondary").call("failover", to="latest", force=False)
            os.kill(pid, signal.SIGCONT)
            pair.wait_for(lambda now: now["primary"]["state"] == "fenced", "fenced", 30)
            client.submit_write(MIB, b"x" * 4096)
            assert client.collect(1)[0].error is not None
        put(guest_uri(pair), 2 * MIB, random_bytes(2, MIB))
        assert pair.rejoin()["side"] == "a"
        settled(pair)


def test_a_stale_primary_is_turned_away_after_a_restart(short_dir: Path) -> None:
    """Side b leads, and was restarted; side a comes back as the primary that it was, on a host that knows nothing."""
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
        put(primary_uri(pair), 0, random_bytes(1, MIB))
        kill_primary(pair)
        pair.failover("latest")
        led_by_b(pair)
        put(guest_uri(pair), 2 * MIB, random_bytes(2, MIB))
        pair.down()
        pair.up()
        assert pair.status()["secondary"]["role"] == "primary"
        with pytest.raises(PeerRefused, match="side a has to rejoin as secondary"):
            start_side(pair, "primary")
        pair.rejoin()
        settled(pair)


def test_a_side_that_was_left_behind_is_refused_whatever_it_is_started_as(short_dir: Path) -> None:
    """As secondary it would lead, beside the side that took over: what it is, its metadata says."""
    with running(short_dir / "p", PairOptions(size=MIB, overrides=QUICK)) as pair:
        here = pair.settings("primary")
        with pytest.raises(PeerRefused, match="no keys"):  # else whoever reaches its port could make it lead
            ask(here, ended=ask(here).history)
        away = pair.directory.config("secondary").rename(short_dir / "elsewhere.toml")
        with pytest.raises(OperationFailed, match="there `tandemdisk failover`"):
            pair.switchover()
        away.rename(pair.directory.config("secondary"))
        assert pair.status()["state"] == "protected", "refused before anything was stopped"
        kill_primary(pair)
        pair.failover("latest")
        led_by_b(pair)
        told = tandemdisk("secondary", "--config", pair.directory.config("primary"), timeout_s=20)
        assert told.returncode == PeerRefused.exit_code, told.stderr
        assert "side a has to rejoin as secondary" in told.stderr
        assert "was started as secondary and runs as primary" in told.stderr
        pair.rejoin()
        settled(pair)


def test_a_side_is_asked_where_it_stands_and_leads_only_from_where_it_stands(short_dir: Path) -> None:
    public, secret = generate_keys(short_dir, "both")
    replication = {**QUICK["replication"], "secret_key": str(secret), "peer_key": str(public)}
    with running(short_dir / "p", PairOptions(size=MIB, overrides={"replication": replication})) as pair:
        here = pair.settings("primary")
        standing = ask(here)
        assert standing == remembered_standing(pair.settings("secondary"))
        assert (standing.side, standing.role) == ("b", "secondary")
        elsewhere = extend(standing.history, 7, "a")
        with pytest.raises(PeerRefused, match="does not stand where"):
            ask(here, ended=elsewhere)
        with pytest.raises(PeerRefused, match="alive and connected"):
            ask(here, ended=standing.history)
        assert ask(here) == standing
        settled(pair)
        kill(pair.status()["secondary"]["pid"])
        pair.wait_for(lambda now: now["secondary"]["pid"] is None, "without its secondary", 20)
        with pytest.raises(NotRunning, match="did not say where it stands"):
            ask(here, timeout_s=0.3)


def split(pair: Pair) -> None:
    """Both sides write alone: the secondary is stopped, then the primary killed, then the secondary promoted."""
    put(primary_uri(pair), 0, random_bytes(1, MIB))
    pair.checkpoint()
    stopped = pair.status()["secondary"]["pid"]
    primary = pair.client("primary")
    uri = primary_uri(pair)
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: primary.call("status")["state"] == "alone", 20, "going on alone")
    put(uri, 10 * MIB, random_bytes(2, MIB))
    kill(primary.call("status")["pid"])
    os.kill(stopped, signal.SIGCONT)
    pair.wait_for(lambda now: now["primary"]["pid"] is None, "without its primary", 20)
    pair.failover("latest")
    put(guest_uri(pair), 20 * MIB, random_bytes(3, MIB))


@pytest.mark.slow
@pytest.mark.parametrize("loser", ["a", pytest.param("b", marks=pytest.mark.soak)])
def test_split_brain_is_refused_until_a_loser_is_named(short_dir: Path, loser: str) -> None:
    options = PairOptions(size=SIZE, overrides={**QUICK, "keep_diverged": True})
    with running(short_dir / "p", options) as pair:
        split(pair)
        both = r"plit brain.*side a.*would lose at most.*side b.*would lose at most"
        with pytest.raises(PeerRefused, match=rf"S{both}"):
            pair.rejoin()
        with pytest.raises(PeerRefused, match=rf"s{both}"):
            start_side(pair, "primary")
        pair.wait_for(lambda now: re.search(both, now["secondary"]["reason"]), "known on both sides as split brain", 20)
        assert pair.rejoin(discard="b", dry_run=True)["bytes"] == MIB, "side b lives, and knows what it wrote"
        dry = tandemdisk("rejoin", "--dir", pair.directory.path, "--dry-run", "--discard", loser, "--json")
        assert dry.returncode == 0, dry.stderr
        said = json.loads(dry.stdout)
        assert said["side"] == loser
        assert MIB <= said["bytes"] <= 8 * REGION
        moves = Moves(pair, "secondary" if loser == "a" else "primary")
        told = pair.rejoin(discard="a" if loser == "a" else "b")
        pair.up()
        settled(pair)
        moves.check(2 * MIB, asked_bytes=2 * 8 * REGION)  # what each of them wrote; their regions
        offset, data = (10 * MIB, random_bytes(2, MIB)) if loser == "a" else (20 * MIB, random_bytes(3, MIB))
        kept = Path(told["saved"][0]).read_bytes()
        assert kept[offset : offset + MIB] == data, "what was overwritten was saved before"
        there = primary_disk(pair).read_bytes()
        assert there[offset : offset + MIB] == bytes(MIB)
        with pytest.raises(OperationFailed, match="Neither side"):
            pair.rejoin()


@pytest.mark.soak  # test_spill has the harder case
def test_failover_in_the_middle_of_a_resync_gives_the_exact_checkpoint(short_dir: Path) -> None:
    overrides = {**QUICK, "resync_rate": 8 * MIB}
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=overrides)) as pair:
        put(primary_uri(pair), 0, random_bytes(1, 12 * MIB))
        pair.checkpoint()
        exact = contents(guest_uri(pair))
        kill(pair.status()["secondary"]["pid"])
        pair.wait_for(lambda now: now["state"] == "secondary_lost", "without its secondary", 20)
        wait_until(lambda: pair.client("primary").call("status")["state"] == "alone", 20, "going on alone")
        put(primary_uri(pair), 0, random_bytes(2, 12 * MIB))
        pair.up()
        pair.wait_for(
            lambda now: now["resync"]["active"] and now["resync"]["moved_bytes"] > 2 * MIB, "in the middle of a resync"
        )
        kill_primary(pair)
        pair.failover("checkpoint")
        assert contents(guest_uri(pair)) == exact
        pair.rejoin(discard="a")
        settled(pair)
        assert contents(primary_uri(pair)) == exact
