"""A resync that is larger than the pool: old contents go to the spill file, and the checkpoint stays to its end.

The oracle is the disk as it was at the checkpoint, kept by the test.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.nbd_client import NbdClient
from deploy.layout import PairOptions
from deploy.pair import Pair
from secondary.attach import attach
from tests.conftest import wait_until
from tests.pairs import (
    MIB,
    QUICK,
    compare_disks,
    contents,
    guest_uri,
    kill,
    primary_uri,
    random_bytes,
    running,
    write_all,
)
from tests.tools import mounted_tmpfs

SIZE = 64 * MIB
BUFFER = 40 * MIB
"""The hidden disk's share of the pool is half of it."""
DIRTY = 48 * MIB


def spill_file(pair: Pair) -> Path:
    (found,) = (pair.directory.path / "b").glob("*.spill")
    return found


def fall_behind(pair: Pair, seed: int) -> bytes:
    """The secondary dies, more than its pool is written without it; what was written."""
    kill(pair.status()["secondary"]["pid"])
    client = pair.client("primary")
    wait_until(lambda: client.call("status")["state"] == "alone", 20, "going on alone")
    data = random_bytes(seed, DIRTY)
    with NbdClient(primary_uri(pair)) as writer:
        write_all(writer, data)
    return data + bytes(SIZE - DIRTY)


@contextlib.contextmanager
def spilling(pair: Pair) -> Iterator[int]:
    """In the middle of a resync, beyond the pool; the primary stands still meanwhile: its pid."""
    pair.wait_for(lambda now: (now["buffer"].get("spilled_bytes") or 0) > 4 * MIB, "spilling")
    pid = pair.status()["primary"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert pair.client("secondary").call("status")["resyncing"]
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):  # killed meanwhile, and seen off by its supervisor
            os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_the_checkpoint_outlives_a_resync_larger_than_the_pool(short_dir: Path) -> None:
    # slow enough that a resync is still going on when `up` has answered, however busy the machine is
    overrides = {**QUICK, "resync_rate": 12 * MIB}
    options = PairOptions(size=SIZE, buffer_bytes=BUFFER, overrides=overrides)
    with running(short_dir / "p", options) as pair:
        old = random_bytes(1, DIRTY) + bytes(SIZE - DIRTY)
        with NbdClient(primary_uri(pair)) as client:
            write_all(client, old[:DIRTY])
        pair.checkpoint()
        # to its end: the guest sees the old checkpoint until the new one is there, and the space goes back
        uri = guest_uri(pair)
        new = fall_behind(pair, 2)
        pair.up()
        with spilling(pair):
            kill(pair.client("secondary").call("status")["pid"])
        pair.wait_for(lambda now: now["secondary"]["pid"] is None, "without its secondary", 20)
        pair.up()  # a process that finds the file
        with spilling(pair), attach(str(pair.directory.path)) as view:
            assert view.volumes["disk0"].read(0, SIZE) == old
            assert contents(uri) == old
        pair.wait_protected()
        assert contents(guest_uri(pair)) == new
        assert spill_file(pair).stat().st_blocks == 0
        assert pair.status()["buffer"]["spilled_bytes"] == 0
        # and in the middle of one the secondary takes over
        fall_behind(pair, 3)
        pair.up()
        with spilling(pair) as pid:
            kill(pid)
        pair.wait_for(lambda now: now["primary"]["pid"] is None, "without its primary", 20)
        pair.failover("checkpoint")
        assert contents(guest_uri(pair)) == new, "while the commit goes on"
        pair.wait_for(lambda now: now["secondary"]["state"] in ("DONE", "done"), "committed", 20)
        assert contents(guest_uri(pair)) == new
        pair.rejoin(discard="a")
        pair.wait_protected()
        compare_disks(pair)
        assert contents(primary_uri(pair)) == new


@pytest.mark.slow
def test_without_room_the_checkpoint_is_given_up_with_a_sentence(short_dir: Path) -> None:
    with mounted_tmpfs(short_dir / "small", 4 * MIB) as small:
        overrides = {**QUICK, "resync_rate": 64 * MIB, "buffer": {"spill_directory": str(small)}}
        options = PairOptions(size=SIZE, buffer_bytes=BUFFER, overrides=overrides)
        with running(short_dir / "p", options) as pair:
            pair.checkpoint()
            fall_behind(pair, 2)
            pair.up()
            now = pair.wait_for(lambda now: not now["secondary"].get("protected", True), "without a checkpoint")
            pair.wait_protected()
            pair.checkpoint()
            compare_disks(pair)
            log = (pair.directory.path / "b" / "log").read_text()
            assert "the checkpoint lasts as long as the room for it: The spill file" in log
            assert now["state"] == "syncing"
