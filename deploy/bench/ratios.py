"""From samples to statements: medians with their spread, ratios of neighbours, and the goals.

A ratio is taken between two peers in the same round, then the median over the rounds; its spread is the smallest and
largest of these. Where the goal speaks of QEMU's best case, the better of its two cases in that very round is taken,
whichever it is: an advantage that only comes from the stall of one case does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from deploy.bench.results import Run, Sample
from deploy.bench.workloads import AGAIN, FIRST_TOUCH

Metric = Callable[[Sample], float]

COLO: Final = ("qemu-colo-unix", "qemu-colo-tcp")
BEST_COLO: Final = "QEMU COLO, better of its two cases"


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of ``count`` values."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None for no values."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1], len(found)) if found else None


def iops(sample: Sample) -> float:
    return sample.figures.iops


def mib_s(sample: Sample) -> float:
    return sample.figures.mib_s


def p50_us(sample: Sample) -> float:
    return sample.figures.p50_us


def p99_us(sample: Sample) -> float:
    return sample.figures.p99_us


def p999_us(sample: Sample) -> float:
    return sample.figures.p999_us


def cpu_s_per_gib(sample: Sample) -> float:
    return sample.cpu_s_per_gib()


def by_round(
    run: Run, job: str, peers: Sequence[str], metric: Metric, best: Callable[[Iterable[float]], float]
) -> dict[int, float]:
    """The metric in each round; with several peers the ``best`` (max or min) of those measured in that round."""
    rounds: dict[int, list[float]] = {}
    for sample in run.samples:
        if sample.job == job and sample.peer in peers:
            rounds.setdefault(sample.round, []).append(metric(sample))
    return {number: best(values) for number, values in rounds.items()}


def spread(run: Run, job: str, peer: str, metric: Metric) -> Spread | None:
    return Spread.of(by_round(run, job, (peer,), metric, max).values())


def ratio(
    run: Run,
    job: str,
    peer: str,
    others: Sequence[str],
    metric: Metric,
    *,
    best: Callable[[Iterable[float]], float] = max,
    other_job: str | None = None,
) -> Spread | None:
    """``peer`` over the best of ``others``, round by round; None if they never met."""  # fmt: skip
    ours = by_round(run, job, (peer,), metric, max)
    theirs = by_round(run, other_job or job, others, metric, best)
    return Spread.of(ours[number] / theirs[number] for number in ours.keys() & theirs.keys() if theirs[number])


@dataclass(frozen=True, slots=True)
class Goal:
    """One cell of the goals table, and what was reached. ``reached`` is None if the run does not tell."""

    subject: str
    """What is compared, such as the job's title."""
    claim: str
    """Who against whom."""
    wanted: float
    at_least: bool
    """True: ``reached`` must not be below ``wanted``; False: not above."""
    reached: Spread | None
    cases: Mapping[str, Spread] = field(default_factory=dict)
    """Where the claim is against QEMU's pair: the same against each of its two cases."""

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached.median >= self.wanted if self.at_least else self.reached.median <= self.wanted


SYNC, ASYNC = "tandemdisk-sync", "tandemdisk-async"
_THROUGHPUT: Final = (
    # job, sync / QEMU COLO, async / QEMU COLO, async / qemu-nbd
    ("write-4k-d1", 1.5, 4.0, 1.0),
    ("write-4k-d32", 4.0, 10.0, 2.0),
    ("write-64k-d16", 2.0, 2.5, 0.9),
    ("write-1m-d8", 2.0, 2.5, 1.0),
    ("mixed-4k-d32", 3.0, 5.0, 2.0),
    ("read-4k-d32", 7.0, 7.0, 5.0),
)
_NBDKIT: Final = ("read-4k-d32", 1.2)
_P99_PART: Final = 0.25
_P99_JOBS: Final = ("write-4k-d32", "mixed-4k-d32", "read-4k-d32")
_CHECKPOINT_PART: Final = 0.1
_FLAT: Final = 2.0
"""Flat: the largest median of a checkpoint over dirty sets (or disk sizes) is at most this many times the smallest."""
_FIRST_TOUCH_PART: Final = 0.6
_CPU_JOBS: Final = ("write-4k-d1", "write-4k-d32", "write-64k-d16", "write-1m-d8", "mixed-4k-d32")


