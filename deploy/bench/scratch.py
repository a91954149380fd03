"""Disks on a memory file system: prefilled with incompressible data, gone when the run ends.

The directory is held by a lock. A run that was killed with SIGKILL leaves its directory behind with the lock free; the
next run removes it. Prefilled, because a sparse disk answers reads without moving data and makes every first write an
allocation; incompressible, because a store may treat runs of equal bytes in a cheaper way.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from common.errors import NoSpaceError
from common.limits import MIB

PREFIX: Final = "tandemdisk-bench-"
_CHUNK: Final = 8 * MIB
_LOCK: Final = "lock"


@contextlib.contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """A new 0700 directory under ``parent``, removed at the end whatever happens."""
    guard = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Under the parent's own lock, or a run that starts at this moment could take us for left-overs.
        fcntl.flock(guard, fcntl.LOCK_EX)
        _sweep(parent)
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    finally:
        os.close(guard)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Remove what killed runs of this user left under ``parent``."""
    for directory in parent.glob(f"{PREFIX}*"):
        try:
            if directory.stat().st_uid != os.getuid():
                continue
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def fill(paths: Sequence[Path], size: int, *, seed: int = 1) -> None:
    """Make every path a file of ``size`` incompressible bytes, the same in all of them."""
    generator = np.random.Generator(np.random.PCG64(seed))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("wb", buffering=0)) for path in paths]
        for offset in range(0, size, _CHUNK):
            chunk = generator.bytes(min(_CHUNK, size - offset))
            for file in files:
                file.write(chunk)


def require_space(directory: Path, wanted: int) -> None:
    """NoSpaceError unless ``wanted`` bytes fit into ``directory``'s file system and into free memory."""
    free = shutil.disk_usage(directory).free
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free = min(free, int(line.split()[1]) * 1024)
    if wanted > free:
        raise NoSpaceError(
            f"The disks of this run need up to {wanted // MIB} MiB in {directory}, {free // MIB} MiB are free.",
            hint="Use a smaller --size, fewer --peer, or another --directory.",
        )


def used_bytes(directory: Path) -> int:
    """Bytes that the files under ``directory`` really occupy."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_blocks * 512
    return total
