"""How the volumes of a secondary grow: in the stream, or because it came back to a primary that has larger ones.

    1  room        the disks have the bytes; the maps of the disk buffer are allocated and mapped; lengths are synced
    2  metadata    durable: from here on this side has the new sizes, whatever happens
    3  header      each process of this side takes the new size over when it next looks

1 is harmless without 2. 3 is nothing but stores, which do not fail here; without it the next start does it. All of it
happens with no request in flight, so no guest sees half of it. The epoch goes on: the last checkpoint stays what it
is, and of what is new it shows what was on the disk when it was added (copy-before-write holds for that from the
first write on).

A resize in the stream is durable here before it is at the primary, which sends nothing beyond the old end until it is
there, too. So of two different sizes, found at a handshake, the larger one is right, and nothing that anybody was told
was written lies between them but on the larger side.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.disk import Disk
from common.errors import DiskError, OperationFailed, TandemDiskError
from common.intent import INTENT_FILE, IntentFile
from common.record import Record
from common.settings import NodeSettings
from secondary.backup import PairBackup
from secondary.buffer import DiskBuffer
from secondary.header import Stage
from secondary.space import plan_slots


class Growth:
    """Of the volumes of ``buffer``. Blocking calls, from the thread that does the secondary's work."""

    def __init__(
        self, settings: NodeSettings, record: Record, buffer: DiskBuffer, disks: Sequence[Disk], backup: PairBackup
    ) -> None:
        self._settings = settings
        self._record = record
        self._buffer = buffer
        self._disks = disks
        self._backup = backup

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the volumes now."""
        return tuple(volume.size for volume in self._buffer.volumes)

    def resize(self, wanted: Sequence[int], *, exact: bool) -> tuple[tuple[int, ...], str]:
        """To ``wanted``, or as far towards it as the disks go unless ``exact``. The sizes then, and why not more."""
        try:
            self._grow(self._possible(wanted, exact=exact))
        except TandemDiskError as error:
            return self.sizes, error.sentence
        except OSError as error:
            return self.sizes, f"side {self._settings.side} could not grow its volumes: {error.strerror or error}"
        return self.sizes, ""

    def _possible(self, wanted: Sequence[int], *, exact: bool) -> list[int]:
        sizes: list[int] = []
        for volume, disk, size in zip(self._buffer.volumes, self._disks, wanted, strict=True):
            there = disk.capacity()
            usable = there // volume.block_size * volume.block_size
            if size > volume.size and (there < size if exact else usable <= volume.size):
                raise DiskError(
                    f"Side {self._settings.side}'s disk of volume {volume.name} has {there} bytes, and {size} are "
                    "asked for."
                )
            sizes.append(max(volume.size, size if exact else min(size, usable)))
        return sizes

    def follow(self, sizes: Sequence[int]) -> str:
        """Grow to what the primary has; what is new may differ from what that holds there. Why not, if so."""
        try:
            self._possible(sizes, exact=True)
            self._mark_new(sizes)
            self._grow(sizes)
        except TandemDiskError as error:
            return error.sentence
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def _mark_new(self, sizes: Sequence[int]) -> None:
        """Durably, before the metadata says that there is more: the primary compares it in the next resync."""
        file = IntentFile(f"{self._settings.directory}/{INTENT_FILE}", sizes)
        try:
            file.set_ranges(
                (volume.index, volume.size, size - volume.size)
                for volume, size in zip(self._buffer.volumes, sizes, strict=True)
                if size > volume.size
            )
        finally:
            file.close()

    def _grow(self, sizes: Sequence[int]) -> None:
        if tuple(sizes) == self.sizes:
            return
        settings = self._settings.buffer
        plan_slots(settings.size_bytes, settings.block_size, sizes)  # what the next start with an empty buffer needs
        volumes = [volume for volume, size in zip(self._buffer.volumes, sizes, strict=True) if size > volume.size]
        for volume in volumes:
            volume.allocate(sizes[volume.index])
        with self._backup.stopped(wait=True):
            if self._buffer.header.stage is not Stage.RUNNING:
                raise OperationFailed(f"Volumes cannot grow in stage {self._buffer.header.stage.name}.")
            before = self.sizes
            try:
                for volume in volumes:
                    self._disks[volume.index].use(sizes[volume.index])
                    volume.complete(sizes[volume.index], self._disks[volume.index].read_into)
                    volume.prepare(sizes[volume.index])
                names = (name for name, _ in self._record.value.volumes)
                self._record.update(volumes=tuple(zip(names, sizes, strict=True)))
            except BaseException:
                for disk, size in zip(self._disks, before, strict=True):
                    disk.use(size)
                raise
            for volume in volumes:
                volume.announce(sizes[volume.index])
