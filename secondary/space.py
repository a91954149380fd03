"""Room for the disk buffer: how much a directory can still hold, the sentence when it cannot, and how the volumes share
what is asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Final

from common import limits
from common.errors import ConfigError, NoSpaceError
from common.settings import BufferSettings
from secondary.header import EPOCH_MASK

_SPLIT: Final = 2
"""Hidden and active disk get half of a volume's share each."""


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


def plan_slots(size_bytes: int, block_size: int, volume_sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(hidden slots, active slots) of each volume out of ``size_bytes`` of pool.

    Each pool gets the least that it needs (``limits.MIN_POOL``, or the whole volume if that is less), the rest goes to
    the volumes in proportion to their sizes, never more than a slot a block. Raises ConfigError that says the least
    size.
    """
    if block_size & (block_size - 1) or not limits.MIN_BLOCK <= block_size <= limits.MAX_BLOCK:
        raise ConfigError(f"A block of {block_size} bytes is not possible: a power of two, 512 to 1048576.")
    if not volume_sizes or min(volume_sizes) <= 0:
        raise ConfigError("A pair needs at least one volume, and none may be empty.")
    if max(volume_sizes) > limits.MAX_VOLUME:
        raise ConfigError(f"A volume of {max(volume_sizes)} bytes is not possible: at most {limits.MAX_VOLUME}.")
    blocks = [-(-size // block_size) for size in volume_sizes]
    least = [min(-(-limits.MIN_POOL // block_size), count) for count in blocks]
    needed = _SPLIT * sum(least) * block_size
    if size_bytes < needed:
        raise ConfigError(
            f"A disk buffer of {size_bytes} bytes is too small for {len(blocks)} volume(s): at least {needed} bytes.",
            hint="Raise the buffer size.",
        )
    spare = size_bytes // block_size // _SPLIT - sum(least)
    slots = list(least)
    while spare > 0 and (open_ := [index for index, count in enumerate(blocks) if slots[index] < count]):
        total = sum(blocks[index] for index in open_)
        before = spare
        for index in open_:
            grant = min(before * blocks[index] // total, blocks[index] - slots[index], spare)
            slots[index] += grant
            spare -= grant
        if spare == before:
            break  # less than a slot for each
    return [(min(count, EPOCH_MASK), min(count, EPOCH_MASK)) for count in slots]


def plan_spill(settings: BufferSettings, volume_sizes: Sequence[int], slots: list[tuple[int, int]]) -> list[int]:
    """Slots of each volume's spill file: its share of ``spill_bytes``, and no more than blocks that have no slot."""
    total = sum(volume_sizes)
    shares = [settings.spill_bytes * size // total // settings.block_size for size in volume_sizes]
    return [
        max(0, min(share, -(-size // settings.block_size) - hidden, EPOCH_MASK - hidden))
        for share, size, (hidden, _) in zip(shares, volume_sizes, slots, strict=True)
    ]
