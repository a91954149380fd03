"""What a pair promises when disks fail and processes are killed: no lie to a client, nothing promised is lost."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.child import Child
from common.errors import OperationFailed, TandemDiskError
from common.nbd_client import NbdClient, NbdClientError
from common.settings import Mode, Role
from deploy.pair import Pair, PairOptions
from primary.questions import QUESTION_BYTES
from tests import pairs
from tests.conftest import wait_until
from tests.faulty_process import Faults
from tests.pairs import MIB, QUICK, Load, Moves

SIZE = 16 * MIB
OPTIONS = PairOptions(size=SIZE, mode="sync", buffer_bytes=2 * SIZE, overrides=QUICK)


@pytest.fixture
def created(short_dir: Path) -> Pair:
    """A pair that does not run yet."""
    return Pair.create(short_dir / "p", OPTIONS)


@pytest.fixture
def faulty(created: Pair) -> Iterator[tuple[Pair, dict[Role, Child]]]:
    """A protected pair whose disks fail as told, without a supervisor."""
    with pairs.started(created, "secondary", "primary") as children:
        created.wait_protected()
        yield created, children


def sick(pair: Pair, role: str) -> Faults:
    return Faults(pairs.primary_disk(pair) if role == "primary" else pairs.secondary_disk(pair))


def fails_with(code: int, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(NbdClientError) as caught:
        call(*args, **options)
    assert caught.value.errno == code


# Disks that fail


@pytest.mark.parametrize("role", ["primary", "secondary"])
@pytest.mark.parametrize("how", ["flush", "fua"])
def test_a_flush_that_fails_is_an_error_to_the_client(
    faulty: tuple[Pair, dict[Role, Child]], role: str, how: str
) -> None:
    pair, _ = faulty
    faults = sick(pair, role)
    with NbdClient(pairs.primary_uri(pair)) as client:
        client.write(0, b"before", fua=True)
        client.flush()
        faults.fail(flush=errno.EIO)
        if how == "flush":
            client.write(4096, b"not durable")
            fails_with(errno.EIO, client.flush)
        else:
            fails_with(errno.EIO, client.write, 4096, b"not durable", fua=True)
        error = pair.status()[role]["error"]
        assert error is not None
        assert "flush" in error["sentence"]
        faults.heal()
        pair.wait_protected(30)
        client.write(8192, b"durable", fua=True)
        client.flush()
        assert client.read(0, 6) == b"before"
        assert client.read(8192, 7) == b"durable"
    pairs.compare_disks(pair)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_errors_of_the_primary_disk_reach_the_client(faulty: tuple[Pair, dict[Role, Child]], code: int) -> None:
    pair, _ = faulty
    faults = sick(pair, "primary")
    with NbdClient(pairs.primary_uri(pair)) as client:
        client.write(0, b"old" * 1000)
        faults.fail(write=code, zero=code, discard=code)
        fails_with(code, client.write, 0, b"new" * 1000)
        fails_with(code, client.write, 0, b"new" * 1000, fua=True)
        fails_with(code, client.zero, 0, 3000)
        fails_with(code, client.trim, 0, 3000)
        faults.fail(read=errno.EIO)
        fails_with(errno.EIO, client.read, 0, 3000)
        client.write(100_000, b"elsewhere")
        faults.heal()
        assert client.read(0, 3000) == b"old" * 1000
        assert client.read(100_000, 9) == b"elsewhere"
        client.write(0, b"new" * 1000)
        assert client.read(0, 3000) == b"new" * 1000
    pair.wait_protected(30)
    pairs.compare_disks(pair)


@pytest.mark.parametrize("clean", [True, False])
def test_what_the_primary_disk_refused_does_not_stay_different(
    faulty: tuple[Pair, dict[Role, Child]], clean: bool
) -> None:
    """The secondary may have taken a write that the primary disk refused: a restart at the latest makes both equal."""
    pair, children = faulty
    faults = sick(pair, "primary")
    with NbdClient(pairs.primary_uri(pair)) as client:
        client.write(0, b"old" * 1000)
        faults.fail(write=errno.EIO)
        fails_with(errno.EIO, client.write, 0, b"new" * 1000)
        faults.heal()
        client.flush()
    primary = children.pop("primary")
    if clean:
        assert primary.stop() == 0
    else:
        pairs.kill(primary.pid)
        primary.wait(20)
    children["primary"] = pairs.start_side(pair, "primary")
    pair.wait_protected(30)
    pairs.compare_disks(pair)


def test_errors_of_the_secondary_disk(faulty: tuple[Pair, dict[Role, Child]]) -> None:
    """The primary goes on alone, and the secondary is brought in line when its disk is well again."""
    pair, _ = faulty
    faults = sick(pair, "secondary")
    with NbdClient(pairs.primary_uri(pair)) as client:
        client.write(0, b"on both")
        faults.fail(write=errno.ENOSPC)
        client.write(50_000, b"on the primary" * 100)
        status = pair.status()
        assert status["state"] != "protected"
        assert "space" in status["secondary"]["error"]["sentence"]
        assert pairs.secondary_disk(pair).read_bytes()[50_000:50_014] == bytes(14)
        client.write(60_000, b"alone")
        faults.heal()
        pair.wait_protected(30)
        assert client.read(0, 7) == b"on both"
        client.write(70_000, b"on both again")
    pairs.compare_disks(pair)


# Processes that are killed


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_primary_is_killed_and_started_again(short_dir: Path, mode: Mode) -> None:
    with pairs.running(short_dir / "p", dataclasses.replace(OPTIONS, mode=mode)) as pair:
        with Load(pairs.primary_uri(pair)) as load:
            load.wait_for(1000)
            pairs.kill_primary(pair)
            load.join()
        if mode == "sync":
            load.check(pairs.secondary_disk(pair).read_bytes(), torn=True)  # it may be applying the last batch
        moves = Moves(pair)
        pair.up()
        pair.wait_protected(30)
        unconfirmed = load.answered if mode == "sync" else 0
        moves.check(load.dirty_bytes(unconfirmed, unit=QUESTION_BYTES), asked_bytes=SIZE)
        found = pairs.contents(pairs.primary_uri(pair))
        load.check(found, torn=True)
        pairs.compare_disks(pair)
        pair.checkpoint()
        assert pairs.contents(pairs.guest_uri(pair)) == found
        with NbdClient(pairs.primary_uri(pair)) as client:
            client.write(0, b"goes on")
        pair.wait_for(lambda now: now["lag"]["bytes"] == 0, "without lag", 20)
        pairs.compare_disks(pair)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_secondary_is_killed_and_started_again(short_dir: Path, mode: Mode) -> None:
    """Clients of the primary notice nothing but a pause."""
    with pairs.running(short_dir / "p", dataclasses.replace(OPTIONS, mode=mode)) as pair:
        with Load(pairs.primary_uri(pair)) as load:
            load.wait_for(1000)
            secondary = pair.status()["secondary"]
            moves = Moves(pair)
            unconfirmed = load.answered if mode == "sync" else 0
            pairs.kill(secondary["pid"])
            pair.wait_for(lambda now: now["secondary"]["pid"] is None, "without its secondary", 20)
            pair.up()
            load.wait_for(load.answered + 1000)
        assert load.end is None
        pair.wait_protected(30)
        moves.check(load.dirty_bytes(unconfirmed), asked_bytes=SIZE)
        assert pair.status()["secondary"]["pid"] != secondary["pid"]
        pair.wait_for(lambda now: now["lag"]["bytes"] == 0, "without lag", 20)
        assert pairs.contents(pairs.primary_uri(pair)) == load.model(size=SIZE)
        pairs.compare_disks(pair)
        pair.checkpoint()
        assert pairs.contents(pairs.guest_uri(pair)) == load.model(size=SIZE)


def test_the_secondary_is_killed_and_keeps_its_checkpoint(short_dir: Path) -> None:
    """The buffer outlives the process: the guest finds its view as it left it, and a failover finds its checkpoint."""
    with pairs.running(short_dir / "p", OPTIONS) as pair:
        first, second = pairs.random_bytes(1, SIZE), pairs.random_bytes(2, SIZE // 2)
        with NbdClient(pairs.primary_uri(pair)) as client:
            pairs.write_all(client, first)
            number = pair.checkpoint().number
            pairs.write_all(client, second)
        with NbdClient(pairs.guest_uri(pair)) as guest:
            guest.write(5000, b"of the guest")
        view = pairs.contents(pairs.guest_uri(pair))
        assert view == first[:5000] + b"of the guest" + first[5012:]
        pairs.kill(pair.status()["secondary"]["pid"])
        pair.wait_for(lambda now: now["secondary"]["pid"] is None, "without its secondary", 20)
        pair.up()
        pair.wait_protected(30)
        assert pairs.contents(pairs.guest_uri(pair)) == view
        assert pair.status()["secondary"]["checkpoint"] == number
        pairs.kill_primary(pair)
        pair.failover("checkpoint")
        pair.wait_for(lambda now: now["state"] == "done", "done with the commit", 30)
        assert pairs.secondary_disk(pair).read_bytes() == view


def test_the_export_is_killed_and_comes_back(short_dir: Path) -> None:
    """What the guest was told is written is in its view; the primary and its clients notice nothing."""
    with pairs.running(short_dir / "p", OPTIONS) as pair:
        base = pairs.random_bytes(1, SIZE)
        with NbdClient(pairs.primary_uri(pair)) as client:
            pairs.write_all(client, base)
        pair.checkpoint()
        before = pair.status()
        with Load(pairs.primary_uri(pair), span=(0, 4 * MIB), depth=8) as other:
            with Load(pairs.guest_uri(pair), span=(0, 8 * MIB), seed=2) as load:
                load.wait_for(500)
                pairs.kill(before["secondary"]["export_pid"])
                load.join()
            old = before["secondary"]["export_pid"]
            pair.wait_for(lambda now: now["secondary"]["export_pid"] not in (None, old), "with another export", 20)
            pair.up()
            assert load.end is not None
            load.check_answered(wait_until(lambda: _try_contents(pair), what="the export's answer") or b"", base)
        assert other.end is None
        after = pair.status()
        assert after["state"] == "protected"
        assert after["secondary"]["export_restarts"] == 1
        assert after["checkpoint"] == before["checkpoint"]
        assert [after[role]["pid"] for role in ("primary", "secondary")] == [
            before[role]["pid"] for role in ("primary", "secondary")
        ]
        pairs.compare_disks(pair)


def _try_contents(pair: Pair) -> bytes | None:
    try:
        return pairs.contents(pairs.guest_uri(pair))
    except TandemDiskError:
        return None


def test_everything_is_killed_at_once(short_dir: Path) -> None:
    with pairs.running(short_dir / "p", OPTIONS) as pair:
        with Load(pairs.primary_uri(pair)) as load:
            load.wait_for(1000)
            status = pair.status()
            for pid in (status["secondary"]["pid"], status["primary"]["pid"], status["supervisor"]["pid"]):
                pairs.kill(pid)
            load.join()
        pair.wait_for(lambda now: now["state"] == "stopped", "stopped", 20)
        moves = Moves(pair)
        pair.up()
        pair.wait_protected(30)
        moves.check(load.dirty_bytes(load.answered, unit=QUESTION_BYTES), asked_bytes=SIZE)
        load.check(pairs.contents(pairs.primary_uri(pair)), torn=True)
        pairs.compare_disks(pair)


# Checkpoints


def test_checkpoints_at_an_interval(short_dir: Path) -> None:
    options = PairOptions(size=SIZE, buffer_bytes=2 * SIZE, checkpoint_interval_s=0.1)
    with pairs.running(short_dir / "p", options) as pair:
        with NbdClient(pairs.primary_uri(pair)) as client, NbdClient(pairs.guest_uri(pair)) as guest:
            for text in (b"one", b"two"):
                client.write(0, text)
                number = pair.status()["checkpoint"]
                wait_until(lambda expected=text: guest.read(0, 3) == expected, what="a checkpoint by itself")  # type: ignore[misc]  # a default of a lambda
                pair.wait_for(lambda now, before=number: now["checkpoint"] > before, "at another checkpoint", 20)  # type: ignore[misc]


def test_a_small_buffer_asks_for_checkpoints(short_dir: Path) -> None:
    """Three times as much is overwritten as the hidden disk can hold; no write fails, and the guest sees no mixture."""
    size = 24 * MIB
    with pairs.running(short_dir / "p", PairOptions(size=size, buffer_bytes=37 * MIB)) as pair:
        assert pair.status()["buffer"]["capacity_bytes"] < 2 * size
        before = pair.status()["checkpoint"]
        with NbdClient(pairs.primary_uri(pair)) as client:
            for value in (1, 2, 3):
                pairs.write_all(client, bytes([value]) * size)
        assert pair.status()["checkpoint"] > before
        pairs.compare_disks(pair)
        seen = pairs.contents(pairs.guest_uri(pair))
        turns = [number for number in range(1, size) if seen[number] != seen[number - 1]] if len(set(seen)) > 1 else []
        assert len(turns) <= 1, "one point of the order of writes"
        pair.checkpoint()
        assert pairs.contents(pairs.guest_uri(pair)) == b"\x03" * size


# The commit


def failed_over(pair: Pair, children: dict[Role, Child]) -> bytes:
    """Half of the disk is in the hidden disk, some in the active disk, the primary is dead. What the guest sees."""
    base = pairs.random_bytes(1, SIZE)
    with NbdClient(pairs.primary_uri(pair)) as client:
        pairs.write_all(client, base)
        pair.checkpoint()
        pairs.write_all(client, pairs.random_bytes(2, SIZE // 2))
    view = bytearray(base)
    with NbdClient(pairs.guest_uri(pair)) as guest:
        for offset in range(1000, SIZE, MIB):
            guest.write(offset, b"guest" * 2000)
            view[offset : offset + 10_000] = b"guest" * 2000
    primary = children.pop("primary")
    pairs.kill(primary.pid)
    primary.wait(20)
    pair.wait_for(lambda now: not now["secondary"]["peer"]["connected"], "cut off", 20)
    return bytes(view)


def test_a_commit_that_is_killed_goes_on(faulty: tuple[Pair, dict[Role, Child]]) -> None:
    pair, children = faulty
    view = failed_over(pair, children)
    faults = sick(pair, "secondary")
    faults.delay(write=0.03)
    pair.failover("checkpoint")
    for _ in range(2):
        at_start = pair.status()["commit"]["done_bytes"]
        pair.wait_for(lambda now, least=at_start: now["commit"]["done_bytes"] > least + MIB, "on with the commit", 20)  # type: ignore[misc]  # a default of a lambda
        status = pair.status()
        assert status["state"] == "failover"
        assert status["commit"]["done_bytes"] < status["commit"]["total_bytes"]
        assert pairs.contents(status["secondary"]["nbd_uri"]) == view, "in the middle of the commit"
        secondary = children.pop("secondary")
        pairs.kill(secondary.pid)
        secondary.wait(20)
        assert pairs.secondary_disk(pair).read_bytes() != view
        children["secondary"] = pairs.start_side(pair, "secondary")
    assert pairs.contents(pairs.guest_uri(pair)) == view
    faults.heal()
    pair.wait_for(lambda now: now["state"] == "done", "done with the commit", 30)
    assert pairs.secondary_disk(pair).read_bytes() == view
    assert pairs.contents(pairs.guest_uri(pair)) == view
    assert pair.status()["generation"] == 2


def test_a_commit_that_fails_leaves_every_byte_where_it_can_be_had(faulty: tuple[Pair, dict[Role, Child]]) -> None:
    pair, children = faulty
    view = bytearray(failed_over(pair, children))
    faults = sick(pair, "secondary")
    faults.fail(write=errno.EIO)
    pair.failover("checkpoint")
    status = pair.wait_for(lambda now: now["state"] == "failover_failed", "in the stage of a failed commit", 20)
    assert "commit" in status["secondary"]["error"]["name"] + status["secondary"]["error"]["sentence"]
    with NbdClient(pairs.guest_uri(pair)) as guest:
        assert pairs.read_all(guest) == view
        for offset in (700, SIZE // 2 + 77_777):
            guest.write(offset, b"after the failure" * 500)
            view[offset : offset + 8500] = b"after the failure" * 500
        assert pairs.read_all(guest) == view
        with pytest.raises(OperationFailed, match="latest"):
            pair.failover("latest", force=True)
        faults.heal()
        pair.failover("checkpoint")
        pair.wait_for(lambda now: now["state"] == "done", "done with the commit", 30)
        assert pairs.read_all(guest) == view
    assert pairs.secondary_disk(pair).read_bytes() == view


# The first synchronisation


def test_disks_that_differ_are_synchronised_in_full(short_dir: Path) -> None:
    """Data in places, the rest holes; the secondary disk is full of something else."""
    size = 64 * MIB
    a, b = short_dir / "a.raw", short_dir / "b.raw"
    with a.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, 4 * MIB):
            file.seek(offset)
            file.write(pairs.random_bytes(offset, MIB))
    b.write_bytes(pairs.random_bytes(5, size))
    options = PairOptions(primary_disks=(a,), secondary_disks=(b,), buffer_bytes=2 * size)
    pair = Pair.create(short_dir / "p", options)
    faults = Faults(a)
    faults.delay(read=0.15)
    with pairs.started(pair, "secondary", "primary"):
        with NbdClient(pairs.guest_uri(pair)) as guest:
            fails_with(errno.EIO, guest.read, 0, 4096)
        with NbdClient(pairs.primary_uri(pair)) as client:
            client.write(size - 9, b"meanwhile")  # the export serves already
        with pytest.raises(OperationFailed, match="synchronised"):
            pair.checkpoint()
        steps = [pair.resync_progress()]
        while steps[-1].state != "protected":
            if steps[-1].done_bytes > size // 4:
                faults.heal()
            steps.append(pair.resync_progress())
        done = [step.done_bytes for step in steps if step.active]
        assert done == sorted(done)
        assert any(0 < step.done_bytes < step.total_bytes for step in steps)
        assert {step.total_bytes for step in steps if step.active} == {size}
        assert steps[0].state == "syncing"
        pairs.compare_disks(pair)
        assert b.stat().st_blocks * 512 < size // 2, "holes stay holes"
        with NbdClient(pairs.guest_uri(pair)) as guest:
            assert guest.read(size - 9, 9) == b"meanwhile"
            assert pairs.read_all(guest) == a.read_bytes()
