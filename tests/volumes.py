"""Volumes for tests of the export: any Disk with nothing in between, and one whose answers a test holds back."""

from __future__ import annotations

import errno
from collections.abc import Callable

from common import batch
from common.batch import WriteBatch
from common.disk import Disk


class PlainVolume:
    """A disk behind an export, every batch applied and answered at once."""

    multi_conn = True

    def __init__(self, disk: Disk, name: str = "disk", *, size: int | None = None) -> None:
        self.disk = disk
        self.name = name
        self.size = disk.size if size is None else size
        self.read_only = disk.read_only
        self.preferred_block = disk.preferred_block
        self.read_into = disk.read_nowait
        self.read_blocking = disk.read_into
        self.clients = 0
        self.batches: list[list[batch.Operation]] = []
        self.keep_batches = False

    def submit(self, work: WriteBatch) -> None:
        if self.keep_batches:
            self.batches.append(work.operations)
        work.finish(self.apply(work))

    def apply(self, work: WriteBatch) -> dict[int, int] | None:
        """The errno of each operation that failed; None if all went well."""
        errors: dict[int, int] = {}
        view, write = work.buffer.view, self.disk.write
        for index, (kind, offset, length, position, flags) in enumerate(work.operations):
            try:
                if kind == batch.WRITE:
                    write(offset, view[position : position + length])
                else:
                    self._clear(kind, offset, length, flags)
            except OSError as error:
                errors[index] = error.errno or errno.EIO
        if work.fua:
            self.disk.flush()
        return errors or None

    def _clear(self, kind: int, offset: int, length: int, flags: int) -> None:
        if kind == batch.DISCARD:
            self.disk.discard(offset, length)
        else:
            may_unmap, fast = not flags & batch.NO_HOLE, bool(flags & batch.FAST_ZERO)
            self.disk.zero(offset, length, may_unmap=may_unmap, fast=fast)

    def flush(self, done: Callable[[int], None]) -> None:
        try:
            self.disk.flush()
        except OSError as error:
            done(error.errno or errno.EIO)
        else:
            done(0)

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        return self.disk.extents(offset, length)

    def client_connected(self) -> None:
        self.clients += 1

    def client_gone(self) -> None:
        self.clients -= 1


class HeldVolume(PlainVolume):
    """Batches and flushes are applied at once and answered when the test says so: what synchronous replication does."""

    def __init__(self, disk: Disk, name: str = "disk") -> None:
        super().__init__(disk, name)
        self.held: list[Callable[[], None]] = []

    def submit(self, work: WriteBatch) -> None:
        errors = self.apply(work)
        self.held.append(lambda: work.finish(errors))

    def flush(self, done: Callable[[int], None]) -> None:
        self.held.append(lambda: done(0))

    def let_go(self, count: int | None = None) -> None:
        """Answer the first ``count`` of those held, or all. To be called on the event loop."""
        going, self.held = self.held[:count], self.held[count:] if count is not None else []
        for answer in going:
            answer()
