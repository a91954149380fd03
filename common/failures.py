"""The seven failure cases of QEMU's docs/block-replication.txt: what became of them here.

``error`` in a side's status is the last failure that was not put right since: its case, name, sentence, time.
``counters.failures`` counts every one.

    case                        what happens                                              put right by
    1 primary disk              the client gets the error; a flush: the side does not     an operator
                                start as a primary again
    2 forwarding                clients go on; the pair is reconnecting, then alone or    being protected again
                                blocked, as ``on_peer_loss`` says
    3 backup job                nothing is overwritten; the session ends, the primary     the next checkpoint
                                starts again at what was applied
    4 secondary disk            the same                                                  the next checkpoint
    5 active disk               the guest gets the error                                  the next checkpoint
    6 emptying the buffers      that checkpoint fails, whoever asked for it is told; the  the next checkpoint
                                one before it stays, and replication goes on
    7 failover                  stage FAILOVER_FAILED: every byte can be read and         a commit that succeeds
                                written where it is; ``failover`` may be given again

"An operator" is ``tandemdisk status --clear-error``, which forgets any of them: that a disk took another write proves
nothing about the one that it refused.
"""

from __future__ import annotations

import enum
import logging
import time
from collections import Counter
from typing import Any, Final


class Failure(enum.IntEnum):
    """The seven cases, in the document's order."""

    NONE = 0
    PRIMARY_DISK = 1
    FORWARDING = 2
    BACKUP = 3
    SECONDARY_DISK = 4
    ACTIVE_DISK = 5
    EMPTYING = 6
    FAILOVER = 7


FAILURE_WORDS: Final = {
    Failure.PRIMARY_DISK: "I/O error on the primary disk",
    Failure.FORWARDING: "forwarding a primary write failed",
    Failure.BACKUP: "the backup job failed",
    Failure.SECONDARY_DISK: "I/O error on the secondary disk",
    Failure.ACTIVE_DISK: "I/O error on the active disk",
    Failure.EMPTYING: "emptying the disk buffer failed",
    Failure.FAILOVER: "failover failed",
}

log = logging.getLogger("failures")


def error_status(case: Failure, sentence: str, at: float) -> dict[str, Any]:
    """A failure as ``status`` tells it; ``at`` in seconds since 1970."""
    return {"case": int(case), "name": FAILURE_WORDS[case], "sentence": sentence, "time": at}


def count_status(counts: dict[Failure, int]) -> dict[str, int]:
    """Counts as ``status`` tells them."""
    return {FAILURE_WORDS[case]: count for case, count in sorted(counts.items())}


class Failures:
    """The failures of one process, for its status. (A secondary's processes share theirs: ``secondary.header``.)"""

    def __init__(self) -> None:
        self.error: dict[str, Any] | None = None
        self.counts: Counter[Failure] = Counter()

    def add(self, case: Failure, sentence: str) -> None:
        """Keep it; the last one wins."""
        log.error("%s: %s", FAILURE_WORDS[case], sentence)
        self.error = error_status(case, sentence, time.time())
        self.counts[case] += 1

    def clear(self, *cases: Failure) -> None:
        """Forget the last one if it is one of ``cases``, or whichever it is."""
        if self.error is not None and (not cases or self.error["case"] in cases):
            self.error = None
