"""The secondary's end of the replication stream, without sockets, disks and clocks.

The shell feeds it frames with the ZeroMQ identity they came from, and the time. Of the effects that come back it
carries out ``Send`` at once, and puts the *work* (Apply, Checkpoint, BeginResync, EndResync, Verify) in one queue that
it does strictly in order, reporting each as done by the method that its class names. The queue belongs to no session:
work handed out is done even if the connection it came over is gone, because WELCOME tells the next session that it was
received.

    handed out:  applied ── at work ──▶ received        the next message must be received + 1
    WELCOME:     "applied" may be forgotten by the primary, up to "received" need not be sent again

One primary at a time. A HELLO of the pair's other side always begins a new session and supersedes the old one, unless
it is an older HELLO of the same process that was overtaken; whatever still arrives for another session is dropped, and
its sender is told once that it is not listened to. Inside a session a message that was received before is dropped, a
gap or an impossible message ends it (FAILED to the primary, which reconnects and replays): nothing after a bad message
is applied.

A primary that follows another stream than the one applied here, or a disk that is not ``exact``, needs a RESYNC before
anything else is accepted. With RESYNC the numbering jumps; work of the old numbering that is still in the queue is
done, but no longer counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common import wire
from common.errors import WireError
from common.generation import CODES, History, InSync, PrimaryAhead, Rejoin, Standing, decide
from common.limits import PRESSURE_PERCENT
from common.wire import Frame
from secondary.effects import (
    Apply as Apply,
)
from secondary.effects import (
    Asked as Asked,
)
from secondary.effects import (
    BeginResync as BeginResync,
)
from secondary.effects import (
    Checkpoint as Checkpoint,
)
from secondary.effects import (
    Connected as Connected,
)
from secondary.effects import (
    Disconnected as Disconnected,
)
from secondary.effects import (
    Effect as Effect,
)
from secondary.effects import (
    EndResync as EndResync,
)
from secondary.effects import (
    Grow as Grow,
)
from secondary.effects import (
    Refused as Refused,
)
from secondary.effects import (
    Resize as Resize,
)
from secondary.effects import (
    Send as Send,
)
from secondary.effects import (
    Verify as Verify,
)
from secondary.effects import (
    Work as Work,
)


class Point(NamedTuple):
    """A place in a stream."""

    stream: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Position:
    """Where a secondary stands; what it keeps in its header and metadata, and starts from.

    ``exact``: the secondary disk is precisely at ``applied``. A secondary that finds only its metadata (its header was
    in the memory of a host that went down) starts with ``applied = durable = recorded`` and ``exact = False``.
    """

    stream: int = 0
    applied: int = 0
    durable: int = 0
    recorded: int = 0
    checkpoint: int = 0
    exact: bool = True
    syncing: bool = False


@dataclass(frozen=True, slots=True)
class SecondaryConfig:
    """What does not change while the process lives. ``pool_blocks``: the smallest volume's hidden pool."""

    volumes: tuple[tuple[str, int], ...]
    block_size: int
    pool_blocks: int
    heartbeat_s: float = 1.0
    peer_timeout_s: float = 5.0


@dataclass(frozen=True, slots=True)
class SecondaryStatistics:
    """Counters since the session object was made."""

    batches: int
    payload_bytes: int
    sessions: int
    stale_messages: int
    duplicates: int
    at_work: int
    applied: int
    received: int


