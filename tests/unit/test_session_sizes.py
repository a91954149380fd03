"""Both session cores when volumes grow: in the stream, at the handshake, and against a peer that lies."""

from __future__ import annotations

from typing import Any

import pytest

from common import wire
from common.errors import OperationFailed, WireError
from primary import effects as up
from primary.contact import State
from primary.session import PrimarySession
from secondary import session as down
from tests.unit.test_session import PEER, SECONDARY, STREAM, VOLUMES, established, hello, primary, secondary, welcome

NOW = tuple(size for _, size in VOLUMES)
LARGER = (NOW[0] * 4, NOW[1])


def resized(session: PrimarySession, sizes: tuple[int, ...], sentence: str = "", barrier: int = 1) -> list[up.Effect]:
    return session.receive(wire.encode(wire.Resized(session._session, 1, barrier, sizes, sentence)), 1.0)


def acknowledged(session: PrimarySession, number: int = 2) -> list[up.Effect]:
    return session.receive((wire.encode_ack(session._session, number, 1, 0, 0, 100),), 1.0)


def greeting(session: PrimarySession, now: float = 2.0) -> wire.Hello:
    effect = session.connect(now)[0]
    assert isinstance(effect, up.Send)
    message = wire.decode(effect.frames)
    assert isinstance(message, wire.Hello)
    return message


@pytest.mark.parametrize("sentence", ["", "Side b's disk is too small."])
def test_the_answer_counts_with_the_acknowledgement(sentence: str) -> None:
    session = established()
    (frames,) = session.resize(LARGER, "token", 0.5, exact=True)
    assert wire.decode(frames) == wire.Resize(session._session, 1, LARGER, True)
    there = NOW if sentence else LARGER
    assert resized(session, there, sentence) == [], "how many blocks may be sent there is not known yet"
    assert acknowledged(session)[0] == up.Resized("token", there, sentence)
    assert greeting(session).volumes == VOLUMES, "as long as this side has not grown"
    session.grown(LARGER)
    assert [size for _, size in greeting(session).volumes] == list(LARGER)


def test_no_resize_without_a_secondary_in_line() -> None:
    with pytest.raises(OperationFailed):
        primary().resize(LARGER, None, 0.0, exact=True)


@pytest.mark.parametrize("sizes", [(NOW[0] - 1, NOW[1]), (LARGER[0] + 1, NOW[1]), (NOW[0], NOW[1] + 1), NOW[:1]])
def test_impossible_answers_end_the_session(sizes: tuple[int, ...]) -> None:
    session = established()
    session.resize(LARGER, "token", 0.5, exact=True)
    assert isinstance(resized(session, sizes)[0], up.Cut)
    assert session._sizes == NOW


def test_an_answer_to_no_question_ends_the_session() -> None:
    session = established()
    session.checkpoint(None, 0.5)
    assert isinstance(resized(session, NOW)[0], up.Cut)


def test_a_lost_answer_shows_at_the_handshake() -> None:
    session = established()
    session.resize(LARGER, "token", 0.5, exact=True)
    session.disconnected("cut", 1.0)
    greeting(session)
    assert session.receive(welcome(session, applied=1, received=1, sizes=LARGER), 2.0) == [up.Outgrown(LARGER)]
    assert session.state is State.CUT, "it greets again"
    session.grown(LARGER)
    assert [size for _, size in greeting(session, 3.0).volumes] == list(LARGER)
    effects = session.receive(welcome(session, applied=1, received=1, sizes=LARGER), 3.0)
    assert [type(effect) for effect in effects] == [up.Resized, up.Acknowledged, up.Established]
    assert effects[0] == up.Resized("token", None, "the answer was lost")


def test_a_question_that_was_not_received_is_asked_again() -> None:
    session = established()
    session.resize(LARGER, "token", 0.5, exact=False)
    session.disconnected("cut", 1.0)
    greeting(session)
    effects = session.receive(welcome(session, applied=0, received=0), 2.0)
    assert isinstance(effects[0], up.Send)
    assert wire.decode(effects[0].frames) == wire.Resize(session._session, 1, LARGER, False)


