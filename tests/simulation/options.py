"""Swarm options: what kind of life a seed's pair has. Each seed switches some kinds of trouble on and leaves the
others out, because a run with every fault at once only ever finds the shallowest of its bugs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

TROUBLES = (
    "cut", "one_way", "reset", "bad_messages", "stale", "jitter",
    "kill_primary", "kill_secondary", "kill_export", "power_primary", "power_secondary", "pause", "stop",
    "disk_primary", "disk_secondary", "slow", "metadata", "kill_inside", "slow_reader", "preempt", "clocks",
)  # fmt: skip

COMMANDS = (
    "resize", "dirty_growth", "verify", "corrupt", "resync", "switchover", "takeover", "rejoin", "intents",
)  # fmt: skip
"""What an operator, or a disk, may do in the middle of a life."""
RESTORE = "restore"
"""Another: the host of the secondary goes back to an older copy of itself. It is not drawn among the others: with
``LEADS`` such a copy might lead, or be too small."""
LEADS = frozenset({"resize", "dirty_growth", "switchover", "takeover", "rejoin"})
POLICIES = ("pull_ahead", "lag", "no_intents", "changing_intents", "ceiling", "floor", "deadline", "compress")
"""What a configuration may say. ``changing_intents``: ``write_intent`` is another at each start, now and then."""
PATHS = ("few_epochs", "vectors", "hopeless", "samples")
"""What the product does otherwise when there is much: here when there is little. Epochs are used up after a few
checkpoints; arrays instead of single numbers, threads instead of the loop; a resync does not ask where most answers
were "differs"; a resync begins with samples."""
ALONE = frozenset({"pull_ahead", "lag"})
"""These go on alone: no configuration may say so with ``on_peer_loss = "block"``."""
FLAPPING = "flapping"
"""Another trouble: the cable comes and goes, many times. It is not drawn among the others."""
MOST_GROWTH = 12
"""Blocks."""


class UnknownOption(ValueError):
    """There is no such option, or it cannot be that."""


@dataclass
class Options:
    """One pair and its life. ``troubles``: which kinds may come."""

    sync: bool = True
    loss: str = "continue"
    block_size: int = 1024
    blocks: tuple[int, ...] = (24,)
    """Blocks of each volume."""
    odd_end: bool = False
    """The last block is shorter."""
    small_pool: int = 0
    """Blocks of a pool at least; 0: a slot for each block."""
    large: bool = False
    """Clients send batches that are larger than half a pool."""
    assume: bool = False
    interval_s: float = 0.0
    window_bytes: int = 1 << 20
    steps: int = 60
    guest: bool = True
    failover: str = ""
    """How it ends: a failover to this target somewhere in the second half; empty: none."""
    dense: bool = False
    """Clients keep a deep queue: batches of many small operations, one behind the other."""
    troubles: frozenset[str] = field(default_factory=frozenset)
    tempo_s: float = 0.05
    commands: frozenset[str] = field(default_factory=frozenset)
    """Of ``COMMANDS``: ``dirty_growth`` lets disks grow by what holds something already."""
    paths: frozenset[str] = field(default_factory=frozenset)
    """Of ``PATHS``."""
    policies: frozenset[str] = field(default_factory=frozenset)
    """Of ``POLICIES``: ``compress`` compresses the stream wherever that makes it shorter, in turn by the loop and by a
    thread."""

    @property
    def growth(self) -> int:
        """Blocks by which a volume may grow."""
        return MOST_GROWTH if "resize" in self.commands else 0

    @property
    def spill(self) -> float:
        """Part of a side's disks that a resync may put into spill files. Not drawn: seeds stay what they were."""
        return (1.0, 0.0, 0.3)[sum(self.blocks) % 3]

    def settings(self, drawn: Options) -> list[str]:
        """``name=value`` for what differs from ``drawn``, as ``put`` reads it."""
        return [
            f"{item.name}={_written(getattr(self, item.name))}" for item in fields(self)
            if getattr(self, item.name) != getattr(drawn, item.name)
        ]  # fmt: skip

    def put(self, settings: Sequence[str]) -> Options:
        """With ``name=value`` for each of ``settings``. UnknownOption, in a sentence, for what is none."""
        known = {item.name: getattr(self, item.name) for item in fields(self)}
        changes: dict[str, Any] = {}
        for setting in settings:
            name, equals, value = setting.partition("=")
            if name not in known or not equals:
                raise UnknownOption(f"{setting!r} is no name=value. Names: {', '.join(known)}.")
            try:
                changes[name] = _read(known[name], value)
            except (ValueError, KeyError):
                raise UnknownOption(f"{name} cannot be {value!r}.") from None
        return replace(self, **changes)

    def describe(self) -> str:
        """One line, what is not the default."""
        default = Options()
        said = [
            f"{item.name}={getattr(self, item.name)!r}" for item in fields(self)
            if not isinstance(getattr(self, item.name), frozenset)
            and getattr(self, item.name) != getattr(default, item.name)
        ]
        for name in ("commands", "paths", "policies"):
            if chosen := getattr(self, name):
                said.append(f"{name}=" + ",".join(sorted(chosen)))
        return " ".join([*said, "troubles=" + ",".join(sorted(self.troubles))])


