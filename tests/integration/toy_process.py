"""A process with the contract of ``common.process`` and nothing else, for tests of that contract.

Its mode is the settings' ``pair_id``: ``serve``, ``config-error``, ``bug``, ``exit``, ``late-bug``, ``hang``.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from common.control import ControlServer
from common.errors import ConfigError
from common.process import Lifecycle, run
from common.settings import NodeSettings


async def main(settings: NodeSettings, lifecycle: Lifecycle) -> None:
    """Do what the mode says."""
    match settings.pair_id:
        case "config-error":
            raise ConfigError("The toy is broken.", hint="Mend it.")
        case "bug":
            raise ZeroDivisionError("a bug")
        case "exit":
            os._exit(7)
        case "hang":
            lifecycle.ready()
            time.sleep(3600)  # noqa: ASYNC251  # a process that hears no signal handler
        case "late-bug":
            lifecycle.critical(_late_bug(), "late bug")

    async def stop(_args: dict[str, Any]) -> dict[str, Any]:
        lifecycle.stop.set()
        return {}

    control = ControlServer(settings.control_path("toy"), {"stop": stop})
    await control.start()
    lifecycle.ready({"pid": os.getpid(), "parent": os.getppid()})
    await lifecycle.stop.wait()
    await control.close()


async def _late_bug() -> None:
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    raise ZeroDivisionError("a late bug")


if __name__ == "__main__":
    run(main, "toy")
    sys.exit("unreachable")
