"""The simulation in the suite: some seeds, every story, and the same trace for the same seed.

It replaces clocks, sockets and disks of the whole process, so each run is a process of its own. The soak is the same
command with more seeds: ``python -m tests.simulation --seeds N``.
"""

from __future__ import annotations

import re
import subprocess
import sys

SEEDS = 150


def simulate(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.simulation", *arguments],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_seeds_lose_nothing_and_converge() -> None:
    text = simulate("--seeds", str(SEEDS))
    assert re.search(rf"^{SEEDS} seeds .* 0 failed$", text, re.MULTILINE), text
    acknowledged = re.search(r"(\d+) writes acknowledged", text)
    assert acknowledged is not None
    assert int(acknowledged[1]) > 50 * SEEDS, "the simulated clients were hardly served"


def test_every_story_ends_well() -> None:
    text = simulate("--scenario")
    assert text.count("ok ") >= 15
    assert "FAILED" not in text


def test_a_seed_replays_to_the_same_trace() -> None:
    first, second = simulate("--seed", "7"), simulate("--seed", "7")
    assert re.search(r"trace [0-9a-f]{16}", first)
    assert first == second
    assert simulate("--seed", "8") != first
