"""A peer that seals its messages well and fills them with anything: both session cores answer with effects they know.

Neither may raise, and neither may be led to a state out of which a well-behaved peer does not lead it again.
"""

from __future__ import annotations

import random
import struct
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest
import zstandard
from xxhash import xxh3_64_intdigest

from common import wire
from common.errors import WireError
from tests.unit.test_session import PEER, batch, established, hello, in_session, kinds, welcome
from tests.unit.test_wire import SAMPLES

ROUNDS = [pytest.param(40, id="short"), pytest.param(3000, id="long", marks=pytest.mark.soak)]
HEADERS = (
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff\xa1a", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\x91" * 500_000, b"\x81\xa1a" * 200_000, b"\x94\x81\x90\xc0\x01\x02", b"\x94\x81\x01\xc0\x01\x02",
    b"\xc7\x0c\xff" + b"\xff" * 12, b"\xc9\xff\xff\xff\xff\x01", b"\x95\xa2\xff\xfe\x01\x02\x03", b"\xc1" * 50,
    b"\xdc\xff\xff" + b"\xc0" * 65535, b"\xdd\x00\x0f\x00\x00" + b"\xc0" * 0xF0000, b"\x98\x07", b"\x97\x03",
    b"\x96\x03",
)  # fmt: skip
"""What msgpack can be asked for: more elements and bytes than there are, depth, keys that are none, extensions."""
NUMBERS = (0, 1, 2, 3, 5, 77, 512, 4096, 2**16, 2**31, 2**32 - 1, 2**32, 2**40, 2**63, 2**64 - 1)
def odd(chance: random.Random, value: Any) -> Any:
    """Another value of the same type."""
    kind: Any = type(value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice(NUMBERS)
    if isinstance(value, float):
        return chance.choice((0.0, -1.0, float("inf"), float("nan"), 1e300))
    if isinstance(value, str):
        return chance.choice(("", "x" * 999, "rejoin", "\0", value))
    if isinstance(value, bytes):
        return chance.choice((b"", value * 3, chance.randbytes(48), value[:-1]))
    if isinstance(value, memoryview):
        return memoryview(chance.randbytes(chance.choice((0, 1, 512, 5000))))
    if hasattr(kind, "_fields"):
        names = [name for name in kind._fields if chance.random() < 0.3]
        return kind._replace(value, **{name: odd(chance, getattr(value, name)) for name in names})
    if isinstance(value, tuple):
        return chance.choice((value, (), value * 2, tuple(odd(chance, item) for item in value)))
    return value


def message(chance: random.Random, session: int, sequence: int) -> wire.Frames | None:
    """A message for ``session``, well sealed; None where not even that can be."""
    sample: Any = chance.choice(SAMPLES)
    plain = hasattr(sample, "_fields")
    known = sample._fields if plain else [field.name for field in fields(sample)]
    changes = {name: odd(chance, getattr(sample, name)) for name in known if chance.random() < 0.4}
    changes["session"] = chance.choice((session, session, session, session, chance.choice(NUMBERS)))
    if chance.random() < 0.6:
        changes["sequence"] = sequence
    try:
        return wire.encode(sample._replace(**changes) if plain else replace(sample, **changes))
    except (WireError, struct.error, ValueError, OverflowError, TypeError, AssertionError, AttributeError):
        return None


def sealed(head: bytes) -> bytes:
    """A header frame of these bytes, its checksum right."""
    return head + struct.pack(">BQ", 0xCF, xxh3_64_intdigest(head))


@pytest.mark.parametrize("payload", [[], [b"x" * 100], [b""], [b"x", b"y"]], ids=["none", "one", "empty", "two"])
@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_is_sealed_and_no_message_is_refused(header: bytes, payload: list[bytes]) -> None:
    with pytest.raises(WireError) as caught:
        wire.decode([sealed(header), *payload])
    assert len(str(caught.value)) < 500
    session, other = in_session(), established()
    assert kinds(session.receive(b"other", [sealed(header), *payload], 0.0)) == []
    assert "Disconnected" in kinds(session.receive(PEER, [sealed(header), *payload], 0.0))
    assert other.receive([sealed(header), *payload], 0.0)


def test_every_field_of_every_message_with_values_of_every_type() -> None:
    values: tuple[object, ...] = (
        None, True, -1, 2**64 - 1, 1.5, float("nan"), "x", "x" * 70_000, b"", b"x" * 48, [], [[]], [[["x"]]], {},
        {"a": {}},
    )  # fmt: skip
    for sample in SAMPLES:
        if hasattr(sample, "_fields"):
            continue  # packed by hand; any of its bytes is flipped elsewhere
        elements = msgpack.unpackb(wire.encode(sample)[0])[:-1]
        for place in range(len(elements)):
            for value in values:
                head = msgpack.packb([*elements[:place], value, *elements[place + 1 :], 0])[:-1]
                frames = [sealed(head)]
                try:
                    message = wire.decode(frames)
                except WireError:
                    message = None
                in_session().receive(PEER, frames, 0.0)
                established().receive(frames, 0.0)
                assert message is None or isinstance(message, type(sample)) or place == 0


def test_what_a_stranger_compressed_is_not_expanded() -> None:
    extent = wire.EXTENT_STRUCT.pack(0, 4096, 0, 0, 0, 0, 0)
    small = zstandard.compress(bytes(1 << 20))
    session = in_session()
    frames = [bytes((0x97, wire.BATCH)) + extent + bytes(100), small]
    assert wire.is_compressed(frames)
    assert not session.receive(b"other", frames, 0.0)
    assert "Disconnected" in kinds(session.receive(PEER, frames, 0.0)), "the primary's own are looked at"


@pytest.mark.parametrize("rounds", ROUNDS)
def test_the_secondary_survives_any_primary(rounds: int) -> None:
    for seed in range(rounds):
        chance = random.Random(seed)
        session = in_session()
        for step in range(40):
            frames = message(chance, 1 << 32 | 1, chance.randrange(1, 4))
            if frames is not None:
                session.receive(chance.choice((PEER, PEER, b"other")), frames, step * 0.01)
        for deadline in range(20):
            session.handle_timer(1.0 + deadline)
        effects = session.receive(b"new", hello(number=2**31, instance=2), 100.0)
        assert "Connected" in kinds(effects) or "Refused" in kinds(effects), (seed, kinds(effects))


@pytest.mark.parametrize("rounds", ROUNDS)
def test_the_primary_survives_any_secondary(rounds: int) -> None:
    for seed in range(rounds):
        chance = random.Random(seed)
        session = established()
        extent = wire.EXTENT_STRUCT.pack(0, 512, 0, 0, 0, 0, 0)
        for step in range(40):
            if session.attached and session.window_open and chance.random() < 0.3:
                session.write(extent, memoryview(bytes(512)), 1, 0, None, step * 0.01)
            frames = message(chance, session._session, step)
            if frames is not None:
                session.receive(frames, step * 0.01)
        now = 1.0
        for _ in range(60):
            deadline = session.next_deadline()
            if deadline is None:
                break
            now = max(now, deadline)
            session.handle_timer(now)
        session.connect(now)
        effects = session.receive(welcome(session), now)
        assert effects, seed


def test_a_message_of_another_shape_is_none() -> None:
    chance = random.Random(1)
    session = in_session()
    for _ in range(2000):
        frames = [chance.randbytes(chance.randrange(200)) for _ in range(chance.randrange(4))]
        session.receive(PEER, frames, 0.0)
    good = [bytes(frame) for frame in batch(1)]
    for _ in range(2000):
        damaged = [bytearray(frame) for frame in good]
        frame = damaged[chance.randrange(len(damaged))]
        frame[chance.randrange(len(frame))] ^= 1 << chance.randrange(8)
        session.receive(b"other", [bytes(frame) for frame in damaged], 0.0)
    assert "Connected" in kinds(session.receive(PEER, hello(number=9), 1.0))
