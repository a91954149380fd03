"""What is timed by itself, beside the jobs: checkpoints over dirty set and disk size, and failovers.

Both are timed by the wall clock of the one who asks, from command to answer over a connection that is already open.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.limits import DEFAULT_BLOCK, MIB
from common.nbd_client import NbdClient
from deploy.bench.engines import Engine, Stream
from deploy.bench.peers import Failover, Peer
from deploy.bench.results import CheckpointSample, FailoverSample
from deploy.bench.workloads import DIRTY, DIRTY_RANDOM, Load

DIRTY_PARTS: Final = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)
SIZE_PARTS: Final = (0.25, 0.5)
"""Disk sizes besides the run's own, as parts of it; all with a dirty set of COMMON_DIRTY_PART of the run's size."""
COMMON_DIRTY_PART: Final = 0.1
FAILOVER_SIZE_PART: Final = 0.25
FAILOVER_DIRTY_PART: Final = 0.25
WARM_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Prober:
    """Times single operations of one started peer."""

    engine: Engine
    directory: Path
    peer: Peer

    def _dirty(self, load: Load, length: int) -> None:
        if length:
            stream = Stream(load, self.peer.uri, self.peer.size, WARM_SECONDS, length)
            self.engine.run([stream], self.directory)
        self.peer.settle()

    def checkpoint(self, dirty_bytes: int) -> CheckpointSample:
        """One checkpoint with ``dirty_bytes`` written since the one before, all of them applied."""
        self.peer.checkpoint()
        self._dirty(DIRTY, dirty_bytes)
        begun = time.perf_counter()
        self.peer.checkpoint()
        return CheckpointSample(self.peer.name, self.peer.size, dirty_bytes, time.perf_counter() - begun)

    def failover(self, target: Failover) -> FailoverSample:
        """Dirty a part of the disk, kill the primary, fail over. The peer is of no further use."""
        self.peer.checkpoint()
        dirty = whole_mib(self.peer.size * FAILOVER_DIRTY_PART)
        self._dirty(DIRTY_RANDOM, dirty)
        block = bytes(DEFAULT_BLOCK)
        with NbdClient(self.peer.guest_uri) as guest:
            self.peer.kill_primary()
            begun = time.perf_counter()
            self.peer.failover(target)
            answered = time.perf_counter()
            guest.write(0, block)
            written = time.perf_counter()
            self.peer.wait_committed()
            committed = time.perf_counter()
        return FailoverSample(
            self.peer.name, target, self.peer.size, dirty, answered - begun, written - begun, committed - begun
        )  # fmt: skip


def whole_mib(length: float) -> int:
    return int(length) // MIB * MIB


def dirty_sets(size: int, own_size: int) -> Iterator[int]:
    """The dirty sets to time on a disk of ``size`` bytes, in a run on disks of ``own_size``."""
    common = whole_mib(own_size * COMMON_DIRTY_PART)
    if size != own_size:
        yield common
        return
    yield from sorted({whole_mib(size * part) for part in DIRTY_PARTS} | {common})
