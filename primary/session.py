"""The primary's end of the replication stream, without sockets and clocks.

The shell feeds it frames and the time, and carries out the effects (``primary.effects``) that come back, in order.
In every list the ``Send``s with sequence numbers come first: whoever handles another effect may call ``write`` at once.

    IDLE ──connect──▶ GREETING ──WELCOME, prefix──▶ ESTABLISHED ◀──begin_resync── WELCOMED
      ▲                  │  └─────WELCOME, else──────────────────────────────────────▲
      └──Reconnect── CUT ◀┴── timeout, gap, junk, FAILED, BYE, ``disconnected`` ── any
                      └ REFUSE: REFUSED, tried again slowly

Who has the unacknowledged writes?
* *Attached* (``attached``): every write goes through ``write``. It is in the window until the secondary has it.
* A cut does not detach. The window keeps what is unacknowledged, ``write`` goes on accepting, and the next session on
  the same stream replays what the secondary has not received. Nothing becomes dirty, nothing is resynchronised.
* If the peer stays away for ``peer_timeout_s`` (or is heard but makes no progress for as long after a cut, or cannot
  write its disk, or said BYE) it is *lost*. With ``on_peer_loss = continue`` the session detaches and hands back
  everything it held: the caller marks it dirty and goes on alone. With ``block`` it stays attached, the window fills
  up.
* What was handed back is dirty and will never be replayed: the stream is *broken*, and the next WELCOME leads to a
  resync, never to a replay with a hole in it.
* A WELCOME leads to a replay only if the secondary is at a point of this stream that the window reaches back to
  (``primary.handshake``). Otherwise: ResyncNeeded. What is then still in the window is sent behind the RESYNC.

So a write is at any time in the window, or dirty in the caller's bitmap, or applied by the secondary. Whether what was
applied survives a secondary that loses its memory is the ``Ledger``'s business (primary.window).

``now`` is any monotonic clock in seconds.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Final, Literal

from common import wire
from common.errors import OperationFailed, WireError
from common.generation import CODES, Rejoin, Standing
from common.wire import BATCH, FLUSH, RESIZE, RESYNC, SYNCED, VERIFY, Frame, Frames
from primary.effects import (
    Acknowledged,
    CheckpointFailed,
    Cut,
    Effect,
    Established,
    FlushFailed,
    Lost,
    Outgrown,
    Pressure,
    Reconnect,
    Refused,
    ResyncNeeded,
    Send,
    Starved,
    Verified,
    WindowOpen,
    answers,
    checkpoint_done,
    disappointments,
)
from primary.handshake import Here, Refusal, Replay, Resync, judge
from primary.window import (
    BLOCKS,
    BODY,
    COST,
    KIND,
    Ledger,
    PrimaryStatistics,
    ResizeQuestion,
    Window,
    barrier_entry,
    batch_entry,
    control_entry,
)

RETRY_S: Final = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Pauses before the first, second, ... attempt to reconnect; the last one repeats."""
REFUSED_RETRY_S: Final = 10.0


Report = wire.Checkpointed | wire.Pressure | wire.Verified | wire.Resized | wire.Failed
"""What the secondary tells in order."""


class State(enum.Enum):
    """See the module."""

    IDLE = "idle"
    GREETING = "greeting"
    WELCOMED = "welcomed"
    ESTABLISHED = "established"
    CUT = "cut"
    REFUSED = "refused"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class PrimaryConfig:
    """What does not change while the process lives. ``volumes``: (name, size in bytes), indexed by extents."""

    volumes: tuple[tuple[str, int], ...]
    window_bytes: int
    heartbeat_s: float = 1.0
    peer_timeout_s: float = 5.0
    on_peer_loss: Literal["continue", "block"] = "continue"
    checkpoint_on_pressure: bool = True
    max_lag_s: float = 0.0
    """Treat a secondary that is heard but has not applied the oldest message for so long as lost; 0: never."""


