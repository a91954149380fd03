"""Who holds a byte-range lock: the pid that an error about a wait names.

The kernel does not tell the pid of an OFD lock's holder (``F_OFD_GETLK`` answers -1), but it shows the locks of each
descriptor of the processes that we may look at, in /proc/PID/fdinfo (proc_pid_fdinfo(5)). Slow, and used only when a
wait has failed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

Ranges = Sequence[tuple[int, int]]
"""Disjoint [start, end) byte ranges in ascending order, rounded out to blocks."""


def find_holders(path: str, ranges: Ranges, *, shared: bool = False) -> list[tuple[int, str]]:
    """(pid, command) of the processes that hold an OFD lock overlapping ``ranges`` of the file, from /proc/PID/fdinfo.
    ``shared``: only those that are in the way of a shared one.

    The kernel does not tell the pid of an OFD lock's holder (l_pid is -1), but shows the locks of each descriptor
    of the processes that we may look at (proc_pid_fdinfo(5)). This process itself may be among them.
    """
    status = os.stat(path)
    found: dict[int, str] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            lines = _lock_lines(f"/proc/{entry}", status)
            if any(_overlaps(line, status.st_ino, ranges, shared=shared) for line in lines):
                with open(f"/proc/{entry}/comm") as file:
                    found[int(entry)] = file.read().strip()
    return sorted(found.items())


def _lock_lines(process: str, status: os.stat_result) -> Iterator[str]:
    for fd in os.listdir(f"{process}/fd"):
        with contextlib.suppress(OSError):
            target = os.stat(f"{process}/fd/{fd}")
            if (target.st_dev, target.st_ino) != (status.st_dev, status.st_ino):
                continue
            with open(f"{process}/fdinfo/{fd}") as file:
                yield from (line for line in file if line.startswith("lock:"))


def _overlaps(line: str, inode: int, ranges: Ranges, *, shared: bool) -> bool:
    """``lock:  1: OFDLCK ADVISORY WRITE -1 00:19:1234 0 4095``: the last two are first and last byte, or EOF."""
    fields = line.split()
    if len(fields) < 9 or fields[2] != "OFDLCK" or not fields[6].endswith(f":{inode}"):
        return False
    if shared and fields[4] == "READ":
        return False
    first = int(fields[7])
    last = 1 << 63 if fields[8] == "EOF" else int(fields[8])
    return any(first < end and last >= start for start, end in ranges)
