"""What the pairs of a run are like: each has options and policies of its own, drawn from the seed (swarm testing).

What a policy brings about shows where something else breaks: ``pull-ahead`` and ``max_lag_seconds`` give a secondary
up that lives, without ``write_intent`` a crash compares whole disks, and where the pool is small a resync needs the
spill file, or has to give the last checkpoint up.

A pool is never smaller than ``limits.MIN_POOL``: a pair whose pool shall be too small for its disk has a larger disk,
and blocks so large that a few hundred writes at random touch most of them.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any, Final

from common import limits
from common.settings import Compression, Mode
from deploy.chaos.expectation import BLOCK
from deploy.pair import PairOptions
from primary.contact import AHEAD_S

HEARTBEAT_S: Final = 0.1
PEER_TIMEOUT_S: Final = 0.8
LAG_S: Final = 0.4
"""``max_lag_seconds``, where there is one: a secondary is given up before it counts as silent."""
LARGE: Final = limits.MIN_POOL * 4 // 3 // limits.MIB * limits.MIB // BLOCK
"""Blocks of a disk that the smallest pool does not hold all of."""
LARGE_BLOCK: Final = 64 * limits.KIB
_COMPRESSIONS: Final[tuple[Compression, ...]] = ("off", "off", "zstd")


@dataclass(frozen=True, slots=True)
class Variety:
    """One pair. ``words``: what it has that a pair does not have by default, for the report."""

    options: PairOptions
    blocks: int
    encrypted: bool
    guest: bool
    """Somebody writes on the follower, where checkpoints are rare enough for it."""
    words: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(self.words) or "all by default"

    @property
    def on_peer_loss(self) -> str:
        return str(self.options.overrides["on_peer_loss"])

    @property
    def pause_s(self) -> float:
        """For how long a leader may leave a follower alone that could not keep up, without anything being wrong."""
        overrides = self.options.overrides
        return AHEAD_S[-1] if "max_lag_seconds" in overrides or "on_congestion" in overrides else 0.0


def draw(chance: random.Random, policies: random.Random, mode: Mode, hosts: str) -> Variety:
    """A pair in ``mode`` on ``hosts``. Two sources, so that a seed that is known draws what it drew before there were
    policies."""
    blocks = chance.choice((256, 512, 1024))
    on_peer_loss = chance.choice(("continue", "continue", "block"))
    interval_s = chance.choice((0.0, 0.0, 0.05))
    volumes = chance.choice((1, 1, 2))
    block_size = chance.choice((512, 4096, 4096, 65536))
    compression: Compression = chance.choice(_COMPRESSIONS)
    encrypted = hosts != "local" or chance.random() < 0.3
    guest = not interval_s and chance.random() < 0.6
    overrides: dict[str, Any] = {
        "on_peer_loss": on_peer_loss,
        "replication": {"heartbeat_s": HEARTBEAT_S, "peer_timeout_s": PEER_TIMEOUT_S},
    }
    overrides |= _policies(policies, on_peer_loss)
    unusual = {name: value for name, value in overrides.items() if name != "replication" and value != "continue"}
    words = [f"{name} = {json.dumps(value)}" for name, value in unusual.items()]
    if encrypted and hosts != "local" and policies.random() < 0.3:
        encrypted = False  # what travels between namespaces stays on this machine
    buffer_bytes = None
    if policies.random() < 0.25:
        blocks, block_size, guest = LARGE, LARGE_BLOCK, False
        buffer_bytes = 2 * limits.MIN_POOL * volumes
        spill_bytes = policies.choice((limits.DEFAULT_SPILL, limits.DEFAULT_SPILL, 2 * limits.MIB, 0))
        overrides["buffer"] = {"spill_bytes": spill_bytes}
        words += ["small pool", *([f"spill_bytes = {spill_bytes}"] if spill_bytes != limits.DEFAULT_SPILL else [])]
    words += [
        word
        for word, is_so in (
            (f"{volumes} volumes", volumes > 1), (f"checkpoint_interval_s = {interval_s:g}", interval_s),
            (f"block_size = {block_size}", block_size != limits.DEFAULT_BLOCK), (compression, compression != "off"),
            ("CURVE", encrypted), ("guest", guest),
        )
        if is_so
    ]  # fmt: skip
    options = PairOptions(
        size=blocks * BLOCK, volumes=volumes, mode=mode, hosts=hosts, block_size=block_size, buffer_bytes=buffer_bytes,
        checkpoint_interval_s=interval_s, compression=compression, encrypt=encrypted, overrides=overrides,
    )  # fmt: skip
    return Variety(options, blocks, encrypted, guest, tuple(words))


def _policies(chance: random.Random, on_peer_loss: str) -> dict[str, Any]:
    """Those of the sides' TOML files that the seed draws."""
    drawn: dict[str, Any] = {}
    if chance.random() < 0.25:
        drawn["write_intent"] = False
    if on_peer_loss == "continue":  # who may not go on alone cannot give a secondary up that lives
        if chance.random() < 0.25:
            drawn["on_congestion"] = "pull-ahead"
        if chance.random() < 0.25:
            drawn["max_lag_seconds"] = LAG_S
    return drawn
