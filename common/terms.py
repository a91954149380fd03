"""What the terms of a header may be: one function a kind, which gives the value back or raises WireError.

The other end of the stream is another program; whatever msgpack can express may arrive. Below ``wire.decode`` nothing
is checked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from common import limits
from common.errors import WireError
from common.generation import MAX_HISTORY, Generation, History, Standing

MAX_SENTENCE: Final = 4096
_MAX_NAME: Final = 1024

Check = Callable[[Any], Any]


def integer(bits: int) -> Check:
    """An unsigned integer of ``bits`` bits."""
    def check(value: Any) -> int:
        if type(value) is not int or not 0 <= value < 1 << bits:
            raise WireError(f"expected an unsigned integer of {bits} bits, got {short(value)}")
        return value
    return check


def flag(value: Any) -> bool:
    """A boolean."""
    if type(value) is not bool:
        raise WireError(f"expected a boolean, got {short(value)}")
    return value


def text(limit: int) -> Check:
    """A text of at most ``limit`` characters."""
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > limit:
            raise WireError(f"expected a text of at most {limit} characters, got {short(value)}")
        return value
    return check


def word(*words: str) -> Check:
    """One of ``words``."""
    def check(value: Any) -> str:
        if value not in words or type(value) is not str:
            raise WireError(f"expected one of {', '.join(words)}, got {short(value)}")
        return value
    return check


def seconds(value: Any) -> float:
    """A finite number of seconds."""
    if type(value) is not float or not math.isfinite(value):
        raise WireError(f"expected a finite number of seconds, got {short(value)}")
    return value


def block_size(value: Any) -> int:
    """A power of two within the limits of a block."""
    if type(value) is not int or not limits.MIN_BLOCK <= value <= limits.MAX_BLOCK or value & (value - 1):
        raise WireError(f"expected a block size, got {short(value)}")
    return value


def packed_records(size: int) -> Check:
    """Packed records of ``size`` bytes, no more than fit into a message."""
    def check(value: Any) -> bytes:
        if type(value) is not bytes or len(value) % size or len(value) > limits.MAX_BATCH_EXTENTS * 24:
            raise WireError(f"expected packed records of {size} bytes, got {short(value)}")
        return value
    return check


def _tuple(value: Any, least: int, most: int, what: str) -> list[Any]:
    if type(value) is not list or not least <= len(value) <= most:
        raise WireError(f"expected {what}, got {short(value)}")
    return value


def volumes(value: Any) -> tuple[tuple[str, int], ...]:
    """Names and sizes."""
    pairs = [_tuple(pair, 2, 2, "a volume's name and size")
             for pair in _tuple(value, 1, limits.MAX_VOLUMES, "the volumes")]
    return tuple((NAME(name), U63(size)) for name, size in pairs)


def sizes(value: Any) -> tuple[int, ...]:
    """Bytes of each volume."""
    return tuple(U63(size) for size in _tuple(value, 1, limits.MAX_VOLUMES, "the sizes of the volumes"))


def history(value: Any) -> History:
    """A history of generations."""
    entries = [_tuple(entry, 3, 3, "a generation") for entry in _tuple(value, 0, MAX_HISTORY, "a generation history")]
    return tuple(Generation(I64(identity), I64(number), NAME(side)) for identity, number, side in entries)


def standing(value: Any) -> Standing:
    """A side's standing."""
    pair_id, side, role, generations, consistent, base, blocks, size = _tuple(value, 8, 8, "a side's standing")
    return Standing(NAME(pair_id), NAME(side), ROLE(role), history(generations), flag(consistent),
                    I64(base), I64(blocks), I64(size))


def short(value: Any) -> str:
    """A value for a sentence."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:60] + "..."


I64: Final = integer(64)
U63: Final = integer(63)
NAME: Final = text(_MAX_NAME)
SENTENCE: Final = text(MAX_SENTENCE)
ROLE: Final = word("primary", "secondary")
