"""The primary's unacknowledged messages: what waits, what is in flight, and how much of either is allowed.

Two queues, in stream order:

    waiting     accepted from the volume, no sequence number yet
    in flight   sent in this stream under a sequence number, not yet reported as applied

A message gets its sequence number when it is sent, not when it is accepted. So a checkpoint barrier can be put before a
batch that waits, and after a reconnect everything that the secondary has not received just moves back to ``waiting``.

Two limits hold messages back. The *window* counts bytes over both queues; when it is full the exports stop reading,
but what they had read is still accepted. The *credit* counts blocks: a batch is sent only if the hidden disk is sure to
have room for the old contents of all blocks that it touches. With F free blocks reported at sequence a, the credit is F
minus the blocks of everything sent after a; behind a barrier in flight it is the whole pool minus what was sent behind
that. A batch too large for the pool is cut into several. So the secondary's pool cannot overflow.

Entries are plain tuples, because one is made per batch; their fields are the constants below.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from common import wire
from common.batch import WRITE
from common.wire import BATCH, CHECKPOINT, FLUSH, RESIZE, RESYNC, SYNCED, VERIFY, Frame, Frames

# (sequence, kind, flags, blocks, cost in bytes, extents or body, payload, payload's hash, pin, time of acceptance)
Entry = tuple[int, int, int, int, int, Any, Frame, int, Any, float]
SEQUENCE: Final = 0
KIND: Final = 1
FLAGS: Final = 2
BLOCKS: Final = 3
COST: Final = 4
BODY: Final = 5
PAYLOAD: Final = 6
CHECK: Final = 7
PIN: Final = 8
QUEUED_AT: Final = 9

_OVERHEAD: Final = wire.BATCH_OVERHEAD


class ResizeQuestion:
    """Body of a RESIZE. ``answer``: (sizes, sentence) as in RESIZED, which counts once the ACK that covers it is there:
    with that comes how many blocks may be sent to larger volumes."""

    __slots__ = ("answer", "exact", "sizes", "token")

    def __init__(self, sizes: tuple[int, ...], token: Any, *, exact: bool) -> None:
        self.sizes = sizes
        self.exact = exact
        self.token = token
        self.answer: tuple[tuple[int, ...], str] | None = None


class Unacknowledged(NamedTuple):
    """A batch handed back: the secondary may or may not have it. ``pin`` is the caller's, as given to ``write``."""

    extents: Frame
    flags: int
    pin: Any


class Ledger(Protocol):
    """Keeps account of which blocks the secondary may lack after losing its memory; see ``primary.ledger``."""

    def sent(self, sequence: int, extents: Frame) -> None:
        """A batch goes out under ``sequence``."""

    def barrier(self, sequence: int) -> None:
        """A checkpoint goes out under ``sequence``: a point that ``recorded`` is likely to reach."""

    def recorded(self, sequence: int) -> None:
        """The secondary will remember, whatever happens, that it has everything up to ``sequence``."""


def batch_entry(extents: Frame, payload: Frame, blocks: int, flags: int, pin: Any, now: float) -> Entry:
    """An entry for ``waiting``."""
    return (0, BATCH, flags, blocks, len(extents) + len(payload) + _OVERHEAD, extents, payload,
            wire.payload_check(payload), pin, now)


def control_entry(kind: int, body: Any, now: float) -> Entry:
    """An entry for a message that moves no data: it costs nothing, so that it is never held back by a limit."""
    return (0, kind, 0, 0, 0, body, b"", 0, None, now)


def barrier_entry(token: Any, now: float) -> Entry:
    """A checkpoint; its body: [number, set when it is sent; token; when it was asked for]."""
    return control_entry(CHECKPOINT, [0, token, now], now)


@dataclass(frozen=True, slots=True)
class PrimaryStatistics:
    """Counters since the session object was made, and the state of the window now."""

    batches: int
    payload_bytes: int
    replayed: int
    sessions: int
    cuts: int
    stale_messages: int
    window_bytes: int
    waiting: int
    in_flight: int
    credit_blocks: int
    applied: int
    durable: int
    sequence: int
    round_trip_s: float


