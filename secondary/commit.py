"""Failover: the guest's view becomes the disk.

Two targets, each of them one store of the state word while nothing is in flight:

* ``failover_latest`` keeps every write that the secondary has applied: the epoch moves on, which drops the buffer, and
  the stage is DONE. Refused while the active disk holds guest writes, which would be lost.
* ``failover_checkpoint`` keeps the guest's view: the stage becomes FAILOVER, and ``CommitJob`` moves the buffer into
  the secondary disk while the guest goes on reading and writing. It walks the slots in use, so its start costs the
  same for any disk.

The commit takes blocks in the order of the disk, active over hidden, in runs of at most ``RUN_BYTES``: begin a
request, look again which of them still have their mark (a guest write may have superseded them), write them, end the
request. Every ``SETTLE_BYTES`` the disks are flushed, and then the marks of what was written go, run by run, under a
request again: the kernel tells only once of what it could not write, and may forget it then. A crash at any point
leaves each block either marked, with its contents in the buffer, or durably committed; doing it again goes on from
there. When the secondary disk refuses a write or a flush the stage becomes FAILOVER_FAILED: every byte is still
readable and writable through the layer that has it, and ``run`` may be called again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np

from common.disk import Disk
from common.errors import NeedsForce, OperationFailed, TandemDiskError
from common.limits import MIB
from secondary import header as h
from secondary.backup import PairBackup
from secondary.buffer import Blocks, DiskBuffer, VolumeBuffer
from secondary.header import Failure, Stage
from secondary.replica import clear_marks
from secondary.view import HIDDEN, TOP, VolumeView

RUN_BYTES: Final = 256 * 1024
"""Committed under one request: as long as a guest's read of one of these blocks may have to wait."""
SETTLE_BYTES: Final = 64 * MIB
"""Committed between two flushes: what a crash lets it do again at most."""


def _nothing() -> None:
    pass


def failover_latest(
    pair: PairBackup, *, force: bool = False, timeout_s: float | None = None, durably: Callable[[], None] = _nothing
) -> None:
    """Keep what the secondary has applied, drop the buffer. Raises NeedsForce if guest writes, or a synchronisation,
    stand against it.

    OperationFailed if another failover was begun already. ``durably`` is called when nothing stands against it, and
    nobody can write meanwhile: what it raises ends the failover with nothing done.
    """
    header = pair.header
    with pair.stopped(wait=True, timeout_s=timeout_s):
        if header.stage is Stage.DONE:
            return
        if header.stage is not Stage.RUNNING:
            raise OperationFailed(f"A failover to the checkpoint was begun already (stage {header.stage.name}).")
        if header.syncing and not force:
            raise NeedsForce(
                "The secondary disk is being synchronised and holds neither the old contents nor the new.",
                hint="Wait for the primary to come back, or use --force.",
            )
        if pair.buffer.guest_has_written and not force:
            raise NeedsForce(
                "The secondary's guest has written to the active disk since the last checkpoint; latest drops that.",
                hint="Use --to checkpoint, or --force.",
            )
        durably()
        checkpoint = header.checkpoint
        header.record_checkpoint(header.epoch + 1, checkpoint.number, checkpoint.sequence)
        header.store_state(Stage.DONE, header.epoch + 1, syncing=False)


def failover_checkpoint(
    pair: PairBackup, *, timeout_s: float | None = None, durably: Callable[[], None] = _nothing
) -> None:
    """Keep the guest's view; the export is writable on return, ``CommitJob.run`` does the rest in the background.

    OperationFailed if there is no checkpoint. Nothing to do if it was begun already. ``durably`` as above.
    """
    header = pair.header
    with pair.stopped(wait=True, timeout_s=timeout_s):
        if header.stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED, Stage.DONE):
            return
        if header.stage is Stage.NONE or header.syncing:
            raise OperationFailed(
                "There is no checkpoint to fail over to: the secondary disk is still being synchronised.",
                hint="Wait for the primary to come back, or use --to latest --force.",
            )
        durably()
        header.store_state(Stage.FAILOVER, header.epoch, syncing=False)


def held_extents(volume: VolumeBuffer) -> Iterator[tuple[int, int]]:
    """(offset, length) of what the buffer holds of ``volume``, ascending.

    What a commit will change on the secondary disk.
    """
    blocks = _held_blocks(volume)
    for start, stop in _runs(blocks, len(blocks)):
        first, last = int(blocks[start]), int(blocks[stop - 1])
        offset = first << volume.shift
        yield offset, min((last + 1) << volume.shift, volume.size) - offset


