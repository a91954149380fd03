"""What a ``SecondarySession`` asks its shell to do or tells it; the *work* among it is done strictly in order, and each
piece reported as done by the method that its class names."""

from __future__ import annotations

from typing import NamedTuple

from common import wire
from common.generation import History
from common.wire import Frames


class Send(NamedTuple):
    """Put these frames on the socket, to the peer with this ZeroMQ identity."""

    peer: bytes
    frames: Frames


class Asked(NamedTuple):
    """A command on the other host wants to know what is remembered here."""

    peer: bytes
    ask: wire.Ask


class Apply(NamedTuple):
    """Copy old contents, then write ``extents`` out of the batch's payload. Done: ``applied``.

    ``flush``: then make everything durable and report it by ``durable``.
    """

    sequence: int
    batch: wire.Batch
    flush: bool
    extents: list[wire.Extent]


class Checkpoint(NamedTuple):
    """Take checkpoint ``number`` of all volumes. Done: ``checkpointed``."""

    sequence: int
    number: int


class BeginResync(NamedTuple):
    """Note durably that the secondary disk is no prefix from here on, and the new position. Done: ``resync_begun``.

    Without ``keep_checkpoint`` the last checkpoint is given up and nothing is copied before it is written.
    """

    sequence: int
    stream: int
    full: bool
    keep_checkpoint: bool


class EndResync(NamedTuple):
    """The secondary disk is a prefix again: take over ``history`` durably. Done: ``resync_ended``."""

    sequence: int
    history: History


class Verify(NamedTuple):
    """Hash the ranges of ``questions`` (packed wire.QUESTION) on the secondary disk. Done: ``verified``."""

    sequence: int
    questions: bytes


class Resize(NamedTuple):
    """Grow the volumes to ``sizes``, none of which is smaller than now; if not ``exact``, as far as the disks go.
    Durably. Done: ``resized``."""

    sequence: int
    sizes: tuple[int, ...]
    exact: bool


class Grow(NamedTuple):
    """The primary's volumes are larger: it grew while this side was away. Make room, and mark what is new as possibly
    differing, durably; the primary comes back until that is done. Done: ``grown``."""

    sizes: tuple[int, ...]
    sequence: int = 0
    """Of no message."""


class Connected(NamedTuple):
    """A session began. ``again``: the primary came back with the same stream; else expect a BeginResync."""

    peer: bytes
    hello: wire.Hello
    again: bool


class Disconnected(NamedTuple):
    """The session ended. ``on_purpose``: the primary said BYE; otherwise it may be dead."""

    reason: str
    on_purpose: bool


class Refused(NamedTuple):
    """A primary was turned away (a Send with the REFUSE goes with it): for the log."""

    peer: bytes
    code: str
    sentence: str


Work = Apply | Checkpoint | BeginResync | EndResync | Verify | Resize | Grow
Effect = Send | Work | Connected | Disconnected | Refused | Asked
