"""Many seeds over several processes, for as long as is given: what the suite has no time for.

    python -m tests.simulation --soak --minutes 60 --jobs 2
    python -m tests.simulation --soak --seeds 100000 --start 1000000

Every failure is printed as it is found, with the command that shows it again; the soak goes on.
"""

from __future__ import annotations

import concurrent.futures
import gc
import itertools
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.simulation.options import options_of
from tests.simulation.runner import Result, run, shrink

CHUNK = 40
"""Seeds that a process is given at once: a second or two."""
REPORT_S = 60.0
SHRUNK = 3
"""Failures that are shrunk; the others may well be the same."""


@dataclass
class Tally:
    """What came of some seeds."""

    seeds: int = 0
    acknowledged: int = 0
    virtual_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    """Their seeds."""

    def add(self, other: Tally) -> None:
        self.seeds += other.seeds
        self.acknowledged += other.acknowledged
        self.virtual_s += other.virtual_s
        self.counts += other.counts
        self.failures += other.failures
        self.failed += other.failed

    def describe(self, seconds: float) -> str:
        return (
            f"{self.seeds} seeds in {seconds / 60:.1f} min ({self.seeds / seconds:.1f} a second), "
            f"{self.acknowledged} simulated writes acknowledged, {self.virtual_s / 3600:.1f} simulated hours, "
            f"{len(self.failures)} failed"
        )


def calm() -> None:
    """Nothing of the modules becomes garbage, so nobody need look for it after every life."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def chunk(start: int, count: int, settings: Sequence[str]) -> Tally:
    """Run seeds from ``start`` on; in a process of its own."""
    warnings.simplefilter("ignore")
    tally = Tally()
    for seed in range(start, start + count):
        result = run(seed, options_of(seed, settings))
        tally.seeds += 1
        tally.acknowledged += result.acknowledged
        tally.virtual_s += result.virtual_s
        tally.counts += result.counts
        if result.failure is not None:
            tally.failures.append(result.describe())
            tally.failed.append(seed)
    return tally


def summary(counts: Counter[str]) -> str:
    """What happened, and what was checked."""
    return "  " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def shrunk(result: Result) -> str:
    """The smallest failure of its kind, and the line that replays it."""
    smaller = shrink(result)
    return f"smaller: {smaller.what}: {smaller.failure}\n  {smaller.command()}"


def shrink_seed(seed: int, settings: Sequence[str]) -> str:
    """In a process of its own: the other seeds go on."""
    warnings.simplefilter("ignore")
    return f"seed {seed}, {shrunk(run(seed, options_of(seed, settings)))}"


def soak(start: int, seeds: int | None, minutes: float | None, jobs: int, settings: Sequence[str] = ()) -> int:
    """``seeds`` of them, or as many as ``minutes`` give, with ``settings`` instead of what they draw; the exit code
    is 1 if any failed."""
    options_of(start, settings)  # a name that there is not is told before anything runs
    started = time.monotonic()
    said = started
    total = Tally()
    left = itertools.count(start, CHUNK) if seeds is None else iter(range(start, start + seeds, CHUNK))
    last = None if seeds is None else start + seeds
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=calm) as pool:
        running: set[concurrent.futures.Future[Any]] = set()
        while True:
            in_time = minutes is None or time.monotonic() - started < minutes * 60
            while in_time and len(running) < 2 * jobs and (first := next(left, None)) is not None:
                running.add(pool.submit(chunk, first, CHUNK if last is None else min(CHUNK, last - first), settings))
            if not running:
                break
            done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                tally = future.result()
                if isinstance(tally, str):
                    print(tally, flush=True)
                    continue
                for failure in tally.failures:
                    print(failure, flush=True)
                for seed in tally.failed[: max(0, SHRUNK - len(total.failed))]:
                    running.add(pool.submit(shrink_seed, seed, settings))
                total.add(tally)
            if time.monotonic() - said > REPORT_S:
                said = time.monotonic()
                print(total.describe(said - started), flush=True)
    print(f"seeds {start} to {start + total.seeds - 1}")
    print(total.describe(time.monotonic() - started))
    print(summary(total.counts))
    return 1 if total.failures else 0
