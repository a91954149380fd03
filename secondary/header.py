"""The header of a pair's disk buffer: a small shared memory file that every process of the secondary maps.

All that decides what a guest sees is in one 64-bit word, ``stage << 56 | syncing << 55 | epoch``, so that a checkpoint
and each step of a failover is exactly one store: no process can see half of one, and a crash leaves either the old or
the new. Everything else is arranged around that store:

* A map entry is ``epoch << 32 | slot``; entries of another epoch count as absent. So is a bump pointer, ``epoch << 32 |
  next``: with another epoch than the current one it means zero. The one store of the epoch thus empties maps and pools.
* What a checkpoint records about itself (number, sequence, wall time) goes into one of two slots, chosen by the parity
  of its epoch, before the store; so the record of the current epoch is whole at any instant.
* Epoch 0 is never current: a zeroed map entry must mean "absent". The last epoch, ``LAST_EPOCH``, is never written
  into an entry: a checkpoint that steps onto it leaves an empty buffer like any other, and whoever comes next clears
  the maps and goes on with epoch 1. A crash in between is met by doing the clearing again.

Stores are 8 bytes, aligned, through a memoryview cast to native words, which CPython performs as one move on 64-bit
machines. Ordering between processes comes from the kernel: whoever relies on an order holds a CowRequest, whose lock
and unlock are system calls on both sides.

What does not change while the buffer lives (pair, block size, volumes, slots) is under a checksum, and a volume's size
carries its own in the same word, so that growing is one store as well: a process that attaches to a damaged header says
so. The words that change with every batch are memory, and believed.

Words that nothing depends on (counters, the fairness hint, commit progress) live here, too, and may be torn by a crash.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import functools
import mmap
import os
import threading
import time
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_64, xxh3_64_intdigest

from common import limits
from common.disk import FLOCK
from common.errors import DiskError, TandemDiskError
from common.failures import Failure as Failure  # the words of the header speak of it

MAGIC: Final = int.from_bytes(b"TDBUFFER", "little")
LAYOUT_VERSION: Final = 3

EPOCH_MASK: Final = 0xFFFF_FFFF
LAST_EPOCH: Final = 0xFFFF_FFFF
SYNCING: Final = 1 << 55
STAGE_SHIFT: Final = 56

# Words of the first page.
W_MAGIC: Final = 0
W_VERSION: Final = 1
W_BYTES: Final = 2
W_BLOCK: Final = 3
W_VOLUMES: Final = 4
W_STATE: Final = 5
W_APPLIED: Final = 6
W_STREAM: Final = 7
W_SYNCS: Final = 8
W_BEGUN: Final = 9
W_SEAL: Final = 10
"""xxh3-64 of all that does not change."""
W_BOOT: Final = 11
"""See ``boot_number``."""
W_RECORDS: Final = 12
W_ERROR_SERIAL: Final = 18
W_ERROR_CASE: Final = 19
W_ERROR_TIME: Final = 20
W_ERROR_BYTES: Final = 21
W_PAIR_BYTES: Final = 22
W_OWNER: Final = 23
W_FAILURES: Final = 24
"""Counters of the seven cases, at their numbers."""

PAIR_ID: Final = slice(256, 512)
ERROR_TEXT: Final = slice(512, 2048)
PAGE: Final = 4096
VOLUME_BYTES: Final = 2048
HEADER_BYTES: Final = PAGE + VOLUME_BYTES * limits.MAX_VOLUMES

# Words of a volume's record.
V_SIZE: Final = 0
"""See ``size_word``."""
V_HIDDEN_SLOTS: Final = 1
V_ACTIVE_SLOTS: Final = 2
V_HIDDEN_BUMP: Final = 3
V_ACTIVE_BUMP: Final = 4
V_WAITING: Final = 5
V_GUEST_WRITES: Final = 6
V_GUEST_BYTES: Final = 7
V_COW_BLOCKS: Final = 8
V_COW_BATCHES: Final = 9
V_COMMIT_DONE: Final = 10
V_COMMIT_TOTAL: Final = 11
V_NAME_BYTES: Final = 12
V_DISK_BYTES: Final = 13
V_SPILL_SLOTS: Final = 14
VOLUME_NAME: Final = slice(256, 512)
VOLUME_DISK: Final = slice(512, 2048)

_SIZE_BITS: Final = limits.MAX_VOLUME.bit_length()
_REMOVE: Final = "Remove the buffer: the disk is compared as a whole then."
_LOCK_ERROR: Final = 1 << 40
_LOCK_OWNER: Final = _LOCK_ERROR + 1


class Stage(enum.IntEnum):
    """Where a secondary stands. The names are those of QEMU's replication driver (block/replication.c)."""

    NONE = 0
    RUNNING = 1
    FAILOVER = 2
    FAILOVER_FAILED = 3
    DONE = 4


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint says about itself."""

    number: int
    sequence: int
    wall_ns: int


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """The last failure that a process of this secondary met."""

    case: Failure
    sentence: str
    wall_ns: int


@dataclass(frozen=True, slots=True)
class VolumeGeometry:
    """A volume as the header describes it; ``disk`` is the path of its secondary disk."""

    name: str
    size: int
    disk: str
    hidden_slots: int
    active_slots: int
    spill_slots: int = 0


class Unreachable(DiskError):
    """There may well be a disk buffer, and its files cannot be opened now: nothing says that it may be replaced."""


class PairHeader:
    """The mapped header. ``words`` is what hot paths index; the properties are for everybody else."""

    def __init__(self, path: str, *, pair_id: str | None = None) -> None:
        """Map an existing header and check it. DiskError if it is not one of ours, of another pair or layout;
        Unreachable if it cannot be opened."""
        self.path = path
        self._error_lock = threading.Lock()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            where = os.path.dirname(path)
            raise DiskError(f"There is no disk buffer at {where}.", hint="Is the secondary up?") from None
        except OSError as error:
            raise Unreachable(f"The disk buffer's {path} cannot be opened: {error.strerror}.") from error
        try:
            if os.fstat(self._fd).st_size != HEADER_BYTES:
                raise DiskError(f"{path} is not the header of a disk buffer.")
            self._map = mmap.mmap(self._fd, HEADER_BYTES)
            self.bytes = memoryview(self._map)
            self.words = self.bytes.cast("Q")
            self._check(pair_id)
        except BaseException:
            self.close()
            raise

    def _check(self, pair_id: str | None) -> None:
        if self.words[W_MAGIC] != MAGIC:
            raise DiskError(f"{self.path} is not the header of a disk buffer, or its creation was interrupted.")
        if self.words[W_VERSION] != LAYOUT_VERSION:
            raise DiskError(
                f"{self.path} has layout version {self.words[W_VERSION]}, this program knows {LAYOUT_VERSION}.",
                hint="Finish the failover with the version that made it.",
            )
        if self.words[W_SEAL] != _seal(self.bytes):
            raise _damaged(self.path)
        if pair_id is not None and self.pair_id != pair_id:
            raise DiskError(f"{self.path} belongs to pair {self.pair_id}, not to {pair_id}.")
        if self.words[W_STATE] >> STAGE_SHIFT > Stage.DONE:
            raise _damaged(self.path)

    @classmethod
    def create(cls, path: str, pair_id: str, block_size: int, volumes: list[VolumeGeometry]) -> PairHeader:
        """Write a new header, stage NONE. The magic comes with ``seal``: until then nobody can attach."""
        image = bytearray(HEADER_BYTES)
        words = memoryview(image).cast("Q")
        words[W_VERSION] = LAYOUT_VERSION
        words[W_BYTES] = HEADER_BYTES
        words[W_BOOT] = boot_number()
        words[W_BLOCK] = block_size
        words[W_VOLUMES] = len(volumes)
        words[W_PAIR_BYTES] = _put(image, PAIR_ID, pair_id)
        for index, volume in enumerate(volumes):
            base = volume_base(index)
            words[base + V_SIZE] = size_word(volume.size)
            words[base + V_HIDDEN_SLOTS] = volume.hidden_slots
            words[base + V_ACTIVE_SLOTS] = volume.active_slots
            words[base + V_SPILL_SLOTS] = volume.spill_slots
            start = base * 8
            words[base + V_NAME_BYTES] = _put(image, _shift(VOLUME_NAME, start), volume.name)
            words[base + V_DISK_BYTES] = _put(image, _shift(VOLUME_DISK, start), volume.disk)
        words[W_SEAL] = _seal(memoryview(image))
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, HEADER_BYTES)
            os.pwrite(fd, image, 0)
            os.pwrite(fd, MAGIC.to_bytes(8, "little"), W_MAGIC * 8)
        finally:
            os.close(fd)
        return cls(path, pair_id=pair_id)

    # Geometry

    @property
    def pair_id(self) -> str:
        return bytes(self.bytes[PAIR_ID][: self.words[W_PAIR_BYTES]]).decode()

    @property
    def block_size(self) -> int:
        return self.words[W_BLOCK]

    def volumes(self) -> list[VolumeGeometry]:
        """The volumes in the order of their numbers."""
        return [self._geometry(volume_base(index)) for index in range(self.words[W_VOLUMES])]

    def _geometry(self, base: int) -> VolumeGeometry:
        def text(where: slice, length: int) -> str:
            return bytes(self.bytes[_shift(where, base * 8)][:length]).decode(errors="surrogateescape")

        return VolumeGeometry(
            name=text(VOLUME_NAME, self.words[base + V_NAME_BYTES]),
            size=size_of(self.words[base + V_SIZE]),
            disk=text(VOLUME_DISK, self.words[base + V_DISK_BYTES]),
            hidden_slots=self.words[base + V_HIDDEN_SLOTS],
            active_slots=self.words[base + V_ACTIVE_SLOTS],
            spill_slots=self.words[base + V_SPILL_SLOTS],
        )

    # State

    @property
    def state(self) -> int:
        """The one word. Read it once and decode that value; two reads may see two states."""
        return self.words[W_STATE]

    @property
    def stage(self) -> Stage:
        return Stage(self.words[W_STATE] >> STAGE_SHIFT)

    @property
    def epoch(self) -> int:
        return self.words[W_STATE] & EPOCH_MASK

    @property
    def syncing(self) -> bool:
        """True while there is no valid checkpoint: a full synchronisation or a resync is writing the secondary disk."""
        return bool(self.words[W_STATE] & SYNCING)

    def store_state(self, stage: Stage, epoch: int, *, syncing: bool) -> None:
        """The one store. The caller holds what the step requires."""
        assert 0 <= epoch <= LAST_EPOCH
        self.words[W_STATE] = stage << STAGE_SHIFT | (SYNCING if syncing else 0) | epoch

    def record_checkpoint(self, epoch: int, number: int, sequence: int) -> None:
        """Say which checkpoint ``epoch`` will be; goes before the store that makes it current."""
        at = W_RECORDS + 3 * (epoch & 1)
        self.words[at] = number
        self.words[at + 1] = sequence
        self.words[at + 2] = time.time_ns()

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that the guest sees now."""
        while True:
            epoch = self.epoch
            at = W_RECORDS + 3 * (epoch & 1)
            record = Checkpoint(self.words[at], self.words[at + 1], self.words[at + 2])
            if self.epoch == epoch:
                return record

    @property
    def applied_sequence(self) -> int:
        """Sequence number of the last message of the stream that the secondary disk has in full."""
        return self.words[W_APPLIED]

    @applied_sequence.setter
    def applied_sequence(self, value: int) -> None:
        self.words[W_APPLIED] = value

    def begin_batch(self, sequence: int, copied: int) -> None:
        """A batch is about to be written to the disk, for which ``copied`` blocks went into hidden disks. Goes behind
        them and before the first write; a repetition, which finds them copied, changes nothing."""
        tag = _tag(sequence)
        if self.words[W_BEGUN] >> 32 != tag:
            self.words[W_BEGUN] = tag << 32 | copied

    def forget_batch(self) -> None:
        """The numbering changes: what was begun is not what comes next."""
        self.words[W_BEGUN] = 0

    @property
    def torn(self) -> bool:
        """The batch behind ``applied_sequence`` was begun: parts of it may be on the disk."""
        return self.words[W_BEGUN] >> 32 == _tag(self.words[W_APPLIED] + 1)

    @property
    def copied_ahead(self) -> int:
        """Blocks in hidden disks that belong to the batch behind ``applied_sequence``, if it was begun."""
        return self.words[W_BEGUN] & EPOCH_MASK if self.torn else 0

    @property
    def stream_id(self) -> int:
        return self.words[W_STREAM]

    @stream_id.setter
    def stream_id(self, value: int) -> None:
        self.words[W_STREAM] = value

    @property
    def syncs(self) -> int:
        """How often a synchronisation began: a long reader notices one that came and went."""
        return self.words[W_SYNCS]

    # Errors

    def set_error(self, case: Failure, sentence: str) -> None:
        """Keep the failure for ``status``.

        The last one wins. Never raises: it is called while another error is on its way.
        """
        text = sentence.encode(errors="replace")[: ERROR_TEXT.stop - ERROR_TEXT.start]
        if not self._error_lock.acquire(blocking=False):
            return
        try:
            self._lock(_LOCK_ERROR, fcntl.F_WRLCK)
        except OSError:
            self._error_lock.release()
            return  # somebody else is writing one down at this instant: one of the two is as good as the other
        try:
            serial = self.words[W_ERROR_SERIAL] | 1  # it is odd already if the last one who wrote died in the middle
            self.words[W_ERROR_SERIAL] = serial
            self.bytes[ERROR_TEXT.start : ERROR_TEXT.start + len(text)] = text
            self.words[W_ERROR_BYTES] = len(text)
            self.words[W_ERROR_CASE] = case
            self.words[W_FAILURES + case] += 1
            self.words[W_ERROR_TIME] = time.time_ns()
            self.words[W_ERROR_SERIAL] = serial + 1
        finally:
            self._lock(_LOCK_ERROR, fcntl.F_UNLCK)
            self._error_lock.release()

    def get_error(self) -> ErrorRecord | None:
        """The last failure, or None. The name is that of QEMU's interface (replication_get_error)."""
        for _ in range(1000):
            serial = self.words[W_ERROR_SERIAL]
            case = self.words[W_ERROR_CASE]
            text = bytes(self.bytes[ERROR_TEXT][: self.words[W_ERROR_BYTES]])
            record = ErrorRecord(Failure(min(case, 7)), text.decode(errors="replace"), self.words[W_ERROR_TIME])
            if serial % 2 == 0 and serial == self.words[W_ERROR_SERIAL]:
                return record if case else None
        return ErrorRecord(Failure(min(case, 7)), "a process died while it wrote the error down", 0) if case else None

    def clear_error(self, *cases: Failure) -> None:
        """Forget the failure, if it is one of ``cases``, or whichever it is: what caused it was put right."""
        case = self.words[W_ERROR_CASE]
        if case and (not cases or case in cases):
            self.words[W_ERROR_CASE] = Failure.NONE

    def failures(self) -> dict[Failure, int]:
        """How often each case happened since the buffer was made, without those that never did."""
        counts = ((case, self.words[W_FAILURES + case]) for case in Failure if case)
        return {case: count for case, count in counts if count}

    # Ownership

    def own(self) -> None:
        """Become the one process that runs the backup job of this buffer, until it ends. DiskError if there is one."""
        try:
            self._lock(_LOCK_OWNER, fcntl.F_WRLCK)
        except BlockingIOError:
            raise DiskError(
                f"The disk buffer {os.path.dirname(self.path)} is in use by process {self.words[W_OWNER]}.",
                hint="Stop that secondary first.",
            ) from None
        self.words[W_OWNER] = os.getpid()

    def _lock(self, byte: int, kind: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))

    def close(self) -> None:
        """Unmap, as far as nobody holds a view; give the ownership back."""
        if self._fd >= 0:
            # Explicitly: the mapping has a duplicate of the descriptor, and with it the lock, as long as a view lives.
            self._lock(_LOCK_OWNER, fcntl.F_UNLCK)
        for name in ("words", "bytes"):
            view = self.__dict__.pop(name, None)
            if view is not None:
                view.release()
        if "_map" in self.__dict__:
            with contextlib.suppress(BufferError):
                self._map.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _tag(sequence: int) -> int:
    """What tells a batch from those around it, in 32 bits; never 0, which says that none was begun."""
    return sequence & EPOCH_MASK or 1 << 31


