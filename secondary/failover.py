"""May this secondary take over, and what becomes of its disks: a decision without any I/O.

Two targets:

``latest``      every write that this side has applied is kept; the disk buffer is dropped in one store (stage DONE).
``checkpoint``  the guest's view becomes the disk: stage FAILOVER, and the buffer is committed in the background.

Refusals name what would be lost. ``force`` overrides those that an operator can answer for (a primary that is still
connected; guest writes in the active disk that ``latest`` would drop; a checkpoint of a disk that lost writes in a
flush that failed); it cannot make a state that does not exist: there is no checkpoint before the first
synchronisation ended, and no ``latest`` in the middle of a resync, where the disk is a mixture of two times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from common.errors import ConfigError, NeedsForce, OperationFailed
from secondary.header import Stage

Target = Literal["latest", "checkpoint"]
TARGETS: tuple[Target, ...] = ("latest", "checkpoint")
_SEND_AGAIN: Final = (
    "Let the primary send them again: wait until `tandemdisk status` says protected. If it cannot, --to checkpoint "
    "--force takes over with what is left."
)


@dataclass(frozen=True, slots=True)
class Situation:
    """What the decision depends on. ``resyncing``: between RESYNC and SYNCED; ``has_checkpoint``: the buffer keeps
    one; ``lost_writes``: a flush of the disk failed, and the primary has not sent again what that may have lost."""

    stage: Stage
    has_checkpoint: bool
    resyncing: bool
    primary_connected: bool
    guest_has_written: bool
    lost_writes: bool = False


def parse_target(value: object) -> Target:
    """``latest`` or ``checkpoint``; ConfigError for anything else."""
    for target in TARGETS:
        if value == target:
            return target
    raise ConfigError(f"A failover goes to 'latest' or 'checkpoint', not to {value!r}.")


def decide(target: Target, *, force: bool, situation: Situation) -> None:
    """Return if the failover may be done; else raise the refusal."""
    if situation.stage in (Stage.FAILOVER, Stage.DONE):
        raise OperationFailed("This side has taken over already.", hint="`tandemdisk status` shows how far it is.")
    if situation.stage is Stage.NONE:
        raise OperationFailed("This side is not running as a secondary yet.")
    if situation.stage is Stage.FAILOVER_FAILED:
        if target == "latest":
            raise OperationFailed(
                "A failover to the checkpoint was begun and its commit failed: `latest` is no longer there.",
                hint="Repair the secondary disk and give `failover --to checkpoint` again.",
            )
        return
    if target == "checkpoint" and not situation.has_checkpoint:
        raise OperationFailed(
            "This side holds no checkpoint: the initial synchronisation is not complete.",
            hint="Wait until `tandemdisk status` says protected.",
        )
    lost = situation.lost_writes and situation.has_checkpoint
    if lost and target == "latest":
        raise OperationFailed(
            "This side's disk lost writes in a flush that failed: its latest state is not known.", hint=_SEND_AGAIN
        )
    if lost and not force:
        raise NeedsForce(
            "This side's disk lost writes in a flush that failed: they may be older than the checkpoint, which is not "
            "what it was then.",
            hint=_SEND_AGAIN,
        )
    if target == "latest" and (situation.resyncing or not situation.has_checkpoint):
        hint = "Use --to checkpoint." if situation.has_checkpoint else "Wait until `tandemdisk status` says protected."
        raise OperationFailed(
            "A synchronisation is under way: the latest state of this disk is a mixture of two times.", hint=hint
        )
    if situation.primary_connected and not force:
        raise NeedsForce(
            "The primary is alive and connected.",
            hint="Stop it first. If its process or its host is gone, say --primary-dead; to take over from a living "
            "one, --force.",
        )
    if target == "latest" and situation.guest_has_written and not force:
        raise NeedsForce(
            "The active disk holds writes of this side's guest, which a failover to the latest state would drop.",
            hint="Use --to checkpoint to keep them, or --force to drop them.",
        )
