"""The disk buffer: what the guest's view needs beyond the secondary disk, in memory that all processes share.

A volume has two layers of it. The **hidden disk** holds old contents of blocks that the primary has overwritten since
the last checkpoint; the **active disk** holds what the secondary's own guest wrote. Each is one file in the buffer's
directory:

    owner   one 64-bit word a slot: the block that it holds, so that a failover walks the slots in use, not the disk
    pool    the slots, one block each, handed out by a bump pointer in the header; the hidden disk's may go on in a file
            (``secondary.spill``)
    map     one 64-bit entry a block of the volume: epoch << 32 | slot; absent unless the epoch is the current one

The map is at the end because it alone grows with the volume: ``allocate`` makes the file longer, ``prepare`` maps that,
``announce`` puts the new size into the header, ``follow`` maps the file anew in each process that wants to know. One
that does not (a reader that attached before) goes on with the old size, and what it sees of that stays true.

A block is written in the order contents, owner, map entry (one store), after the bump pointer was advanced: a process
that dies in between leaks a slot until the next checkpoint and damages nothing. Blocks held are told by ``entry >=
epoch << 32``: no entry is ever of a later epoch than the current one.

All memory is allocated with ``posix_fallocate`` when the buffer is made, so that a memory file system that is too
small is a sentence at start and never a SIGBUS later. The files are plain ones: a process that restarts attaches to
them again, unless the host has started since: what a disk has of them then is of different moments.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.disk import Disk
from common.errors import DiskError
from common.settings import BufferSettings
from secondary import header as h
from secondary import spill
from secondary.header import PairHeader, Stage, Unreachable, VolumeGeometry
from secondary.requests import RequestTable
from secondary.space import free_bytes, no_space, plan_slots, plan_spill

Blocks = NDArray[np.uint64]

HEADER_FILE: Final = "header"
SMALL: Final = 64
"""Blocks up to which plain integers beat NumPy (measured: deploy/bench/heart.py, `do_cow`)."""
_PAGE: Final = 4096


@dataclass(frozen=True, slots=True)
class BufferVolume:
    """A volume to make a buffer for; ``disk`` is the path of its secondary disk, for those who attach by directory."""

    name: str
    size: int
    disk: str = ""
    spill: str = ""
    """Path of its spill file; empty: none."""


class Layer:
    """The hidden or the active disk of one volume.

    ``entries``, ``owner`` and ``pool`` are memoryviews for scalar use; ``entries_array`` and ``owner_array`` the same
    memory for NumPy.
    """

    def __init__(
        self, path: str, geometry: _LayerGeometry, words: memoryview, bump: int, block_size: int, spill_path: str = ""
    ) -> None:
        self.path = path
        self.spill_path = spill_path
        self.slots = geometry.slots
        """Slots in memory; those of a spill file have the numbers that follow."""
        self.in_memory = geometry.slots * block_size
        """Positions from here on are in the spill file: see ``read_into`` and ``write``."""
        self.block_size = block_size
        self._spill = -1
        self._words = words
        self._bump = bump
        self.use(geometry, self.map(geometry))

    def map(self, geometry: _LayerGeometry) -> mmap.mmap:
        """The file mapped, or mapped anew, for ``use``. OSError, or DiskError if it is not what the header says."""
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size < geometry.total:  # more: a crash came between ``allocate`` and ``announce``
                raise DiskError(f"{self.path} is shorter than the header says.", hint="Remove the buffer and resync.")
            if geometry.spill_slots and self._spill < 0:
                self._spill = spill.open_file(self.spill_path, geometry.spill_total)
            return mmap.mmap(fd, geometry.total)
        finally:
            os.close(fd)

    def use(self, geometry: _LayerGeometry, mapped: mmap.mmap) -> None:
        """What ``map`` gave for it. Whoever is at work with the old views goes on with the same memory."""
        view = memoryview(mapped)
        self.geometry = geometry
        self.pool = view[geometry.pool_at : geometry.pool_at + geometry.slots * geometry.block_size]
        self.owner = view[: (geometry.slots + geometry.spill_slots) * 8].cast("Q")
        self.owner_array: Blocks = np.frombuffer(self.owner, dtype=np.uint64)
        entries = view[geometry.map_at : geometry.map_at + geometry.blocks * 8].cast("Q")
        self.entries_array: Blocks = np.frombuffer(entries, dtype=np.uint64)
        self.entries = entries
        self.bytes = view
        self._map = mapped

    def position(self, block: int, least: int) -> int:
        """Where ``block`` lies in the pool; -1 if the layer does not hold it."""
        entry = self.entries[block]
        return (entry & h.EPOCH_MASK) * self.block_size if entry >= least else -1

    def read_into(self, position: int, view: memoryview) -> None:
        """Fill ``view`` from ``position`` of the slots on. OSError where the spill file cannot be read."""
        end = position + len(view)
        if end <= self.in_memory:
            view[:] = self.pool[position:end]
            return
        inside = max(0, self.in_memory - position)
        view[:inside] = self.pool[position : position + inside]
        spill.read_into(self._spill, self.spill_path, position + inside - self.in_memory, view[inside:])

    def contents(self, position: int, length: int) -> memoryview:
        """``length`` bytes from ``position`` on, without a copy where they are in memory. OSError as in
        ``read_into``."""
        if position + length <= self.in_memory:
            return self.pool[position : position + length]
        copy = memoryview(bytearray(length))
        self.read_into(position, copy)
        return copy

    def write(self, position: int, data: memoryview) -> None:
        """The other way round."""
        inside = min(len(data), max(0, self.in_memory - position))
        self.pool[position : position + inside] = data[:inside]
        if inside < len(data):
            spill.write(self._spill, self.spill_path, position + inside - self.in_memory, data[inside:])

    def used(self, epoch: int) -> int:
        """Slots handed out in ``epoch``."""
        word = self._words[self._bump]
        return word & h.EPOCH_MASK if word >> 32 == epoch else 0

    def store_used(self, epoch: int, count: int) -> None:
        """Slots [0, ``count``) are handed out from now on."""
        self._words[self._bump] = epoch << 32 | count

    def stamp(self, blocks: list[int], slot: int, least: int) -> None:
        """Consecutive slots from ``slot`` on, whose contents are there, now hold ``blocks``; ``least`` is epoch << 32.

        Under a request on the blocks, after ``store_used``.
        """
        if len(blocks) <= SMALL:
            owner, entries = self.owner, self.entries
            for block in blocks:
                owner[slot] = block
                entries[block] = least | slot
                slot += 1
            return
        count = len(blocks)
        array = np.array(blocks, dtype=np.uint64)
        self.owner_array[slot : slot + count] = array
        self.entries_array[array.astype(np.intp)] = np.arange(least | slot, (least | slot) + count, dtype=np.uint64)

    def held(self, epoch: int) -> tuple[Blocks, Blocks]:
        """(blocks, slots) that the layer holds in ``epoch``, in the order of the slots.

        Slots that a crash leaked are not among them.
        """
        slots = np.arange(min(self.used(epoch), len(self.owner_array)), dtype=np.uint64)  # it may be damaged
        blocks = self.owner_array[: len(slots)].copy()
        good = blocks < len(self.entries_array)
        blocks, slots = blocks[good], slots[good]
        good = self.entries_array[blocks] == (slots | np.uint64(epoch << 32))
        return blocks[good], slots[good]

    def clear(self) -> None:
        """Zero the map. Only for the wrap-around of the epoch."""
        self.entries_array[:] = 0

    def close(self) -> None:
        """Unmap; a view that somebody still holds keeps the memory mapped until it goes."""
        if self._spill >= 0:
            os.close(self._spill)
            self._spill = -1
        empty = np.zeros(0, dtype=np.uint64)
        self.entries_array = self.owner_array = empty
        with contextlib.suppress(BufferError):
            for view in (self.entries, self.owner, self.pool, self.bytes):
                view.release()
            self._map.close()


@dataclass(frozen=True, slots=True)
class _LayerGeometry:
    """Where the parts of a layer's file are."""

    blocks: int
    slots: int
    block_size: int
    spill_slots: int = 0

    @property
    def pool_at(self) -> int:
        """The pool ends with a page, and the map begins with one."""
        return self.map_at - self.slots * self.block_size

    @property
    def map_at(self) -> int:
        return _align((self.slots + self.spill_slots) * 8) + _align(self.slots * self.block_size)

    @property
    def spill_total(self) -> int:
        """Length of the spill file."""
        return _align(self.spill_slots * self.block_size)

    @property
    def spill_owners_at(self) -> int:
        """Where the owner words of the spill file's slots begin."""
        return self.slots * 8

    def parts(self) -> list[tuple[int, int]]:
        """(offset, length) of what has to have memory from the beginning: all but the owner words of a spill file."""
        first = _align(self.spill_owners_at)
        last = self.pool_at // _PAGE * _PAGE
        return [(0, self.total)] if first >= last else [(0, first), (last, self.total - last)]

    @property
    def total(self) -> int:
        return self.map_at + self.blocks * 8


