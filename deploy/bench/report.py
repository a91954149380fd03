"""The run as a table for a terminal: one table of jobs, one of single operations, one of goals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from operator import methodcaller
from typing import Final

from rich.console import Console
from rich.table import Table

from common.limits import MIB
from deploy.bench import ratios
from deploy.bench.ratios import Goal, Spread
from deploy.bench.results import Run
from deploy.bench.workloads import BY_NAME

YARDSTICKS: Final = ("qemu-colo-unix", "qemu-colo-tcp", "qemu-nbd", "nbdkit")
"""Peers against which ratios are shown beside every figure."""
ROOM_FOR_RANGES: Final = 180
"""Columns of a console."""
GOAL_COLUMNS: Final = ["", "", "goal", "reached (range)", "COLO unix", "COLO tcp", ""]


def job_title(name: str) -> str:
    return BY_NAME[name].title


def jobs_of(run: Run) -> list[str]:
    """Names of the jobs that have samples, in the order in which they ran."""
    return list(dict.fromkeys(sample.job for sample in run.samples))


def duration(seconds: float) -> str:
    """With the unit that fits: ``850 µs``, ``12.3 ms``, ``1.20 s``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def times(spread: Spread | None, *, ranges: bool = True) -> str:
    """A ratio with its range: ``2.10x (1.90-2.30)``."""
    if spread is None:
        return "–"
    span = f" ({spread.low:.2f}-{spread.high:.2f})" if spread.count > 1 and ranges else ""
    return f"{spread.median:.2f}x{span}"


def whole(spread: Spread | None, *, ranges: bool = True) -> str:
    """A count with its range: ``12,345 (11,900-12,700)``."""
    if spread is None:
        return "–"
    span = f" ({spread.low:,.0f}-{spread.high:,.0f})" if spread.count > 1 and ranges else ""
    return f"{spread.median:,.0f}{span}"


def verdict(goal: Goal) -> str:
    return {True: "met", False: "not met", None: "not measured"}[goal.met]


def job_rows(run: Run, job: str, *, ranges: bool = True) -> Iterator[tuple[str, ...]]:
    """One row a peer: name, IOPS, MiB/s, p50, p99, p99.9, CPU s/GiB, and the ratio to each yardstick there is."""
    for facts in run.peers:
        done = ratios.spread(run, job, facts.name, ratios.iops)
        if done is None:
            continue
        cells = [whole(done, ranges=ranges)]
        for metric, shown in (
            (ratios.mib_s, "{:,.0f}".format),
            (ratios.p50_us, _microseconds),
            (ratios.p99_us, _microseconds),
            (ratios.p999_us, _microseconds),
            (ratios.cpu_s_per_gib, "{:.2f}".format),
        ):
            spread = ratios.spread(run, job, facts.name, metric)
            assert spread is not None, "a sample has every metric"
            cells.append(shown(spread.median))
        for other in _yardsticks(run):
            ratio = ratios.ratio(run, job, facts.name, (other,), ratios.iops)
            cells.append("" if other == facts.name else times(ratio, ranges=ranges))
        yield facts.name, *cells


def _microseconds(value: float) -> str:
    return duration(value / 1e6)


def _yardsticks(run: Run) -> list[str]:
    present = {sample.peer for sample in run.samples}
    return [name for name in YARDSTICKS if name in present]


def job_columns(run: Run) -> list[str]:
    """Headings of ``job_rows``."""
    fixed = ["", "IOPS", "MiB/s", "p50", "p99", "p99.9", "CPU s/GiB"]
    return [*fixed, *(f"/ {name.replace('qemu-colo', 'colo')}" for name in _yardsticks(run))]


