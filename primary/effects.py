"""What a ``PrimarySession`` asks its shell to do or tells it, in the order in which it is to happen."""

from __future__ import annotations

from typing import Any, NamedTuple

from common.wire import CHECKPOINT, RESIZE, VERIFY, Frames, Welcome
from primary.window import BODY, KIND, SEQUENCE, Entry, Unacknowledged


class Send(NamedTuple):
    """Put these frames on the socket."""

    frames: Frames


class Reconnect(NamedTuple):
    """Close the socket without lingering, open a new one to the same address, then call ``connect(now)``."""


class Acknowledged(NamedTuple):
    """Batches are done: ``pins`` are those given to ``write`` and ``flush``, in order. Finish and unpin them.

    A batch without FLUSH is done when applied, one with FLUSH when durable.
    """

    applied: int
    durable: int
    pins: list[Any]


class FlushFailed(NamedTuple):
    """The secondary could not make these durable: their clients get ``errno``. A ``Lost`` follows."""

    errno: int
    pins: list[Any]
    sentence: str


class CheckpointDone(NamedTuple):
    """Checkpoint ``number`` is what a failover would go back to; ``token`` as given to ``checkpoint``, None: automatic.

    ``seconds`` on the secondary (0.0 if its answer was lost with a connection), ``elapsed_s`` since it was asked for.
    """

    number: int
    sequence: int
    seconds: float
    elapsed_s: float
    token: Any


class CheckpointFailed(NamedTuple):
    """The checkpoint asked for with ``token`` (None: by nobody) will not be taken; the one before it stays."""

    token: Any
    sentence: str


class Pressure(NamedTuple):
    """The secondary's hidden disk fills up. ``answered``: a checkpoint is under way already."""

    used_blocks: int
    pool_blocks: int
    answered: bool


class Starved(NamedTuple):
    """Nothing moves until a checkpoint empties the pool, and the session may not put one. Told once a standstill.

    During a resync: ``give_up_checkpoint``. Otherwise (``checkpoint_on_pressure`` is off): ``checkpoint``.
    """

    needed_blocks: int
    free_blocks: int


class Established(NamedTuple):
    """The stream goes on where it was; ``replayed`` messages are sent once more."""

    replayed: int
    peer: Welcome


class ResyncNeeded(NamedTuple):
    """The stream cannot just go on. Call ``begin_resync``, in this same turn if writes bypass the session meanwhile.

    ``full``: the bitmaps do not say what differs, only the whole disk (or checksums of it) will do.
    """

    reason: str
    full: bool
    peer: Welcome


class Verified(NamedTuple):
    """Answer to ``verify``: one byte a question, 1 = differs. None: the answer was lost, ask again."""

    token: Any
    differing: bytes | None


class Resized(NamedTuple):
    """Answer to ``resize``: the secondary's volumes have ``sizes`` bytes, durably; ``sentence``: why not more, if it
    refused. Make room for them here, then call ``grown``. ``sizes`` None: the answer was lost, or nobody gave one; what
    happened shows at the next handshake."""

    token: Any
    sizes: tuple[int, ...] | None
    sentence: str


class Outgrown(NamedTuple):
    """The secondary's volumes are larger: an earlier resize was interrupted here. Make room for ``sizes`` and call
    ``grown``; the session greets again and again until then. If that cannot be: ``refuse``."""

    sizes: tuple[int, ...]


class Unnoted(NamedTuple):
    """The secondary has to be compared as a whole, and once it is in this stream nothing would say so any more. Note
    that durably; the session greets again and again until ``noted`` is true."""


class WindowOpen(NamedTuple):
    """Exports may read again."""


class Cut(NamedTuple):
    """The connection ended; everything unacknowledged is kept for a replay, writes are still accepted."""

    reason: str


class Lost(NamedTuple):
    """The peer is gone. Under ``continue`` the session is no longer attached, and hands back all that it held:
    mark ``unacknowledged`` dirty, durably, then finish their clients. Under ``block`` it keeps everything."""

    reason: str
    unacknowledged: list[Unacknowledged]


class Refused(NamedTuple):
    """The two sides do not belong together as they are (``code`` for programs). Hands back like ``Lost``.

    ``rejoin`` means that the other side was promoted: this one must not accept another write.
    """

    code: str
    sentence: str
    unacknowledged: list[Unacknowledged]


Effect = (
    Send | Reconnect | Acknowledged | FlushFailed | CheckpointDone | CheckpointFailed | Pressure | Starved | Established
    | ResyncNeeded | Verified | Resized | Outgrown | Unnoted | WindowOpen | Cut | Lost | Refused
)


def checkpoint_done(body: list[Any], sequence: int, seconds: float, now: float) -> CheckpointDone:
    """For the CHECKPOINT sent at ``sequence`` with ``body`` (``primary.window.barrier_entry``)."""
    number, token, asked_at = body
    return CheckpointDone(number, sequence, seconds, max(0.0, now - asked_at), token)


def answers(
    controls: list[Entry], asked: dict[int, Any], now: float, taken: int | None = None
) -> list[Effect]:
    """For control messages that are applied. Answers come before the ACK; one that did not, a connection ate.

    ``taken``: number of the last checkpoint that the secondary took, if it said so since.
    """
    effects: list[Effect] = []
    for entry in controls:
        body = asked.pop(entry[SEQUENCE], None)
        if body is not None and entry[KIND] == CHECKPOINT:
            if taken is not None and body[0] > taken:
                effects.append(CheckpointFailed(body[1], "The secondary could not take the checkpoint."))
                continue
            effects.append(checkpoint_done(body, entry[SEQUENCE], 0.0, now))
        elif body is not None and entry[KIND] == RESIZE:
            effects.append(Resized(body.token, *(body.answer or (None, "the answer was lost"))))
        elif body is not None:
            effects.append(Verified(body[1], None))
    return effects


def disappointments(controls: list[Entry], reason: str) -> list[Effect]:
    """For control messages that will never be answered."""
    effects: list[Effect] = []
    for entry in controls:
        if entry[KIND] == CHECKPOINT and entry[BODY][1] is not None:
            effects.append(CheckpointFailed(entry[BODY][1], f"The checkpoint was not taken: {reason}."))
        elif entry[KIND] == VERIFY:
            effects.append(Verified(entry[BODY][1], None))
        elif entry[KIND] == RESIZE:
            effects.append(Resized(entry[BODY].token, None, reason))
    return effects
