"""What the tests of the secondary's heart share: a pair without its processes, and the oracle.

The oracle is the most stupid thing that can be right: two byte strings a volume. ``disk`` is what the secondary disk
must hold, ``view`` what the guest must see; a checkpoint copies one to the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from common.disk import Disk, FileDisk
from common.settings import BufferSettings
from secondary.backup import PairBackup
from secondary.buffer import Blocks, BufferVolume, DiskBuffer
from secondary.replica import GuestVolume


def u64(*values: int) -> Blocks:
    """The arrays that ``do_cow`` takes."""
    return np.array(values, dtype=np.uint64)


def pattern(length: int, seed: int) -> bytes:
    """Bytes that differ from block to block and from seed to seed, never zero."""
    numbers = np.arange(length, dtype=np.uint64) // 8 * np.uint64(2654435761) + np.uint64(seed * 40503 + 1)
    return bytes((numbers >> np.uint64(5)).astype(np.uint8) | np.uint8(1))


class Oracle:
    """What a volume must look like."""

    def __init__(self, contents: bytes) -> None:
        self.disk = bytearray(contents)
        self.view = bytearray(contents)

    def stream(self, offset: int, data: bytes) -> None:
        self.disk[offset : offset + len(data)] = data

    def guest(self, offset: int, data: bytes) -> None:
        self.view[offset : offset + len(data)] = data

    def checkpoint(self) -> None:
        self.view = bytearray(self.disk)


class Rig:
    """A secondary's heart in one process.

    Disks in files, buffer, backup jobs, guest views, an oracle for each volume.
    """

    def __init__(
        self,
        directory: Path,
        sizes: Sequence[int] = (1 << 20,),
        *,
        block_size: int = 4096,
        buffer_bytes: int = 1 << 28,
        spill_bytes: int = 0,
        timeout_s: float = 5.0,
        start: bool = True,
    ) -> None:
        self.directory = directory
        self.paths = [str(directory / f"disk{index}.raw") for index in range(len(sizes))]
        self.oracles = [Oracle(pattern(size, index + 1)) for index, size in enumerate(sizes)]
        for path, oracle in zip(self.paths, self.oracles, strict=True):
            Path(path).write_bytes(oracle.disk)
        self.settings = BufferSettings(
            str(directory / "buffer"), buffer_bytes, block_size, spill_bytes=spill_bytes
        )
        self.volumes = [
            BufferVolume(f"disk{index}", size, path, str(directory / f"{index}.spill") if spill_bytes else "")
            for index, (size, path) in enumerate(zip(sizes, self.paths, strict=True))
        ]
        self.timeout_s = timeout_s
        self.buffer = DiskBuffer.create(self.settings, self.volumes, pair_id="rig", timeout_s=timeout_s)
        if start:
            self.buffer.start(syncing=False)
        self._open()
        self.number = 0

    def _open(self) -> None:
        self.disks: list[Disk] = [FileDisk(path) for path in self.paths]
        self.pair = PairBackup(self.buffer, self.disks)
        self.guests = [
            GuestVolume(volume, FileDisk(path, exclusive=False))
            for volume, path in zip(self.buffer.volumes, self.paths, strict=True)
        ]

    @property
    def guest(self) -> GuestVolume:
        return self.guests[0]

    @property
    def oracle(self) -> Oracle:
        return self.oracles[0]

    def reopen(self) -> None:
        """What a restart of the secondary does: detach, attach."""
        self.close()
        self.buffer = DiskBuffer.attach(self.settings.directory, pair_id="rig", timeout_s=self.timeout_s)
        self.buffer.header.own()
        self._open()

    def stream(self, offset: int, data: bytes, volume: int = 0) -> None:
        """A write of the primary arrives."""
        self.pair.jobs[volume].do_cow(u64(offset), u64(len(data)))
        self.disks[volume].write(offset, data)
        self.oracles[volume].stream(offset, data)

    def guest_write(self, offset: int, data: bytes, volume: int = 0) -> None:
        """A write of the secondary's guest."""
        self.guests[volume].write(offset, data)
        self.oracles[volume].guest(offset, data)

    def checkpoint(self) -> None:
        self.number += 1
        self.pair.do_checkpoint(self.number, self.number * 10)
        for oracle in self.oracles:
            oracle.checkpoint()

    def read(self, offset: int, length: int, volume: int = 0) -> bytes:
        """What the guest sees, by the way that does not wait."""
        contents = bytearray(length)
        self.guests[volume].read_into(offset, memoryview(contents))
        return bytes(contents)

    def check(self) -> None:
        """Everything is as the oracle says: the guest's view of every volume, and the secondary disks."""
        for index, oracle in enumerate(self.oracles):
            contents = bytearray(len(oracle.view))
            self.guests[index].read_blocking(0, memoryview(contents))
            assert contents == oracle.view
            assert Path(self.paths[index]).read_bytes() == oracle.disk

    def close(self) -> None:
        for disk in [*self.disks, *(guest.disk for guest in self.guests)]:
            disk.close()
        self.buffer.close()


@contextmanager
def rig(directory: Path, sizes: Sequence[int] = (1 << 20,), *, block_size: int = 4096) -> Iterator[Rig]:
    """A started ``Rig`` that is closed at the end."""
    os.makedirs(directory, exist_ok=True)
    made = Rig(directory, sizes, block_size=block_size)
    try:
        yield made
    finally:
        made.close()
