"""Resyncs of running pairs: what is moved is what differs, whatever was killed, stopped or cut off in between."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.nbd_client import NbdClient
from deploy.layout import PairOptions
from deploy.pair import Pair
from tests.conftest import wait_until
from tests.pairs import (
    MIB,
    QUICK,
    compare_disks,
    contents,
    guest_uri,
    kill,
    primary_disk,
    primary_uri,
    random_bytes,
    running,
    secondary_disk,
    write_all,
)

SIZE = 64 * MIB
REGION = 4 * MIB
SLACK = 1 * MIB
"""A piece that is sent again after an interruption."""
SLOW: dict[str, Any] = {**QUICK, "resync_rate": 16 * MIB}


def write(pair: Pair, offset: int, data: bytes) -> None:
    with NbdClient(primary_uri(pair)) as client:
        for at in range(0, len(data), MIB):
            client.write(offset + at, data[at : at + MIB])


def counters(pair: Pair) -> dict[str, int]:
    found: dict[str, int] = pair.status()["counters"]["primary"]
    return found


def kill_secondary(pair: Pair) -> None:
    kill(pair.status()["secondary"]["pid"])
    pair.wait_for(lambda now: now["secondary"]["pid"] is None, "without its secondary", 20)


def wait_alone(pair: Pair) -> None:
    client = pair.client("primary")  # the secondary may be stopped, and slow to answer
    wait_until(lambda: client.call("status")["state"] == "alone", 20, "going on alone")


def in_the_middle(now: dict[str, Any]) -> bool:
    resync = now["resync"]
    return bool(resync["active"]) and 0.2 * resync["total_bytes"] < resync["done_bytes"] < 0.8 * resync["total_bytes"]


def settled(pair: Pair) -> None:
    """Both sides in line, and their disks equal."""
    pair.wait_protected()
    pair.checkpoint()
    compare_disks(pair)


def test_a_killed_secondary_costs_what_was_written_without_it(short_dir: Path) -> None:
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
        write(pair, 0, random_bytes(1, 8 * MIB))
        pair.checkpoint()
        before = contents(guest_uri(pair))
        kill_secondary(pair)
        wait_alone(pair)
        write(pair, 20 * MIB, random_bytes(2, 3 * MIB))
        with NbdClient(primary_uri(pair)) as client:
            client.zero(2 * MIB, 2 * MIB)
        pair.up()
        settled(pair)
        assert counters(pair)["resync_moved_bytes"] <= 3 * MIB + SLACK
        assert contents(guest_uri(pair)) != before
        assert secondary_disk(pair).stat().st_blocks <= primary_disk(pair).stat().st_blocks + 8 * 64, "thin"


def test_a_killed_primary_compares_regions_and_moves_what_differs(short_dir: Path) -> None:
    with running(short_dir / "p", PairOptions(size=SIZE, mode="async", overrides=QUICK)) as pair:
        write(pair, 0, random_bytes(1, 2 * MIB))
        status = pair.status()
        with NbdClient(primary_uri(pair)) as client:
            os.kill(status["secondary"]["pid"], signal.SIGSTOP)
            client.write(40 * MIB, random_bytes(3, 1 * MIB))
            kill(status["primary"]["pid"])
        os.kill(status["secondary"]["pid"], signal.SIGCONT)
        pair.wait_for(lambda now: now["primary"]["pid"] is None, "without its primary", 20)
        pair.up()
        settled(pair)
        found = counters(pair)
        assert found["resyncs"] == 1
        assert found["full_resyncs"] == 0
        assert found["resync_asked_bytes"] <= 8 * REGION
        assert found["resync_moved_bytes"] <= 1 * MIB + SLACK


def test_both_sides_killed(short_dir: Path) -> None:
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
        write(pair, 5 * MIB, random_bytes(1, 2 * MIB))
        status = pair.status()
        kill(status["secondary"]["pid"])
        kill(status["primary"]["pid"])
        pair.wait_for(lambda now: now["state"] == "stopped", "stopped", 20)
        pair.up()
        settled(pair)
        assert counters(pair)["full_resyncs"] == 0
        assert counters(pair)["resync_moved_bytes"] <= SLACK


@pytest.mark.slow
def test_an_interrupted_resync_goes_on_where_it_was(short_dir: Path) -> None:
    """Stopped, killed, each once in the middle; the checkpoint stays until the end, and bytes are not moved twice."""
    dirty = 24 * MIB
    overrides = SLOW | {"resync_rate": 8 * MIB}  # the guest's view is read in the middle of it
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=overrides)) as pair:
        write(pair, 0, random_bytes(1, dirty))
        pair.checkpoint()
        before = contents(guest_uri(pair))
        kill_secondary(pair)
        wait_alone(pair)
        write(pair, 0, random_bytes(2, dirty))
        for interrupt in (_pause, kill_secondary):
            pair.up()
            pair.wait_for(in_the_middle, "in the middle of a resync")
            assert contents(guest_uri(pair)) == before, "the checkpoint, in the middle of the resync"
            pid = pair.status()["secondary"]["pid"]
            interrupt(pair)
            wait_alone(pair)
            if interrupt is _pause:
                os.kill(pid, signal.SIGCONT)
        pair.up()
        settled(pair)
        found = counters(pair)
        assert found["resyncs"] >= 3
        assert dirty - SLACK <= found["resync_moved_bytes"] <= dirty + 2 * 8 * MIB, "what was in flight twice, no more"


def _pause(pair: Pair) -> None:
    os.kill(pair.status()["secondary"]["pid"], signal.SIGSTOP)


@pytest.mark.soak  # test_spill has the same with a file system that is full
def test_a_resync_larger_than_the_pool_gives_the_checkpoint_up(short_dir: Path) -> None:
    overrides = {**QUICK, "buffer": {"spill_bytes": 0}}
    options = PairOptions(size=SIZE, buffer_bytes=40 * MIB, overrides=overrides)
    with running(short_dir / "p", options) as pair:
        write(pair, 0, random_bytes(1, 40 * MIB))
        pair.checkpoint()
        kill_secondary(pair)
        wait_alone(pair)
        write(pair, 0, random_bytes(2, 40 * MIB))
        pair.up()
        settled(pair)


def replace_empty(path: Path) -> None:
    size = path.stat().st_size
    path.unlink()
    with path.open("wb") as file:
        file.truncate(size)


@pytest.mark.slow
def test_a_secondary_disk_that_was_replaced_or_restored_is_compared_in_full(short_dir: Path) -> None:
    with Pair.create(short_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
        pair.up()
        pair.wait_protected()
        write(pair, 0, random_bytes(1, 8 * MIB))
        pair.down()
        older = secondary_disk(pair).read_bytes()
        pair.up()
        pair.wait_protected()
        write(pair, 0, random_bytes(2, 4 * MIB))
        spoilers: tuple[tuple[Callable[[Path], object], int], ...] = (
            (replace_empty, 8 * MIB),
            (lambda disk: disk.write_bytes(older), 4 * MIB),
        )
        for spoil, differs in spoilers:
            pair.down()
            spoil(secondary_disk(pair))
            pair.up()
            settled(pair)
            assert counters(pair)["resync_asked_bytes"] >= SIZE - 8 * MIB
            assert counters(pair)["resync_moved_bytes"] <= differs + SLACK


@pytest.mark.soak
def test_resync_rate_is_a_ceiling(short_dir: Path) -> None:
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=SLOW)) as pair:
        kill_secondary(pair)
        wait_alone(pair)
        with NbdClient(primary_uri(pair)) as client:
            write_all(client, random_bytes(5, 12 * MIB))
        started = time.monotonic()
        pair.up()
        settled(pair)
        assert time.monotonic() - started > (12 * MIB - 2 * MIB) / SLOW["resync_rate"]
