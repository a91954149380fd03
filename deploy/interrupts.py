"""Signals that end a command as Ctrl-C does: what it has begun is undone on the way out."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Final

ENDING: Final = (signal.SIGTERM, signal.SIGHUP)


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """A handler of signals that raises KeyboardInterrupt."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """In it, SIGTERM and SIGHUP (unless the latter is ignored, as by nohup) raise KeyboardInterrupt."""
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if (number, handler) != (signal.SIGHUP, signal.SIG_IGN):
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
