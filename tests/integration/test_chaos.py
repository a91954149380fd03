"""`tandemdisk chaos`: a short run on real processes, and an oracle that sees what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from deploy.chaos.expectation import BLOCK, Expectation
from tests.pairs import tandemdisk


def test_a_short_run_loses_nothing(short_dir: Path) -> None:
    report = short_dir / "report.json"
    done = tandemdisk(
        "chaos", "--seed", "7", "--minutes", "1", "--cycles", "6", "--dir", short_dir / "c", "--report", report,
        timeout_s=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(report.read_text())
    assert told["cycles"] >= 1
    assert told["comparisons"] == told["cycles"] <= told["guest_views"]
    assert told["writes"]["acknowledged"] > 0
    assert (told["writes"]["lost"], told["generations"]["with_two_writers"], told["failure"]) == (0, 0, "")


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