class PrimarySession:
    """See the module.

    ``instance`` is a random u32 that names this process; ``stream`` a random u64 that names a numbering which continues
    at ``next_sequence`` (a process that was stopped cleanly may go on with its stream; any other draws a new one).
    ``bases``: streams of earlier processes -> the sequence from which on this side's bitmaps know every write.
    ``checkpoint``: number of the last checkpoint of this pair. ``broken``: why the stream cannot be continued, if so.
    """

    def __init__(
        self,
        config: PrimaryConfig,
        standing: Standing,
        *,
        instance: int,
        stream: int,
        next_sequence: int = 1,
        checkpoint: int = 0,
        bases: dict[int, int] | None = None,
        ledger: Ledger | None = None,
        broken: str = "",
    ) -> None:
        assert 0 < instance < 1 << 32
        self.config = config
        self.standing = standing
        """Keep it up to date: the next HELLO carries it."""
        self.state = State.IDLE
        self.attached = config.on_peer_loss == "block"
        """True: writes go through ``write``. False: the caller marks them dirty instead."""
        self.syncing = False
        """True from ``begin_resync`` to ``finish_resync``."""
        self.stream = stream
        self.peer: wire.Welcome | None = None
        self._window = Window(config.window_bytes, next_sequence, ledger, config.checkpoint_on_pressure)
        self._window.checkpoint = checkpoint
        self._sizes = tuple(size for _, size in config.volumes)
        self._bases = bases or {}
        self._broken = broken
        self._instance = instance
        self._sessions = 0
        self._session = 0
        self._peer_sequence = 0
        self._heard = 0.0
        self._ping_at = 0.0
        self._retry_at: float | None = None
        self._retries = 0
        self._lost_at: float | None = None
        self._established_at = 0.0
        self._starved = False
        self._refusal = ""
        self._batches = self._payload_bytes = self._replayed = self._cuts = self._stale = 0
        self._round_trip_s = 0.0

    # ------------------------------------------------------------------------------------------------- the volume

    @property
    def window_open(self) -> bool:
        """False: stop reading from clients until a ``WindowOpen`` effect."""
        return not self._window.full

    @property
    def checkpoint_number(self) -> int:
        """Number of the last checkpoint that was sent; 0: none."""
        return self._window.checkpoint

    @property
    def last_sequence(self) -> int:
        """Number of the last message that was sent in the stream."""
        return self._window.next_sequence - 1

    @property
    def applied(self) -> int:
        """Up to here the secondary has said that it has everything."""
        return self._window.applied

    @property
    def recorded(self) -> int:
        """Up to here the secondary's metadata says, durably, that it has everything."""
        return self._window.recorded

    @property
    def idle(self) -> bool:
        """True if nothing is unacknowledged and no flush is awaited."""
        window = self._window
        return not (window.in_flight or window.waiting or window.flushing)

    def pending_extents(self) -> list[Frame]:
        """Packed extents of every batch in the window: with bitmaps and ledger, all that the secondary may lack."""
        window = self._window
        entries = (*window.flushing, *window.in_flight, *window.waiting)
        return [entry[BODY] for entry in entries if entry[KIND] == BATCH]

    def lag_bytes(self) -> int:
        """Bytes that the secondary has not confirmed (payload, extents and headers)."""
        return self._window.used

    def lag_s(self, now: float) -> float:
        """Age of the oldest message that the secondary has not confirmed."""
        oldest = self._window.oldest
        return now - oldest if oldest is not None else 0.0

    def write(self, extents: Frame, payload: Frame, blocks: int, flags: int, pin: Any, now: float) -> list[Frames]:
        """Replicate a batch; returns the messages to send now (none if it has to wait for window, credit or peer).

        ``extents``: packed ``wire.EXTENT``s with positions relative to ``payload`` (bytes that stay as they are until
        the batch comes back). ``blocks``: at least the number of blocks of ``peer.block_size`` that the extents touch.
        ``pin``: anything but None; it comes back exactly once, in Acknowledged, FlushFailed, Lost or Refused. None if
        nobody waits.
        """
        assert self.attached, "a detached session replicates nothing: mark the batch dirty"
        self._batches += 1
        self._payload_bytes += len(payload)
        entry = batch_entry(extents, payload, blocks, flags, pin, now)
        window = self._window
        if self.state is State.ESTABLISHED and blocks <= window.credit and not window.waiting:
            window.used += entry[COST]
            if window.used >= window.limit:
                window.full = True
            return [window.send(self._session, entry)]
        window.wait(entry)
        return self._pump(now)

    def flush(self, pin: Any, now: float) -> list[Frames]:
        """Make everything written so far durable on the secondary; ``pin`` comes back when it is."""
        return self.write(b"", b"", 0, FLUSH, pin, now)

    def checkpoint(self, token: Any, now: float) -> list[Frames]:
        """Put a checkpoint barrier behind everything written so far; ``token`` comes back in CheckpointDone or -Failed.

        OperationFailed if there is no secondary to take it, or it is being synchronised.
        """
        if not self.attached:
            raise OperationFailed("There is no checkpoint to take: the secondary is not connected.")
        if self.syncing or self.state is State.WELCOMED:
            raise OperationFailed("No checkpoint can be taken while the secondary is being synchronised.")
        return self._barrier(token, now)

    def verify(self, questions: bytes, token: Any, now: float) -> list[Frames]:
        """Ask whether the secondary disk holds what packed ``wire.QUESTION``s say; ``token`` comes back in Verified.

        The hashes must be those of the primary disk's contents after all that was written so far, and nothing else.
        """
        assert self.attached
        self._window.wait(control_entry(VERIFY, (questions, token), now))
        return self._pump(now)

    # ------------------------------------------------------------------------------------------------- the sizes

    def resize(self, sizes: tuple[int, ...], token: Any, now: float, *, exact: bool) -> list[Frames]:
        """Ask the secondary to grow the volumes to ``sizes``, or with ``exact`` False to as many of them as it has;
        ``token`` comes back in Resized.

        Nothing may be sent beyond the old sizes before ``grown``. OperationFailed as in ``checkpoint``.
        """
        if not self.attached or self.syncing or self.state is State.WELCOMED:
            raise OperationFailed("Nothing can be resized while the secondary is not connected and in line.")
        self._window.wait(control_entry(RESIZE, ResizeQuestion(sizes, token, exact=exact), now))
        return self._pump(now)

    def grown(self, sizes: tuple[int, ...]) -> None:
        """This side has ``sizes``, durably."""
        assert all(size >= before for size, before in zip(sizes, self._sizes, strict=True))
        self._sizes = sizes

    def refuse(self, sentence: str, now: float) -> list[Effect]:
        """The volumes of the secondary are larger, and this side has no room for that."""
        return self._refuse("size", sentence, now)

    def _outgrown(self, sizes: tuple[int, ...], now: float) -> list[Effect]:
        if len(sizes) != len(self._sizes) or any(there < here for there, here in zip(sizes, self._sizes, strict=True)):
            raise WireError(f"it welcomes a primary with volumes of {self._sizes} bytes, and has {sizes}")
        return [*self._cut("its volumes are larger", now), Outgrown(sizes)]

    # ------------------------------------------------------------------------------------------------- the resync

    def begin_resync(self, *, full: bool, keep_checkpoint: bool, now: float) -> list[Effect]:
        """Answer to ResyncNeeded. From here on writes go in-stream; the caller sends what differs by ``write`` with
        RESYNC_DATA and ends with ``finish_resync``. ``keep_checkpoint`` needs room in the pool for all that differs."""
        assert self.state is State.WELCOMED
        assert self.peer is not None
        same_stream = self.peer.stream == self.stream
        dropped = self._window.rebase(self.peer.received if same_stream else 0, self.peer.syncing)
        effects = disappointments(dropped, "the secondary has to be synchronised first")
        self._window.sync_open = True
        self._broken = ""
        self.attached = self.syncing = True
        self.state = State.ESTABLISHED
        keep = keep_checkpoint and self.peer.standing.consistent
        self._window.waiting.appendleft(control_entry(RESYNC, [self.stream, full, keep], now))
        return [*map(Send, self._pump(now)), *effects]

    @property
    def in_resync(self) -> bool:
        """Between RESYNC and SYNCED in the stream: what waits to be sent may lie there still when ``syncing`` does
        not."""
        return self._window.sync_open

    def give_up_checkpoint(self, now: float) -> list[Frames]:
        """The pool is too small for this resync: tell the secondary to drop its checkpoint and stop copying."""
        assert self._window.sync_open
        self._starved = False
        self._window.waiting.appendleft(control_entry(RESYNC, [self.stream, False, False], now))
        return self._pump(now)

    def finish_resync(self, token: Any, now: float) -> list[Frames]:
        """All that differed has been given to ``write``: the secondary is complete at this point, and takes a
        checkpoint there (``token`` comes back in CheckpointDone)."""
        assert self.syncing
        self.syncing = False
        self._window.wait(control_entry(SYNCED, self.standing.history, now))
        return self._barrier(token, now)

    # --------------------------------------------------------------------------------------------- the connection

    def connect(self, now: float) -> list[Effect]:
        """The shell has a fresh socket: greet the peer on it."""
        assert self.state is not State.CLOSED
        self._sessions += 1
        self._session = self._instance << 32 | self._sessions
        self._peer_sequence = 0
        self._heard = now
        self._ping_at = now + self.config.heartbeat_s
        self._retry_at = None
        self.state = State.GREETING
        hello = wire.Hello(self._session, 0, wire.PROTOCOL_VERSION, self.stream, self._window.next_sequence,
                           self._volumes(), self.standing)
        return [Send(wire.encode(hello))]

    def _volumes(self) -> tuple[tuple[str, int], ...]:
        return tuple((name, size) for (name, _), size in zip(self.config.volumes, self._sizes, strict=True))

    def disconnected(self, reason: str, now: float) -> list[Effect]:
        """The shell knows that the connection is gone."""
        return self._cut(reason, now) if self._connected else []

    def lost(self, reason: str, now: float) -> list[Effect]:
        """Give the peer up by decision of the caller (congestion, shutdown): as if it were lost."""
        return [*self._cut(reason, now), *self._lose(reason, now)]

    def lead_alone(self, reason: str) -> None:
        """Before the first write: whatever ``on_peer_loss`` says, an operator decided that this side goes on without
        the other one. Writes are the caller's until the next resync."""
        assert self.idle
        self._detach(reason)

    def close(self, reason: str) -> list[Effect]:
        """Say BYE. What is unacknowledged is handed back in ``Lost`` (empty if ``idle``)."""
        effects: list[Effect] = []
        if self._connected:
            effects.append(Send(wire.encode(wire.Bye(self._session, 0, reason))))
        self.state = State.CLOSED
        return [*effects, *self._hand_back(reason, always=True)]

    def receive(self, frames: Frames, now: float) -> list[Effect]:
        """Take one message from the socket."""
        try:
            ack = wire.ack_of(frames)
            message = wire.decode(frames) if ack is None else ack
            if message.session != self._session or not self._connected:
                self._stale += 1
                return []
            self._heard = now
            if ack is not None:
                return self._on_ack(ack, now) if self._in_order(ack.sequence) else []
            return self._on_message(message, now)
        except WireError as error:
            return self._cut(f"the secondary sent something impossible: {error}", now) if self._connected else []

    def next_deadline(self) -> float | None:
        """When ``handle_timer`` has to be called at the latest; None: not before something else happens."""
        deadlines = [t for t in (self._retry_at, self._lost_at) if t is not None]
        if self._connected:
            deadlines.append(self._heard + self.config.peer_timeout_s)
        if self._streaming:
            deadlines.append(self._ping_at)
            if self.config.max_lag_s and self._window.oldest is not None:
                deadlines.append(self._window.oldest + self.config.max_lag_s)
        return min(deadlines, default=None)

    def handle_timer(self, now: float) -> list[Effect]:
        """Do what is due by ``now``."""
        effects: list[Effect] = []
        due = self.next_deadline()
        if due is not None and self._connected and now - due >= self.config.peer_timeout_s / 2:
            # This process stood still, not the secondary: it is judged by what comes from now on. It may have been
            # promoted meanwhile, and to go on alone before that is heard would be split brain.
            self._heard = now
        if self._connected and now >= self._heard + self.config.peer_timeout_s:
            silence = f"the secondary has not been heard for {now - self._heard:.1f} s"
            greeted = self.state is State.GREETING
            effects += self._cut(silence, now)
            if not greeted:
                effects += self._lose(silence, now)
        if self._streaming and now >= self._ping_at:
            self._ping_at = now + self.config.heartbeat_s
            effects.append(Send(wire.encode(wire.Ping(self._session, self.last_sequence, float(now)))))
        if self._streaming and self.config.max_lag_s and self.lag_s(now) >= self.config.max_lag_s:
            effects += self.lost(f"the secondary is {self.lag_s(now):.1f} s behind", now)
        effects += self._check_starved()
        if self._lost_at is not None and now >= self._lost_at:
            effects += self.lost("the secondary did not come back, or got nothing done, in time", now)
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            effects.append(Reconnect())
        return effects

    def statistics(self) -> PrimaryStatistics:
        """A frozen record for status and metrics."""
        window = self._window
        return PrimaryStatistics(
            self._batches, self._payload_bytes, self._replayed, self._sessions, self._cuts, self._stale, window.used,
            len(window.waiting), len(window.in_flight), window.credit, window.applied, window.durable,
            window.next_sequence - 1, self._round_trip_s,
        )

    # --------------------------------------------------------------------------------------------------- messages

    @property
    def _connected(self) -> bool:
        return self.state in (State.GREETING, State.WELCOMED, State.ESTABLISHED)

    @property
    def _streaming(self) -> bool:
        return self.state in (State.WELCOMED, State.ESTABLISHED)

    def _in_order(self, sequence: int) -> bool:
        """False for a duplicate; WireError for a gap, or for a message that may not come before the WELCOME."""
        if self.state is State.GREETING:
            raise WireError("the session has not begun")
        if sequence <= self._peer_sequence:
            self._stale += 1
            return False
        if sequence != self._peer_sequence + 1:
            raise WireError(f"message {sequence} came where {self._peer_sequence + 1} was due")
        self._peer_sequence = sequence
        return True

    def _on_ack(self, ack: wire.Ack, now: float) -> list[Effect]:
        window = self._window
        if ack.applied >= window.next_sequence:
            raise WireError(f"it acknowledges {ack.applied}, and only {window.next_sequence - 1} was sent")
        before = window.applied, window.durable
        pins, controls = window.acknowledge(ack.applied, ack.durable, ack.recorded, ack.free)
        effects: list[Effect] = []
        if window.waiting:
            effects += map(Send, self._pump(now))
            effects += self._check_starved()
        if controls:
            effects += answers(controls, self._window.asked, now)
        if (window.applied, window.durable) != before:
            self._lost_at = None
            effects.append(Acknowledged(window.applied, window.durable, pins))
        if window.full and window.reopened():
            effects.append(WindowOpen())
        return effects

    def _on_message(self, message: wire.Message, now: float) -> list[Effect]:
        match message:
            case wire.Welcome():
                return self._on_welcome(message, now) if self.state is State.GREETING else []
            case wire.Refuse():
                return self._refuse(message.code, message.sentence, now)
            case wire.Ping():
                if self.state is State.GREETING:
                    raise WireError("it asks for a sign of life where its WELCOME was due")
                if message.sequence != self._peer_sequence:
                    raise WireError(f"it has sent {message.sequence} messages, and {self._peer_sequence} arrived")
                return [Send(wire.encode(wire.Pong(self._session, 0, message.clock)))]
            case wire.Pong():
                self._round_trip_s = max(0.0, now - message.clock)
                return []
            case wire.Bye():
                reason = f"the secondary left: {message.sentence}"
                return [*self._cut(reason, now), *self._lose(reason, now)]
            case wire.Failed() if self.state is State.GREETING:
                return self._cut(message.sentence, now)
            case wire.Checkpointed() | wire.Pressure() | wire.Verified() | wire.Resized() | wire.Failed():
                return self._on_report(message, now) if self._in_order(message.sequence) else []
            case _:
                raise WireError(f"a primary takes no {type(message).__name__}")

    def _on_report(self, message: Report, now: float) -> list[Effect]:
        match message:
            case wire.Checkpointed(barrier=barrier, number=number):
                body = self._window.asked.get(barrier)
                if not isinstance(body, list) or body[0] != number:
                    raise WireError(f"it took checkpoint {number} at {barrier}, where none was asked for")
                del self._window.asked[barrier]
                return [checkpoint_done(body, barrier, message.seconds, now)]
            case wire.Verified(barrier=barrier, differing=differing):
                body = self._window.asked.get(barrier)
                if not isinstance(body, tuple) or len(body[0]) != len(differing) * wire.QUESTION.itemsize:
                    raise WireError(f"it answers a VERIFY at {barrier} that was not asked")
                del self._window.asked[barrier]
                return [Verified(body[1], differing)]
            case wire.Resized(barrier=barrier, sizes=sizes, sentence=sentence):
                body = self._window.asked.get(barrier)
                if not isinstance(body, ResizeQuestion) or len(sizes) != len(self._sizes) or any(
                    not here <= there <= max(here, asked)
                    for here, there, asked in zip(self._sizes, sizes, body.sizes, strict=True)
                ):
                    raise WireError(f"it says that volumes have {sizes} bytes now, at {barrier}, which was not asked")
                body.answer = sizes, sentence
                return []
            case wire.Pressure():
                return self._on_pressure(message, now)
            case wire.Failed():
                return self._on_failed(message, now)

    def _on_pressure(self, message: wire.Pressure, now: float) -> list[Effect]:
        window = self._window
        under_way = window.barrier_in_flight or window.barriers_waiting > 0
        ready = self.state is State.ESTABLISHED and not window.sync_open and not under_way
        if ready and self.config.checkpoint_on_pressure:
            window.put_barrier(now)
            return [*map(Send, self._pump(now)), Pressure(message.used, message.pool, True)]
        return [Pressure(message.used, message.pool, under_way)]

    def _on_failed(self, message: wire.Failed, now: float) -> list[Effect]:
        if message.what == "checkpoint":
            body = self._window.asked.pop(message.barrier, None)
            if not isinstance(body, list):
                raise WireError(f"it failed to take a checkpoint at {message.barrier}, where none was asked for")
            return [CheckpointFailed(body[1], message.sentence)]
        if message.what == "stream":
            return self._cut(f"the secondary ended the session: {message.sentence}", now)
        effects: list[Effect] = []
        if message.what == "flush":
            if message.barrier > self.last_sequence:
                raise WireError(f"it failed to flush {message.barrier}, and only {self.last_sequence} was sent")
            pins, controls = self._window.acknowledge(message.barrier, 0, 0, 0)
            effects += answers(controls, self._window.asked, now)
            effects.append(Acknowledged(self._window.applied, self._window.durable, pins))
            failed = self._window.fail_flushes(message.barrier)
            effects.append(FlushFailed(message.errno, failed, message.sentence))
            # what the kernel could not write is gone from its cache: nobody knows what the secondary disk holds
            self._broken = message.sentence
        return [*effects, *self._cut(message.sentence, now), *self._lose(message.sentence, now)]

    # -------------------------------------------------------------------------------------------------- handshake

    def _on_welcome(self, welcome: wire.Welcome, now: float) -> list[Effect]:
        window = self._window
        # without a ledger the caller's bitmaps know what was handed back, and nothing of what was applied
        base = window.applied if window.ledger is None else window.recorded
        verdict = judge(Here(self.standing, self.stream, window.next_sequence, window.applied, base, self._broken,
                             self._bases), welcome)
        if isinstance(verdict, Refusal):
            bye = Send(wire.encode(wire.Bye(self._session, 0, verdict.sentence)))
            return [bye, *self._refuse(verdict.code, verdict.sentence, now)]
        if welcome.sizes != self._sizes:
            return self._outgrown(welcome.sizes, now)
        wire.unpack_ranges(welcome.own, self._sizes)
        self.peer = welcome
        self._refusal = ""
        self._established_at = now
        window.pool, window.block_size = welcome.pool, welcome.block_size
        window.checkpoint = max(window.checkpoint, welcome.checkpoint)
        self._starved = False
        effects: list[Effect] = []
        if isinstance(verdict, Replay):
            effects = self._resume(welcome, now)
            if self.state is State.ESTABLISHED:
                return effects
            verdict = Resync("the secondary stands in the middle of another resync", True)
        self.state = State.WELCOMED
        return [*effects, ResyncNeeded(verdict.reason, verdict.full, welcome)]

    def _resume(self, welcome: wire.Welcome, now: float) -> list[Effect]:
        """Same stream, exact, within reach: drop what is applied, send again what was not received."""
        window = self._window
        before = window.applied, window.durable
        pins, controls = window.acknowledge(welcome.applied, welcome.durable, welcome.recorded, welcome.free)
        effects = answers(controls, self._window.asked, now, taken=welcome.checkpoint)
        if (window.applied, window.durable) != before:
            effects.append(Acknowledged(window.applied, window.durable, pins))
        if window.peer_syncing != welcome.syncing:
            return effects
        replayed = window.rewind(welcome.received, welcome.free)
        self._replayed += replayed
        self.attached = True
        self.state = State.ESTABLISHED
        if not window.in_flight and not window.waiting:
            self._lost_at = None
        effects[:0] = map(Send, self._pump(now))
        effects.append(Established(replayed, welcome))
        if window.full and window.reopened():
            effects.append(WindowOpen())
        return effects

    # ------------------------------------------------------------------------------------------------------ parts

    def _barrier(self, token: Any, now: float) -> list[Frames]:
        self._window.wait(barrier_entry(token, now))
        return self._pump(now)

    def _pump(self, now: float) -> list[Frames]:
        """Send what waits, as far as session and credit allow."""
        return self._window.pump(self._session, now) if self.state is State.ESTABLISHED else []

    def _check_starved(self) -> list[Effect]:
        """Tell once if nothing can move any more."""
        window = self._window
        stuck = bool(window.waiting) and not window.in_flight and self.state is State.ESTABLISHED
        news = stuck and not self._starved
        self._starved = stuck
        return [Starved(window.waiting[0][BLOCKS], window.credit)] if news else []

    def _cut(self, reason: str, now: float) -> list[Effect]:
        """The session is over; try again after a pause that grows while sessions stay short."""
        if not self._connected:
            return []
        greeted = self.state is State.GREETING
        if not greeted and now - self._established_at >= self.config.peer_timeout_s:
            self._retries = 0
        self._cuts += not greeted
        self.state = State.CUT
        self._retry_at = now + RETRY_S[min(self._retries, len(RETRY_S) - 1)]
        self._retries += 1
        if greeted:
            return []
        if self.attached and self._lost_at is None:
            self._lost_at = min(self._heard, now) + self.config.peer_timeout_s
        return [Cut(reason)]

    def _lose(self, reason: str, now: float) -> list[Effect]:
        self._lost_at = None
        if not self.attached:
            return []
        return self._hand_back(reason, always=self.config.on_peer_loss == "continue")

    def _hand_back(self, reason: str, *, always: bool) -> list[Effect]:
        """Detach: everything that is unacknowledged goes back to the caller, in ``Lost``."""
        if not always:
            return [Lost(reason, [])]
        batches, effects = self._detach(reason)
        return [*effects, Lost(reason, batches)]

    def _detach(self, reason: str) -> tuple[list[Any], list[Effect]]:
        self.attached = self.syncing = False
        self._broken = self._broken or reason
        self._lost_at = None
        batches, controls = self._window.release()
        effects = disappointments(controls, reason)
        if self._window.reopened():
            effects.append(WindowOpen())
        return batches, effects

    def _refuse(self, code: str, sentence: str, now: float) -> list[Effect]:
        self.state = State.REFUSED
        self._retry_at = now + REFUSED_RETRY_S
        again = sentence == self._refusal
        self._refusal = sentence
        batches: list[Any] = []
        effects: list[Effect] = []
        # a secondary that was promoted will never acknowledge what waits for it, whatever on_peer_loss says
        if self.config.on_peer_loss == "continue" or code == CODES[Rejoin]:
            batches, effects = self._detach(sentence)
        return effects if again and not batches else [*effects, Refused(code, sentence, batches)]
