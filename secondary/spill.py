"""The spill file: room for old contents when a resync is larger than the pool, so that the checkpoint outlives it.

Between two checkpoints of a running pair the pool is enough, because the primary takes a checkpoint before it runs out.
During a resync none can be taken: what the secondary disk holds in the middle of it is no state of the primary's. So
when the pool is full old contents go to a sparse file beside the secondary disk. It continues the pool: its slots have
the numbers that follow, and every process maps both, one behind the other, at consecutive addresses. Whoever reads the
hidden disk (export process, ``attach``, commit) therefore knows nothing of it.

    slot numbers        0 … slots-1            slots … slots+spill_slots-1
    contents            pool, shared memory    spill file
    owner words         shared memory          shared memory, allocated as far as the file is

A slot is used only when its space is allocated on disk and in memory (``reserve``), a chunk ahead of the backup job:
the primary's credit counts reserved slots and nothing else. A file system that is full thus ends the credit, and the
primary gives the checkpoint up, as it does without a spill file; no process ever stores into a hole that cannot be
filled. A checkpoint empties the layer; then the space goes back (``release``). The file needs no durability: a host
that goes down loses the map in shared memory, and with it the checkpoint.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Final

from common import limits
from common.disk import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from common.errors import DiskError, NoSpaceError

CHUNK: Final = 64 * limits.MIB
"""Reserved at once."""
SPARE_PERCENT: Final = 5
"""Of the file system that is left to others: the secondary disk may be a sparse file that grows there."""
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_libc.mmap.restype = ctypes.c_void_p


def join(*parts: tuple[int, int, int]) -> mmap.mmap:
    """Parts of files (descriptor, offset, length: whole pages, but for the last length) mapped one behind the other,
    shared.

    The address range belongs to an anonymous mapping, which the files then take the place of: so it is unmapped when
    the object goes, and not while a view of it lives.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    joined = mmap.mmap(-1, sum(length for _, _, length in parts), flags=flags)
    address = ctypes.addressof(ctypes.c_char.from_buffer(joined))
    for fd, offset, length in parts:
        shared = mmap.MAP_SHARED | _MAP_FIXED
        if _libc.mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, shared, fd, offset) != address:
            raise OSError(ctypes.get_errno(), "mmap of the disk buffer failed")
        address += length
    return joined


def make(path: str, link: str, size: int) -> None:
    """A sparse file of ``size`` bytes at ``path``, and a symbolic link to it in the buffer's directory. DiskError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)
        os.symlink(os.path.abspath(path), link)
    except OSError as error:
        raise DiskError(
            f"The spill file {path} cannot be made: {error.strerror}.",
            hint="Set buffer.spill_directory, or buffer.spill_bytes = 0 to do without.",
        ) from error


def remove(link: Path) -> None:
    """The file that ``make`` made, and the link."""
    Path(os.path.realpath(link)).unlink(missing_ok=True)
    link.unlink(missing_ok=True)


class Spill:
    """The space of one layer's spill file, for the backup job alone: ``reserved`` slots of it may be used."""

    def __init__(self, path: str, slots: int, block_size: int, owners: str, owners_at: int) -> None:
        """``owners``: the file in shared memory that holds the owner words of these slots from ``owners_at`` on."""
        self.path = os.path.realpath(path)
        self.slots = slots
        self.reserved = 0
        self.trouble = ""
        """Why no more could be reserved; empty while more can."""
        self._block_size = block_size
        self._owners_at = owners_at
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._owners = os.open(owners, os.O_RDWR | os.O_CLOEXEC)

    def reserve(self, slots: int) -> None:
        """Have at least ``slots`` slots, and some more, as far as there are any; else ``trouble`` says why. Blocks."""
        slots = min(self.slots, slots)
        while self.reserved < slots and not self.trouble:
            chunk = min(self.slots, self.reserved + max(1, CHUNK // self._block_size))
            try:
                self._check_space((chunk - self.reserved) * self._block_size)
                start, end = self.reserved * self._block_size, chunk * self._block_size
                os.posix_fallocate(self._file, start, end - start)
                os.posix_fallocate(self._owners, self._owners_at + self.reserved * 8, (chunk - self.reserved) * 8)
            except OSError as error:
                self.trouble = f"the spill file {self.path} cannot grow: {error.strerror}"
            except NoSpaceError as error:
                self.trouble = error.sentence
            else:
                self.reserved = chunk

    def release(self) -> None:
        """Give the space back; nothing of it is used any more. Blocks."""
        self.trouble = ""
        if not self.reserved and not os.fstat(self._file).st_blocks:
            return
        self.reserved = 0
        punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        try:
            fallocate(self._file, punch, 0, self.slots * self._block_size)
            page = -(-self._owners_at // mmap.PAGESIZE) * mmap.PAGESIZE
            end = self._owners_at + self.slots * 8
            if page < end:
                fallocate(self._owners, punch, page, end - page)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            size = os.fstat(self._file).st_size
            os.ftruncate(self._file, 0)  # no reader is left that could meet the end of the file
            os.ftruncate(self._file, size)

    def _check_space(self, length: int) -> None:
        status = os.fstatvfs(self._file)
        free = status.f_bavail * status.f_frsize
        spare = status.f_blocks * status.f_frsize * SPARE_PERCENT // 100
        if free - length < spare:
            raise NoSpaceError(
                f"The spill file {self.path} needs {length} bytes more, and its file system has {free} bytes free, of "
                f"which {spare} are left to others."
            )

    def close(self) -> None:
        os.close(self._file)
        os.close(self._owners)