def operation_rows(run: Run) -> Iterator[tuple[str, str, str, str]]:
    """(operation, peer, median, range) of checkpoints at the run's size and of failovers."""
    own = int(run.options["size"])
    for facts in run.peers:
        for dirty, spread in ratios.checkpoint_curve(run, facts.name, sizes=False).items():
            yield _operation(f"checkpoint, {dirty * 100 / own:.0f} % dirty", facts.title, spread)
    for facts in run.peers:
        for target in dict.fromkeys(sample.target for sample in run.failovers if sample.peer == facts.name):
            chosen = [sample for sample in run.failovers if sample.peer == facts.name and sample.target == target]
            for what, values in (
                ("until a guest's write is answered", [sample.write_s for sample in chosen]),
                ("until committed", [sample.committed_s for sample in chosen]),
            ):
                taken = Spread.of(values)
                assert taken is not None
                yield _operation(f"failover to {target} {what}", facts.title, taken)


def _operation(what: str, title: str, spread: Spread) -> tuple[str, str, str, str]:
    return what, title, duration(spread.median), f"{duration(spread.low)} - {duration(spread.high)}"


def memory_rows(run: Run) -> Iterator[tuple[str, str, str, str, str]]:
    """(peer, process, peak, of it private, of it shared) in MiB."""
    for facts in run.peers:
        for name, held in facts.memory.items():
            peak, private, shared = (f"{value / MIB:,.0f}" for value in (held.peak, held.private, held.shared))
            yield facts.title, name, peak, private, shared


def cpu_rows(run: Run) -> Iterator[tuple[str, ...]]:
    """(peer, process, CPU seconds a GiB in each job): whose processor time the sum of ``job_rows`` is."""
    jobs = jobs_of(run)
    for facts in run.peers:
        processes = dict.fromkeys(name for sample in run.samples if sample.peer == facts.name for name in sample.cpu_s)
        for process in processes:
            spent = [ratios.spread(run, job, facts.name, methodcaller("cpu_s_per_gib", process)) for job in jobs]
            if any(found and found.median for found in spent):
                yield facts.title, process, *("–" if found is None else f"{found.median:.2f}" for found in spent)


def cpu_columns(run: Run) -> list[str]:
    """Headings of ``cpu_rows``: names of jobs, in two lines."""
    return ["", "process", *(re.sub(r"-(?=\d)", "\n", job) for job in jobs_of(run))]


def show(run: Run, console: Console) -> None:
    """Everything, as tables; the ranges of the figures only where the console has room for them."""
    ranges = console.width >= ROOM_FOR_RANGES
    for job in jobs_of(run):
        table = _table(job_title(job), job_columns(run))
        for row in job_rows(run, job, ranges=ranges):
            table.add_row(*row)
        console.print(table)
    rows = list(operation_rows(run))
    if rows:
        table = _table("single operations", ["", "", "median", "range"])
        for line in rows:
            table.add_row(*line)
        console.print(table)
    table = _table(
        "memory, MiB (peak of a process; private and shared parts of it)", ["", "process", "peak", "private", "shared"]
    )
    for held in memory_rows(run):
        table.add_row(*held)
    console.print(table)
    table = _table("CPU seconds a GiB, of each process", cpu_columns(run))
    for spent in cpu_rows(run):
        table.add_row(*spent)
    console.print(table)
    _show_goals(run, console)
    for failure in run.failures:
        console.print(f"[bold red]![/] {failure}", highlight=False)


def goal_row(goal: Goal) -> tuple[str, ...]:
    """Cells under GOAL_COLUMNS."""
    sign = "≥" if goal.at_least else "≤"
    cases = [f"{goal.cases[name].median:.2f}x" if name in goal.cases else "" for name in ratios.COLO]
    return goal.subject, goal.claim, f"{sign} {goal.wanted:g}x", times(goal.reached), *cases, verdict(goal)


def _show_goals(run: Run, console: Console) -> None:
    found = [goal for goal in ratios.goals(run, job_title) if goal.reached is not None]
    if not found:
        return
    table = _table("goals", GOAL_COLUMNS)
    for goal in found:
        *cells, result = goal_row(goal)
        table.add_row(*cells, f"[{'green' if goal.met else 'red'}]{result}[/]")
    console.print(table)


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or not column else "right", no_wrap=True)
    return table
