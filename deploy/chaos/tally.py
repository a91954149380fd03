"""What a chaos run came to: a table for people, an object for programs."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from rich.table import Table


class Tally:
    """Counts of a run; ``begun`` is the time from which rates are reckoned."""

    def __init__(self, seed: int, mode: str, hosts: str) -> None:
        self.seed, self.mode, self.hosts = seed, mode, hosts
        self.begun = time.monotonic()
        self.cycles = self.pairs = self.comparisons = self.rolled_back = self.lost = 0
        self.acknowledged = self.refused_writes = 0
        self.lost_async_bytes = 0
        """Most bytes that one failover in async mode left behind, of what was acknowledged."""
        self.left_behind = 0
        """Failovers in async mode that left anything behind."""
        self.bounded = self.bounded_by = 0
        """Failovers that were held against what the leader had not had confirmed, and the most bytes that was."""
        self.views = 0
        """Comparisons of the guest's view, at rest and under load."""
        self.faults: Counter[str] = Counter()
        self.recoveries: Counter[str] = Counter()
        self.failover_s: list[float] = []
        """From the command to the first write that the new leader acknowledged."""
        self.two_writers = 0
        self.generations = 0
        self.failure = ""

    @property
    def kill_cycles(self) -> int:
        """SIGKILLs of a process, each with a recovery and a comparison after it."""
        return sum(count for name, count in self.faults.items() if name.startswith("kill "))

    def report(self) -> dict[str, Any]:
        """The JSON object."""
        times = sorted(self.failover_s)

        def at(share: float) -> float | None:
            return round(times[min(len(times) - 1, int(share * len(times)))], 4) if times else None

        return {
            "seed": self.seed,
            "mode": self.mode,
            "hosts": self.hosts,
            "seconds": round(time.monotonic() - self.begun, 1),
            "pairs": self.pairs,
            "cycles": self.cycles,
            "kills": self.kill_cycles,
            "failovers": len(times),
            "faults": dict(sorted(self.faults.items())),
            "recoveries": dict(sorted(self.recoveries.items())),
            "comparisons": self.comparisons,
            "guest_views": self.views,
            "writes": {
                "acknowledged": self.acknowledged,
                "refused": self.refused_writes,
                "lost": self.lost,
                "rolled_back_to_checkpoints": self.rolled_back,
                "most_async_bytes_left_behind": self.lost_async_bytes,
                "async_failovers_that_left_any": self.left_behind,
                "async_failovers_bounded": self.bounded,
                "most_bytes_unconfirmed": self.bounded_by,
            },
            "failover_seconds": {"p50": at(0.5), "p99": at(0.99), "max": times[-1] if times else None},
            "failover_each": [round(each, 4) for each in self.failover_s],
            "generations": {"seen": self.generations, "with_two_writers": self.two_writers},
            "failure": self.failure,
        }

    def table(self) -> Table:
        """The same for people."""
        told = self.report()
        table = Table(title=f"chaos: seed {self.seed}, {self.mode}, {told['seconds']} s", show_header=False)
        for name in ("pairs", "cycles", "kills", "failovers", "comparisons", "guest_views"):
            table.add_row(name.replace("_", " "), f"{told[name]:,}")
        for group in ("faults", "recoveries"):
            table.add_row(group, ", ".join(f"{name} {count}" for name, count in told[group].items()))
        for name, value in told["writes"].items():
            table.add_row(f"writes: {name.replace('_', ' ')}", f"{value:,}")
        times = told["failover_seconds"]
        if times["max"] is not None:
            table.add_row("failover to first write, ms", " / ".join(f"{1000 * s:.0f}" for s in times.values()))
            table.add_row("", "p50 / p99 / max")
        table.add_row("generations seen, with two writers", f"{self.generations}, {self.two_writers}")
        if self.failure:
            table.add_row("failure", self.failure, style="red")
        return table
