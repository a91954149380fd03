"""The messages of the replication stream: their layout and nothing else.

A message is one or two ZeroMQ frames: a header, and for a batch that carries data a payload. The header is a msgpack
array ``[type, session, sequence, *fields, checksum]``; its last element is the xxh3-64 of all header bytes before it,
seeded with the xxh3-64 of the payload. So every bit of both frames is covered, and replaying a batch in a new session
hashes its header again but not its payload.

``session`` (u64) names one connection: the high half the primary's process, the low half its count of connections.
``sequence`` numbers what must stay in order. Primary to secondary: BATCH, CHECKPOINT, RESYNC, SYNCED, VERIFY and RESIZE
count on across sessions, for as long as the stream (u64, in HELLO) lives. Secondary to primary: ACK, CHECKPOINTED,
PRESSURE, VERIFIED, RESIZED and FAILED count from 1 in every session. PING has the sequence of the last message before
it, so that one that was lost is missed even if nothing follows. Everything else has sequence 0.

Extents travel packed, 24 bytes each (``EXTENT``). ``position`` is where an extent's bytes are in the payload frame: the
payload is the span of the receive buffer as it came from the NBD client, request headers between the data included.

A payload may travel compressed: the flag COMPRESSED, one more element (the length of the original) before the
checksum, and a zstd frame in place of the payload. The checksum is seeded by the hash of the *original*: it holds for
what is going to be written, whatever compressor and decompressor made of it on the way. Until it is checked nothing is
believed but a bounded length.

BATCH and ACK, the two messages of the hot path, are packed by hand in one fixed msgpack encoding; the others go through
msgpack. ``decode`` accepts nothing that ``encode`` could not have made, except that msgpack integers may be wider than
needed. The first four elements of HELLO and all of REFUSE and BYE stay as they are in every protocol version.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from common import limits, terms
from common.batch import DISCARD, WRITE
from common.compression import expand
from common.errors import WireError
from common.generation import History, Standing

PROTOCOL_VERSION: Final = 1

EXTENT_STRUCT: Final = struct.Struct("<QIIHBBI")
EXTENT: Final = np.dtype([
    ("offset", "<u8"), ("length", "<u4"), ("position", "<u4"), ("volume", "<u2"), ("kind", "u1"), ("flags", "u1"),
    ("pad", "<u4"),
])
"""offset and length on the volume, position in the payload, volume index, kind and flags as in common.batch, pad 0."""
QUESTION: Final = np.dtype([("offset", "<u8"), ("length", "<u4"), ("volume", "<u2"), ("pad", "<u2"), ("hash", "<u8")])
"""One range of a VERIFY: the xxh3-64 that the primary has for it."""
RANGE: Final = np.dtype([("offset", "<u8"), ("length", "<u8"), ("volume", "<u2"), ("pad", "V6")])
"""A range of a volume."""
assert EXTENT_STRUCT.size == EXTENT.itemsize == 24
assert QUESTION.itemsize == RANGE.itemsize == 24

HELLO: Final = 1
WELCOME: Final = 2
REFUSE: Final = 3
BATCH: Final = 4
CHECKPOINT: Final = 5
ACK: Final = 6
CHECKPOINTED: Final = 7
PRESSURE: Final = 8
PING: Final = 9
PONG: Final = 10
BYE: Final = 11
RESYNC: Final = 12
SYNCED: Final = 13
VERIFY: Final = 14
VERIFIED: Final = 15
FAILED: Final = 16
RESIZE: Final = 17
RESIZED: Final = 18
ASK: Final = 19
TOLD: Final = 20

FLUSH: Final = 1
"""Batch flag: make everything up to here durable and say so in an ACK."""
RESYNC_DATA: Final = 2
"""Batch flag: sent by the resync, not by a guest."""
COMPRESSED: Final = 4
"""Batch flag: the payload frame is zstd's, the header tells the length of the original."""
BATCH_FLAGS: Final = FLUSH | RESYNC_DATA | COMPRESSED

