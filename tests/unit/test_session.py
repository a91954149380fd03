"""Each session core by itself, fed message by message."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from common import wire
from common.errors import OperationFailed
from common.generation import Generation, Standing
from primary import effects as up
from primary.contact import AHEAD_S, KEPT_UP_S, REFUSED_RETRY_S, RETRY_S, PrimaryConfig, State
from primary.session import PrimarySession
from secondary import session as down

HISTORY = (Generation(1, 1, "a"),)
VOLUMES = (("root", 1 << 20), ("data", 1 << 16))
PRIMARY = Standing("pair", "a", "primary", HISTORY, True, 1)
SECONDARY = Standing("pair", "b", "secondary", HISTORY, True)
STREAM = 77
PEER = b"peer"


def primary(**options: Any) -> Any:
    config = PrimaryConfig(VOLUMES, options.pop("window", 10_000), **options.pop("config", {}))
    return PrimarySession(config, options.pop("standing", PRIMARY), instance=1, stream=STREAM, **options)


def secondary(position: down.Position | None = None, **options: Any) -> Any:
    config = down.SecondaryConfig(options.pop("volumes", VOLUMES), 4096, 100)
    position = position or down.Position(stream=STREAM)
    return down.SecondarySession(config, options.pop("standing", SECONDARY), position, free_blocks=100)


def welcome(session: PrimarySession, **changes: Any) -> wire.Frames:
    """A WELCOME that lets ``session`` go on, but for ``changes``."""
    applied = changes.get("applied", session.last_sequence)
    plain = wire.Welcome(session._session, 0, 1, STREAM, applied, applied, 0, 0, 0, 100, 100, 4096, True, False,
                         SECONDARY, sizes=tuple(size for _, size in VOLUMES))
    return wire.encode(replace(plain, **changes))


def established(now: float = 0.0, **options: Any) -> Any:
    session = primary(**options)
    session.connect(now)
    effects = session.receive(welcome(session), now)
    assert isinstance(effects[-1], up.Established)
    return session


def hello(number: int = 1, instance: int = 1, **changes: Any) -> wire.Frames:
    plain = wire.Hello(instance << 32 | number, 0, wire.PROTOCOL_VERSION, STREAM, 1, VOLUMES, PRIMARY)
    return wire.encode(replace(plain, **changes))


def kinds(effects: list[Any]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


def sent(effects: list[Any]) -> list[wire.Message]:
    return [wire.decode(effect.frames) for effect in effects if isinstance(effect, up.Send | down.Send)]


EXTENT = wire.EXTENT_STRUCT.pack(0, 512, 0, 0, 0, 0, 0)


def batch(sequence: int, session: int = 1 << 32 | 1, extents: bytes = EXTENT, flags: int = 0) -> wire.Frames:
    return wire.encode(wire.Batch(session, sequence, flags, extents, memoryview(bytes(512))))


# ---------------------------------------------------------------------------------------------------- the secondary


def in_session() -> Any:
    session = secondary()
    assert kinds(session.receive(PEER, hello(), 0.0)) == ["Send", "Connected"]
    return session


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("version", {"version": 9}, "protocol version 9, the secondary version 1"),
    ("pair", {"standing": PRIMARY._replace(pair_id="other")}, "pair 'other', the secondary to pair 'pair'"),
    ("volumes", {"volumes": (("root", 1 << 20),)}, "the volumes root, the secondary root, data"),
    ("size", {"volumes": (("root", 1 << 20), ("data", 4096))}, "data has 4096 bytes on the primary and 65536 bytes"),
    ("unrelated", {"standing": PRIMARY._replace(history=(Generation(9, 1, "a"),))}, "no common past"),
    ("rejoin", {"standing": PRIMARY._replace(history=(Generation(0, 1, "a"),))}, "side a has to rejoin"),
    ("refused", {"standing": PRIMARY._replace(side="b")}, "both ends call themselves side b"),
]


@pytest.mark.parametrize(("code", "changes", "words"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_who_does_not_belong_is_refused_with_both_values(code: str, changes: dict[str, Any], words: str) -> None:
    history = {"rejoin": (Generation(0, 1, "a"), *HISTORY), "size": ()}.get(code, HISTORY)
    standing = SECONDARY._replace(history=history)
    session = secondary(standing=standing)
    effects = session.receive(PEER, hello(**changes), 0.0)
    assert kinds(effects) == ["Send", "Refused"]
    refusal = sent(effects)[0]
    assert isinstance(refusal, wire.Refuse)
    assert refusal.code == code
    assert words in refusal.sentence
    assert not session.connected
    # and the primary takes it as such
    other = primary()
    other.connect(0.0)
    answer = wire.encode(replace(refusal, session=other._session))
    assert kinds(other.receive(answer, 0.0)) == ["Refused"]
    assert other.next_deadline() == REFUSED_RETRY_S
    assert kinds(other.handle_timer(REFUSED_RETRY_S)) == ["Reconnect"]
    other.connect(REFUSED_RETRY_S)
    assert other.receive(wire.encode(replace(refusal, session=other._session)), REFUSED_RETRY_S) == [], "told once"


def test_order_duplicates_gaps_and_foreign_messages() -> None:
    session = in_session()
    assert kinds(session.receive(PEER, batch(1), 0.0)) == ["Apply"]
    assert session.receive(PEER, batch(1), 0.0) == []
    told = session.receive(PEER, batch(2, session=5), 0.0)
    assert isinstance(sent(told)[0], wire.Failed)
    assert session.receive(PEER, batch(3, session=5), 0.0) == [], "an impostor is told once"
    assert kinds(session.receive(b"else", batch(2), 0.0)) == ["Send"]
    effects = session.receive(PEER, batch(3), 0.0)
    assert kinds(effects) == ["Send", "Disconnected"]
    assert "message 3 came where 2 was due" in effects[1].reason
    assert not session.connected


@pytest.mark.parametrize("frames", [
    [b"junk"], [],
    batch(1, extents=wire.EXTENT_STRUCT.pack(1 << 20, 1, 0, 0, 0, 0, 0)),
    batch(1, extents=wire.EXTENT_STRUCT.pack(0, 513, 0, 0, 0, 0, 0)),
    batch(1, extents=wire.EXTENT_STRUCT.pack(0, 1, 0, 2, 0, 0, 0)),
    wire.encode(wire.Verify(1 << 32 | 1, 1, bytes(24))),
    wire.encode(wire.Synced(1 << 32 | 1, 1, ())),
    wire.encode(wire.Ack(1 << 32 | 1, 1, 0, 0, 0, 0)),
    wire.encode(wire.Ping(1 << 32 | 1, 1, 0.0)),
], ids=["junk", "nothing", "out-of-bounds", "payload", "volume", "verify", "synced", "ack", "ping-of-more"])
def test_impossible_messages_end_the_session_and_change_nothing(frames: Any) -> None:
    session = in_session()
    before = session.position
    assert session.receive(b"stranger", [b"junk"], 0.0) == [], "junk from strangers ends nothing"
    effects = session.receive(PEER, frames, 0.0)
    assert kinds(effects) == ["Send", "Disconnected"]
    failed = sent(effects)[0]
    assert isinstance(failed, wire.Failed)
    assert failed.what == "stream"
    assert session.position == before
    assert session.statistics().at_work == 0
    assert kinds(session.receive(PEER, hello(2), 0.0)) == ["Send", "Connected"]


def test_a_newer_hello_supersedes_and_an_overtaken_one_does_not() -> None:
    session = in_session()
    assert kinds(session.receive(b"new", hello(3), 0.0)) == ["Disconnected", "Send", "Connected"]
    assert session.receive(PEER, hello(2), 0.0) == []
    assert session.receive(PEER, hello(3), 0.0) == []
    assert kinds(session.receive(PEER, hello(1, instance=9), 0.0)) == ["Disconnected", "Send", "Connected"]


def test_work_outlives_its_session_and_is_not_asked_for_again() -> None:
    session = in_session()
    for sequence in (1, 2, 3):
        session.receive(PEER, batch(sequence), 0.0)
    session.applied(1)
    session.acknowledge(99)
    answer = sent(session.receive(b"new", hello(2), 0.0))[0]
    assert isinstance(answer, wire.Welcome)
    assert (answer.applied, answer.received, answer.free) == (1, 3, 99)
    session.applied(2)
    session.applied(3)
    ack = sent(session.acknowledge(97))[0]
    assert ack == wire.Ack(1 << 32 | 2, 1, 3, 0, 0, 97)
    assert session.acknowledge(97) == []
    assert kinds(session.receive(b"new", batch(4, session=1 << 32 | 2), 0.0)) == ["Apply"]


def test_acks_are_cumulative_and_carry_durability_and_pressure() -> None:
    session = in_session()
    effects = session.receive(PEER, batch(1, flags=wire.FLUSH), 0.0)
    assert effects[0].flush
    session.applied(1)
    point = session.point()
    assert sent(session.acknowledge(80)) == [wire.Ack(1 << 32 | 1, 1, 1, 0, 0, 80)]
    session.durable(point)
    session.recorded(point)
    answers = sent(session.acknowledge(20))
    assert answers == [wire.Ack(1 << 32 | 1, 2, 1, 1, 1, 20), wire.Pressure(1 << 32 | 1, 3, 80, 100)]
    session.receive(PEER, batch(2), 0.0)
    session.applied(2)
    assert len(session.acknowledge(10)) == 1, "pressure is told once an epoch"
    session.receive(PEER, wire.encode(wire.Checkpoint(1 << 32 | 1, 3, 1)), 0.0)
    assert sent(session.checkpointed(3, 1, 0.5)) == [wire.Checkpointed(1 << 32 | 1, 5, 1, 3, 0.5)]
    assert session.position.checkpoint == 1
    effects = session.receive(PEER, wire.encode(wire.Checkpoint(1 << 32 | 1, 4, 1)), 0.0)
    assert kinds(effects) == ["Send", "Disconnected"], "checkpoint numbers count up"


def test_a_resync_has_a_number() -> None:
    """What is before it counts as applied, and there is nothing before 0."""
    session = in_session()
    effects = session.receive(PEER, wire.encode(wire.Resync(1 << 32 | 1, 0, 88, True, False)), 0.0)
    assert kinds(effects) == ["Send", "Disconnected"]
    assert session.position == down.Position(stream=STREAM)


def test_another_stream_needs_a_resync_first_and_old_work_is_not_counted() -> None:
    session = in_session()
    session.receive(PEER, batch(1), 0.0)
    session.receive(PEER, batch(2), 0.0)
    new = 2 << 32 | 1
    effects = session.receive(b"new", hello(1, instance=2, stream=88), 0.0)
    assert isinstance(effects[-1], down.Connected)
    assert not effects[-1].again
    begun = session.receive(b"new", wire.encode(wire.Resync(new, 50, 88, False, True)), 0.0)
    assert begun == [down.BeginResync(50, 88, False, True)]
    session.applied(1)
    assert session.acknowledge(98) == [], "nothing is said while work of the old numbering takes room"
    session.applied(2)
    session.resync_begun(50, consistent=True)
    assert sent(session.acknowledge(98)) == [wire.Ack(new, 1, 50, 0, 0, 98)]
    assert session.position.syncing
    session.receive(b"new", wire.encode(wire.Synced(new, 51, HISTORY)), 0.0)
    session.resync_ended(51, HISTORY)
    assert not session.position.syncing
    # without it
    session = in_session()
    session.receive(b"new", hello(1, instance=2, stream=88), 0.0)
    assert kinds(session.receive(b"new", batch(1, session=new), 0.0)) == ["Send", "Disconnected"]


def test_failures_are_reported_and_the_next_session_starts_at_what_is_applied() -> None:
    session = in_session()
    for sequence in (1, 2, 3):
        session.receive(PEER, batch(sequence), 0.0)
    session.applied(1)
    failed = sent(session.failed_apply(2, 5, "disk /b gave an I/O error"))[0]
    assert failed == wire.Failed(1 << 32 | 1, 1, "apply", 2, 5, "disk /b gave an I/O error")
    session.acknowledge(100)
    answer = sent(session.receive(PEER, hello(2), 0.0))[0]
    assert isinstance(answer, wire.Welcome)
    assert (answer.applied, answer.received, answer.exact) == (1, 1, True)
    session.receive(PEER, batch(2, session=1 << 32 | 2), 0.0)
    session.applied(2)
    assert kinds(session.failed_flush(session.point(), 5, "no flush")) == ["Send", "Disconnected"]
    answer = sent(session.receive(PEER, hello(3), 0.0))[0]
    assert isinstance(answer, wire.Welcome)
    assert not answer.exact


def test_work_behind_a_failed_flush_is_done_but_not_counted() -> None:
    session = in_session()
    for sequence in (1, 2):
        session.receive(PEER, batch(sequence), 0.0)
    session.receive(PEER, wire.encode(wire.Checkpoint(1 << 32 | 1, 3, 1)), 0.0)
    session.applied(1)
    session.failed_flush(session.point(), 5, "no flush")
    session.receive(PEER, hello(2), 0.0)
    assert not session.applied(2)
    assert session.checkpointed(3, 1, 0.1) == [], "nobody is told of a checkpoint of such a disk"
    assert session.position.applied == 1
    begun = session.receive(PEER, wire.encode(wire.Resync(1 << 32 | 2, 4, STREAM, True, True)), 0.0)
    assert isinstance(begun[0], down.BeginResync)
    session.resync_begun(4, consistent=True)
    assert session.position.exact
    session.receive(PEER, batch(5, session=1 << 32 | 2), 0.0)
    session.drop_work()
    assert session.statistics().received == 4


def test_a_resync_that_began_beside_a_failed_flush_makes_no_disk_exact() -> None:
    session = in_session()
    session.receive(PEER, batch(1), 0.0)
    session.applied(1)
    session.receive(PEER, wire.encode(wire.Resync(1 << 32 | 1, 5, STREAM, False, True)), 0.0)
    session.failed_flush(session.point(), 5, "no flush")
    session.resync_begun(5, consistent=True)
    assert not session.position.exact


def test_secondary_heartbeats_and_time_out() -> None:
    session = in_session()
    assert session.next_deadline() == 1.0
    assert sent(session.handle_timer(1.0)) == [wire.Ping(1 << 32 | 1, 0, 1.0)]
    ping = wire.encode(wire.Ping(1 << 32 | 1, 0, 2.0))
    assert sent(session.receive(PEER, ping, 4.0)) == [wire.Pong(1 << 32 | 1, 0, 2.0)]
    assert session.handle_timer(8.9) != []
    effects = session.handle_timer(9.0)
    assert kinds(effects) == ["Send", "Disconnected"]
    assert not effects[1].on_purpose
    assert session.next_deadline() is None
    session = in_session()
    effects = session.receive(PEER, wire.encode(wire.Bye(1 << 32 | 1, 0, "stopped")), 0.0)
    assert effects == [down.Disconnected("the primary left: stopped", True)]


# ------------------------------------------------------------------------------------------------------ the primary


def ack(session: PrimarySession, number: int, applied: int, durable: int = 0, free: int = 100) -> wire.Frames:
    return (wire.encode_ack(session._session, number, applied, durable, 0, free),)


def test_the_window_closes_and_opens_again_at_half() -> None:
    session = established(window=2000)
    payload = bytes(512)
    for number in range(3):
        assert len(session.write(EXTENT, payload, 1, 0, number, 0.0)) == 1
        assert session.window_open
    session.write(EXTENT, payload, 1, 0, 3, 0.0)
    assert not session.window_open
    assert session.lag_bytes() == 4 * (512 + 24 + wire.BATCH_OVERHEAD)
    assert session.lag_s(3.0) == 3.0
    effects = session.receive(ack(session, 1, 2), 1.0)
    assert effects == [up.Acknowledged(2, 0, [0, 1])]
    effects = session.receive(ack(session, 2, 3), 1.0)
    assert effects == [up.Acknowledged(3, 0, [2]), up.WindowOpen()]
    assert session.receive(ack(session, 2, 3), 1.0) == [], "a duplicate"
    assert kinds(session.receive(ack(session, 4, 4), 1.0)) == ["Cut"], "a gap"


def test_flush_comes_back_when_durable_and_others_when_applied() -> None:
    session = established()
    session.write(EXTENT, bytes(512), 1, wire.FLUSH, "fua", 0.0)
    session.write(EXTENT, bytes(512), 1, 0, "plain", 0.0)
    session.flush("flush", 0.0)
    assert session.receive(ack(session, 1, 3), 0.0) == [up.Acknowledged(3, 0, ["plain"])]
    assert not session.idle
    assert session.receive(ack(session, 2, 3, durable=1), 0.0) == [up.Acknowledged(3, 1, ["fua"])]
    assert session.receive(ack(session, 3, 3, durable=3), 0.0) == [up.Acknowledged(3, 3, ["flush"])]
    assert session.idle


def test_acks_that_run_ahead_and_other_nonsense_cut() -> None:
    for frames in (
        lambda s: ack(s, 1, 1), lambda s: [b"junk"],
        lambda s: wire.encode(wire.Checkpointed(s._session, 1, 1, 1, 0.0)),
        lambda s: wire.encode(wire.Verified(s._session, 1, 1, b"")),
        lambda s: wire.encode(wire.Failed(s._session, 1, "flush", 9, 5, "x")),
        lambda s: wire.encode(wire.Checkpoint(s._session, 1, 1)),
        lambda s: wire.encode(wire.Ping(s._session, 3, 0.0)),
    ):
        session = established()
        assert kinds(session.receive(frames(session), 0.0))[0] == "Cut"
        assert session.state is State.CUT
        assert session.attached


def test_credit_holds_back_and_a_barrier_makes_room() -> None:
    session = established()
    session.write(EXTENT, bytes(512), 60, 0, "a", 0.0)
    messages = session.write(EXTENT, bytes(512), 50, 0, "b", 0.0)
    assert [type(wire.decode(frames)).__name__ for frames in messages] == ["Checkpoint", "Batch"]
    assert len(session.write(EXTENT, bytes(512), 50, 0, "c", 0.0)) == 1
    assert session.write(EXTENT, bytes(512), 1, 0, "d", 0.0) == [], "behind a barrier in flight there is one pool"
    effects = session.receive(ack(session, 1, 1, free=40), 0.0)
    assert [type(m).__name__ for m in sent(effects)] == []
    effects = session.receive(ack(session, 2, 2), 0.0)
    assert [type(m).__name__ for m in sent(effects)] == ["Checkpoint", "Batch"]
    assert isinstance(effects[0], up.Send)


def test_without_automatic_checkpoints_it_starves_and_says_so_once() -> None:
    session = established(config={"checkpoint_on_pressure": False})
    session.write(EXTENT, bytes(512), 60, 0, "a", 0.0)
    session.write(EXTENT, bytes(512), 50, 0, "b", 0.0)
    effects = session.receive(ack(session, 1, 1, free=40), 0.0)
    assert kinds(effects) == ["Starved", "Acknowledged"]
    assert "Starved" not in kinds(session.handle_timer(1.0))
    messages = [wire.decode(frames) for frames in session.checkpoint("token", 1.0)]
    assert [type(m).__name__ for m in messages] == ["Checkpoint", "Batch", "Checkpoint"]
    pressure = wire.encode(wire.Pressure(session._session, 2, 80, 100))
    assert session.receive(pressure, 1.0) == [up.Pressure(80, 100, True)]


def test_a_session_that_ends_in_the_same_moment_lacks_nothing() -> None:
    """Seed 106002946: the checkpoint that was to make room could not be put into a session that had just ended."""
    session = established(config={"checkpoint_on_pressure": False, "peer_timeout_s": 10.0})
    session.write(EXTENT, bytes(512), 60, 0, "a", 0.0)
    session.receive(ack(session, 1, 1, free=40), 0.0)
    assert session.write(EXTENT, bytes(512), 50, 0, "b", 0.0) == []
    session.disconnected("the connection broke", 1.0)
    session.connect(9.0)
    assert kinds(session.receive(welcome(session, applied=1, received=1, free=40), 9.0))[-1] == "Established"
    effects = kinds(session.handle_timer(10.5))
    assert "Lost" in effects
    assert "Starved" not in effects


def test_pressure_puts_one_checkpoint() -> None:
    session = established()
    effects = session.receive(wire.encode(wire.Pressure(session._session, 1, 80, 100)), 0.0)
    assert [type(m).__name__ for m in sent(effects)] == ["Checkpoint"]
    assert effects[-1] == up.Pressure(80, 100, True)
    assert sent(session.receive(wire.encode(wire.Pressure(session._session, 2, 80, 100)), 0.0)) == []


def test_a_checkpoint_needs_a_secondary_that_is_in_sync() -> None:
    with pytest.raises(OperationFailed, match="not connected"):
        primary().checkpoint(None, 0.0)
    session = primary(standing=PRIMARY)
    session.connect(0.0)
    needed = session.receive(welcome(session, stream=5), 0.0)
    assert isinstance(needed[-1], up.ResyncNeeded)
    assert needed[-1].full
    session.begin_resync(full=True, keep_checkpoint=True, now=0.0)
    with pytest.raises(OperationFailed, match="being synchronised"):
        session.checkpoint(None, 0.0)
    names = [type(wire.decode(frames)).__name__ for frames in session.finish_resync("t", 0.0)]
    assert names == ["Synced", "Checkpoint"]


@pytest.mark.parametrize(("changes", "full", "words"), [
    ({"stream": 5}, True, "another stream"),
    ({"exact": False}, True, "lost its memory"),
    ({"exact": False, "applied": 9, "durable": 9, "recorded": 9}, False, "lost its memory"),
    ({"applied": 3, "received": 3}, True, "an older copy"),
    ({"syncing": True}, True, "another resync"),
    ({"standing": SECONDARY._replace(history=())}, False, "new disk"),
], ids=["stream", "inexact", "inexact-but-recorded", "older", "syncing", "new"])
def test_what_needs_a_resync(changes: dict[str, Any], full: bool, words: str) -> None:
    session = primary(next_sequence=10)
    session.connect(0.0)
    effect = session.receive(welcome(session, **changes), 0.0)[-1]
    assert isinstance(effect, up.ResyncNeeded)
    assert words in effect.reason
    assert effect.full == (full or words == "new disk")
    assert session.state is State.WELCOMED


def test_a_primary_that_is_older_than_its_secondary_refuses() -> None:
    session = primary(next_sequence=10)
    session.connect(0.0)
    effects = session.receive(welcome(session, applied=20, received=20), 0.0)
    assert kinds(effects) == ["Send", "Refused"]
    assert effects[1].code == "older-copy"
    assert "message 20 of a stream in which this primary has only sent 9" in effects[1].sentence


def test_earlier_streams_reach_back_as_far_as_their_base() -> None:
    for applied, full in ((4, True), (5, False)):
        session = primary(bases={5: 5})
        session.connect(0.0)
        effect = session.receive(welcome(session, stream=5, applied=applied, received=applied), 0.0)[-1]
        assert isinstance(effect, up.ResyncNeeded)
        assert effect.full == full


def test_a_primary_that_stood_still_does_not_blame_its_secondary() -> None:
    session = established()
    session.write(EXTENT, bytes(512), 1, 0, "pin", 2.0)
    assert kinds(session.handle_timer(100.0)) == ["Send"], "what came meanwhile waits in the socket"
    refusal = wire.Refuse(session._session, 0, "rejoin", "the other side was promoted")
    assert kinds(session.receive(wire.encode(refusal), 100.1)) == ["Refused"]


def test_heartbeats_silence_and_retries_that_grow() -> None:
    session = established()
    assert session.next_deadline() == 1.0
    assert sent(session.handle_timer(1.0)) == [wire.Ping(session._session, 0, 1.0)]
    session.receive(wire.encode(wire.Pong(session._session, 0, 1.0)), 1.25)
    assert session.statistics().round_trip_s == 0.25
    session.write(EXTENT, bytes(512), 1, 0, "pin", 2.0)
    for now in (2.0, 3.0, 4.0, 5.0, 6.0):
        assert kinds(session.handle_timer(now)) == ["Send"]
    effects = session.handle_timer(6.25)
    assert kinds(effects) == ["Cut", "Lost"]
    assert effects[1].unacknowledged == [(EXTENT, 0, "pin")]
    assert not session.attached
    now = 6.25
    for pause in (*RETRY_S[:1], *RETRY_S[1:]):
        assert session.next_deadline() == now + pause
        assert kinds(session.handle_timer(now + pause)) == ["Reconnect"]
        session.connect(now + pause)
        now = now + pause + 5.0
        assert session.handle_timer(now) == [], "nobody answers"
    assert session.state is State.CUT


def test_a_peer_that_greets_but_gets_nothing_done_is_lost_in_the_end() -> None:
    session = established()
    session.write(EXTENT, bytes(512), 1, 0, "pin", 0.0)
    now = 0.0
    seen: list[str] = []
    while "Lost" not in seen:
        assert now < 20.0
        seen += kinds(session.disconnected("cut", now))
        now += 2.0
        seen += kinds(session.handle_timer(now))
        if session.state is State.CUT and "Lost" not in seen:
            session.connect(now)
            seen += kinds(session.receive(welcome(session, applied=0), now))
    assert seen.count("Cut") >= 2


def test_max_lag_treats_a_slow_secondary_as_lost() -> None:
    session = established(config={"max_lag_s": 2.0})
    session.write(EXTENT, bytes(512), 1, 0, "pin", 1.0)
    for now in (1.0, 2.0):
        assert session.next_deadline() == now
        assert kinds(session.handle_timer(now)) == ["Send"]
    assert kinds(session.handle_timer(3.0)) == ["Send", "Cut", "Lost"]


def test_a_primary_that_stood_still_does_not_hold_its_own_lag_against_the_secondary() -> None:
    session = established(config={"max_lag_s": 2.0})
    session.write(EXTENT, bytes(512), 1, 0, "pin", 1.0)
    for woke in (4.0, 100.0):
        assert kinds(session.handle_timer(woke)) == ["Send"], "what came meanwhile waits in the socket"
        assert session.lag_s(woke) == woke - 1.0
    while session.next_deadline() < 102.0:
        assert kinds(session.handle_timer(session.next_deadline())) == ["Send"]
    assert session.next_deadline() == 102.0
    assert "Lost" in kinds(session.handle_timer(102.0)), "from then on it is the secondary's"


def test_a_secondary_that_cannot_keep_up_is_tried_less_and_less_often() -> None:
    """An overload that lasts: each session ends by congestion after a moment. One that keeps up is trusted again."""
    session = established()
    now, pauses, lasting = 0.0, [], [1.0] * 8 + [2 * KEPT_UP_S, 1.0]
    for seconds in lasting:
        now += seconds
        session.write(EXTENT, bytes(512), 1, 0, "pin", now)
        assert kinds(session.pull_ahead("congestion", now)) == ["Cut", "Lost"]
        due = session.next_deadline()
        assert due is not None
        assert not session.handle_timer(due - 0.001), "not before"
        assert kinds(session.handle_timer(due)) == ["Reconnect"]
        pauses.append(due - now)
        now = due
        session.connect(now)
        assert kinds(session.receive(welcome(session), now))[-1] == "ResyncNeeded"
        session.begin_resync(full=False, keep_checkpoint=True, now=now)
    assert pauses == pytest.approx([*AHEAD_S, 60.0, 60.0, 1.0, 2.0])


def test_who_waits_for_its_secondary_does_not_pause() -> None:
    session = established(config={"max_lag_s": 2.0, "on_peer_loss": "block"})
    session.write(EXTENT, bytes(512), 1, 0, "pin", 0.0)
    session.handle_timer(1.0)
    assert "Cut" in kinds(session.handle_timer(2.0))
    assert session.next_deadline() < 2.5


def test_failed_flush_names_its_clients_before_the_rest_is_handed_back() -> None:
    session = established()
    session.write(EXTENT, bytes(512), 1, wire.FLUSH, "one", 0.0)
    session.write(EXTENT, bytes(512), 1, wire.FLUSH, "two", 0.0)
    failed = wire.encode(wire.Failed(session._session, 1, "flush", 1, 28, "no space"))
    effects = session.receive(failed, 0.0)
    assert kinds(effects) == ["Acknowledged", "FlushFailed", "Cut", "Lost"]
    assert effects[1] == up.FlushFailed(28, ["one"], "no space")
    assert [batch.pin for batch in effects[3].unacknowledged] == ["two"]


def test_what_was_handed_back_is_never_replayed() -> None:
    session = established()
    session.write(EXTENT, bytes(512), 1, wire.FLUSH, "flushing", 0.0)
    session.write(EXTENT, bytes(512), 1, 0, "plain", 0.0)
    session.receive(ack(session, 1, 1), 0.0)
    effects = session.lost("congestion", 0.0)
    assert kinds(effects) == ["Cut", "Lost"]
    assert [batch.pin for batch in effects[1].unacknowledged] == ["flushing", "plain"]
    assert session.window_open
    session.connect(1.0)
    effect = session.receive(welcome(session, applied=1), 1.0)[-1]
    assert isinstance(effect, up.ResyncNeeded)
    assert "went on without the secondary (congestion)" in effect.reason
    messages = sent(session.begin_resync(full=False, keep_checkpoint=True, now=1.0))
    assert messages == [wire.Resync(session._session, 3, STREAM, False, True)]


def test_a_resync_that_did_not_end_for_the_secondary_has_not_ended_for_barriers() -> None:
    session = primary()
    session.connect(0.0)
    session.receive(welcome(session, stream=5), 0.0)
    session.begin_resync(full=True, keep_checkpoint=True, now=0.0)
    session.receive(ack(session, 1, 1, free=10), 0.0)
    session.write(EXTENT, bytes(512), 8, 0, "pin", 0.0)
    assert len(session.finish_resync("t", 0.0)) == 2
    session.disconnected("cut", 0.0)
    session.connect(0.0)
    # nothing of it was received, and there is no room for the batch: a checkpoint here would be one of a half-done disk
    effects = session.receive(welcome(session, stream=STREAM, applied=1, received=1, free=2, syncing=True), 0.0)
    assert sent(effects) == []


def test_a_flush_that_may_have_been_forgotten_is_asked_for_again() -> None:
    session = established()
    session.write(EXTENT, bytes(512), 1, wire.FLUSH, "pin", 0.0)
    session.receive(ack(session, 1, 1), 0.0)
    session.disconnected("cut", 0.0)
    session.connect(0.0)
    effects = session.receive(welcome(session, applied=1), 0.0)
    assert sent(effects) == [wire.Batch(session._session, 2, wire.FLUSH, b"", memoryview(b""))]
    assert session.receive(ack(session, 1, 2, durable=2), 0.0) == [up.Acknowledged(2, 2, ["pin"])]


def test_close_hands_back_what_is_open() -> None:
    session = established()
    session.write(EXTENT, bytes(512), 1, 0, "pin", 0.0)
    token = object()
    session.checkpoint(token, 0.0)
    effects = session.close("stopped")
    assert kinds(effects) == ["Send", "CheckpointFailed", "Lost"]
    assert sent(effects) == [wire.Bye(session._session, 0, "stopped")]
    assert effects[1].token is token
    assert session.next_deadline() is None
