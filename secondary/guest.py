"""The export process of the secondary: the guest's view over NBD, from the shared memory of the disk buffer.

    python -m secondary.guest --settings-fd N …      (started by the secondary process, never by hand)

It owns nothing: it maps what the secondary process made, opens the secondary disks beside it, and serialises each of
its operations against the backup job through CowRequests. So it can be killed at any instant, and a failover changes
nothing for its clients but the stage that the next operation finds.

After a promotion every write to a disk is noted in the write-intent file before it is done. When the commit is complete
the secondary process says ``lead``, and this process becomes a primary around the clients that it has: an engine looks
for the other side, and writes go through its mirror. From then on the side's metadata belongs to the engine.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import threading
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from common.arguments import flag_of
from common.control import ControlServer
from common.disk import FileDisk
from common.errors import DiskError, OperationFailed
from common.export import NbdServer
from common.generation import extend
from common.intent import INTENT_FILE, IntentFile
from common.metadata import load
from common.port import zmq_context
from common.process import Lifecycle, run
from common.record import Record, random_number
from common.settings import NodeSettings
from primary.engine import Engine
from secondary.buffer import DiskBuffer
from secondary.header import Stage
from secondary.replica import GuestVolume

log = logging.getLogger("export")


class Intents:
    """Notes where a promoted side writes, durably and before it does; from any thread."""

    def __init__(self, path: str, buffer: DiskBuffer) -> None:
        self._path = path
        self._buffer = buffer
        self._lock = threading.Lock()
        self._file: IntentFile | None = None

    def note(self, volume: int, offset: int, length: int) -> None:
        """Before a write. OSError if it cannot be noted: then it must not be done."""
        try:
            with self._lock:
                if self._file is None:
                    sizes = [geometry.size for geometry in self._buffer.header.volumes()]
                    self._file = IntentFile(self._path, sizes, shared=True)
                if not self._file.covers(volume, offset, length):
                    self._file.set_ranges([(volume, offset, length)])
        except DiskError as error:
            raise OSError(errno.EIO, error.sentence) from error

    def close(self) -> None:
        """The engine notes from here on."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


