"""The primary at work, without its processes: stream, mirror, resync, checkpoints, and what to do when the secondary
goes.

    state         the secondary            writes                        leaves by
    -----         -------------            ------                        ---------
    connecting    not heard of yet         alone, marked dirty           established, resync, refused, lost
    protected     has every acked write    in stream                     cut
    syncing       is being brought in line in stream                     end of the resync, cut
    reconnecting  connection cut           in stream, kept for replay    established, resync, lost
    alone         lost, on_peer_loss =     alone, marked dirty           resync
                  continue; or never
                  there
    blocked       lost, on_peer_loss =     wait                          established, resync
                  block
    refused       said that we two do not  alone, marked dirty           (an operator)
                  belong together
    fenced        was promoted             fail with EIO                 (rejoin)

Going alone starts a new generation, durably, before the first write is acknowledged that the secondary lacks.

The primary process runs an engine from its start (``primary.node``); the export process of a secondary begins one when
that side was promoted and its commit is complete (``secondary.guest``).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import zmq

from common.disk import Disk
from common.errors import OperationFailed, PeerRefused, TandemDiskError, TimedOut
from common.failures import Failure, Failures, count_status
from common.generation import RETURNING, History, extend
from common.intent import INTENT_FILE, IntentFile
from common.keys import CurveKeys, load_keys
from common.process import Lifecycle
from common.record import Record, fingerprints
from common.settings import NodeSettings
from common.wire import Welcome, unpack_ranges
from primary.effects import (
    Acknowledged,
    CheckpointDone,
    CheckpointFailed,
    Cut,
    Effect,
    Established,
    FlushFailed,
    Lost,
    Pressure,
    Refused,
    ResyncNeeded,
    Starved,
    Verified,
    WindowOpen,
)
from primary.guard import IntentGuard
from primary.ledger import Ledger, mark
from primary.link import Link, describe
from primary.mirror import Mirror
from primary.questions import Range
from primary.resync import ResyncLimits
from primary.session import PrimaryConfig, PrimarySession
from primary.synchroniser import Synchroniser, make_suspects
from primary.verifier import Verifier
from primary.window import Unacknowledged

CHECKPOINT_TIMEOUT_S: Final = 60.0
MAX_EXTENTS: Final = 1000
"""Differing extents that an answer to ``verify`` names."""
EIO: Final = 5
FORGET_INTERVAL_S: Final = 10.0
"""How often the write-intent bitmap is cleared of what the secondary has."""
MAX_BASES: Final = 16
IDLE: Final = {"active": False, "done_bytes": 0, "total_bytes": 0, "rate": 0.0}
"""Status of a resync that is not going on."""

log = logging.getLogger("primary")


class Export(Protocol):
    """The NBD server whose clients' writes the engine gets."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Engine:
    """See the module. ``start`` it, ``settle``, use ``mirror.volumes``; ``close`` it at the end."""

    def __init__(
        self,
        settings: NodeSettings,
        record: Record,
        volumes: Sequence[tuple[str, Disk]],
        context: zmq.Context[zmq.Socket[bytes]],
        lifecycle: Lifecycle,
    ) -> None:
        self.settings = settings
        self.record = record
        self.state = "connecting"
        self.reason = ""
        """Why the state is not ``protected``."""
        self.checkpoint = record.value.checkpoint
        self.checkpoint_time = 0.0
        self.checkpoint_seconds = 0.0
        self.export: Export
        self.serving = False
        """Clients are served: a refusal is no reason any more to give up."""
        self._lifecycle = lifecycle
        self._loop = asyncio.get_running_loop()
        self._settled = asyncio.Event()
        """Set once it is known how this primary and its secondary stand to each other, or that nobody is there."""
        self._own_generation = False
        """The newest generation was begun here, and no secondary has it."""
        self._closing = False
        self._refusal = ""
        self.failures = Failures()
        self._synchroniser: Synchroniser | None = None
        self._synchronising: asyncio.Task[None] | None = None
        self._verifier: Verifier | None = None
        self._verifying: asyncio.Task[list[Range]] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._resyncs = _ResyncCounters()
        self.mirror = Mirror(
            volumes,
            sync=settings.mode == "sync",
            block_size=settings.buffer.block_size,
            on_disk_error=self._disk_failed,
        )
        self.suspects = make_suspects(self.mirror)
        """What the secondary may lack, for all that is known: a resync compares it before it sends any of it."""
        self._unfinished = make_suspects(self.mirror)
        """All that the resyncs since the last complete one took on: what a secondary that forgets may lack again."""
        self._guard_writes()
        self.ledger = Ledger([volume.size for volume in self.mirror.volumes], settings.buffer.block_size)
        self.session = self._make_session()
        address = settings.replication.connect
        if address is None:
            raise OperationFailed("This side does not know its secondary.", hint="Set replication.connect.")
        self.link = Link(self.session, context, address, stream_keys(settings), self._handle)
        self.mirror.carrier = self.link

    def _guard_writes(self) -> None:
        """Open the write-intent bitmap; what a crash left in it is suspect."""
        settings, metadata = self.settings, self.record.value
        path = f"{settings.directory}/{INTENT_FILE}"
        self._bases = dict(metadata.bases)
        self._base = metadata.base
        known = False
        if settings.write_intent:
            sizes = [volume.size for volume in self.mirror.volumes]
            file = IntentFile(path, sizes)
            self.mirror.guard = IntentGuard(file, sizes)
            known = file.found
            if known and not metadata.clean:
                file.add_to(self.suspects)
        else:
            Path(path).unlink(missing_ok=True)
        if metadata.clean and metadata.history:
            self._base = metadata.history[-1].identity
        elif not known:
            self._bases, self._base = {}, 0

    def _make_session(self) -> PrimarySession:
        settings, metadata = self.settings, self.record.value
        replication = settings.replication
        config = PrimaryConfig(
            tuple((volume.name, volume.size) for volume in self.mirror.volumes),
            replication.window_bytes,
            replication.heartbeat_s,
            replication.peer_timeout_s,
            settings.on_peer_loss,
            max_lag_s=settings.max_lag_seconds,
        )
        resumed = metadata.clean and metadata.stream != 0
        return PrimarySession(
            config,
            metadata.standing()._replace(base=self._base),
            instance=random_number(32),
            stream=metadata.stream if resumed else random_number(64),
            next_sequence=metadata.sequence + 1 if resumed else 1,
            checkpoint=metadata.checkpoint,
            bases=self._bases | {RETURNING: 0},
            ledger=self.ledger,
        )

    async def remember_start(self) -> None:
        """Durably, before the first write: this process did not stop in good order, and what its bitmaps know."""
        bases = list((self._bases | {self.session.stream: self.session.last_sequence}).items())
        disks = fingerprints(self.settings, running=True)
        await self.record.update_async(clean=False, base=self._base, bases=tuple(bases[-MAX_BASES:]), disks=disks)

    def start(self, export: Export, *, alone: str = "") -> None:
        """Begin to look for the secondary. ``alone``: why this side leads without one for now; else ``settle`` next."""
        self.export = export
        self.mirror.pause = self._congested
        self.link.before_greeting = self._tell_own_blocks
        if alone:
            self.session.lead_alone(alone)
            self._set_state("alone", alone)
        self.link.open()
        if self.mirror.guard is not None:
            self._lifecycle.critical(self._forget_now_and_then(self.mirror.guard), "intents")
        if self.settings.checkpoint_interval_s > 0:
            self._lifecycle.critical(self._checkpoint_now_and_then(), "checkpoints")

    async def settle(self) -> None:
        """Wait until the secondary answered, refused (PeerRefused), or is known to be away."""
        try:
            async with asyncio.timeout(self.settings.replication.peer_timeout_s):
                await self._settled.wait()
        except TimeoutError:
            if self.link.trouble:
                raise PeerRefused(
                    f"No connection to the secondary at {self.link.address}: {self.link.trouble}.",
                    hint="Each side needs the other's public key: see `tandemdisk keygen`.",
                ) from None
            log.warning("the secondary does not answer address=%s", self.link.address)
            if not self.session.attached:
                self._go_alone("alone", "the secondary does not answer", [])
        if self._refusal:
            raise PeerRefused(f"The secondary refused this primary: {self._refusal}.")

    # Effects of the session

    def _handle(self, effect: Effect) -> None:
        if isinstance(effect, Acknowledged):
            for pin in effect.pins:
                pin.unpin()
        elif isinstance(effect, WindowOpen):
            self.export.resume_reading()
        elif isinstance(effect, CheckpointDone):
            self._checkpoint_done(effect)
        else:
            log.info("stream %s", describe(effect))
            self._handle_rare(effect)

    def _handle_rare(self, effect: Effect) -> None:
        match effect:
            case Established(peer=peer):
                self.mirror.use_blocks(peer.block_size)
                self._set_state("syncing" if self.session.syncing else "protected", "")
                if not self.session.syncing:
                    self._in_one_generation()
            case ResyncNeeded():
                self._resync(effect)
            case Cut(reason=reason):
                self._forwarding_failed(reason, outstanding=not self.session.idle)
                self._set_state("reconnecting", reason)
            case Lost(reason=reason, unacknowledged=unacknowledged):
                self._lost(reason, unacknowledged)
            case Refused():
                self._refused(effect)
            case FlushFailed(errno=code, pins=pins):
                for pin in pins:
                    pin.fail(code)
                    pin.unpin()
            case CheckpointFailed(token=token, sentence=sentence):
                self._checkpoint_failed(token, sentence)
            case Starved():
                self._starved()
            case Verified(token=token, differing=differing):
                token.answered(differing)
            case Pressure():
                pass

    def _set_state(self, state: str, reason: str) -> None:
        if (state, reason) != (self.state, self.reason):
            log.info("state %s -> %s %s", self.state, state, reason)
        self.state, self.reason = state, reason
        if state == "protected":
            self.failures.clear(Failure.FORWARDING)
        if state != "reconnecting":
            self._settled.set()

    def _checkpoint_done(self, effect: CheckpointDone) -> None:
        self.checkpoint = effect.number
        self.checkpoint_time = time.time()
        self.checkpoint_seconds = effect.elapsed_s
        self.record.update_soon(checkpoint=effect.number)
        if self.state == "syncing" and not self.session.syncing:
            self._stop_synchroniser()
            for bitmap in self._unfinished:
                bitmap.clear_all()
            self._set_state("protected", "")
            self._in_one_generation()
        if isinstance(effect.token, asyncio.Future) and not effect.token.done():
            effect.token.set_result(effect)

    def _in_one_generation(self) -> None:
        """The secondary has all that is here: from this generation on the bitmaps know every write."""
        standing = self.session.standing
        base = standing.history[-1].identity
        self._own_generation = False
        if standing.base != base:
            self.session.standing = standing._replace(base=base)

    # Resync and verification

    def _resync(self, effect: ResyncNeeded) -> None:
        self._stop_work()
        mirror, peer = self.mirror, effect.peer
        mirror.use_blocks(peer.block_size)
        full = effect.full
        self._mark_what_may_differ(peer, full=full)
        self._set_state("syncing", effect.reason)
        self._resyncs.begun(full=full)
        self.link.perform(self.session.begin_resync(full=full, keep_checkpoint=peer.exact, now=time.monotonic()))
        limits = ResyncLimits(ceiling=float(self.settings.resync_rate))
        self._synchroniser = Synchroniser(mirror, self.suspects, limits)
        self._synchronising = self._loop.create_task(self._synchronise(self._synchroniser), name="resync")

    def _mark_what_may_differ(self, peer: Welcome, *, full: bool) -> None:
        """In the bitmaps what the secondary lacks for certain, in ``suspects`` what it may lack."""
        applied = self.session.statistics().applied
        if not (peer.exact and peer.stream == self.session.stream and peer.applied >= applied):
            # it forgot, or never had, what was sent and not recorded
            self.ledger.add_to(self.mirror.bitmaps)
            self.ledger.clear()
            for suspects, unfinished in zip(self.suspects, self._unfinished, strict=True):
                suspects.union(unfinished)
        for index, offset, length in unpack_ranges(peer.own, [volume.size for volume in self.mirror.volumes]):
            self.suspects[index].set_range(offset, length)
        for suspects, unfinished, bitmap in zip(self.suspects, self._unfinished, self.mirror.bitmaps, strict=True):
            if full:
                suspects.set_all()
            unfinished.union(suspects)
            unfinished.union(bitmap)

    async def _synchronise(self, synchroniser: Synchroniser) -> None:
        try:
            await synchroniser.run()
        except OSError as error:
            self._disk_failed("read for the resync", error)
            self.link.settle(self.session.lost(f"the primary disk cannot be read: {error.strerror}", time.monotonic()))
            return
        if self._synchroniser is synchroniser and self.session.syncing:
            # from here on the secondary may be in this generation, whether its answer comes through or not
            self._own_generation = False
            self.link.send(self.session.finish_resync(None, time.monotonic()))

    def _stop_synchroniser(self) -> None:
        if self._synchronising is not None:
            self._synchronising.cancel()
            self._synchronising = None
        if self._synchroniser is not None:
            self._synchroniser.stop()
            self._resyncs.ended(self._synchroniser)
            self._synchroniser = None

    def _stop_work(self) -> None:
        """Whatever goes over the disks in the background: it began under conditions that hold no more."""
        self._stop_synchroniser()
        if self._verifying is not None:
            self._verifying.cancel()

    async def verify(self, *, repair: bool) -> list[Range]:
        """Compare both disks while guests write. The extents that differ are marked for the next resync, or sent at
        once.

        OperationFailed if there is no secondary in line, or it is lost meanwhile.
        """
        if self.state != "protected":
            raise OperationFailed(
                f"There is nothing to compare with: this side is {self.state}.", hint="See `tandemdisk status`."
            )
        if self._verifying is not None:
            raise OperationFailed("A verification is under way.", hint="`tandemdisk status` shows how far it is.")
        self._verifier = Verifier(self.mirror, ceiling=self.settings.resync_rate)
        self._verifying = task = self._loop.create_task(self._verify(self._verifier, repair=repair), name="verify")
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()  # if whoever asked is gone
            self._verifying = self._verifier = None
        if task.cancelled():
            raise OperationFailed(f"The verification was interrupted: this side is {self.state}.", hint=self.reason)
        try:
            return task.result()
        except OSError as error:
            self._disk_failed("read for the verification", error)
            raise OperationFailed(f"The primary disk cannot be read: {error.strerror or error}.") from error

    async def verify_command(self, args: dict[str, Any]) -> dict[str, Any]:
        """``verify`` as a control command: {"repair": bool} to what was found, at most ``MAX_EXTENTS`` of it one by
        one."""
        started = time.perf_counter()
        repair = bool(args.get("repair"))
        found = await self.verify(repair=repair)
        names = [volume.name for volume in self.mirror.volumes]
        return {
            "differing": len(found),
            "differing_bytes": sum(length for _, _, length in found),
            "extents": [[names[index], offset, length] for index, offset, length in found[:MAX_EXTENTS]],
            "repaired": repair and bool(found),
            "compared_bytes": sum(volume.size for volume in self.mirror.volumes),
            "seconds": time.perf_counter() - started,
        }

    async def checkpoint_command(self, args: dict[str, Any]) -> dict[str, Any]:
        """``checkpoint`` as a control command."""
        started = time.perf_counter()
        done = await self.take_checkpoint(float(args.get("timeout_s", CHECKPOINT_TIMEOUT_S)))
        return {
            "checkpoint": done.number,
            "seconds": time.perf_counter() - started,
            "secondary_seconds": done.seconds,
            "sequence": done.sequence,
        }

    async def _verify(self, verifier: Verifier, *, repair: bool) -> list[Range]:
        found = await verifier.run()
        if found and repair:
            sender = Synchroniser(self.mirror, make_suspects(self.mirror))
            try:
                await sender.copy()
                await sender.confirm_all()
            finally:
                sender.stop()
                self._resyncs.repaired(sender)
        return found

    def _starved(self) -> None:
        """The hidden disk is full and the session may not put a checkpoint: only a resync can have brought that
        about."""
        if self.session.in_resync:
            self.link.send(self.session.give_up_checkpoint(time.monotonic()))
        else:
            self.link.send(self.session.checkpoint(None, time.monotonic()))

    # Losing the secondary

    def _forwarding_failed(self, reason: str, *, outstanding: bool) -> None:
        """A failure only if something was on its way; one failure for a cut and the loss that follows it."""
        now = self.failures.error
        if outstanding and not (now is not None and now["case"] == Failure.FORWARDING):
            self.failures.add(Failure.FORWARDING, f"writes were not confirmed by the secondary: {reason}")

    def _lost(self, reason: str, unacknowledged: list[Unacknowledged]) -> None:
        if self._closing:
            return  # nobody writes any more, so nothing begins
        if self.session.attached:
            self._set_state("blocked", reason)
            return
        self._forwarding_failed(reason, outstanding=bool(unacknowledged))
        self._stop_work()
        self.export.resume_reading()
        self._go_alone("alone", reason, unacknowledged)

    def _congested(self) -> None:
        """The window is full."""
        self.export.pause_reading()
        if self.settings.on_congestion == "pull-ahead" and self.settings.on_peer_loss == "continue":
            self._loop.call_soon(self._pull_ahead)

    def _pull_ahead(self) -> None:
        if self.session.attached and not self.session.window_open:
            reason = "it does not keep up, and on_congestion is pull-ahead"
            self.link.settle(self.session.lost(reason, time.monotonic()))

    def _tell_own_blocks(self) -> None:
        """What a refusal says would be lost."""
        size = sum(bitmap.dirty_bytes() for bitmap in (*self.mirror.bitmaps, *self.suspects))
        standing = self.session.standing
        blocks = -(-size // self.settings.buffer.block_size)
        self.session.standing = standing._replace(own_blocks=blocks, own_bytes=size)

    async def _forget_now_and_then(self, guard: IntentGuard) -> None:
        while True:
            await asyncio.sleep(FORGET_INTERVAL_S)
            if self.state == "protected":
                await self._forget(guard)

    async def _forget(self, guard: IntentGuard) -> None:
        """Clear the write-intent bitmap where the secondary has everything, and will remember it."""
        wanted = [bitmap.copy() for bitmap in self.mirror.bitmaps]
        self.ledger.add_to(wanted)
        for extents in self.session.pending_extents():
            mark(wanted, extents)
        for bitmap, suspects, unfinished in zip(wanted, self.suspects, self._unfinished, strict=True):
            bitmap.union(suspects)
            bitmap.union(unfinished)
        bases = ((self.session.stream, self.session.recorded),)
        base = self.session.standing.base

        async def promise() -> None:
            # a host that goes down may lose what its secondary has: until it is durable here, too, the bits say where
            await self._loop.run_in_executor(None, self._flush)
            await self.record.update_async(bases=bases, base=base)

        try:
            left = await guard.forget(wanted, promise)
        except OSError as error:
            self._disk_failed("flush", error)
            return
        except TandemDiskError as error:
            log.error("the write-intent bitmap is not cleared: %s", error)
            return
        log.debug("write-intent bitmap regions=%d", left)

    def _flush(self) -> None:
        for volume in self.mirror.volumes:
            volume.disk.flush()

    def _refused(self, effect: Refused) -> None:
        self._stop_work()
        if not self.serving:
            self._refusal = effect.sentence
            self._set_state("refused", effect.sentence)
            for batch in effect.unacknowledged:
                batch.pin.unpin()
            return
        if effect.code == "rejoin":
            self._fence(effect)
            return
        self.export.resume_reading()
        self._go_alone("refused", effect.sentence, effect.unacknowledged)

    def _fence(self, effect: Refused) -> None:
        """The other side was promoted: nobody is told any more that a write was done here."""
        self.mirror.fenced = True
        self.export.resume_reading()
        for batch in effect.unacknowledged:
            self.mirror.mark_dirty(batch.extents)
            if batch.pin is not None:
                if hasattr(batch.pin, "fail"):
                    batch.pin.fail(EIO)
                batch.pin.unpin()
        self._set_state("fenced", effect.sentence)

    def _go_alone(self, state: str, reason: str, unacknowledged: list[Unacknowledged]) -> None:
        """Mark what the secondary may lack, start a generation durably, then let the clients go on."""
        for batch in unacknowledged:
            self.mirror.mark_dirty(batch.extents)
        self._set_state(state, reason)
        history = self.record.value.history
        if self._own_generation:
            self._let_go(unacknowledged)  # alone already: this generation is ours
            return
        self._own_generation = True
        self.mirror.hold()
        task = self._loop.create_task(
            self._new_generation(extend(history, random_number(64), self.settings.side), unacknowledged),
            name="generation",
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _new_generation(self, history: History, unacknowledged: list[Unacknowledged]) -> None:
        """Durable first: a generation that the secondary heard of and this side forgot would lock this side out."""
        try:
            await self.record.update_async(history=history, base=self.session.standing.base)
        except TandemDiskError as error:
            log.critical("cannot go on alone: %s", error)
            self._lifecycle.fail(error)
            return
        self.session.standing = self.session.standing._replace(history=history)
        self._let_go(unacknowledged)
        self.mirror.release()

    def _let_go(self, unacknowledged: list[Unacknowledged]) -> None:
        for batch in unacknowledged:
            if batch.pin is not None:
                batch.pin.unpin()

    # Checkpoints

    async def take_checkpoint(self, timeout_s: float = CHECKPOINT_TIMEOUT_S) -> CheckpointDone:
        """A barrier behind everything written so far; returns when the secondary has switched epochs."""
        done: asyncio.Future[CheckpointDone] = self._loop.create_future()
        self.link.send(self.session.checkpoint(done, time.monotonic()))
        try:
            async with asyncio.timeout(timeout_s):
                return await done
        except TimeoutError:
            raise TimedOut(
                f"The secondary did not take the checkpoint within {timeout_s:g} s.",
                hint="`tandemdisk status` says what it waits for; the checkpoint is still under way.",
            ) from None

    def _checkpoint_failed(self, token: Any, sentence: str) -> None:
        log.warning("no checkpoint: %s", sentence)
        if isinstance(token, asyncio.Future) and not token.done():
            token.set_exception(OperationFailed(f"No checkpoint was taken. {sentence}"))
        if self.state == "syncing" and not self.session.syncing and self.session.attached:
            self.link.send(self.session.checkpoint(None, time.monotonic()))  # a resync is over when one was taken

    async def _checkpoint_now_and_then(self) -> None:
        interval = self.settings.checkpoint_interval_s
        while True:
            await asyncio.sleep(interval)
            if self.state != "protected":
                continue
            try:
                await self.take_checkpoint()
            except TandemDiskError as error:
                log.warning("checkpoint failed: %s", error)

    # Status and end

    def _disk_failed(self, what: str, error: OSError) -> None:
        self.failures.add(Failure.PRIMARY_DISK, f"{what} failed: {error.strerror or error}")

    def status(self) -> dict[str, Any]:
        """What ``status`` shows of a primary, without its export."""
        statistics = self.session.statistics()
        history = self.session.standing.history
        return {
            "role": "primary",
            "side": self.settings.side,
            "state": self.state,
            "reason": self.reason,
            "mode": self.settings.mode,
            "checkpoint": self.checkpoint,
            "checkpoint_time": self.checkpoint_time or None,
            "checkpoint_seconds": self.checkpoint_seconds,
            "generation": history[-1].number if history else 0,
            "lag": {"bytes": self.session.lag_bytes(), "seconds": self.session.lag_s(time.monotonic())},
            "dirty_bytes": [bitmap.dirty_bytes() for bitmap in self.mirror.bitmaps],
            "resync": self._synchroniser.status() if self._synchroniser is not None else dict(IDLE),
            "verify": self._verifier.status() if self._verifier is not None else {"active": False},
            "counters": {
                "batches": statistics.batches,
                "payload_bytes": statistics.payload_bytes,
                "replayed": statistics.replayed,
                "sessions": statistics.sessions,
                "cuts": statistics.cuts,
                "stale_messages": statistics.stale_messages,
                "applied": statistics.applied,
                "durable": statistics.durable,
                "sequence": statistics.sequence,
                "disk_errors": self.mirror.disk_errors,
                "local_flushes": self.mirror.flusher.count,
                "failures": count_status(self.failures.counts),
                **self._resyncs.counters(self._synchroniser),
                "intent_waits": self.mirror.guard.waits if self.mirror.guard is not None else 0,
            },
            "peer": {
                "connected": self.state in ("protected", "syncing"),
                "address": self.link.address,
                "trouble": self.link.trouble,
                "round_trip_seconds": statistics.round_trip_s,
            },
            "error": self.failures.error,
        }

    async def close(self) -> None:
        """Say goodbye and note where the stream ends. Nothing may be in flight that a client waits for."""
        self._stop_work()
        in_line = self.session.idle and self.session.attached and self.state == "protected"
        clean = self.serving and in_line and not any(self.mirror.bitmaps)
        if self._tasks:
            await asyncio.wait(self._tasks)
        last = self.session.last_sequence
        self._closing = True
        self.link.perform(self.session.close("the primary stops"))
        if clean:
            try:
                await self._loop.run_in_executor(None, self._flush)
            except OSError as error:
                self._disk_failed("flush", error)
                clean = False
        if clean and self._lifecycle.failure is None:
            await self.record.update_async(
                clean=True, stream=self.session.stream, sequence=last, checkpoint=self.session.checkpoint_number,
                disks=fingerprints(self.settings, running=False),
            )  # fmt: skip
        self.link.close()
        self.mirror.close()


class _ResyncCounters:
    """What all resyncs and repairs of this process came to."""

    def __init__(self) -> None:
        self._count = self._full = self._asked = self._differing = self._moved = self._repaired = 0

    def begun(self, *, full: bool) -> None:
        self._count += 1
        self._full += full

    def ended(self, resync: Synchroniser) -> None:
        self._asked += resync.asked_bytes
        self._differing += resync.differing_bytes
        self._moved += resync.moved_bytes

    def repaired(self, repair: Synchroniser) -> None:
        self._repaired += repair.moved_bytes

    def counters(self, current: Synchroniser | None) -> dict[str, int]:
        """With those of the resync that is going on, if one is."""
        return {
            "resyncs": self._count,
            "full_resyncs": self._full,
            "resync_asked_bytes": self._asked + (current.asked_bytes if current is not None else 0),
            "resync_differing_bytes": self._differing + (current.differing_bytes if current is not None else 0),
            "resync_moved_bytes": self._moved + (current.moved_bytes if current is not None else 0),
            "repaired_bytes": self._repaired,
        }


def random_number(bits: int) -> int:
    """A random number that is not zero."""
    return secrets.randbits(bits) or 1


def stream_keys(settings: NodeSettings) -> CurveKeys | None:
    """The keys of the replication stream; None for plain text."""
    replication = settings.replication
    if replication.secret_key is None or replication.peer_key is None:
        return None
    return load_keys(replication.secret_key, replication.peer_key)
