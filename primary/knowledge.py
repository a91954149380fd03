"""What the primary knows of what its secondary may lack, in memory and on its disk.

    mirror.bitmaps   differs, for certain: written alone, or handed back by the session       the pair's blocks
    suspects         may differ: a resync compares it before it sends any of it               64 KiB a bit
    unfinished       all that the resyncs since the last complete one took on
    ledger           applied by the secondary, not yet in its metadata: lost if it loses its memory
    intent file      on disk: all of the above, coarsely, for a primary that is killed

``bases`` and ``base`` say from which point of a stream, and from which generation on, all this knows every write. They
are in the metadata, because a primary that comes back has to judge by them what its secondary may lack.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from common.bitmap import DirtyBitmap
from common.errors import TandemDiskError
from common.generation import RETURNING
from common.intent import INTENT_FILE, REGION, IntentFile
from common.record import Record, fingerprints
from common.settings import NodeSettings
from common.wire import Welcome, unpack_ranges
from primary.guard import IntentGuard
from primary.ledger import Ledger, mark
from primary.mirror import Mirror
from primary.questions import Range
from primary.session import PrimarySession
from primary.synchroniser import make_suspects

FORGET_INTERVAL_S: Final = 10.0
"""How often the write-intent bitmap is cleared of what the secondary has."""
MAX_BASES: Final = 16

log = logging.getLogger("primary")


class Knowledge:
    """See the module. Made before the session, which needs ``ledger``, ``base`` and ``bases``."""

    session: PrimarySession

    def __init__(self, settings: NodeSettings, record: Record, mirror: Mirror) -> None:
        self.mirror = mirror
        self.suspects = make_suspects(mirror)
        """What the secondary may lack, for all that is known: a resync compares it before it sends any of it."""
        self.ledger = Ledger([volume.size for volume in mirror.volumes], settings.buffer.block_size)
        self._settings = settings
        self._record = record
        self.lost_writes = record.value.lost_writes
        """A flush of the primary disk failed. What it lost the kernel tells once, and not where: until an operator has
        seen to it no bit is cleared, and no start believes the disk."""
        self._losses = 0
        """Times that this happened in this process."""
        self._unfinished = make_suspects(mirror)
        """All that the resyncs since the last complete one took on: what a secondary that forgets may lack again."""
        self._replacing = asyncio.Lock()
        """The intent file is being cleared, or replaced by a larger one."""
        self._bases = dict(record.value.bases)
        self.base = record.value.base
        self._open_intents()

    @property
    def bases(self) -> dict[int, int]:
        """For the session: stream -> the sequence from which on every write of that stream is known."""
        return self._bases | {RETURNING: 0}

    def _open_intents(self) -> None:
        """Open the write-intent bitmap; what a crash left in it is suspect."""
        settings, metadata = self._settings, self._record.value
        path = f"{settings.directory}/{INTENT_FILE}"
        known = False
        if settings.write_intent:
            sizes = [volume.size for volume in self.mirror.volumes]
            if not metadata.clean and (metadata.base or metadata.bases) and not Path(path).exists():
                # a process that died right behind this would leave a file that knows of no write before it
                self._record.update(base=0, bases=())
            file = IntentFile(path, sizes)
            known = file.found
            if not metadata.clean and not known and metadata.history:
                # nothing is known to be equal: not to the next process either, if this one dies before it has compared
                file.set_ranges([(index, 0, size) for index, size in enumerate(sizes)])
            self.mirror.guard = IntentGuard(file, sizes)
            if not metadata.clean:
                file.add_to(self.suspects)
        else:
            Path(path).unlink(missing_ok=True)
        if metadata.clean and metadata.history:
            self.base = metadata.history[-1].identity
        elif not known:
            self._bases, self.base = {}, 0

    async def remember_start(self) -> None:
        """Durably, before the first write: this process did not stop in good order, and what its bitmaps know."""
        bases = list((self._bases | {self.session.stream: self.session.last_sequence}).items())
        disks = fingerprints(self._settings, running=True)
        await self._record.update_async(clean=False, base=self.base, bases=tuple(bases[-MAX_BASES:]), disks=disks)

    def own_bytes(self) -> int:
        """Bytes that this side has and the secondary may lack, at most."""
        return sum(bitmap.dirty_bytes() for bitmap in (*self.mirror.bitmaps, *self.suspects))

    def tell(self) -> None:
        """Before a greeting, and before a greeting is answered: what a refusal says would be lost."""
        size = self.own_bytes()
        standing = self.session.standing
        blocks = -(-size // self._settings.buffer.block_size)
        self.session.standing = standing._replace(own_blocks=blocks, own_bytes=size)

    # A resync

    def mark_what_may_differ(self, peer: Welcome, *, full: bool) -> None:
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

    async def suspect_everything(self) -> None:
        """Nothing is known to be equal any more, also for a primary that is killed before it has compared. DiskError if
        that cannot be noted."""
        for suspects, unfinished in zip(self.suspects, self._unfinished, strict=True):
            suspects.set_all()
            unfinished.set_all()
        await self.remember_everything()

    def everything_remembered(self) -> bool:
        """Whether the write-intent bitmap marks all; without one a process that comes after a kill compares all."""
        guard = self.mirror.guard
        return guard is None or all(guard.covers(volume.index, 0, volume.size) for volume in self.mirror.volumes)

    async def remember_everything(self) -> None:
        """Make it so. DiskError if it cannot be."""
        await self.remember_differences([(volume.index, 0, volume.size) for volume in self.mirror.volumes])

    async def remember_differences(self, ranges: Sequence[Range]) -> None:
        """A verification has marked ``ranges``: make a primary that is killed, or stops, find them again. Without a
        write-intent bitmap it compares everything then. DiskError if that cannot be noted."""
        if self.mirror.guard is not None:
            await self.mirror.guard.mark(ranges)

    def resync_complete(self) -> None:
        """The secondary has taken a checkpoint behind a resync: what that took on is done, and what is marked reaches
        back no further. Whoever still stands in an earlier stream is an older copy of it."""
        for bitmap in self._unfinished:
            bitmap.clear_all()
        self._bases.clear()
        self.session.bases = self.bases

    async def grow(self, sizes: Sequence[int]) -> None:
        """The volumes have ``sizes`` bytes from now on. What is new may differ: marked durably, then in memory.
        DiskError if it cannot be."""
        if self.mirror.guard is not None:
            async with self._replacing:
                await self.mirror.guard.grow(sizes)
        self.ledger.grow(sizes)
        for suspects, unfinished, size in zip(self.suspects, self._unfinished, sizes, strict=True):
            before = suspects.size
            suspects.grow(size)
            unfinished.grow(size)
            suspects.set_range(before, size - before)

    # Forgetting

    def disk_lost_writes(self) -> None:
        """A flush failed; durable soon, if this side's directory is on a disk that works."""
        self.lost_writes = True
        self._losses += 1
        if not self._record.value.lost_writes:
            self._record.update_soon(lost_writes=True)

    async def trust_disk(self) -> None:
        """An operator has seen to it. DiskError if that cannot be noted. What is lost while it is noted nobody has seen
        to."""
        losses = self._losses
        if self.lost_writes or self._record.value.lost_writes:
            await self._record.update_async(lost_writes=False)
        if self._losses == losses:
            self.lost_writes = False
        else:
            self._record.update_soon(lost_writes=True)

    async def forget_now_and_then(self, protected: Callable[[], bool]) -> None:
        """While the pair is ``protected``, clear the write-intent bitmap of what the secondary has."""
        guard = self.mirror.guard
        assert guard is not None
        while True:
            await asyncio.sleep(FORGET_INTERVAL_S)
            if not protected() or self.lost_writes:
                continue
            try:
                async with self._replacing:
                    await self._forget(guard)
            except OSError as error:
                log.error("the write-intent bitmap is not cleared: %s", error)

    async def stop(self) -> None:
        """Let what is being cleared be cleared, and begin nothing more: disks and files are closed next."""
        await self._replacing.acquire()

    async def _forget(self, guard: IntentGuard) -> None:
        """Clear the write-intent bitmap where the secondary has everything, and will remember it."""
        # in regions from the start: the blocks of a large disk are neither copied nor walked
        wanted = [DirtyBitmap(volume.size, REGION) for volume in self.mirror.volumes]
        self.ledger.add_to(wanted)
        for extents in self.session.pending_extents():
            mark(wanted, extents)
        for bitmap, *known in zip(wanted, self.mirror.bitmaps, self.suspects, self._unfinished, strict=True):
            for marked in known:
                bitmap.union(marked)
        bases = ((self.session.stream, self.session.recorded),)
        base = self.session.standing.base

        async def promise() -> None:
            # a host that goes down may lose what its secondary has: until it is durable here, too, the bits say where
            await self.mirror.make_durable()
            await self._record.update_async(bases=bases, base=base)

        try:
            left = await guard.forget(wanted, promise)
        except TandemDiskError as error:
            log.error("the write-intent bitmap is not cleared: %s", error)
            return
        log.debug("write-intent bitmap regions=%d", left)
