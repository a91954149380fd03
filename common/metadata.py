"""What a side of a pair remembers durably: one small file, replaced atomically.

    offset  size
         0     8  magic "TDMETADA"
         8     4  format version, little-endian
        12     4  length of the body
        16     8  xxh3-64 of everything else (bytes 0-15, then the body)
        24     …  body: a msgpack map of ``Metadata``'s fields

``save`` writes a temporary file beside it, syncs it, renames it over the old one and syncs the directory: after a
crash the file is the old or the new one, never a mixture. ``load`` accepts nothing that ``save`` did not write: a file
that is damaged in any byte, cut short or from a newer version is a DiskError that names it, never a guess, because
what it says decides which disk is overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
from dataclasses import dataclass
from typing import Any, Final

import msgpack
from xxhash import xxh3_64_intdigest

from common.errors import DiskError
from common.generation import MAX_HISTORY, Generation, History, Standing

MAGIC: Final = b"TDMETADA"
FORMAT: Final = 2
"""Format 1 had no ``committing`` and no ``lost_writes``; it is read, too."""
_HEADER: Final = struct.Struct("<8sII")
_CHECKSUM: Final = struct.Struct("<Q")
_START: Final = _HEADER.size + _CHECKSUM.size
assert _START == 24
MAX_BODY: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Metadata:
    """One side's memory. Streams, sequences and checkpoints count as in common.wire."""

    pair_id: str
    side: str
    role: str
    """``primary`` or ``secondary``."""
    volumes: tuple[tuple[str, int], ...]
    """(name, size in bytes) when the file was written."""
    history: History = ()
    consistent: bool = False
    """There is a state to fail over to: True on a primary, on a secondary once it holds a checkpoint."""
    clean: bool = False
    """The process that wrote this stopped in good order, with nothing unacknowledged."""
    syncing: bool = False
    """The secondary disk is between two states: a resync has begun and not ended."""
    stream: int = 0
    sequence: int = 0
    """On a secondary: its disk durably holds ``stream`` up to here. On a clean primary: the last number it used."""
    checkpoint: int = 0
    """Number of the last checkpoint; 0: none."""
    base: int = 0
    """Primary: identity of the generation from which on its bitmaps know every write; 0: none."""
    bases: tuple[tuple[int, int], ...] = ()
    """Primary: (stream, sequence) pairs from which on its bitmaps know every write of that stream."""
    disks: tuple[tuple[int, int], ...] = ()
    """(inode, time of the last change in ns) of each disk when the process stopped; the time is 0 while it runs."""
    failover: str = ""
    """On a side that was promoted: the target, ``latest`` or ``checkpoint``; a crash half-way is finished by it."""
    committing: bool = False
    """On a side that was promoted to a checkpoint: part of that may be nowhere but in its disk buffer. Without the
    buffer its disks are a mixture of two times."""
    lost_writes: bool = False
    """Primary: a flush of its disks failed, and what that lost is nowhere but on its secondary, if there."""

    def standing(self, own_blocks: int = 0, own_bytes: int = 0) -> Standing:
        """What this side tells its peer."""
        return Standing(self.pair_id, self.side, self.role, self.history, self.consistent, self.base, own_blocks,
                        own_bytes)


