"""Each process of a pair killed or stopped in each phase: nothing that was acknowledged is lost, both disks are equal,
and the counters say that no more was moved or asked than was dirty.

The oracle is a byte string: what was on the disks, and the writes of the load on top of it. A few cells of the table
run by default, all of them as soak (``pytest -m soak``). A phase lasts until the signal has done its work: a checkpoint
is held in flight by a request of the test's own, a resync has a ceiling, a commit a slow disk.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from common.child import Child
from common.errors import NotRunning, TandemDiskError
from common.intent import REGION
from common.nbd_client import NbdClient
from common.settings import Role
from deploy.layout import PairOptions
from deploy.pair import Pair
from primary.guard import AHEAD
from primary.questions import QUESTION_BYTES
from secondary.requests import RequestTable
from secondary.waits import INTENT
from tests import pairs
from tests.conftest import wait_until
from tests.faulty_process import Faults
from tests.pairs import BLOCK, MIB, SAMPLED, SLACK, Load, Moves, contents, guest_uri, kill, primary_uri, random_bytes

SIZE = 64 * MIB
DIRTY = 3 * MIB
"""What a resync has to move, and where guests write."""
SPAN = (0, DIRTY)
MARKED = AHEAD * REGION
"""What the write-intent bitmap says then."""
assert DIRTY <= REGION
assert MARKED + SAMPLED + SLACK < SIZE
TIMES: dict[str, Any] = {"replication": {"heartbeat_s": 0.2, "peer_timeout_s": 1.0}}
RESYNC_RATE = MIB
"""So a resync has SLACK on its way at most when its secondary is given up: a second's worth and a piece."""
assert RESYNC_RATE * TIMES["replication"]["peer_timeout_s"] + MIB <= SLACK < DIRTY
PATIENCE_S = 30.0

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
VICTIMS = ("primary", "secondary", "export", "supervisor")


class Cell(NamedTuple):
    """Whom the signal hits, and when."""

    phase: str
    victim: str
    signal: signal.Signals


@dataclass
class Scene:
    """A phase that the pair is in."""

    model: bytes
    """What its disks hold, but for what ``load`` writes."""
    load: Load | None = None
    dirty_bytes: int = 0
    over: Callable[[], None] = field(default=lambda: None)
    """Lets what the test holds in flight go on."""


@contextlib.contextmanager
def idle(_pair: Pair, model: bytes) -> Iterator[Scene]:
    yield Scene(model)


@contextlib.contextmanager
def streaming(pair: Pair, model: bytes) -> Iterator[Scene]:
    with Load(primary_uri(pair), seed=len(model), span=SPAN) as load:
        load.wait_for(100)
        yield Scene(model, load)


@contextlib.contextmanager
def checkpoint(pair: Pair, model: bytes) -> Iterator[Scene]:
    """A checkpoint is on its way: the secondary waits for a guest's read, which is the test's, to end."""
    data = random_bytes(int.from_bytes(model[:4], "little") + 1, BLOCK)
    with NbdClient(primary_uri(pair)) as client:
        client.write(0, data)
    path = f"{pair.settings('secondary').buffer.directory}/requests.0"
    table = RequestTable(path, SIZE, BLOCK)
    asked = threading.Thread(target=ask_for_a_checkpoint, args=(pair,))
    try:
        with table.cow_request_begin(2 * MIB, 3 * MIB, shared=True) as reading:
            asked.start()
            wait_until(lambda: is_announced(path), PATIENCE_S, "a checkpoint that waits")
            yield Scene(data + model[BLOCK:], dirty_bytes=BLOCK, over=reading.end)
    finally:
        table.close()
        asked.join(PATIENCE_S)
    assert not asked.is_alive(), "whoever asked for the checkpoint hangs"


def ask_for_a_checkpoint(pair: Pair) -> None:
    with contextlib.suppress(TandemDiskError):
        pair.client("primary", PATIENCE_S).call("checkpoint")


