"""One client of an export: a non-blocking socket between the NBD protocol (sans-I/O) and a Volume.

    readable ─▶ recv into the free tail of a pooled buffer ─▶ parse all of it ─▶ one WriteBatch to the volume
                                                                ├─▶ reads, straight into the server's reply buffer
                                                                └─▶ one send: the replies of all that is done already

A batch that finishes later is answered from its ``finish``; if more batches are in flight the answer waits for the end
of the loop's turn, so that an acknowledgement that covers many batches costs one send.

The loop's ``add_reader`` is used instead of a transport: a transport keeps references to what it could not send, which
would forbid to reuse a reply buffer, and adds three Python calls to each wake-up.

What bounds memory: nothing is read from a client while replies to it wait for room in its socket, or while too many
bytes of its reads are with threads. So a connection holds at most one receive buffer, one reply buffer, the reads that
are with threads, what remembers a bounded number of reads and flushes, and 16 bytes per write in flight. ``Block``
lists every reason for not reading. Large buffers are few: who stalls inside a large request while others wait is cut
off.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Final

from common import batch, limits, nbd
from common.batch import Operation, Volume, WriteBatch
from common.errors import NbdError, TandemDiskError
from common.nbd_handshake import MAX_OPTION, Agreement, ServerHandshake, State
from common.nbd_host import REPLY_BUFFER, Block, Counters, Host
from common.nbd_transmission import (
    HEADER,
    REPLY_HEADER,
    Command,
    Read,
    Transmission,
    batch_replies,
    block_status_reply,
    empty_reply,
    errno_reply,
)
from common.pieces import Pieces, is_long, read_through
from common.pool import Patience, PooledBuffer

TURNS: Final = 8
"""Times that one wake-up may receive before other connections get their turn."""
HAGGLES: Final = 2
"""Times MAX_STEPS options that one turn answers."""
SHORT_TAIL: Final = 256 * limits.KIB
"""A pinned buffer with less room than this is given up for a fresh one: short receives cost more than the room."""
CHEAP_MOVE: Final = 16 * limits.KIB
"""A partial request of at most this length moves to the front of its buffer, which keeps the buffer in the caches."""
MAX_DEFERRED: Final = limits.MAX_PAYLOAD
"""Bytes of one connection's reads that may be with threads before it is not read any more."""
LEAST_DEFERRED: Final = 4 * limits.KIB
"""What a request that waits for a thread counts at least: a read of one byte costs a kilobyte of memory, too."""
STATUS_SPAN: Final = 256 * limits.MIB
"""A block status request is answered for at most this much, so that a fragmented file does not hold the loop up for
long; the client asks on from there."""
HANDSHAKE_TIMEOUT_S: Final = 10.0
IOV: Final = 64

_log = logging.getLogger(__name__)
_length_of = itemgetter(2)


