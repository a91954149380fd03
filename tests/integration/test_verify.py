"""Verification of running pairs: nothing is found where nothing is, one flipped byte is found, named and repaired."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from common.nbd_client import NbdClient
from common.settings import Mode
from deploy.layout import PairOptions
from deploy.pair import Pair
from tests.pairs import (
    MIB,
    Load,
    compare_disks,
    primary_uri,
    random_bytes,
    running,
    secondary_disk,
    tandemdisk,
    write_all,
)

BLOCK = 4096


def flip(path: Path, offset: int) -> None:
    """Change one byte behind everybody's back."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 0xFF]), offset)
    finally:
        os.close(fd)


def filled(pair: Pair, size: int = 8 * MIB, seed: int = 7) -> None:
    with NbdClient(primary_uri(pair)) as client:
        write_all(client, random_bytes(seed, size))
        client.flush()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_difference_behind_a_hole_is_found(short_dir: Path, mode: Mode) -> None:
    """Its piece begins with a hole: the verification asked about that hole for ever (chaos, seeds 112 and 122)."""
    with running(short_dir / "p", PairOptions(size=16 * MIB, mode=mode)) as pair:
        with NbdClient(primary_uri(pair)) as client:
            client.write(2 * BLOCK, random_bytes(1, BLOCK))
            client.flush()
        pair.checkpoint()
        flip(secondary_disk(pair), 2 * BLOCK + 5)
        found = pair.client("primary", 20).call("verify", repair=True)
        assert found["extents"] == [["disk0", 2 * BLOCK, BLOCK]]
        pair.checkpoint()
        compare_disks(pair)


def test_no_difference_is_found_under_load(short_dir: Path) -> None:
    with running(short_dir / "p", PairOptions(size=64 * MIB)) as pair:
        filled(pair)
        with Load(primary_uri(pair), seed=3) as load:
            load.wait_for(50)
            for _ in range(3):
                found = pair.verify()
                assert found["differing"] == 0, found
                assert found["compared_bytes"] == 64 * MIB
            assert not load.end
        assert not load.errors


def test_a_flipped_byte_is_found_named_and_repaired_by_verify_or_a_full_resync(short_dir: Path) -> None:
    with running(short_dir / "p", PairOptions(size=64 * MIB)) as pair:
        filled(pair)
        flip(secondary_disk(pair), 3 * MIB + 5000)
        flip(secondary_disk(pair), 40 * MIB)  # in a hole
        with Load(primary_uri(pair), seed=4, span=(16 * MIB, 32 * MIB)) as load:
            load.wait_for(20)
            named = tandemdisk("verify", "--dir", pair.directory.path, "--json")
            assert named.returncode == 11, named.stderr
            found = json.loads(named.stdout)
            assert found["extents"] == [["disk0", 3 * MIB + BLOCK, BLOCK], ["disk0", 40 * MIB, BLOCK]]
            assert not found["repaired"]
            assert pair.status()["primary"]["volumes"][0]["dirty_bytes"] == 2 * BLOCK
            again = tandemdisk("verify", "--dir", pair.directory.path, "--repair")
            assert again.returncode == 11
            assert "repaired" in again.stdout
            clean = tandemdisk("verify", "--dir", pair.directory.path)
            assert clean.returncode == 0, clean.stdout
            flip(secondary_disk(pair), 5 * MIB)
            sent = tandemdisk("resync", "--full", "--dir", pair.directory.path, "--json")
            assert sent.returncode == 0, sent.stderr
            told = json.loads(sent.stdout)
            assert told["asked_bytes"] >= 64 * MIB
            assert BLOCK <= told["moved_bytes"] <= 64 * 1024, "one question's worth"
        pair.checkpoint()
        compare_disks(pair)
        counters = pair.status()["counters"]["primary"]
        assert counters["repaired_bytes"] == BLOCK, "the hole travels as one"
