"""``python -m tests.simulation``: run seeds, one seed in detail, or a named scenario.

--seeds N [--start S]   N seeds from S on; the first failure is shrunk and shown
--minutes M             as many seeds as that takes
--soak [--jobs J]       the same over several processes, on and on: seeds, simulated writes and hours, failures
--seed S [--log]        one seed, with its trace
        [--bug NAME]          with a bug planted
        [--shrink]            its failure shrunk
--traces [--backwards]  with --seeds: the trace of each
--set NAME=VALUE …      with any of these: other options than a seed draws; dense=True gives the most writes a second
--compress              the same as --set policies=compress: the stream compressed wherever that makes it shorter
--scenario NAME         a story; without a name: all of them
--nth-fault [PHASE]     every call of a phase fails once, and from then on; without a phase: of all of them
                        (--every K: every K-th; --number N [--from-then-on] [--log]: the N-th only)
--bug [NAME]            how soon a planted bug is found; without a name: all of them
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from tests.simulation.options import UnknownOption, options_of
from tests.simulation.runner import Result, run
from tests.simulation.soak import SHRUNK, calm, shrunk, soak, summary

SEEDS = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """See the module; the exit code is 1 if anything failed, 2 if the arguments cannot be."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--compress", action="store_true", help="the same lives, the stream compressed")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--traces", action="store_true")
    parser.add_argument("--backwards", action="store_true", help="the last seed first")
    parser.add_argument("--soak", action="store_true", help="go on after failures, over --jobs processes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--log", action="store_true", help="print the trace")
    parser.add_argument("--scenario", nargs="?", const="")
    parser.add_argument("--bug", nargs="?", const="")
    parser.add_argument("--nth-fault", nargs="?", const="", metavar="PHASE")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--number", type=int)
    parser.add_argument("--from-then-on", action="store_true")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    arguments = parser.parse_args(argv)
    calm()
    arguments.set += ["policies=compress"] * arguments.compress
    try:
        return carry_out(arguments)
    except (UnknownOption, UnknownName) as error:
        print(error, file=sys.stderr)
        return 2


class UnknownName(Exception):
    """There is no such story, phase or bug."""


def known(names: Iterable[str], name: str, what: str) -> list[str]:
    """``name``, or all ``names`` if it is empty."""
    names = list(names)
    if name and name not in names:
        raise UnknownName(f"There is no {what} called {name!r}. Known: {', '.join(names)}.")
    return [name] if name else names


def carry_out(arguments: argparse.Namespace) -> int:
    """One of the things that the module lists."""
    if arguments.scenario is not None:
        return scenarios(arguments.scenario)
    if arguments.nth_fault is not None:
        return nth_faults(arguments)
    if arguments.seed is not None:
        return one(arguments)
    if arguments.bug is not None:
        return bugs(arguments.bug)
    if arguments.soak:
        seeds = arguments.seeds if arguments.seeds or arguments.minutes else SEEDS
        return soak(arguments.start, seeds, arguments.minutes, arguments.jobs, arguments.set)
    return many(arguments)


def one(arguments: argparse.Namespace) -> int:
    from tests.simulation.bugs import BUGS, planted

    seed = arguments.seed
    options = options_of(seed, arguments.set)
    names = known(BUGS, arguments.bug, "bug") if arguments.bug else []
    with planted(*names) if names else contextlib.nullcontext():
        result = run(seed, options, keep_log=arguments.log)
    for line in result.log:
        print(line)
    print(
        f"seed {seed}: trace {result.trace:016x}, {result.acknowledged} writes acknowledged, "
        f"{result.virtual_s:.1f} s of virtual time, {result.steps} callbacks"
    )
    print(f"options: {result.options.describe()}")
    if result.failure is None:
        return 0
    print(result.describe())
    if arguments.shrink:
        with planted(*names) if names else contextlib.nullcontext():
            print(shrunk(result) + "".join(f" --bug {name}" for name in names))
    return 1


def many(arguments: argparse.Namespace) -> int:
    print(f"seeds from {arguments.start}")
    started = time.perf_counter()
    total: Counter[str] = Counter()
    acknowledged = done = failed = 0
    count = arguments.seeds or SEEDS
    while True:
        if arguments.minutes is not None:
            if time.perf_counter() - started > arguments.minutes * 60:
                break
        elif done == count:
            break
        seed = arguments.start + (count - 1 - done if arguments.backwards else done)
        result = run(seed, options_of(seed, arguments.set))
        done += 1
        if arguments.traces:
            print(f"seed {seed}: trace {result.trace:016x}")
        acknowledged += result.acknowledged
        total += result.counts
        if result.failure is not None:
            failed += 1
            report(result, brief=arguments.keep_going, smaller=failed <= SHRUNK)
            if not arguments.keep_going:
                break
    seconds = time.perf_counter() - started
    print(
        f"{done} seeds in {seconds:.1f} s ({done / seconds:.1f} a second), {acknowledged} writes acknowledged, "
        f"{failed} failed"
    )
    print(summary(total))
    return 1 if failed else 0


def report(result: Result, *, brief: bool, smaller: bool) -> None:
    print(result.describe() if not brief else f"{result.describe().splitlines()[0]}\n  {result.command()}", flush=True)
    if smaller:
        print(shrunk(result), flush=True)


def scenarios(name: str) -> int:
    import tests.simulation.commands
    import tests.simulation.guests
    import tests.simulation.regressions_disks
    import tests.simulation.regressions_roles  # noqa: F401 - and these
    from tests.simulation.scenarios import SCENARIOS, tell

    failed = 0
    for title in known(SCENARIOS, name, "story"):
        result = tell(title)
        print(f"{'FAILED' if result.failure else 'ok    '} {title}")
        if result.failure is not None:
            failed += 1
            print(result.describe())
    return 1 if failed else 0


def bugs(name: str) -> int:
    from tests.simulation.bugs import BUGS, hunt

    hunts = [hunt(title) for title in known(BUGS, name, "bug")]
    for found in hunts:
        print(found.describe())
    return 0 if all(found.good for found in hunts) else 1


def nth_faults(arguments: argparse.Namespace) -> int:
    from tests.simulation.nth_fault import PHASES, fail, loop

    names = known(PHASES, arguments.nth_fault, "phase")
    if arguments.number is not None:
        outcome = fail(names[0], arguments.number, sticky=arguments.from_then_on, keep_log=arguments.log)
        print("\n".join(outcome.result.log))
        print(outcome.describe())
        return 1 if outcome.result.failure is not None else 0
    runs = failed = 0
    for name in names:
        for sticky in (False, True):
            outcomes = list(loop(name, sticky=sticky, every=arguments.every))
            bad = [outcome for outcome in outcomes if outcome.result.failure is not None]
            runs += len(outcomes)
            failed += len(bad)
            kind = "from then on" if sticky else "once"
            print(f"{'FAILED' if bad else 'ok    '} {name}: {outcomes[-1].calls} calls, {len(outcomes)} runs, {kind}")
            for outcome in bad:
                print(outcome.describe())
    print(f"{runs} runs, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
