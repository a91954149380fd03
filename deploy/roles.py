"""Which side of a pair leads, by what both remember; and how a side that was left behind gives the primary role up.

A side is configured as primary or as secondary, which is where it starts. From then on its metadata says what it is.
Two metadata files and the write-intent files beside them are all that is looked at here: whether processes run makes
no difference to who may lead.

``tandemdisk rejoin`` in steps: judge, name the loser, stop its process, judge again, save what it alone wrote if that
was asked for, write its new metadata durably. A crash in between leaves the side what it was. Between the two
judgements the loser may have begun to write alone, and the same command on the other host may have stopped the winner:
of two commands that each give up their own side at least one finds that the other one does not run, or does not lead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from common.errors import DiskError, NotRunning, OperationFailed, PeerRefused
from common.generation import RETURNING, History, Rejoin, SplitBrain, Standing, common_past, decide
from common.inquiry import remembered_standing
from common.intent import INTENT_FILE, IntentFile
from common.metadata import Metadata, load, save
from common.settings import NodeSettings, Role
from deploy.hosts import Side
from secondary.buffer import HEADER_FILE, DiskBuffer
from secondary.header import PairHeader, Stage

UNFINISHED: Final = frozenset({Stage.RUNNING, Stage.FAILOVER, Stage.FAILOVER_FAILED})
"""Stages in which the buffer of a promoted side holds what is not yet on its disk."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the two sides are to each other. ``loser`` has to give up the primary role; None: nobody, or not decided."""

    sentence: str
    loser: Role | None
    split_brain: bool
    standings: Mapping[Role, Standing]
    mixed: Role | None = None
    """The side, if it is here, whose commit was interrupted by a loss of the disk buffer: see ``mixed_disks``."""

    @property
    def leader(self) -> Role | None:
        """The side that calls itself primary and may; None if there is none, or no telling which."""
        leading = [role for role, standing in self.standings.items() if standing.role == "primary"]
        if len(leading) == 2:
            return None if self.loser is None else next(role for role in leading if role != self.loser)
        return leading[0] if leading else None


def remembered(settings: NodeSettings) -> Metadata | None:
    """The metadata of a side; None if it never ran."""
    return load(f"{settings.directory}/metadata")


def readable(sides: Mapping[Role, NodeSettings]) -> dict[Role, NodeSettings]:
    """The sides whose memory can be read. Who leads is not judged by them alone, but whom a command is for: a side
    whose disk died with its metadata must not keep the other one from being asked, or from taking over."""
    found: dict[Role, NodeSettings] = {}
    for role, settings in sides.items():
        with contextlib.suppress(DiskError):
            remembered_standing(settings)
            found[role] = settings
    return found


def process_role(settings: NodeSettings, configured: Role) -> Role:
    """The process that a side is started as: by its metadata, else as configured.

    A promoted side whose commit is not complete goes on as the secondary process, which completes it.
    """
    metadata = remembered(settings)
    if metadata is None:
        return configured
    if metadata.role == "secondary" or unfinished_promotion(settings, metadata):
        return "secondary"
    return "primary"


def unfinished_promotion(settings: NodeSettings, metadata: Metadata) -> bool:
    """True if the disk buffer holds a part of what this promoted side decided on."""
    directory = settings.buffer.directory
    if not metadata.failover or not DiskBuffer.exists(directory):
        return False
    header = PairHeader(f"{directory}/{HEADER_FILE}")
    try:
        return header.stage in UNFINISHED
    finally:
        header.close()


def mixed_disks(settings: NodeSettings, metadata: Metadata) -> bool:
    """True if this promoted side had a commit to complete, and the disk buffer with the rest of that is gone."""
    return metadata.committing and not unfinished_promotion(settings, metadata)


