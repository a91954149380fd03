"""`tandemdisk chaos`: a short run on real processes, and an oracle that sees what is wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from common.config import make_settings
from common.disk import FileDisk
from deploy.chaos.beside import Beside
from deploy.chaos.disks import DiskErrors, DiskFull, Keeper, missing
from deploy.chaos.expectation import BLOCK, ZEROES, Breach, Expectation
from deploy.chaos.guest import Guest
from deploy.chaos.tally import Tally
from deploy.chaos.variety import draw
from deploy.chaos.writer import Writer
from secondary.space import plan_slots
from tests.conftest import wait_until
from tests.pairs import tandemdisk
from tests.serving import serving
from tests.volumes import PlainVolume

RUNS = [
    pytest.param("sync", "local", 7, (), id="sync"),
    pytest.param("async", "local", 8, (), id="async", marks=pytest.mark.slow),
    pytest.param("sync", "netns", 9, (), id="netns", marks=[pytest.mark.root, pytest.mark.slow]),
    pytest.param("sync", "local", 1, ("--fault", "takeover"), id="takeover", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("mode", "hosts", "seed", "more"), RUNS)
def test_a_short_run_loses_nothing(short_dir: Path, mode: str, hosts: str, seed: int, more: tuple[str, ...]) -> None:
    report = short_dir / "report.json"
    done = tandemdisk(
        "chaos", "--seed", str(seed), "--mode", mode, "--hosts", hosts, "--minutes", "1", "--cycles", "2", *more,
        "--dir", short_dir / "c", "--report", report, timeout_s=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(report.read_text())
    assert told["cycles"] >= 1
    assert told["comparisons"] == told["cycles"] <= told["guest_views"]
    assert len(told["pairs_each"]) == told["pairs"]
    assert told["writes"]["acknowledged"] > 0
    assert sum(told["takeovers"].values()) >= (2 if more else 0)
    assert ("most_async_bytes_left_behind" in told["writes"]) == (mode == "async")
    assert (told["writes"]["lost"], told["generations"]["with_two_writers"], told["failure"]) == (0, 0, "")


def test_acknowledgements_of_two_sides_in_one_generation_are_seen(short_dir: Path) -> None:
    """Two loads on two exports whose sides both say that they lead: in one generation, then each in its own."""
    generations: dict[str, int | None] = {"a": 7, "b": 7}
    with contextlib.ExitStack() as stack:
        writers: list[Writer] = []
        for number, side in enumerate("ab"):
            (short_dir / side).mkdir()
            disk = FileDisk(str(image(short_dir / side / "disk")))
            stack.callback(disk.close)
            served = stack.enter_context(serving(short_dir / side, PlainVolume(disk, "disk0")))
            writer = Writer(Expectation(short_dir / f"e{side}", 8), number, generations.__getitem__)
            stack.callback(writer.close)
            writer.watch(lambda generation: generation == 7)
            writer.aim(side, served.uri())
            writers.append(writer)
        one, other = writers
        wait_until(lambda: min(writer.acknowledged for writer in writers) > 20, 20, "writes on both sides")
        assert 7 in one.writers.keys() & other.writers.keys(), "a generation with two writers"
        assert not one.strays
        generations["b"] = 8
        wait_until(lambda: other.strays, 20, "a write in a generation that does not count")
        other.rest()
        assert {stray.generation for stray in other.strays} == {8}
        assert set(other.writers) == {7, 8}
        assert all(stray.number not in other.expectation.acknowledged for stray in other.strays), "still in doubt"


def test_what_a_guest_wrote_on_a_checkpoint_has_to_be_kept(short_dir: Path) -> None:
    number = [3]
    disk = FileDisk(str(image(short_dir / "disk")))
    guest = Guest(8, 1)
    with serving(short_dir, PlainVolume(disk, "disk0")) as served:
        guest.begin(served.uri(), lambda: number[0], 100)
        wait_until(lambda: len(guest.certain(3)) > 3 and guest.reads > 5, 20, "writes that are certain")
        number[0] = 4
        wait_until(lambda: len(guest.certain(4)) > 3, 20, "writes on the next checkpoint")
        guest.end()
    disk.close()
    assert not guest.wrong
    assert not guest.certain(3).keys() & guest.certain(4).keys(), "the last one counts"
    made = Expectation(short_dir / "expected", 8)
    made.number = guest.number
    found = made.decode((short_dir / "disk").read_bytes())
    guest.judge("checkpoint", 4, found)
    with pytest.raises(Breach, match="without anybody's word"):
        guest.judge("latest", 4, found)
    found[next(iter(guest.certain(4)))] = 0
    with pytest.raises(Breach, match="not there after a failover"):
        guest.judge("checkpoint", 4, found)
    guest.judge("checkpoint", 5, found)
    guest.judge("latest", 5, found)


def test_the_second_volume_has_an_oracle_of_its_own(short_dir: Path) -> None:
    beside = Beside("disk1", short_dir / "e", 8, 1, lambda _side: 7)
    disk = FileDisk(str(image(short_dir / "disk")))
    with contextlib.ExitStack() as stack:
        stack.callback(disk.close)
        served = stack.enter_context(serving(short_dir, PlainVolume(disk, "disk1")))
        stack.callback(beside.writer.close)
        beside.begin_checkpoint()
        beside.writer.aim("a", served.uri())
        wait_until(lambda: beside.writer.acknowledged > 200, 20, "writes")
        beside.writer.rest()
    beside.end_checkpoint(5)
    data = (short_dir / "disk").read_bytes()
    damaged = bytes((data[0] ^ 1,)) + data[1:]  # not zeroes: the last request may have been for those everywhere
    lost = beside.expectation.decode(damaged)
    for target in ("latest", "checkpoint"):
        beside.begin_checkpoint()
        beside.end_checkpoint(6)
        with pytest.raises(Breach, match="disk1"):
            beside.judge_failover(target, 6, lost, "sync")
    for disks, view in (((data, damaged), data), ((data, data), damaged)):
        with pytest.raises(Breach, match="disk1"):
            beside.compare(data, disks, view)
    beside.judge_view(6, beside.expectation.decode(data))
    beside.compare(data, (data, data), data)
    beside.judge_failover("latest", 6, beside.expectation.decode(data), "sync")


def image(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(8 * BLOCK)
    return path


def expectation(directory: Path) -> tuple[Expectation, bytearray]:
    """Eight blocks, each written and acknowledged once, and a disk that holds them."""
    made = Expectation(directory / "expected", 8)
    disk = bytearray(8 * BLOCK)
    for block in range(8):
        number, data = made.begin(block, 1)
        made.acknowledge(number, block, 1)
        disk[block * BLOCK : (block + 1) * BLOCK] = data
    return made, disk


def test_the_oracle_sees_a_lost_an_alien_and_a_torn_block(tmp_path: Path) -> None:
    made, disk = expectation(tmp_path)
    assert made.wrong(made.decode(disk)) == []
    old = bytes(disk)
    number, data = made.begin(3, 2)
    assert made.wrong(made.decode(old)) == [], "in doubt: it may be there or not"
    disk[3 * BLOCK : 5 * BLOCK] = data
    assert made.wrong(made.decode(disk)) == []
    made.acknowledge(number, 3, 2)
    assert [wrong.block for wrong in made.wrong(made.decode(old))] == [3, 4], "lost"
    swapped = bytes(disk[BLOCK : 2 * BLOCK]) + bytes(disk[BLOCK:])
    assert [(wrong.block, wrong.found) for wrong in made.wrong(made.decode(swapped))] == [(0, -1)], "of another block"
    torn = bytearray(disk)
    torn[6 * BLOCK + 512 : 6 * BLOCK + 1024] = bytes(512)
    assert [(wrong.block, wrong.found) for wrong in made.wrong(made.decode(torn))] == [(6, -1)], "torn"


def test_a_read_under_load_may_bring_what_is_in_doubt_and_nothing_else(tmp_path: Path) -> None:
    made, disk = expectation(tmp_path)
    old, alien = disk[2 * BLOCK : 3 * BLOCK], disk[3 * BLOCK : 4 * BLOCK]
    assert made.allows(2, old)
    assert not made.allows(2, alien)
    assert not made.allows(2, bytes(BLOCK)), "zeroes that nobody asked for"
    number, data = made.begin(2, 1)
    assert made.allows(2, old)
    assert made.allows(2, data)
    assert made.allows(2, data[:512] + old[512:]), "torn, in doubt"
    made.acknowledge(number, 2, 1)
    assert not made.allows(2, old)
    assert not made.allows(2, data[:512] + old[512:])
    made.begin(2, 1)
    torn = disk[:]
    torn[2 * BLOCK : 3 * BLOCK] = data[:512] + old[512:]
    made.settle(made.decode(torn))
    assert made.wrong(made.decode(torn)) == []
    assert made.allows(2, data[:512] + old[512:]), "it was found torn"
    while number % ZEROES:
        number, data = made.begin(2, 1)
    made.acknowledge(number, 2, 1)
    assert made.allows(2, bytes(BLOCK))


def test_what_was_seen_stays_and_the_order_counts(tmp_path: Path) -> None:
    made, disk = expectation(tmp_path)
    before = made.decode(disk)
    made.settle(before)
    first, data = made.begin(0, 1)
    made.begin(1, 1)
    seen = before.copy()
    seen[1] = 10
    assert [wrong.block for wrong in made.not_a_beginning(seen)] == [0], "the later write without the earlier one"
    assert made.wrong(seen) == [], "both are in doubt"
    made.settle(before)
    disk[:BLOCK] = data
    assert [wrong.found for wrong in made.wrong(made.decode(disk))] == [first], "it was seen without"
    low, high = np.array(made.acknowledged), np.array(made.acknowledged)
    low[2:4] += np.uint64(1)
    assert made.missing_bytes(made.decode(disk), low) == 2 * BLOCK, "a newer write is nothing that is missing"
    low[2:4] -= np.uint64(1)
    assert [wrong.block for wrong in made.out_of_range(made.decode(disk), low, high)] == [0]


def test_zeroes_are_as_old_or_new_as_can_be(tmp_path: Path) -> None:
    made, disk = expectation(tmp_path)
    made.begin(7, 1)
    made.begin(7, 1)
    made.settle(made.decode(disk))
    zeroes, data = made.begin(2, 2)
    assert zeroes == ZEROES
    assert not any(data)
    before = bytes(disk)
    disk[2 * BLOCK : 4 * BLOCK] = data
    for there in (before, disk):
        assert made.wrong(made.decode(there)) == [], "in doubt"
    made.acknowledge(zeroes, 2, 2)
    assert [wrong.block for wrong in made.wrong(made.decode(before))] == [2, 3]
    assert made.wrong(made.decode(disk)) == []
    low, high = made.snapshot()
    assert made.out_of_range(made.decode(disk), low, high) == []
    after, data = made.begin(3, 1)
    made.acknowledge(after, 3, 1)
    assert [wrong.block for wrong in made.wrong(made.decode(disk))] == [3], "zeroes, but those of before"
    assert made.missing_bytes(made.decode(before), made.acknowledged) == BLOCK, "the data; zeroes have none"
    disk[3 * BLOCK : 4 * BLOCK] = data
    assert made.not_a_beginning(made.decode(disk)) == []
    late = made.decode(before)
    late[3] = after
    assert [wrong.block for wrong in made.not_a_beginning(late)] == [2], "the later write without the zeroes"
    made.settle(made.decode(disk))
    assert made.wrong(made.decode(disk)) == []
    assert made.out_of_range(made.decode(disk), *made.snapshot()) == []


@pytest.mark.root
def test_a_disk_fails_on_command_and_is_whole_again(tmp_path: Path) -> None:
    if why := missing(tmp_path):
        pytest.skip(why)
    small = tmp_path / "small"
    small.mkdir()
    keeper = Keeper()
    try:
        keeper.ask(cover=str(small), size=1 << 20)
        image = small / "image"
        with image.open("wb") as file:
            file.truncate(1 << 20)
        keeper.ask(serve=str(image), seed=1)
        disk = os.open(image, os.O_RDWR)
        os.pwrite(disk, b"x" * 8192, 4096)
        everything = {"kinds": ["read", "write", "flush"], "errno": errno.EIO, "first": 4096, "end": 8192}
        with DiskErrors(keeper, image, everything | {"share": 1.0, "torn": True}):
            for failing in (lambda: os.pread(disk, 512, 4096), lambda: os.pwrite(disk, bytes(4096), 4096),
                            lambda: os.fsync(disk)):  # fmt: skip
                with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                    failing()
            assert os.pread(disk, 4096, 8192) == b"x" * 4096, "elsewhere"
        torn = os.pread(disk, 4096, 4096)
        assert torn == bytes(torn.count(0)) + b"x" * torn.count(b"x"), "a beginning of it was written"
        with DiskFull(small):
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                os.pwrite(disk, b"y" * 4096, 1 << 19)
            os.pwrite(disk, b"y" * 4096, 4096)  # that has its page
        os.pwrite(disk, b"y" * 4096, 1 << 19)
        os.fsync(disk)
        os.close(disk)
        assert keeper.failed == 3
    finally:
        keeper.close()
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def test_the_seed_draws_every_policy_and_the_report_says_which() -> None:
    drawn = [draw(random.Random(f"{seed}/0"), random.Random(seed), "sync", "local") for seed in range(400)]
    words = {word for variety in drawn for word in variety.words}
    assert words >= {
        "on_peer_loss = \"block\"", "write_intent = false", "on_congestion = \"pull-ahead\"", "max_lag_seconds = 0.4",
        "small pool", "spill_bytes = 0", "2 volumes", "checkpoint_interval_s = 0.05", "block_size = 512", "zstd",
        "CURVE", "guest",
    }  # fmt: skip
    assert any(not variety.words for variety in drawn), "and one as it is shipped"
    for variety in drawn:
        sizes = [variety.blocks * BLOCK] * (variety.options.volumes or 1)
        plan = {"pair_id": "p", "side": "a", "directory": "/a", "volumes": [{"name": "d", "disk": "/d"}],
                "export": {"unix": "/a/s"}, "replication": {"listen": "ipc:///l", "connect": "ipc:///c"}}  # fmt: skip
        make_settings({**plan, **variety.options.overrides, "replication": plan["replication"]}, base=Path("/"))
        if variety.options.buffer_bytes is not None:
            (hidden, _), *_ = plan_slots(variety.options.buffer_bytes, variety.options.block_size or 4096, sizes)
            assert hidden * (variety.options.block_size or 4096) < sizes[0], "the pool does not hold the disk"
    tally = Tally(1, "sync", "local")
    tally.varieties = [variety.words for variety in drawn]
    assert tally.report()["pairs_each"] == [list(variety.words) for variety in drawn]
    assert tally.table().row_count