class SecondarySession:
    """See the module."""

    def __init__(self, config: SecondaryConfig, standing: Standing, position: Position, *, free_blocks: int) -> None:
        self.config = config
        self.standing = standing
        """Keep it up to date: role ``primary`` after a promotion, the history after EndResync."""
        self.own = b""
        """Packed wire.RANGEs that this side wrote before it rejoined; goes with the end of the next resync."""
        self._stream = position.stream
        self._applied = position.applied
        self._durable = position.durable
        self._recorded = position.recorded
        self._checkpoint = self._checkpoint_received = position.checkpoint
        self._exact = position.exact
        self._syncing = position.syncing
        self._sizes = tuple(size for _, size in config.volumes)
        self._growing: wire.Hello | None = None
        """Asks for more than there is; room is being made."""
        self._unfit: tuple[tuple[int, ...], str] = ((), "")
        """Sizes for which there is no room, and why."""
        self._told = (position.applied, position.durable, position.recorded, free_blocks)
        """What the last ACK said, or would have said: a free count belongs to exactly one applied."""
        self._received = position.applied
        self._work: deque[int] = deque()
        """Sequences of what was handed out."""
        self._uncounted = 0
        """How many of these, from the left, belong to a numbering that has been left since."""
        self._aligned = False
        self._peer = b""
        self._session = 0
        self._greeted = 0
        """The last session that began, whether it goes on or not."""
        self._following = 0
        """The primary's next number as it greeted: all that it sends in the session has that number or a later one."""
        self._sequence = 0
        self._heard = 0.0
        self._ping_at = 0.0
        self._pressure_told = False
        self._told_off: tuple[bytes, int] = (b"", 0)
        self._holding = False
        self._batches = self._payload_bytes = self._sessions = self._stale = self._duplicates = 0

    # --------------------------------------------------------------------------------------------------- messages

    @property
    def position(self) -> Position:
        """Where the secondary stands now, by what was reported as done."""
        return Position(self._stream, self._applied, self._durable, self._recorded, self._checkpoint, self._exact,
                        self._syncing)

    @property
    def connected(self) -> bool:
        """True while a primary is in session."""
        return self._session != 0

    def receive(self, peer: bytes, frames: Sequence[Frame], now: float) -> list[Effect]:
        """Take one message that came from the ZeroMQ identity ``peer``."""
        if peer != self._peer and wire.is_compressed(frames):
            self._stale += 1
            return []
        try:
            message = wire.decode(frames)
        except WireError as error:
            if self._session and peer == self._peer:
                return self._end(f"the primary sent something impossible: {error}")
            self._stale += 1
            return []
        if isinstance(message, wire.Hello):
            return self._on_hello(peer, message, now)
        if isinstance(message, wire.Ask):
            return [Asked(peer, message)]
        if message.session != self._session or peer != self._peer:
            return self._tell_off(peer, message)
        self._heard = now
        if self._holding and not isinstance(message, wire.Ping | wire.Bye):
            return []
        try:
            if isinstance(message, wire.Batch):
                return self._on_batch(message)
            return self._on_message(message)
        except WireError as error:
            return self._end(str(error))

    def _on_batch(self, batch: wire.Batch) -> list[Effect]:
        if not self._in_order(batch.sequence):
            return []
        extents = wire.unpack_extents(batch.extents, len(batch.payload), self._sizes)
        self._batches += 1
        self._payload_bytes += len(batch.payload)
        self._hand_out(batch.sequence)
        return [Apply(batch.sequence, batch, bool(batch.flags & wire.FLUSH), extents)]

    def _on_message(self, message: wire.Message) -> list[Effect]:
        match message:
            case wire.Ping():
                if self._aligned and message.sequence != self._received and not self._holding:
                    raise WireError(f"messages up to {message.sequence} were sent, and {self._received} was the last")
                if not self._aligned and message.sequence >= self._following and not self._holding:
                    raise WireError(f"messages up to {message.sequence} were sent, and no RESYNC arrived")
                return [self._send(wire.Pong(self._session, 0, message.clock))]
            case wire.Pong():
                return []
            case wire.Bye():
                self._session = 0
                return [Disconnected(f"the primary left: {message.sentence}", True)]
            case wire.Resync():
                return self._on_resync(message)
            case wire.Checkpoint() | wire.Synced() | wire.Verify() | wire.Resize():
                return self._on_ordered(message)
            case _:
                raise WireError(f"a secondary takes no {type(message).__name__}")

    def _on_ordered(self, message: wire.Checkpoint | wire.Synced | wire.Verify | wire.Resize) -> list[Effect]:
        sequence = message.sequence
        if not self._in_order(sequence):
            return []
        work: Checkpoint | EndResync | Verify | Resize
        match message:
            case wire.Checkpoint(number=number):
                if number <= self._checkpoint_received:
                    raise WireError(f"checkpoint {number} was asked for after checkpoint {self._checkpoint_received}")
                self._checkpoint_received = number
                work = Checkpoint(sequence, number)
            case wire.Synced(history=history):
                if not history:
                    raise WireError("a resync cannot end without a generation")
                work = EndResync(sequence, history)
            case wire.Verify(questions=questions):
                wire.check_questions(questions, self._sizes)
                work = Verify(sequence, questions)
            case wire.Resize(sizes=sizes, exact=exact):
                if len(sizes) != len(self._sizes):
                    raise WireError(f"{len(sizes)} volumes were to be resized, and there are {len(self._sizes)}")
                work = Resize(sequence, sizes, exact)
        self._hand_out(sequence)
        return [work]

    def _on_resync(self, message: wire.Resync) -> list[Effect]:
        """The numbering jumps to the message's own number. Everything before it counts as applied."""
        if not message.sequence:
            raise WireError("a RESYNC without a number: they begin with 1")
        same = message.stream == self._stream
        if same and message.sequence <= self._received:
            self._duplicates += 1
            return []
        if not same or message.sequence != self._received + 1 or not self._aligned:
            self._uncounted = len(self._work)
            self._applied = message.sequence - 1
            if not same:
                self._stream = message.stream
                self._durable = self._recorded = 0
            self._told = (self._applied, self._durable, self._recorded, 0)
        self._aligned = True
        self._hand_out(message.sequence)
        return [BeginResync(message.sequence, message.stream, message.full, message.keep_checkpoint)]

    def _hand_out(self, sequence: int) -> None:
        self._received = sequence
        self._work.append(sequence)

    def _in_order(self, sequence: int) -> bool:
        """False for a message received before; WireError for a gap."""
        if not self._aligned:
            raise WireError("this disk stands at another place than the stream: a resync has to come first")
        if sequence <= self._received:
            self._duplicates += 1
            return False
        if sequence != self._received + 1:
            raise WireError(f"message {sequence} came where {self._received + 1} was due")
        return True

    # -------------------------------------------------------------------------------------------------- handshake

    def _on_hello(self, peer: bytes, hello: wire.Hello, now: float) -> list[Effect]:
        if hello.session >> 32 == self._greeted >> 32 and hello.session <= self._greeted:
            self._stale += 1
            return []
        if self._left_behind(hello):
            return []
        problem = self._objection(hello)
        if problem is not None:
            code, sentence = problem
            refusal = Send(peer, wire.encode(wire.Refuse(hello.session, 0, code, sentence)))
            self._unfit = ((), "")  # the disk may have grown when it asks again
            return [refusal, Refused(peer, code, sentence)]
        if any(size > own for (_, size), own in zip(hello.volumes, self._sizes, strict=True)):
            later = wire.Failed(hello.session, 1, "stream", 0, 0, "the secondary has to grow its volumes first")
            return [Send(peer, wire.encode(later)), *self._make_room(hello)]
        effects: list[Effect] = []
        if self._session:
            effects.append(Disconnected("the primary began a new session", True))
        self._sessions += 1
        self._peer, self._session, self._greeted, self._sequence = peer, hello.session, hello.session, 0
        self._following = hello.next_sequence
        self._heard = now
        self._ping_at = now + self.config.heartbeat_s
        self._pressure_told = False
        self._aligned = self._exact and hello.stream == self._stream
        applied, durable, recorded, free = self._told
        welcome = wire.Welcome(
            hello.session, 0, wire.PROTOCOL_VERSION, self._stream, applied, self._received, durable, recorded,
            self._checkpoint_received, free, self.config.pool_blocks, self.config.block_size, self._exact,
            self._syncing, self.standing, self.own, self._sizes,
        )
        return [*effects, self._send(welcome), Connected(peer, hello, self._aligned)]

    def _left_behind(self, hello: wire.Hello) -> bool:
        """This side was promoted, and the other one has gone on from there since: not this side's place to refuse it,
        or the side that leads would fence itself."""
        decision = decide(self.standing, hello.standing)
        return isinstance(decision, Rejoin) and decision.side == self.standing.side

    def _objection(self, hello: wire.Hello) -> tuple[str, str] | None:
        """(code, sentence) of why this peer is turned away; None if it is welcome."""
        if hello.version != wire.PROTOCOL_VERSION:
            return "version", (f"the primary speaks protocol version {hello.version}, the secondary version "
                               f"{wire.PROTOCOL_VERSION}: run the same TandemDisk on both sides")
        if hello.standing.pair_id != self.standing.pair_id:
            return "pair", (f"the primary belongs to pair '{hello.standing.pair_id}', the secondary to pair "
                            f"'{self.standing.pair_id}'")
        theirs, mine = [name for name, _ in hello.volumes], [name for name, _ in self.config.volumes]
        if theirs != mine:
            return "volumes", (f"the primary has the volumes {', '.join(theirs)}, the secondary {', '.join(mine)}: "
                               "they must have the same names in the same order")
        sizes = tuple(size for _, size in hello.volumes)
        for (name, size), own in zip(hello.volumes, self._sizes, strict=True):
            if size != own and (not self.standing.history or (size > own and sizes == self._unfit[0])):
                why = f": {self._unfit[1]}" if sizes == self._unfit[0] else ""
                return "size", f"volume {name} has {size} bytes on the primary and {own} bytes on the secondary{why}"
        decision = decide(self.standing, hello.standing)
        if not isinstance(decision, InSync | PrimaryAhead):
            return CODES[type(decision)], decision.sentence
        return None

    def _make_room(self, hello: wire.Hello) -> list[Effect]:
        """A primary that this side has to follow has larger volumes: it is welcome once there is room for them."""
        if self._growing is not None:
            return []
        self._growing = hello
        return [Grow(tuple(max(size, own) for (_, size), own in zip(hello.volumes, self._sizes, strict=True)))]

    def _tell_off(self, peer: bytes, message: wire.Message) -> list[Effect]:
        """Something for another session: its sender has to greet again. Once for each, and never in answer to a BYE."""
        self._stale += 1
        if isinstance(message, wire.Bye) or self._told_off == (peer, message.session):
            return []
        self._told_off = (peer, message.session)
        failed = wire.Failed(message.session, 1, "stream", 0, 0, "this session is over on the secondary")
        return [Send(peer, wire.encode(failed))]

    # -------------------------------------------------------------------------------------------------- work done

    def applied(self, sequence: int) -> bool:
        """The oldest work handed out, which has this ``sequence``, is done. False if the primary need not know: the
        numbering was left, or a flush failed, after it was handed out."""
        expected = self._work.popleft()
        assert sequence == expected, (sequence, expected)
        if self._uncounted:
            self._uncounted -= 1
            return False
        self._applied = sequence
        return True

    def resync_begun(self, sequence: int, *, consistent: bool) -> None:
        """BeginResync is done. ``consistent``: the last checkpoint is still there."""
        self._exact = self.applied(sequence) or self._exact  # a flush that failed meanwhile is news of the disk
        self._syncing = True
        self.standing = self.standing._replace(consistent=consistent)

    def resync_ended(self, sequence: int, history: History) -> None:
        """EndResync is done and ``history`` is on stable storage."""
        self.applied(sequence)
        self._syncing = False
        self.own = b""
        self.standing = self.standing._replace(history=history)

    def checkpointed(self, sequence: int, number: int, seconds: float) -> list[Effect]:
        """Checkpoint ``number`` is taken; it cost ``seconds``. Goes out before the ACK that covers it."""
        counted = self.applied(sequence)
        self._checkpoint = number
        self.standing = self.standing._replace(consistent=True)
        self._pressure_told = False
        if not self._session or not counted:
            return []
        return [self._send(wire.Checkpointed(self._session, self._next(), number, sequence, float(seconds)))]

    def checkpoint_missed(self, sequence: int, number: int, sentence: str) -> list[Effect]:
        """Checkpoint ``number`` could not be taken. The one before it stays, and the stream goes on behind the barrier.

        Goes out before the ACK that covers it. Should both get lost, the next WELCOME says which was the last.
        """
        counted = self.applied(sequence)
        if self._checkpoint_received == number:
            self._checkpoint_received = self._checkpoint
        if not self._session or not counted:
            return []
        return [self._send(wire.Failed(self._session, self._next(), "checkpoint", sequence, 0, sentence))]

    def verified(self, sequence: int, differing: bytes) -> list[Effect]:
        """The ranges of a Verify are compared: one byte each, 1 = differs."""
        counted = self.applied(sequence)
        if not self._session or not counted:
            return []
        return [self._send(wire.Verified(self._session, self._next(), sequence, differing))]

    def resized(self, sequence: int, sizes: tuple[int, ...], sentence: str) -> list[Effect]:
        """A Resize is done: the volumes have ``sizes`` bytes, durably. ``sentence``: why not those asked for. Goes out
        before the ACK that covers it."""
        counted = self.applied(sequence)
        self._sizes = sizes
        if not self._session or not counted:
            return []
        return [self._send(wire.Resized(self._session, self._next(), sequence, sizes, sentence))]

    def grown(self, sizes: tuple[int, ...], problem: str) -> None:
        """A Grow is done: there is room for ``sizes``; or there is none, because of ``problem``."""
        hello, self._growing = self._growing, None
        if problem:
            self._unfit = tuple(size for _, size in hello.volumes) if hello is not None else (), problem
            return
        self._sizes, self._unfit = sizes, ((), "")
        if hello is not None and hello.stream == self._stream:
            self._exact = False  # it was to grow in the stream, and that is not what happened here

    def point(self) -> Point:
        """Take this before an fdatasync of all disks, and give it to ``durable`` after."""
        return Point(self._stream, self._applied)

    def durable(self, point: Point) -> None:
        """Everything up to ``point`` survives a power cut."""
        if point.stream == self._stream and self._exact:
            self._durable = max(self._durable, point.sequence)

    def recorded(self, point: Point) -> None:
        """``point`` was durable, and now the metadata file says so, durably too."""
        if point.stream == self._stream and self._exact:
            self._recorded = max(self._recorded, point.sequence)
            self._durable = max(self._durable, point.sequence)

    def acknowledge(self, free_blocks: int) -> list[Effect]:
        """Once per drain, in session or not: tell the primary what is done, if that is news.

        ``free_blocks``: left now in the fullest hidden pool.
        """
        state = (self._applied, self._durable, self._recorded, free_blocks)
        if state == self._told or self._uncounted:
            # uncounted work still takes blocks from the pool: no number in the new numbering goes with ``free_blocks``
            return []
        self._told = state
        if not self._session:
            return []
        effects: list[Effect] = [Send(self._peer, (wire.encode_ack(self._session, self._next(), *state),))]
        pool = self.config.pool_blocks
        if not self._pressure_told and not self._syncing and (pool - free_blocks) * 100 >= pool * PRESSURE_PERCENT:
            self._pressure_told = True
            effects.append(self._send(wire.Pressure(self._session, self._next(), pool - free_blocks, pool)))
        return effects

    def failed_apply(self, sequence: int, errno: int, sentence: str) -> list[Effect]:
        """The work ``sequence`` could not be done (a disk or pool error). The shell drops everything in its queue; the
        session ends, and the next one starts again at what was applied."""
        ended = self._end(sentence, "apply", sequence, errno)
        self.drop_work()
        return ended

    def failed_flush(self, point: Point, errno: int, sentence: str) -> list[Effect]:
        """What was applied up to ``point`` could not be made durable, and the kernel may have forgotten it: from now on
        the disk is not exact, and only a resync makes it so again. What is in the shell's queue is not counted any
        more; better drop it (no checkpoint should be taken of such a disk), and say so by ``drop_work``."""
        barrier = point.sequence if point.stream == self._stream else self._applied
        ended = self._end(sentence, "flush", barrier, errno)
        self._uncounted = len(self._work)
        self._received = self._applied
        self._durable = self._recorded
        self._exact = False
        self._told = (self._applied, self._durable, self._recorded, self._told[3])
        return ended

    def hold(self) -> None:
        """Stay where this side stands: whatever a primary sends is dropped, and counts as not received. Its pings are
        answered, or it would take this side for dead and go on alone. Until ``resume``."""
        self._holding = True

    def resume(self) -> None:
        """Take messages again. The shell's queue is empty, and a session that went on meanwhile has a gap: better
        ``interrupt`` it before."""
        self._holding = False

    def interrupt(self, reason: str) -> list[Effect]:
        """End the session without blame: the primary comes back, and sends again what was not received."""
        ended = self._end(reason)
        self.drop_work()
        return ended

    def drop_work(self) -> None:
        """The shell dropped its queue: nothing of it will be reported any more."""
        self._work.clear()
        self._uncounted = 0
        self._received = self._applied
        self._checkpoint_received = self._checkpoint
        self._growing = None

    # -------------------------------------------------------------------------------------------------------- time

    def next_deadline(self) -> float | None:
        """When ``handle_timer`` has to be called at the latest; None: not before something else happens."""
        return min(self._ping_at, self._heard + self.config.peer_timeout_s) if self._session else None

    def handle_timer(self, now: float) -> list[Effect]:
        """Do what is due by ``now``."""
        if not self._session:
            return []
        if now >= self._heard + self.config.peer_timeout_s:
            return self._end(f"the primary has not been heard for {now - self._heard:.1f} s")
        if now >= self._ping_at:
            self._ping_at = now + self.config.heartbeat_s
            return [self._send(wire.Ping(self._session, self._sequence, float(now)))]
        return []

    def ping(self, now: float) -> list[Effect]:
        """Ask the primary for a sign of life now; a shell that cannot send it knows more: ``disconnected``."""
        if not self._session:
            return []
        self._ping_at = now + self.config.heartbeat_s
        return [self._send(wire.Ping(self._session, self._sequence, float(now)))]

    def disconnected(self, peer: bytes, reason: str) -> list[Effect]:
        """The shell knows that the connection to ``peer`` is gone."""
        if not self._session or peer != self._peer:
            return []
        self._session = 0
        return [Disconnected(reason, False)]

    def close(self, reason: str) -> list[Effect]:
        """Say BYE; the work handed out may still be done."""
        if not self._session:
            return []
        bye = self._send(wire.Bye(self._session, 0, reason))
        self._session = 0
        return [bye, Disconnected(reason, True)]

    def depose(self, sentence: str) -> list[Effect]:
        """This side was promoted: a primary still in session is none any more, and must not acknowledge another write.
        (After a BYE it would go on alone.)"""
        if not self._session:
            return []
        refusal = self._send(wire.Refuse(self._session, 0, CODES[Rejoin], sentence))
        self._session = 0
        return [refusal, Disconnected(sentence, True)]

    def statistics(self) -> SecondaryStatistics:
        """A frozen record for status and metrics."""
        return SecondaryStatistics(self._batches, self._payload_bytes, self._sessions, self._stale, self._duplicates,
                                   len(self._work), self._applied, self._received)

    # ------------------------------------------------------------------------------------------------------- parts

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _send(self, message: wire.Message) -> Send:
        return Send(self._peer, wire.encode(message))

    def _end(self, reason: str, what: str = "stream", barrier: int = 0, errno: int = 0) -> list[Effect]:
        """End the session, telling the primary why. What was handed out stays handed out."""
        if not self._session:
            return []
        failed = self._send(wire.Failed(self._session, self._next(), what, barrier, errno, reason))
        self._session = 0
        return [failed, Disconnected(reason, False)]
