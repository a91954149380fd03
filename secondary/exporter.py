"""The export process, seen from the secondary process: a child that is started again whenever it dies, and that takes
commands once it leads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final

from common.child import Child, exit_reason
from common.control import ControlClient
from common.errors import TandemDiskError, TimedOut
from common.settings import NodeSettings

TIMEOUT_S: Final = {
    "status": 2.0, "lead": 60.0, "redial": 5.0, "checkpoint": 120.0, "stop": 120.0, "verify": 30 * 24 * 3600.0,
    "resync": 30 * 24 * 3600.0, "resize": 120.0, "turned_away": 5.0, "clear_error": 5.0,
}  # fmt: skip
"""How long it may take to answer."""
PAUSES_S: Final = (0.0, 0.1, 0.5, 2.0, 5.0)
"""Pauses before one that died is started again; the last one repeats. A failover waits for it, so none at first."""
STEADY_S: Final = 5.0
"""One that served for so long does not die of what it finds at its start: its successor begins with the first pause."""

log = logging.getLogger("secondary")


class Exporter:
    """``start`` it, ``keep`` it as a task."""

    def __init__(self, settings: NodeSettings) -> None:
        self.restarts = 0
        """Times that it was started again."""
        self.uris: dict[str, list[str]] = {}
        """Volume -> where it is served."""
        self._settings = settings
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        """None while there is none."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    def uri(self, volume: str) -> str | None:
        """Where a volume is served first."""
        return next(iter(self.uris.get(volume, [])), None)

    async def start(self) -> None:
        """Until it serves; raises what it said, OSError if there is no process to be had."""
        self._child = child = Child.start("secondary.guest", self._settings)
        try:
            told = await child.wait_ready_async()
        except TimedOut:
            await child.stop_async()  # or it would serve later, and nobody would know
            raise
        self.uris = told.get("uris", {})

    async def keep(self, restarted: Callable[[], None]) -> None:
        """Start it again whenever it dies."""
        in_a_row = 0
        while True:
            assert self._child is not None
            started = time.monotonic()
            code = await self._child.wait_async()
            log.error("the export process ended reason=%r", exit_reason(code))
            if time.monotonic() - started > STEADY_S:
                in_a_row = 0
            await asyncio.sleep(PAUSES_S[min(in_a_row, len(PAUSES_S) - 1)])
            in_a_row += 1
            self.restarts += 1
            try:
                await self.start()
                restarted()
            except (OSError, TandemDiskError) as error:
                log.error("the export process does not start: %s", error)

    async def call(self, command: str, /, **args: Any) -> dict[str, Any]:
        """A command for it."""
        client = ControlClient(self._settings.control_path("export"), TIMEOUT_S[command])
        return await client.call_async(command, **args)

    async def stop(self) -> None:
        """For good; it answers what is in flight."""
        if self._child is not None:
            await self._child.stop_async()
