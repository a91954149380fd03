"""Requests: every kind, every error value, any cut of the stream, and junk."""

from __future__ import annotations

import errno
import random
import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import batch, limits, nbd
from common.nbd_transmission import (
    HEADER,
    MAX_DESCRIPTORS,
    Transmission,
    batch_replies,
    block_status_reply,
    empty_reply,
    errno_reply,
    error_reply,
)

SIZE = 1 << 20
SPACE = 2 << 20
GIB = 1 << 30


def request(
    kind: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: bytes = b"cookie!!",
    payload: bytes | None = None,
) -> bytes:
    header = struct.pack(">IHH8sQI", nbd.NBD_REQUEST_MAGIC, flags, kind, cookie, offset, length)
    if kind == nbd.NBD_CMD_WRITE and payload is None:
        payload = bytes(length)
    return header + (payload or b"")


def transmission(size: int = SIZE, *, read_only: bool = False, structured: bool = True) -> Transmission:
    return Transmission(size, read_only=read_only, structured=structured, allocation=structured, reply_space=SPACE)


def parse(data: bytes, parser: Transmission | None = None) -> Transmission:
    """A parser that was fed ``data`` and used all of it in one go."""
    parser = parser or transmission()
    assert parser.parse(memoryview(data), 0, len(data)) == len(data)
    return parser


def refusal(data: bytes, *, read_only: bool = False, structured: bool = True, size: int = SIZE) -> int:
    """The error value with which a request alone is refused."""
    parser = parse(data, transmission(size, read_only=read_only, structured=structured))
    assert not parser.operations
    assert not parser.reads
    assert parser.command is None
    assert parser.breach is None
    (reply,) = parser.refusals
    if structured:
        magic, flags, kind, cookie, length, error, said = struct.unpack_from(">IHH8sIIH", reply)
        assert (magic, flags, kind, cookie) == (0x668E33EF, 1, 0x8001, b"cookie!!")
        assert length == len(reply) - 20 == 6 + said
        assert reply[26:].decode()
        assert isinstance(error, int)
        return error
    magic, error, cookie = struct.unpack(">II8s", reply)
    assert (magic, cookie) == (0x67446698, b"cookie!!")
    assert isinstance(error, int)
    return error


READ, WRITE, DISC, FLUSH = nbd.NBD_CMD_READ, nbd.NBD_CMD_WRITE, nbd.NBD_CMD_DISC, nbd.NBD_CMD_FLUSH
TRIM, CACHE, ZEROES, STATUS = nbd.NBD_CMD_TRIM, nbd.NBD_CMD_CACHE, nbd.NBD_CMD_WRITE_ZEROES, nbd.NBD_CMD_BLOCK_STATUS
FUA, NO_HOLE, DF, REQ_ONE, FAST = 1, 2, 4, 8, 16
BIG = limits.MAX_PAYLOAD + 1


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        # beyond the end: ENOSPC for writing commands, EINVAL for the others
        (request(WRITE, SIZE - 1, 2), nbd.NBD_ENOSPC),
        (request(WRITE, SIZE, 1), nbd.NBD_ENOSPC),
        (request(WRITE, 2**64 - 1, 4096), nbd.NBD_ENOSPC),
        (request(ZEROES, SIZE - 1, 2), nbd.NBD_ENOSPC),
        (request(ZEROES, 2**64 - 1, 2**32 - 1), nbd.NBD_ENOSPC),
        (request(READ, SIZE - 1, 2), nbd.NBD_EINVAL),
        (request(READ, 2**64 - 1, 2**32 - 1), nbd.NBD_EINVAL),
        (request(TRIM, SIZE - 1, 2), nbd.NBD_EINVAL),
        (request(CACHE, SIZE - 1, 2), nbd.NBD_EINVAL),
        (request(STATUS, SIZE - 1, 2), nbd.NBD_EINVAL),
        (request(READ, SIZE + 1, 0), nbd.NBD_EINVAL),
        # flags that do not apply
        (request(READ, 0, 1, flags=NO_HOLE), nbd.NBD_EINVAL),
        (request(READ, 0, 1, flags=FAST), nbd.NBD_EINVAL),
        (request(READ, 0, 1, flags=1 << 5), nbd.NBD_EINVAL),
        (request(WRITE, 0, 1, flags=DF), nbd.NBD_EINVAL),
        (request(WRITE, 0, 1, flags=1 << 15), nbd.NBD_EINVAL),
        (request(FLUSH, flags=DF), nbd.NBD_EINVAL),
        (request(TRIM, 0, 1, flags=NO_HOLE), nbd.NBD_EINVAL),
        (request(CACHE, 0, 1, flags=REQ_ONE), nbd.NBD_EINVAL),
        (request(ZEROES, 0, 1, flags=DF), nbd.NBD_EINVAL),
        (request(STATUS, 0, 1, flags=NO_HOLE), nbd.NBD_EINVAL),
        # reserved fields, unknown commands, empty status
        (request(FLUSH, 1, 0), nbd.NBD_EINVAL),
        (request(FLUSH, 0, 1), nbd.NBD_EINVAL),
        (request(8), nbd.NBD_EINVAL),
        (request(65535, 7, 7, flags=0xFFFF), nbd.NBD_EINVAL),
        (request(STATUS, 0, 0), nbd.NBD_EINVAL),
    ],
)
def test_refusals(data: bytes, error: int, structured: bool) -> None:
    assert refusal(data, structured=structured) == error


