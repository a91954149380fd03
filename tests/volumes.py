"""Volumes for tests of the export: a plain file, and ones that finish late or fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from common import batch
from common.batch import WriteBatch


class PlainVolume:
    """A file behind an export with nothing in between: pread, pwrite, fdatasync, fallocate, SEEK_DATA."""

    multi_conn = True
    preferred_block = 4096

    def __init__(self, path: str, name: str = "disk", *, read_only: bool = False) -> None:
        self.name = name
        self.read_only = read_only
        self.fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        self.size = os.fstat(self.fd).st_size
        self.clients = 0
        self.batches = 0

    def read_into(self, offset: int, view: memoryview) -> None:
        while view:
            count = os.preadv(self.fd, [view], offset)
            if not count:
                raise OSError(errno.EIO, "short")
            if count == len(view):
                return
            view, offset = view[count:], offset + count

    read_blocking = read_into

    def submit(self, work: WriteBatch) -> None:
        self.batches += 1
        work.finish(self.apply(work))

    def apply(self, work: WriteBatch) -> dict[int, int] | None:
        errors: dict[int, int] = {}
        view, fd = work.buffer.view, self.fd
        for index, (kind, offset, length, position, flags) in enumerate(work.operations):
            try:
                if kind == batch.WRITE:
                    written = os.pwrite(fd, view[position : position + length], offset)
                    assert written == length
                else:
                    self._clear(offset, length, flags)
            except OSError as error:
                errors[index] = error.errno or errno.EIO
        if work.fua:
            os.fdatasync(fd)
        return errors or None

    def _clear(self, offset: int, length: int, flags: int) -> None:
        step = 1 << 20
        if flags & batch.FAST_ZERO:
            raise OSError(errno.EOPNOTSUPP, "not fast")
        for start in range(offset, offset + length, step):
            os.pwrite(self.fd, bytes(min(step, offset + length - start)), start)

    def flush(self, done: Callable[[int], None]) -> None:
        os.fdatasync(self.fd)
        done(0)

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        extents = []
        position, end = offset, offset + length
        while position < end:
            try:
                data = min(os.lseek(self.fd, position, os.SEEK_DATA), end)
            except OSError:
                data = end
            if data > position:
                extents.append((data - position, 3))
                position = data
            else:
                hole = min(os.lseek(self.fd, position, os.SEEK_HOLE), end)
                extents.append((hole - position, 0))
                position = hole
        return extents

    def client_connected(self) -> None:
        self.clients += 1

    def client_gone(self) -> None:
        self.clients -= 1

    def close(self) -> None:
        os.close(self.fd)
