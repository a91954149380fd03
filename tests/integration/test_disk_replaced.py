"""Disks that are not what their sides left: emptied, restored from an older copy, swapped, of another pair.

Each ends with equal disks that hold what was acknowledged, or with a refusal that says why.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from common.config import make_settings
from common.errors import DiskError, NeedsForce, PeerRefused
from common.generation import extend
from common.metadata import load, save
from common.nbd_client import NbdClient
from common.record import check_leading_disks, disks_changed, fingerprints, initial_metadata
from deploy.layout import PairOptions
from deploy.pair import Pair
from primary.questions import QUESTION_BYTES
from tests.pairs import (
    MIB,
    QUICK,
    SLACK,
    compare_disks,
    contents,
    guest_uri,
    kill,
    primary_disk,
    primary_uri,
    random_bytes,
    running,
    secondary_disk,
    started,
    tandemdisk,
    write_all,
)
from tests.tools import loop_device

SIZE = 64 * MIB
DATA = 4 * MIB


def restore(path: Path, old: Path) -> None:
    """An older copy, in place, as ``dd`` or ``cp`` over it does."""
    with old.open("rb") as source, path.open("r+b") as target:
        shutil.copyfileobj(source, target)


def settled(pair: Pair) -> None:
    pair.wait_protected()
    pair.checkpoint()
    compare_disks(pair)


def written(pair: Pair, seed: int) -> bytes:
    data = random_bytes(seed, DATA)
    with NbdClient(primary_uri(pair)) as client:
        write_all(client, data)
    return data + bytes(SIZE - DATA)


@pytest.mark.slow
def test_a_primary_refuses_a_disk_that_it_did_not_leave(shm_dir: Path) -> None:
    old = shm_dir / "old.raw"
    with Pair.create(shm_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
        pair.up()
        written(pair, 1)
        pair.down()
        shutil.copy(primary_disk(pair), old)
        pair.up()
        pair.wait_protected()
        good = written(pair, 2)
        pair.down()
        restore(primary_disk(pair), old)
        told = tandemdisk("up", "--dir", pair.directory.path, "--detach")
        assert "The primary stays down" in told.stdout, told.stdout + told.stderr
        assert "its secondary would be overwritten with it" in told.stdout
        pair.failover("latest")
        assert contents(guest_uri(pair)) == good, "nothing that was acknowledged is lost"
        pair.rejoin()
        settled(pair)
        # or the operator knows better
        pair.switchover()
        pair.wait_protected()
        pair.down()
        restore(primary_disk(pair), old)
        done = tandemdisk("accept-disk", "--dir", pair.directory.path)
        assert done.returncode == 0, done.stderr
        pair.up()
        settled(pair)
        assert contents(primary_uri(pair)) == old.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["discard", "accept"])
def test_a_side_whose_commit_ended_with_the_power_waits_for_a_word(shm_dir: Path, way: str) -> None:
    """Its metadata is as that leaves it, and the memory is gone."""
    with Pair.create(shm_dir / "p", PairOptions(size=4 * MIB, overrides=QUICK)) as pair:
        pair.up()
        with NbdClient(primary_uri(pair)) as client:
            client.write(0, b"acknowledged")
        pair.wait_protected()
        pair.down()
        path = f"{pair.settings('secondary').directory}/metadata"
        known = load(path)
        assert known is not None
        history = extend(known.history, 77, "b")
        save(path, replace(known, role="primary", history=history, failover="checkpoint", committing=True, clean=False))
        with secondary_disk(pair).open("r+b") as disk:
            disk.write(b"a mixture   ")
        with pytest.raises(NeedsForce, match="mixture of two times"):
            pair.up()
        with pytest.raises(PeerRefused, match="discard b"):
            pair.rejoin()
        if way == "discard":
            assert pair.rejoin(discard="b")["side"] == "b"
            pair.up()
        else:
            assert pair.accept_disks().side == "b"
            pair.up()
            assert pair.rejoin()["side"] == "a"
            pair.up()
        settled(pair)
        expected = b"acknowledged" if way == "discard" else b"a mixture   "
        assert contents(primary_uri(pair) if way == "discard" else guest_uri(pair))[:12] == expected


@pytest.mark.slow
def test_disks_of_the_other_side_and_of_another_pair(shm_dir: Path) -> None:
    """Both sides' disks are swapped while nothing runs; then a side gets the directory of another pair."""
    with Pair.create(shm_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
        pair.up()
        good = written(pair, 1)
        pair.wait_protected()
        pair.down()
        one, other, aside = primary_disk(pair), secondary_disk(pair), shm_dir / "aside"
        one.rename(aside)
        other.rename(one)
        aside.rename(other)
        told = tandemdisk("up", "--dir", pair.directory.path, "--detach")
        assert "is another file than before" in told.stdout, told.stdout + told.stderr
        pair.down()
        tandemdisk("accept-disk", "--dir", pair.directory.path)
        pair.up()
        settled(pair)
        assert contents(primary_uri(pair)) == good
        pair.down()
        with Pair.create(shm_dir / "q", PairOptions(size=SIZE, overrides=QUICK)) as stranger:
            stranger.up()
            stranger.down()
            shutil.copy(stranger.directory.path / "b" / "metadata", pair.directory.path / "b" / "metadata")
            with pytest.raises(DiskError, match="is of side b of pair"):
                pair.up()


def write_all_to(pair: Pair, data: bytes) -> bytes:
    """From the beginning of the leader's disk on; what the disks hold then."""
    with NbdClient(primary_uri(pair) if pair.leader() == "primary" else guest_uri(pair)) as client:
        write_all(client, data)
    return data + bytes(HALF - len(data))


class Replaced(NamedTuple):
    """Which disk is what at the next start, and how the pair ended before."""

    what: str
    whose: str
    stop: str


WHATS = ("emptied", "older", "of another pair")
STOPS = ("clean", "killed")
TABLE = [
    *(Replaced(what, whose, stop) for what in WHATS for whose in ("leader", "follower") for stop in STOPS),
    *(Replaced("swapped", "both", stop) for stop in STOPS),
]
IN_PLACE = [Replaced(what, whose, "killed, in place") for what in WHATS for whose in ("leader", "follower")]
"""Nothing at the start can tell: they are found by samples (``primary.samples``), and then the leader's disk counts."""
SOME = [
    Replaced("emptied", "leader", "killed"),
    Replaced("older", "follower", "killed"),
    Replaced("swapped", "both", "killed"),
    Replaced("older", "leader", "killed, in place"),
]
MUCH = 12 * MIB
HALF = 16 * MIB


def end(pair: Pair, stop: str) -> None:
    if stop == "clean":
        pair.down()
        return
    status = pair.status()
    for process in ("secondary", "primary", "supervisor"):
        kill(status[process]["pid"])
    pair.wait_for(lambda now: now["state"] == "stopped", "stopped", 20)


def put(disk: Path, data: bytes, stop: str) -> None:
    """As another file, as mv(1) does, in the place of that of a process that was killed; else into it, as dd(1)
    does."""
    target = disk.with_suffix(".new") if stop == "killed" else disk
    with target.open("wb" if stop == "killed" else "r+b") as file:
        file.write(data)
    target.replace(disk)


def replace_disks(pair: Pair, cell: Replaced, old: bytes) -> bytes:
    """Replace them; what the follower has then."""
    lead, follow = (Path(pair.settings(role).volumes[0].disk) for role in (pair.leader(), pair.follower()))
    if cell.what == "swapped":
        aside = lead.with_suffix(".aside")
        lead.rename(aside)
        follow.rename(lead)
        aside.rename(follow)
    else:
        found = {"emptied": bytes(HALF), "older": old, "of another pair": random_bytes(99, HALF)}[cell.what]
        put(lead if cell.whose == "leader" else follow, found, cell.stop)
    return follow.read_bytes()


def differing(one: bytes, other: bytes) -> int:
    """Bytes of the questions of a resync that find a difference."""
    pieces = [np.frombuffer(data, np.uint8).reshape(-1, QUESTION_BYTES) for data in (one, other)]
    return int(np.count_nonzero((pieces[0] != pieces[1]).any(axis=1))) * QUESTION_BYTES


def comes_back(pair: Pair, cell: Replaced, model: bytes, follower_has: bytes) -> None:
    """Up: refused with a sentence whose advice is followed, or not; then both disks hold ``model``."""
    lead = pair.leader()
    pair.up()
    told = pair.status()[lead]
    assert (told["pid"] is None) == (cell.whose != "follower" and cell not in IN_PLACE), told
    if told["pid"] is None:
        assert "its secondary would be overwritten with it" in told["reason"]
        if cell.what == "swapped":
            pair.down()
            pair.accept_disks()
            pair.up()
        else:
            pair.failover("latest")
            pair.rejoin()
    pair.wait_protected()
    pair.checkpoint()
    for uri in (primary_uri(pair), guest_uri(pair)):
        assert contents(uri) == model
    compare_disks(pair)
    if cell.whose == "follower":
        counters = pair.status()["counters"][lead]
        assert counters["resync_moved_bytes"] <= differing(model, follower_has) + SLACK


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(SOME, id="some", marks=pytest.mark.slow),
        pytest.param(TABLE + IN_PLACE, id="all", marks=[pytest.mark.soak, pytest.mark.timeout(900)]),
    ],
)
def test_disks_that_are_replaced(shm_dir: Path, table: list[Replaced]) -> None:
    """One pair goes through the table, led by whoever the last cell left in the lead."""
    with running(shm_dir / "p", PairOptions(size=HALF, overrides=QUICK)) as pair:
        old = b""
        for number, cell in enumerate(table):
            model = write_all_to(pair, random_bytes(number, MUCH))
            old = old or random_bytes(98, MUCH) + bytes(HALF - MUCH)
            try:
                end(pair, cell.stop)
                follower_has = replace_disks(pair, cell, old)
                if cell in IN_PLACE and cell.whose == "leader":
                    model = Path(pair.settings(pair.leader()).volumes[0].disk).read_bytes()
                comes_back(pair, cell, model, follower_has)
            except BaseException as error:
                error.add_note(", ".join(cell))
                raise
            old = model