def _written(value: Any) -> str:
    if isinstance(value, frozenset):
        return ",".join(sorted(value))
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read(like: Any, text: str) -> Any:
    """``_written`` of a value of the type of ``like``."""
    parts = [part for part in text.split(",") if part]
    if isinstance(like, frozenset):
        if not set(parts) <= {*TROUBLES, *COMMANDS, *PATHS, *POLICIES, FLAPPING, RESTORE}:
            raise ValueError
        return frozenset(parts)
    if isinstance(like, tuple):
        return tuple(map(int, parts))
    return {"True": True, "False": False}[text] if isinstance(like, bool) else type(like)(text)


def draw(chance: random.Random, seed: int) -> Options:
    """The options of a seed; ``chance`` is its random numbers. Commands, policies and paths, older copies, a cable that
    flaps and deep queues have numbers of their own: they came later, and seeds without them stayed what they were."""
    operator = random.Random(f"operator {seed}")
    share = operator.choice((0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.35, 0.5, 1.0))
    drawn = _draw(chance)
    if drawn.troubles and random.Random(f"flapping {seed}").random() < 0.15:
        drawn = replace(drawn, troubles=drawn.troubles | {FLAPPING})
    if random.Random(f"dense {seed}").random() < 0.15:
        drawn = replace(drawn, dense=True)
    drawn = replace(drawn, commands=frozenset(name for name in COMMANDS if operator.random() < share))
    if random.Random(f"restore {seed}").random() < 0.1:
        drawn = replace(drawn, failover="", commands=drawn.commands - LEADS | {RESTORE})
    rules = random.Random(f"policies {seed}")
    share = rules.choice((0.0, 0.0, 0.0, 0.2, 0.5))
    policies = frozenset(name for name in POLICIES if rules.random() < share)
    paths = frozenset(name for name in PATHS if rules.random() < 0.15)
    return replace(drawn, paths=paths, policies=policies - ALONE if drawn.loss == "block" else policies)


def options_of(seed: int, settings: Sequence[str]) -> Options:
    """What a seed draws, with ``settings`` (see ``Options.put``) instead."""
    return draw(random.Random(seed), seed).put(settings)


def _draw(chance: random.Random) -> Options:
    share = chance.choice((0.0, 0.1, 0.2, 0.35, 0.6))
    block_size = chance.choice((512, 1024, 1024, 4096))
    volumes = chance.choice((1, 1, 1, 2))
    return Options(
        sync=chance.random() < 0.8,
        loss="block" if chance.random() < 0.2 else "continue",
        block_size=block_size,
        blocks=tuple(chance.choice((6, 16, 24, 40)) for _ in range(volumes)),
        odd_end=block_size > 512 and chance.random() < 0.3,
        small_pool=chance.choice((0, 0, 0, 3, 6, 12)),
        large=chance.random() < 0.2,
        assume=chance.random() < 0.3,
        interval_s=chance.choice((0.0, 0.0, 0.3, 2.0)),
        window_bytes=chance.choice((1 << 20, 1 << 20, 8192, 20000)),
        steps=chance.choice((30, 60, 60, 120)),
        guest=chance.random() < 0.7,
        failover=chance.choice(("", "", "latest", "checkpoint")),
        troubles=frozenset(name for name in TROUBLES if chance.random() < share),
        tempo_s=chance.choice((0.002, 0.02, 0.1, 0.5)),
    )