def test_who_waits_is_told_when_the_secondary_is_lost() -> None:
    session = established()
    session.resize(LARGER, "token", 0.5, exact=True)
    told = [effect for effect in session.lost("gone", 1.0) if isinstance(effect, up.Resized)]
    assert told == [up.Resized("token", None, "gone")]


def test_a_secondary_that_shrank_is_not_believed() -> None:
    session = primary()
    greeting(session)
    session.receive(welcome(session, sizes=(NOW[0] // 2, NOW[1])), 0.0)
    assert session.state is State.CUT


# ---------------------------------------------------------------------------------------------------- the secondary


def greet(session: Any, sizes: tuple[int, ...], **changes: Any) -> tuple[wire.Message, list[Any]]:
    """What it answers to a HELLO, and what it asks its shell for."""
    names = [name for name, _ in VOLUMES]
    number = 1 << 32 | (session._greeted & 0xFFFF_FFFF) + 1
    volumes = tuple(zip(names, sizes, strict=True))
    effects = session.receive(PEER, hello(session=number, volumes=volumes, **changes), 0.0)
    assert isinstance(effects[0], down.Send)
    return wire.decode(effects[0].frames), effects[1:]


@pytest.mark.parametrize("stream", [STREAM, STREAM + 1])
def test_it_grows_before_it_welcomes(stream: int) -> None:
    session = secondary()
    answer, effects = greet(session, LARGER, stream=stream)
    assert isinstance(answer, wire.Failed)
    assert effects == [down.Grow(LARGER)]
    answer, effects = greet(session, LARGER, stream=stream)
    assert isinstance(answer, wire.Failed)
    assert effects == [], "it is at it"
    session.grown(LARGER, "")
    answer, effects = greet(session, LARGER, stream=stream)
    assert isinstance(answer, wire.Welcome)
    assert answer.sizes == LARGER
    assert answer.exact is (stream != STREAM), "a replay would leave out what is new"


def test_without_room_it_refuses_and_looks_again_the_next_time() -> None:
    session = secondary()
    for _ in range(2):
        assert greet(session, LARGER)[1] == [down.Grow(LARGER)]
        session.grown(LARGER, "Side b's disk has 5 bytes.")
        answer, _ = greet(session, LARGER)
        assert isinstance(answer, wire.Refuse)
        assert answer.code == "size"
        words = f"root has {LARGER[0]} bytes on the primary and {NOW[0]} bytes on the secondary: Side b's disk has 5"
        assert words in answer.sentence


def test_a_smaller_primary_is_told_the_sizes_and_a_new_disk_has_to_fit() -> None:
    session = secondary()
    session.grown(LARGER, "")
    answer, _ = greet(session, NOW)
    assert isinstance(answer, wire.Welcome)
    assert answer.sizes == LARGER
    fresh = secondary(standing=SECONDARY._replace(history=()))
    for sizes in (LARGER, (NOW[0] // 2, NOW[1])):
        answer, effects = greet(fresh, sizes)
        assert isinstance(answer, wire.Refuse)
        assert [type(effect) for effect in effects] == [down.Refused]


def test_in_the_stream_bounds_move_when_the_work_is_done() -> None:
    session = secondary()
    greet(session, NOW)
    number = session._session
    effects = session.receive(PEER, wire.encode(wire.Resize(number, 1, LARGER, True)), 0.0)
    assert effects == [down.Resize(1, LARGER, True)]
    answer = session.resized(1, LARGER, "")[0]
    assert wire.decode(answer.frames) == wire.Resized(number, 1, 1, LARGER, "")
    beyond = wire.EXTENT_STRUCT.pack(NOW[0], 512, 0, 0, 1, 0, 0)
    batch = wire.encode(wire.Batch(number, 2, 0, beyond, memoryview(bytes(512))))
    assert isinstance(session.receive(PEER, batch, 0.0)[0], down.Apply)
    assert session.receive(PEER, wire.encode(wire.Resize(number, 3, LARGER[:1], True)), 0.0)[-1].on_purpose is False


def test_sizes_on_the_wire_are_sizes() -> None:
    for sizes in ((), (-1,), (1 << 63,), ("1",), tuple([1] * 65)):
        with pytest.raises(WireError):
            wire.decode((wire.seal([wire.RESIZE, 1, 1, sizes, True]),))
