"""What the product holds for small and for large, for disks of a few dozen blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import common.intent
import primary.questions
import primary.samples
import primary.synchroniser
import secondary.applier
import secondary.backup
import secondary.buffer
import secondary.header
import secondary.replica
import secondary.view
from primary.resync import ResyncLimits
from tests.simulation.options import Options

FEW_EPOCHS = 7
"""The last one is none."""


def scaled(options: Options, modules: Sequence[Any]) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, value) of what is another in a life with ``options``; ``modules``: those of the product."""
    unit = max(options.block_size, 2048)
    region = 1 << max(12, options.block_size.bit_length() - 1)
    samples = 4 if "samples" in options.paths and "corrupt" not in options.commands else 0
    small = {
        # pieces in which a resync asks and sends: it would be over in one
        "PIECE": unit, "LOOK": 8 * unit, "IN_FLIGHT": 4 * unit, "BUSY_IN_FLIGHT": 2 * unit, "QUESTION_BYTES": unit,
        "HOLE_QUESTION": 4 * unit, "ResyncLimits": functools.partial(ResyncLimits, piece=unit, in_flight=4 * unit),
        # the write-intent bitmap
        "REGION": region, "REGION_SHIFT": region.bit_length() - 1, "AHEAD": 2, "FORGET_INTERVAL_S": 2.0,
        # of disks like these they would be much, and put right what is to be found here
        "SAMPLES": samples, "LOOK_AHEAD": 4 * unit,
    }  # fmt: skip
    for module in modules:
        if module.__name__.startswith(("primary.", "common.intent")):
            for name in small.keys() & vars(module).keys():
                yield module, name, small[name]
    yield primary.questions.Inquiry.ask, "__defaults__", (unit,)
    yield common.intent.IntentFile.__init__, "__defaults__", (region,)
    if "few_epochs" in options.paths:
        yield secondary.header, "LAST_EPOCH", FEW_EPOCHS
    if "vectors" in options.paths:
        for module in (secondary.backup, secondary.buffer, secondary.replica, secondary.view):
            yield module, "SMALL", 1
        yield secondary.backup, "INLINE_BLOCKS", 2
        yield secondary.backup, "INLINE_BYTES", unit
        yield secondary.applier, "INLINE_BYTES", unit
    if "hopeless" in options.paths:
        for name, value in {"SAMPLE": 4, "HOPELESS": 0.5, "STRETCH": 2 * unit, "LONGEST_STRETCH": 4 * unit}.items():
            yield primary.synchroniser, name, value