class GuestProcess:
    """See the module. ``start`` it, wait, ``close`` it."""

    def __init__(self, settings: NodeSettings, lifecycle: Lifecycle) -> None:
        self.settings = settings
        self.engine: Engine | None = None
        self._leading: asyncio.Task[None] | None = None
        """Makes the engine, or has made it."""
        self._stopping = False
        self._lifecycle = lifecycle
        self._stack = AsyncExitStack()
        self._succeeds = False
        """Another process may have led, and the other side may follow: no write before this one leads, too."""
        self._began = False
        """It did begin a generation of its own."""
        self.buffer = DiskBuffer.attach(
            settings.buffer.directory, pair_id=settings.pair_id, timeout_s=settings.request_timeout_s
        )
        self.disks = [FileDisk(volume.disk, exclusive=False) for volume in settings.volumes]
        self._succeeds = self.buffer.header.stage is Stage.DONE and settings.replication.connect is not None
        for disk, layers in zip(self.disks, self.buffer.volumes, strict=True):
            disk.use(layers.size)
        self.intents = Intents(f"{settings.directory}/{INTENT_FILE}", self.buffer)
        self.volumes = [
            GuestVolume(layers, disk, on_write=partial(self.intents.note, index))
            for index, (layers, disk) in enumerate(zip(self.buffer.volumes, self.disks, strict=True))
        ]
        for volume, setting in zip(self.volumes, settings.volumes, strict=True):
            volume.read_only = setting.read_only
        self.server = NbdServer(self.volumes, default=settings.volumes[0].name)

    async def start(self) -> None:
        """Serve."""
        handlers = {
            "status": self._status,
            "stop": self._stop,
            "lead": self._lead,
            "checkpoint": self._checkpoint,
            "verify": self._verify,
            "resync": self._resync,
            "resize": self._resize,
            "redial": self._redial,
            "turned_away": self._turned_away,
            "clear_error": self._clear_error,
        }
        control = ControlServer(self.settings.control_path("export"), handlers)
        await control.start()
        self._stack.push_async_callback(control.close)
        if self._succeeds:
            for volume in self.volumes:
                await volume.pause()
        await self.server.listen(self.settings.export)

    # Leading

    async def _lead(self, _args: dict[str, Any]) -> dict[str, Any]:
        """Become a primary; the secondary process writes the metadata no more."""
        if self._stopping:
            raise OperationFailed("This process stops.")
        if self.engine is None:
            if self._leading is None or self._leading.done():
                self._leading = asyncio.create_task(self._begin_to_lead(), name="lead")
            await asyncio.shield(self._leading)  # whoever asks again, having waited too long, joins in
        return {}

    async def _begin_to_lead(self) -> None:
        header = self.buffer.header
        if header.stage is not Stage.DONE:
            raise OperationFailed(f"This side cannot lead in stage {header.stage.name}.")
        for volume in self.volumes:
            await volume.pause()  # a write that came after the engine has read the intents would be unknown to it
        engine: Engine | None = None
        try:
            engine = await self._make_engine()
        finally:
            successors = engine.mirror.volumes if engine is not None else [None] * len(self.volumes)
            if engine is not None or not self._succeeds:
                for volume, successor in zip(self.volumes, successors, strict=True):
                    volume.hand_over(successor)
        engine.serving = True
        self.engine = engine
        log.info("leading generation=%d", engine.session.standing.history[-1].number)

    async def _make_engine(self) -> Engine:
        """An engine that has begun to look for the other side."""
        settings = self.settings
        stored = load(f"{settings.directory}/metadata")
        assert stored is not None
        record = Record(f"{settings.directory}/metadata", stored)
        self._stack.callback(record.close)
        if self._succeeds and not self._began:
            # the other side may follow in the generation that the process before this one led in: no more writes there
            await record.update_async(history=extend(stored.history, random_number(64), settings.side))
            self._began = True
        context = self._stack.enter_context(zmq_context())
        self.intents.close()
        for disk, (_, size) in zip(self.disks, stored.volumes, strict=True):
            disk.use(size)
        self._grown()  # a crash came between the metadata and the header
        names = [volume.name for volume in settings.volumes]
        engine = Engine(settings, record, list(zip(names, self.disks, strict=True)), context, self._lifecycle)
        engine.checkpoints.number = self.buffer.header.checkpoint.number
        engine.growth.on_grown = self._grown
        if any(volume.lost_writes for volume in self.volumes):
            engine.knowledge.disk_lost_writes()
        try:
            await engine.knowledge.remember_start()
        except BaseException:
            engine.discard()  # nobody knows it yet: a stop, or a full disk, came first
            raise
        engine.start(self.server, alone="this side was promoted")
        return engine

    def _leader(self) -> Engine:
        if self.engine is None:
            raise OperationFailed("This side does not lead yet.", hint="`tandemdisk status` shows how far it is.")
        return self.engine

    async def _checkpoint(self, args: dict[str, Any]) -> dict[str, Any]:
        return await self._leader().checkpoints.command(args)

    async def _verify(self, args: dict[str, Any]) -> dict[str, Any]:
        return await self._leader().alignment.verify_command(args)

    async def _resync(self, args: dict[str, Any]) -> dict[str, Any]:
        return await self._leader().alignment.resync_command(args)

    async def _resize(self, args: dict[str, Any]) -> dict[str, Any]:
        return await self._leader().growth.command(args)

    def _grown(self) -> None:
        """The disks, and the metadata, have new sizes; the disk buffer follows."""
        for layers, disk in zip(self.buffer.volumes, self.disks, strict=True):
            if disk.size > layers.size:
                layers.grow(disk)

    async def _redial(self, _args: dict[str, Any]) -> dict[str, Any]:
        self._leader().link.redial()
        return {}

    async def _turned_away(self, args: dict[str, Any]) -> dict[str, Any]:
        self._leader().turned_away(str(args.get("sentence", "")))
        return {}

    async def _clear_error(self, _args: dict[str, Any]) -> dict[str, Any]:
        await self._leader().clear_error()
        return {}

    # Commands

    async def _status(self, _args: dict[str, Any]) -> dict[str, Any]:
        statistics = self.server.statistics()
        return {
            "role": "export",
            "pid": os.getpid(),
            "stage": self.buffer.header.stage.name,
            "volumes": [
                {"name": volume.name, "size": volume.size, "uris": self.server.uris(volume.name)}
                for volume in self.volumes
            ],
            "counters": {name: getattr(statistics, name) for name in type(statistics).__slots__},
            "engine": self.engine.status() if self.engine is not None else None,
        }

    async def _stop(self, args: dict[str, Any]) -> dict[str, Any]:
        number = None
        if flag_of(args, "checkpoint") and self.engine is not None and self.engine.state == "protected":
            await self.server.close()
            number = await self.engine.checkpoints.take_last()
        self._lifecycle.stop.set()
        return {"checkpoint": number}

    async def close(self) -> None:
        """Answer what is in flight, and note where the stream ends."""
        self._stopping = True
        if self._leading is not None and not self._leading.done():
            self._leading.cancel()  # what waits for the engine goes on without it
            await asyncio.wait((self._leading,))
        await self.server.close()
        if self.engine is not None:
            await self.engine.close()
        await self._stack.aclose()
        self.intents.close()
        for disk in self.disks:
            disk.close()
        self.buffer.close()


async def main(settings: NodeSettings, lifecycle: Lifecycle) -> None:
    """Serve until told to stop."""
    process = GuestProcess(settings, lifecycle)
    try:
        await process.start()
        uris = {volume.name: process.server.uris(volume.name) for volume in process.volumes}
        lifecycle.ready({"pid": os.getpid(), "uris": uris})
        await lifecycle.stop.wait()
    finally:
        await process.close()


if __name__ == "__main__":
    run(main, "export", orphaned=signal.SIGKILL)