def is_announced(path: str) -> bool:
    """Whether somebody waits for the whole disk: he announces himself behind it."""
    table = RequestTable(path, INTENT + SIZE, BLOCK)
    try:
        table.try_absent(((INTENT + 8 * MIB, INTENT + 9 * MIB),)).unlock()  # type: ignore[union-attr]  # refused: None
    except AttributeError:
        return True
    finally:
        table.close()
    return False


@contextlib.contextmanager
def resync(pair: Pair, model: bytes) -> Iterator[Scene]:
    kill(pair.status()["secondary"]["pid"])
    client = pair.client("primary")
    wait_until(lambda: client.call("status")["state"] == "alone", PATIENCE_S, "going on alone")
    data = random_bytes(int.from_bytes(model[:4], "little") + 1, DIRTY)
    with NbdClient(primary_uri(pair)) as writer:
        pairs.write_all(writer, data)
    pair.up()
    wait_until(lambda: client.call("status")["resync"].get("moved_bytes"), PATIENCE_S, "a resync")
    yield Scene(data + model[DIRTY:], dirty_bytes=DIRTY)


PHASES = {"idle": idle, "streaming": streaming, "checkpoint": checkpoint, "resync": resync}


# What a signal does


def strike(pair: Pair, cell: Cell, scene: Scene, seen: bytes) -> None:
    """Send the signal, see what it does, undo it. ``seen``: the guest's view before the phase."""
    now = pair.wait_for(lambda now: now["secondary"].get("export_pid"), "with its export process", PATIENCE_S)
    pid = now["secondary"]["export_pid"] if cell.victim == "export" else now[cell.victim]["pid"]
    if cell.signal == KILL:
        kill(pid)
        gone(pair, cell.victim, pid)
        scene.over()
        pair.up()
    elif cell.victim == "export":
        with NbdClient(guest_uri(pair)) as guest:
            read: list[bytes] = []
            reader = threading.Thread(target=lambda: read.append(bytes(guest.read(0, BLOCK))))
            os.kill(pid, STOP)
            with continued(pid):
                reader.start()
                goes_on(pair, cell, scene)
                reader.join(0.1)
                assert reader.is_alive(), "the export process is stopped"
                scene.over()
            reader.join(PATIENCE_S)
        at_last = [seen[:BLOCK]] + [scene.model[:BLOCK]] * (cell.phase in ("checkpoint", "resync"))
        assert read[0] in at_last, "the last checkpoint, or the one that came meanwhile"
    else:
        os.kill(pid, STOP)
        with continued(pid):
            noticed(pair, cell, scene)
            scene.over()


