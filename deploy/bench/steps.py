"""What the steps of a replicated write cost on this machine, each measured alone, with the code that really does it.

A step is measured for one batch of ``count`` writes of 4 KiB, the way a drained socket hands them on: depth 1 gives
batches of one. Sums of steps come out below what the running processes use (hotpath.py measures that): a step alone
finds its code and data in the caches. The rest is the event loop's and the bookkeeping's Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import socket
import statistics
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from common import nbd, wire, zmtp
from common.disk import FileDisk
from common.limits import MIB
from common.nbd_transmission import REPLY_HEADER, Transmission, batch_replies
from common.plain import LARGEST_FRAME, SOCKET_BUFFER
from common.settings import BufferSettings
from deploy.bench import scratch
from secondary.backup import PairBackup
from secondary.buffer import BufferVolume, DiskBuffer

BLOCK: Final = 4096
SIZE: Final = 64 * MIB
SECONDS_A_STEP: Final = 0.05
TURNS: Final = 2000


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one process; ``us`` is for the whole batch."""

    process: str
    what: str
    nature: str
    """``system call``, ``hash``, ``Python``, or several of them."""
    us: float


def timed(run: Callable[[], object], prepare: Callable[[], object] | None = None) -> float:
    """Median microseconds of ``run()``, each time after an untimed ``prepare()``."""
    clock = time.perf_counter_ns
    taken: list[int] = []
    end = clock() + int(SECONDS_A_STEP * 1e9)
    while clock() < end or len(taken) < 20:
        if prepare is not None:
            prepare()
        begun = clock()
        run()
        taken.append(clock() - begun)
    empty = []
    for _ in range(200):
        begun = clock()
        empty.append(clock() - begun)
    return max(0.0, statistics.median(taken) - statistics.median(empty)) / 1000


def turn_us() -> float:
    """One turn of asyncio's loop with one callback in it, its epoll_wait included."""

    async def turns() -> float:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        left = TURNS

        def again() -> None:
            nonlocal left
            left -= 1
            if left:
                loop.call_soon(again)
            else:
                done.set_result(None)

        begun = time.perf_counter_ns()
        loop.call_soon(again)
        await done
        return (time.perf_counter_ns() - begun) / TURNS / 1000

    return asyncio.run(turns())