@pytest.mark.parametrize("kind", [WRITE, TRIM, ZEROES])
def test_writing_to_a_read_only_export(kind: int) -> None:
    assert refusal(request(kind, 0, 4096), read_only=True) == nbd.NBD_EPERM
    assert refusal(request(kind, SIZE, 4096), read_only=True) == nbd.NBD_EPERM
    assert refusal(request(kind, 0, 0), read_only=True) == nbd.NBD_EPERM


def test_reading_too_much_at_once() -> None:
    assert refusal(request(READ, 0, BIG), size=GIB) == nbd.NBD_EOVERFLOW
    assert refusal(request(READ, 0, BIG, flags=DF), size=GIB) == nbd.NBD_EOVERFLOW
    assert refusal(request(READ, 0, BIG), size=GIB, structured=False) == nbd.NBD_EINVAL


def test_structured_features_need_their_negotiation() -> None:
    assert refusal(request(READ, 0, 1, flags=DF), structured=False) == nbd.NBD_EINVAL
    assert refusal(request(STATUS, 0, 1), structured=False) == nbd.NBD_EINVAL


def test_the_largest_payload_is_taken() -> None:
    parser = parse(request(WRITE, 5, limits.MAX_PAYLOAD), transmission(GIB))
    assert parser.operations == [(batch.WRITE, 5, limits.MAX_PAYLOAD, HEADER, 0)]
    parser = parse(request(READ, 5, limits.MAX_PAYLOAD), transmission(GIB))
    assert parser.reads == [(b"cookie!!", 5, limits.MAX_PAYLOAD)]


def test_zeroes_and_trims_may_be_longer_than_any_payload() -> None:
    data = request(ZEROES, 0, 2**32 - 1, flags=NO_HOLE | FAST | FUA) + request(TRIM, 1, 2**32 - 1)
    parser = parse(data, transmission(2**33))
    flags = batch.FUA | batch.NO_HOLE | batch.FAST_ZERO
    assert parser.operations == [(batch.ZERO, 0, 2**32 - 1, 0, flags), (batch.DISCARD, 1, 2**32 - 1, 0, 0)]
    assert parser.fua
    assert parser.mixed
    assert (parser.span_start, parser.span_end) == (0, 0)


def test_a_payload_that_is_too_long_is_passed_over_and_refused_when_all_of_it_has_come() -> None:
    parser = transmission(8 * GIB)
    header = request(WRITE, 0, 2**32 - 1, payload=b"")
    assert parser.parse(memoryview(header), 0, HEADER) == HEADER
    assert not parser.refusals
    left, piece = 2**32 - 1, memoryview(bytearray(1 << 28))
    while left > len(piece):
        assert parser.parse(piece, 0, len(piece)) == len(piece)
        assert not parser.refusals
        left -= len(piece)
    tail = memoryview(bytes(left) + request(READ, 0, 1))
    assert parser.parse(tail, 0, len(tail)) == len(tail)
    (reply,) = parser.refusals
    assert struct.unpack_from(">I", reply, 20) == (nbd.NBD_EINVAL,)
    assert parser.reads == [(b"cookie!!", 0, 1)]


