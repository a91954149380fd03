"""The secondary's work, done strictly in the order of the stream: copy old contents, write, checkpoint, resync marks.

The session hands out work; the applier queues it and does as much as it can in the same step of the loop. What would
have to wait (for a guest's request in flight, for a cold read of old contents, for metadata to become durable) goes to
one worker thread, and the queue stands still until it is back: nothing overtakes.

A batch is done in three beats: ``do_cow`` for all of its extents, then its writes in order, then the one store of the
applied sequence. A process killed in between repeats the batch: what is stamped is not copied again, and writing the
same bytes again changes nothing. Nothing may come between, or a checkpoint would hold half a batch: so the blocks that
it took count as free until it is done, and the primary, which had room for it before, has no reason for a barrier.

What takes long goes to the thread as well: a zero or discard of many MiB, old contents of many blocks at once. So the
loop answers the primary's heartbeats and its operator within milliseconds (16 MiB inline held it up for 100 of them).
A checkpoint that a reader prevents, or that a snapshot holds off, waits there, too, and is missed in the end.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol

import numpy as np
from xxhash import xxh3_64_intdigest

from common.batch import DISCARD, NO_HOLE, WRITE
from common.disk import HOLE, ZERO, Disk, hash_of_zeroes
from common.errors import TandemDiskError, TimedOut
from common.flusher import Flusher
from common.generation import History
from common.wire import QUESTION, Extent
from secondary.backup import BackupError, PairBackup
from secondary.header import Failure, PairHeader
from secondary.session import (
    Apply,
    BeginResync,
    Checkpoint,
    Effect,
    EndResync,
    Grow,
    Point,
    Resize,
    SecondarySession,
    Verify,
    Work,
)

log = logging.getLogger("applier")

NOWHERE: Final = 1
"""Stream of a disk that is at no known point of any: no primary has one of that number, so it compares everything."""

INLINE_BYTES: Final = 4 << 20
"""A batch that touches more goes to the thread: to clear 16 MiB takes a tmpfs 8 ms, even with nothing to copy."""
PUT_RIGHT: Final = (Failure.BACKUP, Failure.SECONDARY_DISK, Failure.ACTIVE_DISK, Failure.EMPTYING)
"""Failures that a checkpoint puts right: everything before it was applied, and both buffers are empty."""


class LostWrites(OSError):
    """The disk is not what was written to it."""


class Ledger(Protocol):
    """Keeps durably what the session must remember over a crash of this host; blocking calls, from the worker
    thread."""

    def resync_begun(self, stream: int, sequence: int, *, keep_checkpoint: bool) -> None: ...

    def resync_ended(self, history: History) -> None: ...

    def resize(self, sizes: Sequence[int], *, exact: bool) -> tuple[tuple[int, ...], str]:
        """Grow the volumes; the sizes that they have then, and why these are not what was asked for."""

    def grow(self, sizes: Sequence[int]) -> tuple[str, bytes]:
        """Follow a primary that has larger volumes; why that cannot be, and what this side may have written alone."""

    def checkpointed(self, number: int) -> None:
        """Note a checkpoint; called on the loop, must not block."""


class Applier:
    """See the module. ``send`` carries out the effects that reports to the session bring."""

    def __init__(
        self,
        session: SecondarySession,
        backup: PairBackup,
        disks: Sequence[Disk],
        ledger: Ledger,
        send: Callable[[Sequence[Effect]], None],
    ) -> None:
        self.session = session
        self.backup = backup
        self.bytes_written = 0
        self.checkpoints = 0
        self.waits = 0
        """Times that work had to go to the thread."""
        self._header: PairHeader = backup.header
        self._jobs = backup.jobs
        self._disks = disks
        self._ledger = ledger
        self._send = send
        self._queue: deque[Work] = deque()
        self._busy = False
        self._void = 0
        """Work at the head of the queue from before a flush that failed: no marks of any kind are made for it."""
        self._stopped = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop = asyncio.get_running_loop()
        self._lost = self._lost_before = 0
        """Flushes that failed; and how many of them had when the work in the thread was begun."""
        self._flushing = threading.Lock()
        """Of two at once the kernel would tell one what it lost; the other one waits until that is known."""
        self._news = threading.Lock()
        """Of such a flush, in the header: nobody says in between that the disk is at a known point."""
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="applier")
        self._flusher = Flusher([self], self._flush_failed)

    # The queue

    def put(self, work: Work) -> None:
        """Take work over; ``drain`` does it."""
        if not self._stopped:
            self._queue.append(work)

    def drain(self) -> None:
        """Do all that can be done now, then acknowledge it in one message."""
        queue = self._queue
        while queue and not self._busy:
            work = queue[0]
            try:
                self._do(work)
            except BlockingIOError:
                self._go_to_thread(work)
                break
            except (OSError, TandemDiskError) as error:
                self._give_up(work, error)
                break
            self._done()
        self._send(self.session.acknowledge(self.free_blocks()))

    def _done(self) -> None:
        self._queue.popleft()
        if self._void:
            self._void -= 1

    def free_blocks(self) -> int:
        """Free blocks in the fullest hidden disk, as of what is reported as applied: not of the work in the thread, nor
        of a batch that failed, or whose process was killed, in the middle of its writes."""
        if self._busy:
            return self._free_before
        return min(job.free_blocks for job in self._jobs) + self._header.copied_ahead

    async def stop(self) -> None:
        """Take no more work and wait until what was begun is done."""
        self._stopped = True
        while self._busy:
            self._idle.clear()
            await self._idle.wait()

    def resume(self) -> None:
        """Take work again, after ``stop``."""
        self._stopped = False

    def close(self) -> None:
        self._executor.shutdown(wait=True)
        self._flusher.close()

    # One piece of work, on the loop

    def _do(self, work: Work) -> None:
        if isinstance(work, Apply):
            extents = self._effective(work.extents)
            self._header.begin_batch(work.sequence, self._copy(extents, wait=False))
            self._write(work, extents)
            self._applied(work)
        elif self._void and not isinstance(work, Grow):
            self.session.applied(work.sequence)
        elif isinstance(work, Checkpoint):
            self._check_disk()
            started = time.perf_counter()
            self.backup.do_checkpoint_nowait(work.number, work.sequence)
            self._checkpointed(work, time.perf_counter() - started)
        else:
            self._lost_before = self._lost
            if not isinstance(work, Grow):
                self._check_disk()
            raise BlockingIOError(errno.EAGAIN, "this work always waits for a device")

    def _applied(self, work: Apply) -> None:
        self._header.applied_sequence = work.sequence
        self.session.applied(work.sequence)
        if work.flush:
            point = self.session.point()
            self._flusher.request(lambda code: self._flushed(point, code))

    def _checkpointed(self, work: Checkpoint, seconds: float) -> None:
        self.checkpoints += 1
        self._header.applied_sequence = work.sequence
        self._header.clear_error(*PUT_RIGHT)
        self._ledger.checkpointed(work.number)
        self._send(self.session.checkpointed(work.sequence, work.number, seconds))

    # The same in the thread

    def _go_to_thread(self, work: Work) -> None:
        self._free_before = self.free_blocks()
        self._busy = True
        self.waits += 1
        future = self._loop.run_in_executor(self._executor, self._do_blocking, work)
        future.add_done_callback(lambda done: self._back(work, done))

    def _do_blocking(self, work: Work) -> Any:
        started = time.perf_counter()
        match work:
            case Apply():
                extents = self._effective(work.extents)
                self._header.begin_batch(work.sequence, self._copy(extents, wait=True))
                self._write(work, extents)
                return None
            case Checkpoint():
                self.backup.do_checkpoint(work.number, work.sequence, check=self._check_disk)
                return time.perf_counter() - started
            case BeginResync():
                self._ledger.resync_begun(work.stream, work.sequence, keep_checkpoint=work.keep_checkpoint)
                if work.keep_checkpoint and not self._header.syncing:
                    self.backup.begin_spill()
                elif not self._header.syncing:
                    self.backup.begin_sync()
                self._header.forget_batch()
                self._stand_at(work.stream, work.sequence)
                return None
            case EndResync():
                self.flush()
                self._ledger.resync_ended(work.history)
                self._header.applied_sequence = work.sequence
                return None
            case Verify():
                return self._compare(work.questions)
            case Resize():
                answer = self._ledger.resize(work.sizes, exact=work.exact)
                self._header.applied_sequence = work.sequence
                return answer
            case Grow():
                return self._ledger.grow(work.sizes)

    def _stand_at(self, stream: int, sequence: int) -> None:
        """The numbering jumps. LostWrites if a flush has failed since this work was begun: the resync knows nothing of
        what that lost."""
        header = self._header
        with self._news:
            if self._lost != self._lost_before:
                raise LostWrites(errno.EIO, "writes were lost in a flush that failed as a resync began")
            header.stream_id = NOWHERE  # not at the old number in the new stream, should it be killed here
            header.applied_sequence = sequence
            header.stream_id = stream

    def _back(self, work: Work, done: asyncio.Future[Any]) -> None:
        self._busy = False
        self._idle.set()
        error = done.exception()
        if error is not None:
            if not isinstance(error, OSError | TandemDiskError):
                raise error
            if isinstance(work, Checkpoint) and isinstance(error, TimedOut):
                self._missed(work, error)
                self._done()
            else:
                self._give_up(work, error)
        else:
            self._report(work, done.result())
            self._done()
        self.drain()

    def _report(self, work: Work, result: Any) -> None:
        session = self.session
        match work:
            case Apply():
                self._applied(work)
            case Checkpoint():
                self._checkpointed(work, result)
            case BeginResync(sequence=sequence):
                session.resync_begun(sequence, consistent=not self._header.syncing)
            case EndResync(sequence=sequence, history=history):
                session.resync_ended(sequence, history)
            case Verify(sequence=sequence):
                self._header.applied_sequence = sequence
                self._send(session.verified(sequence, result))
            case Resize(sequence=sequence):
                self._send(session.resized(sequence, *result))
            case Grow(sizes=sizes):
                problem, session.own = result
                session.grown(sizes, problem)

    def _missed(self, work: Checkpoint, error: TimedOut) -> None:
        """Somebody holds a request and does not let go: no checkpoint this time. Everything else goes on."""
        log.error("checkpoint missed number=%d sentence=%r", work.number, error.sentence)
        self._header.applied_sequence = work.sequence
        self._send(self.session.checkpoint_missed(work.sequence, work.number, str(error)))

    def _give_up(self, work: Work, error: OSError | TandemDiskError) -> None:
        """The work cannot be done: the session ends, and the next one starts again at what was applied."""
        if isinstance(error, BackupError):
            code, sentence = error.errno or errno.EIO, f"the backup job failed: {error.strerror}"  # recorded there
        elif isinstance(error, OSError):
            code, sentence = error.errno or errno.EIO, f"the secondary disk failed: {error.strerror or error}"
            self._header.set_error(Failure.SECONDARY_DISK, sentence)
        else:
            code, sentence = errno.EIO, str(error)
            self._header.set_error(Failure.BACKUP if isinstance(work, Apply) else Failure.EMPTYING, sentence)
        log.error("work failed sequence=%d kind=%s sentence=%r", work.sequence, type(work).__name__, sentence)
        if isinstance(error, LostWrites) or (isinstance(work, EndResync) and isinstance(error, OSError)):
            self.flush_failed(self.session.point(), code, sentence)  # that is where its flush is
            return
        self._queue.clear()
        self._void = 0
        self._send(self.session.failed_apply(work.sequence, code, sentence))

    # Batches

    def _effective(self, extents: list[Extent]) -> list[Extent]:
        """Those of a batch that change anything. A hole that is discarded or zeroed once more takes no room in the
        hidden disk: else a client that discards a whole thin disk (mkfs) would wait for checkpoint after checkpoint.
        """
        if not extents or any(extent[4] == WRITE for extent in extents):
            return extents
        return [extent for extent in extents if extent[5] & NO_HOLE or not self._is_hole(*extent[:2], extent[3])]

    def _is_hole(self, offset: int, length: int, volume: int) -> bool:
        return self._disks[volume].extents(offset, length)[0] == (length, HOLE | ZERO)

    def _copy(self, extents: list[Extent], *, wait: bool) -> int:
        """Copy-before-write for all extents of the batch. How many blocks were copied."""
        copied = 0
        jobs = self._jobs
        if len(jobs) == 1:
            parts = [(jobs[0], extents)]
        else:
            volumes = {extent[3] for extent in extents}
            parts = [(jobs[index], [extent for extent in extents if extent[3] == index]) for index in volumes]
        for job, some in parts:
            lengths = [extent[1] for extent in some]
            if not lengths:
                continue
            if wait:
                copied += job.do_cow([extent[0] for extent in some], lengths)
            elif sum(lengths) > INLINE_BYTES:
                raise BlockingIOError(errno.EAGAIN, "more than is done without a thread")
            else:
                copied += job.do_cow_nowait([extent[0] for extent in some], lengths)
        return copied

    def _write(self, work: Apply, extents: list[Extent]) -> None:
        payload = work.batch.payload
        disks = self._disks
        total = 0
        for offset, length, position, volume, kind, flags, _ in extents:
            total += length
            if kind == WRITE:
                disks[volume].write(offset, payload[position : position + length])
            elif kind == DISCARD:
                disks[volume].discard(offset, length)
            else:
                disks[volume].zero(offset, length, may_unmap=not flags & NO_HOLE)
        self.bytes_written += total

    def _compare(self, questions: bytes) -> bytes:
        """One byte a question: 1 where the secondary disk's contents hash to something else."""
        differing = bytearray()
        for question in np.frombuffer(questions, dtype=QUESTION):
            offset, length = int(question["offset"]), int(question["length"])
            disk = self._disks[int(question["volume"])]
            if self._is_hole(offset, length, int(question["volume"])):
                found = hash_of_zeroes(length)
            else:
                contents = memoryview(bytearray(length))
                disk.read_into(offset, contents)
                found = xxh3_64_intdigest(contents)
            differing.append(found != int(question["hash"]))
        return bytes(differing)

    # Durability

    def flush(self) -> None:
        """Make all that was written so far durable; blocks, from any thread. OSError if that cannot be.

        The kernel tells of what it lost only once. So the header says it before anything else is done: the process may
        die before the loop hears of it, and the next one would believe the disk.
        """
        with self._flushing:
            try:
                for disk in self._disks:
                    disk.flush()
            except OSError:
                with self._news:
                    self._lost += 1
                    self._header.stream_id = NOWHERE
                raise

    def _check_disk(self) -> None:
        """No checkpoint of a disk that lost writes, nor a resync by what it was before: the thread in which a flush
        failed knew of it before the loop does."""
        if self.session.position.exact and not self.exact:
            raise LostWrites(errno.EIO, "writes were lost in a flush that failed")

    @property
    def exact(self) -> bool:
        """The disk is at what is applied, as far as anybody knows, any thread included."""
        return self.session.position.exact and self._header.stream_id != NOWHERE

    async def make_durable(self) -> None:
        """The same for all that is applied, behind every flush that is asked for: of two at once the kernel tells only
        one what it lost. What failed is known to the session then."""
        done = self._loop.create_future()
        point = self.session.point()

        def flushed(code: int) -> None:
            self._flushed(point, code)
            done.set_result(None)

        self._flusher.request(flushed)
        await done

    def _flushed(self, point: Any, code: int) -> None:
        if not code and self.session.position.exact and not self.exact:
            code = errno.EIO  # another flush was told what the kernel lost, and the loop will be, too
        if code:
            name = errno.errorcode.get(code, "?")
            sentence = f"the secondary disk could not make writes durable: errno {code} ({name})"
            self.flush_failed(point, code, sentence)
            return
        self.session.durable(point)
        self._send(self.session.acknowledge(self.free_blocks()))

    def flush_failed(self, point: Point, code: int, sentence: str) -> None:
        """The kernel may have forgotten what it could not write: nobody knows what the disk holds, until a resync is
        complete. The header says so for a process that comes after this one."""
        self._header.stream_id = NOWHERE
        self._send(self.session.failed_flush(point, code, sentence))
        self._drop_queue()

    def _drop_queue(self) -> None:
        """Nothing that is queued counts any more, and no checkpoint may be taken of a disk that nobody knows."""
        if self._busy:
            self._void = len(self._queue)
        else:
            self._queue.clear()
            self._void = 0
            self.session.drop_work()

    def _flush_failed(self, error: OSError) -> None:
        self._header.set_error(Failure.SECONDARY_DISK, f"flush of the secondary disk failed: {error.strerror or error}")
