"""The backup job (sync=none): old contents go to the hidden disk before a primary write lands on the secondary disk.

For each batch of the stream the secondary calls ``do_cow`` with its extents, then writes the batch to the secondary
disk. A block is copied at most once an epoch; the buffer never loses what it holds. A batch that fails (no slot left,
the secondary disk unreadable) has stamped nothing of the blocks that it could not copy, and may be tried again as a
whole.

Which blocks are new is decided without a request: only the backup job stamps the hidden map, and only it makes
checkpoints. Old contents are then copied under an exclusive CowRequest for each run of blocks, so that no reader is
between its look-up and its read; its own reads of the secondary disk are not serialised (``read_no_serialising``), or
it would wait for itself. While no reader is present at all, one lock for the batch replaces those requests.

The copy is one ``preadv`` a run, from the secondary disk straight into consecutive slots of the shared pool.

Small batches (up to ``SMALL`` extents) are looked up with plain integers, because NumPy's cost of about half a
microsecond a call outweighs what it saves there; larger ones are vectorised.

A checkpoint locks every volume's whole range, which waits for the readers in flight, and is then one store in the
header.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from typing import Final

import numpy as np

from common.disk import Disk
from common.errors import DiskError, NoSpaceError, TandemDiskError
from secondary import header as h
from secondary.buffer import SMALL, Blocks, DiskBuffer, VolumeBuffer
from secondary.header import Failure, Stage
from secondary.holders import Ranges
from secondary.interface import Serialised
from secondary.locks import Description
from secondary.requests import HOLD, RequestTable
from secondary.spill import Spill

log = logging.getLogger("backup")

_NOWAIT: Final = os.RWF_NOWAIT
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

INLINE_BLOCKS: Final = 1024
INLINE_BYTES: Final = 4 << 20
"""What ``do_cow_nowait`` copies at most, so that an event loop is not held up: about a millisecond.