@pytest.mark.parametrize("flags", [0, FUA, DF, FUA | DF])
def test_reads_with_flags(flags: int) -> None:
    assert parse(request(READ, 7, 9, flags=flags)).reads == [(b"cookie!!", 7, 9)]


@pytest.mark.parametrize(
    ("kind", "flags"), [(FLUSH, 0), (FLUSH, FUA), (DISC, 0), (CACHE, 0), (CACHE, FUA), (STATUS, 0), (STATUS, REQ_ONE)]
)
def test_commands_end_a_parse(kind: int, flags: int) -> None:
    length = 0 if kind in (FLUSH, DISC) else 512
    data = request(WRITE, 0, 3) + request(kind, 0, length, flags=flags) + request(WRITE, 9, 3)
    parser = transmission()
    view = memoryview(data)
    after = parser.parse(view, 0, len(view))
    assert after == len(data) - HEADER - 3
    assert parser.command == (kind, b"cookie!!", 0, length, flags)
    assert [operation[1] for operation in parser.operations] == [0]
    assert parser.parse(view, after, len(view)) == len(data)
    assert parser.command is None
    assert [operation[1] for operation in parser.operations] == [9]


@pytest.mark.parametrize("kind", [READ, WRITE, TRIM, CACHE, ZEROES])
def test_empty_requests_succeed(kind: int) -> None:
    parser = parse(request(kind, SIZE, 0))
    assert parser.refusals == [empty_reply(b"cookie!!", kind, True)]
    assert not parser.operations
    assert not parser.reads
    assert parser.command is None


def test_fua_is_seen_and_the_span_holds_all_payloads() -> None:
    data = (
        request(READ, 0, 1) + request(WRITE, 0, 5) + request(ZEROES, 4, 4) + request(WRITE, 9, 7, flags=FUA)
        + request(READ, 1, 1) + request(WRITE, 50, 2) + request(TRIM, 0, 1)
    )  # fmt: skip
    parser = parse(data)
    positions = [position for kind, _, _, position, _ in parser.operations if kind == batch.WRITE]
    assert positions == [2 * HEADER, 4 * HEADER + 5, 6 * HEADER + 12]
    assert (parser.span_start, parser.span_end) == (positions[0], positions[2] + 2)
    assert parser.fua
    assert [flags for *_, flags in parser.operations] == [0, 0, batch.FUA, 0, 0]


def test_a_batch_has_a_bound() -> None:
    data = memoryview(request(WRITE, 0, 1) * (limits.MAX_BATCH_EXTENTS + 1))
    parser = transmission()
    after = parser.parse(data, 0, len(data))
    assert len(parser.operations) == limits.MAX_BATCH_EXTENTS
    assert parser.parse(data, after, len(data)) == len(data)
    assert len(parser.operations) == 1
    data = memoryview(request(ZEROES, 0, 1) * (limits.MAX_BATCH_EXTENTS + 1))
    assert parser.parse(data, 0, len(data)) == len(data) - HEADER


