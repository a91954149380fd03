"""The simulation in the suite: three thousand seeds (250 in every run), every story, the same trace for a seed.

It replaces clocks, sockets and disks of the whole process, so each run is a process of its own. The soak is the same
command with more seeds: ``python -m tests.simulation --seeds N``.
"""

from __future__ import annotations

import os
import re
import resource
import shlex
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
PARTS = 12
QUICK = 1
"""Parts that no run leaves out."""


DESCRIPTORS = 128
"""More than a life has open at once. What stays open after one is an open file too many in a soak."""


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))


SIMULATION = [sys.executable, "-W", "ignore", "-m", "tests.simulation"]


def simulate(*arguments: str, timeout_s: float = 110, code: int = 0, hashing: str = "random") -> str:
    done = subprocess.run(
        [*SIMULATION, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        preexec_fn=few_descriptors,
        env={**os.environ, "PYTHONHASHSEED": hashing},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


HAPPENED = [
    # troubles
    "cut", "one_way", "reset", "bad_messages", "flapping", "jitter", "stale", "preempt", "clocks", "kill_primary",
    "kill_secondary", "kill_export", "power_primary", "power_secondary", "pause", "stop", "disk_primary",
    "disk_secondary", "slow", "metadata", "kill_inside", "slow_reader",
    # what came of them
    "messages lost", "messages repeated", "messages damaged", "messages cut short", "messages of strangers",
    "messages delivered late", "failed: read", "failed: write", "failed: flush", "failed: save", "failed: intents",
    "deaths inside a call", "cold reads", "turns in between", "writes lost with the power",
    # commands
    "checkpoint", "resize", "verify", "corrupt", "resync", "switchover", "takeover", "rejoin", "intents",
    "operator checkpoints", "resizes", "verifications", "corruptions found", "switchovers", "rejoins",
    "older copies",
    # policies, and paths for much that are taken for little
    "pull_ahead", "lag", "no_intents", "changing_intents", "ceiling", "floor", "deadline", "compress",
    "few_epochs", "vectors", "hopeless", "samples",
    # checks
    "checkpoints", "prefixes checked", "guest reads checked", "promotions", "generations", "lives without an end",
]  # fmt: skip
"""All of it, in each part: a trouble that never comes, or a check that never runs, finds nothing. What a flush
that fails loses is too rare for that: stories have it."""


def counts(text: str) -> dict[str, int]:
    """The last line of a summary."""
    return {
        name: int(count) for name, count in re.findall(r"(?:^  |, )([a-z:_A-Z ]+?) (\d+)(?=,|$)", text.splitlines()[-1])
    }


@pytest.mark.parametrize(
    "part", [*range(QUICK), *(pytest.param(part, marks=pytest.mark.slow) for part in range(QUICK, PARTS))]
)
def test_seeds_lose_nothing_and_converge(part: int) -> None:
    """Three thousand, in parts that can run side by side."""
    text = simulate("--start", str(part * SEEDS), "--seeds", str(SEEDS))
    assert re.search(rf"^{SEEDS} seeds .* 0 failed$", text, re.MULTILINE), text
    acknowledged = re.search(r"(\d+) writes acknowledged", text)
    assert acknowledged is not None
    assert int(acknowledged[1]) > 50 * SEEDS, "the simulated clients were hardly served"
    happened = counts(text)
    assert not [name for name in HAPPENED if not happened.get(name)], text
    assert happened["prefixes checked"] > 4 * happened["prefixes not checked"], "the secondary hardly ever says exact"
    assert happened["prefixes checked"] > 20 * SEEDS
    assert happened["promotions"] > SEEDS // 3


@pytest.mark.slow
def test_seeds_with_a_compressed_stream() -> None:
    text = simulate("--compress", "--seeds", "60", "--start", "5000")
    assert re.search(r"^60 seeds .* 0 failed$", text, re.MULTILINE), text


STORIES = pytest.mark.xdist_group("stories")
"""They are told all at once, by one worker."""


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """How each story ended: what is printed for it."""
    done = subprocess.run([*SIMULATION, "--scenario"], capture_output=True, text=True, timeout=110)
    parts = re.split(r"^(?=ok     |FAILED )", done.stdout, flags=re.MULTILINE)
    found = {part.split()[1]: part for part in parts if part}
    assert found, done.stdout + done.stderr
    return found


@STORIES
@pytest.mark.parametrize("story", [name for name in SCENARIOS if name not in REGRESSIONS])
def test_a_story_ends_well(told: dict[str, str], story: str) -> None:
    assert told[story].startswith("ok "), told[story]


@STORIES
@pytest.mark.parametrize("bug", REGRESSIONS)
def test_a_bug_that_the_simulation_found_is_gone(told: dict[str, str], bug: str) -> None:
    assert told[bug].startswith("ok "), told[bug]


def test_a_seed_replays_to_the_same_trace() -> None:
    """Whatever ran before it in the process, and however Python hashes; 116: with sentences about files on their way to
    the peer. A trace holds the digest of every message, so it is all bytes that are compared."""
    traces = []
    for order, hashing in (([], "1"), (["--backwards"], "2")):
        text = simulate("--start", "100", "--seeds", "24", "--traces", *order, hashing=hashing)
        traces.append(dict(re.findall(r"^seed (\d+): trace ([0-9a-f]{16})$", text, re.MULTILINE)))
    assert len(traces[0]) == 24
    assert traces[0] == traces[1]
    assert len(set(traces[0].values())) == 24
    assert f"trace {traces[0]['116']}" in simulate("--seed", "116"), "a life by itself is another one"


BUG = "cow_after_write"


def test_a_failure_shrinks_to_a_line_that_replays_it() -> None:
    text = simulate("--seed", "126", "--bug", BUG, "--shrink", code=1)
    found = re.search(r"^options: (.*)$", text, re.MULTILINE)
    line = re.search(r"^smaller: (I1: .*)\n  python -m tests.simulation (.*)$", text, re.MULTILINE)
    assert found is not None, text
    assert line is not None, text
    assert "commands=" in found[1], "the seed has nothing to leave out"
    assert "commands= " in line[2], "commands that have no part in it are still there"
    assert "troubles= " in line[2], "troubles that have no part in it are still there"
    again = simulate(*shlex.split(line[2]), code=1)
    assert line[1] in again
    assert simulate(*shlex.split(line[2].removesuffix(f"--bug {BUG}"))), "without the bug it passes"


WRONG = ["--scenario x", "--bug x", "--nth-fault x", "--seed 1 --set x=1", "--seed 1 --set steps=x",
         "--seed 1 --set troubles=x", "--seeds 1 --set steps"]  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG)
def test_a_name_that_there_is_not_is_told_in_a_sentence(arguments: str) -> None:
    done = subprocess.run([*SIMULATION, *arguments.split()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().endswith(".")


def test_who_has_seen_enough_may_close_the_pipe() -> None:
    with subprocess.Popen([*SIMULATION, "--seed", "7", "--log"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == b""


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found_within_the_stated_seeds_and_without_it_they_pass(name: str) -> None:
    """Each by itself: workers that share the tests out need not hunt for all of them."""
    hunt = simulate("--bug", name)
    bug = BUGS[name]
    invariant = "|".join(bug.invariants)
    assert re.search(rf"^ok +{name}: seed \d+ of {bug.seeds}: ({invariant}): ", hunt, re.MULTILINE), hunt


def nth_faults(phase: str, every: int) -> bool:
    """Whether no call of the phase that failed did harm."""
    text = simulate("--nth-fault", phase, "--every", str(every), timeout_s=600)
    return bool(re.search(rf"^ok     {phase}: [1-9]\d* calls, \d+ runs, once", text, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_any_call_of_a_phase_may_fail_once_and_from_then_on(phase: str) -> None:
    """Every sixth call here; the soak has them all."""
    assert nth_faults(phase, 6)


@pytest.mark.soak
@pytest.mark.parametrize("phase", PHASES)
def test_every_call_of_a_phase_fails_once_and_from_then_on(phase: str) -> None:
    assert nth_faults(phase, 1)