class Connection:
    """A client from accept to goodbye."""

    __slots__ = (
        "_blocked", "_buffer", "_deferred", "_filled", "_gone", "_handshake", "_handshake_timer", "_held", "_host",
        "_in_flight", "_loop", "_out", "_patience", "_peer", "_recv_into", "_registered", "_scheduled", "_scratched",
        "_socket", "_start", "_structured", "_transmission", "_view", "_volume", "_working", "_writing", "counters",
    )  # fmt: skip

    def __init__(self, host: Host, connection: socket.socket, peer: str, buffer: PooledBuffer) -> None:
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._socket = connection
        self._recv_into = connection.recv_into
        self._peer = peer
        self._buffer: PooledBuffer | None = buffer
        self._view = buffer.view
        self._start = self._filled = 0
        self._handshake: ServerHandshake | None = ServerHandshake(host.volumes, host.default)
        self._transmission: Transmission
        self._volume: Volume | None = None
        self._structured = False
        self._out: list[bytes | memoryview] = []
        self._held: memoryview | None = None
        self._scratched = False
        self._in_flight = 0
        self._deferred = 0
        self._blocked = 0
        self._registered = True
        self._working = self._writing = self._scheduled = self._gone = False
        self.counters = Counters()
        self._patience = Patience(host.pool, self._arrived, partial(self._lose, breach=True))
        self._handshake_timer = self._loop.call_later(HANDSHAKE_TIMEOUT_S, self._too_slow)
        self._loop.add_reader(connection, self._readable)

    def greet(self) -> None:
        """Send the greeting; to be called once, when the server knows the connection."""
        self._haggle()

    @property
    def haggling(self) -> bool:
        """The handshake is not over."""
        return self._handshake is not None

    # The gate

    def pause(self) -> None:
        """Stop reading requests; a handshake may go on."""
        if self._handshake is None:
            self._block(Block.PAUSED)

    def resume(self) -> None:
        """Undo ``pause``."""
        self._unblock(Block.PAUSED)

    def shut_down(self) -> None:
        """Accept nothing more; close when everything in flight is answered."""
        self._block(Block.CLOSING)
        self._close_if_done()

    def abort(self, reason: str) -> None:
        """Close now, whatever is in flight."""
        self._lose(reason)

    def _block(self, reason: int) -> None:
        self._blocked |= reason
        if self._registered and not self._gone:
            self._registered = False
            self._loop.remove_reader(self._socket)

    def _unblock(self, reason: int) -> None:
        if not self._blocked & reason:
            return
        self._blocked &= ~reason
        if not self._blocked and not self._gone:
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Nothing blocks any more: first what was received already, then the socket."""
        if self._blocked or self._gone or self._registered:
            return
        self._registered = True
        self._loop.add_reader(self._socket, self._readable)
        self._work()

    # Receiving

    def _readable(self) -> None:
        for _ in range(TURNS):
            try:
                count = self._recv_into(self._view[self._filled :])
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._lose(f"the connection broke: {error.strerror or error}")
                return
            if not count:
                self._end_of_stream()
                return
            self._filled += count
            if not self._work():
                return

    def _end_of_stream(self) -> None:
        """The client closed its side: what it asked for completely is still answered, if it still listens."""
        if self._filled > self._start:
            _log.info("nbd client %s left in the middle of a request", self._peer)
        self._block(Block.CLOSING)
        self._close_if_done()

    def _work(self) -> bool:
        """Do all that is complete in the buffer; whether to receive again at once, because more is likely there."""
        if self._handshake is not None:
            self._haggle()
            return False
        transmission = self._transmission
        view, position, end = self._view, self._start, self._filled
        again = False
        self._working = True
        try:
            while not self._blocked:
                after = transmission.parse(view, position, end)
                if after == position:
                    break
                position = after
                if transmission.operations:
                    self._submit(transmission)
                if transmission.reads:
                    self._read(transmission.reads)
                if transmission.refusals:
                    self._out += transmission.refusals
                    self.counters.refused += len(transmission.refusals)
                if transmission.command is not None and not self._gone:
                    self._command(transmission.command)
                if self._out:
                    self._send()
                if position == end or transmission.needed:
                    again = len(transmission.cookies) + len(transmission.reads) > 1
                    break
        except Exception:
            _log.exception("nbd client %s: a request failed in an unforeseen way", self._peer)
            self._lose("internal error")
        self._working = False
        self._start = position
        if transmission.breach:
            self._lose(f"it broke the protocol: {transmission.breach}", breach=True)
        if self._gone:
            return False
        if self._blocked:
            self._unblock(Block.TURN)
            self._close_if_done()
            return False
        if position == end:
            if self._buffer is not None and self._buffer.pins == 1 and len(view) == self._host.pool.size:
                self._start = self._filled = 0
                return again
            self._make_room(0)
            return again and not self._blocked  # no other buffer, and this one may be full
        self._make_room(transmission.needed or HEADER)
        return not self._blocked

    def _make_room(self, needed: int) -> None:
        """Have a place for the rest of a partial request of ``needed`` bytes, and for what comes after it.

        The partial request stays where it is if there is room, moves to the front of its buffer if nobody else uses
        that, else moves to another buffer.
        """
        buffer, start = self._buffer, self._start
        assert buffer is not None
        rest = self._filled - start
        size = len(buffer.view)
        suits = needed <= size and (size == self._host.pool.size or needed > self._host.pool.size)
        if suits and buffer.pins == 1:
            if rest <= CHEAP_MOVE or size - start < needed:
                buffer.view[:rest] = buffer.view[start : self._filled]
                self._start, self._filled = 0, rest
            return
        if suits and size - start >= max(needed, rest + SHORT_TAIL):
            return
        fresh = self._host.pool.acquire(needed)
        if fresh is None:
            self._host.pool.wait(self._buffer_came_back, needed)
            self._block(Block.STARVED)
            return
        fresh.view[:rest] = buffer.view[start : self._filled]
        self._buffer, self._view, self._start, self._filled = fresh, fresh.view, 0, rest
        buffer.unpin()
        if needed > self._host.pool.size:
            self._patience.start()
        else:
            self._patience.stop()

    def _buffer_came_back(self) -> None:
        self._unblock(Block.STARVED)

    def _arrived(self) -> int | None:
        """Bytes of writes so far, while nothing but the client itself keeps them from coming."""
        return self.counters.bytes_written + self._filled - self._start if not self._blocked & ~Block.SENDING else None

    # Requests

    def _submit(self, transmission: Transmission) -> None:
        """Hand the writes, zeroes and trims of this drain to the volume as one batch."""
        buffer, operations, volume = self._buffer, transmission.operations, self._volume
        assert buffer is not None
        assert volume is not None
        counters = self.counters
        if transmission.mixed:
            kinds = [operation[0] for operation in operations]
            counters.zeroes += kinds.count(batch.ZERO)
            counters.trims += kinds.count(batch.DISCARD)
            counters.writes += kinds.count(batch.WRITE)
            counters.bytes_written += sum(operation[2] for operation in operations if operation[0] == batch.WRITE)
        else:
            counters.writes += len(operations)
            counters.bytes_written += sum(map(_length_of, operations))
        buffer.pin()
        self._in_flight += 1
        batched = WriteBatch(
            operations, buffer, transmission.span_start, transmission.span_end, transmission.fua,
            partial(self._finish, transmission.cookies, operations, buffer),
        )  # fmt: skip
        if transmission.mixed and is_long(operations):
            Pieces(volume, batched, lambda: self._gone).submit()
        else:
            volume.submit(batched)

    def _finish(
        self,
        cookies: Sequence[bytes],
        operations: Sequence[Operation],
        buffer: PooledBuffer,
        errors: Mapping[int, int] | None,
    ) -> None:
        """What ``WriteBatch.finish`` does."""
        buffer.unpin()
        self._done(batch_replies(cookies, operations, errors, self._structured))

    def _done(self, reply: bytes | memoryview) -> None:
        """A request or batch in flight is answered: now, or with others if more is in flight."""
        self._in_flight -= 1
        if self._gone:
            self._depart_if_done()
            return
        self._out.append(reply)
        if self._working:
            if not self._transmission.reads:  # else one send has both
                self._send()
            return
        if not self._in_flight:
            self._flush()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        if self._out and not self._gone:
            self._send()
            self._close_if_done()

    def _read(self, reads: list[Read]) -> None:
        """Read into the server's reply buffer, each behind its header; what has to wait goes to a thread."""
        volume, view = self._volume, self._host.reply_view
        assert volume is not None
        read_into = volume.read_into
        filled = 0
        structured = self._structured
        header = REPLY_HEADER if structured else nbd.SIMPLE_REPLY.size
        pack_into, simple_pack_into = nbd.DATA_CHUNK.pack_into, nbd.SIMPLE_DATA.pack_into
        for cookie, offset, length in reads:
            body = filled + header
            after = body + length
            if after > REPLY_BUFFER:
                self._read_in_thread(cookie, offset, length)
                continue
            try:
                read_into(offset, view[body:after])
            except BlockingIOError:
                self._read_in_thread(cookie, offset, length)
                continue
            except (OSError, TandemDiskError) as error:
                self._out.append(self._failure(cookie, error, "read"))
                continue
            if structured:
                pack_into(view, filled, nbd.DATA_CHUNK_HEAD, cookie, length + 8, offset)
            else:
                simple_pack_into(view, filled, nbd.SIMPLE_OK, cookie)
            self.counters.bytes_read += length
            filled = after
        self.counters.reads += len(reads)
        if filled:
            self._out.append(view[:filled])
            self._scratched = True

    def _failure(self, cookie: bytes, error: BaseException, what: str) -> bytes:
        if not isinstance(error, OSError):
            _log.warning("nbd client %s: a %s failed: %s", self._peer, what, error)
        return errno_reply(cookie, getattr(error, "errno", None), self._structured)

    def _read_in_thread(self, cookie: bytes, offset: int, length: int) -> None:
        volume = self._volume
        assert volume is not None
        header = REPLY_HEADER if self._structured else nbd.SIMPLE_REPLY.size
        reply = memoryview(bytearray(header + length))
        if self._structured:
            nbd.DATA_CHUNK.pack_into(reply, 0, nbd.DATA_CHUNK_HEAD, cookie, length + 8, offset)
        else:
            reply[:header] = nbd.SIMPLE_OK + cookie
        self.counters.bytes_read += length
        self._in_thread(cookie, length, reply, partial(volume.read_blocking, offset, reply[header:]))

    def _in_thread(self, cookie: bytes, length: int, reply: bytes | memoryview, work: Callable[[], None]) -> None:
        """Run ``work`` in a thread, then send ``reply``, or the error that it ended with."""
        cost = max(length, LEAST_DEFERRED)
        self._defer(cost)
        future = self._loop.run_in_executor(self._host.executor, work)
        future.add_done_callback(partial(self._thread_done, cookie, cost, reply))

    def _defer(self, cost: int) -> None:
        """A request is with a thread from now on, until ``_deferred_done``."""
        self._in_flight += 1
        self._deferred += cost
        if self._deferred > MAX_DEFERRED:
            self._block(Block.DEFERRED)

    def _deferred_done(self, cost: int, reply: bytes | memoryview) -> None:
        self._deferred -= cost
        self._done(reply)
        if self._deferred <= MAX_DEFERRED:
            self._unblock(Block.DEFERRED)

    def _thread_done(self, cookie: bytes, cost: int, reply: bytes | memoryview, future: asyncio.Future[None]) -> None:
        error = None if future.cancelled() else future.exception()
        if future.cancelled() or error:
            reply = self._failure(cookie, error or OSError(nbd.NBD_EIO, "cancelled"), "read in a thread")
        self._deferred_done(cost, reply)

    def _command(self, command: Command) -> None:
        """Everything that is neither read nor write-like."""
        kind, cookie, offset, length, flags = command
        volume = self._volume
        assert volume is not None
        if kind == nbd.NBD_CMD_DISC:
            self._block(Block.CLOSING)
        elif kind == nbd.NBD_CMD_FLUSH:
            self.counters.flushes += 1
            self._defer(LEAST_DEFERRED)
            volume.flush(partial(self._flushed, cookie))
        elif kind == nbd.NBD_CMD_CACHE:
            self.counters.others += 1
            length = min(length, limits.MAX_PAYLOAD)
            reply = empty_reply(cookie, kind, self._structured)
            self._in_thread(cookie, length, reply, partial(read_through, volume, offset, length))
        else:
            assert kind == nbd.NBD_CMD_BLOCK_STATUS
            self.counters.others += 1
            length = min(length, STATUS_SPAN)
            try:
                extents = volume.block_status(offset, length)
            except (OSError, TandemDiskError) as error:
                self._out.append(self._failure(cookie, error, "block status"))
            else:
                one = bool(flags & nbd.NBD_CMD_FLAG_REQ_ONE)
                self._out.append(block_status_reply(cookie, length, one, extents))
            self._block(Block.TURN)  # a fragmented file makes it the longest of all requests

    def _flushed(self, cookie: bytes, number: int) -> None:
        reply = errno_reply(cookie, number, self._structured) if number else nbd.SIMPLE_OK + cookie
        self._deferred_done(LEAST_DEFERRED, reply)

    # Sending

    def _send(self) -> None:
        """Send what the socket takes; wait for room for the rest, and read nothing meanwhile."""
        out = self._out
        if self._writing:
            return
        try:
            while out:
                if len(out) == 1:
                    first = out[0]
                    sent = self._socket.send(first)
                    if sent == len(first):
                        out.clear()
                        break
                    out[0] = memoryview(first)[sent:]
                else:
                    _trim(out, self._socket.sendmsg(out[:IOV]))
        except (BlockingIOError, InterruptedError):
            self._wait_for_room()
        except OSError as error:
            self._lose(f"the connection broke: {error.strerror or error}")
            return
        self._scratched = False

    def _wait_for_room(self) -> None:
        if self._scratched:
            self._held = self._host.reply_view
            self._host.replace_reply_view()
        self._writing = True
        self._block(Block.SENDING)
        self._loop.add_writer(self._socket, self._writable)

    def _writable(self) -> None:
        self._writing = False
        self._loop.remove_writer(self._socket)
        self._send()
        if self._writing or self._gone:
            return
        self._give_back_held()
        self._unblock(Block.SENDING)
        self._close_if_done()

    def _give_back_held(self) -> None:
        if self._held is not None:
            self._host.give_back_reply_view(self._held)
            self._held = None

    # Handshake

    def _haggle(self) -> None:
        handshake = self._handshake
        assert handshake is not None
        used = -1
        rounds = 0
        breach = None
        while used and not self._blocked and not self._gone:
            if rounds == HAGGLES:
                self._block(Block.TURN)
                break
            rounds += 1
            try:
                used = handshake.receive(self._view[self._start : self._filled])
            except NbdError as error:
                breach, used = str(error), 0
            self._start += used
            output = handshake.take_output()
            if output:
                self._out.append(output)
                self._send()
        if breach is not None:
            self._lose(f"it broke the protocol: {breach}", breach=True)
        if self._gone:
            return
        if self._blocked & Block.TURN:
            self._unblock(Block.TURN)
            return
        if handshake.agreement is not None:
            self._enter(handshake.agreement)
        elif handshake.state is State.ENDED:
            self._block(Block.CLOSING)
            self._close_if_done()
        else:
            self._make_room(MAX_OPTION + nbd.OPTION.size)

    def _enter(self, agreement: Agreement) -> None:
        """The handshake is over: from now on this is a client of one volume."""
        volume = self._host.volumes[agreement.name]
        self._handshake = None
        self._handshake_timer.cancel()
        try:
            volume.client_connected()
        except (OSError, TandemDiskError) as error:
            self._lose(f"the volume takes no client now: {error}", breach=True)
            return
        self._volume = volume
        self._structured = agreement.structured
        self._transmission = Transmission(
            volume.size,
            read_only=volume.read_only,
            structured=agreement.structured,
            allocation=agreement.allocation,
            reply_space=REPLY_BUFFER,
        )
        _log.info("nbd client %s uses the export %r", self._peer, agreement.name)
        if self._host.paused:
            self._block(Block.PAUSED)
        self._work()

    def _too_slow(self) -> None:
        self._lose(f"it did not finish the handshake within {HANDSHAKE_TIMEOUT_S:g} s", breach=True)

    # The end

    def _close_if_done(self) -> None:
        if self._blocked & Block.CLOSING and not self._in_flight and not self._out and not self._gone:
            self._lose("")

    def _lose(self, reason: str, *, breach: bool = False) -> None:
        """Close the socket. What is in flight finishes by itself and is not answered any more."""
        if self._gone:
            return
        self._gone = True
        self._blocked |= Block.CLOSING  # also of what is in the buffer already nothing more is done
        if reason:
            _log.log(logging.WARNING if breach else logging.INFO, "nbd client %s is cut off: %s", self._peer, reason)
        self._handshake_timer.cancel()
        self._patience.stop()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._out.clear()
        self._give_back_held()
        if self._buffer is not None:
            self._buffer.unpin()
            self._buffer = None
        self._depart_if_done()

    def _depart_if_done(self) -> None:
        if self._in_flight:
            return
        if self._volume is not None:
            self._volume.client_gone()
            self._volume = None
        self._host.forget(self)


def _trim(out: list[bytes | memoryview], sent: int) -> None:
    """Drop the first ``sent`` bytes of ``out``."""
    whole = 0
    while whole < len(out) and sent >= len(out[whole]):
        sent -= len(out[whole])
        whole += 1
    del out[:whole]
    if sent:
        out[0] = memoryview(out[0])[sent:]