def test_read_replies_of_one_parse_have_a_bound() -> None:
    data = memoryview(request(READ, 0, SIZE // 2) * 9)
    parser = transmission()
    position = turns = 0
    while position < len(data):
        position = parser.parse(data, position, len(data))
        turns += 1
        assert sum(length + HEADER for _, _, length in parser.reads) <= SPACE
    assert turns == 3
    data = memoryview(request(READ, 0, 8 << 20) * 2)
    parser = transmission(GIB)
    assert parser.parse(data, 0, len(data)) == HEADER, "a read larger than the space goes alone"


@pytest.mark.parametrize("magic", [0, 0x12560953, 0x67446698, 0x21E41C71])
def test_bytes_that_are_no_request_are_a_breach_and_what_came_before_counts(magic: int) -> None:
    data = memoryview(request(WRITE, 0, 4) + struct.pack(">I", magic) + bytes(24) + request(WRITE, 0, 4))
    parser = transmission()
    assert parser.parse(data, 0, len(data)) == HEADER + 4
    assert len(parser.operations) == 1
    assert parser.breach is not None
    assert f"{magic:#010x}" in parser.breach


def test_needed_tells_how_much_a_partial_write_needs() -> None:
    data = memoryview(request(WRITE, 0, 5000))
    parser = transmission()
    for end in range(HEADER, HEADER + 5000, 97):
        assert parser.parse(data, 0, end) == 0
        assert parser.needed == HEADER + 5000
    assert parser.parse(data, 0, HEADER - 1) == 0
    assert parser.needed == 0


# Replies


def test_batch_replies() -> None:
    operations = [(batch.WRITE, 0, 1, 0, 0), (batch.ZERO, 0, 1, 0, batch.FAST_ZERO), (batch.WRITE, 0, 1, 0, 0)]
    cookies = [b"aaaaaaaa", b"bbbbbbbb", b"cccccccc"]
    fine = struct.pack(">II", 0x67446698, 0)
    assert batch_replies(cookies, operations, None, True) == b"".join(fine + cookie for cookie in cookies)
    mixed = batch_replies(cookies, operations, {1: errno.EOPNOTSUPP, 2: errno.EDQUOT}, False)
    assert mixed == fine + cookies[0] + struct.pack(">II8sII8s", 0x67446698, 95, cookies[1], 0x67446698, 28, cookies[2])


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EPERM, 1), (errno.EROFS, 1), (errno.EACCES, 1), (errno.EIO, 5), (errno.ENOMEM, 12), (errno.EINVAL, 22),
        (errno.ENOSPC, 28), (errno.EDQUOT, 28), (errno.EFBIG, 28), (errno.EOVERFLOW, 22), (errno.EOPNOTSUPP, 22),
        (errno.ESHUTDOWN, 108), (errno.ENOENT, 5), (None, 5),
    ],
)  # fmt: skip
def test_errnos_become_error_values_of_the_protocol(number: int | None, error: int) -> None:
    assert struct.unpack(">II8s", errno_reply(b"cookie!!", number, False)) == (0x67446698, error, b"cookie!!")
    assert struct.unpack_from(">I", errno_reply(b"cookie!!", number, True), 20) == (error,)


def test_not_supported_may_answer_a_fast_zero_only() -> None:
    assert struct.unpack_from(">I", errno_reply(b"cookie!!", errno.ENOTSUP, False, fast_zero=True), 4) == (95,)


def test_messages_are_cut_at_the_longest_string() -> None:
    reply = error_reply(b"cookie!!", 5, "x" * 10000, True)
    assert struct.unpack_from(">IIH", reply, 16) == (4096 + 6, 5, 4096)


def status(reply: bytes) -> list[tuple[int, int]]:
    magic, flags, kind, cookie, length, context = struct.unpack_from(">IHH8sII", reply)
    assert (magic, flags, kind, cookie, context) == (0x668E33EF, 1, 5, b"cookie!!", 1)
    assert length == len(reply) - 20
    return [(extent, state) for extent, state in struct.iter_unpack(">II", reply[24:])]


@pytest.mark.parametrize(
    ("length", "one", "extents", "told"),
    [
        (100, False, [(100, 0)], [(100, 0)]),
        (100, False, [(10, 0), (20, 0), (30, 3), (40, 0)], [(30, 0), (30, 3), (40, 0)]),
        (100, False, [(10, 3), (1 << 40, 0)], [(10, 3), (90, 0)]),
        (100, False, [(0, 0), (100, 3)], [(100, 3)]),
        (100, False, [(30, 3)], [(30, 3)]),
        (100, True, [(10, 0), (20, 0), (30, 3)], [(30, 0)]),
        (100, True, [(1 << 40, 3)], [(100, 3)]),
        (2**32 - 1, False, [(1 << 40, 3)], [(2**32 - 1, 3)]),
    ],
)
def test_block_status(length: int, one: bool, extents: list[tuple[int, int]], told: list[tuple[int, int]]) -> None:
    assert status(block_status_reply(b"cookie!!", length, one, extents)) == told


