"""What a chaos run came to: a table for people, an object for programs."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from rich.table import Table

_RESTARTED: Final = "failover_seconds_where_the_export_process_was_killed_too"
_SHOWN: Final = {"kills": "SIGKILLs"}
_TIMES: Final = {
    "failover to first write, ms": "failover_seconds",
    "  of these, where a new export process had to start": _RESTARTED,
    "  the others": "failover_seconds_of_the_others",
}


def _spread(failovers: list[dict[str, Any]]) -> dict[str, Any]:
    times = sorted(failover["seconds"] for failover in failovers)

    def at(share: float) -> float | None:
        return times[min(len(times) - 1, int(share * len(times)))] if times else None

    return {"count": len(times), "p50": at(0.5), "p99": at(0.99), "max": times[-1] if times else None}


class Tally:
    """Counts of a run; ``begun`` is the time from which rates are reckoned."""

    def __init__(self, seed: int, mode: str, hosts: str) -> None:
        self.seed, self.mode, self.hosts = seed, mode, hosts
        self.begun = time.monotonic()
        self.cycles = self.pairs = self.comparisons = self.rolled_back = self.lost = 0
        self.acknowledged = self.refused_writes = self.reads = self.refused_reads = 0
        self.lost_async_bytes = 0
        """Most bytes that one failover in async mode left behind, of what was acknowledged."""
        self.left_behind = 0
        """Failovers in async mode that left anything behind."""
        self.bounded = self.bounded_by = 0
        """Failovers that were held against what the leader had not had confirmed, and the most bytes that was."""
        self.guest_writes = self.guest_writes_kept = 0
        """Blocks that guests of followers wrote, and those that a failover to a checkpoint had to keep, and did."""
        self.views = 0
        """Comparisons of the guest's view, at rest and under load."""
        self.varieties: list[tuple[str, ...]] = []
        """By pair: the options and policies that the seed drew for it."""
        self.faults: Counter[str] = Counter()
        self.recoveries: Counter[str] = Counter()
        self.takeovers: Counter[str] = Counter()
        """From a leader that lived: what it was, and how it ended."""
        self.alone = 0
        """Writes that a leader acknowledged in a generation of its own, beside the one that had taken over."""
        self.failovers: list[dict[str, Any]] = []
        """Each: "seconds" from the command to the first write that the new leader acknowledged, and its parts."""
        self.phases: dict[str, float] = {}
        """Seconds by what a cycle was busy with."""
        self.not_tried = ""
        """Which faults, and why."""
        self.failed_operations = 0
        """Reads, writes and flushes that ended with EIO."""
        self.two_writers = 0
        self.generations = 0
        self.failure = ""

    def line(self) -> str:
        """How far it is."""
        return (
            f"{(time.monotonic() - self.begun) / 60:.1f} min: {self.cycles} cycles, {self.kill_cycles} SIGKILLs, "
            f"{len(self.failovers)} failovers, {self.comparisons} comparisons of all bytes, {self.lost} lost"
        )

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time of the context is that of ``name``."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - begun

    def failover(
        self, target: str, *, decided: float, answered: float, connected: float, written: float, beside: list[str]
    ) -> None:
        """A failover, in seconds: what the new leader says that it took, until the command returned, until a client
        was connected, until its write was acknowledged; ``beside``: the faults before."""
        self.failovers.append({
            "seconds": round(answered + connected + written, 4), "to": target, "decided": round(decided, 4),
            "answered": round(answered, 4), "connected": round(connected, 4), "written": round(written, 4),
            "beside": beside,
        })  # fmt: skip

    @property
    def kill_cycles(self) -> int:
        """SIGKILLs of a process, each with a recovery and a comparison after it."""
        return sum(count for name, count in self.faults.items() if name.startswith("kill "))

    def _writes(self) -> dict[str, int]:
        told = {
            "acknowledged": self.acknowledged,
            "refused": self.refused_writes,
            "reads_compared": self.reads,
            "reads_refused": self.refused_reads,
            "lost": self.lost,
            "acknowledged_alone_in_split_brain": self.alone,
            "rolled_back_to_checkpoints": self.rolled_back,
        }
        if self.mode == "async":
            told |= {
                "most_async_bytes_left_behind": self.lost_async_bytes,
                "async_failovers_that_left_any": self.left_behind,
                "async_failovers_bounded": self.bounded,
                "most_bytes_unconfirmed": self.bounded_by,
            }
        return told

    def report(self) -> dict[str, Any]:
        """The JSON object."""
        restarted = [failover for failover in self.failovers if "kill export" in failover["beside"]]
        return {
            "seed": self.seed,
            "mode": self.mode,
            "hosts": self.hosts,
            "seconds": round(time.monotonic() - self.begun, 1),
            "pairs": self.pairs,
            "pairs_each": [list(words) for words in self.varieties],
            "cycles": self.cycles,
            "kills": self.kill_cycles,
            "failovers": len(self.failovers),
            "faults": dict(sorted(self.faults.items())),
            "operations_failed_by_disks": self.failed_operations,
            "recoveries": dict(sorted(self.recoveries.items())),
            "takeovers": dict(sorted(self.takeovers.items())),
            "comparisons": self.comparisons,
            "guest_views": self.views,
            "writes": self._writes(),
            "guest_writes": {"acknowledged": self.guest_writes, "kept_by_failovers": self.guest_writes_kept},
            "failover_seconds": _spread(self.failovers),
            _RESTARTED: _spread(restarted),
            "failover_seconds_of_the_others": _spread([one for one in self.failovers if one not in restarted]),
            "failover_each": self.failovers,
            "phase_seconds": {name: round(seconds, 1) for name, seconds in self.phases.items()},
            "not_tried": self.not_tried,
            "generations": {"seen": self.generations, "with_two_writers": self.two_writers},
            "failure": self.failure,
        }

    def table(self) -> Table:
        """The same for people."""
        told = self.report()
        table = Table(title=f"chaos: seed {self.seed}, {self.mode}, {told['seconds']} s", show_header=False)
        for name in (
            "pairs",
            "cycles",
            "kills",
            "failovers",
            "comparisons",
            "guest_views",
            "operations_failed_by_disks",
        ):
            table.add_row(_SHOWN.get(name, name.replace("_", " ")), f"{told[name]:,}")
        drawn = Counter(word for words in self.varieties for word in words)
        table.add_row("of the pairs had", ", ".join(f"{word}: {count}" for word, count in sorted(drawn.items())))
        for group in ("faults", "recoveries", "takeovers"):
            table.add_row(group, ", ".join(f"{name} {count}" for name, count in told[group].items()))
        for name, value in told["writes"].items():
            table.add_row(f"writes: {name.replace('_', ' ')}", f"{value:,}")
        for name, value in told["guest_writes"].items():
            table.add_row(f"blocks that guests wrote: {name.replace('_', ' ')}", f"{value:,}")
        for name, key in _TIMES.items():
            times = told[key]
            if times["max"] is not None and (name.startswith("failover") or told[_RESTARTED]["count"]):
                shown = " / ".join(f"{1000 * times[which]:.0f}" for which in ("p50", "p99", "max"))
                table.add_row(name, f"p50 / p99 / max of {times['count']}: {shown}")
        table.add_row("generations seen, with two writers", f"{self.generations}, {self.two_writers}")
        table.add_row("seconds", ", ".join(f"{name} {seconds:.0f}" for name, seconds in told["phase_seconds"].items()))
        if self.not_tried:
            table.add_row("not tried", self.not_tried)
        if self.failure:
            table.add_row("failure", self.failure, style="red")
        return table
