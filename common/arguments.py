"""Arguments of control commands: what came as JSON, as the type that the command needs, or a sentence that says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from common.errors import ConfigError

MAX_SECONDS: Final = 1e8
_SHOWN: Final = 80
"""Characters of a wrong value that the sentence shows."""


def seconds_of(args: Mapping[str, Any], name: str, default: float) -> float:
    """The argument ``name``, a number of seconds; ConfigError for anything else."""
    value = args.get(name, default)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_SECONDS:
        return float(value)
    raise _wrong(name, "a number of seconds", value)


def number_of(args: Mapping[str, Any], name: str) -> int | None:
    """The argument ``name``, a number of bytes or None; ConfigError for anything else."""
    value = args.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63):
        return value
    raise _wrong(name, "a number of bytes", value)


def text_of(args: Mapping[str, Any], name: str) -> str | None:
    """The argument ``name``, a string or None; ConfigError for anything else."""
    value = args.get(name)
    if value is None or isinstance(value, str):
        return value
    raise _wrong(name, "a string", value)


def flag_of(args: Mapping[str, Any], name: str) -> bool:
    """The argument ``name``, True or False, which it is by default; ConfigError for anything else."""
    value = args.get(name, False)
    if isinstance(value, bool):
        return value
    raise _wrong(name, "true or false", value)


def _wrong(name: str, wanted: str, value: object) -> ConfigError:
    return ConfigError(f"The argument {name} must be {wanted}, not {repr(value)[:_SHOWN]}.")