def goals(run: Run, title: Callable[[str], str]) -> list[Goal]:
    """Every goal, in the order of the table; ``title`` names a job."""
    found = []
    for job, sync_colo, async_colo, async_nbd in _THROUGHPUT:
        found.append(_against_colo(run, title(job), job, SYNC, iops, sync_colo, at_least=True))
        found.append(_against_colo(run, title(job), job, ASYNC, iops, async_colo, at_least=True))
        reached = ratio(run, job, ASYNC, ("qemu-nbd",), iops)
        found.append(Goal(title(job), "async / qemu-nbd", async_nbd, True, reached))
    job, wanted = _NBDKIT
    found.append(Goal(title(job), "async / nbdkit", wanted, True, ratio(run, job, ASYNC, ("nbdkit",), iops)))
    for peer in (SYNC, ASYNC):
        for job in _P99_JOBS:
            subject = f"p99 of {title(job)}"
            found.append(_against_colo(run, subject, job, peer, p99_us, _P99_PART, at_least=False))
        for job in _CPU_JOBS:
            subject = f"CPU per GiB of {title(job)}"
            found.append(_against_colo(run, subject, job, peer, cpu_s_per_gib, 1.0, at_least=False))
        reached = ratio(run, FIRST_TOUCH, peer, (peer,), iops, other_job=AGAIN)
        claim = f"{_mode(peer)} / the same without copies"
        found.append(Goal("first touch of every block", claim, _FIRST_TOUCH_PART, True, reached))
        found += _checkpoint_goals(run, peer)
    return found


def _against_colo(
    run: Run, subject: str, job: str, peer: str, metric: Metric, wanted: float, *, at_least: bool
) -> Goal:
    best = max if at_least else min
    each = {name: ratio(run, job, peer, (name,), metric) for name in COLO}
    cases = {name: reached for name, reached in each.items() if reached is not None}
    reached = ratio(run, job, peer, COLO, metric, best=best)
    return Goal(subject, f"{_mode(peer)} / {BEST_COLO}", wanted, at_least, reached, cases)


def _mode(peer: str) -> str:
    return peer.removeprefix("tandemdisk-")


def checkpoint_curve(run: Run, peer: str, *, sizes: bool) -> dict[int, Spread]:
    """Seconds of a checkpoint over dirty bytes at the run's size, or (``sizes``) over the disk size, equally dirty."""
    own = int(run.options["size"])
    common_dirty = _common_dirty(run)
    points: dict[int, list[float]] = {}
    for sample in run.checkpoints:
        if sample.peer != peer or (sample.dirty_bytes != common_dirty if sizes else sample.size != own):
            continue
        points.setdefault(sample.size if sizes else sample.dirty_bytes, []).append(sample.seconds)
    spreads = {at: Spread.of(values) for at, values in sorted(points.items())}
    return {at: found for at, found in spreads.items() if found is not None}


def _common_dirty(run: Run) -> int | None:
    """The one dirty set that was timed at every size."""
    by_size: dict[int, set[int]] = {}
    for sample in run.checkpoints:
        by_size.setdefault(sample.size, set()).add(sample.dirty_bytes)
    shared = set.intersection(*by_size.values()) if by_size else set()
    return max(shared, default=None)


def _checkpoint_goals(run: Run, peer: str) -> list[Goal]:
    found = []
    own = int(run.options["size"])
    theirs = {name: checkpoint_curve(run, name, sizes=False) for name in COLO}
    ours = checkpoint_curve(run, peer, sizes=False)
    for dirty, seconds in ours.items():
        cases = {name: _part(seconds, curve[dirty]) for name, curve in theirs.items() if dirty in curve}
        reached = max(cases.values(), key=lambda part: part.median, default=None)
        subject = f"checkpoint with {dirty * 100 / own:.0f} % of the disk dirty"
        found.append(Goal(subject, f"{_mode(peer)} / {BEST_COLO}", _CHECKPOINT_PART, False, reached, cases))
    for what, curve in (("dirty sets", ours), ("disk sizes", checkpoint_curve(run, peer, sizes=True))):
        medians = [point.median for point in curve.values()]
        flat = Spread.of([max(medians) / min(medians)]) if len(medians) > 1 else None
        claim = f"{_mode(peer)}: slowest / fastest median"
        found.append(Goal(f"checkpoint flat over {what}", claim, _FLAT, False, flat))
    return found


def _part(ours: Spread, theirs: Spread) -> Spread:
    """``ours`` as a part of the median of ``theirs``."""
    return Spread(ours.median / theirs.median, ours.low / theirs.median, ours.high / theirs.median, ours.count)
