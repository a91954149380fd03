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
    refused       said that we two do not  alone, marked dirty; wait if  (an operator)
                  belong together          on_peer_loss = block
    fenced        was promoted             fail with EIO                 (rejoin)

Going alone starts a new generation, durably, before the first write is acknowledged that the secondary lacks.

The primary process runs an engine from its start (``primary.node``); the export process of a secondary begins one when
that side was promoted and its commit is complete (``secondary.guest``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

import zmq

from common.disk import Disk
from common.errors import OperationFailed, PeerRefused, TandemDiskError
from common.failures import Failure, Failures
from common.generation import History, Standing, extend
from common.keys import stream_keys
from common.process import Lifecycle
from common.record import Record, fingerprints, random_number
from common.settings import NodeSettings
from primary.alignment import Alignment
from primary.checkpoints import Checkpoints
from primary.contact import PrimaryConfig, State
from primary.effects import (
    Acknowledged,
    CheckpointDone,
    CheckpointFailed,
    Cut,
    Effect,
    Established,
    FlushFailed,
    Lost,
    Outgrown,
    Pressure,
    Refused,
    Resized,
    ResyncNeeded,
    Starved,
    Unnoted,
    Verified,
    WindowOpen,
)
from primary.growth import Growth
from primary.knowledge import Knowledge
from primary.link import Link, describe
from primary.mirror import Mirror
from primary.packer import Packer
from primary.report import status_of
from primary.session import PrimarySession
from primary.window import Unacknowledged

EIO: Final = 5
IDLE_S: Final = 0.5
"""How long a stop waits for the last acknowledgements."""

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
        self._tasks: set[asyncio.Task[None]] = set()
        self.mirror = Mirror(
            volumes,
            sync=settings.mode == "sync",
            block_size=settings.buffer.block_size,
            on_disk_error=self.disk_failed,
        )
        self.knowledge = Knowledge(settings, record, self.mirror)
        self.session = self.knowledge.session = self._make_session()
        self.session.noted = self.knowledge.everything_remembered
        self._noting: asyncio.Task[None] | None = None
        self.found = record.value.clean, self.session.last_sequence, record.value.history
        """Whether the last process stopped in good order, and where."""
        address = settings.replication.connect
        if address is None:
            raise OperationFailed("This side does not know its secondary.", hint="Set replication.connect.")
        packer = Packer() if settings.replication.compression == "zstd" else None
        self.link = Link(self.session, context, address, stream_keys(settings.replication), self._handle, packer)
        self.mirror.carrier = self.link
        self.checkpoints = Checkpoints(self.session, self.link, record.value.checkpoint)
        self.alignment = Alignment(
            settings, self.mirror, self.knowledge, self.session, self.link, self, self._nearly_in_line
        )
        self.growth = Growth(
            settings, record, self.mirror, self.knowledge, self.session, self.link, self.alignment, self
        )

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
            metadata.standing()._replace(base=self.knowledge.base),
            instance=random_number(32),
            stream=metadata.stream if resumed else random_number(64),
            next_sequence=metadata.sequence + 1 if resumed else 1,
            checkpoint=metadata.checkpoint,
            bases=self.knowledge.bases,
            ledger=self.knowledge.ledger,
        )

    def start(self, export: Export, *, alone: str = "") -> None:
        """Begin to look for the secondary. ``alone``: why this side leads without one for now; else ``settle`` next."""
        self.export = export
        self.mirror.pause = self._congested
        self.link.before_greeting = self.knowledge.tell
        if alone:
            self.session.lead_alone(alone)
            self._set_state("alone", alone)
        self.link.open()
        if self.mirror.guard is not None:
            forgetting = self.knowledge.forget_now_and_then(self._protected)
            self._lifecycle.critical(forgetting, "intents")
        if (interval_s := self.settings.checkpoint_interval_s) > 0:
            self._lifecycle.critical(self.checkpoints.now_and_then(interval_s, self._protected), "checkpoints")

    def _protected(self) -> bool:
        return self.state == "protected"

    async def settle(self) -> None:
        """Wait until the secondary answered, refused (PeerRefused), or is known to be away; or until a stop comes,
        which begins nothing."""
        waiting = [self._loop.create_task(event.wait()) for event in (self._settled, self._lifecycle.stop)]
        peer_timeout_s = self.settings.replication.peer_timeout_s
        try:
            await asyncio.wait(waiting, timeout=peer_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        if self._lifecycle.stop.is_set():
            return
        if not self._settled.is_set():
            if self.link.turned_away:
                raise PeerRefused(
                    f"No connection to the secondary at {self.link.address}: {self.link.trouble}.",
                    hint="Each side needs the other's public key: see `tandemdisk keygen`.",
                )
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
                self._unfence()
                self.mirror.use_blocks(peer.block_size)
                syncing = self.session.syncing or self.alignment.ending
                self._set_state("syncing" if syncing else "protected", "")
                if self.session.syncing:
                    self.alignment.go_on()
                elif not syncing:
                    self._in_one_generation()
                    self.growth.compare()
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
                self.checkpoints.failed(token, sentence)
                if self.alignment.ending and self.session.state is State.ESTABLISHED:
                    # a resync is over when one was taken
                    self.link.send(self.session.checkpoint(None, time.monotonic()))
            case Starved():
                self._starved()
            case Verified(token=token, differing=differing):
                token.answered(differing)
            case Resized():
                self.growth.answered(effect)
            case Outgrown():
                self.alignment.stop()
                self.growth.outgrown(effect)
            case Unnoted():
                self._note_everything()
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
        self.record.update_soon(checkpoint=effect.number)
        if self.alignment.ending:
            self.alignment.complete()
            if self.state == "syncing":  # else the WELCOME told of it, and what it leads to comes next
                self._set_state("protected", "")
                self._in_one_generation()
        self.checkpoints.done(effect)

    def _in_one_generation(self) -> None:
        """The secondary has all that is here: from this generation on the bitmaps know every write."""
        standing = self.session.standing
        base = standing.history[-1].identity
        self._own_generation = False
        if standing.base != base:
            self.session.standing = standing._replace(base=base)

    def _resync(self, effect: ResyncNeeded) -> None:
        self.alignment.stop()
        self._unfence()
        self.mirror.use_blocks(effect.peer.block_size)
        self.knowledge.mark_what_may_differ(effect.peer, full=effect.full)
        self._set_state("syncing", effect.reason)
        self.alignment.begin(effect)

    def _note_everything(self) -> None:
        """Before the RESYNC: with that the secondary goes over to this stream, and a process that came after this one
        would go by what is marked."""
        if self._noting is None or self._noting.done():
            self._noting = self._loop.create_task(self._everything_noted(), name="everything")
            self._tasks.add(self._noting)
            self._noting.add_done_callback(self._tasks.discard)

    async def _everything_noted(self) -> None:
        try:
            await self.knowledge.remember_everything()
        except TandemDiskError as error:
            log.error("the whole disk is not compared before that can be noted: %s", error)
            return
        self.link.redial()

    def _nearly_in_line(self) -> None:
        """All of a resync is in the stream: the secondary may be in this generation from here on, whether its answer
        comes through or not."""
        self._own_generation = False

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
        self.alignment.stop()
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
            self.link.settle(self.session.pull_ahead(reason, time.monotonic()))

    def _refused(self, effect: Refused) -> None:
        if self._closing:
            return  # as in ``_lost``
        self.alignment.stop()
        if not self.serving:
            self._refusal = effect.sentence
            self._set_state("refused", effect.sentence)
            for batch in effect.unacknowledged:
                batch.pin.unpin()
            return
        if effect.code == "rejoin":
            self._fence(effect)
            return
        if self.session.attached:  # on_peer_loss = block: nothing goes on alone, so nothing begins
            self._set_state("refused", effect.sentence)
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

    def _unfence(self) -> None:
        """The other side follows this one again: an operator decided against its promotion."""
        if self.state == "fenced" and not self._lifecycle.stop.is_set():
            self.mirror.fenced = False

    def _go_alone(self, state: str, reason: str, unacknowledged: list[Unacknowledged]) -> None:
        """Mark what the secondary may lack, start a generation durably, then let the clients go on."""
        for batch in unacknowledged:
            self.mirror.mark_dirty(batch.extents)
        self._set_state(state, reason)
        history = self.record.value.history
        if self._own_generation:
            self._let_go(unacknowledged)  # alone already: this generation is ours
            return
        self._own_generation = self.session.beginning = True
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
        self.session.beginning = False
        self._let_go(unacknowledged)
        self.mirror.release()

    def _let_go(self, unacknowledged: list[Unacknowledged]) -> None:
        for batch in unacknowledged:
            if batch.pin is not None:
                batch.pin.unpin()

    # A peer that may not lead

    def current_standing(self) -> Standing:
        """What this side says of itself to a peer that greets it."""
        self.knowledge.tell()
        return self.session.standing

    def turned_away(self, sentence: str) -> None:
        """Another primary greeted this side, which leads, and was refused: ``status`` says so here, too, until this
        side has a secondary again."""
        if self.state == "alone":
            self._set_state("alone", sentence)

    # Status and end

    def disk_failed(self, what: str, error: OSError) -> None:
        """A failure to tell of: ``what`` was being done to the primary disk."""
        self.failures.add(Failure.PRIMARY_DISK, f"{what} failed: {error.strerror or error}")
        if what == "flush":
            self.knowledge.disk_lost_writes()

    async def clear_error(self) -> None:
        """The last failure was looked after, and so was a disk that lost writes. DiskError if that cannot be noted."""
        seen = self.failures.error
        await self.knowledge.trust_disk()
        if self.failures.error is seen:  # else it is a newer one
            self.failures.clear()

    def status(self) -> dict[str, Any]:
        """What ``status`` shows of a primary, without its export."""
        return status_of(self)

    async def _wait_idle(self) -> None:
        """A checkpoint is told before it is acknowledged: let the acknowledgement come, or the stop is not clean."""
        deadline = self._loop.time() + IDLE_S
        while self.state == "protected" and not self.session.idle and self._loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        """Say goodbye and note where the stream ends. Nothing may be in flight that a client waits for."""
        self.mirror.fenced = True  # what is held still would be written behind the end; its clients were cut off
        await self.growth.stop()
        await self.knowledge.stop()
        self.alignment.close()
        await self._wait_idle()
        in_line = self.session.idle and self.session.attached and self.state == "protected"
        marked = any((*self.mirror.bitmaps, *self.knowledge.suspects)) or self.growth.unfinished
        clean = self.serving and in_line and not marked
        if self._tasks:
            await asyncio.wait(self._tasks)
        last = self.session.last_sequence
        as_found = not self.serving and self.found == (True, last, self.record.value.history)
        self._closing = True
        self.link.perform(self.session.close("the primary stops"))
        if clean:
            try:
                await self.mirror.make_durable()
            except OSError:
                clean = False
        await self.mirror.flusher.settle()  # what a flush that still runs may lose is to be noted, too
        try:
            if clean and self._lifecycle.failure is None:
                await self.record.update_async(
                    clean=True, stream=self.session.stream, sequence=last, checkpoint=self.session.checkpoint_number,
                    bases=(), disks=fingerprints(self.settings, running=False), lost_writes=self.knowledge.lost_writes,
                )  # fmt: skip
            elif as_found:  # nobody was served, nothing was sent
                await self.record.update_async(clean=True, disks=fingerprints(self.settings, running=False))
            if self.knowledge.lost_writes and not self.record.value.lost_writes:
                await self.record.update_async(lost_writes=True)
        finally:
            self.link.close()
            self.mirror.close()

    def discard(self) -> None:
        """Let go of what an engine that was never started has open; the disks are whose they were."""
        self.link.close()
        self.mirror.close_files()
