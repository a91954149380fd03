"""Disks: the one interface that all block layers share, a file or block device behind it, and layers for tests.

Every disk is a flat range of ``size`` bytes with synchronous, thread-safe operations at byte granularity. The layers
(``CountingDisk``, ``DelayDisk``, ``FaultDisk``) have the same interface and stack on anything; nothing below a layer
knows of it. The habit is nbdkit's: a fault is an ordinary filter, not a special build.

Errors: opening raises ``DiskError`` (a sentence for a person), operations raise ``OSError`` with the errno that an NBD
client should see. A read beyond what the file still holds (somebody truncated it) is EIO, never silent zeroes.

Exclusive use is an open-file-description lock over the whole file. It also collides with the locks that QEMU's image
locking takes on single bytes, so that a running qemu keeps us out and we keep it out.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import stat
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, Protocol

from xxhash import xxh3_64

from common.errors import DiskError

Bytes = bytes | bytearray | memoryview
Kind = Literal["read", "write", "flush", "discard", "zero", "extents"]

HOLE: Final = 1
"""NBD_STATE_HOLE: nothing is allocated there."""
ZERO: Final = 2
"""NBD_STATE_ZERO: reads as zeroes."""

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10
BLKDISCARD: Final = 0x1277
BLKZEROOUT: Final = 0x127F
ZERO_PIECE: Final = 1 << 20
DATA_KNOWN_S: Final = 0.1
"""How long ``FileDisk.extents`` believes that data it saw is still data; see there."""
FLOCK: Final = struct.Struct("@hhqqi4x")
"""struct flock of 64-bit Linux: type, whence, start, length, pid."""
assert FLOCK.size == 32

_ZEROES: Final = bytes(ZERO_PIECE)
_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


class Disk(Protocol):
    """What every block layer offers. Offsets and lengths are bytes within ``size``; the caller checked the bounds."""

    @property
    def size(self) -> int:
        """Bytes that the pair uses: what every bound is about."""

    @property
    def read_only(self) -> bool:
        """True if writing is refused."""

    def capacity(self) -> int:
        """Bytes that there are now: more than ``size`` once an operator has grown what is behind it."""

    def use(self, size: int) -> None:
        """``size`` bytes are the disk from now on, and will be after a power cut. DiskError if there are fewer."""

    @property
    def preferred_block(self) -> int:
        """Bytes of an I/O that suits the disk."""

    def fileno(self) -> int:
        """A descriptor on which preadv means the same as ``read_into``, or -1 if a layer wants to see calls."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view``; may block."""

    def read_nowait(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from memory; BlockingIOError if the device would have to be asked."""

    def write(self, offset: int, data: Bytes) -> None:
        """Write all of ``data``."""

    def flush(self) -> None:
        """Everything written so far is durable on return (fdatasync)."""

    def discard(self, offset: int, length: int) -> None:
        """Contents are no longer needed; a hint, does nothing where the disk cannot."""

    def zero(self, offset: int, length: int, *, may_unmap: bool = True, fast: bool = False) -> None:
        """Make the range read as zeroes; EOPNOTSUPP if ``fast`` and it would have to write them."""

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, HOLE | ZERO flags) of consecutive extents that cover the range."""

    def close(self) -> None:
        """Give the descriptor and the lock back."""


@lru_cache(maxsize=64)
def hash_of_zeroes(length: int) -> int:
    """xxh3-64 of ``length`` zero bytes: both sides know what a hole hashes to without reading it."""
    state = xxh3_64()
    for done in range(0, length, ZERO_PIECE):
        state.update(_ZEROES[: min(ZERO_PIECE, length - done)])
    return state.intdigest()


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with a mode, which ``os.posix_fallocate`` lacks. Raises OSError."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


class FileDisk:
    """A raw file or a block device.

    ``exclusive`` keeps other processes out that ask for the same (and QEMU). A second process of the same pair that
    needs the disk while the first one holds it opens it with ``exclusive=False``.
    """

    def __init__(self, path: str, *, read_only: bool = False, exclusive: bool = True) -> None:
        self.path = path
        self._read_only = read_only
        self._fd = -1
        mode = os.O_RDONLY if read_only else os.O_RDWR
        try:
            status = os.stat(path)
            self._device = stat.S_ISBLK(status.st_mode)
            if not self._device and not stat.S_ISREG(status.st_mode):
                raise DiskError(f"{path} is neither a file nor a block device.", hint="Name one of these.")
            if not read_only and not self._device and not status.st_mode & 0o222:
                raise PermissionError(errno.EACCES, "read-only")
            if self._device and exclusive and not read_only:
                mode |= os.O_EXCL
            self._fd = os.open(path, mode | os.O_CLOEXEC)
            if exclusive:
                _lock_whole(self._fd, path, shared=read_only)
            self._size = os.lseek(self._fd, 0, os.SEEK_END)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise _opening_error(path, error) from error
            raise
        self._block = max(512, min(int(status.st_blksize), 1 << 20)) if not self._device else 4096
        self._nowait = True
        self._data = (0, 0, 0.0)
        """The last run of data that SEEK_HOLE found, and until when to believe it."""

    @property
    def size(self) -> int:
        return self._size

    def capacity(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END)

    def use(self, size: int) -> None:
        try:
            there = self.capacity()
            if there < size:
                raise DiskError(f"{self.path} has {there} bytes, and {size} are needed.", hint="Grow it first.")
            if size > self._size and not self._read_only:
                os.fsync(self._fd)  # the length of a file is as volatile as its contents
        except OSError as error:
            raise DiskError(f"{self.path} cannot be resized: {error.strerror}.") from error
        self._size = size

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def preferred_block(self) -> int:
        return self._block

    def fileno(self) -> int:
        return self._fd

    def read_into(self, offset: int, view: memoryview) -> None:
        got = os.preadv(self._fd, [view], offset)
        while got < len(view):
            more = os.preadv(self._fd, [view[got:]], offset + got)
            if more == 0:
                raise OSError(errno.EIO, f"{self.path} ends before byte {offset + len(view)}")
            got += more

    def read_nowait(self, offset: int, view: memoryview) -> None:
        if self._nowait:
            try:
                if os.preadv(self._fd, [view], offset, os.RWF_NOWAIT) == len(view):
                    return
            except BlockingIOError:
                raise
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                # tmpfs and some others: they are in memory or have no other way, so a plain read it is from now on.
                self._nowait = False
            else:
                raise BlockingIOError(errno.EAGAIN, "only a part is in the page cache")
        self.read_into(offset, view)

    def write(self, offset: int, data: Bytes) -> None:
        done = os.pwrite(self._fd, data, offset)
        if done < len(data):
            view = memoryview(data)
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        self._data = (0, 0, 0.0)
        try:
            if self._device:
                fcntl.ioctl(self._fd, BLKDISCARD, struct.pack("=QQ", offset, length))
            else:
                fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise

    def zero(self, offset: int, length: int, *, may_unmap: bool = True, fast: bool = False) -> None:
        if length == 0:
            return
        self._data = (0, 0, 0.0)
        modes = [FALLOC_FL_PUNCH_HOLE] if may_unmap else []
        if not (self._device and fast):  # a device without a command for it would write the zeroes, as for BLKZEROOUT
            modes.append(FALLOC_FL_ZERO_RANGE)
        try:
            if self._device and not fast:
                fcntl.ioctl(self._fd, BLKZEROOUT, struct.pack("=QQ", offset, length))
                return
            for mode in modes:
                try:
                    fallocate(self._fd, mode | FALLOC_FL_KEEP_SIZE, offset, length)
                    return
                except OSError as error:
                    if error.errno not in _UNSUPPORTED:
                        raise
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        if fast:
            raise OSError(errno.EOPNOTSUPP, "zeroing would have to write")
        for position in range(offset, offset + length, ZERO_PIECE):
            self.write(position, memoryview(_ZEROES)[: min(ZERO_PIECE, offset + length - position)])

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        if self._device:
            return [(length, 0)]
        found: list[tuple[int, int]] = []
        end = offset + length
        # SEEK_HOLE walks to the end of the data, on tmpfs page by page: whoever asks chunk by chunk would make that
        # quadratic. To call a hole data is always true, only less useful, so a short memory is safe.
        start, stop, until = self._data
        if start <= offset < stop and time.monotonic() < until:
            found.append((min(stop, end) - offset, 0))
            offset = min(stop, end)
        while offset < end:
            try:
                data = min(os.lseek(self._fd, offset, os.SEEK_DATA), end)
            except OSError as error:
                if error.errno == errno.EINVAL:  # a file system that cannot tell
                    return [*found, (end - offset, 0)]
                if error.errno != errno.ENXIO:
                    raise
                data = end
            if data > offset:
                found.append((data - offset, HOLE | ZERO))
            if data < end:
                hole = os.lseek(self._fd, data, os.SEEK_HOLE)
                self._data = (data, hole, time.monotonic() + DATA_KNOWN_S)
                offset = min(hole, end)
                found.append((offset - data, 0))
            else:
                offset = end
        return found

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _lock_whole(fd: int, path: str, *, shared: bool) -> None:
    request = FLOCK.pack(fcntl.F_RDLCK if shared else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except (BlockingIOError, PermissionError) as error:
        raise DiskError(
            f"{path} is in use by another process.", hint="Stop that process first (fuser -v shows it)."
        ) from error


def _opening_error(path: str, error: OSError) -> DiskError:
    if error.errno == errno.ENOENT:
        return DiskError(f"{path} does not exist.", hint="Create it, for example with: truncate -s SIZE FILE.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DiskError(f"{path} cannot be opened for this use: {error.strerror}.", hint="Check its permissions.")
    if error.errno == errno.EBUSY:
        return DiskError(f"{path} is in use by another process.", hint="Unmount it or stop that process first.")
    return DiskError(f"{path} cannot be opened: {error.strerror}.")


class DiskLayer:
    """A layer that passes everything on; the base of the ones that do something."""

    def __init__(self, inner: Disk) -> None:
        self.inner = inner

    def before(self, kind: Kind, offset: int, length: int) -> None:
        """Called before each operation; what it raises is what the caller of the operation gets."""

    @property
    def size(self) -> int:
        return self.inner.size

    def capacity(self) -> int:
        return self.inner.capacity()

    def use(self, size: int) -> None:
        self.inner.use(size)

    @property
    def read_only(self) -> bool:
        return self.inner.read_only

    @property
    def preferred_block(self) -> int:
        return self.inner.preferred_block

    def fileno(self) -> int:
        return -1

    def read_into(self, offset: int, view: memoryview) -> None:
        self.before("read", offset, len(view))
        self.inner.read_into(offset, view)

    def read_nowait(self, offset: int, view: memoryview) -> None:
        self.before("read", offset, len(view))
        self.inner.read_nowait(offset, view)

    def write(self, offset: int, data: Bytes) -> None:
        self.before("write", offset, len(data))
        self.inner.write(offset, data)

    def flush(self) -> None:
        self.before("flush", 0, self.inner.size)
        self.inner.flush()

    def discard(self, offset: int, length: int) -> None:
        self.before("discard", offset, length)
        self.inner.discard(offset, length)

    def zero(self, offset: int, length: int, *, may_unmap: bool = True, fast: bool = False) -> None:
        self.before("zero", offset, length)
        self.inner.zero(offset, length, may_unmap=may_unmap, fast=fast)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        self.before("extents", offset, length)
        return self.inner.extents(offset, length)

    def close(self) -> None:
        self.inner.close()


class CountingDisk(DiskLayer):
    """Counts calls and bytes by kind."""

    def __init__(self, inner: Disk) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def before(self, kind: Kind, offset: int, length: int) -> None:
        self.calls[kind] += 1
        self.bytes[kind] += length


class DelayDisk(DiskLayer):
    """Holds operations of the given kinds back: for ``delay_s``, or until the ``gate`` that a test controls is set."""

    def __init__(
        self,
        inner: Disk,
        *,
        delay_s: float = 0.0,
        kinds: frozenset[Kind] = frozenset({"read", "write", "flush"}),
        gate: threading.Event | None = None,
    ) -> None:
        super().__init__(inner)
        self.delay_s = delay_s
        self.kinds = kinds
        self.gate = gate

    def read_nowait(self, offset: int, view: memoryview) -> None:
        if "read" in self.kinds:
            raise BlockingIOError(errno.EAGAIN, "a delayed disk is never in memory")
        super().read_nowait(offset, view)

    def before(self, kind: Kind, offset: int, length: int) -> None:
        if kind in self.kinds:
            if self.gate is not None:
                self.gate.wait()
            if self.delay_s:
                time.sleep(self.delay_s)


@dataclass(frozen=True, slots=True)
class Fault:
    """Which calls fail.

    Those of ``kinds`` that touch [start, end), from the ``first`` such call on, ``count`` times.
    """

    kinds: frozenset[Kind]
    code: int = errno.EIO
    first: int = 1
    count: int | None = None
    """None: for ever, until ``heal``."""
    start: int = 0
    end: int = 1 << 63

    def __post_init__(self) -> None:
        assert self.first >= 1
        assert self.count is None or self.count >= 1


class FaultDisk(DiskLayer):
    """Fails calls as told. ``fail`` adds a fault, ``heal`` removes them all."""

    def __init__(self, inner: Disk, *faults: Fault) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._faults: list[tuple[Fault, Callable[[], int]]] = []
        for fault in faults:
            self.fail(fault)

    def fail(self, fault: Fault) -> None:
        """From now on calls that ``fault`` describes raise OSError."""
        with self._lock:
            self._faults.append((fault, itertools.count(1).__next__))

    def heal(self) -> None:
        """Nothing fails any more."""
        with self._lock:
            self._faults.clear()

    def before(self, kind: Kind, offset: int, length: int) -> None:
        with self._lock:
            for fault, calls in self._faults:
                if kind not in fault.kinds or offset >= fault.end or offset + max(length, 1) <= fault.start:
                    continue
                number = calls()
                if number >= fault.first and (fault.count is None or number < fault.first + fault.count):
                    raise OSError(fault.code, f"{os.strerror(fault.code)} (injected into {kind} at {offset})")
