"""Attach to a live pair, read-only, from any process: the last checkpoint of its volumes without going through NBD.

    with attach("/srv/pair") as pair:
        volume = pair.volumes["disk0"]
        print(pair.checkpoint, volume.read(0, 512).hex())

How to serialise reads of your own against the backup job is in the package's docstring.

One read is consistent: all of it is of one checkpoint. Two reads may be of two checkpoints. A whole image of *one*
checkpoint is what ``PairView.snapshot`` makes, without stopping anything for long:

* It copies all volumes and notes for each block in which epoch it was copied. If no checkpoint was made meanwhile,
  that is it.
* Else it rolls the image forward: a map entry keeps the epoch in which its block was last copied before write, even
  when that epoch is over. So the blocks that may differ between the epoch of the copy and now are exactly those whose
  entry is not older than the copy; they are read again. Each round has only to catch up with what was dirtied during
  the last one.
* If the rounds don't converge (checkpoints faster than a round), the last round is done under a shared lock on the
  ``HOLD`` byte, which keeps checkpoints waiting for it, and only for it: at most the size of the hidden disk is copied
  then. The lock goes with its holder.

The image is of the last checkpoint at its end, not of the one at its beginning. The other designs were: holding
checkpoints for the whole copy (the hidden disk would fill up and replication would stop), or starting again whenever
one is made (it would never end).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.disk import HOLE, Disk, FileDisk
from common.errors import DiskError, NotRunning, OperationFailed
from secondary import header as h
from secondary.buffer import HEADER_FILE, DiskBuffer
from secondary.header import Checkpoint, Stage
from secondary.requests import HOLD
from secondary.view import VolumeView

BUFFER_LINK: Final = "buffer"
"""Name of the symbolic link in a side's directory that leads to its disk buffer."""
CHUNK: Final = 1 << 20
"""Bytes read under one request."""
ROUNDS: Final = 4
"""Rounds of catching up before a snapshot holds checkpoints off."""
RESTARTS: Final = 3
"""How often a snapshot begins anew when a synchronisation or an epoch wrap-around took its ground away."""

Progress = Callable[[int, int], None]


def find_buffer(directory: str) -> str:
    """The buffer's directory, given that itself, a side's directory, or the directory of a pair.

    NotRunning if there is none, DiskError if it is another user's.
    """
    for candidate in (".", BUFFER_LINK, f"b/{BUFFER_LINK}", f"a/{BUFFER_LINK}"):
        path = os.path.join(directory, candidate)
        try:
            os.stat(f"{path}/{HEADER_FILE}")
        except PermissionError:
            raise _not_ours(path) from None
        except OSError:
            continue
        if not os.access(f"{path}/{HEADER_FILE}", os.R_OK | os.W_OK, effective_ids=True):
            raise _not_ours(path)
        if DiskBuffer.exists(path):
            return os.path.realpath(path)
    raise NotRunning(f"There is no disk buffer in {directory}.", hint="Is the secondary up?")


def _not_ours(path: str) -> DiskError:
    return DiskError(
        f"{os.path.normpath(path)} cannot be opened by this user.", hint="Attach as the user that runs the secondary."
    )


def attach(directory: str, *, overlay: bool = False, timeout_s: float = 10.0) -> PairView:
    """A read-only view of the pair whose buffer, side or pair directory this is. Close it, or use it in a ``with``
    block.

    ``overlay``: the guest's view instead of the bare checkpoint. Raises NotRunning if there is no buffer, DiskError if
    it is unfit.
    """
    return PairView(DiskBuffer.attach(find_buffer(directory), timeout_s=timeout_s), overlay=overlay)


