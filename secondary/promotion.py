"""How a secondary becomes a primary: decided, made durable, committed, and handed to the export process to lead.

    decide ─▶ stream held, applier stopped, ─▶ generation durable, ─▶ commit in background ─▶ the export process leads
              disks durable, decided again     stage switched         (``checkpoint`` only)
                                               (the promotion)

What is left to do once the promotion is durable is also done after a crash in the middle: ``finish`` finds the stage in
the header of the disk buffer, and the target in the metadata. A host that goes down takes the buffer with it: so the
metadata say with the promotion that there is a commit to do, and that it is done before the stage does. In between a
side without its buffer does not start (``common.record.refuse_mixture``).

A promotion that could not be made durable is taken back: nobody knows what the metadata file says after a write that
failed, so this side hears no primary before it has been written there again that it follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from common import wire
from common.arguments import flag_of
from common.disk import FileDisk
from common.errors import OperationFailed, TandemDiskError
from common.generation import History, extend
from common.inquiry import Informant
from common.intent import INTENT_FILE, IntentFile, marked_bytes
from common.record import Record, random_number
from common.settings import NodeSettings
from common.wire import Frames
from secondary.applier import NOWHERE, Applier
from secondary.backup import PairBackup
from secondary.buffer import DiskBuffer
from secondary.commit import CommitJob, failover_checkpoint, failover_latest, held_extents
from secondary.exporter import Exporter
from secondary.failover import Situation, Target, decide, parse_target
from secondary.header import Stage
from secondary.link import Link
from secondary.session import SecondarySession

LAST_WORDS_S: Final = 2.0
"""How long what a dead primary sent may take to arrive: its end closes the connection, unless its host went with it."""
_LOOK_S: Final = 0.005
WITHDRAW_AGAIN_S: Final = 0.5
"""Pause before it is tried again to note that a failed promotion is none."""
LEAD_AGAIN_S: Final = 0.5
"""Pause before an export process that did not begin to lead is told again."""

log = logging.getLogger("secondary")


class Promotion:
    """See the module."""

    def __init__(
        self,
        settings: NodeSettings,
        record: Record,
        buffer: DiskBuffer,
        disks: Sequence[FileDisk],
        backup: PairBackup,
        exporter: Exporter,
    ) -> None:
        self.commit: CommitJob | None = None
        """The one that runs, or ran last."""
        self.leading: asyncio.Task[None] | None = None
        """Set once the export process was told to lead: the metadata is its from then on."""
        self._settings = settings
        self._record = record
        self._buffer = buffer
        self._disks = disks
        self._backup = backup
        self._exporter = exporter
        self._session: SecondarySession
        self._link: Link
        self._applier: Applier
        self._loop = asyncio.get_running_loop()
        self._committing: asyncio.Task[None] | None = None
        self._failing_over = asyncio.Lock()
        self._informant = Informant(settings)
        self._taking_over: asyncio.Task[None] | None = None
        """Set while the other side's order to take over is carried out."""
        self._withdrawing: asyncio.Task[None] | None = None
        """Set while a promotion that failed is being taken back."""
        self._telling: asyncio.Task[None] | None = None
        """Set while the export process is told of a refusal."""
        self._handed_over = False
        """From here on the engine writes the metadata, and ours are too old to write."""

    def attend(self, session: SecondarySession, link: Link, applier: Applier) -> None:
        """What a failover stops."""
        self._session, self._link, self._applier = session, link, applier

    @property
    def committing(self) -> bool:
        """A commit is going on."""
        return self._committing is not None

    async def end(self) -> None:
        """Wait for a failover that was begun, and begin none any more: the end of this process is not noted on top.
        Then end a commit where it is: the next process goes on."""
        await self._failing_over.acquire()
        self.stop()
        if self._taking_over is not None:
            self._taking_over.cancel()
        if self._committing is not None and self.commit is not None:
            self.commit.stopping.set()
            await self._committing

    async def command(self, args: dict[str, Any]) -> dict[str, Any]:
        """``failover`` as a control command. ``primary_dead``: the caller knows that its process has ended."""
        target = parse_target(args.get("to", "latest"))
        async with self._failing_over:
            started = time.perf_counter()
            dead, force = flag_of(args, "primary_dead"), flag_of(args, "force")
            if dead:
                await self._last_words()
            if self._record.value.role == "primary" and self._buffer.header.stage is Stage.RUNNING:
                await self.finish()  # a process before this one decided, and ended in the middle
            number = await self._failover(target, force=force, primary_dead=dead)
            return {
                "to": target,
                "generation": self._record.value.history[-1].number,
                "checkpoint": number,
                "seconds": time.perf_counter() - started,
                "nbd_uri": self._exporter.uri(self._settings.volumes[0].name),
                "state": self._buffer.header.stage.name,
            }

    def asked(self, ask: wire.Ask, answer: Callable[[Frames], object]) -> None:
        """A command on the other host asks; TOLD or REFUSE goes to ``answer``."""
        if ask.ended and self._record.value.role == "secondary":
            if self._taking_over is None:
                self._taking_over = self._loop.create_task(self._take_over(ask, answer), name="take over")
        elif told := self._informant.tell(ask.session):
            answer(told)

    async def _take_over(self, ask: wire.Ask, answer: Callable[[Frames], object]) -> None:
        """The second half of a switchover: the other side ended in good order, and says so itself."""
        try:
            if self._settings.replication.secret_key is None:
                raise OperationFailed("The stream has no keys: whoever reaches this port could say that.")
            if ask.ended != self._record.value.history:
                raise OperationFailed(f"Side {self._settings.side} does not stand where the other one ended.")
            await self._last_words()
            await self.command({"to": "latest"})
        except TandemDiskError as error:
            answer(wire.encode(wire.Refuse(ask.session, 0, "switchover", str(error))))
        else:
            if told := self._informant.tell(ask.session, always=True):
                answer(told)
        finally:
            self._taking_over = None

    async def _last_words(self) -> None:
        """Until all that a dead primary sent has arrived."""
        for _ in range(round(LAST_WORDS_S / _LOOK_S)):
            if not self._session.connected:
                return
            await asyncio.sleep(_LOOK_S)

    async def _failover(self, target: Target, *, force: bool, primary_dead: bool) -> int:
        header = self._buffer.header
        position = self._session.position
        situation = Situation(
            header.stage, not header.syncing, position.syncing or not position.exact,
            self._session.connected and not primary_dead, self._buffer.guest_has_written, header.stream_id == NOWHERE,
        )  # fmt: skip
        decide(target, force=force, situation=situation)
        if header.stage is Stage.RUNNING:
            number = header.checkpoint.number
            log.warning("failover target=%s checkpoint=%d applied=%d", target, number, position.applied)
            self._link.hold()
            await self._applier.stop()
            durable = await self._make_durable()
            try:
                self._decide_again(target, force=force)
            except TandemDiskError:
                self._link.resume()
                raise
            try:
                history = await self._switch(target, durable=durable, force=force)
            except TandemDiskError as error:
                self._withdraw_soon(error)
                raise
            except OSError as error:
                refusal = OperationFailed(f"Side {self._settings.side} cannot take over: {error.strerror or error}.")
                self._withdraw_soon(refusal)
                raise refusal from error
            self._session.standing = self._session.standing._replace(role="primary", history=history, consistent=True)
            self._link.perform(self._session.depose(f"side {self._settings.side} has taken over, in {history[-1]}"))
        await self.finish(force=force)
        return header.checkpoint.number

    async def _make_durable(self) -> bool:
        """What is applied becomes durable before it is what this side begins at: if its power failed, it would lack
        what the former primary has, and nobody would know where. False if it is not, and both are to be compared."""
        await self._applier.make_durable()
        return self._applier.exact

    def _decide_again(self, target: Target, *, force: bool) -> None:
        """When the first decision fell, the applier may have been at the beginning of a resync, or a flush on its way
        to fail: no failover to a state that is no more, whoever forces it. The rest was decided."""
        header = self._buffer.header
        now = Situation(
            header.stage, not header.syncing, self._session.position.syncing or not self._applier.exact,
            primary_connected=False, guest_has_written=False, lost_writes=header.stream_id == NOWHERE,
        )  # fmt: skip
        decide(target, force=force, situation=now)

    async def _switch(self, target: Target, *, durable: bool, force: bool) -> History:
        """Durably, and at once for everybody who reads and writes here: from now on this side decides. The history with
        its new generation.

        Both in one step under the requests of all blocks: a guest's write between them would be dropped by a failover
        to ``latest`` after it was decided that there is none.
        """
        past = self._record.value.history
        history = extend(past, random_number(64), self._settings.side)
        await asyncio.to_thread(self._begin_intents, target)
        point = self._session.point()

        def note() -> None:
            self._decide_again(target, force=force)  # a flush may have failed on its way here
            self._record.update(
                role="primary", history=history, failover=target, clean=False, syncing=False, consistent=True,
                checkpoint=self._buffer.header.checkpoint.number, base=past[-1].identity,
                bases=((point.stream, point.sequence),) if durable else (), committing=target == "checkpoint",
            )  # fmt: skip

        if target == "checkpoint":
            await asyncio.to_thread(failover_checkpoint, self._backup, durably=note)
        else:
            await asyncio.to_thread(failover_latest, self._backup, force=force, durably=note)
        return history

    def _withdraw_soon(self, error: TandemDiskError) -> None:
        self._link.deafen(f"side {self._settings.side} could not take over: {error.sentence}")
        if self._withdrawing is None:
            self._withdrawing = self._loop.create_task(self._withdraw(), name="withdraw")

    async def _withdraw(self) -> None:
        while True:
            async with self._failing_over:
                if self._record.value.role == "primary":
                    break  # at the next attempt
                try:
                    await self._record.update_async()
                except TandemDiskError as error:
                    log.error("the failed promotion is not taken back: %s", error)
                else:
                    self._link.resume()
                    break
            await asyncio.sleep(WITHDRAW_AGAIN_S)
        self._withdrawing = None

    def stop(self) -> None:
        """Tell and try nothing more; what was begun is ended by ``end``."""
        for task in (self.leading, self._withdrawing, self._telling):
            if task is not None:
                task.cancel()

    async def go_on(self) -> None:
        """A process before this one has noted a promotion: do what is left of it, and hear no failover meanwhile."""
        async with self._failing_over:
            await self.finish()

    async def finish(self, *, force: bool = True) -> None:
        """What is left to do once the promotion is durable; also after a crash in the middle."""
        header = self._buffer.header
        if header.stage is Stage.RUNNING:
            if self._record.value.failover == "checkpoint":
                await asyncio.to_thread(failover_checkpoint, self._backup)
            else:
                await asyncio.to_thread(lambda: failover_latest(self._backup, force=force))
        if header.stage in (Stage.FAILOVER, Stage.FAILOVER_FAILED) and self._committing is None:
            self.commit = CommitJob(
                self._buffer, self._disks, prepare=self._prepare_commit, complete=self._note_complete
            )
            self._committing = self._loop.create_task(self._run_commit(self.commit), name="commit")
        elif header.stage is Stage.DONE:
            await asyncio.to_thread(self._backup.end_spill)
            self._lead_soon()

    async def _run_commit(self, job: CommitJob) -> None:
        try:
            if await asyncio.to_thread(job.run):
                await asyncio.to_thread(self._backup.end_spill)
                self._lead_soon()
        except OperationFailed as error:
            log.error("commit failed: %s", error)
        finally:
            self._committing = None

    def _begin_intents(self, target: Target) -> None:
        """Before the first write of a promoted side: a write-intent file, in which a commit marks what it moves. One
        that is there says what this side wrote before it followed, and the other side may differ there still."""
        IntentFile(f"{self._settings.directory}/{INTENT_FILE}", [disk.size for disk in self._disks]).close()
        if target == "checkpoint":
            self._note_held()

    def _prepare_commit(self) -> None:
        """Durably, before a block is moved."""
        if not self._record.value.committing:  # promoted by a version that did not note it
            self._record.update(committing=True)
        self._note_held()

    def _note_complete(self) -> None:
        """Durably, when the last block is: this side leads without its buffer, too."""
        self._record.update(committing=False)

    def _note_held(self) -> None:
        """Mark what the buffer holds: the commit writes it. The export process marks in the same file."""
        path = f"{self._settings.directory}/{INTENT_FILE}"
        file = IntentFile(path, [disk.size for disk in self._disks], shared=True)
        try:
            file.set_ranges(
                (volume.index, offset, length)
                for volume in self._buffer.volumes
                for offset, length in held_extents(volume)
            )
        finally:
            file.close()

    # A former primary that greets this side

    def tell_loss(self) -> None:
        """Into the standing, as an upper bound: what a refusal says would be lost here."""
        sizes = [disk.size for disk in self._disks]
        with contextlib.suppress(TandemDiskError):  # what was said last may be old; to be refused matters more
            size = marked_bytes(f"{self._settings.directory}/{INTENT_FILE}", sizes)
            blocks = -(-size // self._settings.buffer.block_size)
            self._session.standing = self._session.standing._replace(own_blocks=blocks, own_bytes=size)

    def tell_refusal(self, sentence: str) -> None:
        """``status`` of this side, which leads, says it, too."""
        if self.leading is not None and self._telling is None:
            self._telling = self._loop.create_task(self._tell(sentence), name="refusal")

    async def _tell(self, sentence: str) -> None:
        with contextlib.suppress(TandemDiskError):
            await self._exporter.call("turned_away", sentence=sentence)
        self._telling = None

    # Leading

    def export_restarted(self) -> None:
        """A new export process has to be told what the old one knew."""
        if self.leading is not None:
            self.leading.cancel()
            self.leading = None
            self._lead_soon()

    def _lead_soon(self) -> None:
        """The disks are what this side decided on: its export process goes on as a primary."""
        if self.leading is None and self._settings.replication.connect is not None:
            self.leading = self._loop.create_task(self._lead(), name="lead")

    async def _lead(self) -> None:
        """Until it does: the export process may die in the middle, or meet a disk that fails."""
        while True:
            try:
                if not self._handed_over:
                    await self._record.update_async()  # behind whatever is being written
                    self._handed_over = True
                await self._exporter.call("lead")
            except TandemDiskError as error:
                log.error("the export process does not lead: %s", error)
                await asyncio.sleep(LEAD_AGAIN_S)
            else:
                return
