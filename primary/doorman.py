"""Listens at this side's own address while it leads, turns away whoever comes, and tells who asks where it stands.

A secondary listens there anyway. A primary has to as well: when the other side, left behind long ago, starts again as
the primary that it was, its greeting must not fall silent, or it would take this side for dead and go on alone.

Nobody is answered who has gone on from where this side stands: not this side's place to refuse.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import zmq

from common import wire
from common.errors import WireError
from common.generation import CODES, Rejoin, Standing, decide
from common.inquiry import Informant
from common.keys import CurveKeys
from common.port import Frame
from common.transport import listen

log = logging.getLogger("doorman")


class Doorman:
    """At ``address``, for the side that ``standing`` describes. Raises AddressInUse or ConfigError as a listener
    does."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        keys: CurveKeys | None,
        standing: Callable[[], Standing],
        informant: Informant,
        turned_away: Callable[[str], None],
    ) -> None:
        """``turned_away`` hears the sentence of each refusal."""
        self._standing = standing
        self._informant = informant
        self._turned_away = turned_away
        self._told = ""
        self._listener = listen(context, address, keys, self._received, _nothing, _nothing)

    def _received(self, peer: bytes, frames: list[Frame]) -> None:
        try:
            message = wire.decode(frames)
        except WireError:
            return
        if isinstance(message, wire.Ask) and (told := self._informant.tell(message.session)):
            self._listener.send(peer, told)
        if not isinstance(message, wire.Hello):
            return
        mine = self._standing()
        decision = decide(mine, message.standing)
        if isinstance(decision, Rejoin) and decision.side == mine.side:
            return
        if decision.sentence != self._told:
            log.warning("turned away code=%s sentence=%r", CODES[type(decision)], decision.sentence)
        self._told = decision.sentence
        self._turned_away(decision.sentence)
        refusal = wire.Refuse(message.session, 0, CODES[type(decision)], decision.sentence)
        self._listener.send(peer, wire.encode(refusal))

    def close(self) -> None:
        self._listener.close()


def _nothing() -> None:
    pass
