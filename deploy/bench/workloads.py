"""What is asked of every peer: the jobs, in the order in which they run.

Before a job every replicated peer makes a checkpoint, so that its buffer is empty and the first write to each block
has to save the old contents. Random writes of one job hit each block once until the disk is used up, so a job shorter
than that consists of first touches only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from common.limits import KIB, MIB

Target = Literal["primary", "guest"]


@dataclass(frozen=True, slots=True)
class Load:
    """One stream of requests: ``depth`` in flight on each of ``connections``, all of ``block`` bytes."""

    access: Literal["random", "sequential"]
    read_percent: int
    block: int
    depth: int
    connections: int = 1
    target: Target = "primary"

    @property
    def fio_access(self) -> str:
        """fio's name for the access pattern (its option ``rw``)."""
        mixed = {0: "write", 100: "read"}.get(self.read_percent, "rw")
        return f"rand{mixed}" if self.access == "random" else mixed


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: ``load``, while ``beside`` (if any) runs as well.

    A job runs for the run's seconds, unless ``disk_part`` bounds it: then it ends after that part of the disk (or after
    the seconds, if that comes first).
    """

    name: str
    title: str
    load: Load
    beside: Load | None = None
    disk_part: float | None = None
    repeats: str | None = None
    """Name of an earlier job: the very same requests once more, without a checkpoint in between."""
    replicated_only: bool = False


def _random(read_percent: int, block: int, depth: int, connections: int = 1, target: Target = "primary") -> Load:
    return Load("random", read_percent, block, depth, connections, target)


FIRST_TOUCH: Final = "first-touch"
AGAIN: Final = "again"

JOBS: Final = (
    Job("write-4k-d1", "random write 4 KiB, depth 1", _random(0, 4 * KIB, 1)),
    Job("write-4k-d32", "random write 4 KiB, depth 32", _random(0, 4 * KIB, 32)),
    Job("write-4k-d32x4", "random write 4 KiB, depth 32 x 4 connections", _random(0, 4 * KIB, 32, 4)),
    Job("write-64k-d16", "random write 64 KiB, depth 16", _random(0, 64 * KIB, 16)),
    Job("write-1m-d8", "sequential write 1 MiB, depth 8", Load("sequential", 0, MIB, 8)),
    Job("mixed-4k-d32", "70/30 mixed 4 KiB, depth 32", _random(70, 4 * KIB, 32)),
    Job("read-4k-d32", "random read 4 KiB, depth 32", _random(100, 4 * KIB, 32)),
    Job(
        "guest-read-4k-d32", "guest's random read 4 KiB beside primary's random write",
        _random(100, 4 * KIB, 32, target="guest"), beside=_random(0, 4 * KIB, 32), replicated_only=True,
    ),
    Job(
        FIRST_TOUCH, "after a checkpoint: every block a first touch, depth 32",
        _random(0, 4 * KIB, 32), disk_part=0.5, replicated_only=True,
    ),
    Job(
        AGAIN, "the same blocks again: nothing to copy, depth 32",
        _random(0, 4 * KIB, 32), repeats=FIRST_TOUCH, replicated_only=True,
    ),
)  # fmt: skip
BY_NAME: Final = {job.name: job for job in JOBS}

WARM_UP: Final = _random(0, 4 * KIB, 32)
DIRTY: Final = Load("sequential", 0, MIB, 8)
"""Makes a dirty set of known size before a checkpoint is timed."""
DIRTY_RANDOM: Final = WARM_UP
"""Makes a dirty set before a failover is timed."""
