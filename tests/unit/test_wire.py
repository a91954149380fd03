"""The replication messages: every one survives a round trip, and nothing else is accepted."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import limits, wire
from common.errors import WireError
from common.generation import Generation, Standing

STANDING = Standing("pair", "a", "primary", (Generation(2**64 - 1, 1, "a"), Generation(5, 2, "b")), True, 5, 6, 7)


def extent(offset: int, length: int, position: int = 0, volume: int = 0, kind: int = 0) -> bytes:
    return wire.EXTENT_STRUCT.pack(offset, length, position, volume, kind, 0, 0)


SAMPLES: list[wire.Message] = [
    wire.Hello(1, 0, wire.PROTOCOL_VERSION, 2**64 - 1, 3, (("root", 2**40), ("data", 512)), STANDING),
    wire.Welcome(1, 0, 1, 2, 3, 4, 2, 1, 9, 10, 100, 4096, True, False, STANDING, b"", (1 << 40, 5)),
    wire.Refuse(1, 0, "pair", "the primary belongs to another pair"),
    wire.Batch(1, 2, wire.FLUSH, extent(0, 3), memoryview(b"abc")),
    wire.Batch(2**64 - 1, 2**64 - 1, 0, extent(0, 4096, kind=1) * 20, memoryview(b"")),
    wire.Batch(1, 3, wire.FLUSH, b"", memoryview(b"")),
    wire.Checkpoint(1, 4, 5),
    wire.Ack(1, 1, 9, 8, 7, 100),
    wire.Checkpointed(1, 2, 5, 4, 0.001),
    wire.Pressure(1, 3, 90, 100),
    wire.Ping(1, 0, 1.5),
    wire.Pong(1, 0, 1.5),
    wire.Bye(1, 0, "stopped"),
    wire.Resync(1, 5, 2, False, True),
    wire.Synced(1, 6, STANDING.history),
    wire.Verify(1, 7, b"q" * 48),
    wire.Verified(1, 4, 7, b"\0\1"),
    wire.Failed(1, 5, "apply", 3, 5, "the disk gave an I/O error"),
    wire.Resize(1, 8, (1 << 40, 5), True),
    wire.Resized(1, 6, 8, (5,), "side b's disk is too small"),
    wire.Ask(1, 0, STANDING.history),
    wire.Told(1, 0, STANDING),
]
IDS = [f"{index}-{type(sample).__name__}" for index, sample in enumerate(SAMPLES)]


@pytest.mark.parametrize("message", SAMPLES, ids=IDS)
def test_round_trip(message: wire.Message) -> None:
    frames = wire.encode(message)
    assert wire.decode(frames) == message
    assert wire.decode([memoryview(bytearray(frame)) for frame in frames]) == message
    decoded = msgpack.unpackb(bytes(frames[0]))
    assert decoded[1:3] == [message.session, message.sequence]
    assert (wire.ack_of(frames) == message) == isinstance(message, wire.Ack)


@pytest.mark.parametrize("message", SAMPLES, ids=IDS)
def test_every_flipped_bit_and_every_truncation_is_noticed(message: wire.Message) -> None:
    frames = [bytes(frame) for frame in wire.encode(message)]
    for number, frame in enumerate(frames):
        for index in range(len(frame)):
            for bit in range(8):
                damaged = bytearray(frame)
                damaged[index] ^= 1 << bit
                with pytest.raises(WireError):
                    wire.decode([*frames[:number], bytes(damaged), *frames[number + 1:]])
        for end in range(len(frame)):
            with pytest.raises(WireError):
                wire.decode([*frames[:number], frame[:end], *frames[number + 1:]])
        with pytest.raises(WireError):
            wire.decode([*frames[:number], frame + b"\0", *frames[number + 1:]])
    for odd in ([], frames * 3, [*frames, b""], [*frames[:1], b"other payload"]):
        with pytest.raises(WireError):
            wire.decode(odd)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=3))
def test_junk_is_only_ever_a_wire_error(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        wire.decode(frames)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2**63, 2**64 - 1) | st.floats() | st.text(max_size=5)
    | st.binary(max_size=50),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=10,
)


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(SAMPLES), st.data())
def test_a_sealed_message_with_wrong_fields_is_a_wire_error(message: wire.Message, data: st.DataObject) -> None:
    """A peer that computes checksums and means harm: fields replaced, dropped, added."""
    elements: list[Any] = msgpack.unpackb(bytes(wire.encode(message)[0]), strict_map_key=False)[:-1]
    for _ in range(data.draw(st.integers(1, 3))):
        verb = data.draw(st.sampled_from(["replace", "drop", "add"]))
        if verb == "replace" and elements:
            elements[data.draw(st.integers(0, len(elements) - 1))] = data.draw(ANYTHING)
        elif verb == "drop" and elements:
            del elements[data.draw(st.integers(0, len(elements) - 1))]
        else:
            elements.insert(data.draw(st.integers(0, len(elements))), data.draw(ANYTHING))
    try:
        decoded = wire.decode([wire.seal(elements)])
    except WireError:
        return
    # what still decodes is a well-formed message: it can be sent on
    assert wire.decode(wire.encode(decoded)) == decoded


def test_deeply_nested_and_huge_headers_are_refused() -> None:
    with pytest.raises(WireError):
        wire.decode([seal_raw(b"\x91" * 5000)])
    with pytest.raises(WireError):
        wire.decode([seal_raw(b"\xdd\xff\xff\xff\xff")])
    with pytest.raises(WireError, match="between"):
        wire.decode([bytes(limits.MAX_HEADER + 1)])
    with pytest.raises(WireError, match="payload"):
        wire.decode([bytes(100), bytes(limits.MAX_BATCH_PAYLOAD + 1)])
    with pytest.raises(WireError, match="only a batch"):
        wire.decode([seal_raw(bytes(wire.encode(SAMPLES[6])[0])[:-9], b"x"), b"x"])
    with pytest.raises(WireError, match="extents"):
        wire.decode([wire.encode_batch(1, 1, 0, b"x" * 25, 0)])
    with pytest.raises(WireError, match="cannot say"):
        wire.decode([wire.encode_ack(1, 1, 3, 4, 0, 0)])


def seal_raw(head: bytes, payload: bytes = b"") -> bytes:
    from xxhash import xxh3_64_intdigest

    return head + b"\xcf" + xxh3_64_intdigest(head, wire.payload_check(payload)).to_bytes(8, "big")


def test_a_hello_of_another_version_tells_its_version_whatever_follows() -> None:
    assert wire.decode([wire.seal([wire.HELLO, 5, 0, 99, "who", {"knows": 1}])]) == wire.Hello(5, 0, 99)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2100), st.integers(0, 2100), st.integers(0, 300),
                          st.integers(0, 4)), min_size=1, max_size=20), st.integers(0, 300))
def test_extents_are_checked_against_volumes_and_payload(
    rows: list[tuple[int, int, int, int, int]], payload: int
) -> None:
    sizes = (1000, 2000, 50)

    def good(row: tuple[int, int, int, int, int]) -> bool:
        volume, offset, length, position, kind = row
        return (volume < 3 and kind <= 2 and length > 0 and offset + length <= sizes[volume]
                and (kind != 0 or position + length <= payload))

    def verdict(extents: bytes) -> bool:
        try:
            wire.unpack_extents(extents, payload, sizes)
        except WireError:
            return False
        return True

    packed = b"".join(extent(o, n, p, v, k) for v, o, n, p, k in rows)
    assert verdict(packed) == all(map(good, rows))


def test_extents_at_the_end_of_the_number_range_do_not_wrap() -> None:
    huge = extent(2**64 - 1, 2**32 - 1, 2**32 - 1)
    for count in (1, 9):
        with pytest.raises(WireError, match="volume 0 of 1000 bytes"):
            wire.unpack_extents(extent(0, 1, kind=1) * (count - 1) + huge, 10, (1000,))
    with pytest.raises(WireError, match="does not exist"):
        wire.unpack_extents(extent(0, 1, volume=7), 10, (1000,))


def test_questions_are_checked() -> None:
    array = np.zeros(2, dtype=wire.QUESTION)
    array["length"] = 10
    wire.check_questions(array.tobytes(), (1000,))
    for field, value in (("volume", 1), ("offset", 991), ("length", 0)):
        bad = array.copy()
        bad[field][1] = value
        with pytest.raises(WireError, match="VERIFY"):
            wire.check_questions(bad.tobytes(), (1000,))


def test_long_sentences_are_cut_not_refused() -> None:
    decoded = wire.decode(wire.encode(wire.Bye(1, 0, "x" * 10_000)))
    assert isinstance(decoded, wire.Bye)
    assert len(decoded.sentence) == 4096


def test_random_bytes_with_good_checksums() -> None:
    rng = random.Random(7)
    for _ in range(3000):
        head = bytearray(bytes(wire.encode(rng.choice(SAMPLES))[0])[:-9])
        for _ in range(rng.randint(1, 4)):
            head[rng.randrange(len(head))] = rng.randrange(256)
        try:
            decoded = wire.decode([seal_raw(bytes(head))])
        except WireError:
            continue
        if isinstance(decoded, wire.Batch):
            try:
                wire.unpack_extents(decoded.extents, len(decoded.payload), (10_000,))
            except WireError:
                continue
