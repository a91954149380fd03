"""The secondary's end of the stream: a socket and a timer around a ``SecondarySession``.

Messages go to the session, work that it hands out to the applier; when the socket is drained the applier does what it
can and one acknowledgement covers it all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import zmq

from common import wire
from common.keys import CurveKeys
from common.port import Frame
from common.transport import listen
from common.wire import Frames
from secondary.applier import Applier
from secondary.session import Asked, Connected, Disconnected, Effect, Refused, SecondarySession, Send

log = logging.getLogger("link")


class Link:
    """Listens on ``address``. ``on_change`` is called when a primary came or went, ``on_ask`` with a question from
    outside and the way to answer it."""

    def __init__(
        self,
        session: SecondarySession,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        keys: CurveKeys | None,
        on_change: Callable[[], None],
        on_ask: Callable[[wire.Ask, Callable[[Frames], object]], None],
    ) -> None:
        self.session = session
        self.applier: Applier
        self.last_refusal = ""
        """Empty once a primary is welcome."""
        self.before_refusing: Callable[[], None] = lambda: None
        """Called before a greeting is heard while this side leads: it cannot be but refused."""
        self.on_refusal: Callable[[str], None] = lambda _sentence: None
        self._on_change = on_change
        self._on_ask = on_ask
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = self._deaf = False
        self._listener = listen(context, address, keys, self._received, self._drained, self._connection_broke)

    def perform(self, effects: Sequence[Effect]) -> None:
        """Carry out what the session answered, in order."""
        for effect in effects:
            if isinstance(effect, Send):
                if not self._listener.send(effect.peer, effect.frames):
                    self.perform(self.session.disconnected(effect.peer, "the connection broke"))
            elif isinstance(effect, Connected):
                self._listener.trust(effect.peer)
                self.last_refusal = ""
                log.info("primary connected session=%x again=%s", effect.hello.session, effect.again)
                self._arm()
                self._on_change()
            elif isinstance(effect, Disconnected):
                log.warning("primary disconnected reason=%r", effect.reason)
                self._on_change()
            elif isinstance(effect, Refused):
                if effect.sentence != self.last_refusal:
                    log.warning("primary refused code=%s sentence=%r", effect.code, effect.sentence)
                self.last_refusal = effect.sentence
                self.on_refusal(effect.sentence)
            elif isinstance(effect, Asked):
                self._on_ask(effect.ask, partial(self._listener.send, effect.peer))
            else:
                self.applier.put(effect)

    def stop(self, reason: str) -> None:
        """End the session and listen to nobody's work any more; still answers a HELLO, with the standing of the
        session."""
        self.hold()
        self.perform(self.session.close(reason))

    def hold(self) -> None:
        """Do nothing any more of what a primary sends; the session itself goes on."""
        self._stopped, self._deaf = True, False
        self.session.hold()

    def deafen(self, reason: str) -> None:
        """End the session, and hear nobody until ``resume`` or ``hold``: a primary takes this side for away."""
        self.perform(self.session.interrupt(reason))
        self._deaf = True

    def resume(self) -> None:
        """The opposite of ``hold`` and ``deafen``."""
        self.perform(self.session.interrupt("the secondary goes on"))
        self.session.resume()
        self.applier.resume()
        self._stopped = self._deaf = False

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._listener.close()

    def _received(self, peer: bytes, frames: list[Frame]) -> None:
        if self._deaf:
            return
        if self.session.standing.role == "primary":
            self.before_refusing()
        effects = self.session.receive(peer, frames, time.monotonic())
        if effects:
            self.perform(effects)

    def _drained(self) -> None:
        if not self._stopped:
            self.applier.drain()

    def _connection_broke(self) -> None:
        """Some connection did. A message to the primary tells whether it was that one: to a peer that is gone none
        can be sent."""
        self.perform(self.session.ping(time.monotonic()))

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.session.next_deadline()
        if deadline is not None:
            self._timer = self._loop.call_at(self._loop.time() + max(0.0, deadline - time.monotonic()), self._ring)

    def _ring(self) -> None:
        self._timer = None
        self.perform(self.session.handle_timer(time.monotonic()))
        self._arm()