(16 MiB at once take 10 ms, and 30 ms into memory of the pool that is used for the first time.)
"""

Numbers = Sequence[int] | Blocks
"""Byte offsets or lengths of a batch."""


class BackupError(OSError):
    """Old contents could not be read from the secondary disk, or kept: nothing was written over them."""


class BackupJob(Serialised):
    """The backup job of one volume. One process has it; ``DiskBuffer.create`` or ``header.own`` makes sure of that."""

    def __init__(self, buffer: VolumeBuffer, disk: Disk) -> None:
        if disk.size != buffer.size:
            raise DiskError(f"Volume {buffer.name} has {buffer.size} bytes, its secondary disk {disk.size}.")
        self.buffer = buffer
        self.disk = disk
        self.requests = buffer.requests
        self._header = buffer.header
        self._layer = buffer.hidden
        self._shift = buffer.shift
        self._words = buffer.header.words
        self._mutex = threading.Lock()
        self._fd = disk.fileno()
        self._nowait = True
        epoch = buffer.header.epoch
        self.spill = _spill_of(buffer)
        """Where old contents go when the pool is full, if anywhere."""
        self.spilling = False
        """They may: a resync is going on that keeps the checkpoint."""
        self._leaked_in = epoch if len(self._layer.held(epoch)[0]) < self._layer.used(epoch) else -1

    # The exported interface, beside that of Serialised

    def do_cow(self, offsets: Numbers, lengths: Numbers) -> int:
        """Copy old contents of every block that [offset, offset + length) touches and this epoch has not seen; may
        block.

        Byte offsets and lengths, each length at least 1. Returns how many blocks were copied. Raises NoSpaceError if
        the hidden disk has no room for them, TimedOut if a request in flight does not end, BackupError if the
        secondary disk cannot be read (also recorded).
        """
        with self._mutex:
            return self._cow(offsets, lengths, wait=True)

    def do_cow_nowait(self, offsets: Numbers, lengths: Numbers) -> int:
        """``do_cow`` if that is quick: no wait for a request in flight or for the device, and not too much to copy.

        Else BlockingIOError, nothing done.
        """
        if not self._mutex.acquire(blocking=False):
            raise BlockingIOError(errno.EAGAIN, "the backup job is busy")
        try:
            return self._cow(offsets, lengths, wait=False)
        finally:
            self._mutex.release()

    def read_no_serialising(self, offset: int, view: memoryview) -> None:
        """Read the secondary disk as it is, without a request; for whoever holds one already."""
        self.disk.read_into(offset, view)

    @property
    def used_blocks(self) -> int:
        """Slots of the hidden disk in use."""
        return self._layer.used(self._header.epoch)

    @property
    def free_blocks(self) -> int:
        """Slots of the hidden disk that may still be asked for before the next checkpoint.

        All of them while there is no checkpoint to protect, and always in a pool that has one for each block: that
        can't run out, however often a block is counted, unless a crash leaked some of them in this very epoch. Those of
        a spill file count when they are reserved, during a resync.
        """
        layer, epoch = self._layer, self._header.epoch
        if self._header.syncing or (layer.slots >= self.buffer.blocks and epoch != self._leaked_in):
            return layer.slots
        spare = self.spill.reserved if self.spill is not None and self.spilling else 0
        return max(0, layer.slots + spare - layer.used(epoch))

    @property
    def spilled_blocks(self) -> int:
        """Slots of the spill file in use."""
        return max(0, self.used_blocks - self._layer.slots)

    def begin_spill(self) -> None:
        """A resync that keeps the checkpoint begins, or goes on: have room before the primary is told of it. Blocks."""
        if self.spill is not None:
            with self._mutex:
                self.spilling = True
                self._reserve(self.spill, self._layer.used(self._header.epoch))

    def end_spill(self) -> None:
        """The buffer is empty, or counts no more: give the space back. Blocks."""
        self.spilling = False
        if self.spill is not None:
            with self._mutex:
                self.spill.release()

    # Inside

    def _cow(self, offsets: Numbers, lengths: Numbers, *, wait: bool) -> int:
        state = self._words[h.W_STATE]
        if state >> h.STAGE_SHIFT != Stage.RUNNING:
            raise TandemDiskError(f"The backup job cannot run in stage {self._header.stage.name}.")
        if state & h.SYNCING:
            return 0  # no checkpoint to protect yet
        epoch = state & h.EPOCH_MASK
        if epoch == h.LAST_EPOCH:
            raise TandemDiskError("The epoch wrapped around and the maps were not cleared.")
        if len(offsets) <= SMALL:
            blocks = self._new_few(_plain(offsets), _plain(lengths), epoch << 32)
        else:
            many = np.asarray(offsets, dtype=np.uint64), np.asarray(lengths, dtype=np.uint64)
            blocks = self._new_many(*many, epoch << 32)
        if not blocks:
            return 0
        if not wait and (len(blocks) > INLINE_BLOCKS or len(blocks) << self._shift > INLINE_BYTES):
            raise BlockingIOError(errno.EAGAIN, "more than is copied without a thread")
        layer, spill = self._layer, self.spill
        used = layer.used(epoch)
        slots = layer.slots
        if spill is not None:
            if self.spilling and not self._has_room(spill, used + len(blocks)):
                if not wait:
                    raise BlockingIOError(errno.EAGAIN, "the spill file has to grow")
                self._reserve(spill, used + len(blocks))
            slots += spill.reserved
        if used + len(blocks) > slots:
            raise NoSpaceError(
                f"The hidden disk of volume {self.buffer.name} has {slots - used} blocks "
                f"free, {len(blocks)} are needed.",
                hint="A checkpoint empties it.",
            )
        ranges = _ranges(blocks, self._shift)
        request = self._lock(ranges, wait)
        try:
            # The pointer goes first: a crash from here on leaks slots, the other order would hand them out twice.
            layer.store_used(epoch, used + len(blocks))
            try:
                self._copy(ranges, used << self._shift, wait)
            except BaseException:
                layer.store_used(epoch, used)
                raise
            layer.stamp(blocks, used, epoch << 32)
        except BlockingIOError:
            raise
        except OSError as error:
            sentence = f"old contents of volume {self.buffer.name} cannot be copied: {error.strerror or error}"
            self._header.set_error(Failure.BACKUP, sentence)
            raise BackupError(error.errno or errno.EIO, sentence) from error
        finally:
            self.requests.release(request)
        words, base = self._words, self.buffer.base
        words[base + h.V_COW_BLOCKS] += len(blocks)
        words[base + h.V_COW_BATCHES] += 1
        return len(blocks)

    def _has_room(self, spill: Spill, used: int) -> bool:
        """Whether there is room behind ``used`` slots for the largest batch that the primary may hold back, which is
        half a pool, or else no more can be had."""
        return bool(spill.trouble) or used + self._layer.slots // 2 < self._layer.slots + spill.reserved or (
            spill.reserved == spill.slots
        )

    def _reserve(self, spill: Spill, used: int) -> None:
        if spill.trouble:
            return
        spill.reserve(used - self._layer.slots + self._layer.slots // 2 + 1)
        if spill.trouble:
            log.warning("the checkpoint lasts as long as the room for it: %s", spill.trouble)

    def _new_few(self, offsets: Sequence[int], lengths: Sequence[int], least: int) -> list[int]:
        """Blocks not held in this epoch, ascending."""
        shift = self._shift
        entries = self._layer.entries
        new: list[int]
        block_size = 1 << shift
        if not lengths:
            return []
        if max(lengths) <= block_size and not (reduce(or_, lengths) | reduce(or_, offsets)) & (block_size - 1):
            new = [block for offset in offsets if entries[block := offset >> shift] < least]  # each exactly one block
            return sorted(set(new)) if new else new
        new = []
        for offset, length in zip(offsets, lengths, strict=True):
            first = offset >> shift
            last = (offset + length - 1) >> shift
            if first == last:
                if entries[first] < least:
                    new.append(first)
            elif last - first < SMALL:
                new += [block for block in range(first, last + 1) if entries[block] < least]
            else:
                absent = self._layer.entries_array[first : last + 1] < least
                new += (np.flatnonzero(absent) + first).tolist()
        if len(new) < 2:
            return new
        return sorted(set(new))

    def _new_many(self, offsets: Blocks, lengths: Blocks, least: int) -> list[int]:
        """``_new_few`` for large batches."""
        shift = np.uint64(self._shift)
        first = offsets >> shift
        counts = ((offsets + lengths - np.uint64(1)) >> shift) - first + np.uint64(1)
        total = int(counts.sum())
        blocks = first
        if total != len(first):
            ends = np.cumsum(counts)
            blocks = np.repeat(first - (ends - counts), counts.astype(np.intp)) + np.arange(total, dtype=np.uint64)
        new = blocks[self._layer.entries_array.take(blocks.astype(np.intp)) < np.uint64(least)]
        result: list[int] = np.unique(new).tolist()
        return result

    def _lock(self, ranges: Ranges, wait: bool) -> Description:
        request = self.requests.try_alone() or self.requests.try_absent(ranges)
        if request is not None:
            return request
        if not wait:
            raise BlockingIOError(errno.EAGAIN, "a request in flight overlaps the batch")
        return self.requests.wait_absent(ranges)

    def _copy(self, ranges: Ranges, position: int, wait: bool) -> None:
        """Old contents of ``ranges`` into the pool from byte ``position`` on."""
        if position + sum(end - start for start, end in ranges) > self._layer.in_memory:
            if not wait:
                raise BlockingIOError(errno.EAGAIN, "the spill file is written in a thread")
            self._copy_spilling(ranges, position)
            return
        if self._fd < 0:
            self._copy_layered(ranges, position, wait)
            return
        fd, pool, preadv = self._fd, self._layer.pool, os.preadv
        flags = 0 if wait or not self._nowait else _NOWAIT
        for start, end in ranges:
            stop = position + end - start
            try:
                got = preadv(fd, (pool[position:stop],), start, flags)
            except OSError as error:
                if not flags or error.errno not in _UNSUPPORTED:
                    raise
                self._nowait, flags = False, 0
                got = preadv(fd, (pool[position:stop],), start)
            # The last block of the disk may be shorter than its slot.
            if got != end - start and start + got != self.buffer.size:
                if flags:
                    raise BlockingIOError(errno.EAGAIN, "old contents are not in the page cache")
                length = min(end, self.buffer.size) - start
                self.disk.read_into(start + got, pool[position + got : position + length])
            position = stop

    def _copy_spilling(self, ranges: Ranges, position: int) -> None:
        """``_copy`` of what does not fit into the pool as a whole."""
        memory = memoryview(bytearray(INLINE_BYTES))
        first = position
        for start, end in ranges:
            for offset in range(start, end, len(memory)):
                view = memory[: min(end, self.buffer.size, offset + len(memory)) - offset]
                self.disk.read_into(offset, view)
                try:
                    self._layer.write(position + offset - start, view)
                except OSError as error:
                    if self.spill is not None:
                        self.spill.give_up((first >> self._shift) - self._layer.slots, error.strerror or str(error))
                    raise
            position += end - start

    def _copy_layered(self, ranges: Ranges, position: int, wait: bool) -> None:
        """``_copy`` through the methods of a disk that wants to see each call."""
        read = self.disk.read_into if wait else self.disk.read_nowait
        for start, end in ranges:
            read(start, self._layer.pool[position : position + min(end, self.buffer.size) - start])
            position += end - start


class PairBackup:
    """The backup jobs of all volumes of a pair, and what they do as one.

    Checkpoints and the start of a synchronisation.
    """

    def __init__(self, buffer: DiskBuffer, disks: Sequence[Disk]) -> None:
        self.buffer = buffer
        self.header = buffer.header
        self.jobs = [BackupJob(volume, disk) for volume, disk in zip(buffer.volumes, disks, strict=True)]
        self.finish_wrap()

    def do_checkpoint(
        self, number: int, sequence: int, *, timeout_s: float | None = None, check: Callable[[], None] | None = None
    ) -> float:
        """The primary's state as of now becomes what the guest sees; the buffer is empty. Returns seconds spent
        waiting for readers.

        Ends the synchronisation if one was going on. May block; raises TimedOut naming who holds a request. ``check``
        is called behind the wait: what it raises ends this with nothing done.
        """
        started = time.perf_counter()
        try:
            with self.stopped(wait=True, hold=True, timeout_s=timeout_s):
                waited = time.perf_counter() - started
                if check is not None:
                    check()
                self._switch(number, sequence)
        except TandemDiskError as error:
            self.header.set_error(Failure.EMPTYING, error.sentence)
            raise
        self.end_spill()
        return waited

    def do_checkpoint_nowait(self, number: int, sequence: int) -> None:
        """``do_checkpoint`` if no request is in flight; else BlockingIOError, nothing done."""
        if self.spilling:
            raise BlockingIOError(errno.EAGAIN, "a spill file has to be emptied")
        with self.stopped(wait=False, hold=True):
            self._switch(number, sequence)

    def begin_sync(self) -> None:
        """From now on there is no valid checkpoint and no COW.

        A synchronisation writes the secondary disk. Ended by a checkpoint.
        """
        with self.stopped(wait=True):
            self.header.words[h.W_SYNCS] += 1
            self.header.store_state(self.header.stage, self.header.epoch, syncing=True)
        self.end_spill()

    @property
    def spilling(self) -> bool:
        """Old contents may go to the spill files, or are there still since the process before this one."""
        return any(job.spilling or (job.spill is not None and job.spill.reserved) for job in self.jobs)

    def begin_spill(self) -> None:
        """See ``BackupJob.begin_spill``."""
        for job in self.jobs:
            job.begin_spill()

    def end_spill(self) -> None:
        """See ``BackupJob.end_spill``."""
        for job in self.jobs:
            job.end_spill()

    def close(self) -> None:
        for job in self.jobs:
            if job.spill is not None:
                job.spill.close()

    @contextmanager
    def stopped(self, *, wait: bool, hold: bool = False, timeout_s: float | None = None) -> Iterator[None]:
        """All volumes locked as a whole, in the order of their numbers, so that nothing at all is in flight.

        ``hold``: not while a snapshot holds checkpoints off, either.
        """
        taken: list[tuple[RequestTable, Description]] = []
        mutexes = [job._mutex for job in self.jobs]
        held: list[threading.Lock] = []
        try:
            for mutex in mutexes:
                if not mutex.acquire(blocking=wait):
                    raise BlockingIOError(errno.EAGAIN, "the backup job is busy")
                held.append(mutex)
            for index, job in enumerate(self.jobs):
                table = job.requests
                whole = table.whole()
                if index == 0 and hold:
                    taken.append((table, self._hold(table, wait, timeout_s)))
                request = table.try_absent(whole)
                if request is None:
                    if not wait:
                        raise BlockingIOError(errno.EAGAIN, "a request is in flight")
                    request = table.wait_absent(whole, timeout_s=timeout_s)
                taken.append((table, request))
            yield
        finally:
            for table, description in reversed(taken):
                table.release(description)
            for mutex in held:
                mutex.release()

    def finish_wrap(self) -> None:
        """If the last checkpoint stepped onto the last epoch: clear the maps and go on with epoch 1."""
        if self.header.epoch == h.LAST_EPOCH:
            with self.stopped(wait=True):
                self._wrap()

    def _hold(self, table: RequestTable, wait: bool, timeout_s: float | None) -> Description:
        held = table.try_byte(HOLD)
        if held is None:
            if not wait:
                raise BlockingIOError(errno.EAGAIN, "a snapshot holds the checkpoint")
            held = table.wait_byte(HOLD, timeout_s=timeout_s)
        return held

    def _switch(self, number: int, sequence: int) -> None:
        header = self.header
        if header.stage is not Stage.RUNNING:
            raise TandemDiskError(f"No checkpoint can be made in stage {header.stage.name}.")
        header.record_checkpoint(header.epoch + 1, number, sequence)
        header.store_state(Stage.RUNNING, header.epoch + 1, syncing=False)
        if header.epoch == h.LAST_EPOCH:
            self._wrap()

    def _wrap(self) -> None:
        for volume in self.buffer.volumes:
            volume.hidden.clear()
            volume.active.clear()
            self.header.words[volume.base + h.V_HIDDEN_BUMP] = 0
            self.header.words[volume.base + h.V_ACTIVE_BUMP] = 0
        self.header.store_state(self.header.stage, 1, syncing=self.header.syncing)


def _spill_of(buffer: VolumeBuffer) -> Spill | None:
    """As it was left: with what is used reserved, or empty."""
    geometry = buffer.hidden.geometry
    if not geometry.spill_slots:
        return None
    layer = buffer.hidden
    spill = Spill(layer.spill_path, geometry.spill_slots, geometry.block_size, layer.path, geometry.spill_owners_at)
    used = buffer.hidden.used(buffer.header.epoch) - geometry.slots
    if used > 0:
        spill.reserve(used)
    else:
        spill.release()
    return spill


def _plain(numbers: Numbers) -> Sequence[int]:
    if isinstance(numbers, np.ndarray):
        plain: list[int] = numbers.tolist()
        return plain
    return numbers


def _ranges(blocks: list[int], shift: int) -> Ranges:
    """Byte ranges [start, end) of the runs of consecutive numbers in ascending ``blocks``."""
    if len(blocks) > SMALL:
        array = np.array(blocks, dtype=np.int64)
        firsts = np.concatenate(([0], np.flatnonzero(np.diff(array) != 1) + 1))
        starts = array[firsts]
        ends = starts + np.diff(np.append(firsts, len(blocks)))
        return list(zip((starts << shift).tolist(), (ends << shift).tolist(), strict=True))
    ranges: list[tuple[int, int]] = []
    first = blocks[0]
    following = first
    for block in blocks:
        if block != following:
            ranges.append((first << shift, following << shift))
            first = block
        following = block + 1
    ranges.append((first << shift, following << shift))
    return ranges
