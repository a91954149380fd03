"""The secondary process put together: disks, disk buffer, backup job, stream, export process, failover.

What it finds decides how it starts:

    metadata        disk buffer     starts as
    --------        -----------     ---------
    none            –               new side: a full synchronisation, or `assume` = both disks are equal
    secondary       there           where it was, to the message (the buffer outlived the process)
    secondary       gone, clean     where it was; the disk is the last checkpoint
    secondary       gone, unclean   the disk is somewhere after what was recorded: a resync has to come first
    primary         –               promoted: finishes the failover if that was interrupted, then serves the disk

The export process is a child. It is started again whenever it dies, and dies with this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import zmq

from common import limits
from common.child import Child, exit_reason
from common.control import ControlClient, ControlServer
from common.disk import FileDisk
from common.errors import OperationFailed, TandemDiskError
from common.failures import count_status, error_status
from common.generation import RETURNING, History, extend
from common.intent import INTENT_FILE, IntentFile
from common.keys import CurveKeys, load_keys
from common.metadata import Metadata, load
from common.port import zmq_context
from common.process import Lifecycle
from common.record import Record, check_metadata, disks_changed, fingerprints, initial_metadata
from common.settings import NodeSettings
from common.wire import pack_ranges
from secondary.applier import Applier
from secondary.attach import BUFFER_LINK
from secondary.backup import PairBackup
from secondary.buffer import BufferVolume, DiskBuffer
from secondary.commit import CommitJob, failover_checkpoint, failover_latest, held_extents
from secondary.failover import Situation, Target, decide, parse_target
from secondary.header import Failure, Stage
from secondary.link import Link
from secondary.session import Position, SecondaryConfig, SecondarySession

RECORD_INTERVAL_S: Final = 5.0
"""How often the applied position is made durable together with the disks, so that a crash of the host costs a small
resync."""
LEAD_AGAIN_S: Final = 0.5
"""Pause before an export process that did not begin to lead is told again."""
EXPORT_TIMEOUT_S: Final = {
    "status": 2.0, "lead": 60.0, "redial": 5.0, "checkpoint": 120.0, "stop": 120.0, "verify": 30 * 24 * 3600.0,
}  # fmt: skip
"""How long the export process may take to answer."""
EXPORT_PAUSES_S: Final = (0.1, 0.5, 2.0, 5.0)
"""Pauses before an export process that died is started again; the last one repeats."""

log = logging.getLogger("secondary")


class SecondaryNode:
    """See the module. ``start`` it, wait, ``close`` it."""

    def __init__(self, settings: NodeSettings, lifecycle: Lifecycle) -> None:
        self.settings = settings
        self._lifecycle = lifecycle
        self._stack = AsyncExitStack()
        self._loop = asyncio.get_running_loop()
        self._export: Child | None = None
        self._export_restarts = 0
        self._export_uris: dict[str, list[str]] = {}
        self._exporter: asyncio.Task[None] | None = None
        self._recorder: asyncio.Task[None] | None = None
        self._commit: CommitJob | None = None
        self._committing: asyncio.Task[None] | None = None
        self._failing_over = asyncio.Lock()
        self._handed_over = False
        """From here on the engine writes the metadata, and ours are too old to write."""
        self._leading: asyncio.Task[None] | None = None
        """Set once the export process was told to lead: the metadata is its from then on."""
        self._connected_at = 0.0
        self._fresh = False
        """The disk buffer was made by this process, and its start is not over: a failure takes it away again."""
        self._was_clean = False

    # Start

    async def start(self) -> None:
        """Open everything and serve. Whatever cannot be is a TandemDiskError, and nothing was touched."""
        settings = self.settings
        keys = self._keys()
        context = self._stack.enter_context(zmq_context())
        self.disks = [self._open(volume.disk) for volume in settings.volumes]
        stored = load(f"{settings.directory}/metadata")
        sizes = [disk.size for disk in self.disks]
        metadata = stored or initial_metadata(settings, "secondary", sizes)
        check_metadata(settings, metadata, sizes)
        metadata = self._check_disks(metadata)
        self.buffer, found = self._open_buffer(stored)
        self._stack.callback(self.buffer.close)
        self._fresh = not found
        self._was_clean = metadata.clean
        self.backup = PairBackup(self.buffer, self.disks)
        self.record = Record(f"{settings.directory}/metadata", metadata)
        self._stack.callback(self.record.close)
        position = self._position(metadata, found)
        self._begin(metadata, found, position)
        self._link_buffer()
        await self.record.update_async(clean=False, disks=fingerprints(settings, running=True))
        self._connect(context, keys, position)
        control = ControlServer(
            settings.control_path("secondary"),
            {
                "status": self._status,
                "failover": self._failover_command,
                "clear_error": self._clear_error,
                "stop": self._stop_command,
                **{command: partial(self._pass_on, command) for command in ("checkpoint", "verify", "redial")},
            },
        )
        await control.start()
        self._stack.push_async_callback(control.close)
        await self._start_export()
        self._fresh = False
        self._exporter = self._lifecycle.critical(self._keep_export(), "export")
        self._recorder = self._lifecycle.critical(self._keep_record(), "recorder")
        if self.promoted:
            await self._finish_failover()

    def _check_disks(self, metadata: Metadata) -> Metadata:
        """A disk that is not as this side left it may differ anywhere: say so, durably, and trust no buffer."""
        settings = self.settings
        reason = disks_changed(settings, metadata) if metadata.role == "secondary" else ""
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
        file = IntentFile(path, sizes)
        ranges = file.ranges()
        file.close()
        if len(ranges) > limits.MAX_BATCH_EXTENTS:
            ranges = [(index, 0, size) for index, size in enumerate(sizes)]
        return pack_ranges(ranges)

    def _keys(self) -> CurveKeys | None:
        replication = self.settings.replication
        if replication.secret_key is None or replication.peer_key is None:
            return None
        return load_keys(replication.secret_key, replication.peer_key)

    def _open(self, path: str) -> FileDisk:
        disk = FileDisk(path)
        self._stack.callback(disk.close)
        return disk

    def _open_buffer(self, stored: Metadata | None) -> tuple[DiskBuffer, bool]:
        """The buffer, and whether it was there already."""
        settings = self.settings
        directory = settings.buffer.directory
        volumes = [
            BufferVolume(volume.name, disk.size, os.path.abspath(volume.disk))
            for volume, disk in zip(settings.volumes, self.disks, strict=True)
        ]
        if stored is not None and DiskBuffer.exists(directory):
            buffer = DiskBuffer.attach(
                directory,
                pair_id=settings.pair_id,
                block_size=settings.buffer.block_size,
                volumes=[(volume.name, volume.size) for volume in volumes],
                timeout_s=settings.request_timeout_s,
            )
            buffer.header.own()
            if buffer.header.stage is not Stage.NONE:
                return buffer, True
            buffer.close()
        buffer = DiskBuffer.create(
            settings.buffer, volumes, pair_id=settings.pair_id, timeout_s=settings.request_timeout_s
        )
        return buffer, False

    def _position(self, metadata: Metadata, found: bool) -> Position:
        if found:
            header = self.buffer.header
            recorded = metadata.sequence if metadata.stream == header.stream_id else 0
            return Position(
                header.stream_id, header.applied_sequence, recorded, recorded, header.checkpoint.number, True,
                metadata.syncing,
            )  # fmt: skip
        sequence = metadata.sequence
        return Position(
            metadata.stream, sequence, sequence, sequence, metadata.checkpoint, metadata.clean, metadata.syncing
        )

    def _begin(self, metadata: Metadata, found: bool, position: Position) -> None:
        """A buffer that was just made starts in the stage that the metadata calls for."""
        header = self.buffer.header
        self.promoted = metadata.role == "primary"
        if found:
            return
        usable = metadata.consistent and metadata.clean and not metadata.syncing
        self.buffer.start(syncing=not usable, number=position.checkpoint, sequence=position.applied)
        header.stream_id = position.stream
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
        free = min(job.free_blocks for job in self.backup.jobs)
        standing = self.record.value.standing()._replace(consistent=not self.buffer.header.syncing)
        self.session = SecondarySession(config, standing, position, free_blocks=free)
        self.session.own = self._own_writes()
        self.link = Link(self.session, context, replication.listen, keys, self._connection_changed)
        self._stack.callback(self.link.close)
        self.applier = Applier(self.session, self.backup, self.disks, self, self.link.perform)
        self._stack.callback(self.applier.close)
        self.link.applier = self.applier

    def _connection_changed(self) -> None:
        self._connected_at = time.time() if self.session.connected else 0.0

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

    async def _record_now(self, **changes: Any) -> None:
        point = self.session.point()
        try:
            for disk in self.disks:
                await asyncio.to_thread(disk.flush)
        except OSError as error:
            sentence = f"flush of the secondary disk failed: {error.strerror or error}"
            self.buffer.header.set_error(Failure.SECONDARY_DISK, sentence)
            self.applier.flush_failed(point, error.errno or 5, sentence)
            return
        if self.promoted:
            return  # meanwhile: the metadata is, or soon will be, the engine's
        await self.record.update_async(stream=point.stream, sequence=point.sequence, **changes)
        self.session.recorded(point)

    # Export process

    async def _start_export(self) -> None:
        child = Child.start("secondary.guest", self.settings)
        self._export = child
        told = await child.wait_ready_async()
        self._export_uris = told.get("uris", {})

    async def _keep_export(self) -> None:
        """Start the export process again whenever it dies."""
        while True:
            assert self._export is not None
            started = time.monotonic()
            code = await self._export.wait_async()
            log.error("the export process ended reason=%r", exit_reason(code))
            if time.monotonic() - started > 60:
                self._export_restarts = 0
            await asyncio.sleep(EXPORT_PAUSES_S[min(self._export_restarts, len(EXPORT_PAUSES_S) - 1)])
            self._export_restarts += 1
            try:
                await self._start_export()
                if self._leading is not None:
                    self._leading.cancel()
                    self._leading = None
                    self._lead_soon()
            except TandemDiskError as error:
                log.error("the export process does not start: %s", error)

    # Failover

    async def _failover_command(self, args: dict[str, Any]) -> dict[str, Any]:
        target = parse_target(args.get("to", "latest"))
        async with self._failing_over:
            started = time.perf_counter()
            number = await self._failover(target, force=bool(args.get("force", False)))
            return {
                "to": target,
                "generation": self.record.value.history[-1].number,
                "checkpoint": number,
                "seconds": time.perf_counter() - started,
                "nbd_uri": self._uri(),
                "state": self.buffer.header.stage.name,
            }

    async def _failover(self, target: Target, *, force: bool) -> int:
        header = self.buffer.header
        position = self.session.position
        situation = Situation(
            header.stage, not header.syncing, position.syncing or not position.exact, self.session.connected,
            self.buffer.guest_has_written,
        )  # fmt: skip
        decide(target, force=force, situation=situation)
        if header.stage is Stage.RUNNING:
            number = header.checkpoint.number
            log.warning("failover target=%s checkpoint=%d applied=%d", target, number, position.applied)
            self.link.hold()
            await self.applier.stop()
            past = self.record.value.history
            history = extend(past, secrets.randbits(64) or 1, self.settings.side)
            await asyncio.to_thread(self._begin_intents, target)
            point = self.session.point()
            await self.record.update_async(
                role="primary", history=history, failover=target, clean=False, syncing=False, consistent=True,
                checkpoint=header.checkpoint.number, base=past[-1].identity, bases=((point.stream, point.sequence),),
            )  # fmt: skip
            self.promoted = True
            self.session.standing = self.session.standing._replace(role="primary", history=history, consistent=True)
            self.link.perform(self.session.depose(f"side {self.settings.side} has taken over, in {history[-1]}"))
        await self._finish_failover(force=force)
        return header.checkpoint.number

    async def _finish_failover(self, *, force: bool = True) -> None:
        """What is left to do once the promotion is durable; also after a crash in the middle."""
        header = self.buffer.header
        if header.stage is Stage.RUNNING:
            if self.record.value.failover == "checkpoint":
                await asyncio.to_thread(failover_checkpoint, self.backup)
            else:
                await asyncio.to_thread(lambda: failover_latest(self.backup, force=force))
        if header.stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED) and self._committing is None:
            await asyncio.to_thread(self._note_held)
            self._commit = CommitJob(self.buffer, self.disks)
            self._committing = self._loop.create_task(self._run_commit(self._commit), name="commit")
        elif header.stage is Stage.DONE:
            self._lead_soon()

    async def _run_commit(self, job: CommitJob) -> None:
        try:
            if await asyncio.to_thread(job.run):
                self._lead_soon()
        except OperationFailed as error:
            log.error("commit failed: %s", error)
        finally:
            self._committing = None

    def _begin_intents(self, target: Target) -> None:
        """Before the first write of a promoted side: an empty write-intent file, or one that marks what a commit
        moves."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.settings.directory}/{INTENT_FILE}")
        IntentFile(f"{self.settings.directory}/{INTENT_FILE}", [disk.size for disk in self.disks]).close()
        if target == "checkpoint":
            self._note_held()

    def _note_held(self) -> None:
        """Mark what the buffer holds: the commit writes it. The export process marks in the same file."""
        path = f"{self.settings.directory}/{INTENT_FILE}"
        file = IntentFile(path, [disk.size for disk in self.disks], shared=True)
        try:
            file.set_ranges(
                (volume.index, offset, length)
                for volume in self.buffer.volumes
                for offset, length in held_extents(volume)
            )
        finally:
            file.close()

    # Leading

    def _lead_soon(self) -> None:
        """The disks are what this side decided on: its export process goes on as a primary."""
        if self._leading is None and self.settings.replication.connect is not None:
            self._leading = self._loop.create_task(self._lead(), name="lead")

    async def _lead(self) -> None:
        """Until it does: the export process may die in the middle, or meet a disk that fails."""
        while True:
            try:
                if not self._handed_over:
                    await self.record.update_async()  # behind whatever is being written
                    self._handed_over = True
                await self._call_export("lead")
            except TandemDiskError as error:
                log.error("the export process does not lead: %s", error)
                await asyncio.sleep(LEAD_AGAIN_S)
            else:
                return

    async def _call_export(self, command: str, **args: Any) -> dict[str, Any]:
        client = ControlClient(self.settings.control_path("export"), EXPORT_TIMEOUT_S[command])
        return await client.call_async(command, **args)

    async def _pass_on(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        """A command for whoever leads."""
        if not self.promoted:
            raise OperationFailed(f"This side is the secondary: the primary takes the command {command}.")
        return await self._call_export(command, **args)

    # Status

    def _uri(self) -> str | None:
        uris = self._export_uris.get(self.settings.volumes[0].name, [])
        return uris[0] if uris else None

    def _error(self) -> dict[str, Any] | None:
        record = self.buffer.header.get_error()
        if record is None:
            return None
        return error_status(record.case, record.sentence, record.wall_ns / 1e9)

    async def _status(self, _args: dict[str, Any]) -> dict[str, Any]:
        header, volumes = self.buffer.header, self.buffer.volumes
        block, epoch = header.block_size, header.epoch
        if header.stage is Stage.DONE:
            epoch += 1  # what a commit left in the pools counts no more
        hidden = sum(volume.hidden.used(epoch) for volume in volumes) * block
        active = sum(volume.active.used(epoch) for volume in volumes) * block
        capacity = sum(volume.hidden.slots + volume.active.slots for volume in volumes) * block
        statistics = self.session.statistics()
        position = self.session.position
        done, total = self._commit.statistics if self._commit is not None else (0, 0)
        export = self._export
        history = self.record.value.history
        told = {
            "role": "primary" if self.promoted else "secondary",
            "side": self.settings.side,
            "pid": os.getpid(),
            "export_pid": export.pid if export is not None and export.poll() is None else None,
            "export_restarts": self._export_restarts,
            "state": header.stage.name,
            "protected": not header.syncing,
            "resyncing": position.syncing,
            "nbd_uri": self._uri(),
            "checkpoint": header.checkpoint.number,
            "checkpoint_time": header.checkpoint.wall_ns / 1e9 or None,
            "generation": history[-1].number if history else 0,
            "buffer": {
                "bytes": hidden + active,
                "percent": 100.0 * (hidden + active) / capacity,
                "capacity_bytes": capacity,
                "hidden_bytes": hidden,
                "active_bytes": active,
                "block_size": block,
                "directory": self.buffer.directory,
            },
            "commit": {
                "active": self._committing is not None,
                "done_bytes": done * block,
                "total_bytes": total * block,
            },
            "peer": {"connected": self.session.connected, "since": self._connected_at or None,
                     "refused": self.link.last_refusal or None},
            "counters": {
                "batches": statistics.batches,
                "payload_bytes": statistics.payload_bytes,
                "written_bytes": self.applier.bytes_written,
                "sessions": statistics.sessions,
                "stale_messages": statistics.stale_messages,
                "duplicates": statistics.duplicates,
                "checkpoints": self.applier.checkpoints,
                "waits": self.applier.waits,
                "applied": statistics.applied,
                "durable": position.durable,
                "failures": count_status(header.failures()),
            },
            "volumes": [
                {
                    "name": volume.name,
                    "size": volume.size,
                    "nbd_uri": next(iter(self._export_uris.get(volume.name, [])), None),
                    "hidden_bytes": volume.hidden.used(epoch) * block,
                    "active_bytes": volume.active.used(epoch) * block,
                }
                for volume in volumes
            ],
            "error": self._error(),
        }  # fmt: skip
        return told | await self._status_of_engine(told)

    async def _clear_error(self, _args: dict[str, Any]) -> dict[str, Any]:
        self.buffer.header.clear_error()
        if self._leading is not None:
            await self._call_export("clear_error")
        return {}

    async def _status_of_engine(self, told: dict[str, Any]) -> dict[str, Any]:
        """What a promoted side's engine adds and knows better."""
        if self._leading is None:
            return {}
        try:
            engine = (await self._call_export("status")).get("engine")
        except TandemDiskError:
            return {}
        if engine is None:
            return {}
        volumes = [
            volume | {"dirty_bytes": dirty}
            for volume, dirty in zip(told["volumes"], engine["dirty_bytes"], strict=True)
        ]
        same = ("mode", "reason", "checkpoint", "generation", "lag", "resync", "verify", "peer", "checkpoint_seconds")
        alone = engine["state"] == "alone"
        return {
            **{key: engine[key] for key in same},
            "engine": engine["state"],
            "state": told["state"] if alone else engine["state"],
            "checkpoint_time": engine["checkpoint_time"] or told["checkpoint_time"],
            "volumes": volumes,
            "counters": told["counters"] | engine["counters"] | {
                "failures": told["counters"]["failures"] | engine["counters"]["failures"]
            },
            "error": engine["error"] or told["error"],
        }

    async def _stop_command(self, args: dict[str, Any]) -> dict[str, Any]:
        number = None
        if self._leading is not None and args.get("checkpoint"):
            if self._exporter is not None:
                self._exporter.cancel()  # it would start the process that is about to end again
            number = (await self._call_export("stop", checkpoint=True)).get("checkpoint")
        self._lifecycle.stop.set()
        return {"checkpoint": number}

    # End

    async def close(self) -> None:
        """Stop in good order: what was received is applied, made durable and noted as clean."""
        for task in (self._exporter, self._recorder, self._leading):
            if task is not None:
                task.cancel()
        if self._export is not None:
            await self._export.stop_async()
        if "applier" in self.__dict__:
            self.link.stop("the secondary stops")
            await self.applier.stop()
            if self._committing is not None and self._commit is not None:
                self._commit.stopping.set()
                await self._committing
            await self._note_end()
        elif "record" in self.__dict__:
            await self.record.update_async(clean=self._was_clean)  # nobody could reach it: as it was before
        empty = "buffer" in self.__dict__ and not any(
            layer.used(self.buffer.header.epoch)
            for volume in self.buffer.volumes
            for layer in (volume.hidden, volume.active)
        )
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


async def main(settings: NodeSettings, lifecycle: Lifecycle) -> None:
    """The process' life, for ``common.process.run``."""
    node = SecondaryNode(settings, lifecycle)
    try:
        await node.start()
        lifecycle.ready({"pid": os.getpid(), "nbd_uri": node._uri(), "stage": node.buffer.header.stage.name})
        await lifecycle.stop.wait()
    finally:
        await node.close()
