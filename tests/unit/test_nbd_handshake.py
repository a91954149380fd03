"""Option haggling: every option with its replies, fed whole and byte by byte, and junk."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import limits, nbd
from common.errors import NbdError
from common.nbd_handshake import (
    MAX_OPTION,
    MAX_OUTPUT,
    ServerHandshake,
    State,
    preferred_block,
    transmission_flags,
)

BOTH = nbd.NBD_FLAG_C_FIXED_NEWSTYLE | nbd.NBD_FLAG_C_NO_ZEROES


@dataclass
class Disk:
    name: str = "disk"
    size: int = 1 << 30
    read_only: bool = False
    multi_conn: bool = True
    preferred_block: int = 4096


def exports() -> dict[str, Disk]:
    return {"disk": Disk(), "größe": Disk("größe", 12345, True, False, 100)}


def hello(flags: int = BOTH) -> bytes:
    return struct.pack(">I", flags)


def option(number: int, data: bytes = b"") -> bytes:
    return nbd.OPTION.pack(nbd.IHAVEOPT, number, len(data)) + data


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(">I", len(raw)) + raw


def info(name: str, *asked: int) -> bytes:
    return text(name) + struct.pack(f">H{len(asked)}H", len(asked), *asked)


def queries(name: str, *asked: str) -> bytes:
    return text(name) + struct.pack(">I", len(asked)) + b"".join(map(text, asked))


def talk(*messages: bytes) -> tuple[ServerHandshake, bytes]:
    """The handshake after ``messages``, and what it sent after the greeting."""
    handshake = ServerHandshake(exports(), "disk")
    handshake.take_output()
    data = b"".join(messages)
    used = handshake.receive(memoryview(data))
    assert used == len(data)
    return handshake, handshake.take_output()


def replies(output: bytes) -> list[tuple[int, int, bytes]]:
    """Option replies as (option, type, data)."""
    found = []
    while output:
        magic, number, kind, length = nbd.OPTION_REPLY.unpack_from(output)
        assert magic == nbd.NBD_REP_MAGIC
        found.append((number, kind, output[20 : 20 + length]))
        output = output[20 + length :]
    return found


def only(number: int, data: bytes = b"", *before: bytes) -> tuple[int, bytes]:
    """The type and data of the one reply to an option."""
    handshake, output = talk(hello(), *before, option(number, data))
    assert handshake.state is State.HAGGLING
    answered, kind, body = replies(output)[-1]
    assert answered == number
    return kind, body


def test_greeting() -> None:
    handshake = ServerHandshake(exports(), "disk")
    assert handshake.take_output() == b"NBDMAGICIHAVEOPT\x00\x03"
    assert handshake.take_output() == b""


@pytest.mark.parametrize("flags", [4, 1 << 31, BOTH | 8])
def test_unknown_client_flags_end_the_connection(flags: int) -> None:
    with pytest.raises(NbdError, match="client flags"):
        talk(hello(flags))


def test_an_option_without_its_magic_ends_the_connection() -> None:
    with pytest.raises(NbdError, match="IHAVEOPT"):
        talk(hello(), b"x" * 16)


@pytest.mark.parametrize(("flags", "zeroes"), [(BOTH, 0), (nbd.NBD_FLAG_C_FIXED_NEWSTYLE, 124), (0, 124)])
@pytest.mark.parametrize(("name", "found"), [(b"", "disk"), (b"disk", "disk"), ("größe".encode(), "größe")])
def test_export_name(flags: int, zeroes: int, name: bytes, found: str) -> None:
    handshake, output = talk(hello(flags), option(nbd.NBD_OPT_EXPORT_NAME, name))
    export = exports()[found]
    assert output == struct.pack(">QH", export.size, transmission_flags(export, False)) + bytes(zeroes)
    assert handshake.state is State.TRANSMISSION
    assert handshake.agreement is not None
    assert handshake.agreement.name == found
    assert not handshake.agreement.structured


@pytest.mark.parametrize("name", [b"other", b"\xff", b"disk\0", b"x" * 5000, b"x" * (MAX_OPTION + 1)])
def test_export_name_that_does_not_exist_ends_the_connection(name: bytes) -> None:
    with pytest.raises(NbdError):
        talk(hello(), option(nbd.NBD_OPT_EXPORT_NAME, name))


@pytest.mark.parametrize("data", [b"", b"ignored", bytes(MAX_OPTION + 5)])
def test_abort_is_acknowledged(data: bytes) -> None:
    handshake = ServerHandshake(exports(), "disk")
    handshake.take_output()
    handshake.receive(memoryview(hello() + option(nbd.NBD_OPT_ABORT, data)))
    assert replies(handshake.take_output()) == [(nbd.NBD_OPT_ABORT, nbd.NBD_REP_ACK, b"")]
    assert handshake.state is State.ENDED


def test_list() -> None:
    _, output = talk(hello(), option(nbd.NBD_OPT_LIST))
    assert replies(output) == [
        (nbd.NBD_OPT_LIST, nbd.NBD_REP_SERVER, text("disk")),
        (nbd.NBD_OPT_LIST, nbd.NBD_REP_SERVER, text("größe")),
        (nbd.NBD_OPT_LIST, nbd.NBD_REP_ACK, b""),
    ]


@pytest.mark.parametrize("number", [nbd.NBD_OPT_LIST, nbd.NBD_OPT_STRUCTURED_REPLY])
def test_options_without_data_refuse_data(number: int) -> None:
    assert only(number, b"x")[0] == nbd.NBD_REP_ERR_INVALID


@pytest.mark.parametrize("number", [0, 4, nbd.NBD_OPT_STARTTLS, 11, 12345, 1 << 31])
@pytest.mark.parametrize("data", [b"", b"some data", bytes(MAX_OPTION + 1)])
def test_unknown_options_and_tls_are_unsupported(number: int, data: bytes) -> None:
    handshake, output = talk(hello(), option(number, data), option(nbd.NBD_OPT_LIST))
    assert replies(output)[0] == (number, nbd.NBD_REP_ERR_UNSUP, b"")
    assert replies(output)[-1] == (nbd.NBD_OPT_LIST, nbd.NBD_REP_ACK, b"")
    assert handshake.state is State.HAGGLING


def test_known_option_with_too_much_data_is_skipped() -> None:
    _, output = talk(hello(), option(nbd.NBD_OPT_GO, bytes(MAX_OPTION + 1)), option(nbd.NBD_OPT_LIST))
    assert [kind for _, kind, _ in replies(output)] == [
        nbd.NBD_REP_ERR_TOO_BIG, nbd.NBD_REP_SERVER, nbd.NBD_REP_SERVER, nbd.NBD_REP_ACK,
    ]  # fmt: skip


@pytest.mark.parametrize("number", [nbd.NBD_OPT_INFO, nbd.NBD_OPT_GO])
def test_info_and_go_tell_what_is_asked(number: int) -> None:
    asked = (nbd.NBD_INFO_NAME, nbd.NBD_INFO_BLOCK_SIZE, nbd.NBD_INFO_DESCRIPTION, 999)
    handshake, output = talk(hello(), option(number, info("", *asked)))
    flags = transmission_flags(Disk(), False)
    assert replies(output) == [
        (number, nbd.NBD_REP_INFO, struct.pack(">HQH", nbd.NBD_INFO_EXPORT, 1 << 30, flags)),
        (number, nbd.NBD_REP_INFO, struct.pack(">H", nbd.NBD_INFO_NAME) + b"disk"),
        (number, nbd.NBD_REP_INFO, struct.pack(">HIII", nbd.NBD_INFO_BLOCK_SIZE, 1, 4096, limits.MAX_PAYLOAD)),
        (number, nbd.NBD_REP_ACK, b""),
    ]
    assert handshake.state is (State.TRANSMISSION if number == nbd.NBD_OPT_GO else State.HAGGLING)


def test_info_without_questions_tells_the_size() -> None:
    _, output = talk(hello(), option(nbd.NBD_OPT_INFO, info("größe")))
    assert [kind for _, kind, _ in replies(output)] == [nbd.NBD_REP_INFO, nbd.NBD_REP_ACK]


@pytest.mark.parametrize("number", [nbd.NBD_OPT_INFO, nbd.NBD_OPT_GO])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (info("other"), nbd.NBD_REP_ERR_UNKNOWN),
        (b"", nbd.NBD_REP_ERR_INVALID),
        (b"\0\0\0", nbd.NBD_REP_ERR_INVALID),
        (text("disk"), nbd.NBD_REP_ERR_INVALID),
        (text("disk") + b"\0", nbd.NBD_REP_ERR_INVALID),
        (text("disk") + b"\0\1", nbd.NBD_REP_ERR_INVALID),
        (info("disk") + b"\0", nbd.NBD_REP_ERR_INVALID),
        (struct.pack(">I", 1000) + b"disk\0\0", nbd.NBD_REP_ERR_INVALID),
        (struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0", nbd.NBD_REP_ERR_INVALID),
        (text(b"\xff\xfe") + b"\0\0", nbd.NBD_REP_ERR_INVALID),
        (text("a\0b") + b"\0\0", nbd.NBD_REP_ERR_INVALID),
        (info("x" * 4097), nbd.NBD_REP_ERR_INVALID),
    ],
)
def test_info_and_go_refuse(number: int, data: bytes, error: int) -> None:
    kind, message = only(number, data)
    assert kind == error
    assert message.decode()


def test_transmission_flags() -> None:
    flags = transmission_flags(Disk(), True)
    assert flags == 0b1101_1110_1101
    assert not transmission_flags(Disk(), False) & nbd.NBD_FLAG_SEND_DF
    assert not transmission_flags(Disk(multi_conn=False), True) & nbd.NBD_FLAG_CAN_MULTI_CONN
    locked = transmission_flags(Disk(read_only=True), True)
    assert locked & nbd.NBD_FLAG_READ_ONLY
    assert not locked & (nbd.NBD_FLAG_SEND_TRIM | nbd.NBD_FLAG_SEND_WRITE_ZEROES | nbd.NBD_FLAG_SEND_FAST_ZERO)


@pytest.mark.parametrize(
    ("wanted", "told"), [(1, 512), (512, 512), (4096, 4096), (5000, 4096), (1 << 20, 1 << 20), (1 << 40, 1 << 25)]
)
def test_preferred_block_keeps_to_the_specification(wanted: int, told: int) -> None:
    assert preferred_block(Disk(preferred_block=wanted)) == told


STRUCTURED = option(nbd.NBD_OPT_STRUCTURED_REPLY)
ALLOCATION = "base:allocation"


@pytest.mark.parametrize("number", [nbd.NBD_OPT_LIST_META_CONTEXT, nbd.NBD_OPT_SET_META_CONTEXT])
def test_contexts_need_structured_replies(number: int) -> None:
    assert only(number, queries("disk", ALLOCATION))[0] == nbd.NBD_REP_ERR_INVALID


@pytest.mark.parametrize(
    ("number", "asked", "found"),
    [
        (nbd.NBD_OPT_LIST_META_CONTEXT, (), True),
        (nbd.NBD_OPT_LIST_META_CONTEXT, ("base:",), True),
        (nbd.NBD_OPT_LIST_META_CONTEXT, (ALLOCATION,), True),
        (nbd.NBD_OPT_LIST_META_CONTEXT, ("base:other", "qemu:dirty-bitmap:x"), False),
        (nbd.NBD_OPT_SET_META_CONTEXT, (), False),
        (nbd.NBD_OPT_SET_META_CONTEXT, ("base:",), False),
        (nbd.NBD_OPT_SET_META_CONTEXT, ("nonsense", ALLOCATION, ALLOCATION), True),
        (nbd.NBD_OPT_SET_META_CONTEXT, ("x-other:y",), False),
    ],
)
def test_contexts(number: int, asked: tuple[str, ...], found: bool) -> None:
    _, output = talk(hello(), STRUCTURED, option(number, queries("", *asked)))
    expected = [(number, nbd.NBD_REP_ACK, b"")]
    if found:
        context = 1 if number == nbd.NBD_OPT_SET_META_CONTEXT else 0
        expected.insert(0, (number, nbd.NBD_REP_META_CONTEXT, struct.pack(">I", context) + ALLOCATION.encode()))
    assert replies(output)[1:] == expected


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", nbd.NBD_REP_ERR_INVALID),
        (text("disk"), nbd.NBD_REP_ERR_INVALID),
        (text("disk") + struct.pack(">I", 1), nbd.NBD_REP_ERR_INVALID),
        (text("disk") + struct.pack(">I", 0xFFFFFFFF), nbd.NBD_REP_ERR_INVALID),
        (text("disk") + struct.pack(">II", 1, 99) + b"base:", nbd.NBD_REP_ERR_INVALID),
        (queries("disk", ALLOCATION) + b"x", nbd.NBD_REP_ERR_INVALID),
        (queries("other", ALLOCATION), nbd.NBD_REP_ERR_UNKNOWN),
    ],
)
@pytest.mark.parametrize("number", [nbd.NBD_OPT_LIST_META_CONTEXT, nbd.NBD_OPT_SET_META_CONTEXT])
def test_contexts_refuse(number: int, data: bytes, error: int) -> None:
    assert only(number, data, STRUCTURED)[0] == error


@pytest.mark.parametrize(
    ("chosen", "entered", "allocation"),
    [
        ([("disk", (ALLOCATION,))], "disk", True),
        ([("", (ALLOCATION,))], "disk", True),
        ([("größe", (ALLOCATION,))], "disk", False),
        ([("disk", (ALLOCATION,)), ("disk", ())], "disk", False),
        ([("disk", (ALLOCATION,)), ("missing", (ALLOCATION,))], "disk", False),
        ([], "disk", False),
    ],
)
def test_a_context_holds_for_the_export_that_it_was_set_for(
    chosen: list[tuple[str, tuple[str, ...]]], entered: str, allocation: bool
) -> None:
    settings = [option(nbd.NBD_OPT_SET_META_CONTEXT, queries(name, *asked)) for name, asked in chosen]
    handshake, _ = talk(hello(), STRUCTURED, *settings, option(nbd.NBD_OPT_GO, info(entered)))
    assert handshake.agreement is not None
    assert handshake.agreement.structured
    assert handshake.agreement.allocation is allocation


@pytest.mark.parametrize(
    "data", [bytes(MAX_OPTION + 1), b"", queries("", *["x:y"] * 2000), queries("", ALLOCATION) + b"x"]
)
def test_setting_contexts_in_vain_forgets_those_that_were_set(data: bytes) -> None:
    """The specification: "replaces all previously-set metadata contexts (including when this command fails)"."""
    set_once = option(nbd.NBD_OPT_SET_META_CONTEXT, queries("disk", ALLOCATION))
    in_vain = option(nbd.NBD_OPT_SET_META_CONTEXT, data)
    handshake, output = talk(hello(), STRUCTURED, set_once, in_vain, option(nbd.NBD_OPT_GO, info("disk")))
    assert sum(bool(kind & nbd.NBD_REP_FLAG_ERROR) for _, kind, _ in replies(output)) == 1
    assert handshake.agreement is not None
    assert not handshake.agreement.allocation


def test_requests_behind_go_are_left_alone() -> None:
    handshake = ServerHandshake(exports(), "disk")
    data = hello() + option(nbd.NBD_OPT_GO, info("disk"))
    assert handshake.receive(memoryview(data + b"requests")) == len(data)
    assert handshake.receive(memoryview(b"requests")) == 0


def test_output_is_bounded_however_many_options_come_at_once() -> None:
    handshake = ServerHandshake(exports(), "disk")
    data = memoryview(hello() + option(nbd.NBD_OPT_LIST) * 20000)
    used = total = 0
    while step := handshake.receive(data[used:]):
        used += step
        output = handshake.take_output()
        assert len(output) < MAX_OUTPUT + 1000
        total += len(output)
    assert used == len(data)
    assert total > MAX_OUTPUT * 4


CONVERSATION = b"".join(
    [
        hello(),
        option(nbd.NBD_OPT_LIST),
        option(77, b"what"),
        STRUCTURED,
        option(nbd.NBD_OPT_LIST_META_CONTEXT, queries("disk")),
        option(nbd.NBD_OPT_SET_META_CONTEXT, queries("disk", ALLOCATION)),
        option(nbd.NBD_OPT_INFO, info("größe", 1, 3)),
        option(nbd.NBD_OPT_GO, info("missing")),
        option(nbd.NBD_OPT_GO, info("disk", 3)),
    ]
)


@given(st.lists(st.integers(1, 40), min_size=1))
def test_pieces_of_any_size_say_the_same(sizes: list[int]) -> None:
    whole, expected = talk(CONVERSATION)
    handshake = ServerHandshake(exports(), "disk")
    handshake.take_output()
    pending, output, position, turn = b"", b"", 0, 0
    while position < len(CONVERSATION):
        piece = CONVERSATION[position : position + sizes[turn % len(sizes)]]
        position, turn = position + len(piece), turn + 1
        pending += piece
        pending = pending[handshake.receive(memoryview(pending)) :]
        output += handshake.take_output()
    assert output == expected
    assert not pending
    assert handshake.agreement == whole.agreement


@given(st.binary(max_size=400), st.integers(0, len(CONVERSATION)))
def test_junk_is_a_breach_or_nothing(junk: bytes, cut: int) -> None:
    handshake = ServerHandshake(exports(), "disk")
    data = memoryview(CONVERSATION[:cut] + junk)
    try:
        used = handshake.receive(data)
    except NbdError:
        return
    assert 0 <= used <= len(data)
    assert len(handshake.take_output()) < MAX_OUTPUT
