"""ZeroMQ's wire protocol: whatever way the bytes come in, and whoever holds frames for how long, messages stay what
they were; what is no ZMTP is refused at once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import zmtp
from common.zmtp import GREETING_SIZE, Inbox, ZmtpError

LIMIT = 3 << 20
SIZES = st.sampled_from([0, 1, 2, 254, 255, 256, 4096, 65536, 70_000, 262_144, 1 << 20])


def encoded(message: list[bytes]) -> bytes:
    """A message as RFC 37 has it on the wire, written down once more and without the module's help."""
    wire = b""
    for number, frame in enumerate(message, 1):
        flags = 1 if number < len(message) else 0
        wire += bytes((flags, len(frame))) if len(frame) < 256 else bytes((flags | 2,)) + len(frame).to_bytes(8, "big")
        wire += frame
    return wire


def feed(inbox: Inbox, data: bytes) -> list[list[memoryview]]:
    """Give ``data`` to the inbox as a socket would: as much as there is room for at a time."""
    messages = []
    while data:
        room = inbox.room()
        count = min(len(room), len(data))
        room[:count] = data[:count]
        del room
        messages += inbox.received(count)
        data = data[count:]
    return messages


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(SIZES, min_size=1, max_size=3), max_size=12), st.integers(0, 1 << 32))
def test_frames_survive_any_cut_of_the_stream(shapes: list[list[int]], seed: int) -> None:
    chance = random.Random(seed)
    sent = [[chance.randbytes(size) for size in shape] for shape in shapes]
    stream = zmtp.greeting() + zmtp.ready(b"DEALER") + b"".join(map(encoded, sent))
    inbox = Inbox(LIMIT)
    got: list[list[bytes]] = []
    held: list[tuple[list[memoryview], int]] = []
    while stream:
        cut = chance.choice([1, 2, 9, 64, 300, 70_000, 1 << 20])
        for message in feed(inbox, stream[:cut]):
            got.append([bytes(frame) for frame in message])
            if chance.random() < 0.5:
                held.append((message, len(got) - 1))
        stream = stream[cut:]
        if held and chance.random() < 0.3:
            message, index = held.pop(chance.randrange(len(held)))
            assert [bytes(frame) for frame in message] == sent[index]
    assert got == sent
    for message, index in held:
        assert [bytes(frame) for frame in message] == sent[index]
    assert zmtp.peer_type(inbox.commands[0]) == b"DEALER"


def test_what_is_done_with_at_once_comes_into_the_same_memory() -> None:
    inbox = Inbox(LIMIT)
    feed(inbox, zmtp.greeting())
    first = inbox.room().obj
    for _ in range(100):
        del feed(inbox, encoded([b"header", bytes(100_000)]))[:]
    assert inbox.room().obj is first
    kept = feed(inbox, encoded([b"header", bytes(250_000)]))
    assert inbox.room().obj is not first
    del kept


def test_our_encoding_is_the_standard_s() -> None:
    for size in (0, 255, 256, 70_000):
        frame = bytes(size)
        assert zmtp.prefix(size) + frame == encoded([frame])
        assert zmtp.prefix(size, zmtp.MORE) + frame + zmtp.prefix(1) + b"x" == encoded([frame, b"x"])


def greeting(**changes: bytes) -> bytes:
    fields = {"signature": b"\xff" + bytes(8) + b"\x7f", "version": b"\3\0", "mechanism": b"NULL".ljust(20, b"\0")}
    return b"".join((fields | changes).values()) + bytes(32)


@pytest.mark.parametrize(
    ("wire", "sentence"),
    [
        (b"GET / HTTP/1.1", "does not speak"),
        (b"\xff" + bytes(9), "does not speak"),
        (greeting(version=b"\1\0"), "version 1"),
        (greeting(mechanism=b"CURVE".ljust(20, b"\0")), "CURVE"),
        (greeting() + b"\x08\0", "flags"),
        (greeting() + b"\x05\0", "flags"),
        (greeting() + b"\2" + (LIMIT + 1).to_bytes(8, "big"), "too long"),
        (greeting() + b"\6" + (1 << 62).to_bytes(8, "big"), "too long"),
        (greeting() + b"\1\0" * 9, "frames"),
    ],
)
def test_nonsense_is_refused(wire: bytes, sentence: str) -> None:
    with pytest.raises(ZmtpError, match=sentence):
        feed(Inbox(LIMIT), wire)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x05READ", b"\x05ERROR\x03no!", b"\x05READY", b"\x05READY\x0bSocket-Type\0\0\0\xffROUTER", b"\x04PING\0\0"],
)
def test_a_handshake_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(ZmtpError):
        zmtp.peer_type(memoryview(content))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_taken_or_refused(data: bytes, greeted: bool) -> None:
    inbox = Inbox(LIMIT)
    try:
        feed(inbox, (greeting() if greeted else b"") + data)
        assert greeted or len(data) < GREETING_SIZE or data[0] == 0xFF
        for content in inbox.commands:
            zmtp.peer_type(content)
    except ZmtpError:
        pass