def test_block_status_has_a_bound() -> None:
    extents = [(512, index & 1) for index in range(MAX_DESCRIPTORS + 10)]
    assert len(status(block_status_reply(b"cookie!!", 1 << 30, False, extents))) == MAX_DESCRIPTORS


# Any cut of the stream, and junk


@dataclass
class Seen:
    """What came out of a parser, independent of how its input was cut."""

    writes: list[tuple[bytes, int, int, bytes, int]] = field(default_factory=list)
    reads: list[tuple[bytes, int, int]] = field(default_factory=list)
    refusals: list[bytes] = field(default_factory=list)
    commands: list[tuple[int, bytes, int, int, int]] = field(default_factory=list)
    breach: bool = False


def feed(data: bytes, cuts: list[int], *, read_only: bool = False) -> tuple[Seen, int]:
    """Feed ``data`` in pieces that end at ``cuts``; what was seen and how many bytes were used."""
    parser, seen, view = transmission(read_only=read_only), Seen(), memoryview(data)
    position = 0
    for end in [*cuts, len(data)]:
        while True:
            after = parser.parse(view, position, end)
            for cookie, (kind, offset, length, place, flags) in zip(parser.cookies, parser.operations, strict=True):
                assert length
                assert offset + length <= SIZE
                payload = b""
                if kind == batch.WRITE:
                    assert parser.span_start <= place <= place + length <= parser.span_end <= after
                    payload = bytes(view[place : place + length])
                seen.writes.append((cookie, kind, offset, payload, flags))
            seen.reads += parser.reads
            seen.refusals += parser.refusals
            if parser.command is not None:
                seen.commands.append(parser.command)
            if parser.breach:
                seen.breach = True
                return seen, after
            if after == position:
                break
            assert position < after <= end
            position = after
    return seen, position


kinds = st.sampled_from([READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS, 99])
edges = st.one_of(st.integers(0, 40), st.integers(SIZE - 40, SIZE + 5), st.just(2**64 - 1))
requests = st.builds(
    lambda kind, offset, length, flags, cookie: request(kind, offset, length, flags=flags, cookie=cookie),
    kinds,
    edges,
    st.integers(0, 50),
    st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32]),
    st.binary(min_size=8, max_size=8),
)
streams = st.lists(requests, max_size=30).map(b"".join)


@settings(max_examples=150, deadline=None)
@given(streams, st.integers(0), st.booleans())
def test_pieces_of_any_size_say_the_same(data: bytes, seed: int, read_only: bool) -> None:
    whole, used = feed(data, [], read_only=read_only)
    assert used == len(data)
    cuts = sorted(random.Random(seed).sample(range(len(data)), min(len(data), 60)))
    pieces, used = feed(data, cuts, read_only=read_only)
    assert used == len(data)
    assert pieces == whole


@settings(max_examples=30, deadline=None)
@given(streams)
def test_byte_by_byte(data: bytes) -> None:
    assert feed(data, list(range(len(data)))) == feed(data, [])


@settings(max_examples=200, deadline=None)
@given(streams, st.binary(max_size=200))
def test_junk_behind_requests(data: bytes, junk: bytes) -> None:
    expected, _ = feed(data, [])
    seen, used = feed(data + junk, [])
    assert used >= len(data)
    assert seen.writes[: len(expected.writes)] == expected.writes
    if len(junk) >= HEADER and not junk.startswith(b"\x25\x60\x95\x13"):
        assert seen.breach
        assert used == len(data)


@settings(max_examples=100, deadline=None)
@given(streams, st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4))
def test_flipped_bytes_are_requests_or_a_breach(data: bytes, flips: list[tuple[int, int]]) -> None:
    broken = bytearray(data)
    for place, value in flips:
        if broken:
            broken[place % len(broken)] = value
    _, used = feed(bytes(broken), [])
    assert 0 <= used <= len(broken)
