"""Bringing the secondary in line while guests write, and checking that it is: resyncs, verifications and repairs as
tasks, one of each at most, ended by whoever learns that their conditions hold no more.

What differs, or may, is ``primary.knowledge``'s to say; what goes next is ``primary.resync``'s to decide. This is who
begins, and what happens at the end:

    ResyncNeeded ──▶ begin ──▶ Synchroniser.run ──▶ finish_resync in the stream ──▶ a checkpoint ──▶ ``complete``
                       └────── cut, lost, disk error: ``stop``; what was not confirmed stays marked
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, TypeVar

from common.arguments import flag_of
from common.errors import OperationFailed, TandemDiskError
from common.settings import NodeSettings
from primary.effects import ResyncNeeded
from primary.knowledge import Knowledge
from primary.link import Link
from primary.mirror import Mirror
from primary.questions import Range
from primary.resync import ResyncLimits
from primary.session import PrimarySession
from primary.synchroniser import Synchroniser, limits_status, make_suspects
from primary.verifier import Verifier

T = TypeVar("T")

log = logging.getLogger("primary")

MAX_EXTENTS: Final = 1000
"""Differing extents that an answer to ``verify`` names."""
IDLE: Final[dict[str, Any]] = {"active": False, "done_bytes": 0, "total_bytes": 0, "rate": 0.0}
"""Status of a resync that is not going on."""


class Standpoint(Protocol):
    """What the engine says of itself."""

    state: str
    reason: str

    def disk_failed(self, what: str, error: OSError) -> None: ...


class Alignment:
    """See the module. ``all_sent`` is called when nothing is marked any more, before the end goes into the stream."""

    def __init__(
        self,
        settings: NodeSettings,
        mirror: Mirror,
        knowledge: Knowledge,
        session: PrimarySession,
        link: Link,
        engine: Standpoint,
        all_sent: Callable[[], None],
    ) -> None:
        self._mirror = mirror
        self._knowledge = knowledge
        self._session = session
        self._link = link
        self._engine = engine
        self._all_sent = all_sent
        self._loop = asyncio.get_running_loop()
        self._synchroniser: Synchroniser | None = None
        self._synchronising: asyncio.Task[None] | None = None
        self._verifier: Verifier | None = None
        self._commanded: asyncio.Task[Any] | None = None
        """What an operator asked for: a verification, or a resync of a pair that is protected."""
        self._repair: Synchroniser | None = None
        """Sends what a verification found."""
        self._limits = ResyncLimits(
            floor=float(settings.resync_floor),
            ceiling=float(settings.resync_rate),
            deadline_s=settings.resync_deadline_s,
        )
        self._counters = _ResyncCounters()
        self._unsampled = False
        """The next resync begins with samples; a cut may have come before all of them were answered."""
        self._closing = False
        self.ending = False
        """All of a resync is in the stream, and the secondary has yet to take the checkpoint behind it: it is not in
        line before that, however many connections it takes."""

    def stop(self) -> None:
        """Whatever goes over the disks in the background: it began under conditions that hold no more."""
        self._stop_synchroniser()
        if self._repair is not None:
            self._repair.stop()
        if self._commanded is not None:
            self._commanded.cancel()

    def close(self) -> None:
        """``stop``, and begin nothing more."""
        self._closing = True
        self.stop()

    def status(self) -> dict[str, Any]:
        """``resync`` and ``verify`` of the status."""
        resync = self._synchroniser.status() if self._synchroniser is not None else IDLE | limits_status(self._limits)
        return {
            "resync": resync,
            "verify": self._verifier.status() if self._verifier is not None else {"active": False},
        }

    def counters(self) -> dict[str, int]:
        """What all resyncs came to."""
        return self._counters.totals(self._synchroniser)

    # Resync

    def begin(self, effect: ResyncNeeded) -> None:
        """Answer to what the handshake found."""
        full, peer = effect.full, effect.peer
        self._counters.begun(full=full)
        known = peer.exact and peer.stream == self._session.stream
        # since a start that was not clean, of either side, nobody knows what happened to its disk before
        self._unsampled = not full and (self._unsampled or not known)
        self.ending = False
        self._link.perform(self._session.begin_resync(full=full, keep_checkpoint=peer.exact, now=time.monotonic()))
        self._start_synchroniser()

    def go_on(self) -> None:
        """The stream of a resync goes on after a cut, between RESYNC and SYNCED. If the resync itself does not (the
        primary disk could not be read, and ``block`` keeps everything attached), another one takes what is marked."""
        if self._synchronising is None or self._synchronising.done():
            self._stop_synchroniser()
            self._start_synchroniser()

    def _start_synchroniser(self) -> None:
        if self._closing:
            return
        distrust = self._distrust if self._unsampled else None
        self._synchroniser = Synchroniser(self._mirror, self._knowledge.suspects, self._limits, distrust)
        self._synchronising = self._loop.create_task(self._synchronise(self._synchroniser), name="resync")

    async def _distrust(self, surprises: int) -> None:
        """Samples differ that nothing explains: the disks are compared as a whole."""
        sentence = (
            f"{surprises} samples differ where both disks were equal: one of them was changed, or replaced by an "
            "older copy, while nobody looked; they are compared as a whole"
        )
        log.warning("%s", sentence)
        self._engine.reason = sentence
        self._counters.distrusted()
        try:
            await self._knowledge.suspect_everything()
        except TandemDiskError as error:
            log.error("a primary that is killed now would not know what to compare: %s", error)

    def complete(self) -> None:
        """The secondary took the checkpoint that ends a resync."""
        self.ending = False
        self._stop_synchroniser()
        self._knowledge.resync_complete()

    async def _synchronise(self, synchroniser: Synchroniser) -> None:
        session = self._session
        try:
            await synchroniser.run()
        except OSError as error:
            self._engine.disk_failed("read for the resync", error)
            reason = f"the primary disk cannot be read: {error.strerror}"
            self._link.settle(session.lost(reason, time.monotonic()))
            return
        if self._synchroniser is synchroniser and session.syncing:
            self._all_sent()
            self.ending = True
            self._link.send(session.finish_resync(None, time.monotonic()))

    def _stop_synchroniser(self) -> None:
        if self._synchronising is not None:
            self._synchronising.cancel()
            self._synchronising = None
        if self._synchroniser is not None:
            self._synchroniser.stop()
            self._unsampled = self._unsampled and self._synchroniser.sampling
            self._counters.ended(self._synchroniser)
            self._synchroniser = None

    # Verification

    async def verify(self, *, repair: bool) -> list[Range]:
        """Compare both disks while guests write. The extents that differ are marked for the next resync, or sent at
        once.

        OperationFailed if there is no secondary in line, or it is lost meanwhile.
        """
        self._check_idle()
        self._verifier = verifier = Verifier(self._mirror, ResyncLimits(ceiling=self._limits.ceiling))
        try:
            return await self._command("verification", self._verify(verifier, repair=repair))
        finally:
            self._verifier = None

    def _check_idle(self) -> None:
        engine = self._engine
        if engine.state != "protected":
            raise OperationFailed(
                f"There is nothing to compare with: this side is {engine.state}.", hint="See `tandemdisk status`."
            )
        if self._closing or not self._session.attached:
            raise OperationFailed("There is nothing to compare with: this side is about to stop.")
        if self._commanded is not None:
            what = self._commanded.get_name()
            raise OperationFailed(f"A {what} is under way.", hint="`tandemdisk status` shows how far it is.")

    async def _command(self, what: str, work: Coroutine[Any, Any, T]) -> T:
        """Do what an operator asked for, unless ``stop`` ends it. OperationFailed if that, or the disk, did."""
        engine = self._engine
        self._commanded = task = self._loop.create_task(work, name=what)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()  # if whoever asked is gone
            self._commanded = None
        if task.cancelled():
            raise OperationFailed(f"The {what} was interrupted: this side is {engine.state}.", hint=engine.reason)
        try:
            return task.result()
        except OSError as error:
            engine.disk_failed(f"read for the {what}", error)
            raise OperationFailed(f"The primary disk cannot be read: {error.strerror or error}.") from error

    async def resync_command(self, args: dict[str, Any]) -> dict[str, Any]:
        """``resync`` as a control command, while the pair is protected: send what is marked as differing; with
        {"full": true} compare both disks as a whole first, by checksums. What an interruption leaves is still marked.
        """
        self._check_idle()
        full = flag_of(args, "full")
        if full:
            await self._knowledge.remember_everything()  # a process that comes after a kill goes on with it
            self._check_idle()
            for suspects in self._knowledge.suspects:
                suspects.set_all()
        sender = self._synchroniser = Synchroniser(self._mirror, self._knowledge.suspects, self._limits)
        self._counters.begun(full=full)
        started = time.perf_counter()
        try:
            await self._command("resync", self._run(sender))
        finally:
            if self._synchroniser is sender:
                self._stop_synchroniser()
        return {
            "asked_bytes": sender.asked_bytes,
            "differing_bytes": sender.differing_bytes,
            "moved_bytes": sender.moved_bytes,
            "seconds": time.perf_counter() - started,
        }

    @staticmethod
    async def _run(sender: Synchroniser) -> None:
        try:
            await sender.run()
            await sender.confirm_all()
        finally:
            sender.stop()

    async def verify_command(self, args: dict[str, Any]) -> dict[str, Any]:
        """``verify`` as a control command: {"repair": bool} to what was found, at most ``MAX_EXTENTS`` of it one by
        one."""
        started = time.perf_counter()
        repair = flag_of(args, "repair")
        found = await self.verify(repair=repair)
        names = [volume.name for volume in self._mirror.volumes]
        return {
            "differing": len(found),
            "differing_bytes": sum(length for _, _, length in found),
            "extents": [[names[index], offset, length] for index, offset, length in found[:MAX_EXTENTS]],
            "repaired": repair and bool(found),
            "compared_bytes": sum(volume.size for volume in self._mirror.volumes),
            "seconds": time.perf_counter() - started,
        }

    async def _verify(self, verifier: Verifier, *, repair: bool) -> list[Range]:
        found = await verifier.run()
        await self._knowledge.remember_differences(found)
        if found and repair:
            sender = self._repair = Synchroniser(self._mirror, make_suspects(self._mirror))
            try:
                await sender.copy()
                await sender.confirm_all()
            finally:
                sender.stop()
                self._repair = None
                self._counters.repaired(sender)
        return found


class _ResyncCounters:
    """What all resyncs and repairs of this process came to."""

    def __init__(self) -> None:
        self._count = self._full = self._asked = self._differing = self._moved = self._repaired = self._distrusts = 0

    def begun(self, *, full: bool) -> None:
        self._count += 1
        self._full += full

    def distrusted(self) -> None:
        self._distrusts += 1

    def ended(self, resync: Synchroniser) -> None:
        self._asked += resync.asked_bytes
        self._differing += resync.differing_bytes
        self._moved += resync.moved_bytes

    def repaired(self, repair: Synchroniser) -> None:
        self._repaired += repair.moved_bytes

    def totals(self, current: Synchroniser | None) -> dict[str, int]:
        """With those of the resync that is going on, if one is."""
        return {
            "resyncs": self._count,
            "full_resyncs": self._full,
            "resyncs_in_distrust": self._distrusts,
            "resync_asked_bytes": self._asked + (current.asked_bytes if current is not None else 0),
            "resync_differing_bytes": self._differing + (current.differing_bytes if current is not None else 0),
            "resync_moved_bytes": self._moved + (current.moved_bytes if current is not None else 0),
            "repaired_bytes": self._repaired,
        }