class CommitJob:
    """Moves the buffer into the secondary disks; ``disks`` in the order of the volumes."""

    def __init__(
        self,
        buffer: DiskBuffer,
        disks: Sequence[Disk],
        *,
        prepare: Callable[[], None] | None = None,
        complete: Callable[[], None] | None = None,
        on_write: Callable[[int, int, int], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """``prepare`` comes before anything is moved, ``complete`` when everything is durable and before the stage says
        so; the commit fails with either. ``on_write(volume, offset,
        length)`` comes before a write to a secondary disk, ``progress(done, total)`` in blocks after it.
        """
        self.buffer = buffer
        self.header = buffer.header
        self.views = [
            VolumeView(volume, disk, overlay=True) for volume, disk in zip(buffer.volumes, disks, strict=True)
        ]
        self.disks = list(disks)
        self.prepare = prepare
        self.complete = complete
        self.on_write = on_write
        self.progress = progress
        self.stopping = threading.Event()
        """Set it to make ``run`` return between two runs of blocks; a later ``run`` goes on."""
        self._unsettled: list[tuple[int, int, int]] = []
        """(volume, first block, last block) of what was written, and is still marked."""
        self._unsettled_bytes = 0

    def run(self) -> bool:
        """Commit everything; blocks, so call it in a thread. True when done (stage DONE), False if it was told to stop.

        Raises OperationFailed when a write failed (stage FAILOVER_FAILED, recorded); it may be called again.
        """
        header = self.header
        if header.stage is Stage.DONE:
            return True
        if header.stage not in (Stage.FAILOVER, Stage.FAILOVER_FAILED):
            raise OperationFailed(f"Nothing to commit in stage {header.stage.name}.")
        header.store_state(Stage.FAILOVER, header.epoch, syncing=False)
        try:
            if self.prepare is not None:
                self.prepare()
            held = [_held_blocks(volume) for volume in self.buffer.volumes]
            for volume, blocks in zip(self.buffer.volumes, held, strict=True):
                header.words[volume.base + h.V_COMMIT_DONE] = 0
                header.words[volume.base + h.V_COMMIT_TOTAL] = len(blocks)
            self._forget_unsettled()
            complete = all(self._commit_volume(index, blocks) for index, blocks in enumerate(held))
            self._settle()
            if not complete:
                return False
            if self.complete is not None:
                self.complete()
        except (OSError, TandemDiskError) as error:
            header.store_state(Stage.FAILOVER_FAILED, header.epoch, syncing=False)
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            header.set_error(Failure.FAILOVER, f"the commit of the disk buffer failed: {reason}")
            raise OperationFailed(
                f"The commit of the disk buffer failed: {reason}.",
                hint="All data can still be read and written. Put the disk right, then run the failover again.",
            ) from error
        header.store_state(Stage.DONE, header.epoch, syncing=False)
        header.clear_error(Failure.FAILOVER)
        return True

    @property
    def statistics(self) -> tuple[int, int]:
        """(blocks done, blocks in all) of the commit that runs or ran last, by whichever process."""
        volumes = self.buffer.volumes
        return (
            sum(volume.counter(h.V_COMMIT_DONE) for volume in volumes),
            sum(volume.counter(h.V_COMMIT_TOTAL) for volume in volumes),
        )

    def _commit_volume(self, index: int, blocks: Blocks) -> bool:
        volume = self.buffer.volumes[index]
        for start, stop in _runs(blocks, max(1, RUN_BYTES // volume.block_size)):
            if self.stopping.is_set():
                return False
            self._commit_run(index, int(blocks[start]), int(blocks[stop - 1]))
            if self._unsettled_bytes >= SETTLE_BYTES:
                self._settle()
            volume.count(h.V_COMMIT_DONE, stop - start)
            if self.progress is not None:
                self.progress(*self.statistics)
        return True

    def _commit_run(self, index: int, first: int, last: int) -> None:
        """Blocks ``first`` to ``last``, those of them that the buffer still holds."""
        volume, view, disk = self.buffer.volumes[index], self.views[index], self.disks[index]
        offset = first << volume.shift
        end = min((last + 1) << volume.shift, volume.size)
        request = volume.requests.cow_request_begin(offset, end)
        try:
            for kind, position, count in view.look_up(offset, end - offset, self.header.epoch << 32):
                if kind in (HIDDEN, TOP):
                    if self.on_write is not None:
                        self.on_write(index, offset, count)
                    disk.write(offset, (volume.active if kind == TOP else volume.hidden).contents(position, count))
                offset += count
        finally:
            request.end()
        self._unsettled.append((index, first, last))
        self._unsettled_bytes += end - (first << volume.shift)

    def _settle(self) -> None:
        """What was written is durable; then its marks may go."""
        for disk in self.disks:
            disk.flush()
        for index, first, last in self._unsettled:
            volume = self.buffer.volumes[index]
            with volume.requests.cow_request_begin(first << volume.shift, min((last + 1) << volume.shift, volume.size)):
                clear_marks(volume.hidden, first, last)
                clear_marks(volume.active, first, last)
        self._forget_unsettled()

    def _forget_unsettled(self) -> None:
        self._unsettled.clear()
        self._unsettled_bytes = 0


def _held_blocks(volume: VolumeBuffer) -> Blocks:
    """Numbers of the blocks that the active or the hidden disk holds, ascending."""
    epoch = volume.header.epoch
    result: Blocks = np.union1d(volume.active.held(epoch)[0], volume.hidden.held(epoch)[0])
    return result


def _runs(blocks: Blocks, longest: int) -> Iterator[tuple[int, int]]:
    """(start, stop) indices of runs of consecutive numbers in ascending ``blocks``, none longer than ``longest``."""
    if not len(blocks):
        return
    borders = np.flatnonzero(np.diff(blocks) != 1) + 1
    begin = 0
    for border in [*borders.tolist(), len(blocks)]:
        for start in range(begin, border, longest):
            yield start, min(start + longest, border)
        begin = border
