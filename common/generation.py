"""Where a side of a pair stands in its history, and what two such standings mean for each other: a pure decision.

A *generation* is a stretch of the pair's life in which exactly one side decided what the disks hold. A new one starts,
durably and before the first write that depends on it is acknowledged, whenever a side begins to decide alone:

    pair created            primary starts generation 1
    failover                the promoted secondary starts one
    peer lost, "continue"   the primary starts one before it acknowledges the first write that the secondary lacks
    split brain resolved    the winner starts one

Every side keeps the list of the generations that its disk has been through. So the newest generation of a side that is
merely behind is found in the list of the other; if each has one that the other never saw, both wrote. This is DRBD's
generation identifiers with a list of ``MAX_HISTORY`` instead of four slots, so that an older copy that was restored is
recognised as long as not more generations have begun since: years of a pair that fails over now and then, days of one
whose link flaps under load. What stands further back is refused, never taken for something else. The list cannot be
thinned instead: of a generation that is not in it nobody can tell whether both sides had it, and one that could be
computed from the one before would be computed again by an older copy that goes on alone.

    their newest is        mine is primary, theirs secondary         both call themselves primary
    ---------------        ---------------------------------        ----------------------------
    (none: new disk)       PrimaryAhead(full)                        Refused
    mine too               InSync                                    Refused (one must be secondary)
    older in my list       PrimaryAhead (bitmap if it reaches back)  Rejoin: they rejoin as secondary
    newer, has mine        Rejoin: I rejoin as secondary             Rejoin: I rejoin as secondary
    neither, common past   SplitBrain                                SplitBrain
    no common past         Unrelated                                 Unrelated

``decide`` is symmetrical: both sides reach the same verdict from the same two standings.
"""

from __future__ import annotations

from typing import Final, NamedTuple

RETURNING: Final = (1 << 64) - 1
"""Stream of a side that gave the primary role up: it stands at no point of any stream, but what it wrote is listed."""
MAX_HISTORY: Final = 1024
"""Generations that a side remembers; the oldest ones go first. 16 KiB of metadata, and of a greeting."""


class Generation(NamedTuple):
    """One entry of a history: a random ``identity`` (u64), a ``number`` that counts up, the ``side`` that began it."""

    identity: int
    number: int
    side: str

    def __str__(self) -> str:
        return f"generation {self.number} ({self.identity:016x}, started by side {self.side})"


History = tuple[Generation, ...]


def extend(history: History, identity: int, side: str) -> History:
    """``history`` with a new generation at its end; ``identity`` is a random u64 that the caller drew."""
    number = history[-1].number + 1 if history else 1
    return (*history, Generation(identity, number, side))[-MAX_HISTORY:]


def common_past(mine: History, theirs: History) -> History:
    """The beginning of ``mine`` up to the newest generation that ``theirs`` has, too; empty if there is none."""
    known = {generation.identity for generation in theirs}
    for index in range(len(mine) - 1, -1, -1):
        if mine[index].identity in known:
            return mine[: index + 1]
    return ()


class Standing(NamedTuple):
    """What a side tells about itself in the handshake."""

    pair_id: str
    side: str
    role: str
    """``primary`` or ``secondary``: what it is or wants to be."""
    history: History
    """Oldest first; empty for a disk that never belonged to the pair."""
    consistent: bool
    """It has a state to fail over to: a primary always, a secondary once it holds a checkpoint."""
    base: int = 0
    """Primary: identity of the newest generation from which on its dirty bitmaps know every write; 0: none."""
    own_blocks: int = 0
    """Blocks that this side wrote and that the other cannot have, at most: a live primary knows them by its bitmaps,
    of a dead one only the regions of its write-intent file are known."""
    own_bytes: int = 0


class InSync(NamedTuple):
    """Same newest generation: what differs is a matter of sequence numbers."""

    sentence: str = "both sides are in the same generation"


class PrimaryAhead(NamedTuple):
    """The secondary is behind. ``full``: the primary's bitmaps do not reach back to where the secondary stands."""

    full: bool
    sentence: str


class Rejoin(NamedTuple):
    """``side`` was left behind: it has to give up the primary role and rejoin as secondary."""

    side: str
    sentence: str


class SplitBrain(NamedTuple):
    """Both wrote since ``ancestor``: an operator has to name the side whose writes are thrown away."""

    ancestor: Generation
    sentence: str


class Unrelated(NamedTuple):
    """The disks have no common past, or belong to different pairs."""

    sentence: str


class Refused(NamedTuple):
    """The two cannot work together as they are configured."""

    sentence: str


