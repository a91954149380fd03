"""Everything that takes long, one after the other: ``make soak``, or ``python -m tests.soak --help``.

    cow          the stress test of copy-before-write, for --operations
    simulation   seeds of the simulation, for --simulation-minutes on --jobs processes
    nth-fault    every disk, metadata and send call of every phase fails once, and from then on
    tests        pytest -m "soak or slow"
    chaos        real processes in sync mode until --kills SIGKILLs and --failovers failovers, at most --chaos-minutes
    chaos-async  the same in async mode, for a third of the time
    chaos-netns  the same between network namespaces, for a third of the time; only as root

All parts run, whatever fails; a summary at the end says what did. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

PYTHON: Final = sys.executable


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a part; ``code`` None: it was left out."""

    name: str
    code: int | None
    seconds: float

    def __str__(self) -> str:
        word = "left out (needs root)" if self.code is None else "ok" if self.code == 0 else f"FAILED ({self.code})"
        return f"{self.name:<12} {word:<24} {self.seconds / 60:8.1f} min"


def parts(options: argparse.Namespace) -> Mapping[str, Sequence[str]]:
    """The command of each part, in the order in which they run."""
    chaos = (PYTHON, "-m", "deploy", "chaos")
    third = ("--minutes", str(options.chaos_minutes / 3))
    counts = ("--kills", str(options.kills), "--failovers", str(options.failovers))
    return {
        "cow": (PYTHON, "-m", "tests.soak_cow", "--operations", str(options.operations)),
        "simulation": (
            PYTHON, "-m", "tests.simulation", "--soak", "--minutes", str(options.simulation_minutes),
            "--jobs", str(options.jobs),
        ),
        "nth-fault": (PYTHON, "-m", "tests.simulation", "--nth-fault"),
        "tests": (PYTHON, "-m", "pytest", "-q", "-m", "soak or slow", "tests"),
        "chaos": (*chaos, "--minutes", str(options.chaos_minutes), *counts),
        "chaos-async": (*chaos, "--mode", "async", *third),
        "chaos-netns": (*chaos, "--hosts", "netns", *third),
    }  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", type=int, default=3_000_000)
    parser.add_argument("--simulation-minutes", type=float, default=120)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--chaos-minutes", type=float, default=120)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--failovers", type=int, default=200)
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.only or ()) - set(parts(options))):
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(parts(options))}")
    return options


def run(name: str, command: Sequence[str]) -> Outcome:
    """Run one part, its output where ours goes."""
    if name == "chaos-netns" and os.geteuid() != 0:
        return Outcome(name, None, 0.0)
    print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
    started = time.monotonic()
    done = subprocess.run(command, check=False)
    return Outcome(name, done.returncode, time.monotonic() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    outcomes = [run(name, command) for name, command in parts(options).items() if name in (options.only or [name])]
    print("\n== summary")
    for outcome in outcomes:
        print(outcome)
    return int(any(outcome.code for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
