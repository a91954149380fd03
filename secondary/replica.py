"""The guest's view of a volume on the secondary: active disk, else hidden disk, else secondary disk.

``GuestVolume`` is what the export process serves. What an operation does depends on the stage that it finds **inside**
its request (the names are QEMU's, so are the rules):

    stage             reads                        writes
    NONE, or syncing  EIO                          EIO: there is no checkpoint to show
    RUNNING           active, hidden, secondary    active disk; a partial block is filled through the view first
    FAILOVER          the same                     secondary disk, and the block's marks are cleared; of a part of a
                                                   buffered block in both places, and the marks stay
    FAILOVER_FAILED   the same                     in place wherever the block is buffered, else secondary disk
    DONE              secondary disk               secondary disk; no request: nothing else is going on

Each operation begins a CowRequest on its blocks (shared for reads), reads the state word, looks the blocks up, moves
the bytes, ends the request. The look-up is inside, else a copy or a checkpoint could slip between it and the read.

A guest's discard while RUNNING does nothing: it is a hint, and the active disk has no room for promises. Zeroes are
written.

On the event loop nothing waits: a read that would raises BlockingIOError (the export then calls ``read_blocking`` in a
thread); a batch of writes that would goes to a worker thread, and so do later batches of this volume until the worker
is done, so that overlapping writes keep their order.

Durability: the buffer is memory, so a flush while RUNNING has nothing to do. After promotion it is fdatasync of the
secondary disk; blocks that the commit has not yet moved are as safe as the machine's memory until it has.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from common.batch import DISCARD, FAST_ZERO, NO_HOLE, WRITE, Operation, Volume, WriteBatch
from common.disk import Disk
from common.errors import TandemDiskError
from secondary import header as h
from secondary.buffer import Layer, VolumeBuffer
from secondary.header import Failure, Stage
from secondary.holders import Ranges
from secondary.requests import ALLOCATION
from secondary.view import DISK, SMALL, TOP, VolumeView


class GuestVolume(VolumeView):
    """The guest's view; implements ``common.batch.Volume``.

    ``on_write(offset, length)`` is called before a write of the promoted side changes the secondary disk (dirty
    tracking).
    """

    def __init__(self, buffer: VolumeBuffer, disk: Disk, *, on_write: Callable[[int, int], None] | None = None) -> None:
        super().__init__(buffer, disk, overlay=True)
        self.on_write = on_write
        self.read_only = False
        self.multi_conn = True
        self.preferred_block = max(buffer.block_size, 4096)
        self._active = buffer.active
        self._clients = 0
        self._lock = threading.Lock()
        self._queue: deque[tuple[WriteBatch, asyncio.AbstractEventLoop]] = deque()
        self._working = False
        self._flushing = threading.Lock()
        self._flushes = 0
        self._flush_failed = OSError()
        """The last that did."""
        self._size_at = buffer.base + h.V_SIZE
        self._size_word = h.size_word(self._size)
        self._successor: Volume | None = None
        self._arriving: list[WriteBatch] | None = None
        self._arriving_flushes: list[Callable[[int], None]] = []
        self._flushes_asked = 0
        """Those that are not answered yet."""

    # Writing

    def submit(self, batch: WriteBatch) -> None:
        """Take the batch.

        It is finished at once, or later on the running event loop if it had to wait for something.
        """
        if self._successor is not None:
            self._successor.submit(batch)
            return
        if self._arriving is not None:
            self._arriving.append(batch)
            return
        if not self._working and not (batch.fua and self._promoted):
            try:
                errors = self.apply(batch.operations, batch.buffer.view, wait=False)
            except BlockingIOError:
                pass
            else:
                if not (batch.fua and self._promoted):
                    batch.finish(errors)
                    return
                # It was promoted in between, and they may be on the disk: the worker does them again, and flushes.
        with self._lock:
            self._queue.append((batch, asyncio.get_running_loop()))
            if self._working:
                return
            self._working = True
        threading.Thread(target=self._work, name=f"guest writes {self.name}", daemon=True).start()

    async def pause(self) -> None:
        """Keep what arrives until ``hand_over``; on return no write to the disk is under way, nor a flush, of whose
        failure whoever comes next would not hear. Reads go on."""
        if self._arriving is None:
            self._arriving = []
        while self._working or self._flushes_asked:  # noqa: ASYNC110 - it is a thread that ends this
            await asyncio.sleep(0.001)

    def hand_over(self, successor: Volume | None) -> None:
        """After ``pause``, in stage DONE: from now on ``successor``, on the same disk, does what changes it, beginning
        with what has arrived. None: this one goes on by itself."""
        self._successor = successor
        arrived, self._arriving = self._arriving or [], None
        flushes, self._arriving_flushes = self._arriving_flushes, []
        for batch in arrived:
            self.submit(batch)
        for done in flushes:
            self.flush(done)

    def _work(self) -> None:
        """The worker thread: batches in order, until there is none."""
        while True:
            with self._lock:
                if not self._queue:
                    self._working = False
                    return
                batch, loop = self._queue.popleft()
            failed = self._flush_failed
            try:
                errors = self.apply(batch.operations, batch.buffer.view, wait=True)
            except Exception as error:  # a thread's end would leave the client without an answer for ever
                errors = self._all_failed(batch.operations, repr(error))
            if batch.fua and (code := self._flush((self._flushes, failed))):
                errors = dict.fromkeys(range(len(batch.operations)), code)
            try:
                loop.call_soon_threadsafe(batch.finish, errors)
            except RuntimeError:
                return  # the loop is closed: nobody is left to tell

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """One write by itself, for whoever is not an export; blocks. OSError is what the guest would get."""
        view = memoryview(data)
        self._one((WRITE, offset, len(view), 0, 0), view)

    def operate(self, kind: int, offset: int, length: int, flags: int = 0) -> None:
        """One zero or discard by itself; blocks."""
        self._one((kind, offset, length, 0, flags), memoryview(b""))

    def _one(self, operation: Operation, view: memoryview) -> None:
        errors = self.apply([operation], view, wait=True)
        if errors:
            raise OSError(errors[0], "guest write failed")

    def apply(self, operations: Sequence[Operation], view: memoryview, *, wait: bool) -> Mapping[int, int] | None:
        """Do the operations in order.

        The errno of each that failed, by index. BlockingIOError if not ``wait`` and it would have to.
        """
        if self._words[h.W_STATE] >> h.STAGE_SHIFT == Stage.DONE:
            return self._each(operations, lambda operation: self._write_disk(operation, view))
        try:
            request = self._begin(self._ranges(operations), wait, shared=False)
            try:
                return self._apply_locked(operations, view, wait)
            finally:
                self.requests.release(request)
        except TandemDiskError as error:  # a holder that does not let go
            return self._all_failed(operations, error.sentence)
        except BlockingIOError:
            raise
        except OSError as error:  # no descriptor is left for a request
            return self._all_failed(operations, error.strerror or str(error))

    def _apply_locked(self, operations: Sequence[Operation], view: memoryview, wait: bool) -> Mapping[int, int] | None:
        if self._words[self._size_at] != self._size_word:
            self.follow()  # what was the end of the last block is its middle now
        state = self._words[h.W_STATE]
        stage = state >> h.STAGE_SHIFT
        try:
            least = self.least(state)
        except OSError:
            return dict.fromkeys(range(len(operations)), errno.EIO)
        if stage == Stage.RUNNING:
            return self._write_active(operations, view, least, wait)
        if stage == Stage.FAILOVER:
            return self._each(operations, lambda operation: self._write_through(operation, view, least))
        if stage == Stage.FAILOVER_FAILED:
            return self._each(operations, lambda operation: self._write_in_place(operation, view, least))
        return self._each(operations, lambda operation: self._write_disk(operation, view))

    def _all_failed(self, operations: Sequence[Operation], sentence: str) -> Mapping[int, int]:
        self.buffer.header.set_error(Failure.ACTIVE_DISK, sentence)
        return dict.fromkeys(range(len(operations)), errno.EIO)

    def flush(self, done: Callable[[int], None]) -> None:
        """Durable, as far as there is anything that can be; then ``done(errno or 0)`` on the event loop."""
        if self._successor is not None:
            self._successor.flush(done)
            return
        if not self._promoted:
            done(0)
            return
        if self._arriving is not None:
            self._arriving_flushes.append(done)
            return
        loop, asked = asyncio.get_running_loop(), (self._flushes, self._flush_failed)
        self._flushes_asked += 1

        def answer(code: int) -> None:
            self._flushes_asked -= 1
            done(code)

        def work() -> None:
            code = self._flush(asked)
            try:
                loop.call_soon_threadsafe(answer, code)
            except RuntimeError:
                pass

        threading.Thread(target=work, name=f"flush {self.name}", daemon=True).start()

    @property
    def lost_writes(self) -> bool:
        """A flush of the disk failed, and the kernel tells of what that lost only once."""
        return self._flush_failed.errno is not None

    @property
    def _promoted(self) -> bool:
        """Writes may go to the secondary disk."""
        return self._words[h.W_STATE] >> h.STAGE_SHIFT > Stage.RUNNING

    @property
    def size(self) -> int:
        """Bytes, by the header of the disk buffer: what a client is told that connects now."""
        if self._words[self._size_at] != self._size_word:
            self.follow()
        return self._size

    def follow(self) -> None:
        """Take over the size in the header; from any thread. DiskError if the disk has less."""
        self.buffer.follow()
        self.disk.use(self.buffer.size)
        self._size = self.buffer.size
        self._size_word = h.size_word(self._size)

    def client_connected(self) -> None:
        self._clients += 1

    def client_gone(self) -> None:
        """With the last client the backup job need not mind this process any more."""
        self._clients -= 1
        if self._clients == 0 and not self._working:
            self.requests.leave()

    # Inside

    def _ranges(self, operations: Sequence[Operation]) -> Ranges:
        mask = self._mask
        spans = [(offset & ~mask, (offset + length + mask) & ~mask) for _, offset, length, _, _ in operations if length]
        if len(spans) < 2:
            return spans
        spans.sort()
        merged = [spans[0]]
        for start, end in spans[1:]:
            if start <= merged[-1][1]:
                if end > merged[-1][1]:
                    merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        return merged

    def _each(self, operations: Sequence[Operation], write: Callable[[Operation], None]) -> Mapping[int, int] | None:
        errors: dict[int, int] | None = None
        for index, operation in enumerate(operations):
            try:
                if operation[2]:
                    write(operation)
            except BlockingIOError:
                raise
            except OSError as error:
                errors = errors or {}
                errors[index] = error.errno or errno.EIO
                if error.errno != errno.EOPNOTSUPP:
                    self._failed(Failure.SECONDARY_DISK, error)
        return errors

    def _write_active(
        self, operations: Sequence[Operation], view: memoryview, least: int, wait: bool
    ) -> Mapping[int, int] | None:
        """RUNNING. Fills first (they may have to wait), then slots, contents, owners, map entries."""
        if least >> 32 == h.LAST_EPOCH:
            # A crash between two epochs; the secondary repairs it when it starts.
            return dict.fromkeys(range(len(operations)), errno.EIO)
        errors: dict[int, int] = {}
        missing: dict[int, bytearray | None] = {}
        for index, operation in enumerate(operations):
            if operation[0] == DISCARD or not operation[2]:
                continue
            if operation[4] & FAST_ZERO and operation[0] != WRITE:
                errors[index] = errno.EOPNOTSUPP
                continue
            try:
                # All of an operation's blocks or none: what it noted before it failed would be stamped without
                # contents.
                missing.update(self._find_missing(operation, least, missing, wait))
            except BlockingIOError:
                raise
            except OSError as error:
                errors[index] = error.errno or errno.EIO
        slot = self._allocate(len(missing), least >> 32, wait)
        if slot < 0:
            if not wait and len(operations) > 1:
                raise BlockingIOError(errno.EAGAIN, "one of them may have to wait, behind others that are done")
            return self._write_active_singly(operations, view, least, wait)
        pool, shift = self._active.pool, self._shift
        slots: dict[int, int] = {}
        for block, contents in missing.items():
            slots[block] = slot
            if contents is not None:
                pool[slot << shift : (slot << shift) + len(contents)] = contents
            slot += 1
        written = 0
        for index, operation in enumerate(operations):
            if operation[0] != DISCARD and index not in errors:
                self._put(operation, view, slots)
                written += operation[2]
        self._active.stamp(list(slots), slot - len(slots), least)
        self.buffer.count(h.V_GUEST_WRITES, len(operations) - len(errors))
        self.buffer.count(h.V_GUEST_BYTES, written)
        return errors or None

    def _write_active_singly(
        self, operations: Sequence[Operation], view: memoryview, least: int, wait: bool
    ) -> Mapping[int, int] | None:
        """The active disk has no room for all of them: those that still fit, one by one, ENOSPC for the others."""
        if len(operations) == 1:
            self._failed(Failure.ACTIVE_DISK, OSError(errno.ENOSPC, "the active disk is full"))
            return {0: errno.ENOSPC}
        errors: dict[int, int] = {}
        for index, operation in enumerate(operations):
            failed = self._write_active([operation], view, least, wait)
            if failed:
                errors[index] = failed[0]
        return errors

    def _find_missing(
        self, operation: Operation, least: int, missing: Mapping[int, bytearray | None], wait: bool
    ) -> dict[int, bytearray | None]:
        """Blocks that need a slot and are not ``missing`` yet.

        With their contents where the operation covers only a part.
        """
        _, offset, length, _, _ = operation
        shift, mask = self._shift, self._mask
        first, last = offset >> shift, (offset + length - 1) >> shift
        end = offset + length
        entries = self._active.entries
        if last - first < SMALL:
            new = [block for block in range(first, last + 1) if entries[block] < least and block not in missing]
        else:
            absent = self._active.entries_array[first : last + 1] < np.uint64(least)
            new = [block for block in (np.flatnonzero(absent) + first).tolist() if block not in missing]
        found: dict[int, bytearray | None] = dict.fromkeys(new)
        partial = {first} if offset & mask else set()
        if end & mask and end != self._size:
            partial.add(last)
        for block in partial & found.keys():
            found[block] = self._fill(block, least, wait)
        return found

    def _fill(self, block: int, least: int, wait: bool) -> bytearray:
        """What a block that the active disk does not hold looks like to the guest."""
        contents = bytearray(self.buffer.length_of(block))
        self._read_block(block << self._shift, memoryview(contents), least, wait)
        return contents

    def _allocate(self, count: int, epoch: int, wait: bool) -> int:
        """The first of ``count`` consecutive slots of the active disk, or -1 if there is no room."""
        if count == 0:
            return 0
        active = self._active
        lock = self.requests.try_byte(ALLOCATION)
        if lock is None:
            if not wait:
                raise BlockingIOError(errno.EAGAIN, "another process allocates")
            lock = self.requests.wait_byte(ALLOCATION)
        try:
            used = active.used(epoch)
            if used + count > active.slots:
                return -1
            active.store_used(epoch, used + count)
            return used
        finally:
            self.requests.release(lock)

    def _put(self, operation: Operation, view: memoryview, slots: Mapping[int, int]) -> None:
        """Contents of one operation into slots of the active disk, in place or new.

        Runs of consecutive slots at once.
        """
        kind, offset, length, position, _ = operation
        if not length:
            return
        shift, pool, entries = self._shift, self._active.pool, self._active.entries
        first, last = offset >> shift, (offset + length - 1) >> shift
        done = 0
        block = first
        while block <= last:
            slot = slots[block] if block in slots else entries[block] & h.EPOCH_MASK
            count = 1
            while block + count <= last:
                following = block + count
                if (slots[following] if following in slots else entries[following] & h.EPOCH_MASK) != slot + count:
                    break
                count += 1
            inside = (offset + done) & self._mask
            take = min((count << shift) - inside, length - done)
            at = (slot << shift) + inside
            pool[at : at + take] = view[position + done : position + done + take] if kind == WRITE else bytes(take)
            done += take
            block += count

    def _write_disk(self, operation: Operation, view: memoryview) -> None:
        """Straight to the secondary disk."""
        kind, offset, length, position, flags = operation
        if self.on_write is not None:
            self.on_write(offset, length)
        if kind == WRITE:
            self.disk.write(offset, view[position : position + length])
        elif kind == DISCARD:
            self.disk.discard(offset, length)
        else:
            self.disk.zero(offset, length, may_unmap=not flags & NO_HOLE, fast=bool(flags & FAST_ZERO))

    def _write_through(self, operation: Operation, view: memoryview, least: int) -> None:
        """FAILOVER.

        To the secondary disk, then the marks go. A partial block that the buffer holds stays marked, and is written to
        there, too: until the commit has moved and flushed the rest of it, the disk may lose that.
        """
        kind, offset, length, _, _ = operation
        shift, mask = self._shift, self._mask
        end = offset + length
        first, last = offset >> shift, (end - 1) >> shift
        if kind == DISCARD:
            # The hint is followed for whole blocks only: the rest of an edge block may live in the buffer.
            first, last = (offset + mask) >> shift, (end >> shift if end != self._size else -(-end >> shift)) - 1
            if last < first:
                return
            whole_end = min((last + 1) << shift, self._size)
            self._write_disk((DISCARD, first << shift, whole_end - (first << shift), 0, 0), view)
        else:
            edges = {first} if offset & mask else set()
            if end & mask and end != self._size:
                edges.add(last)
            self._write_disk(operation, view)
            for block in edges:
                start, stop = max(offset, block << shift), min(end, (block + 1) << shift)
                for where, at, count in self.look_up(start, stop - start, least):
                    self._put_in_place(where, at, operation, view, start - offset, count)
                    start += count
            first, last = first + (first in edges), last - (last in edges)
            if last < first:
                return
        clear_marks(self._hidden, first, last)
        clear_marks(self._active, first, last)

    def _put_in_place(
        self, where: int, at: int, operation: Operation, view: memoryview, done: int, count: int
    ) -> None:
        """``count`` bytes of an operation, from its byte ``done`` on, to where the buffer holds them, if it does."""
        if where != DISK:
            position = operation[3] + done
            data = view[position : position + count] if operation[0] == WRITE else memoryview(bytes(count))
            (self._active if where == TOP else self._hidden).write(at, data)

    def _write_in_place(self, operation: Operation, view: memoryview, least: int) -> None:
        """FAILOVER_FAILED: where the block is."""
        kind, offset, length, position, flags = operation
        done = 0
        for where, at, count in self.look_up(offset, length, least):
            if where == DISK:
                self._write_disk((kind, offset + done, count, position + done, flags), view)
            elif kind != DISCARD:
                self._put_in_place(where, at, operation, view, done, count)
            done += count

    def _flush(self, asked: tuple[int, OSError]) -> int:
        """In a thread; ``asked``: how many had begun, and the last that failed, when it was asked for. One at a time;
        those that wait share the next one, or fail with the one they wait for: the kernel tells only once of what it
        lost."""
        began, failed = asked
        with self._flushing:
            if self._flush_failed is not failed:
                return self._flush_failed.errno or errno.EIO
            if self._flushes > began:
                return 0
            self._flushes += 1
            try:
                self.disk.flush()
            except OSError as error:
                self._flush_failed = error
                self._failed(Failure.SECONDARY_DISK, error)
                return error.errno or errno.EIO
        return 0


def clear_marks(layer: Layer, first: int, last: int) -> None:
    """Blocks ``first`` to ``last`` are held by ``layer`` no more. Under a request on them. Those of the hidden disk go
    first: were the process killed in between, old contents would come back in the place of the guest's."""
    if last - first < SMALL:
        entries = layer.entries
        for block in range(first, last + 1):
            entries[block] = 0
    else:
        layer.entries_array[first : last + 1] = 0
