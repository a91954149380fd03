"""How the volumes of a pair grow while guests write: ``tandemdisk resize``, as DRBD's, after both disks were grown.

    1  RESIZE in the stream, with what this side's disks have; the secondary takes the smaller of both, durably
    2  the answer; from here on a crash of either side leads to the new size, never back
    3  this side: metadata, then write-intent bitmap, durably, what is new marked in it; then memory
    4  the exports: who connects now sees the new size; connections that exist keep theirs
    5  what is new is compared and, where it differs, sent, behind the guests; holes stay holes

Nothing beyond the old end is written anywhere before 4, so nobody was told of a write there that only one side has.
Where the answer is lost, or a side dies in between, the next handshake finds two sizes: the smaller side grows first
(here: ``Outgrown``), and greets again. A disk that was replaced by a smaller one is refused by name and size.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from common.arguments import number_of, text_of
from common.errors import OperationFailed, TandemDiskError, TimedOut
from common.record import Record
from common.settings import NodeSettings
from primary.alignment import Alignment, Standpoint
from primary.effects import Outgrown, Resized
from primary.knowledge import Knowledge
from primary.link import Link
from primary.mirror import Mirror
from primary.session import PrimarySession

RESIZE_TIMEOUT_S: Final = 60.0
COMPARE_AGAIN_S: Final = 0.5
"""Pause before what was added is compared, if something else went over the disks."""

log = logging.getLogger("primary")


class Growth:
    """See the module."""

    def __init__(
        self,
        settings: NodeSettings,
        record: Record,
        mirror: Mirror,
        knowledge: Knowledge,
        session: PrimarySession,
        link: Link,
        alignment: Alignment,
        engine: Standpoint,
    ) -> None:
        self.on_grown: Callable[[], None] = lambda: None
        """Called when the disks have grown, the metadata says so and what is new is marked, before anybody sees it."""
        self._settings = settings
        self._record = record
        self._mirror = mirror
        self._knowledge = knowledge
        self._session = session
        self._link = link
        self._alignment = alignment
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._growing = asyncio.Lock()
        self._asking = False
        self._closing = False
        self._comparing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the volumes now."""
        return tuple(volume.size for volume in self._mirror.volumes)

    @property
    def unfinished(self) -> bool:
        """The metadata has sizes that this side could not take over, so what is new is not marked: no stop is clean."""
        return tuple(size for _, size in self._record.value.volumes) != self.sizes

    # On command

    async def command(self, args: dict[str, Any]) -> dict[str, Any]:
        """``resize`` as a control command: {"volume": name or None for all, "size": bytes or None for what both disks
        have}. OperationFailed with the side and the sizes if it cannot be."""
        if self._engine.state != "protected":
            raise OperationFailed(
                f"Volumes can be resized only while the pair is protected; this side is {self._engine.state}.",
                hint="See `tandemdisk status`.",
            )
        if self._asking:
            raise OperationFailed("A resize is under way.")
        before = self.sizes
        size = number_of(args, "size")
        wanted = self._wanted(text_of(args, "volume"), size)
        if wanted != before:
            self._asking = True
            try:
                await self._ask(wanted, exact=size is not None)
            finally:
                self._asking = False
        self.compare()
        return {
            "volumes": [
                {"name": volume.name, "size": volume.size, "before": size}
                for volume, size in zip(self._mirror.volumes, before, strict=True)
            ]
        }

    def _wanted(self, name: str | None, size: int | None) -> tuple[int, ...]:
        peer = self._session.peer
        assert peer is not None
        block = peer.block_size
        volumes = self._mirror.volumes
        if name is not None and name not in [volume.name for volume in volumes]:
            raise OperationFailed(
                f"There is no volume {name}.", hint=f"Volumes: {', '.join(volume.name for volume in volumes)}."
            )
        wanted: list[int] = []
        told: list[str] = []
        for volume in volumes:
            there = volume.disk.capacity()
            if name not in (None, volume.name):
                wanted.append(volume.size)
                continue
            if size is not None and size < volume.size:
                raise OperationFailed(f"Volume {volume.name} has {volume.size} bytes: it cannot shrink to {size}.")
            target = max(volume.size, (there if size is None else size) // block * block)
            told.append(f"{volume.name} has {there} bytes")
            if there < target:
                raise OperationFailed(
                    f"Side {self._settings.side}'s disk of volume {told[-1]}, and {target} are asked for.",
                    hint="Grow both disks first.",
                )
            wanted.append(target)
        if size is None and tuple(wanted) == self.sizes:
            raise OperationFailed(
                f"There is nothing to grow to: side {self._settings.side}'s disk of volume {', '.join(told)}.",
                hint="Grow both disks first.",
            )
        return tuple(wanted)

    async def _ask(self, wanted: tuple[int, ...], *, exact: bool) -> None:
        answer: asyncio.Future[Resized] = self._loop.create_future()
        before = self.sizes
        self._link.send(self._session.resize(wanted, answer, time.monotonic(), exact=exact))
        try:
            async with asyncio.timeout(RESIZE_TIMEOUT_S):
                told = await answer
        except TimeoutError:
            raise TimedOut(
                f"The secondary did not answer within {RESIZE_TIMEOUT_S:g} s.",
                hint="`tandemdisk status` says what it waits for; it may still grow, and this side with it.",
            ) from None
        if told.sizes is not None:
            if told.sentence:
                raise OperationFailed(f"The secondary did not grow: {told.sentence}", hint="Grow both disks first.")
            await self._grow(told.sizes)
        elif self.sizes == before:
            raise OperationFailed(
                f"The resize was interrupted: {told.sentence}.",
                hint="If the secondary has grown, this side follows when they meet; then give the command again.",
            )

    def answered(self, effect: Resized) -> None:
        """The secondary's answer, or the news that there is none."""
        token = effect.token
        if isinstance(token, asyncio.Future) and not token.done():
            token.set_result(effect)
        elif effect.sizes is not None and not effect.sentence:
            self._follow_soon(effect.sizes)  # nobody waits for it any more; it holds all the same

    # On a handshake

    def outgrown(self, effect: Outgrown) -> None:
        """The secondary has larger volumes, and this side is to follow."""
        self._follow_soon(effect.sizes)

    def _follow_soon(self, sizes: tuple[int, ...]) -> None:
        task = self._loop.create_task(self._follow(sizes), name="growth")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, sizes: tuple[int, ...]) -> None:
        try:
            await self._grow(sizes)
        except TandemDiskError as error:
            log.error("cannot grow with the secondary: %s", error)
            differing = ", ".join(
                f"{volume.name} has {volume.size} bytes on the primary and {size} bytes on the secondary"
                for volume, size in zip(self._mirror.volumes, sizes, strict=True)
                if volume.size != size
            )
            sentence = f"{differing}, and this side cannot grow: {error.sentence.rstrip('.')}"
            self._link.settle(self._session.refuse(sentence, time.monotonic()))
            return
        self._link.redial()
        self.compare()

    # Growing

    async def _grow(self, sizes: Sequence[int]) -> None:
        """This side's part. TandemDiskError if it cannot be: then the next handshake begins with it again."""
        mirror = self._mirror
        async with self._growing:
            sizes = tuple(max(size, now) for size, now in zip(sizes, self.sizes, strict=True))
            if sizes == self.sizes:
                return
            if self._closing:
                raise OperationFailed("This side is about to stop.", hint="It grows when it meets the secondary again.")
            log.info("growing from %s to %s bytes", _listed(self.sizes), _listed(sizes))
            for volume, size in zip(mirror.volumes, sizes, strict=True):
                if volume.disk.capacity() < size:
                    raise OperationFailed(
                        f"Side {self._settings.side}'s disk of volume {volume.name} has {volume.disk.capacity()} "
                        f"bytes, and {size} are needed.",
                        hint="Grow it, or put the old disk back.",
                    )
            for volume, size in zip(mirror.volumes, sizes, strict=True):
                await self._loop.run_in_executor(None, volume.disk.use, size)
            names = (volume.name for volume in mirror.volumes)
            await self._record.update_async(volumes=tuple(zip(names, sizes, strict=True)))
            await self._knowledge.grow(sizes)
            self.on_grown()  # a promoted side's exports show the new size from here on
            mirror.grow(sizes)
            self._session.grown(sizes)

    def compare(self) -> None:
        """While the pair is protected: what the secondary may have otherwise where it has grown. Goes on after a cut;
        a resync does it, too."""
        if self._comparing is None or self._comparing.done():
            self._comparing = self._loop.create_task(self._compare(), name="comparison")

    async def _compare(self) -> None:
        done = not any(self._knowledge.suspects)
        while not done and self._engine.state == "protected" and not self._closing:
            try:
                await self._alignment.resync_command({})
                done = not any(self._knowledge.suspects)  # more may have been added while the last of it was confirmed
            except OperationFailed as error:  # a verification is under way, a disk failed, or the secondary was lost
                log.info("what was added is still to be compared, or sent: %s", error)
                await asyncio.sleep(COMPARE_AGAIN_S)

    async def stop(self) -> None:
        """Let what is being made durable become so, and begin nothing more: a clean stop has to know what is marked."""
        self._closing = True
        async with self._growing:
            pass
        if self._comparing is not None:
            self._comparing.cancel()


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
