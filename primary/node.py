"""The primary process: its disks, its metadata, an NBD export in front, an engine behind."""

from __future__ import annotations

import logging
import os
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.arguments import flag_of
from common.control import ControlServer
from common.disk import FileDisk
from common.errors import OperationFailed
from common.export import NbdServer
from common.generation import extend
from common.inquiry import Informant
from common.intent import INTENT_FILE
from common.keys import stream_keys
from common.metadata import load
from common.port import zmq_context
from common.process import Lifecycle
from common.record import (
    Record,
    check_leading_disks,
    check_metadata,
    disks_changed,
    initial_metadata,
    random_number,
    refuse_mixture,
)
from common.settings import NodeSettings
from primary.doorman import Doorman
from primary.engine import Engine

log = logging.getLogger("primary")


class PrimaryNode:
    """``start`` it, wait, ``close`` it."""

    def __init__(self, settings: NodeSettings, lifecycle: Lifecycle) -> None:
        self.settings = settings
        self.engine: Engine
        self.server: NbdServer
        self._lifecycle = lifecycle
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Open everything, find the secondary or its absence, serve; a stop that comes before that is seen to by the
        caller. What cannot be is a TandemDiskError."""
        settings = self.settings
        context = self._stack.enter_context(zmq_context())
        disks = [FileDisk(volume.disk) for volume in settings.volumes]
        record = self._remember(disks)
        names = [volume.name for volume in settings.volumes]
        engine = Engine(settings, record, list(zip(names, disks, strict=True)), context, self._lifecycle)
        for volume, setting in zip(engine.mirror.volumes, settings.volumes, strict=True):
            volume.read_only = setting.read_only
        self.server = NbdServer(engine.mirror.volumes, default=names[0])
        self.engine = engine
        # before anything is sent: should this process die, the next one, which went on with the same stream, would have
        # sent less than its secondary has
        await engine.knowledge.remember_start()
        control = ControlServer(
            settings.control_path("primary"),
            {
                "status": self._status,
                "checkpoint": engine.checkpoints.command,
                "verify": engine.alignment.verify_command,
                "resync": engine.alignment.resync_command,
                "resize": engine.growth.command,
                "clear_error": self._clear_error,
                "redial": self._redial,
                "stop": self._stop,
            },
        )
        await control.start()
        self._stack.push_async_callback(control.close)
        if settings.replication.listen is not None:
            listen, keys = settings.replication.listen, stream_keys(settings.replication)
            informant = Informant(settings)
            doorman = Doorman(context, listen, keys, engine.current_standing, informant, engine.turned_away)
            self._stack.callback(doorman.close)
        engine.start(self.server)
        await engine.settle()
        if self._lifecycle.stop.is_set():
            return
        engine.serving = True
        await self.server.listen(settings.export)

    def _remember(self, disks: list[FileDisk]) -> Record:
        settings = self.settings
        path = f"{settings.directory}/metadata"
        stored = load(path)
        metadata = stored or initial_metadata(settings, "primary", [disk.size for disk in disks])
        check_metadata(settings, metadata, disks)
        if metadata.role != "primary":
            raise OperationFailed(
                f"Side {settings.side} of pair {settings.pair_id} is the secondary: its disk follows the other side's.",
                hint="Start it as secondary, or let it take over with `tandemdisk failover`.",
            )
        refuse_mixture(settings, metadata)
        check_leading_disks(settings, metadata)
        if reason := disks_changed(settings, metadata):
            log.warning("the whole disk is compared reason=%r", reason)
            Path(f"{settings.directory}/{INTENT_FILE}").unlink(missing_ok=True)
            metadata = replace(metadata, clean=False, base=0, bases=())
        record = Record(path, metadata)
        self._stack.callback(record.close)
        if not metadata.history:
            record.update(history=extend((), random_number(64), settings.side), clean=True)
        elif stored is None:
            record.update()
        return record

    # Commands

    async def _status(self, _args: dict[str, Any]) -> dict[str, Any]:
        status = self.engine.status()
        exported = self.server.statistics()
        volumes = []
        for volume, dirty in zip(self.engine.mirror.volumes, status.pop("dirty_bytes"), strict=True):
            uris = self.server.uris(volume.name)
            volumes.append({
                "name": volume.name, "size": volume.size, "nbd_uri": next(iter(uris), None), "uris": uris,
                "dirty_bytes": dirty,
            })  # fmt: skip
        status["counters"] = {name: getattr(exported, name) for name in type(exported).__slots__} | status["counters"]
        return status | {"pid": os.getpid(), "nbd_uri": volumes[0]["nbd_uri"], "volumes": volumes}

    async def _redial(self, _args: dict[str, Any]) -> dict[str, Any]:
        self.engine.link.redial()
        return {}

    async def _stop(self, args: dict[str, Any]) -> dict[str, Any]:
        number = None
        if flag_of(args, "checkpoint") and self.engine.state == "protected":
            await self.server.close()
            number = await self.engine.checkpoints.take_last()
        self._lifecycle.stop.set()
        return {"checkpoint": number, "state": self.engine.state}

    async def _clear_error(self, _args: dict[str, Any]) -> dict[str, Any]:
        await self.engine.clear_error()
        return {}

    # End

    async def close(self) -> None:
        """Answer what is in flight, say goodbye, note where the stream ends."""
        try:
            if "server" in self.__dict__:
                await self.server.close()
                await self.engine.close()
        finally:  # also where the end cannot be noted
            await self._stack.aclose()


async def main(settings: NodeSettings, lifecycle: Lifecycle) -> None:
    """The process' life, for ``common.process.run``."""
    node = PrimaryNode(settings, lifecycle)
    try:
        await node.start()
        if not lifecycle.stop.is_set():
            lifecycle.ready({
                "pid": os.getpid(),
                "nbd_uri": node.server.uris(settings.volumes[0].name)[0],
                "state": node.engine.state,
            })
        await lifecycle.stop.wait()
    finally:
        await node.close()