def judge(
    sides: Mapping[Role, NodeSettings],
    told: Mapping[Role, Standing] | None = None,
    live: Mapping[Role, int] | None = None,
) -> Judgement:
    """What both sides' memory says; ``told``: of a side that is elsewhere, by its own word. With one side only, or one
    that never ran, there is nothing to decide. ``live``: the bytes that each of the sides here alone wrote, of those
    whose processes answer: closer than what files say."""
    standings: dict[Role, Standing] = {**(told or {})}
    mixed: Role | None = None
    for role, settings in sides.items():
        standing = remembered_standing(settings)
        if standing is not None:
            size = (live or {}).get(role, standing.own_bytes)
            blocks = -(-size // settings.buffer.block_size)
            standings[role] = standing._replace(own_blocks=blocks, own_bytes=size)
            metadata = remembered(settings)
            if metadata is not None and mixed_disks(settings, metadata):
                mixed = role
    if len(standings) < 2:
        return Judgement("one side has never run", None, False, standings, mixed)
    first, second = standings.values()
    decision = decide(first, second)
    loser: Role | None = None
    if isinstance(decision, Rejoin):
        loser = next(role for role, standing in standings.items() if standing.side == decision.side)
    return Judgement(decision.sentence, loser, isinstance(decision, SplitBrain), standings, mixed)


def choose_loser(judgement: Judgement, discard: Side | None) -> Role:
    """The side that has to rejoin. Raises PeerRefused where an operator has to say it, OperationFailed if there is
    none."""
    mixed = judgement.mixed
    if mixed is not None and len(judgement.standings) == 2:
        side = judgement.standings[mixed].side
        others = [standing for role, standing in judgement.standings.items() if role != mixed]
        if discard == side and others[0].role == "primary":
            return mixed
        if discard is None or discard == side:
            raise PeerRefused(
                f"Side {side} lost its memory in the middle of its failover: its disks are a mixture of two times.",
                hint=f"If the other side calls itself primary, `tandemdisk rejoin --discard {side}` lets that lead "
                f"again. With `tandemdisk accept-disk` side {side} leads with the mixture.",
            )
    if judgement.split_brain:
        if discard is None:
            raise PeerRefused(
                f"{judgement.sentence[0].upper()}{judgement.sentence[1:]}.",
                hint="Name the side whose writes are thrown away: `tandemdisk rejoin --discard a` or `--discard b`.",
            )
        return next(role for role, standing in judgement.standings.items() if standing.side == discard)
    if judgement.loser is None:
        raise OperationFailed(f"Neither side has to rejoin: {judgement.sentence}.", hint="See `tandemdisk status`.")
    if judgement.standings[judgement.loser].role != "primary":
        raise PeerRefused(
            f"{judgement.sentence[0].upper()}{judgement.sentence[1:]}.", hint="Its metadata is an older copy."
        )
    if discard is not None and judgement.standings[judgement.loser].side != discard:
        raise PeerRefused(f"Side {discard} is not the one that has to rejoin: {judgement.sentence}.")
    return judgement.loser


def judge_again(
    sides: Mapping[Role, NodeSettings], told: Mapping[Role, Standing], loser: Role, discard: Side | None
) -> Judgement:
    """The judgement by which ``loser`` has to rejoin, now that it does not run. Raises what ``choose_loser`` does, and
    OperationFailed, if that is no more so."""
    judgement = judge(sides, told)
    if choose_loser(judgement, discard) != loser:
        raise OperationFailed(
            f"While a side was being stopped it came otherwise: {judgement.sentence}.", hint="Give the command again."
        )
    return judgement


def lacks_nothing(follower: NodeSettings, stopped: NodeSettings) -> bool:
    """Whether the follower has all that the side that stopped ever acknowledged: that ended in good order, in the
    generation that both have."""
    ended, other = remembered(stopped), remembered(follower)
    return ended is not None and other is not None and ended.clean and ended.history == other.history


def give_up(settings: NodeSettings, winner: History, *, in_line: bool = False) -> None:
    """Durably: this side is secondary from now on. None of its processes may run. ``in_line``: it has nothing of its
    own and lacks nothing, as after a switchover."""
    metadata = remembered(settings)
    assert metadata is not None
    past = common_past(metadata.history, winner)
    clean = metadata.clean and past == metadata.history and not metadata.lost_writes
    intent = Path(f"{settings.directory}/{INTENT_FILE}")
    if clean:
        intent.unlink(missing_ok=True)
    else:
        IntentFile(str(intent), [size for _, size in metadata.volumes], everything=True).close()
    if DiskBuffer.exists(settings.buffer.directory):
        DiskBuffer.remove(settings.buffer.directory)
    changed = replace(
        metadata, role="secondary", history=past, failover="", base=0, bases=(), syncing=False, clean=clean,
        consistent=clean and in_line, committing=False, lost_writes=False,
        stream=metadata.stream if clean else RETURNING, sequence=metadata.sequence if clean else 0,
    )  # fmt: skip
    save(f"{settings.directory}/metadata", changed)


def accept_disks(settings: NodeSettings) -> None:
    """Durably: what the disks of this side, which leads, hold now is right, whatever it left there. Its secondary will
    be compared with it as a whole. None of its processes may run. NotRunning if it never ran, OperationFailed if it
    follows."""
    metadata = remembered(settings)
    if metadata is None:
        raise NotRunning(f"Side {settings.side} has never run.", hint="There is nothing that its disks contradict.")
    if metadata.role != "primary":
        raise OperationFailed(
            f"Side {settings.side} is the secondary: its disk follows the other side's.",
            hint="It is compared as a whole when it was replaced; just start it.",
        )
    Path(f"{settings.directory}/{INTENT_FILE}").unlink(missing_ok=True)
    save(f"{settings.directory}/metadata", replace(
        metadata, disks=(), clean=False, base=0, bases=(), committing=False, lost_writes=False,
    ))  # fmt: skip