class Window:
    """See the module. ``used`` bytes of ``limit`` are taken; ``credit`` blocks may be sent."""

    def __init__(self, limit: int, next_sequence: int, ledger: Ledger | None, auto_barriers: bool) -> None:
        self.limit = limit
        self.used = 0
        self.full = False
        self.waiting: deque[Entry] = deque()
        self.in_flight: deque[Entry] = deque()
        self.flushing: deque[Entry] = deque()
        """Batches with FLUSH that are applied and not yet durable."""
        self.next_sequence = next_sequence
        self.applied = next_sequence - 1
        self.durable = 0
        self.recorded = next_sequence - 1  # the ledger knows nothing of what came before
        self.pool = 0
        self.block_size = 0
        self.credit = 0
        self.blocks_in_flight = 0
        self.barrier = 0
        """Sequence of the last CHECKPOINT sent."""
        self.checkpoint = 0
        """Number of the last CHECKPOINT sent."""
        self.barriers_waiting = 0
        self.auto_barriers = auto_barriers
        self.sync_open = False
        """From the RESYNC's being queued to SYNCED's being sent: no checkpoint may be put in between."""
        self.peer_syncing = False
        """Whether the secondary, at ``applied``, stands between RESYNC and SYNCED."""
        self.asked: dict[int, Any] = {}
        """Bodies of the CHECKPOINTs, VERIFYs and RESIZEs sent and not answered, by sequence."""
        self.ledger = ledger

    @property
    def oldest(self) -> float | None:
        """When the oldest unacknowledged message was accepted; None if there is none."""
        if self.in_flight:
            return self.in_flight[0][QUEUED_AT]
        return self.waiting[0][QUEUED_AT] if self.waiting else None

    @property
    def barrier_in_flight(self) -> bool:
        """True while a CHECKPOINT is sent and not applied."""
        return self.barrier > self.applied

    def wait(self, entry: Entry) -> None:
        """Append to ``waiting``."""
        self.used += entry[COST]
        self.full = self.full or self.used >= self.limit
        self.barriers_waiting += entry[KIND] == CHECKPOINT
        self.waiting.append(entry)

    def put_barrier(self, now: float) -> None:
        """A checkpoint that nobody asked for, ahead of everything that waits."""
        self.barriers_waiting += 1
        self.waiting.appendleft(barrier_entry(None, now))

    def pump(self, session: int, now: float) -> list[Frames]:
        """Send what waits, as far as the credit allows; puts a checkpoint before a batch that needs the room."""
        messages: list[Frames] = []
        while self.waiting:
            entry = self.waiting[0]
            # a message that moves no data is never held back, also when the credit is below zero
            if entry[BLOCKS] > max(self.credit, 0):
                if entry[BLOCKS] > max(1, self.pool // 2) and self._cut_head():
                    continue
                if not self._may_put_barrier():
                    break
                self.put_barrier(now)
                continue
            self.waiting.popleft()
            messages.append(self.send(session, entry))
        return messages

    def _may_put_barrier(self) -> bool:
        """A checkpoint would make room, and none is on its way to do so."""
        if self.barrier_in_flight or self.sync_open or self.credit >= self.pool:
            return False
        return self.auto_barriers or self.barriers_waiting > 0

    def _cut_head(self) -> bool:
        """Replace the batch at the head of ``waiting`` by several that touch at most half a pool each, if it can."""
        entry = self.waiting[0]
        pieces = split(entry, max(1, self.pool // 2), self.block_size)
        if len(pieces) == 1 and pieces[0][BLOCKS] == entry[BLOCKS]:
            return False
        self.waiting.popleft()
        self.used += sum(piece[COST] for piece in pieces) - entry[COST]
        self.waiting.extendleft(reversed(pieces))
        return True

    def send(self, session: int, entry: Entry) -> Frames:
        """Number an entry, put it in flight, encode it. The caller has checked the credit."""
        sequence = self.next_sequence
        self.next_sequence = sequence + 1
        _, kind, flags, blocks, cost, body, payload, check, pin, queued_at = entry
        self.in_flight.append((sequence, kind, flags, blocks, cost, body, payload, check, pin, queued_at))
        self.blocks_in_flight += blocks
        self.credit -= blocks
        if kind == BATCH:
            if self.ledger is not None:
                self.ledger.sent(sequence, body)
            header = wire.encode_batch(session, sequence, flags, body, check)
            return (header, payload) if len(payload) else (header,)
        return self._send_control(session, sequence, kind, body)

    def _send_control(self, session: int, sequence: int, kind: int, body: Any) -> Frames:
        if kind == CHECKPOINT:
            self.barriers_waiting -= 1
            self.barrier = sequence
            self.checkpoint += 1
            body[0] = self.checkpoint
            self.asked[sequence] = body
            self.credit = self.pool
            if self.ledger is not None:
                self.ledger.barrier(sequence)
            return wire.encode(wire.Checkpoint(session, sequence, self.checkpoint))
        if kind == RESYNC:
            return wire.encode(wire.Resync(session, sequence, *body))
        if kind == SYNCED:
            self.sync_open = False
            return wire.encode(wire.Synced(session, sequence, body))
        self.asked[sequence] = body
        if kind == RESIZE:
            body.answer = None
            return wire.encode(wire.Resize(session, sequence, body.sizes, body.exact))
        assert kind == VERIFY
        return wire.encode(wire.Verify(session, sequence, body[0]))

    def acknowledge(self, applied: int, durable: int, recorded: int, free: int) -> tuple[list[Any], list[Entry]]:
        """Take note of an ACK. Returns the pins of batches that are done, and the control entries that are applied.

        Numbers that go back are ignored (they are cumulative); the caller has checked that they do not run ahead.
        """
        pins: list[Any] = []
        controls: list[Entry] = []
        in_flight = self.in_flight
        while in_flight and in_flight[0][SEQUENCE] <= applied:
            entry = in_flight.popleft()
            self.used -= entry[COST]
            self.blocks_in_flight -= entry[BLOCKS]
            if entry[KIND] != BATCH:
                self.peer_syncing = entry[KIND] == RESYNC or (entry[KIND] != SYNCED and self.peer_syncing)
                controls.append(entry)
            elif entry[FLAGS] & FLUSH and entry[SEQUENCE] > durable:
                self.flushing.append(entry)
            elif entry[PIN] is not None:
                pins.append(entry[PIN])
        if applied >= self.applied:
            self.applied = applied
            if applied >= self.barrier:
                self.credit = free - self.blocks_in_flight
        if durable > self.durable:
            self.durable = durable
            while self.flushing and self.flushing[0][SEQUENCE] <= durable:
                pin = self.flushing.popleft()[PIN]
                if pin is not None:
                    pins.append(pin)
        if recorded > self.recorded:
            self.recorded = recorded
            if self.ledger is not None:
                self.ledger.recorded(recorded)
        return pins, controls

    def reopened(self) -> bool:
        """True once, when a full window has drained to its half."""
        if self.full and self.used <= self.limit // 2:
            self.full = False
            return True
        return False

    def rewind(self, received: int, free: int) -> int:
        """A new session on the same stream: what comes after ``received`` waits again. Returns how many messages."""
        count = 0
        while self.in_flight and self.in_flight[-1][SEQUENCE] > received:
            entry = self.in_flight.pop()
            self.blocks_in_flight -= entry[BLOCKS]
            self.asked.pop(entry[SEQUENCE], None)
            self.barriers_waiting += entry[KIND] == CHECKPOINT
            self.sync_open = self.sync_open or entry[KIND] == SYNCED
            self.waiting.appendleft((0, *entry[1:]))
            count += 1
        self.next_sequence = received + 1
        behind = 0
        self.barrier = 0
        for entry in self.in_flight:
            behind += entry[BLOCKS]
            if entry[KIND] == CHECKPOINT:
                self.barrier, behind = entry[SEQUENCE], 0
        self.credit = (self.pool if self.barrier else free) - behind
        if self.flushing:
            # the secondary may have been restarted between applying and flushing; or in the middle of the first batch
            # that it gets again, which then keeps its number, as the secondary knows it by that
            again = batch_entry(b"", b"", 0, FLUSH, None, self.flushing[0][QUEUED_AT])
            self.waiting.insert(1 if count else 0, again)
        return count

    def rebase(self, received: int, peer_syncing: bool) -> list[Entry]:
        """A resync begins: everything waits again, to be sent behind the RESYNC under new numbers.

        Barriers, questions and the messages of an earlier resync are taken out and returned. Batches that wait to
        become durable are flushed again, not sent again: newer ones behind them may be done, and must not be
        overwritten. If the secondary forgot them they are dirty, and there as soon as the resync ends.
        """
        following = self.next_sequence
        self.rewind(self.applied, 0)
        controls = [entry for entry in self.waiting if entry[KIND] != BATCH]
        self.waiting = deque(entry for entry in self.waiting if entry[KIND] == BATCH)
        self.next_sequence = max(following, received + 1)
        self.applied = self.next_sequence - 1
        self.peer_syncing = peer_syncing
        self.credit = self.barriers_waiting = 0
        self.asked.clear()
        return controls

    def release(self) -> tuple[list[Unacknowledged], list[Entry]]:
        """Give everything up: the batches, and the control entries that nobody will answer."""
        entries = [*self.flushing, *self.in_flight, *self.waiting]
        self.flushing.clear()
        self.in_flight.clear()
        self.waiting.clear()
        self.asked.clear()
        self.used = self.blocks_in_flight = self.barrier = self.barriers_waiting = 0
        self.sync_open = False
        batches = [Unacknowledged(e[BODY], e[FLAGS], e[PIN]) for e in entries if e[KIND] == BATCH]
        return batches, [entry for entry in entries if entry[KIND] != BATCH]

    def fail_flushes(self, sequence: int) -> list[Any]:
        """A flush failed at ``sequence``: the pins of every batch up to it that waits to become durable."""
        failed = [e for e in self.flushing if e[SEQUENCE] <= sequence]
        self.flushing = deque(e for e in self.flushing if e[SEQUENCE] > sequence)
        return [entry[PIN] for entry in failed if entry[PIN] is not None]


def split(entry: Entry, blocks: int, block_size: int) -> list[Entry]:
    """Cut a batch into batches that touch at most ``blocks`` blocks each; flags and pin go to the last one."""
    groups: list[list[tuple[int, int, int, int, int, int]]] = [[]]
    room = blocks
    for offset, length, position, volume, kind, flags, _ in wire.EXTENT_STRUCT.iter_unpack(entry[BODY]):
        while length:
            if not room:
                groups.append([])
                room = blocks
            piece = min(length, room * block_size - offset % block_size)
            groups[-1].append((offset, piece, position, volume, kind, flags))
            room -= (offset % block_size + piece + block_size - 1) // block_size
            offset += piece
            length -= piece
            position += piece if kind == WRITE else 0
    last = len(groups) - 1
    return [_piece(entry, group, blocks, block_size, index == last) for index, group in enumerate(groups)]


def _piece(
    entry: Entry, group: list[tuple[int, int, int, int, int, int]], blocks: int, block_size: int, last: bool
) -> Entry:
    data = [(position, position + length) for _, length, position, _, kind, _ in group if kind == WRITE]
    start = min((begin for begin, _ in data), default=0)
    end = max((finish for _, finish in data), default=0)
    payload = memoryview(entry[PAYLOAD])[start:end]
    extents = b"".join(
        wire.EXTENT_STRUCT.pack(offset, length, position - start if kind == WRITE else 0, volume, kind, flags, 0)
        for offset, length, position, volume, kind, flags in group
    )
    touched = sum((offset % block_size + length + block_size - 1) // block_size for offset, length, *_ in group)
    assert touched <= blocks
    flags = entry[FLAGS] if last else entry[FLAGS] & ~FLUSH
    return (0, BATCH, flags, touched, len(extents) + len(payload) + _OVERHEAD, extents, payload,
            wire.payload_check(payload), entry[PIN] if last else None, entry[QUEUED_AT])
