"""The simulation in the suite: two thousand seeds, every story, and the same trace for the same seed.

It replaces clocks, sockets and disks of the whole process, so each run is a process of its own. The soak is the same
command with more seeds: ``python -m tests.simulation --seeds N``.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys

import pytest

import tests.simulation.commands
import tests.simulation.guests
import tests.simulation.regressions_disks
import tests.simulation.regressions_roles  # noqa: F401 - and these
from tests.simulation.bugs import BUGS
from tests.simulation.nth_fault import PHASES
from tests.simulation.regressions import REGRESSIONS
from tests.simulation.scenarios import SCENARIOS

SEEDS = 250
"""Of each part."""
PARTS = 8


DESCRIPTORS = 128
"""More than a life has open at once. What stays open after one is an open file too many in a soak."""


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))


def simulate(*arguments: str, timeout_s: float = 110) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.simulation", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        preexec_fn=few_descriptors,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("part", range(PARTS))
def test_seeds_lose_nothing_and_converge(part: int) -> None:
    """Two thousand, in parts that can run side by side."""
    text = simulate("--start", str(part * SEEDS), "--seeds", str(SEEDS))
    assert re.search(rf"^{SEEDS} seeds .* 0 failed$", text, re.MULTILINE), text
    acknowledged = re.search(r"(\d+) writes acknowledged", text)
    assert acknowledged is not None
    assert int(acknowledged[1]) > 50 * SEEDS, "the simulated clients were hardly served"


def test_seeds_with_a_compressed_stream() -> None:
    text = simulate("--compress", "--seeds", "60", "--start", "5000")
    assert re.search(r"^60 seeds .* 0 failed$", text, re.MULTILINE), text


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """How each story ended: what is printed for it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.simulation", "--scenario"],
        capture_output=True,
        text=True,
        timeout=110,
    )
    parts = re.split(r"^(?=ok     |FAILED )", done.stdout, flags=re.MULTILINE)
    found = {part.split()[1]: part for part in parts if part}
    assert found, done.stdout + done.stderr
    return found


@pytest.mark.parametrize("story", [name for name in SCENARIOS if name not in REGRESSIONS])
def test_a_story_ends_well(told: dict[str, str], story: str) -> None:
    assert told[story].startswith("ok "), told[story]


@pytest.mark.parametrize("bug", REGRESSIONS)
def test_a_bug_that_the_simulation_found_is_gone(told: dict[str, str], bug: str) -> None:
    assert told[bug].startswith("ok "), told[bug]


@pytest.mark.parametrize("seed", ["7", "116"])
def test_a_seed_replays_to_the_same_trace(seed: str) -> None:
    """116: with sentences about files on their way to the peer."""
    first, second = simulate("--seed", seed), simulate("--seed", seed)
    assert re.search(r"trace [0-9a-f]{16}", first)
    assert first == second
    assert simulate("--seed", "8") != first


@pytest.fixture(scope="module")
def hunts() -> str:
    return simulate("--bug")


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found_within_the_stated_seeds_and_without_it_they_pass(name: str, hunts: str) -> None:
    assert re.search(rf"^ok +{name}: seed \d+ of {BUGS[name].seeds}: ", hunts, re.MULTILINE), hunts


def nth_faults(every: int) -> set[str]:
    """The phases in which no call that failed did harm."""
    text = simulate("--nth-fault", "--every", str(every), timeout_s=600)
    return set(re.findall(r"^ok     (\w+): [1-9]\d* calls, \d+ runs, once", text, re.MULTILINE))


def test_any_call_of_a_phase_may_fail_once_and_from_then_on() -> None:
    """Every ninth call here; the soak has them all."""
    assert nth_faults(9) == set(PHASES)


@pytest.mark.soak
def test_every_call_of_a_phase_fails_once_and_from_then_on() -> None:
    assert nth_faults(1) == set(PHASES)
