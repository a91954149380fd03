"""Each process of a pair killed or stopped in each phase: equal disks afterwards, and no more moved than was written.

One pair goes through the whole table. The failover's commit is interrupted in ``test_commit.py`` and by the simulation.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import TandemDiskError
from common.nbd_client import NbdClient
from deploy.layout import PairOptions
from deploy.pair import Pair
from tests.conftest import wait_until
from tests.pairs import MIB, QUICK, Load, compare_disks, kill, primary_uri, random_bytes, running, write_all

SIZE = 64 * MIB
DIRTY = 8 * MIB
BLOCK = 4096
SLACK = 8 * MIB
"""What a resync has in flight when it is interrupted, and sends again."""
PHASES = ("idle", "streaming", "checkpoint", "resync")
VICTIMS = ("primary", "secondary", "export")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)


@contextlib.contextmanager
def phase(pair: Pair, name: str) -> Iterator[list[int]]:
    """The pair is in this phase; the list holds, at the end, how many bytes of blocks were written."""
    written = [0]
    if name == "idle":
        yield written
    elif name == "streaming":
        with Load(primary_uri(pair)) as load:
            load.wait_for(100)
            yield written
        written[0] = sum((len(data) // BLOCK + 2) * BLOCK for _, data in load.writes)
    elif name == "checkpoint":
        over = threading.Event()

        def take() -> None:
            while not over.is_set():
                with contextlib.suppress(TandemDiskError):
                    pair.client("primary", 5.0).call("checkpoint")

        taker = threading.Thread(target=take)
        taker.start()
        try:
            yield written
        finally:
            over.set()
            taker.join(30)
    else:
        kill(pair.status()["secondary"]["pid"])
        client = pair.client("primary")
        wait_until(lambda: client.call("status")["state"] == "alone", 20, "going on alone")
        with NbdClient(primary_uri(pair)) as writer:
            write_all(writer, random_bytes(5, DIRTY))
        written[0] = DIRTY
        pair.up()
        pair.wait_for(lambda now: now["resync"].get("moved_bytes"), "in a resync")
        yield written


def moved(pair: Pair) -> int:
    return int(pair.status()["counters"]["primary"]["resync_moved_bytes"])


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_each_process_killed_and_stopped_in_each_phase(short_dir: Path) -> None:
    overrides = {**QUICK, "resync_rate": 8 * MIB}
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=overrides)) as pair:
        for name, victim, number in itertools.product(PHASES, VICTIMS, SIGNALS):
            before = moved(pair)
            with phase(pair, name) as written:
                now = pair.wait_for(lambda now: now["secondary"].get("export_pid"), "with its export process", 20)
                pid = now["secondary"]["export_pid"] if victim == "export" else now[victim]["pid"]
                os.kill(pid, number)
                if number == signal.SIGSTOP:
                    noticed(pair, victim)
                    os.kill(pid, signal.SIGCONT)
                elif victim != "export":
                    pair.wait_for(lambda now: now[victim]["pid"] is None, "without it", 20)  # noqa: B023 - it is called here
                    pair.up()
            what = f"{victim}, {number.name}, {name}"
            pair.wait_protected(60)
            pair.checkpoint()
            compare_disks(pair)
            before = 0 if victim == "primary" and number == signal.SIGKILL else before
            assert moved(pair) - before <= written[0] + SLACK, what


def noticed(pair: Pair, victim: str) -> None:
    """The other side has given the one that stands still up; nobody waits for an export process."""
    if victim == "primary":
        client = pair.client("secondary")
        wait_until(lambda: not client.call("status")["peer"]["connected"], 20, "missing the primary")
    elif victim == "secondary":
        client = pair.client("primary")
        wait_until(lambda: client.call("status")["state"] != "protected", 20, "missing the secondary")
