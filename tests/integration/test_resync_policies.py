"""What a primary does when its secondary is away or slow, as configured: go on, wait, pull ahead, give up on a lag."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.nbd_client import NbdClient
from deploy.layout import PairOptions
from deploy.pair import Pair
from tests.conftest import wait_until
from tests.pairs import MIB, QUICK, compare_disks, primary_uri, random_bytes, running

SIZE = 64 * MIB


def settled(pair: Pair) -> None:
    pair.wait_protected()
    pair.checkpoint()
    compare_disks(pair)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still for the time of the context."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def state(pair: Pair) -> str:
    """The primary's own word: the secondary may be stopped, and slow to answer."""
    return str(pair.client("primary").call("status")["state"])


def test_on_peer_loss_block_makes_writers_wait(short_dir: Path) -> None:
    overrides = {**QUICK, "on_peer_loss": "block"}
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=overrides)) as pair:
        pid = pair.status()["secondary"]["pid"]
        with NbdClient(primary_uri(pair)) as client:
            answered = threading.Event()

            def write() -> None:
                client.write(0, random_bytes(1, MIB))
                answered.set()

            writer = threading.Thread(target=write)
            with stopped(pid):
                writer.start()
                wait_until(lambda: state(pair) == "blocked", 20, "blocking")
                assert not answered.is_set()
            writer.join(30)
            assert answered.is_set()
        settled(pair)
        history = pair.status()["generation"]
        assert history == 1, "nobody went on alone"


def test_a_congested_primary_pulls_ahead_and_resynchronises(short_dir: Path) -> None:
    replication = {"heartbeat_s": 0.5, "peer_timeout_s": 60.0, "window_bytes": 40 * MIB}
    overrides: dict[str, Any] = {"replication": replication, "on_congestion": "pull-ahead"}
    options = PairOptions(size=SIZE, mode="async", overrides=overrides)
    with running(short_dir / "p", options) as pair:
        pid = pair.status()["secondary"]["pid"]
        with NbdClient(primary_uri(pair)) as client, stopped(pid):
            for offset in range(0, 60 * MIB, MIB):  # more than the window: would wait for ever
                client.write(offset, random_bytes(offset, MIB))
            assert state(pair) == "alone"
        settled(pair)
        assert pair.status()["counters"]["primary"]["resync_moved_bytes"] >= 20 * MIB


@pytest.mark.slow
def test_a_lag_beyond_the_bound_counts_as_loss(short_dir: Path) -> None:
    overrides = {"replication": {"heartbeat_s": 0.5, "peer_timeout_s": 60.0}, "max_lag_seconds": 1.0}
    with running(short_dir / "p", PairOptions(size=SIZE, mode="async", overrides=overrides)) as pair:
        pid = pair.status()["secondary"]["pid"]
        with NbdClient(primary_uri(pair)) as client, stopped(pid):
            client.write(0, random_bytes(1, MIB))
            wait_until(lambda: state(pair) == "alone", 20, "going on alone")
            client.write(MIB, random_bytes(2, MIB))
        settled(pair)
