"""The secondary process put together: disks, disk buffer, backup job, stream, export process, failover.

What it finds decides how it starts:

    metadata        disk buffer     starts as
    --------        -----------     ---------
    none            –               new side: a full synchronisation, or `assume` = both disks are equal
    secondary       there           where it was, to the message (the buffer outlived the process)
    secondary       gone, clean     where it was; the disk is the last checkpoint
    secondary       gone, unclean   the disk is somewhere after what was recorded: a resync has to come first
    primary         there           promoted: finishes the failover if that was interrupted, then serves the disk
    primary         gone            serves the disk; refuses to if a commit was interrupted: its rest is gone, too

The export process is a child. It is started again whenever it dies, and dies with this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import zmq

from common import limits
from common.arguments import flag_of
from common.control import ControlServer
from common.disk import FileDisk
from common.errors import OperationFailed, TandemDiskError
from common.generation import RETURNING, History
from common.intent import INTENT_FILE, IntentFile
from common.keys import CurveKeys, stream_keys
from common.metadata import Metadata, load
from common.port import zmq_context
from common.process import Lifecycle
from common.record import (
    Record,
    check_leading_disks,
    check_metadata,
    disks_changed,
    fingerprints,
    initial_metadata,
    refuse_mixture,
)
from common.settings import NodeSettings, VolumeSettings
from common.wire import pack_ranges
from secondary.applier import NOWHERE, Applier
from secondary.attach import BUFFER_LINK
from secondary.backup import PairBackup
from secondary.buffer import BufferVolume, DiskBuffer
from secondary.exporter import Exporter
from secondary.growth import Growth
from secondary.header import Failure, Stage
from secondary.link import Link
from secondary.promotion import Promotion
from secondary.report import status_of
from secondary.session import Position, SecondaryConfig, SecondarySession

RECORD_INTERVAL_S: Final = 5.0
"""How often the applied position is made durable together with the disks, so that a crash of the host costs a small
resync."""

LEADING_COMMANDS: Final = ("checkpoint", "verify", "resync", "redial", "resize")
"""What a promoted side's export process answers."""

log = logging.getLogger("secondary")


