"""MirroredDisk: what the primary's export serves. Each write goes to the secondary and to the primary disk, in one
order.

    batch ─▶ extents + span of the receive buffer ─▶ session.write ─▶ socket   (first with sync: both work at once)
          └▶ pwrite each payload where it lies                                 (first with async)
    reply: mode=async behind the pwrite, before anything is sent; mode=sync when the secondary has applied the batch

Everything runs on one event loop, and a batch is submitted in one step, so the order in which ``submit`` is called is
the order on both disks, whatever connection a write came from.

Zeroes and discards are done locally first and forwarded if that worked: a fast zero that the primary disk refuses must
not happen on the secondary. They are rare; nobody waits for the overlap.

*Detached* (the secondary was lost, ``on_peer_loss = continue``): writes are marked in the dirty bitmaps and
acknowledged alone, but not before the new generation, which says that this side went on alone, is durable
(``detaching`` until then). *Fenced* (the other side was promoted): writes fail with EIO; what was in flight fails too,
nobody is told it was done.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from common.batch import DISCARD, FAST_ZERO, NO_HOLE, WRITE, WriteBatch
from common.bitmap import DirtyBitmap
from common.disk import Disk
from common.flusher import Flusher
from common.intent import REGION
from common.wire import EXTENT_STRUCT, FLUSH, Frames
from primary.guard import REGION_SHIFT, IntentGuard
from primary.session import PrimarySession

log = logging.getLogger("mirror")

_pack: Final = EXTENT_STRUCT.pack


class Carrier(Protocol):
    """Puts the session's messages on the wire; ``primary.link.Link`` is one."""

    session: PrimarySession

    def send(self, messages: Sequence[Frames]) -> None: ...


class _Replicated:
    """A batch of ``mode = sync`` that waits for the secondary, and for the local flush if it asked for FUA."""

    __slots__ = ("batch", "errors", "waits")

    def __init__(self, batch: WriteBatch, waits: int) -> None:
        self.batch = batch
        self.errors: dict[int, int] | None = None
        self.waits = waits

    def unpin(self) -> None:
        """One of those that it waits for is done."""
        self.waits -= 1
        if not self.waits:
            self.batch.finish(self.errors)

    def flushed(self, code: int) -> None:
        """The local flush is done."""
        if code:
            self.fail(code)
        self.unpin()

    def fail(self, code: int) -> None:
        """The client gets ``code`` for every operation that has no error yet."""
        failed = dict.fromkeys(range(len(self.batch.operations)), code)
        self.errors = failed | (self.errors or {})


class _Flush:
    """A FLUSH that waits for both sides."""

    __slots__ = ("code", "done", "waits")

    def __init__(self, done: Callable[[int], None], waits: int) -> None:
        self.done = done
        self.waits = waits
        self.code = 0

    def unpin(self) -> None:
        self.waits -= 1
        if not self.waits:
            self.done(self.code)

    def flushed(self, code: int) -> None:
        if code:
            self.fail(code)
        self.unpin()

    def fail(self, code: int) -> None:
        self.code = self.code or code


class MirroredDisk:
    """One volume of the pair on the primary; a ``common.batch.Volume``."""

    multi_conn = True

    def __init__(self, mirror: Mirror, index: int, name: str, disk: Disk) -> None:
        self.read_only = False
        self.name = name
        self.size = disk.size
        self.preferred_block = disk.preferred_block
        self.disk = disk
        self.index = index
        self.clients = 0
        self._read_nowait = disk.read_nowait
        self.block_status = disk.extents
        self.flush = mirror.flush
        self._mirror = mirror

    def read_into(self, offset: int, view: memoryview) -> None:
        """From memory; BlockingIOError if the device would have to be asked."""
        try:
            self._read_nowait(offset, view)
        except BlockingIOError:
            raise
        except OSError as error:
            self._mirror.read_failed(self, offset, len(view), error)
            raise

    def read_blocking(self, offset: int, view: memoryview) -> None:
        """The same, from any thread, waiting."""
        try:
            self.disk.read_into(offset, view)
        except OSError as error:
            self._mirror.read_failed(self, offset, len(view), error)
            raise

    def submit(self, batch: WriteBatch) -> None:
        """See ``Mirror.submit``."""
        self._mirror.submit(self, batch)

    def client_connected(self) -> None:
        self.clients += 1

    def client_gone(self) -> None:
        self.clients -= 1