def load(path: str) -> Metadata | None:
    """The metadata in ``path``; None if there is no such file; DiskError if it cannot be read or trusted."""
    try:
        with open(path, "rb") as file:
            data = file.read(_START + MAX_BODY + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DiskError(f"The metadata file {path} cannot be read: {error.strerror}.") from error
    return parse(data, path)


def save(path: str, metadata: Metadata) -> None:
    """Replace the file durably. DiskError if that fails: then it is the old one, or, where the directory could not be
    synced behind the renaming, the new one, and a crash may leave either. Save again what has to be true."""
    temporary = f"{path}.new"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(serialise(metadata))
            while view:
                view = view[os.write(descriptor, view):]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise DiskError(f"The metadata file {path} cannot be written: {error.strerror}.") from error


def serialise(metadata: Metadata) -> bytes:
    """The bytes of the file."""
    fields = {name: getattr(metadata, name) for name in _TYPES}
    body: bytes = msgpack.packb(fields)
    assert len(body) <= MAX_BODY
    header = _HEADER.pack(MAGIC, FORMAT, len(body))
    return header + _CHECKSUM.pack(xxh3_64_intdigest(body, xxh3_64_intdigest(header))) + body


def parse(data: bytes, path: str) -> Metadata:
    """Read ``serialise``; ``path`` is for the sentence of the DiskError."""
    hint = "Restore the file from a copy, or remove it to start this side anew (it is then synchronised in full)."
    if len(data) < _START:
        raise DiskError(f"The metadata file {path} is cut short: {len(data)} bytes.", hint=hint)
    magic, version, length = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise DiskError(f"{path} is not a metadata file of TandemDisk.", hint=hint)
    body = data[_START:]
    (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
    if len(body) != length or xxh3_64_intdigest(body, xxh3_64_intdigest(data[: _HEADER.size])) != checksum:
        raise DiskError(f"The metadata file {path} is damaged: its checksum is wrong.", hint=hint)
    if version not in _NEW_FIELDS:
        raise DiskError(f"The metadata file {path} has format {version}, this TandemDisk knows format {FORMAT}.",
                        hint="Run the version that wrote it.")
    try:
        return _metadata(msgpack.unpackb(body), _NEW_FIELDS[version])
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise DiskError(f"The metadata file {path} does not hold what format {version} holds: {error}.",
                        hint=hint) from None


_TYPES: Final[dict[str, type]] = {
    "pair_id": str, "side": str, "role": str, "volumes": list, "history": list, "consistent": bool, "clean": bool,
    "syncing": bool, "stream": int, "sequence": int, "checkpoint": int, "base": int, "bases": list,
    "disks": list, "failover": str, "committing": bool, "lost_writes": bool,
}
_NEW_FIELDS: Final[dict[int, dict[str, Any]]] = {FORMAT: {}, 1: {"committing": False, "lost_writes": False}}
"""By format: what it did not have yet, and what that was."""
assert list(_TYPES) == [field.name for field in dataclasses.fields(Metadata)]


def _metadata(fields: Any, new: dict[str, Any]) -> Metadata:
    """``new``: fields that the format of the file does not have. ValueError, TypeError or KeyError for a body that no
    version wrote in it."""
    if type(fields) is not dict or set(fields) != set(_TYPES) - set(new):
        raise ValueError("other fields")
    fields = {**fields, **new}
    for name, kind in _TYPES.items():
        if type(fields[name]) is not kind:
            raise TypeError(f"{name} is of another type")
    for name in ("stream", "sequence", "checkpoint", "base"):
        _number(fields[name])
    if fields["role"] not in ("primary", "secondary") or len(fields["history"]) > MAX_HISTORY:
        raise ValueError("role or history cannot be")
    history = tuple(Generation(_number(identity), _number(number), _text(side))
                    for identity, number, side in fields["history"])
    volumes = tuple((_text(name), _number(size)) for name, size in fields["volumes"])
    bases = tuple((_number(stream), _number(sequence)) for stream, sequence in fields["bases"])
    disks = tuple((_number(inode), _integer(changed)) for inode, changed in fields["disks"])
    return Metadata(**{**fields, "history": history, "volumes": volumes, "bases": bases, "disks": disks})


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("a name is of another type")
    return value


def _number(value: Any) -> int:
    if _integer(value) < 0:
        raise TypeError("a number is of another type")
    return int(value)


def _integer(value: Any) -> int:
    """A time before 1970 is negative."""
    if type(value) is not int:
        raise TypeError("a number is of another type")
    return value