@contextlib.contextmanager
def continued(pid: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def gone(pair: Pair, victim: str, pid: int) -> None:
    """The process is not there any more; in place of an export process there is another."""
    if victim == "export":
        pair.wait_for(lambda now: now["secondary"].get("export_pid") not in (None, pid), "with another", PATIENCE_S)
        wait_until(lambda: serves(guest_uri(pair)), PATIENCE_S, "its export")
    elif victim == "supervisor":
        pair.wait_for(lambda now: now["state"] == "stopped", "stopped", PATIENCE_S)
    else:
        pair.wait_for(lambda now: now[victim]["pid"] is None, "without it", PATIENCE_S)


def serves(uri: str) -> bool:
    try:
        NbdClient(uri).close()
    except NotRunning:
        return False
    return True


def goes_on(pair: Pair, cell: Cell, scene: Scene) -> None:
    """The primary serves and replicates as if nothing were. By its own word: who is stopped answers nobody."""
    client = pair.client("primary")
    if scene.load is not None:
        scene.load.wait_for(scene.load.answered + 100)
    elif cell.phase == "idle":
        with NbdClient(client.call("status")["nbd_uri"]) as writer:
            writer.write(0, scene.model[:BLOCK])
    elif cell.phase == "resync":
        before = client.call("status")["counters"]["resync_moved_bytes"]
        wait_until(
            lambda: client.call("status")["counters"]["resync_moved_bytes"] > before or pair_protected(pair),
            PATIENCE_S, "progress of the resync",
        )  # fmt: skip


def pair_protected(pair: Pair) -> bool:
    return bool(pair.client("primary").call("status")["state"] == "protected")


def noticed(pair: Pair, cell: Cell, scene: Scene) -> None:
    """The other side has given the one that stands still up; a supervisor is missed by nobody."""
    if cell.victim == "primary":
        client = pair.client("secondary")
        wait_until(lambda: not client.call("status")["peer"]["connected"], PATIENCE_S, "missing the primary")
    elif cell.victim == "secondary":
        client = pair.client("primary")
        wait_until(lambda: client.call("status")["state"] == "alone", PATIENCE_S, "going on alone")
    else:
        goes_on(pair, cell, scene)
        if cell.phase in ("idle", "streaming"):
            pair.checkpoint()


def after(pair: Pair, cell: Cell, scene: Scene) -> tuple[bytes, int]:
    """What the disks have to hold now, and how many bytes may have been dirty."""
    load = scene.load
    if load is None:
        return scene.model, scene.dirty_bytes
    if load.end is None and not (cell.signal == KILL and cell.victim in ("primary", "supervisor")):
        load.wait_for(load.answered + 100)
        load.stop()
        return load.model(scene.model), load.dirty_bytes()
    load.join()
    found = contents(primary_uri(pair))
    load.check(found, scene.model, torn=True)
    return found, load.dirty_bytes(load.answered, unit=QUESTION_BYTES)


def run(pair: Pair, cell: Cell, model: bytes) -> bytes:
    """One cell of the table; what the disks hold then."""
    pair.checkpoint()
    moves = Moves(pair)
    with PHASES[cell.phase](pair, model) as scene:
        strike(pair, cell, scene, model)
        pair.wait_protected(2 * PATIENCE_S)
        model, dirty = after(pair, cell, scene)
    pair.checkpoint()
    found = contents(primary_uri(pair))
    assert found == model, "what was acknowledged"
    assert contents(guest_uri(pair)) == model, "the checkpoint"
    pairs.compare_disks(pair)
    unclean = cell.signal == KILL and cell.victim in ("primary", "supervisor")
    slack = 0 if cell.phase == "idle" else SLACK
    asked = (MARKED if unclean else DIRTY) + SAMPLED * (cell.signal == KILL)
    moves.check(dirty, asked_bytes=asked, slack=slack)
    return model


def cells(phase: str) -> list[Cell]:
    return [Cell(phase, victim, number) for victim in VICTIMS for number in (KILL, STOP)]


SOME = [
    Cell("idle", "supervisor", STOP),
    Cell("streaming", "export", STOP),
    Cell("streaming", "export", KILL),
    Cell("streaming", "primary", STOP),
    Cell("checkpoint", "secondary", STOP),
    Cell("checkpoint", "primary", KILL),
    Cell("resync", "primary", KILL),
]


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(SOME, id="some", marks=pytest.mark.slow),
        *(pytest.param(cells(phase), id=phase, marks=[pytest.mark.soak, pytest.mark.timeout(900)]) for phase in PHASES),
    ],
)
def test_processes_killed_and_stopped(shm_dir: Path, table: list[Cell]) -> None:
    options = PairOptions(size=SIZE, overrides={**TIMES, "resync_rate": RESYNC_RATE})
    with pairs.running(shm_dir / "p", options) as pair:
        model = random_bytes(1, SPAN[1]) + bytes(SIZE - SPAN[1])
        with NbdClient(primary_uri(pair)) as client:
            pairs.write_all(client, model[: SPAN[1]])
        for cell in table:
            try:
                model = run(pair, cell, model)
            except BaseException as error:
                error.add_note(f"in {cell.phase}: {cell.victim}, {cell.signal.name}")
                raise


