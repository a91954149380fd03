"""A side's metadata in a running process: read by everybody, changed durably by whoever has a reason.

``update`` returns when the change is on disk, and blocks for it: call it in a thread. ``update_soon`` is for what may
be a little old after a crash (the number of the last checkpoint, say): it never blocks, and many calls become one
write.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import stat
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from xxhash import xxh3_64, xxh3_64_intdigest

from common.disk import Disk
from common.errors import DiskError, NeedsForce
from common.generation import Generation, History
from common.metadata import Metadata, save
from common.settings import NodeSettings, Role

SAMPLES: Final = 256
SAMPLE_BYTES: Final = 4096
"""Of a device, at a stop in good order: a megabyte."""


class Record:
    """The metadata in ``path``; ``value`` is always what was saved last or is being saved."""

    def __init__(self, path: str, value: Metadata) -> None:
        self.path = path
        self.value = value
        self._lock = threading.Lock()
        self._soon: dict[str, Any] = {}
        self._writing = False
        self._closed = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="metadata")

    def update(self, **changes: Any) -> None:
        """Change fields durably; blocks. DiskError if the file cannot be written: then nothing has changed."""
        with self._lock:
            value = dataclasses.replace(self.value, **changes)
            save(self.path, value)
            self.value = value

    async def update_async(self, **changes: Any) -> None:
        """``update`` for an event loop. What ``update_soon`` has yet to write of the same fields is older: it is not
        written behind this."""
        older = {name: self._soon.pop(name) for name in changes if name in self._soon}
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, lambda: self.update(**changes))
        except DiskError:
            if older:
                self.update_soon(**(older | self._soon))
            raise

    def update_soon(self, **changes: Any) -> None:
        """Change fields some time soon; on the loop, never blocks. A failure surfaces at the next ``update``."""
        self._soon |= changes
        if not self._writing and not self._closed:
            self._writing = True
            self._write_soon()

    def _write_soon(self) -> None:
        changes, self._soon = self._soon, {}
        future = asyncio.get_running_loop().run_in_executor(self._executor, lambda: self.update(**changes))
        future.add_done_callback(self._written)

    def _written(self, done: asyncio.Future[None]) -> None:
        done.exception()  # looked at: the next durable update meets the same disk
        if self._soon and not self._closed:
            self._write_soon()
        else:
            self._writing = False

    def close(self) -> None:
        """Wait for what is being written; what would be written soon is not any more."""
        self._closed = True
        self._executor.shutdown(wait=True)


def random_number(bits: int) -> int:
    """A number that is not zero, for streams, processes and generations."""
    return secrets.randbits(bits) or 1


def first_generation(pair_id: str) -> History:
    """The generation of a pair whose disks are assumed equal: both sides come to the same one by themselves."""
    return (Generation(xxh3_64_intdigest(pair_id.encode()) or 1, 1, "a"),)


def initial_metadata(settings: NodeSettings, role: Role, sizes: list[int]) -> Metadata:
    """The memory of a side that has none: its disk is new to the pair, or assumed equal to the peer's."""
    assumed = settings.initial_sync == "assume"
    return Metadata(
        settings.pair_id,
        settings.side,
        role,
        tuple((volume.name, size) for volume, size in zip(settings.volumes, sizes, strict=True)),
        history=first_generation(settings.pair_id) if assumed else (),
        consistent=assumed or role == "primary",
        clean=True,
        bases=((0, 0),) if assumed and role == "primary" else (),
    )


def check_metadata(settings: NodeSettings, metadata: Metadata, disks: Sequence[Disk]) -> None:
    """DiskError unless the metadata is that of this side and of these disks. What a disk has more than the metadata
    says (somebody has grown it) is not used until the pair is resized."""
    if (metadata.pair_id, metadata.side) != (settings.pair_id, settings.side):
        raise DiskError(
            f"The metadata in {settings.directory} is of side {metadata.side} of pair {metadata.pair_id}, not of side "
            f"{settings.side} of pair {settings.pair_id}.",
            hint="Correct `directory`, or remove the metadata file to start this side anew.",
        )
    volumes = tuple((volume.name, disk.capacity()) for volume, disk in zip(settings.volumes, disks, strict=True))
    named = [name for name, _ in metadata.volumes] == [name for name, _ in volumes]
    if not named or any(there < size for (_, size), (_, there) in zip(metadata.volumes, volumes, strict=True)):
        raise DiskError(
            f"The metadata in {settings.directory} knows the volumes {_names(metadata.volumes)}; the disks are "
            f"{_names(volumes)}.",
            hint="Put the old disks back, or remove the metadata file to start this side anew.",
        )
    for disk, (_, size) in zip(disks, metadata.volumes, strict=True):
        disk.use(size)