@functools.cache
def boot_number() -> int:
    """Which boot of this host it is; 0: nobody knows. A buffer is memory, wherever its files are: what a disk has of it
    after a loss of power is of different moments."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return xxh3_64_intdigest(file.read()) or 1
    except OSError:
        return 0


def volume_base(index: int) -> int:
    """Number of the first word of a volume's record."""
    return (PAGE + VOLUME_BYTES * index) // 8


def size_word(size: int) -> int:
    """A volume's size as the header holds it: 48 bits, and 16 of its checksum above them."""
    assert 0 <= size <= limits.MAX_VOLUME
    return size | (xxh3_64_intdigest(size.to_bytes(8, "little")) & 0xFFFF) << _SIZE_BITS


def size_of(word: int) -> int:
    """The size in such a word. DiskError if it is none."""
    size = word & ((1 << _SIZE_BITS) - 1)
    if size_word(size) != word:
        raise DiskError("The header of the disk buffer is damaged: a volume's size is not what its checksum says.",
                        hint=_REMOVE)  # fmt: skip
    return size


def _seal(image: memoryview) -> int:
    """The checksum of what does not change, in the bytes of a header."""
    words = image.cast("Q")
    digest = xxh3_64(image[W_VERSION * 8 : W_STATE * 8])
    if words[W_BOOT]:
        digest.update(image[W_BOOT * 8 : W_BOOT * 8 + 8])
    digest.update(image[W_PAIR_BYTES * 8 : W_PAIR_BYTES * 8 + 8])
    digest.update(image[PAIR_ID])
    for index in range(min(words[W_VOLUMES], limits.MAX_VOLUMES)):
        base = volume_base(index)
        for word in (V_HIDDEN_SLOTS, V_ACTIVE_SLOTS, V_SPILL_SLOTS, V_NAME_BYTES, V_DISK_BYTES):
            digest.update(image[(base + word) * 8 : (base + word) * 8 + 8])
        digest.update(image[_shift(VOLUME_NAME, base * 8)])
        digest.update(image[_shift(VOLUME_DISK, base * 8)])
    words.release()
    return digest.intdigest()


def _damaged(path: str) -> DiskError:
    return DiskError(f"{path} is damaged: it does not say what it said when it was made.", hint=_REMOVE)


def _shift(where: slice, by: int) -> slice:
    return slice(where.start + by, where.stop + by)


def _put(image: bytearray, where: slice, text: str) -> int:
    raw = text.encode(errors="surrogateescape")
    if len(raw) > where.stop - where.start:
        raise TandemDiskError(f"{text[:40]}… is too long: at most {where.stop - where.start} bytes.")
    image[where.start : where.start + len(raw)] = raw
    return len(raw)