# A failover's commit

COMMITTED = 12 * MIB
"""Moved by the commit in 48 writes, each of which the disk delays until it is healed."""


def failed_over(pair: Pair, children: dict[Role, Child]) -> bytes:
    """The primary is dead, and the commit of much of the disk has begun on a slow one. What the guest sees."""
    view = random_bytes(1, COMMITTED)
    with NbdClient(primary_uri(pair)) as client:
        pairs.write_all(client, view)
        pair.checkpoint()
        pairs.write_all(client, random_bytes(2, COMMITTED))
    primary = children.pop("primary")
    kill(primary.pid)
    primary.wait(PATIENCE_S)
    pair.wait_for(lambda now: not now["secondary"]["peer"]["connected"], "cut off", PATIENCE_S)
    Faults(pairs.secondary_disk(pair)).delay(write=0.3)
    pair.failover("checkpoint")
    in_the_middle(pair)
    return view + bytes(SIZE - COMMITTED)


def in_the_middle(pair: Pair) -> None:
    """The commit goes on, and is not over. AssertionError if it was too quick."""
    at_start = pair.status()["commit"]["done_bytes"]
    now = pair.wait_for(lambda now: now["commit"]["done_bytes"] > at_start, "on with the commit", PATIENCE_S)
    assert now["state"] == "failover", now["state"]
    assert now["commit"]["done_bytes"] < now["commit"]["total_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number"),
    [
        ("export", KILL),
        pytest.param("secondary", STOP, marks=pytest.mark.soak),
        pytest.param("export", STOP, marks=pytest.mark.soak),
        pytest.param("secondary", KILL, marks=pytest.mark.soak),  # test_pair_durability kills it twice
    ],
)
def test_a_commit_is_interrupted(shm_dir: Path, victim: str, number: signal.Signals) -> None:
    """The guest sees the checkpoint before, in the middle and at the end; then the old primary rejoins."""
    pair = Pair.create(shm_dir / "p", PairOptions(size=SIZE, buffer_bytes=2 * SIZE, overrides=TIMES))
    faults = Faults(pairs.secondary_disk(pair))
    with pair, pairs.started(pair, "secondary", "primary") as children:
        pair.wait_protected()
        view = failed_over(pair, children)
        now = pair.status()["secondary"]
        pid = now["export_pid"] if victim == "export" else now["pid"]
        if number == STOP:
            with NbdClient(guest_uri(pair)) as guest:
                os.kill(pid, STOP)
                with continued(pid):
                    if victim == "export":
                        in_the_middle(pair)  # who commits is the secondary process
                    else:
                        # (in the run that it was writing a reader waits, up to request_timeout_s)
                        last = COMMITTED - MIB
                        assert guest.read(last, MIB) == view[last:COMMITTED], "served, though nobody commits"
                in_the_middle(pair)
        else:
            kill(pid)
            if victim == "export":
                gone(pair, "export", pid)
            else:
                children.pop("secondary").wait(PATIENCE_S)
                children["secondary"] = pairs.start_side(pair, "secondary")
            in_the_middle(pair)
        assert contents(guest_uri(pair)) == view
        faults.heal()
        pair.wait_for(lambda now: now["state"] == "done", "done with the commit", PATIENCE_S)
        assert contents(guest_uri(pair)) == view
        assert pairs.secondary_disk(pair).read_bytes() == view
        children.pop("secondary").stop(PATIENCE_S)
        pair.up()
        moves = Moves(pair, "secondary")
        pair.rejoin()
        pair.wait_protected()
        pair.checkpoint()
        pairs.compare_disks(pair)
        assert pairs.primary_disk(pair).read_bytes() == view
        moves.check(COMMITTED, asked_bytes=COMMITTED + MARKED)