def fingerprints(settings: NodeSettings, *, running: bool) -> tuple[tuple[int, int], ...]:
    """What tells the disks of a side from others, and, unless they are being written, from themselves at another time:
    (inode, time of the last change) of a file, (number, hash of samples) of a device. A device that was restored to an
    older state that differs in no sample, and anything that changes a disk behind the back of a process that was
    killed, is not noticed."""
    found: list[tuple[int, int]] = []
    for volume in settings.volumes:
        status = os.stat(volume.disk)
        if stat.S_ISBLK(status.st_mode):
            found.append((status.st_rdev, 0 if running else _sample(volume.disk)))
        else:
            found.append((status.st_ino, 0 if running else status.st_mtime_ns))
    return tuple(found)


def _size_of(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def _sample(path: str) -> int:
    """A hash of the beginning, the end and evenly spread blocks of a device; never 0."""
    hashed = xxh3_64()
    size = _size_of(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        last = max(0, size - SAMPLE_BYTES)
        for number in range(SAMPLES + 1):
            hashed.update(os.pread(fd, SAMPLE_BYTES, last * number // SAMPLES // SAMPLE_BYTES * SAMPLE_BYTES))
    finally:
        os.close(fd)
    return hashed.intdigest() or 1


def disks_changed(settings: NodeSettings, metadata: Metadata) -> str:
    """Why the disks cannot be what this side left; empty if they can. Somebody may have replaced them, or written to
    them."""
    for volume, reason, _ in _changes(settings, metadata):
        return f"{volume} {reason}"
    return ""


def check_leading_disks(settings: NodeSettings, metadata: Metadata) -> None:
    """NeedsForce if a primary has a disk that it did not leave so: an empty one, or an older copy, or one that lost
    writes in a flush that failed, would overwrite what its secondary has. (Devices are numbered anew when a host
    starts: that alone says nothing.)"""
    if metadata.lost_writes:
        raise NeedsForce(
            f"Side {settings.side} led, and a flush of its disk failed: writes may be lost there that the other side "
            "has.",
            hint="Let the other side take over and follow it (`tandemdisk failover`, `tandemdisk rejoin`): it compares "
            "the whole disk then. Or, if this disk is right, say so with `tandemdisk accept-disk`.",
        )
    for volume, reason, certain in _changes(settings, metadata):
        if certain:
            raise NeedsForce(
                f"Side {settings.side} led, and {volume} {reason}: its secondary would be overwritten with it.",
                hint="Let the other side take over and follow it (`tandemdisk failover`, `tandemdisk rejoin`); or, if "
                "this disk is the right one, say so with `tandemdisk accept-disk`.",
            )


def refuse_mixture(settings: NodeSettings, metadata: Metadata) -> None:
    """For a start without the disk buffer of the side's promotion. NeedsForce if the commit was not complete."""
    if metadata.committing:
        raise NeedsForce(
            f"Side {settings.side} had not completed its failover to checkpoint {metadata.checkpoint} when its host "
            "went down: the rest of that was in memory, and its disks are a mixture of two times.",
            hint=f"Let the other side lead again (`tandemdisk rejoin --discard {settings.side}`); or, if there is "
            "nothing better, lead with the mixture (`tandemdisk accept-disk`).",
        )


def _changes(settings: NodeSettings, metadata: Metadata) -> Iterator[tuple[str, str, bool]]:
    """(disk, what is the matter with it, whether that is certain)"""
    now = fingerprints(settings, running=False) if metadata.disks else ()
    sizes = dict(metadata.volumes)
    for volume, (number, state), (was, when) in zip(settings.volumes, now, metadata.disks, strict=False):
        device = stat.S_ISBLK(os.stat(volume.disk).st_mode)
        if when and state != when:
            written = "does not hold what this side left there" if device else "was written to since this side stopped"
            grown = number == was and _size_of(volume.disk) > sizes.get(volume.name, 0)  # that touches a file, too
            yield volume.disk, written if number == was or device else "is another file than before", not grown
        elif number != was:
            yield volume.disk, f"is another {'device' if device else 'file'} than before", not device


def _names(volumes: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{name} ({size} bytes)" for name, size in volumes)