Frame = bytes | bytearray | memoryview
Frames = tuple[Frame, ...]
Extents = npt.NDArray[np.void]
Extent = tuple[int, int, int, int, int, int, int]
"""An unpacked extent: (offset, length, position, volume, kind, flags, 0)."""

_U64: Final = (1 << 64) - 1


class Batch(NamedTuple):
    """Writes, zeroes and discards in order; a tuple because the hot path makes one per message."""

    session: int
    sequence: int
    flags: int
    extents: Frame
    payload: memoryview


class Ack(NamedTuple):
    """Everything up to ``applied`` is on the secondary disk, up to ``durable`` also after a power cut.

    Up to ``recorded`` the secondary's metadata file says so too: a secondary that lost its memory will still know.
    ``free`` hidden blocks were left in the fullest pool when ``applied`` was reached.
    """

    session: int
    sequence: int
    applied: int
    durable: int
    recorded: int
    free: int


NOBODY: Final = Standing("", "", "primary", (), True)
"""The standing in a HELLO of another protocol version, which cannot be read."""


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a session. ``stream`` names the numbering, ``next_sequence`` is the next number in it."""

    session: int
    sequence: int
    version: int
    stream: int = 0
    next_sequence: int = 0
    volumes: tuple[tuple[str, int], ...] = ()
    standing: Standing = NOBODY


@dataclass(frozen=True, slots=True)
class Welcome:
    """The secondary's answer: where it stands.

    ``stream``: the numbering that the four numbers count in. Messages up to ``received`` need not
    be sent again; those after ``applied`` are still being worked on. ``exact``: the secondary disk is precisely at
    ``applied`` (not so after the secondary's host lost its memory). ``syncing``: a resync has begun and not ended.
    ``checkpoint`` is the number of the last one (0: none). ``free`` of ``pool`` hidden blocks of ``block_size`` bytes
    are left in the fullest pool. ``own``: packed ``RANGE``s that this side may have written by itself, before it
    rejoined; the primary's bitmaps cannot know of them.
    """

    session: int
    sequence: int
    version: int
    stream: int
    applied: int
    received: int
    durable: int
    recorded: int
    checkpoint: int
    free: int
    pool: int
    block_size: int
    exact: bool
    syncing: bool
    standing: Standing
    own: bytes = b""
    sizes: tuple[int, ...] = ()
    """Bytes of the volumes here, in their order: a resize that was interrupted left one side smaller."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """The other end does not belong here. ``code`` is one word for programs, ``sentence`` is for people."""

    session: int
    sequence: int
    code: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A barrier: the state of all volumes at this point of the stream becomes checkpoint ``number``."""

    session: int
    sequence: int
    number: int


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """Checkpoint ``number``, ordered at sequence ``barrier``, was taken and cost ``seconds`` on the secondary."""

    session: int
    sequence: int
    number: int
    barrier: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Pressure:
    """``used`` of ``pool`` hidden blocks are taken: a checkpoint would empty them."""

    session: int
    sequence: int
    used: int
    pool: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there, and did you get everything up to ``sequence``? ``clock`` comes back in the PONG."""

    session: int
    sequence: int
    clock: float


@dataclass(frozen=True, slots=True)
class Pong:
    """I am."""

    session: int
    sequence: int
    clock: float


@dataclass(frozen=True, slots=True)
class Bye:
    """The sender ends the session on purpose; ``sentence`` says why."""

    session: int
    sequence: int
    sentence: str


@dataclass(frozen=True, slots=True)
class Resync:
    """From here on the secondary disk is no prefix of the primary's history, until SYNCED.

    The numbering continues from ``sequence`` in ``stream`` whatever the secondary had received before. ``full``: the
    whole disk is to be moved. ``keep_checkpoint``: the last checkpoint stays available (copy-before-write goes on);
    without it the secondary gives up its checkpoint.
    """

    session: int
    sequence: int
    stream: int
    full: bool
    keep_checkpoint: bool


@dataclass(frozen=True, slots=True)
class Synced:
    """The resync is complete at this point of the stream; the secondary takes over ``history`` durably."""

    session: int
    sequence: int
    history: History


@dataclass(frozen=True, slots=True)
class Verify:
    """Does the secondary disk hold, at this point of the stream, what these hashes (a QUESTION array) say?"""

    session: int
    sequence: int
    questions: bytes


@dataclass(frozen=True, slots=True)
class Verified:
    """Answer to the VERIFY at sequence ``barrier``: one byte a question, 1 where the contents differ."""

    session: int
    sequence: int
    barrier: int
    differing: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """``what`` went wrong at the message ``barrier``: ``apply``, ``flush`` (with ``errno``) or ``stream`` (errno 0).

    These end the session. ``checkpoint`` (errno 0) does not: the checkpoint was not taken, the one before it stays.
    """

    session: int
    sequence: int
    what: str
    barrier: int
    errno: int
    sentence: str


@dataclass(frozen=True, slots=True)
class Resize:
    """The volumes shall have ``sizes`` bytes from here on: ``exact``, or as many of them as there are."""

    session: int
    sequence: int
    sizes: tuple[int, ...]
    exact: bool


@dataclass(frozen=True, slots=True)
class Resized:
    """Answer to the RESIZE at sequence ``barrier``: the volumes have ``sizes`` bytes here, durably.

    ``sentence``: why it was refused; empty if it was not.
    """

    session: int
    sequence: int
    barrier: int
    sizes: tuple[int, ...]
    sentence: str


@dataclass(frozen=True, slots=True)
class Ask:
    """Outside any session: where do you stand? ``ended``: and lead, for the side that led ended in good order there."""

    session: int
    sequence: int
    ended: History


@dataclass(frozen=True, slots=True)
class Told:
    """Answer to an ASK: what the metadata says here."""

    session: int
    sequence: int
    standing: Standing


Message = (
    Hello | Welcome | Refuse | Batch | Checkpoint | Ack | Checkpointed | Pressure | Ping | Pong | Bye | Resync | Synced
    | Verify | Verified | Failed | Resize | Resized | Ask | Told
)

# ---------------------------------------------------------------------------------------------- hot path, by hand

# [array of 6, BATCH, u64 session, u64 sequence, u8 flags, bin32 extents ...
_BATCH: Final = struct.Struct(">BBBQBQBBBI")
# [array of 8, ACK, u64 session, u64 sequence, u64 applied, u64 durable, u64 recorded, u64 free, ...
_ACK: Final = struct.Struct(">BBBQBQBQBQBQBQ")
# ... (compressed: u32 length,) u64 checksum]
_LENGTH: Final = struct.Struct(">BI")
_TAIL: Final = struct.Struct(">BQ")
_ACK_SIZE: Final = _ACK.size + _TAIL.size
assert (_BATCH.size, _ACK.size, _TAIL.size) == (27, 56, 9)
BATCH_OVERHEAD: Final = _BATCH.size + _TAIL.size
_FLAGS_AT: Final = 21
_EMPTY: Final = memoryview(b"")


def payload_check(payload: Frame) -> int:
    """The hash of a payload that ``encode_batch`` wants; 0 for none."""
    return xxh3_64_intdigest(payload) if len(payload) else 0


def encode_batch(session: int, sequence: int, flags: int, extents: Frame, check: int) -> bytes:
    """Header frame of a batch; ``check`` is its ``payload_check``. The payload, if any, is the second frame."""
    head = _BATCH.pack(0x96, BATCH, 0xCF, session, 0xCF, sequence, 0xCC, flags, 0xC6, len(extents)) + extents
    return head + _TAIL.pack(0xCF, xxh3_64_intdigest(head, check))


def compress_batch(header: Frame, packed: bytes, length: int, check: int) -> Frames:
    """The frames of a batch, by ``header`` that ``encode_batch`` made, with ``packed`` in place of its payload.

    ``length`` and ``check`` (``payload_check``) are the original payload's.
    """
    head = b"".join((
        b"\x97", header[1:_FLAGS_AT], bytes([header[_FLAGS_AT] | COMPRESSED]), header[_FLAGS_AT + 1 : -_TAIL.size],
        _LENGTH.pack(0xCE, length),
    ))  # fmt: skip
    return head + _TAIL.pack(0xCF, xxh3_64_intdigest(head, check)), packed


def sequence_of(header: Frame) -> int:
    """Where in the stream a batch is that ``encode_batch`` made."""
    sequence: int = _BATCH.unpack_from(header)[5]
    return sequence


def encode_ack(session: int, sequence: int, applied: int, durable: int, recorded: int, free: int) -> bytes:
    """Header frame (the only one) of an ACK."""
    head = _ACK.pack(0x98, ACK, 0xCF, session, 0xCF, sequence, 0xCF, applied, 0xCF, durable, 0xCF, recorded, 0xCF, free)
    return head + _TAIL.pack(0xCF, xxh3_64_intdigest(head))


def _decode_batch(header: Frame, payload: memoryview) -> Batch:
    if len(header) < BATCH_OVERHEAD:
        raise WireError(f"a batch header of {len(header)} bytes is too short")
    t0, _, t1, session, t2, sequence, t3, flags, t4, size = _BATCH.unpack_from(header)
    end = len(header) - _TAIL.size - (_LENGTH.size if flags & COMPRESSED else 0)
    marks = (0x97 if flags & COMPRESSED else 0x96, 0xCF, 0xCF, 0xCC, 0xC6)
    if (t0, t1, t2, t3, t4) != marks or size != end - _BATCH.size or flags & ~BATCH_FLAGS:
        raise WireError("a batch header is not laid out as this protocol version lays it out")
    if size % 24 or size > limits.MAX_BATCH_EXTENTS * 24:
        raise WireError(f"a batch has {size} bytes of extents, 24 each, and at most {limits.MAX_BATCH_EXTENTS} of them")
    return Batch(session, sequence, flags & ~COMPRESSED, memoryview(header)[_BATCH.size:end], payload)


def is_compressed(frames: Sequence[Frame]) -> bool:
    """Whether ``decode`` would have to expand a payload, which takes as long and as much memory as the sender likes,
    before it knows anything of it."""
    return len(frames) == 2 and bytes(frames[0][:2]) == bytes((0x97, BATCH))


def _expand(header: Frame, payload: memoryview) -> memoryview:
    """The original payload of a compressed batch."""
    if len(header) < BATCH_OVERHEAD + _LENGTH.size or not header[_FLAGS_AT] & COMPRESSED:
        raise WireError(f"a header of {len(header)} bytes is not that of a compressed batch")
    marker, length = _LENGTH.unpack_from(header, len(header) - _TAIL.size - _LENGTH.size)
    if marker != 0xCE:
        raise WireError("a compressed batch does not say how long it is")
    return expand(payload, length)


def _decode_ack(header: Frame) -> Ack:
    if len(header) != _ACK_SIZE:
        raise WireError(f"an ACK has {_ACK_SIZE} bytes, not {len(header)}")
    _, _, t1, session, t2, sequence, t3, applied, t4, durable, t5, recorded, t6, free = _ACK.unpack_from(header)
    if not t1 == t2 == t3 == t4 == t5 == t6 == 0xCF:
        raise WireError("an ACK is not laid out as this protocol version lays it out")
    if not recorded <= durable <= applied:
        raise WireError(f"an ACK cannot say {applied} applied, {durable} durable, {recorded} recorded")
    return Ack(session, sequence, applied, durable, recorded, free)


# ------------------------------------------------------------------------------------------------ everything else

_LAYOUT: Final[dict[int, tuple[type[Any], tuple[terms.Check, ...]]]] = {
    HELLO: (Hello, (terms.integer(32), terms.I64, terms.I64, terms.volumes, terms.standing)),
    WELCOME: (Welcome, (terms.integer(32), *[terms.I64] * 6, terms.U63, terms.U63, terms.block_size, terms.flag,
                        terms.flag, terms.standing, terms.packed_records(24), terms.sizes)),
    REFUSE: (Refuse, (terms.text(64), terms.SENTENCE)),
    CHECKPOINT: (Checkpoint, (terms.I64,)),
    CHECKPOINTED: (Checkpointed, (terms.I64, terms.I64, terms.seconds)),
    PRESSURE: (Pressure, (terms.U63, terms.U63)),
    PING: (Ping, (terms.seconds,)),
    PONG: (Pong, (terms.seconds,)),
    BYE: (Bye, (terms.SENTENCE,)),
    RESYNC: (Resync, (terms.I64, terms.flag, terms.flag)),
    SYNCED: (Synced, (terms.history,)),
    VERIFY: (Verify, (terms.packed_records(24),)),
    VERIFIED: (Verified, (terms.I64, terms.packed_records(1))),
    FAILED: (Failed, (terms.word("apply", "flush", "stream", "checkpoint"), terms.I64, terms.integer(32),
                      terms.SENTENCE)),
    RESIZE: (Resize, (terms.sizes, terms.flag)),
    RESIZED: (Resized, (terms.I64, terms.sizes, terms.SENTENCE)),
    ASK: (Ask, (terms.history,)),
    TOLD: (Told, (terms.standing,)),
}
_CODE: Final = {cls: code for code, (cls, _) in _LAYOUT.items()}
for _cls, _checks in _LAYOUT.values():
    assert len(dataclasses.fields(_cls)) == 2 + len(_checks), _cls


def encode(message: Message) -> Frames:
    """The frames of any message. Sentences that are too long are cut."""
    if isinstance(message, Batch):
        check = payload_check(message.payload)
        head = encode_batch(message.session, message.sequence, message.flags, message.extents, check)
        return (head, message.payload) if len(message.payload) else (head,)
    if isinstance(message, Ack):
        return (encode_ack(*message),)
    fields = [getattr(message, field.name) for field in dataclasses.fields(message)]
    return (seal([_CODE[type(message)], *(v[:terms.MAX_SENTENCE] if isinstance(v, str) else v for v in fields)]),)


def seal(elements: Sequence[object]) -> bytes:
    """A header frame of any elements: msgpack plus checksum. For messages without a payload."""
    packer = msgpack.Packer()
    head: bytes = packer.pack_array_header(len(elements) + 1) + b"".join(map(packer.pack, elements))
    return head + _TAIL.pack(0xCF, xxh3_64_intdigest(head))


def decode(frames: Sequence[Frame]) -> Message:
    """The message in ``frames``; WireError for anything that no peer of this protocol version would send."""
    if not 1 <= len(frames) <= 2:
        raise WireError(f"a message has one or two frames, not {len(frames)}")
    header = frames[0]
    if not _TAIL.size + 3 <= len(header) <= limits.MAX_HEADER:
        raise WireError(f"a header has between {_TAIL.size + 3} bytes and {limits.MAX_HEADER}, not {len(header)}")
    payload = _EMPTY
    if len(frames) == 2:
        payload = memoryview(frames[1])
        if not 1 <= len(payload) <= limits.MAX_BATCH_PAYLOAD:
            raise WireError(f"a payload has between 1 byte and {limits.MAX_BATCH_PAYLOAD}, not {len(payload)}")
    packed = header[0] == 0x97 and header[1] == BATCH
    if packed:
        payload = _expand(header, payload)
    view = memoryview(header)
    marker, checksum = _TAIL.unpack(view[-_TAIL.size:])
    if marker != 0xCF or xxh3_64_intdigest(view[:-_TAIL.size], payload_check(payload)) != checksum:
        raise WireError(f"the checksum of a message of {len(header)} + {len(payload)} bytes is wrong")
    if packed or (header[0] == 0x96 and header[1] == BATCH):
        return _decode_batch(header, payload)
    if len(payload):
        raise WireError("only a batch has a payload")
    if header[0] == 0x98 and header[1] == ACK:
        return _decode_ack(header)
    return _decode_other(view)


def _decode_other(header: memoryview) -> Message:
    try:
        elements = msgpack.unpackb(header, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException, UnicodeDecodeError) as error:
        raise WireError(f"a header is not msgpack: {terms.short(error)}") from None
    if type(elements) is not list or len(elements) < 4:
        raise WireError("a header is not an array of at least four elements")
    code, session, sequence, *values = elements[:-1]
    if type(code) is not int or code not in _LAYOUT:
        raise WireError(f"unknown message type {terms.short(code)}")
    cls, checks = _LAYOUT[code]
    if code == HELLO and values and values[0] != PROTOCOL_VERSION:
        return Hello(terms.I64(session), terms.I64(sequence), terms.integer(32)(values[0]))
    if len(values) != len(checks):
        raise WireError(f"{cls.__name__} has {len(checks)} fields, not {len(values)}")
    checked = [check(value) for check, value in zip(checks, values, strict=True)]
    message: Message = cls(terms.I64(session), terms.I64(sequence), *checked)
    return message


def ack_of(frames: Sequence[Frame]) -> Ack | None:
    """The ACK in ``frames``, or None if it is something else to ``decode``. The primary's short cut; may WireError."""
    if len(frames) != 1:
        return None
    header = frames[0]
    if len(header) != _ACK_SIZE or header[1] != ACK or header[0] != 0x98:
        return None
    marker, checksum = _TAIL.unpack_from(header, _ACK.size)
    if marker != 0xCF or xxh3_64_intdigest(header[: _ACK.size]) != checksum:
        raise WireError("the checksum of an ACK is wrong")
    return _decode_ack(header)


def extents_array(extents: Frame) -> Extents:
    """The packed extents of a batch as a structured array, without a copy."""
    return np.frombuffer(extents, dtype=EXTENT)


def unpack_extents(extents: Frame, payload_length: int, sizes: Sequence[int]) -> list[Extent]:
    """The extents of a batch as tuples, each looked at once: all that follows works on this list.

    WireError unless each has a known kind, lies on a volume of ``sizes`` and has its bytes in the payload. NumPy would
    win only above some hundred extents a batch, and whoever writes them needs the tuples anyway.
    """
    unpacked: list[Extent] = list(EXTENT_STRUCT.iter_unpack(extents))
    for offset, length, position, volume, kind, _, _ in unpacked:
        if (volume >= len(sizes) or kind > DISCARD or not length or offset + length > sizes[volume]
                or (kind == WRITE and position + length > payload_length)):
            raise _bad_extent(offset, length, position, volume, kind, payload_length, sizes)
    return unpacked


def _bad_extent(
    offset: int, length: int, position: int, volume: int, kind: int, payload_length: int, sizes: Sequence[int]
) -> WireError:
    where = f"of {sizes[volume]} bytes" if volume < len(sizes) else "which does not exist"
    return WireError(f"an extent of a batch cannot be: kind {kind}, {length} bytes at {offset} of volume {volume} "
                     f"{where}, at {position} of a payload of {payload_length} bytes")


def pack_ranges(ranges: Sequence[tuple[int, int, int]]) -> bytes:
    """Packed ``RANGE``s of (volume, offset, length); at most ``limits.MAX_BATCH_EXTENTS`` fit into a message."""
    array = np.zeros(len(ranges), dtype=RANGE)
    for name, values in zip(("volume", "offset", "length"), zip(*ranges, strict=True), strict=False):
        array[name] = values
    return array.tobytes()


def unpack_ranges(ranges: bytes, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """(volume, offset, length) of packed ``RANGE``s; WireError unless each lies on a volume."""
    array = np.frombuffer(ranges, dtype=RANGE)
    found = list(zip(array["volume"].tolist(), array["offset"].tolist(), array["length"].tolist(), strict=True))
    for volume, offset, length in found:
        if volume >= len(sizes) or not length or offset + length > sizes[volume]:
            raise WireError(f"a WELCOME tells of {length} bytes at {offset} of volume {volume}")
    return found


def check_questions(questions: bytes, sizes: Sequence[int]) -> None:
    """WireError unless every range of a VERIFY lies on a volume."""
    array = np.frombuffer(questions, dtype=QUESTION)
    for offset, length, volume, _, _ in array.tolist():
        if volume >= len(sizes) or not length or offset + length > sizes[volume]:
            raise WireError(f"a VERIFY asks for {length} bytes at {offset} of volume {volume}")