@pytest.mark.slow
@pytest.mark.parametrize("side", ["a", pytest.param("b", marks=pytest.mark.soak)])
@pytest.mark.parametrize("stop", [pytest.param("clean", marks=pytest.mark.soak), "killed"])
def test_a_host_restored_from_an_older_snapshot(shm_dir: Path, side: str, stop: str) -> None:
    """Disk and directory together, in place, times of change included: nothing on that host can tell. The other side
    can: the pair refuses, or ends with what was acknowledged."""
    with Pair.create(shm_dir / "p", PairOptions(size=HALF, overrides=QUICK)) as pair:
        pair.up()
        write_all_to(pair, random_bytes(1, MUCH))
        pair.down()
        disk = primary_disk(pair) if side == "a" else secondary_disk(pair)
        home, snapshot = pair.directory.path / side, shm_dir / "snapshot"
        snapshot.mkdir()
        for file in filter(Path.is_file, home.iterdir()):
            shutil.copy2(file, snapshot)
        pair.up()
        pair.wait_protected()
        model = write_all_to(pair, random_bytes(2, MUCH))
        end(pair, stop)
        for file in snapshot.iterdir():
            shutil.copy2(file, home)
        assert disk.read_bytes() == random_bytes(1, MUCH) + bytes(HALF - MUCH), "an older state"
        if side == "a":
            with pytest.raises(PeerRefused, match="this side's disk or metadata is an older copy"):
                pair.up()
            with started(pair, "secondary"):
                pair.failover("latest")
                pair.wait_for(lambda now: now["secondary"].get("engine"), "led by side b", 20)
            pair.up()
            pair.rejoin()
        else:
            pair.up()
        pair.wait_protected()
        pair.checkpoint()
        assert contents(primary_uri(pair)) == contents(guest_uri(pair)) == model
        compare_disks(pair)


def test_a_device_is_known_by_samples(short_dir: Path) -> None:
    file = short_dir / "backing"
    file.write_bytes(random_bytes(1, 8 * MIB))
    with loop_device(file) as loop:
        raw = {"pair_id": "p", "side": "a", "directory": str(short_dir),
               "volumes": [{"name": "v", "disk": str(loop.device)}]}  # fmt: skip
        settings = make_settings(raw, base=short_dir)
        left = replace(initial_metadata(settings, "primary", [8 * MIB]), disks=fingerprints(settings, running=False))
        check_leading_disks(settings, left)
        fd = os.open(loop.device, os.O_RDWR)
        try:
            os.pwrite(fd, bytes(4096), 0)
        finally:
            os.close(fd)
        with pytest.raises(NeedsForce, match="does not hold what this side left there"):
            check_leading_disks(settings, left)
        elsewhere = replace(left, disks=((left.disks[0][0] + 1, 0),))
        check_leading_disks(settings, elsewhere)
        assert "another device" in disks_changed(settings, elsewhere), "which is compared, and not refused"