Decision = InSync | PrimaryAhead | Rejoin | SplitBrain | Unrelated | Refused

CODES: Final[dict[type, str]] = {
    InSync: "in-sync", PrimaryAhead: "primary-ahead", Rejoin: "rejoin",
    SplitBrain: "split-brain", Unrelated: "unrelated", Refused: "refused",
}
"""The word for each decision in REFUSE messages, status and logs."""


def decide(mine: Standing, theirs: Standing) -> Decision:
    """What the two standings mean. Symmetrical: ``decide(a, b) == decide(b, a)``."""
    first, second = sorted((mine, theirs), key=lambda standing: (standing.role, standing.side))
    if first.pair_id != second.pair_id:
        return Unrelated(f"side {first.side} belongs to pair '{first.pair_id}', side {second.side} to pair "
                         f"'{second.pair_id}'")
    if first.side == second.side:
        return Refused(f"both ends call themselves side {first.side} of pair '{first.pair_id}': a pair has two sides "
                       "with different names")
    if first.role == second.role == "secondary":
        return Refused(f"both sides ({first.side} and {second.side}) are secondary: one of them has to be promoted")
    if not first.history and not second.history:
        if second.role == "primary":
            return Refused(f"both sides ({first.side} and {second.side}) call themselves primary")
        return PrimaryAhead(True, f"side {second.side} has a new disk")
    return _compare(first, second)


def _compare(first: Standing, second: Standing) -> Decision:
    """The table of the module's opening; ``first`` is primary, ``second`` may be either."""
    both_primary = second.role == "primary"
    if not second.history or not first.history:
        bare, other = (second, first) if not second.history else (first, second)
        if bare.role == "secondary":
            return PrimaryAhead(True, f"side {bare.side} has a new disk")
        return Refused(f"side {bare.side} calls itself primary with a disk that has no history, and side {other.side} "
                       f"holds {other.history[-1]} of the pair")
    mine, theirs = first.history[-1], second.history[-1]
    if mine.identity == theirs.identity:
        if both_primary:
            return Refused(f"both sides ({first.side} and {second.side}) call themselves primary in {mine}")
        return InSync()
    if theirs.identity in {generation.identity for generation in first.history}:
        if both_primary:
            return Rejoin(second.side, _left_behind(second, first))
        reaches = _position(first, theirs.identity) >= _position(first, first.base)
        return PrimaryAhead(not reaches, f"side {second.side} stands in {theirs}, side {first.side} in {mine}")
    if mine.identity in {generation.identity for generation in second.history}:
        return Rejoin(first.side, _left_behind(first, second))
    return _diverged(first, second)


def _position(standing: Standing, identity: int) -> int:
    """Index in the history; one past its end for a generation that is not in it, so that nothing reaches back to it."""
    for index, generation in enumerate(standing.history):
        if generation.identity == identity:
            return index
    return len(standing.history)


def _left_behind(old: Standing, new: Standing) -> str:
    lost = _loss(old)
    return (f"side {old.side} stands in {old.history[-1]} and side {new.side} has gone on to {new.history[-1]}: side "
            f"{old.side} has to rejoin as secondary{lost}")


def _loss(standing: Standing) -> str:
    if not standing.own_blocks:
        return ""
    return f", which overwrites at most {_amount(standing)} that it alone wrote"


def _amount(standing: Standing) -> str:
    return f"{standing.own_blocks} block{'s' * (standing.own_blocks != 1)} ({standing.own_bytes} bytes)"


def _forgotten(first: Standing, second: Standing) -> str:
    """One of the two may be a copy from before all that the other one remembers."""
    for old, new in ((first, second), (second, first)):
        if old.history[-1].number < new.history[0].number:
            return (f" that is remembered: side {new.side} knows no generation before {new.history[0].number}. If side "
                    f"{old.side} is an older copy, remove its metadata file: it is then synchronised in full")
    return ""


def _diverged(first: Standing, second: Standing) -> Decision:
    known = {generation.identity for generation in second.history}
    common = [generation for generation in first.history if generation.identity in known]
    if not common:
        return Unrelated(f"the disks of side {first.side} ({first.history[-1]}) and side {second.side} "
                         f"({second.history[-1]}) have no common past{_forgotten(first, second)}")
    parts = (f"side {s.side} went on to {s.history[-1]} and would lose at most {_amount(s)}"
             for s in sorted((first, second), key=lambda standing: standing.side))
    return SplitBrain(common[-1], f"split brain: both sides wrote since {common[-1]}: {'; '.join(parts)}")