class Mirror:
    """The volumes of a primary, their dirty bitmaps, and the way of every write."""

    def __init__(
        self,
        volumes: Sequence[tuple[str, Disk]],
        *,
        sync: bool,
        block_size: int,
        on_disk_error: Callable[[str, OSError], None],
    ) -> None:
        self.sync = sync
        self.volumes = [MirroredDisk(self, index, name, disk) for index, (name, disk) in enumerate(volumes)]
        self.bitmaps = [DirtyBitmap(volume.size, block_size) for volume in self.volumes]
        self.flusher = Flusher([volume.disk for volume in self.volumes], lambda error: on_disk_error("flush", error))
        self.pause: Callable[[], None] = lambda: None
        self.detaching = False
        self.fenced = False
        self.disk_errors = 0
        self.written = 0
        """Batches since the process started: a resync and the checkpoint timer look whether it moved."""
        self.overlap: Callable[[int, int, int], None] | None = None
        """While a resync reads in a thread: told (volume, offset, length) of each write."""
        self.carrier: Carrier
        self.guard: IntentGuard | None = None
        """The write-intent bitmap, if one is kept."""
        self._holds = 0
        self._shift = block_size.bit_length() - 1
        self._on_disk_error = on_disk_error
        self._held: list[tuple[MirroredDisk, WriteBatch]] = []

    def grow(self, sizes: Sequence[int]) -> None:
        """The volumes have ``sizes`` bytes from now on: bitmaps, and what exports tell whoever connects."""
        for volume, bitmap, size in zip(self.volumes, self.bitmaps, sizes, strict=True):
            bitmap.grow(size)
            volume.size = size

    # The way of a write

    def submit(self, volume: MirroredDisk, batch: WriteBatch) -> None:
        """Replicate, write, answer; ``batch.finish`` comes now or later."""
        self.written += 1
        if self.detaching:
            self._held.append((volume, batch))
            return
        if self.fenced:
            batch.finish(dict.fromkeys(range(len(batch.operations)), errno.EIO))
            return
        session = self.carrier.session
        guard = self.guard
        if guard is not None:
            marks = guard.marks[volume.index]
            for _, offset, length, _, _ in batch.operations:
                if 0 in marks[offset >> REGION_SHIFT : (offset + length + REGION - 1) >> REGION_SHIFT]:
                    self._wait_for_intent(guard, volume, batch)
                    return
        if not session.attached:
            self._write_alone(volume, batch)
            return
        index, start, shift = volume.index, batch.start, self._shift
        extents = bytearray()
        blocks = 0
        kinds = 0
        for kind, offset, length, position, flags in batch.operations:
            kinds |= kind
            blocks += ((offset + length - 1) >> shift) - (offset >> shift) + 1
            extents += _pack(offset, length, position - start if kind == WRITE else 0, index, kind, flags & NO_HOLE, 0)
        if kinds or not self.sync:
            errors = self._write_local(volume, batch)
            if self.overlap is not None:
                self._overtake(volume, batch, errors)
            if errors:
                extents, blocks = self._only_written(volume, batch, errors)
            self._forward(batch, extents, blocks, errors)
            return
        if self.overlap is not None:
            self._overtake(volume, batch, {})
        pending = self._forward(batch, extents, blocks, None)
        errors = self._write_local(volume, batch)
        if errors:
            self._differ(volume, batch, errors)
        self._written_local(batch, pending, errors)

    def _overtake(self, volume: MirroredDisk, batch: WriteBatch, errors: dict[int, int]) -> None:
        """Tell a resync what it need not send any more, and has read in vain. A fast zero that was refused is on
        neither side: what is there is still the resync's to send."""
        assert self.overlap is not None
        for number, (_, offset, length, _, _) in enumerate(batch.operations):
            if errors.get(number) != errno.EOPNOTSUPP:
                self.overlap(volume.index, offset, length)

    def _forward(
        self, batch: WriteBatch, extents: bytearray, blocks: int, errors: dict[int, int] | None
    ) -> _Replicated | None:
        """Hand the batch to the session. With ``errors`` given the local part is done already; ``async`` answers then,
        before it sends: a client with one request in flight has its reply sooner (6 % more of them a second)."""
        session = self.carrier.session
        payload = batch.buffer.view[batch.start : batch.end]
        pending: _Replicated | None = None
        pin: Any
        flags = 0
        if self.sync:
            flags = FLUSH if batch.fua else 0
            pin = pending = _Replicated(batch, 3 if batch.fua else 2)
        else:
            pin = batch.buffer
            pin.pin()
            self._written_local(batch, None, errors or {})
            errors = None
        messages = session.write(extents, payload, blocks, flags, pin, time.monotonic())
        if messages:
            self.carrier.send(messages)
        if not session.window_open:
            self.pause()
        if errors is not None:
            self._written_local(batch, pending, errors)
        return pending

    def _written_local(self, batch: WriteBatch, pending: _Replicated | None, errors: dict[int, int]) -> None:
        """The primary disk has the batch (or its error): answer, or wait for the secondary and the flush."""
        if pending is None:
            if batch.fua:
                waiting = _Replicated(batch, 1)
                waiting.errors = errors
                self.flusher.request(waiting.flushed)
            else:
                batch.finish(errors)
            return
        if errors:
            pending.errors = errors | (pending.errors or {})
        if batch.fua:
            self.flusher.request(pending.flushed)
        pending.unpin()

    def read_failed(self, volume: MirroredDisk, offset: int, length: int, error: OSError) -> None:
        """A client could not be given what it asked for. From any thread."""
        self.disk_errors += 1
        self._on_disk_error(f"read of {length} bytes at {offset} of volume {volume.name}", error)

    def _write_local(self, volume: MirroredDisk, batch: WriteBatch) -> dict[int, int]:
        """Write to the primary disk; the errno of each operation that failed."""
        errors: dict[int, int] = {}
        disk = volume.disk
        write = disk.write
        view = batch.buffer.view
        for number, (kind, offset, length, position, flags) in enumerate(batch.operations):
            try:
                if kind == WRITE:
                    write(offset, view[position : position + length])
                elif kind == DISCARD:
                    disk.discard(offset, length)
                else:
                    disk.zero(offset, length, may_unmap=not flags & NO_HOLE, fast=bool(flags & FAST_ZERO))
            except OSError as error:
                errors[number] = error.errno or errno.EIO
                if not (flags & FAST_ZERO and error.errno == errno.EOPNOTSUPP):
                    self.disk_errors += 1
                    self._on_disk_error(f"write of {length} bytes at {offset} of volume {volume.name}", error)
        return errors

    def _only_written(
        self, volume: MirroredDisk, batch: WriteBatch, errors: dict[int, int]
    ) -> tuple[bytearray, int]:
        """Extents of what the primary disk took, and the blocks that they touch. The rest may be half done: it differs
        now."""
        extents = bytearray()
        blocks = 0
        for number, (kind, offset, length, position, flags) in enumerate(batch.operations):
            if number in errors:
                if errors[number] != errno.EOPNOTSUPP:
                    self.bitmaps[volume.index].set_range(offset, length)
                continue
            blocks += ((offset + length - 1) >> self._shift) - (offset >> self._shift) + 1
            position = position - batch.start if kind == WRITE else 0
            extents += _pack(offset, length, position, volume.index, kind, flags & NO_HOLE, 0)
        return extents, blocks

    def _differ(self, volume: MirroredDisk, batch: WriteBatch, errors: dict[int, int]) -> None:
        """The secondary took what the primary disk refused: the two differ there until a resync."""
        for number in errors:
            _, offset, length, _, _ = batch.operations[number]
            self.bitmaps[volume.index].set_range(offset, length)

    def use_blocks(self, block_size: int) -> None:
        """Count in the secondary's blocks from now on."""
        self._shift = block_size.bit_length() - 1

    def blocks_touched(self, offset: int, length: int) -> int:
        """Blocks of the secondary that [offset, offset + length) touches."""
        return ((offset + length - 1) >> self._shift) - (offset >> self._shift) + 1

    # Alone

    def _write_alone(self, volume: MirroredDisk, batch: WriteBatch) -> None:
        bitmap = self.bitmaps[volume.index]
        for _, offset, length, _, _ in batch.operations:
            bitmap.set_range(offset, length)
        self._written_local(batch, None, self._write_local(volume, batch))

    def hold(self) -> None:
        """Accept writes and do nothing with them until ``release``, which has to come as often: something that they
        depend on is being made durable."""
        self._holds += 1
        self.detaching = True

    def release(self) -> None:
        """Go on with what was held, in order; what has to wait again holds the rest back."""
        self._holds -= 1
        self.detaching = self._holds > 0
        if self.detaching:
            return
        held, self._held = self._held, []
        for volume, batch in held:
            self.submit(volume, batch)

    def _wait_for_intent(self, guard: IntentGuard, volume: MirroredDisk, batch: WriteBatch) -> None:
        """Hold the batch, and all after it, until it is durably known where it writes."""

        def done(code: int) -> None:
            if code:
                self._held.pop(0)
                batch.finish(dict.fromkeys(range(len(batch.operations)), code))
            self.release()

        self._held.insert(0, (volume, batch))
        self.hold()
        guard.require(volume.index, batch.operations, done)

    def mark_dirty(self, extents: Any) -> None:
        """Mark packed extents that the secondary may lack."""
        for offset, length, _, index, _, _, _ in EXTENT_STRUCT.iter_unpack(extents):
            self.bitmaps[index].set_range(offset, length)

    # Durability

    def flush(self, done: Callable[[int], None]) -> None:
        """Make everything written so far durable: here, and in sync mode on the secondary."""
        if self.fenced:
            done(errno.EIO)
            return
        session = self.carrier.session
        if not self.sync or not session.attached:
            self.flusher.request(done)
            return
        pending = _Flush(done, 2)
        messages = session.flush(pending, time.monotonic())
        if messages:
            self.carrier.send(messages)
        self.flusher.request(pending.flushed)

    async def make_durable(self) -> None:
        """The primary disks, behind every flush that is asked for: of two at once the kernel tells only one what it
        lost. OSError if they cannot be, which is told by then."""
        flushed, codes = asyncio.Event(), list[int]()

        def done(code: int) -> None:
            codes.append(code)
            flushed.set()

        self.flusher.request(done)
        await flushed.wait()
        if code := codes[0]:
            raise OSError(code, os.strerror(code))

    def close(self) -> None:
        self.close_files()
        for volume in self.volumes:
            volume.disk.close()

    def close_files(self) -> None:
        """``close``, for all but the disks."""
        self.flusher.close()
        if self.guard is not None:
            self.guard.close()