class Stream:
    """One direction of the replication stream: ZMTP over a socket, as ``common.plain`` has it."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._out, self._in = socket.socketpair()
        for end in (self._out, self._in):
            stack.callback(end.close)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        self._inbox = zmtp.Inbox(LARGEST_FRAME)
        self._out.sendall(zmtp.greeting())
        self.receive()

    def send(self, frames: Sequence[zmtp.Frame]) -> None:
        pieces = zmtp.pieces(frames)
        sent = self._out.sendmsg(pieces)
        assert sent == sum(map(len, pieces)), "the socket has room for a batch"

    def receive(self) -> list[list[memoryview]]:
        """The messages that one ``recv`` brings; it waits for the first byte."""
        return self._inbox.received(self._in.recv_into(self._inbox.room()))

    def empty(self) -> None:
        """Forget what was sent and not received."""
        while select.select([self._in], [], [], 0)[0]:
            self.receive()


class Workbench:
    """Disks, sockets and a disk buffer in ``directory`` to measure steps with."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        paths = [directory / "primary.raw", directory / "secondary.raw"]
        scratch.fill(paths, SIZE)
        self._disk = FileDisk(str(paths[0]))
        stack.callback(self._disk.close)
        secondary = FileDisk(str(paths[1]))
        stack.callback(secondary.close)
        settings = BufferSettings(directory=str(directory / "buffer"), size_bytes=2 * SIZE)
        buffer = DiskBuffer.create(settings, [BufferVolume("disk0", SIZE, str(paths[1]))], pair_id="steps")
        stack.callback(buffer.close)
        buffer.start(syncing=False)
        self._backup = PairBackup(buffer, [secondary])
        self._client, self._server = socket.socketpair()
        for end in (self._client, self._server):
            stack.callback(end.close)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
        self._batches, self._acks = Stream(stack), Stream(stack)
        self._random = np.random.default_rng(1)

    def steps(self, count: int) -> list[Step]:
        """Every step of a batch of ``count`` random writes, in the order in which they happen."""
        blocks = self._random.permutation(SIZE // BLOCK)[:count].tolist()
        requests = bytearray()
        payload = self._random.bytes(BLOCK)
        for number, block in enumerate(blocks):
            cookie = struct.pack(">Q", number)
            head = nbd.REQUEST_HEAD | nbd.NBD_CMD_WRITE
            requests += nbd.REQUEST.pack(head, cookie, block * BLOCK, BLOCK) + payload
        turn = turn_us()
        return [*self._on_primary(requests, turn), *self._on_secondary(requests, turn)]

    def _extents(self, transmission: Transmission) -> bytes:
        start = transmission.span_start
        return b"".join(
            wire.EXTENT_STRUCT.pack(offset, length, position - start, 0, kind, 0, 0)
            for kind, offset, length, position, _ in transmission.operations
        )

    def _parsed(self, requests: bytearray) -> Transmission:
        transmission = Transmission(SIZE, read_only=False, structured=True, allocation=True, reply_space=REPLY_HEADER)
        transmission.parse(memoryview(requests), 0, len(requests))
        return transmission

    def _on_primary(self, requests: bytearray, turn: float) -> list[Step]:
        received = memoryview(bytearray(2 * MIB))
        transmission = self._parsed(requests)
        count = len(transmission.operations)
        span = memoryview(requests)[transmission.span_start : transmission.span_end]
        extents = self._extents(transmission)
        check = wire.payload_check(span)
        header = wire.encode_batch(1, 2, 0, extents, check)
        ack = wire.encode_ack(1, 2, 2, 2, 2, 1000)
        reply = batch_replies(transmission.cookies, transmission.operations, None, True)
        view = memoryview(requests)

        def write() -> None:
            for _, offset, length, position, _ in transmission.operations:
                self._disk.write(offset, view[position : position + length])

        def process(what: str, nature: str, us: float) -> Step:
            return Step("primary", what, nature, us)

        steps = [
            process("wake up: a turn of the loop", "system call, Python", turn),
            process(
                "receive the requests", "system call",
                timed(lambda: self._server.recv_into(received), lambda: self._client.sendall(requests)),
            ),
            process("parse them", "Python", timed(lambda: self._parsed(requests))),
            process("pack the extents", "Python", timed(lambda: self._extents(transmission))),
            process("hash the payload", "hash", timed(lambda: wire.payload_check(span))),
            process("make the message's header", "Python", timed(lambda: wire.encode_batch(1, 2, 0, extents, check))),
            process("send it", "system call", timed(lambda: self._batches.send((header, span)), self._batches.empty)),
            process(f"write to the primary disk, {count} pwrite", "system call", timed(write)),
            process("wake up for the acknowledgement", "system call, Python", turn),
            process(
                "receive and read it", "system call, Python",
                timed(lambda: wire.ack_of(self._acks.receive()[0]), lambda: self._acks.send((ack,))),
            ),
            process(
                "make the replies", "Python",
                timed(lambda: batch_replies(transmission.cookies, transmission.operations, None, True)),
            ),
            process(
                "send them", "system call",
                timed(lambda: self._server.send(reply), lambda: self._drain(self._client)),
            ),
        ]  # fmt: skip
        self._batches.empty()
        return steps

    def _drain(self, end: socket.socket) -> None:
        end.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while end.recv(MIB):
                pass
        end.setblocking(True)

    def _on_secondary(self, requests: bytearray, turn: float) -> list[Step]:
        transmission = self._parsed(requests)
        count = len(transmission.operations)
        span = memoryview(requests)[transmission.span_start : transmission.span_end]
        extents = self._extents(transmission)
        frames: list[bytes | memoryview] = [wire.encode_batch(1, 2, 0, extents, wire.payload_check(span)), span]
        array = wire.extents_array(extents)
        offsets, lengths = array["offset"], array["length"].astype(np.uint64)
        backup, job = self._backup, self._backup.jobs[0]
        disk_fd, pool = job.disk.fileno(), memoryview(bytearray(count * BLOCK))
        table = job.requests
        number = 1

        def checkpoint() -> None:
            nonlocal number
            number += 1
            backup.do_checkpoint_nowait(number, number)

        def write() -> None:
            for offset, length, position, *_ in wire.EXTENT_STRUCT.iter_unpack(extents):
                job.disk.write(offset, span[position : position + length])

        def read_old() -> None:
            for place, offset in enumerate(offsets.tolist()):
                os.preadv(disk_fd, (pool[place * BLOCK : (place + 1) * BLOCK],), offset)

        def lock() -> None:
            request = table.try_alone()
            assert request is not None, "nobody else is here"
            table.release(request)

        def process(what: str, nature: str, us: float) -> Step:
            return Step("secondary", what, nature, us)

        reads = timed(read_old)
        locks = timed(lock)
        first_touch = timed(lambda: job.do_cow_nowait(offsets, lengths), checkpoint)
        known = timed(lambda: job.do_cow_nowait(offsets, lengths))
        ack = wire.encode_ack(1, 2, 2, 2, 2, 1000)
        return [
            process("wake up: a turn of the loop", "system call, Python", turn),
            process(
                "receive the batch", "system call, Python",
                timed(self._batches.receive, lambda: self._batches.send(frames)),
            ),
            process("check and decode it", "hash, Python", timed(lambda: wire.decode(frames))),
            process("check its extents", "Python", timed(lambda: wire.unpack_extents(extents, len(span), [SIZE]))),
            process("COW: find the new blocks", "Python", known),
            process("COW: lock and unlock", "system call", locks),
            process(f"COW: read old contents into the buffer, {count} preadv", "system call", reads),
            process("COW: slots, stamps, the rest", "Python", max(0.0, first_touch - known - locks - reads)),
            process(f"write to the secondary disk, {count} pwrite", "system call", timed(write)),
            process(
                "send the acknowledgement", "system call, Python",
                timed(lambda: self._acks.send((ack,)), self._acks.empty),
            ),
        ]  # fmt: skip


def measure(directory: Path, counts: list[int]) -> list[list[Step]]:
    """The steps for batches of each of ``counts`` writes; needs 256 MiB in ``directory``."""
    with contextlib.ExitStack() as stack:
        bench = Workbench(directory, stack)
        gc.collect()
        gc.disable()
        stack.callback(gc.enable)
        return [bench.steps(count) for count in counts]
