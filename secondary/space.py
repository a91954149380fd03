"""Room for the disk buffer: how much a directory can still hold, and the sentence when it cannot."""

from __future__ import annotations

import contextlib
import os

from common.errors import NoSpaceError


def free_bytes(directory: str) -> int:
    """What can still be allocated there."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    # A tmpfs may promise more than there is memory, and the kernel answers that with the out-of-memory killer.
    with contextlib.suppress(OSError, ValueError, StopIteration):
        if _is_tmpfs(directory):
            with open("/proc/meminfo") as file:
                line = next(line for line in file if line.startswith("MemAvailable:"))
            free = min(free, int(line.split()[1]) * 1024)
    return free


def _is_tmpfs(directory: str) -> bool:
    """True if the mount that holds ``directory`` is a tmpfs, by /proc/self/mountinfo (proc_pid_mountinfo(5))."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as file:
        return any(line.split()[2] == wanted and " - tmpfs " in line for line in file)


def no_space(directory: str, needed: int, free: int) -> NoSpaceError:
    """The error of a disk buffer that does not fit."""
    return NoSpaceError(
        f"The disk buffer needs {needed} bytes in {directory}, which has {max(free, 0)} bytes free.",
        hint="Free memory there, ask for a smaller buffer or larger blocks, or name another directory.",
    )
