"""A side of a pair as a real process, with disks that fail or linger as a file beside each of them says.

    python -m tests.faulty_process primary|secondary --settings-fd N …

``Faults`` writes that file, ``DISK.faults``; it is looked at before every operation, so a fault begins and heals at
once.
"""

from __future__ import annotations

import errno
import json
import os
import runpy
import sys
import time
from pathlib import Path

import common.disk
from common.disk import Bytes, FileDisk


class Faults:
    """The faults of one disk, as a test sets them."""

    def __init__(self, disk: Path) -> None:
        self._path = Path(f"{disk}.faults")

    def fail(self, **errnos: int) -> None:
        """``write=ENOSPC, flush=EIO``: these operations fail from now on."""
        self._write({"errno": errnos})

    def delay(self, **seconds: float) -> None:
        """``write=0.01``: these operations take that much longer from now on."""
        self._write({"delay": seconds})

    def heal(self) -> None:
        """Nothing fails any more."""
        self._path.unlink(missing_ok=True)

    def _write(self, told: dict[str, dict[str, int]] | dict[str, dict[str, float]]) -> None:
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(told))
        temporary.replace(self._path)


class FaultyFileDisk(FileDisk):
    """A FileDisk that obeys ``Faults``."""

    def _obey(self, kind: str) -> None:
        try:
            with open(f"{self.path}.faults", encoding="ascii") as file:
                told = json.load(file)
        except FileNotFoundError:
            return
        time.sleep(told.get("delay", {}).get(kind, 0.0))
        code = told.get("errno", {}).get(kind)
        if code is not None:
            raise OSError(code, os.strerror(code))

    def read_into(self, offset: int, view: memoryview) -> None:
        self._obey("read")
        super().read_into(offset, view)

    def read_nowait(self, offset: int, view: memoryview) -> None:
        if os.path.exists(f"{self.path}.faults"):
            raise BlockingIOError(errno.EAGAIN, "a disk with faults is never in memory")
        super().read_nowait(offset, view)

    def write(self, offset: int, data: Bytes) -> None:
        self._obey("write")
        super().write(offset, data)

    def flush(self) -> None:
        self._obey("flush")
        super().flush()

    def zero(self, offset: int, length: int, *, may_unmap: bool = True, fast: bool = False) -> None:
        self._obey("zero")
        super().zero(offset, length, may_unmap=may_unmap, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        self._obey("discard")
        super().discard(offset, length)


if __name__ == "__main__":
    common.disk.FileDisk = FaultyFileDisk  # type: ignore[misc]  # before the side imports it
    role = sys.argv.pop(1)
    runpy.run_module(role, run_name="__main__", alter_sys=True)