class SecondaryNode:
    """See the module. ``start`` it, wait, ``close`` it."""

    def __init__(self, settings: NodeSettings, lifecycle: Lifecycle) -> None:
        self.settings = settings
        self._lifecycle = lifecycle
        self._stack = AsyncExitStack()
        self._loop = asyncio.get_running_loop()
        self.exporter = Exporter(settings)
        self._keeping: asyncio.Task[None] | None = None
        self._recorder: asyncio.Task[None] | None = None
        self.connected_at = 0.0
        """When the primary was first heard of in this connection, wall clock; 0: there is none."""
        self._fresh = False
        """The disk buffer was made by this process, and its start is not over: a failure takes it away again."""
        self._was_clean = False

    @property
    def promoted(self) -> bool:
        """This side leads, or is about to."""
        return self.record.value.role == "primary"

    # Start

    async def start(self) -> None:
        """Open everything and serve. Whatever cannot be is a TandemDiskError, and nothing was touched."""
        settings = self.settings
        keys = stream_keys(settings.replication)
        context = self._stack.enter_context(zmq_context())
        self.disks = [self._open(volume.disk) for volume in settings.volumes]
        stored = load(f"{settings.directory}/metadata")
        metadata = stored or initial_metadata(settings, "secondary", [disk.size for disk in self.disks])
        check_metadata(settings, metadata, self.disks)
        metadata = self._check_disks(metadata)
        self.buffer, found = self._open_buffer(stored)
        self._stack.callback(self.buffer.close)
        self._fresh = not found
        self._was_clean = metadata.clean
        self.backup = PairBackup(self.buffer, self.disks)
        self._stack.callback(self.backup.close)
        self.record = Record(f"{settings.directory}/metadata", metadata)
        self._stack.callback(self.record.close)
        position = self._position(metadata, found)
        if position.syncing and not self.buffer.header.syncing:
            await asyncio.to_thread(self.backup.begin_spill)
        self._begin(metadata, found, position)
        self.growth = Growth(settings, self.record, self.buffer, self.disks, self.backup)
        self._link_buffer()
        await self.record.update_async(clean=False, disks=fingerprints(settings, running=True))
        self.promotion = Promotion(settings, self.record, self.buffer, self.disks, self.backup, self.exporter)
        self._connect(context, keys, position)
        control = ControlServer(
            settings.control_path("secondary"),
            {
                "status": self._status,
                "failover": self.promotion.command,
                "clear_error": self._clear_error,
                "stop": self._stop_command,
                **{command: partial(self._pass_on, command) for command in LEADING_COMMANDS},
            },
        )
        await control.start()
        self._stack.push_async_callback(control.close)
        await self.exporter.start()
        self._fresh = False
        self._keeping = self._lifecycle.critical(self.exporter.keep(self.promotion.export_restarted), "export")
        self._recorder = self._lifecycle.critical(self._keep_record(), "recorder")
        if self.promoted:
            await self.promotion.go_on()

    def _check_disks(self, metadata: Metadata) -> Metadata:
        """A disk that is not as this side left it may differ anywhere: say so, durably, and trust no buffer."""
        settings = self.settings
        if metadata.role == "primary":
            check_leading_disks(settings, metadata)
            return metadata
        reason = disks_changed(settings, metadata)
        if not reason:
            return metadata
        log.warning("the whole disk is compared reason=%r", reason)
        path = f"{settings.directory}/{INTENT_FILE}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        IntentFile(path, [disk.size for disk in self.disks], everything=True).close()
        if DiskBuffer.exists(settings.buffer.directory):
            DiskBuffer.remove(settings.buffer.directory)
        return replace(metadata, clean=False, consistent=False, stream=RETURNING, sequence=0)

    def _own_writes(self) -> bytes:
        """Where this side wrote by itself before it became, or rejoined as, secondary; packed for WELCOME."""
        path = f"{self.settings.directory}/{INTENT_FILE}"
        if self.promoted or not os.path.exists(path):
            return b""
        sizes = [disk.size for disk in self.disks]
        file = IntentFile(path, sizes, everything=True)
        ranges = file.ranges()
        file.close()
        if len(ranges) > limits.MAX_BATCH_EXTENTS:
            ranges = [(index, 0, size) for index, size in enumerate(sizes)]
        return pack_ranges(ranges)

    def _open(self, path: str) -> FileDisk:
        disk = FileDisk(path)
        self._stack.callback(disk.close)
        return disk

    def _open_buffer(self, stored: Metadata | None) -> tuple[DiskBuffer, bool]:
        """The buffer, and whether it was there already."""
        settings = self.settings
        directory = settings.buffer.directory
        volumes = [
            BufferVolume(volume.name, disk.size, os.path.abspath(volume.disk), spill_path(settings, volume))
            for volume, disk in zip(settings.volumes, self.disks, strict=True)
        ]
        if stored is not None and DiskBuffer.exists(directory):
            buffer = DiskBuffer.attach(
                directory,
                pair_id=settings.pair_id,
                block_size=settings.buffer.block_size,
                volumes=[(volume.name, volume.size) for volume in volumes],
                outgrown=True,
                timeout_s=settings.request_timeout_s,
            )
            buffer.header.own()
            if buffer.header.stage is not Stage.NONE:
                for layers, disk in zip(buffer.volumes, self.disks, strict=True):
                    if layers.size < disk.size:  # a crash came between the metadata and the header
                        layers.grow(disk)
                return buffer, True
            buffer.close()
        if stored is not None:
            refuse_mixture(settings, stored)
        buffer = DiskBuffer.create(
            settings.buffer, volumes, pair_id=settings.pair_id, timeout_s=settings.request_timeout_s
        )
        return buffer, False

    def _position(self, metadata: Metadata, found: bool) -> Position:
        """Where this side stands: by its disk buffer, if that knows, or by what was noted last."""
        header = self.buffer.header
        if found and header.stream_id != NOWHERE:
            recorded = metadata.sequence if metadata.stream == header.stream_id else 0
            return Position(
                header.stream_id, header.applied_sequence, recorded, recorded, header.checkpoint.number,
                exact=True, syncing=metadata.syncing,
            )  # fmt: skip
        sequence = metadata.sequence
        exact = metadata.clean and not found
        return Position(metadata.stream, sequence, sequence, sequence, metadata.checkpoint, exact, metadata.syncing)

    def _begin(self, metadata: Metadata, found: bool, position: Position) -> None:
        """A buffer that was just made starts in the stage that the metadata calls for."""
        header = self.buffer.header
        if found:
            return
        usable = metadata.consistent and metadata.clean and not metadata.syncing
        self.buffer.start(syncing=not usable, number=position.checkpoint, sequence=position.applied)
        header.stream_id = position.stream if position.exact else NOWHERE
        header.applied_sequence = position.applied
        if self.promoted:
            header.store_state(Stage.DONE, header.epoch, syncing=False)

    def _link_buffer(self) -> None:
        """Leave a trace of the buffer in the side's directory, for ``attach``."""
        link = Path(self.settings.directory) / BUFFER_LINK
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.abspath(self.settings.buffer.directory))

    def _connect(self, context: zmq.Context[zmq.Socket[bytes]], keys: CurveKeys | None, position: Position) -> None:
        settings = self.settings
        replication = settings.replication
        if replication.listen is None:
            raise OperationFailed("This side has no address to listen on.", hint="Set replication.listen.")
        config = SecondaryConfig(
            tuple((volume.name, disk.size) for volume, disk in zip(settings.volumes, self.disks, strict=True)),
            settings.buffer.block_size,
            min(layers.hidden.slots for layers in self.buffer.volumes),
            replication.heartbeat_s,
            replication.peer_timeout_s,
        )
        free = min(job.free_blocks for job in self.backup.jobs) + self.buffer.header.copied_ahead
        standing = self.record.value.standing()._replace(consistent=not self.buffer.header.syncing)
        self.session = SecondarySession(config, standing, position, free_blocks=free)
        self.session.own = self._own_writes()
        self.link = Link(
            self.session, context, replication.listen, keys, self._connection_changed, self.promotion.asked
        )
        self._stack.callback(self.link.close)
        self.applier = Applier(self.session, self.backup, self.disks, self, self.link.perform)
        self._stack.callback(self.applier.close)
        self.link.applier = self.applier
        self.link.before_refusing, self.link.on_refusal = self.promotion.tell_loss, self.promotion.tell_refusal
        self.promotion.attend(self.session, self.link, self.applier)

    def _connection_changed(self) -> None:
        self.connected_at = time.time() if self.session.connected else 0.0

    # Ledger of the applier

    def resync_begun(self, stream: int, sequence: int, *, keep_checkpoint: bool) -> None:
        """Durably: the disk is between two states now."""
        metadata = self.record.value
        self.record.update(
            stream=stream,
            sequence=metadata.sequence if stream == metadata.stream else 0,
            syncing=True,
            consistent=keep_checkpoint and metadata.consistent,
        )

    def resync_ended(self, history: History) -> None:
        """Durably: the disk is what the primary's was at this point."""
        self.record.update(history=history, syncing=False)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.settings.directory}/{INTENT_FILE}")

    def resize(self, sizes: Sequence[int], *, exact: bool) -> tuple[tuple[int, ...], str]:
        """The volumes grow in the stream."""
        return self.growth.resize(sizes, exact=exact)

    def grow(self, sizes: Sequence[int]) -> tuple[str, bytes]:
        """This side has to follow a primary whose volumes are larger."""
        return self.growth.follow(sizes), self._own_writes()

    def checkpointed(self, number: int) -> None:
        """A checkpoint was taken; it may be noted late."""
        self.record.update_soon(checkpoint=number, consistent=True)

    async def _keep_record(self) -> None:
        """Now and then make what is applied durable, and say so."""
        while True:
            await asyncio.sleep(RECORD_INTERVAL_S)
            if self.promoted:
                return
            if self.session.point().sequence != self.record.value.sequence:
                await self._record_now()

    async def _record_now(self, *, clean: bool = False, **changes: Any) -> None:
        """Make durable what is applied, and note it. A disk that is not exact holds what was noted last, and nobody
        knows what else: nothing more is claimed for it, and its end is never clean."""
        point = self.session.point()
        try:
            await asyncio.to_thread(self.applier.flush)
        except OSError as error:
            sentence = f"flush of the secondary disk failed: {error.strerror or error}"
            self.buffer.header.set_error(Failure.SECONDARY_DISK, sentence)
            self.applier.flush_failed(point, error.errno or 5, sentence)
            return
        if self.promoted:
            return  # meanwhile: the metadata is, or soon will be, the engine's
        if self.applier.exact:
            # should the buffer get lost, half a batch would be taken for a checkpoint
            clean = clean and not self.buffer.header.torn
            changes |= {"stream": point.stream, "sequence": point.sequence, "clean": clean}
        await self.record.update_async(**changes)
        self.session.recorded(point)

    # Commands

    async def _pass_on(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        """A command for whoever leads."""
        if not self.promoted:
            raise OperationFailed(f"This side is the secondary: the primary takes the command {command}.")
        return await self.exporter.call(command, **args)

    async def _status(self, _args: dict[str, Any]) -> dict[str, Any]:
        return await status_of(self)

    async def _clear_error(self, _args: dict[str, Any]) -> dict[str, Any]:
        self.buffer.header.clear_error()
        if self.promotion.leading is not None:
            await self.exporter.call("clear_error")
        return {}

    async def _stop_command(self, args: dict[str, Any]) -> dict[str, Any]:
        number = None
        if flag_of(args, "checkpoint") and self.promotion.leading is not None:
            if self._keeping is not None:
                self._keeping.cancel()  # it would start the process that is about to end again
            try:
                number = (await self.exporter.call("stop", checkpoint=True)).get("checkpoint")
            except TandemDiskError as error:  # it has just died, say: what was told to stop stops
                log.warning("no final checkpoint: %s", error)
        self._lifecycle.stop.set()
        return {"checkpoint": number}

    # End

    async def close(self) -> None:
        """Stop in good order: what was received is applied, made durable and noted as clean."""
        if "promotion" in self.__dict__:
            self.promotion.stop()
        for task in (self._keeping, self._recorder):
            if task is not None:
                task.cancel()
        await self.exporter.stop()
        empty = False
        try:
            if "applier" in self.__dict__:
                await self.promotion.end()
                self.link.stop("the secondary stops")
                await self.applier.stop()
                await self._note_end()
            elif "record" in self.__dict__:
                await self.record.update_async(clean=self._was_clean)  # nobody could reach it: as it was before
            empty = "buffer" in self.__dict__ and not any(
                layer.used(self.buffer.header.epoch)
                for volume in self.buffer.volumes
                for layer in (volume.hidden, volume.active)
            )
        finally:  # also where the end cannot be noted
            await self._stack.aclose()
        if self._fresh and empty:
            DiskBuffer.remove(self.settings.buffer.directory)
            with contextlib.suppress(OSError):  # somebody else's files are in it
                os.rmdir(self.settings.buffer.directory)

    async def _note_end(self) -> None:
        """Durably: where this side stands. A promoted one stands where its engine says."""
        if self.promoted:
            return
        clean = self._lifecycle.failure is None
        await self._record_now(clean=clean, disks=fingerprints(self.settings, running=not clean))


def spill_path(settings: NodeSettings, volume: VolumeSettings) -> str:
    """Where old contents of a volume go when the pool is full; empty: nowhere."""
    buffer = settings.buffer
    if not buffer.spill_bytes:
        return ""
    device = stat.S_ISBLK(os.stat(volume.disk).st_mode)
    beside = settings.directory if device else os.path.dirname(os.path.realpath(volume.disk))
    return f"{buffer.spill_directory or beside}/tandemdisk-{settings.pair_id}-{settings.side}-{volume.name}.spill"


async def main(settings: NodeSettings, lifecycle: Lifecycle) -> None:
    """The process' life, for ``common.process.run``."""
    node = SecondaryNode(settings, lifecycle)
    try:
        await node.start()
        uri = node.exporter.uri(settings.volumes[0].name)
        lifecycle.ready({"pid": os.getpid(), "nbd_uri": uri, "stage": node.buffer.header.stage.name})
        await lifecycle.stop.wait()
    finally:
        await node.close()
