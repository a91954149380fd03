"""The spill file: room for old contents when a resync is larger than the pool, so that the checkpoint outlives it.

Between two checkpoints of a running pair the pool is enough, because the primary takes a checkpoint before it runs out.
During a resync none can be taken: what the secondary disk holds in the middle of it is no state of the primary's. So
when the pool is full old contents go to a sparse file beside the secondary disk. It continues the pool: its slots have
the numbers that follow. Whoever reads the hidden disk (export process, ``attach``, commit) asks its layer, which knows
where a slot is.

    slot numbers        0 … slots-1            slots … slots+spill_slots-1
    contents            pool, shared memory    spill file
    owner words         shared memory          shared memory, allocated as far as the file is

A slot is used only when its space is allocated on disk and in memory (``reserve``), a chunk ahead of the backup job:
the primary's credit counts reserved slots and nothing else. A file system that is full thus ends the credit, and the
primary gives the checkpoint up, as it does without a spill file. The file is read and written by system calls, never
through a mapping: what a device cannot read would end the process that touched it (SIGBUS), and is an error for one
reader here. A write that fails ends the credit, too. A checkpoint empties the layer; then the space goes back
(``release``). The file needs no durability: a host that goes down loses the map in shared memory, and with it the
checkpoint.
"""

from __future__ import annotations

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


def open_file(path: str, size: int) -> int:
    """A descriptor of the file behind the link ``path``. DiskError if it is not there, or not of ``size`` bytes."""
    hint = "Remove the buffer and resync."
    where = os.path.realpath(path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DiskError(f"The spill file {where} cannot be opened: {error.strerror}.", hint=hint) from error
    if os.fstat(fd).st_size != size:
        os.close(fd)
        raise DiskError(f"The spill file {where} has another size than the header says.", hint=hint)
    return fd


def read_into(fd: int, path: str, offset: int, view: memoryview) -> None:
    """Fill ``view``. OSError whose words name the file; EIO too where the file ends before."""
    done = 0
    while done < len(view):
        try:
            got = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise _failed(path, "read", error.errno, error.strerror) from error
        if not got:
            raise _failed(path, "read", errno.EIO, "it has become shorter")
        done += got


def write(fd: int, path: str, offset: int, data: memoryview) -> None:
    """Write all of ``data``. OSError whose words name the file."""
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            raise _failed(path, "written", error.errno, error.strerror) from error


def _failed(path: str, done: str, code: int | None, reason: str | None) -> OSError:
    return OSError(code or errno.EIO, f"the spill file {os.path.realpath(path)} cannot be {done}: {reason}")


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

    def give_up(self, slots: int, reason: str) -> None:
        """The file takes nothing more behind its first ``slots`` slots."""
        self.reserved = max(0, slots)
        self.trouble = reason

    def release(self) -> None:
        """Give the space back; nothing of it is used any more. Blocks. Where that cannot be only room is lost: the
        file is not used until it can."""
        self.trouble = ""
        try:
            if self.reserved or os.fstat(self._file).st_blocks:
                self.reserved = 0
                self._empty()
        except OSError as error:
            self.trouble = f"the spill file {self.path} cannot be emptied: {error.strerror}"

    def _empty(self) -> None:
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
