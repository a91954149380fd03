"""What the secondary says, and what follows from it: acknowledgements, answers, complaints, and the WELCOME.

The second third of a ``PrimarySession``. Every message is checked here, once, against what was sent: whatever does not
fit (a gap, an answer to what was not asked, junk) ends the connection, and a new one begins where the secondary stands.
"""

from __future__ import annotations

from common import wire
from common.errors import WireError
from common.wire import Frames
from primary.contact import Contact, State
from primary.effects import (
    Acknowledged,
    CheckpointFailed,
    Effect,
    Established,
    FlushFailed,
    Outgrown,
    Pressure,
    ResyncNeeded,
    Send,
    Unnoted,
    Verified,
    WindowOpen,
    answers,
    checkpoint_done,
)
from primary.handshake import Here, Refusal, Replay, Resync, judge
from primary.window import ResizeQuestion

Report = wire.Checkpointed | wire.Pressure | wire.Verified | wire.Resized | wire.Failed
"""What the secondary tells in order."""


class Intake(Contact):
    """See the module."""

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

    # ------------------------------------------------------------------------------------------------------- handshake

    def _on_welcome(self, welcome: wire.Welcome, now: float) -> list[Effect]:
        if self.beginning:
            return self._cut("a generation begins here", now)
        window = self._window
        # without a ledger the caller's bitmaps know what was handed back, and nothing of what was applied
        base = window.applied if window.ledger is None else window.recorded
        verdict = judge(Here(self.standing, self.stream, window.next_sequence, window.applied, base, self._broken,
                             self.bases), welcome)
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
        if verdict.full and not verdict.lasting and not self.noted():
            return [*effects, *self._cut("it has to be noted that all may differ", now), Unnoted()]
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

    def _outgrown(self, sizes: tuple[int, ...], now: float) -> list[Effect]:
        if len(sizes) != len(self._sizes) or any(there < here for there, here in zip(sizes, self._sizes, strict=True)):
            raise WireError(f"it welcomes a primary with volumes of {self._sizes} bytes, and has {sizes}")
        return [*self._cut("its volumes are larger", now), Outgrown(sizes)]
