"""The primary's connection to its secondary: a socket and a timer around a ``PrimarySession``.

Five beats, whatever happens: feed the session, carry out ``Send`` and ``Reconnect``, hand every other effect to the
mirror, arm the timer again. Decisions are the session's; this file knows sockets and the clock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import zmq

from common.keys import CurveKeys
from common.plain import PlainDialer
from common.port import SILENT, Dialer
from common.transport import dial
from common.wire import Frames
from primary.contact import State
from primary.effects import Effect, Reconnect, Send
from primary.packer import Packer
from primary.session import PrimarySession

log = logging.getLogger("link")


class Link:
    """Runs ``session`` against ``address``. ``handle(effect)`` gets what only the mirror can do."""

    def __init__(
        self,
        session: PrimarySession,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        keys: CurveKeys | None,
        handle: Callable[[Effect], None],
        packer: Packer | None = None,
    ) -> None:
        self.session = session
        self.address = address
        self.trouble = ""
        """Why there is no connection, as far as the transport can tell; empty while there is one."""
        self.before_greeting: Callable[[], None] = lambda: None
        self._context = context
        self._keys = keys
        self._handle = handle
        self.packer = packer
        """Compresses what is sent; None: it goes as it is."""
        self._transmit: Callable[[Frames], bool] = lambda _frames: False
        self._loop = asyncio.get_running_loop()
        self._dialer: Dialer | PlainDialer | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._greeted = self._stood = False
        self._hung_up = 0
        self._armed_in = session.state

    @property
    def turned_away(self) -> bool:
        """Whoever listens there hung up whenever we came: a stranger, or one with other keys. A connection that broke
        once in its handshake, or had stood before, tells nothing, and no more does one on which nothing was said."""
        return not self._stood and self._hung_up > 1

    def open(self) -> None:
        """Begin to dial."""
        self._dial()
        self._arm()

    def send(self, messages: Iterable[Frames]) -> None:
        """Put messages of the session on the socket."""
        assert self._dialer is not None, "a session that is not connected sends nothing"
        for frames in messages:
            if not self._transmit(frames):
                self._choked()
                return

    def _choked(self) -> None:
        self.perform(self.session.disconnected("the connection takes nothing more", time.monotonic()))

    def perform(self, effects: Iterable[Effect]) -> None:
        """Carry out what the session answered, in order."""
        for effect in effects:
            if isinstance(effect, Send):
                if self._dialer is not None:
                    self._transmit(effect.frames)
            elif isinstance(effect, Reconnect):
                self._dial()
            else:
                self._handle(effect)

    def settle(self, effects: Iterable[Effect]) -> None:
        """``perform`` for what may have moved a deadline closer: arms the timer again."""
        self.perform(effects)
        self._arm()

    def redial(self) -> None:
        """Somebody knows that the secondary is there now: do not wait for the next attempt."""
        if self.session.state in (State.CUT, State.REFUSED):
            self._dial()

    def close(self) -> None:
        """Close the socket; the session has said goodbye before."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._dialer is not None:
            self._dialer.close()
            self._dialer = None
        if self.packer is not None:
            self.packer.close()

    def _dial(self) -> None:
        if self._dialer is not None:
            self._dialer.close()
        self._greeted = False
        self._dialer = dial(self._context, self.address, self._keys, self._received, self._drained, self)
        if self.packer is None:
            self._transmit = self._dialer.send
        else:
            self.packer.attach(self._dialer.send, self._choked)
            self._transmit = self.packer.send

    # Watcher

    def connection_up(self) -> None:
        """The transport stands: greet the secondary, once a socket."""
        if self._greeted:
            # ZeroMQ reconnected by itself and dropped what was in flight: the session begins again on a clean socket
            self.settle(self.session.disconnected("the connection was interrupted", time.monotonic()))
            return
        self._greeted = self._stood = True
        self.trouble = ""
        self.before_greeting()
        self.settle(self.session.connect(time.monotonic()))

    def connection_down(self, reason: str) -> None:
        """The transport broke; the session decides when to try again."""
        self.trouble = reason
        self._hung_up += not self._greeted and reason != SILENT
        if self._greeted:
            self.settle(self.session.disconnected(reason, time.monotonic()))

    # Traffic and time

    def _received(self, frames: list[bytes]) -> None:
        effects = self.session.receive(tuple(frames), time.monotonic())
        if self.packer is not None:
            self.packer.acknowledged(self.session.applied, time.monotonic())
        if effects:
            self.perform(effects)
            if self.session.state is not self._armed_in:
                self._arm()  # another state has other deadlines, and they may be closer

    def _drained(self) -> None:
        pass

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._armed_in = self.session.state
        deadline = self.session.next_deadline()
        if deadline is not None and self._dialer is not None:
            self._timer = self._loop.call_at(self._loop.time() + max(0.0, deadline - time.monotonic()), self._ring)

    def _ring(self) -> None:
        """A deadline came. Most have moved on since the timer was set (every message heard moves one): then only set
        it anew."""
        self._timer = None
        self.settle(self.session.handle_timer(time.monotonic()))


def describe(value: Any) -> str:
    """An effect for the log: its name and its short fields."""
    fields = value._asdict() if hasattr(value, "_asdict") else {}
    shown = {name: item for name, item in fields.items() if isinstance(item, int | float | str | bool)}
    return " ".join([type(value).__name__, *(f"{name}={item!r}" for name, item in shown.items())])