class PairView:
    """The volumes of a pair as of the last checkpoint."""

    def __init__(self, buffer: DiskBuffer, *, overlay: bool = False) -> None:
        self.buffer = buffer
        self.header = buffer.header
        self.volumes: dict[str, VolumeView] = {}
        self._disks: list[Disk] = []
        try:
            for volume in buffer.volumes:
                disk = FileDisk(volume.disk_path, read_only=True, exclusive=False)
                self._disks.append(disk)
                disk.use(volume.size)
                self.volumes[volume.name] = VolumeView(volume, disk, overlay=overlay)
        except BaseException:
            self.close()
            raise

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that a read sees now."""
        return self.header.checkpoint

    def snapshot(self, targets: Mapping[str, str], progress: Progress | None = None) -> Checkpoint:
        """Write bit-exact, sparse images of one checkpoint: ``targets`` maps volume names to paths of new files.

        ``progress(done, total)`` is in bytes; ``total`` grows when blocks must be read again. Returns the checkpoint.
        Raises OperationFailed (no checkpoint, promoted meanwhile, the ground changed too often), DiskError for a bad
        target. Images that are not complete are removed.
        """
        unknown = sorted(set(targets) - set(self.volumes))
        if unknown:
            raise OperationFailed(f"There is no volume {unknown[0]}.", hint=f"Volumes: {', '.join(self.volumes)}.")
        done = False
        files: list[_Image] = []
        try:
            for name, path in targets.items():
                files.append(_Image(self.volumes[name], path))
            for _ in range(RESTARTS):
                checkpoint = _Snapshot(self, files, progress).run()
                if checkpoint is not None:
                    for file in files:
                        file.flush()
                    done = True
                    return checkpoint
            raise OperationFailed("The pair was synchronised again and again meanwhile.", hint="Try again later.")
        finally:
            for file in files:
                file.close(keep=done)

    def close(self) -> None:
        """Detach. Reads in other threads must have ended."""
        for disk in self._disks:
            disk.close()
        self.buffer.close()

    def __enter__(self) -> PairView:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Image:
    """A target file, and in which epoch each of its blocks was read."""

    def __init__(self, view: VolumeView, path: str) -> None:
        self.view = view
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise DiskError(f"{path} exists.", hint="Name a new file.") from None
        except OSError as error:
            raise DiskError(f"{path} cannot be created: {error.strerror}.") from error
        try:
            os.ftruncate(self.fd, view.size)
        except OSError as error:
            self.close(keep=False)
            raise _write_error(path, error) from error
        self.epochs: NDArray[np.uint32] = np.zeros(view.buffer.blocks, dtype=np.uint32)

    def flush(self) -> None:
        """Durable on return; DiskError if it cannot be."""
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise _write_error(self.path, error) from error

    def close(self, *, keep: bool) -> None:
        os.close(self.fd)
        if not keep:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


@dataclass(frozen=True, slots=True)
class _Ground:
    """What must stay the same for a snapshot to be able to roll forward."""

    syncs: int
    epoch: int


class _Snapshot:
    """One attempt at images of one checkpoint."""

    def __init__(self, pair: PairView, files: list[_Image], progress: Progress | None) -> None:
        self._pair = pair
        self._files = files
        self._progress = progress
        self._done = 0
        self._total = sum(file.view.size for file in files)
        self._buffer = bytearray(CHUNK)

    def run(self) -> Checkpoint | None:
        """The checkpoint that the files hold now, or None if the ground changed."""
        ground = self._look()
        for file in self._files:
            for offset in range(0, file.view.size, CHUNK):
                self._copy(file, offset, min(CHUNK, file.view.size - offset))
        for _ in range(ROUNDS):
            if not self._stands(ground):
                return None
            epoch = self._pair.header.epoch
            checkpoint = self._pair.checkpoint
            self._catch_up()
            if self._pair.header.epoch == epoch and self._stands(ground):
                return checkpoint
        first = self._pair.buffer.volumes[0].requests
        hold = first.wait_byte(HOLD, shared=True)
        try:
            self._catch_up()
            return self._pair.checkpoint if self._stands(ground) else None
        finally:
            first.release(hold)

    def _look(self) -> _Ground:
        header = self._pair.header
        if header.stage is not Stage.RUNNING:
            raise OperationFailed(f"There is no checkpoint to take a snapshot of in stage {header.stage.name}.")
        if header.syncing:
            raise OperationFailed(
                "There is no checkpoint yet: the pair is being synchronised.", hint="Try again later."
            )
        return _Ground(header.syncs, header.epoch)

    def _stands(self, ground: _Ground) -> bool:
        now = self._look()
        # the last epoch is never shown for long: its maps are being cleared, and say nothing of what was touched
        return now.syncs == ground.syncs and ground.epoch <= now.epoch < h.LAST_EPOCH

    def _catch_up(self) -> None:
        """Read again what may have changed since it was read."""
        epoch = self._pair.header.epoch
        for file in self._files:
            volume = file.view.buffer
            touched = (volume.hidden.entries_array >> np.uint64(32)).astype(np.uint32)
            stale = np.flatnonzero((file.epochs < epoch) & (touched >= file.epochs))
            self._total += len(stale) * volume.block_size
            per_chunk = max(1, CHUNK // volume.block_size)
            borders = np.flatnonzero(np.diff(stale) != 1) + 1
            for run in np.split(stale, borders):
                for start in range(0, len(run), per_chunk):
                    part = run[start : start + per_chunk]
                    offset = int(part[0]) << volume.shift
                    self._copy(file, offset, min(len(part) << volume.shift, volume.size - offset))

    def _copy(self, file: _Image, offset: int, length: int) -> None:
        """Bytes of one checkpoint under one request; holes stay holes."""
        view = file.view
        volume = view.buffer
        contents = memoryview(self._buffer)[:length]
        try:
            with view.cow_request_begin(offset, offset + length, shared=True):
                state = self._pair.header.state
                epoch = state & h.EPOCH_MASK
                segments = view.look_up(offset, length, view.least(state))
                hole = len(segments) == 1 and all(flags & HOLE for _, flags in view.disk.extents(offset, length))
                hole = hole and segments[0][0] == 0
                if not hole:
                    view.copy_segments(segments, contents)
        except OSError as error:
            self._look()
            raise DiskError(f"Reading volume {view.name} failed: {error.strerror}.") from error
        first = offset >> volume.shift
        again = file.epochs[first] != 0
        file.epochs[first : (offset + length + volume.block_size - 1) >> volume.shift] = epoch
        if (again or not hole) and (again or not _is_zero(contents)):
            _write_all(file.fd, bytes(length) if hole else contents, offset, file.path)
        self._done += length
        if self._progress is not None:
            self._progress(self._done, self._total)


def _is_zero(view: memoryview) -> bool:
    return not np.frombuffer(view, dtype=np.uint8).any()


def _write_all(fd: int, data: bytes | memoryview, offset: int, path: str) -> None:
    view = memoryview(data)
    try:
        while view:
            done = os.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: str, error: OSError) -> DiskError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "The image needs as much room as the volume has data." if full else ""
    return DiskError(f"{path} cannot be written: {error.strerror}.", hint=hint)
