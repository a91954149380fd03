"""An older image is put in the place of a disk while its process is dead, and nothing on either side says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from common.bitmap import DirtyBitmap
from common.intent import INTENT_FILE, IntentFile
from common.nbd_client import NbdClient
from deploy.layout import PairOptions
from tests.pairs import MIB, QUICK, compare_disks, kill_primary, primary_disk, primary_uri, random_bytes, running

SIZE = 64 * MIB


@pytest.mark.parametrize("restored", [True, False])
def test_an_older_image_of_a_killed_primary_is_found(short_dir: Path, restored: bool) -> None:
    """Its intent bits were cleared before: without samples nothing would be compared. An honest crash costs nothing."""
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
        with NbdClient(primary_uri(pair)) as client:
            for at in range(0, 48, 16):
                client.write(at * MIB, random_bytes(at, 4 * MIB))
            client.flush()
            shutil.copyfile(primary_disk(pair), short_dir / "older")
            client.write(16 * MIB, random_bytes(99, MIB))
            client.flush()
        kill_primary(pair)
        intent = IntentFile(f"{pair.settings('primary').directory}/{INTENT_FILE}", [SIZE])
        assert not intent.keep_only([DirtyBitmap(SIZE, MIB)])
        intent.close()
        if restored:
            older = (short_dir / "older").read_bytes()
            with primary_disk(pair).open("r+b") as file:  # in place: the same file
                file.write(older)
        pair.up()
        pair.wait_protected()
        counters = pair.status()["counters"]["primary"]
        compare_disks(pair)
        assert counters["resyncs_in_distrust"] == restored
        assert counters["resync_asked_bytes"] == (SIZE if restored else 0)
        assert counters["resync_moved_bytes"] <= (MIB if restored else 0)
