"""What the mirror makes of writes that fail or are refused on the primary disk, while a resync goes over it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.batch import DISCARD, FAST_ZERO, WRITE, ZERO, Operation, WriteBatch
from common.disk import Fault, FaultDisk, FileDisk
from common.wire import EXTENT_STRUCT, Frames
from primary.mirror import Mirror
from primary.resync import ResyncLimits, ResyncPlan
from tests.pairs import MIB

BLOCK = 4096


class Told:
    """A carrier and its session: both note what they are given."""

    attached = True
    window_open = True

    def __init__(self) -> None:
        self.session: Any = self
        self.forwarded: list[tuple[int, int]] = []
        """(offset, length) of every extent."""

    def write(self, extents: bytes, _payload: Any, _blocks: int, _flags: int, _pin: Any, _now: float) -> list[Frames]:
        self.forwarded += [(offset, length) for offset, length, *_ in EXTENT_STRUCT.iter_unpack(extents)]
        return []

    def send(self, _messages: Sequence[Frames]) -> None:
        raise AssertionError("there is nothing to send")


@pytest.mark.parametrize("sync", [True, False])
def test_what_is_not_written_is_still_to_be_sent_by_the_resync(tmp_path: Path, sync: bool) -> None:
    """A fast zero that the disk refuses reaches neither side: what the resync was to send there it has to send still.
    A write that fails, too; one that is done travels by itself."""
    errors: list[dict[int, int]] = []

    async def resync() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        path = tmp_path / "disk.raw"
        path.write_bytes(bytes(MIB))
        disk = FaultDisk(
            FileDisk(str(path)),
            Fault(frozenset({"zero"}), errno.EOPNOTSUPP),
            Fault(frozenset({"discard"}), errno.EIO),
        )
        mirror = Mirror([("v", disk)], sync=sync, block_size=BLOCK, on_disk_error=lambda _what, _error: None)
        carrier = mirror.carrier = Told()
        try:
            mirror.bitmaps[0].set_range(0, 64 * BLOCK)
            mirror.overlap = ResyncPlan(mirror.bitmaps, ResyncLimits(), 0.0).wrote
            memory = SimpleNamespace(view=memoryview(bytes(BLOCK)), pin=lambda: None, unpin=lambda: None)
            operations: list[Operation] = [
                (ZERO, 0, 8 * BLOCK, 0, FAST_ZERO),
                (DISCARD, 8 * BLOCK, 8 * BLOCK, 0, 0),
                (WRITE, 16 * BLOCK, BLOCK, 0, 0),
            ]
            batch = WriteBatch(operations, memory, 0, BLOCK, False, lambda told: errors.append(dict(told or {})))
            mirror.submit(mirror.volumes[0], batch)
            return list(mirror.bitmaps[0].runs()), carrier.forwarded
        finally:
            mirror.close()

    marked, forwarded = asyncio.run(resync())
    assert forwarded == [(16 * BLOCK, BLOCK)]
    assert marked == [(0, 16 * BLOCK), (17 * BLOCK, 47 * BLOCK)]
    if not sync:
        assert errors == [{0: errno.EOPNOTSUPP, 1: errno.EIO}]
