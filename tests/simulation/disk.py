"""Simulated storage: disks whose writes are lost or torn when the power goes, and metadata files that are replaced
atomically.

A disk has two images. ``contents`` is what a read returns (the page cache); ``stable`` is what survives a loss of
power. Writes since the last flush are kept in a journal; when the power goes each sector of it is kept or lost by
itself, in any order.

Faults are said by ``Faults``, which the simulation changes as it goes: the chance that an operation fails, that it is
done in part before it fails, that a read is not in the cache, and that the process dies in the middle of it.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.errors import DiskError
from common.metadata import Metadata, parse, serialise
from tests.simulation.clock import PROCESS, Killed, Process

SECTOR = 512
HOLE_AND_ZERO = 3


@dataclass
class Faults:
    """What may go wrong with the storage of one host now; chances per call."""

    read: float = 0.0
    write: float = 0.0
    flush: float = 0.0
    save: float = 0.0
    intents: float = 0.0
    """A write of the write-intent file."""
    cold: float = 0.0
    """A read that must not wait would have to."""
    kill: float = 0.0
    """The process dies in the middle of a call."""
    code: int = errno.EIO

    troubled: bool = False
    """The disks failed, or will, in this life: a write may be refused whenever it comes to it."""

    struck: Counter[str] = field(default_factory=Counter)
    """What went wrong, how often."""

    killer: Callable[[Process], None] = lambda _process: None

    def die(self) -> None:
        """The process dies here; at once, because a task would keep what is raised in it to itself."""
        process = PROCESS.get()
        self.struck["deaths inside a call"] += 1
        if process is not None:
            self.killer(process)
        raise Killed

    def any(self) -> bool:
        return bool(self.read or self.write or self.flush or self.save or self.intents or self.kill)


class Countdown:
    """For n-th-fault loops: counts calls while it is ``armed``, and lets one of them fail; if it is ``sticky``, all
    later ones of the same device, too."""

    def __init__(self) -> None:
        self.armed = False
        self.sticky = False
        self.fail_at = 0
        """Number of the call that fails, from 1; 0: none does."""
        self.only = ""
        """"device call": no other is counted, and each fails unless ``fail_at`` says which."""
        self.calls = 0
        self.hit = ""
        """What failed first: "device call"."""
        self._device = ""

    def strikes(self, device: str, call: str) -> bool:
        """Count a call; True if it has to fail."""
        if not self.armed:
            return False
        if self.only and self.only != f"{device} {call}":
            return False
        self.calls += 1
        if self.only and not self.fail_at:
            return True
        if self.calls == self.fail_at:
            self._device, self.hit = device, f"{device} {call}"
            return True
        return self.sticky and device == self._device


class Platter:
    """The medium: what is in the machine, and outlives its processes."""

    def __init__(self, name: str, room: int, chance: random.Random, faults: Faults, size: int | None = None) -> None:
        self.name = name
        self.size = room if size is None else size
        """What it has now; an operator may let it grow up to ``room``."""
        self.room = room
        self.contents = bytearray(room)
        self.stable = bytearray(room)
        self.versions = np.frombuffer(self.contents, np.uint64)[:: SECTOR // 8]
        """The first word of each sector: which write it comes from."""
        self.stable_versions = np.frombuffer(self.stable, np.uint64)[:: SECTOR // 8]
        self.journal: list[tuple[int, bytes]] = []
        self.chance = chance
        self.faults = faults
        self.countdown = Countdown()
        self.device = name
        """What ``countdown`` calls it."""
        self.changed: Callable[[], None] = lambda: None
        self.forgot: Callable[[], None] = lambda: None
        self.lost: Callable[[list[int], list[int]], None] = lambda _sectors, _versions: None
        """Called when the contents of sectors, of these versions, are lost."""
        self.between: Callable[[Platter, str], None] = lambda _platter, _kind: None
        """Called in the middle of an operation: something else may happen now."""
        self.read_only_view = memoryview(self.contents)
        self.fills: set[int] = set()

    def grow(self, size: int, found: bytes) -> None:
        """The operator made it larger; what is new holds ``found``."""
        assert self.size + len(found) == size <= self.room
        self.contents[self.size : size] = self.stable[self.size : size] = found
        self.size = size

    def put(self, offset: int, data: Any) -> None:
        """A write reached the page cache."""
        data = bytes(data)
        self.contents[offset : offset + len(data)] = data
        self.journal.append((offset, data))
        self.changed()

    def sync(self) -> None:
        """The journal is on stable storage."""
        for offset, data in self.journal:
            self.stable[offset : offset + len(data)] = data
        self.journal.clear()

    def lose_power(self) -> None:
        """Each sector written since the last flush is there or not."""
        chance = self.chance
        self.faults.struck["writes lost with the power"] += len(self.journal)
        keep = chance.choice((0.0, 0.5, 0.5, 1.0))
        for offset, data in self.journal:
            for start in range(0, len(data), SECTOR):
                if chance.random() < keep:
                    self.stable[offset + start : offset + start + SECTOR] = data[start : start + SECTOR]
        self.journal.clear()
        self._back_to_stable()
        self.changed()

    def forget_cache(self) -> None:
        """After a failed flush the kernel calls pages clean that it could not write: some of them are lost for good."""
        self.faults.struck["writes lost by a flush"] += len(self.journal)
        for offset, data in self.journal:
            for start in range(0, len(data), SECTOR):
                where = slice(offset + start, offset + start + SECTOR)
                if self.chance.random() < 0.5:
                    self.stable[where] = data[start : start + SECTOR]
        self.journal.clear()
        self._back_to_stable()
        self.forgot()

    def restore(self, image: bytes) -> None:
        """Somebody puts an older copy in its place, while nobody runs."""
        self.stable[:] = image
        self.journal.clear()
        self._back_to_stable()
        self.changed()

    def _back_to_stable(self) -> None:
        before = self.versions.copy()
        self.contents[:] = self.stable
        sectors = np.flatnonzero(before != self.versions)
        self.lost(sectors.tolist(), before[sectors].tolist())

    def trouble(self, kind: str, likelihood: float) -> None:
        """Die or fail here, if that is to be."""
        faults = self.faults
        if faults.kill and self.chance.random() < faults.kill:
            faults.die()
        if self.countdown.strikes(self.device, kind) or (likelihood and self.chance.random() < likelihood):
            faults.struck[f"failed: {kind}"] += 1
            raise OSError(faults.code, os.strerror(faults.code))


class SimDisk:
    """A process' handle on a ``Platter``; a ``common.disk.Disk``."""

    read_only = False
    preferred_block = 4096

    def __init__(self, platter: Platter, *, forgetful: bool) -> None:
        self.platter = platter
        self.path = platter.name
        self._size = platter.size
        self.forgetful = forgetful
        """A failed flush may lose what it was to write."""
        self.process: Process | None = PROCESS.get()

    @property
    def size(self) -> int:
        return self._size

    def capacity(self) -> int:
        return self.platter.size

    def use(self, size: int) -> None:
        if size > self.platter.size:
            raise DiskError(f"{self.platter.name} has {self.platter.size} bytes, and {size} are needed.")
        self._size = size

    def fileno(self) -> int:
        return -1

    def read_into(self, offset: int, view: memoryview) -> None:
        platter = self.platter
        platter.trouble("read", platter.faults.read)
        platter.between(platter, "read")
        view[:] = platter.read_only_view[offset : offset + len(view)]

    def read_nowait(self, offset: int, view: memoryview) -> None:
        platter = self.platter
        if platter.faults.cold and platter.chance.random() < platter.faults.cold:
            platter.faults.struck["cold reads"] += 1
            raise BlockingIOError(errno.EAGAIN, "not in the page cache")
        self.read_into(offset, view)

    def write(self, offset: int, data: Any) -> None:
        self._change("write", offset, bytes(data))

    def _change(self, kind: str, offset: int, data: bytes) -> None:
        platter = self.platter
        if self.process is not None and self.process.dead:
            return
        try:
            platter.trouble(kind, platter.faults.write)
        except BaseException:
            sectors = len(data) // SECTOR
            done = platter.chance.randint(0, sectors) * SECTOR if platter.chance.random() < 0.5 else 0
            if done:
                platter.put(offset, data[:done])
            raise
        platter.put(offset, data)
        platter.between(platter, kind)

    def flush(self) -> None:
        platter = self.platter
        if self.process is not None and self.process.dead:
            return
        try:
            platter.trouble("flush", platter.faults.flush)
        except OSError:
            if self.forgetful:
                platter.forget_cache()
            raise
        platter.sync()

    def discard(self, offset: int, length: int) -> None:
        self._change("discard", offset, bytes(length))

    def zero(self, offset: int, length: int, *, may_unmap: bool = True, fast: bool = False) -> None:
        self._change("zero", offset, bytes(length))

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        platter = self.platter
        platter.trouble("extents", platter.faults.read)
        found: list[tuple[int, int]] = []
        words = np.frombuffer(platter.contents, np.uint64, length // 8, offset)  # a bit that turned over is no hole
        for data in np.logical_or.reduce(words.reshape(-1, SECTOR // 8), axis=1).tolist():
            flags = 0 if data else HOLE_AND_ZERO
            if found and found[-1][1] == flags:
                found[-1] = (found[-1][0] + SECTOR, flags)
            else:
                found.append((SECTOR, flags))
        return found

    def close(self) -> None:
        pass


@dataclass
class MetadataFile:
    """The file ``metadata`` of one side. ``now`` is what the file system shows, ``stable`` what a loss of power
    leaves."""

    chance: random.Random
    faults: Faults
    now: bytes | None = None
    stable: bytes | None = None
    countdown: Countdown = field(default_factory=Countdown)
    saved: int = 0
    name: str = ""

    def load(self, path: str) -> Metadata | None:
        if PROCESS.get() is not None and self.countdown.strikes(self.name, "load"):
            raise DiskError(f"The metadata file {path} cannot be read: {os.strerror(self.faults.code)}.")
        return parse(self.now, path) if self.now is not None else None

    def save(self, path: str, metadata: Metadata) -> None:
        process = PROCESS.get()
        if process is not None and process.dead:
            return
        data = serialise(metadata)
        faults = self.faults
        if faults.kill and self.chance.random() < faults.kill:
            if self.chance.random() < 0.5:
                self.now = self.stable = data
            faults.die()
        if self.countdown.strikes(self.name, "save") or (faults.save and self.chance.random() < faults.save):
            if self.chance.random() < 0.3:
                # renamed, and then the directory could not be synced: what a loss of power leaves is open
                self.now = data
                if self.chance.random() < 0.5:
                    self.stable = data
            faults.struck["failed: save"] += 1
            raise DiskError(f"The metadata file {path} cannot be written: {os.strerror(faults.code)}.")
        self.now = self.stable = data
        self.saved += 1

    def lose_power(self) -> None:
        self.now = self.stable