class VolumeBuffer:
    """The hidden and the active disk of one volume, and its table of requests."""

    def __init__(
        self, directory: str, header: PairHeader, index: int, geometry: VolumeGeometry, timeout_s: float
    ) -> None:
        self.index = index
        self.name = geometry.name
        self.size = geometry.size
        self.disk_path = geometry.disk
        self.header = header
        self.block_size = header.block_size
        self.shift = self.block_size.bit_length() - 1
        self.blocks = -(-self.size // self.block_size)
        self.base = h.volume_base(index)
        """Number of the first word of this volume's record in the header."""
        words = header.words
        self._directory = directory
        self._slots = geometry.hidden_slots, geometry.active_slots, geometry.spill_slots
        self._following = threading.Lock()
        self._prepared: tuple[int, mmap.mmap, mmap.mmap] | None = None
        hidden, active = _layers(geometry.size, self.block_size, *self._slots)
        bump = self.base + h.V_HIDDEN_BUMP
        self.hidden = Layer(
            f"{directory}/hidden.{index}", hidden, words, bump, self.block_size, f"{directory}/spill.{index}"
        )
        self.active = Layer(f"{directory}/active.{index}", active, words, self.base + h.V_ACTIVE_BUMP, self.block_size)
        waiting = self.base + h.V_WAITING
        self.requests = RequestTable(
            f"{directory}/requests.{index}",
            self.size,
            self.block_size,
            name=self.name,
            timeout_s=timeout_s,
            waiting=words[waiting : waiting + 1],
        )

    # Growing

    def allocate(self, size: int) -> None:
        """Make room for the maps of a volume of ``size`` bytes. NoSpaceError if there is none: nothing has changed."""
        layers = _layers(size, self.block_size, *self._slots)
        needed = 0
        for layer, geometry in zip((self.hidden, self.active), layers, strict=True):
            needed += max(0, geometry.total - os.stat(layer.path).st_size)
        if needed > free_bytes(self._directory):
            raise no_space(self._directory, needed, free_bytes(self._directory))
        for layer, geometry in zip((self.hidden, self.active), layers, strict=True):
            fd = os.open(layer.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.posix_fallocate(fd, geometry.map_at, geometry.blocks * 8)
            except OSError as error:
                raise no_space(self._directory, needed, free_bytes(self._directory)) from error
            finally:
                os.close(fd)

    def complete(self, size: int, read: Callable[[int, memoryview], None]) -> None:
        """The last block may have been a short one: ``read`` of the disk fills the rest of it where the buffer holds
        it. Under a request on all blocks, before ``announce``."""
        least = self.header.epoch << 32
        inside = self.size & (self.block_size - 1)
        end = min(self.size - inside + self.block_size, size)
        for layer in (self.hidden, self.active) if inside else ():
            position = layer.position(self.size >> self.shift, least)
            if position >= 0:
                added = memoryview(bytearray(end - self.size))
                read(self.size, added)
                layer.write(position + inside, added)

    def prepare(self, size: int) -> None:
        """Map what ``allocate`` made: after this ``announce`` cannot fail. OSError."""
        hidden, active = _layers(size, self.block_size, *self._slots)
        self._prepared = size, self.hidden.map(hidden), self.active.map(active)

    def announce(self, size: int) -> None:
        """The volume has ``size`` bytes from now on, for every process that looks; ``allocate`` and ``prepare``
        first."""
        self.header.words[self.base + h.V_SIZE] = h.size_word(size)
        self.follow()

    def grow(self, disk: Disk) -> None:
        """To the size of ``disk``, with all that belongs to it; under a request on all blocks, or before there are
        any. NoSpaceError if there is no room for the maps, OSError."""
        self.allocate(disk.size)
        self.complete(disk.size, disk.read_into)
        self.prepare(disk.size)
        self.announce(disk.size)

    def follow(self) -> bool:
        """Take over the size in the header. True if it had grown; from any thread."""
        with self._following:
            size = h.size_of(self.header.words[self.base + h.V_SIZE])
            if size == self.size:
                return False
            hidden, active = _layers(size, self.block_size, *self._slots)
            prepared, self._prepared = self._prepared, None
            if prepared is None or prepared[0] != size:
                prepared = size, self.hidden.map(hidden), self.active.map(active)
            self.hidden.use(hidden, prepared[1])
            self.active.use(active, prepared[2])
            self.requests.grow(size)
            self.blocks = -(-size // self.block_size)
            self.size = size
            return True

    def length_of(self, block: int) -> int:
        """Bytes of ``block``: the last one may be shorter."""
        return min(self.block_size, self.size - (block << self.shift))

    def count(self, word: int, by: int = 1) -> None:
        """Add to one of the counters of this volume's record."""
        self.header.words[self.base + word] += by

    def counter(self, word: int) -> int:
        """One of the counters of this volume's record."""
        return self.header.words[self.base + word]

    @property
    def guest_has_written(self) -> bool:
        """True if the active disk holds anything in the current epoch."""
        return self.active.used(self.header.epoch) > 0

    def close(self) -> None:
        self.requests.close()
        self.hidden.close()
        self.active.close()


class DiskBuffer:
    """The disk buffer of a pair, mapped into this process: ``create`` once, ``attach`` from anywhere."""

    def __init__(self, directory: str, *, pair_id: str | None = None, timeout_s: float = 10.0) -> None:
        self.directory = directory
        self.header = PairHeader(f"{directory}/{HEADER_FILE}", pair_id=pair_id)
        self.volumes: list[VolumeBuffer] = []
        try:
            for index, geometry in enumerate(self.header.volumes()):
                self.volumes.append(VolumeBuffer(directory, self.header, index, geometry, timeout_s))
        except FileNotFoundError as error:
            self.close()
            raise DiskError(f"{error.filename} is missing.", hint="Remove the buffer and resync.") from error
        except OSError as error:
            self.close()
            raise Unreachable(f"The disk buffer in {directory} cannot be opened: {error.strerror}.") from error
        except BaseException:
            self.close()
            raise

    @classmethod
    def attach(
        cls,
        directory: str,
        *,
        pair_id: str | None = None,
        block_size: int | None = None,
        volumes: Iterable[tuple[str, int]] | None = None,
        outgrown: bool = False,
        timeout_s: float = 10.0,
    ) -> DiskBuffer:
        """Map a buffer that exists. DiskError if there is none, or if it is not the one that is described. With
        ``outgrown`` its volumes may be smaller than the ones that are described: a resize was interrupted."""
        buffer = cls(directory, pair_id=pair_id, timeout_s=timeout_s)
        found = [(volume.name, volume.size) for volume in buffer.volumes]
        wanted = list(volumes) if volumes is not None else found
        alike = [name for name, _ in found] == [name for name, _ in wanted]
        if outgrown and alike and all(size <= now for (_, size), (_, now) in zip(found, wanted, strict=True)):
            wanted = found
        problem = ""
        if block_size is not None and buffer.header.block_size != block_size:
            problem = f"has blocks of {buffer.header.block_size} bytes, the configuration says {block_size}"
        elif found != wanted:
            problem = f"is for the volumes {_names(found)}, the configuration says {_names(wanted)}"
        if problem:
            buffer.close()
            raise DiskError(
                f"The disk buffer in {directory} {problem}.", hint="Remove it, or go back to the old configuration."
            )
        return buffer

    @staticmethod
    def exists(directory: str) -> bool:
        """True if a complete buffer is there that this boot of the host made (``attach`` may still find it unfit).
        Unreachable if nobody can tell: a new one would take the place of what a commit has yet to move."""
        try:
            with open(f"{directory}/{HEADER_FILE}", "rb", opener=os.open) as file:
                words = memoryview(file.read(h.PAGE).ljust(h.PAGE, b"\0")).cast("Q")
                return words[h.W_MAGIC] == h.MAGIC and words[h.W_BOOT] in (0, h.boot_number())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise Unreachable(f"The disk buffer in {directory} cannot be opened: {error.strerror}.") from error

    @classmethod
    def create(
        cls,
        settings: BufferSettings,
        volumes: Sequence[BufferVolume],
        *,
        pair_id: str,
        timeout_s: float = 10.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> DiskBuffer:
        """Allocate a new buffer in ``settings.directory`` and own it; an old one there goes. Its stage is NONE: see
        ``start``.

        Raises ConfigError if the size cannot serve the volumes, NoSpaceError if the directory cannot hold it,
        DiskError if another process runs on an old buffer there.
        """
        directory = settings.directory
        block = settings.block_size
        slots = plan_slots(settings.size_bytes, block, [volume.size for volume in volumes])
        spilling = plan_spill(settings, [volume.size for volume in volumes], slots)
        geometries = [
            VolumeGeometry(volume.name, volume.size, volume.disk, hidden, active, spilled if volume.spill else 0)
            for volume, (hidden, active), spilled in zip(volumes, slots, spilling, strict=True)
        ]
        ours = not os.path.isdir(directory)
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        cls.remove(directory)
        files: list[tuple[str, _LayerGeometry]] = []
        try:
            for index, (volume, geometry) in enumerate(zip(volumes, geometries, strict=True)):
                plan = geometry.hidden_slots, geometry.active_slots, geometry.spill_slots
                hidden, active = _layers(geometry.size, block, *plan)
                files += [(f"hidden.{index}", hidden), (f"active.{index}", active)]
                if geometry.spill_slots:
                    spill.make(volume.spill, f"{directory}/spill.{index}", hidden.spill_total)
            _allocate(directory, files, progress)
            PairHeader.create(f"{directory}/{HEADER_FILE}", pair_id, block, geometries).close()
            buffer = cls.attach(directory, pair_id=pair_id, timeout_s=timeout_s)
            buffer.header.own()
        except BaseException:
            _unlink(directory)
            if ours:
                os.rmdir(directory)
            raise
        return buffer

    @staticmethod
    def remove(directory: str) -> None:
        """Delete the buffer's files, nothing else in the directory. DiskError if a process runs on it, TimedOut if one
        that is attached to it does not end a request.

        Whoever is attached keeps what was mapped, and learns from it that there is nothing to show any more: the next
        backup job knows nothing of those readers.
        """
        try:
            header = PairHeader(f"{directory}/{HEADER_FILE}")
        except Unreachable:
            raise
        except DiskError:
            pass  # none, or the remains of one: nobody can run on it
        else:
            with contextlib.ExitStack() as stack:
                stack.callback(header.close)
                header.own()
                with contextlib.suppress(DiskError):  # nobody can attach to a size that is damaged
                    for index, volume in enumerate(header.volumes()):
                        path = f"{directory}/requests.{index}"
                        table = RequestTable(path, volume.size, header.block_size, name=volume.name)
                        stack.callback(table.close)
                        table.wait_absent(table.whole())
                header.store_state(Stage.NONE, 0, syncing=False)
        _unlink(directory)

    # State of the pair

    def start(self, *, syncing: bool, number: int = 0, sequence: int = 0) -> None:
        """Stage NONE becomes RUNNING with an empty buffer.

        With ``syncing`` there is no checkpoint until the first one is made.
        """
        assert self.header.stage is Stage.NONE
        self.header.record_checkpoint(1, number, sequence)
        self.header.store_state(Stage.RUNNING, 1, syncing=syncing)

    @property
    def guest_has_written(self) -> bool:
        """True if the active disk of any volume holds anything in the current epoch."""
        return any(volume.guest_has_written for volume in self.volumes)

    def volume(self, name: str) -> VolumeBuffer:
        """The volume called ``name``; KeyError if there is none."""
        for volume in self.volumes:
            if volume.name == name:
                return volume
        raise KeyError(name)

    def close(self) -> None:
        for volume in self.volumes:
            volume.close()
        self.header.close()


def _layers(
    size: int, block_size: int, hidden: int, active: int, spilled: int
) -> tuple[_LayerGeometry, _LayerGeometry]:
    blocks = -(-size // block_size)
    return _LayerGeometry(blocks, hidden, block_size, spilled), _LayerGeometry(blocks, active, block_size)


def _allocate(
    directory: str, files: list[tuple[str, _LayerGeometry]], progress: Callable[[int, int], None] | None
) -> None:
    needed = sum(length for _, geometry in files for _, length in geometry.parts()) + h.HEADER_BYTES
    free = free_bytes(directory)
    if free < needed:
        raise no_space(directory, needed, free)
    done = 0
    for name, geometry in files:
        size = sum(length for _, length in geometry.parts())
        fd = os.open(f"{directory}/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for offset, length in geometry.parts():
                os.posix_fallocate(fd, offset, length)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM):
                raise no_space(directory, needed, free_bytes(directory) + done) from error
            raise
        finally:
            os.close(fd)
        done += size
        if progress is not None:
            progress(done, needed)


def _unlink(directory: str) -> None:
    """The header first: without one there is no buffer, and with one each file has to be there."""
    Path(directory, HEADER_FILE).unlink(missing_ok=True)
    for path in Path(directory).iterdir() if os.path.isdir(directory) else ():
        stem, _, number = path.name.partition(".")
        if stem == "spill" and number.isdigit() and path.is_symlink():
            spill.remove(path)
        if stem in ("hidden", "active", "requests") and number.isdigit():
            path.unlink(missing_ok=True)


def _align(length: int) -> int:
    return -(-length // _PAGE) * _PAGE


def _names(volumes: Iterable[tuple[Any, ...]]) -> str:
    return ", ".join(f"{name} ({size} bytes)" for name, size in volumes)
