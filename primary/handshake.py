"""What a WELCOME means for a primary: a pure judgement over where both sides stand.

A replay is right only if the secondary stands exactly at a point of this primary's stream that its window reaches back
to: same generation, same stream, ``exact``, not before what was acknowledged, not after what was sent. (That it is
also in the state, syncing or not, that the stream has there can only be told after the window has taken the WELCOME's
numbers: the session does that.) In every other case the secondary has to be resynchronised, from the bitmaps if they
reach back to where it stands, else in full, or the two do not belong together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from common.generation import CODES, InSync, PrimaryAhead, Standing, decide
from common.wire import Welcome


class Here(NamedTuple):
    """Where the primary stands. ``broken``: why its stream has a hole, if so.

    ``base``: from this sequence on its bitmaps know every write of its own stream; ``bases``: the same for earlier
    ones.
    """

    standing: Standing
    stream: int
    next_sequence: int
    applied: int
    base: int
    broken: str
    bases: Mapping[int, int]


class Refusal(NamedTuple):
    """Do not go on; ``code`` and ``sentence`` as in REFUSE."""

    code: str
    sentence: str


class Replay(NamedTuple):
    """Send again what was not received."""


class Resync(NamedTuple):
    """Resynchronise; ``full``: the bitmaps do not reach back to where the secondary stands. ``lasting``: the next
    handshake would come to that again, whatever becomes of this resync, until it is complete."""

    reason: str
    full: bool
    lasting: bool = False


def judge(here: Here, welcome: Welcome) -> Refusal | Replay | Resync:
    """See the module."""
    decision = decide(here.standing, welcome.standing)
    if not isinstance(decision, InSync | PrimaryAhead):
        return Refusal(CODES[type(decision)], decision.sentence)
    mine = welcome.stream == here.stream
    if mine and welcome.exact and welcome.received >= here.next_sequence and not here.broken:
        return Refusal("older-copy", f"the secondary has message {welcome.received} of a stream in which this primary "
                       f"has only sent {here.next_sequence - 1}: this side's disk or metadata is an older copy")
    reason = _obstacle(here, welcome, decision)
    if not reason:
        return Replay()
    lasting = isinstance(decision, PrimaryAhead) and decision.full
    return Resync(reason, lasting or not reaches(here, welcome), lasting)


def reaches(here: Here, welcome: Welcome) -> bool:
    """Whether the primary's bitmaps know every write that the secondary may lack, as far as streams tell."""
    base = here.base if welcome.stream == here.stream else here.bases.get(welcome.stream)
    certain = welcome.applied if welcome.exact else welcome.recorded
    return base is not None and certain >= base


def _obstacle(here: Here, welcome: Welcome, decision: InSync | PrimaryAhead) -> str:
    """Why the window cannot just be replayed; empty if it can."""
    if isinstance(decision, PrimaryAhead):
        return decision.sentence
    if here.broken:
        return f"writes went on without the secondary ({here.broken})"
    if welcome.stream != here.stream:
        return "the secondary follows another stream of writes"
    if not welcome.exact:
        return f"the secondary lost its memory of everything after message {welcome.recorded}"
    if welcome.received < here.applied:
        return (f"the secondary is at message {welcome.received} and had confirmed {here.applied}: its disk is an "
                "older copy")
    return ""
