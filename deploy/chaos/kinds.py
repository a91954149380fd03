"""What a cycle of chaos can draw, and how often."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from deploy.chaos.disks import DiskErrors, DiskFull
from deploy.faults import HostGone, Paused
from deploy.hosts import Side

KINDS: Final = {
    "kill leader": 36, "kill follower": 26, "kill export": 4, "kill both": 5, "pause leader": 4, "pause follower": 5,
    "cable": 12, "takeover": 18, "EFBIG leader": 2, "EFBIG follower": 2, "checkpoint": 20, "switchover": 5,
    "host gone leader": 10, "host gone follower": 6, "ENOSPC leader": 6, "ENOSPC follower": 6, "EIO leader": 6,
    "EIO follower": 6,
}  # fmt: skip
"""Faults and commands by their share, where they can be: a host that is gone between namespaces, ENOSPC and EIO where
the side lives on a disk that can be broken so."""
LASTING: Final = (Paused, HostGone, DiskFull, DiskErrors)
"""Faults that need time to show, beside those of the cable."""


def possible(
    wanted: Collection[str], disks: Collection[tuple[str, Side]], leading: Side, namespaces: bool
) -> dict[str, int]:
    """The shares of what can be drawn of what is ``wanted`` (all if that is empty), while ``leading`` leads."""
    there = {f"{kind} {'leader' if side == leading else 'follower'}" for kind, side in disks}
    shares = {
        kind: share
        for kind, share in KINDS.items()
        if (kind in there or not kind.startswith(("ENOSPC", "EIO")))
        and (namespaces or not kind.startswith("host"))
        and (not wanted or kind in wanted)
    }
    return shares or {"checkpoint": 1}
