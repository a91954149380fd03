"""What a side that rejoins wrote alone, saved before it is overwritten (``keep_diverged``).

    diverged-VOLUME-GENERATION.raw           sparse, as large as the volume
    diverged-VOLUME-GENERATION.raw.ranges    "offset length" a line, in bytes: what of it was saved

Only the ranges say which zeroes were zeroes: outside them the file says nothing. They are the regions of the
write-intent file, so they hold more than was written. Whether there is room is looked at while the side still runs;
the copy needs it stopped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from common import limits
from common.disk import HOLE, FileDisk
from common.errors import DiskError
from common.intent import INTENT_FILE, marked_ranges
from common.settings import NodeSettings, VolumeSettings
from deploy.roles import remembered

KEEP_HINT: Final = "Make room, or set keep_diverged = false to give it up."


def _diverged(settings: NodeSettings) -> list[tuple[VolumeSettings, int, str, list[tuple[int, int]]]]:
    """(volume, its size, file to save into, (offset, length) of what this side may have written alone) of each."""
    metadata = remembered(settings)
    assert metadata is not None
    sizes = [size for _, size in metadata.volumes]
    ranges = marked_ranges(f"{settings.directory}/{INTENT_FILE}", sizes)
    number = metadata.history[-1].number if metadata.history else 0
    return [
        (volume, size, f"{settings.directory}/diverged-{volume.name}-{number}.raw",
         [(at, length) for i, at, length in ranges if i == index])
        for index, (volume, size) in enumerate(zip(settings.volumes, sizes, strict=True))
    ]  # fmt: skip


def _left(settings: NodeSettings) -> list[Path]:
    """What a save that was killed has left: it goes before the next one."""
    return list(Path(settings.directory).glob("diverged-*.new"))


def check_room(settings: NodeSettings) -> None:
    """DiskError if there is no room to save what this side may have written alone; it may run."""
    needed = 0
    for volume, _, _, ranges in _diverged(settings):
        disk = FileDisk(volume.disk, read_only=True, exclusive=False)
        try:
            needed += sum(
                length for at, total in ranges for length, flags in disk.extents(at, total) if not flags & HOLE
            )
        finally:
            disk.close()
    there = os.statvfs(settings.directory)
    free = there.f_bavail * there.f_frsize + sum(left.stat().st_blocks * 512 for left in _left(settings))
    if needed > free:
        raise DiskError(
            f"There is no room to save what side {settings.side} alone wrote: {needed} bytes at most, and "
            f"{settings.directory} has {free}.",
            hint=f"Nothing was changed. {KEEP_HINT}",
        )


def save_diverged(settings: NodeSettings) -> list[str]:
    """Copy what this side, which does not run, may have written alone into sparse files beside its metadata; their
    paths. DiskError if that fails; then nothing is left of it, nor of one that was killed."""
    paths: list[str] = []
    try:
        for left in _left(settings):
            left.unlink()
        for volume, size, path, ranges in _diverged(settings):
            paths.append(path)
            _copy_sparse(volume.disk, f"{path}.new", size, ranges)
            _write_durably(f"{path}.ranges", "".join(f"{at} {length}\n" for at, length in ranges).encode())
            os.replace(f"{path}.new", path)
    except BaseException as error:
        for path in paths:
            for name in (path, f"{path}.new", f"{path}.ranges"):
                Path(name).unlink(missing_ok=True)
        if not isinstance(error, OSError | DiskError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error.sentence
        raise DiskError(
            f"What side {settings.side} alone wrote cannot be saved: {str(reason).rstrip('.')}.",
            hint=f"It is stopped, and otherwise as it was: `tandemdisk up` starts what may run. {KEEP_HINT}",
        ) from error
    return paths


def _private(path: str, flags: int) -> int:
    """What was on a disk is nobody else's business."""
    return os.open(path, flags, 0o600)


def _write_durably(path: str, data: bytes) -> None:
    with open(path, "wb", opener=_private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy_sparse(source: str, target: str, size: int, ranges: list[tuple[int, int]]) -> None:
    disk = FileDisk(source, read_only=True)
    memory = memoryview(bytearray(limits.MIB))
    try:
        with open(target, "wb", opener=_private) as file:
            file.truncate(size)
            for start, total in ranges:
                at = start
                for length, flags in disk.extents(start, total):
                    for offset in range(at, at + length, len(memory)) if not flags & HOLE else ():
                        view = memory[: min(len(memory), at + length - offset)]
                        disk.read_into(offset, view)
                        file.seek(offset)
                        file.write(view)
                    at += length
            file.flush()
            os.fsync(file.fileno())
    finally:
        disk.close()
