"""Checkpoints of a primary: taken on command, now and then, and when the secondary's pool asks for one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final

from common.arguments import seconds_of
from common.errors import OperationFailed, TandemDiskError, TimedOut
from primary.effects import CheckpointDone
from primary.link import Link
from primary.session import PrimarySession

CHECKPOINT_TIMEOUT_S: Final = 60.0

log = logging.getLogger("primary")


class Checkpoints:
    """Takes them, and remembers the last one."""

    def __init__(self, session: PrimarySession, link: Link, number: int) -> None:
        self.number = number
        """Of the last checkpoint that both sides have."""
        self.time = 0.0
        """When this process took it; 0: it did not."""
        self.seconds = 0.0
        """How long it took."""
        self._session = session
        self._link = link

    async def take(self, timeout_s: float = CHECKPOINT_TIMEOUT_S) -> CheckpointDone:
        """A barrier behind everything written so far; returns when the secondary has switched epochs."""
        done: asyncio.Future[CheckpointDone] = asyncio.get_running_loop().create_future()
        self._link.send(self._session.checkpoint(done, time.monotonic()))
        try:
            async with asyncio.timeout(timeout_s):
                return await done
        except TimeoutError:
            raise TimedOut(
                f"The secondary did not take the checkpoint within {timeout_s:g} s.",
                hint="`tandemdisk status` says what it waits for; the checkpoint is still under way.",
            ) from None

    async def take_last(self) -> int | None:
        """The one before a stop; its number, or None if there is none to be had. Clients are cut off already, so what
        was told to stop stops."""
        try:
            return (await self.take()).number
        except TandemDiskError as error:
            log.warning("no final checkpoint: %s", error)
            return None

    async def command(self, args: dict[str, Any]) -> dict[str, Any]:
        """``checkpoint`` as a control command."""
        started = time.perf_counter()
        done = await self.take(seconds_of(args, "timeout_s", CHECKPOINT_TIMEOUT_S))
        return {
            "checkpoint": done.number,
            "seconds": time.perf_counter() - started,
            "secondary_seconds": done.seconds,
            "sequence": done.sequence,
        }

    async def now_and_then(self, interval_s: float, protected: Callable[[], bool]) -> None:
        """One every ``interval_s`` while the pair is ``protected``."""
        while True:
            await asyncio.sleep(interval_s)
            if not protected():
                continue
            try:
                await self.take()
            except TandemDiskError as error:
                log.warning("checkpoint failed: %s", error)

    def done(self, effect: CheckpointDone) -> None:
        """The secondary has switched epochs."""
        self.number = effect.number
        self.time = time.time()
        self.seconds = effect.elapsed_s
        if isinstance(effect.token, asyncio.Future) and not effect.token.done():
            effect.token.set_result(effect)

    def failed(self, token: Any, sentence: str) -> None:
        """No checkpoint was taken; the one before it stays."""
        log.warning("no checkpoint: %s", sentence)
        if isinstance(token, asyncio.Future) and not token.done():
            token.set_exception(OperationFailed(f"No checkpoint was taken. {sentence}"))
