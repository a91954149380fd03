"""Disks that are not what their sides left: emptied, restored from an older copy, swapped, of another pair.

Each ends with equal disks that hold what was acknowledged, or with a refusal that says why.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.config import make_settings
from common.errors import DiskError, NeedsForce
from common.nbd_client import NbdClient
from common.record import check_leading_disks, disks_changed, fingerprints, initial_metadata
from deploy.layout import PairOptions
from deploy.pair import Pair
from tests.pairs import (
    MIB,
    QUICK,
    compare_disks,
    contents,
    guest_uri,
    primary_disk,
    primary_uri,
    random_bytes,
    secondary_disk,
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


def test_a_primary_refuses_a_disk_that_it_did_not_leave(short_dir: Path) -> None:
    old = short_dir / "old.raw"
    with Pair.create(short_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
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


def test_disks_of_the_other_side_and_of_another_pair(short_dir: Path) -> None:
    """Both sides' disks are swapped while nothing runs; then a side gets the directory of another pair."""
    with Pair.create(short_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
        pair.up()
        good = written(pair, 1)
        pair.wait_protected()
        pair.down()
        one, other, aside = primary_disk(pair), secondary_disk(pair), short_dir / "aside"
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
        with Pair.create(short_dir / "q", PairOptions(size=SIZE, overrides=QUICK)) as stranger:
            stranger.up()
            stranger.down()
            shutil.copy(stranger.directory.path / "b" / "metadata", pair.directory.path / "b" / "metadata")
            with pytest.raises(DiskError, match="is of side b of pair"):
                pair.up()


def test_a_device_is_known_by_samples(short_dir: Path) -> None:
    file = short_dir / "backing"
    file.write_bytes(random_bytes(1, 8 * MIB))
    with loop_device(file) as loop:
        raw = {"pair_id": "p", "side": "a", "directory": str(short_dir),
               "volumes": [{"name": "v", "disk": str(loop.device)}]}  # fmt: skip
        settings = make_settings(raw, base=short_dir)
        left = replace(
            initial_metadata(settings, "primary", [8 * MIB]), disks=fingerprints(settings, running=False)
        )
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
