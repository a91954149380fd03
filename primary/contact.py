"""Whether there is a secondary: the life of a connection, silence, loss and refusal.

The first third of a ``PrimarySession`` (``primary.session`` has the picture of its states): when to greet, to ask for a
sign of life, to try again and to give up, and what becomes of the unacknowledged writes then. What the secondary says
is ``primary.intake``'s business; what the volume wants is the session's own.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from common import wire
from common.generation import CODES, Rejoin, Standing
from common.wire import Frames
from primary.effects import (
    Cut,
    Effect,
    Lost,
    Reconnect,
    Refused,
    Send,
    Starved,
    WindowOpen,
    disappointments,
)
from primary.window import BLOCKS, Ledger, Window, barrier_entry

RETRY_S: Final = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Pauses before the first, second, ... attempt to reconnect; the last one repeats."""
REFUSED_RETRY_S: Final = 10.0
AHEAD_S: Final = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Pauses after the first, second, ... time in a row that this side pulled ahead; the last one repeats. Under an
overload that lasts, each new session would be a resync that is given up again, in the way of the guests whom it cannot
follow: 24 of them in 40 s of writes at 2.7 times the rate of a link, and 4 with pauses."""
KEPT_UP_S: Final = 60.0
"""A session that lasted so long before this side pulled ahead begins the row anew."""


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


class Contact:
    """See the module; the arguments are those of ``PrimarySession``."""

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
        self.bases = bases or {}
        """Keep them up to date: streams of earlier processes -> from which sequence on the caller knows every write."""
        self.state = State.IDLE
        self.attached = config.on_peer_loss == "block"
        """True: writes go through ``write``. False: the caller marks them dirty instead."""
        self.syncing = False
        """True from ``begin_resync`` to ``finish_resync``."""
        self.stream = stream
        self.beginning = False
        """The caller notes a new generation: what this side is to a peer is open until that is durable."""
        self.noted: Callable[[], bool] = lambda: True
        """The caller has noted that all of its disk may differ, for a process that comes after this one."""
        self.peer: wire.Welcome | None = None
        self._window = Window(config.window_bytes, next_sequence, ledger, config.checkpoint_on_pressure)
        self._window.checkpoint = checkpoint
        self._sizes = tuple(size for _, size in config.volumes)
        self._broken = broken
        self._instance = instance
        self._sessions = 0
        self._session = 0
        self._peer_sequence = 0
        self._heard = 0.0
        self._woke = 0.0
        """When this process had last stood still."""
        self._ping_at = 0.0
        self._retry_at: float | None = None
        self._retries = 0
        self._aheads = 0
        """Times in a row that this side pulled ahead."""
        self._lost_at: float | None = None
        self._established_at = 0.0
        self._starved = False
        self._refusal = ""
        self._batches = self._payload_bytes = self._replayed = self._cuts = self._stale = 0
        self._round_trip_s = 0.0

    @property
    def last_sequence(self) -> int:
        """Number of the last message that was sent in the stream."""
        return self._window.next_sequence - 1

    @property
    def idle(self) -> bool:
        """True if nothing is unacknowledged and no flush is awaited."""
        window = self._window
        return not (window.in_flight or window.waiting or window.flushing)

    def lag_s(self, now: float) -> float:
        """Age of the oldest message that the secondary has not confirmed."""
        oldest = self._window.oldest
        return now - oldest if oldest is not None else 0.0

    # -------------------------------------------------------------------------------------------------- the connection

    def connect(self, now: float) -> list[Effect]:
        """The shell has a fresh socket: greet the peer on it, unless this side has said goodbye."""
        if self.state is State.CLOSED:
            return []
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

    def pull_ahead(self, reason: str, now: float) -> list[Effect]:
        """Give up a peer that is alive and does not keep up. It is tried again after a pause that grows while sessions
        end like this."""
        slow = self._connected and self.config.on_peer_loss == "continue"  # else every write waits for it
        effects = self.lost(reason, now)
        if slow:
            self._aheads = self._aheads + 1 if now - self._established_at < KEPT_UP_S else 1
            self._retry_at = now + AHEAD_S[min(self._aheads, len(AHEAD_S)) - 1]
        return effects

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

    def refuse(self, sentence: str, now: float) -> list[Effect]:
        """The volumes of the secondary are larger, and this side has no room for that."""
        return self._refuse("size", sentence, now)

    def next_deadline(self) -> float | None:
        """When ``handle_timer`` has to be called at the latest; None: not before something else happens."""
        deadlines = [t for t in (self._retry_at, self._lost_at) if t is not None]
        if self._connected:
            deadlines.append(self._heard + self.config.peer_timeout_s)
        if self._streaming:
            deadlines.append(self._ping_at)
            if self.config.max_lag_s and self._window.oldest is not None:
                deadlines.append(max(self._window.oldest, self._woke) + self.config.max_lag_s)
        return min(deadlines, default=None)

    def handle_timer(self, now: float) -> list[Effect]:
        """Do what is due by ``now``."""
        effects: list[Effect] = []
        due = self.next_deadline()
        late = now - due if due is not None and self._connected else 0.0
        # This process stood still, not the secondary: it is judged by what comes from now on. It may have been promoted
        # meanwhile, and to go on alone before that is heard would be split brain.
        if late >= self.config.peer_timeout_s / 2:
            self._heard = now
        if self.config.max_lag_s and late >= min(self.config.peer_timeout_s, self.config.max_lag_s) / 2:
            self._woke = now
        if self._connected and now >= self._heard + self.config.peer_timeout_s:
            silence = f"the secondary has not been heard for {now - self._heard:.1f} s"
            greeted = self.state is State.GREETING
            effects += self._cut(silence, now)
            if not greeted:
                effects += self._lose(silence, now)
        if self._streaming and now >= self._ping_at:
            self._ping_at = now + self.config.heartbeat_s
            effects.append(Send(wire.encode(wire.Ping(self._session, self.last_sequence, float(now)))))
        if self._streaming and self.config.max_lag_s and self._behind_s(now) >= self.config.max_lag_s:
            effects += self.pull_ahead(f"the secondary is {self.lag_s(now):.1f} s behind", now)
        if self._lost_at is not None and now >= self._lost_at:
            effects += self.lost("the secondary did not come back, or got nothing done, in time", now)
        effects += self._check_starved()  # not before what may end the session: a lost one lacks nothing
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            effects.append(Reconnect())
        return effects

    def _behind_s(self, now: float) -> float:
        """How much of the lag is the secondary's own: none of it is while this process stood still."""
        return min(self.lag_s(now), now - self._woke)

    @property
    def _connected(self) -> bool:
        return self.state in (State.GREETING, State.WELCOMED, State.ESTABLISHED)

    @property
    def _streaming(self) -> bool:
        return self.state in (State.WELCOMED, State.ESTABLISHED)

    # ----------------------------------------------------------------------------------------------------------- parts

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
