"""A checkpoint that the secondary cannot take: both session cores joined, and the secondary's work behind them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from common import wire
from common.batch import DISCARD, NO_HOLE, ZERO
from common.disk import DiskLayer, Kind
from common.failures import Failure
from common.generation import Generation, History, Standing
from primary import effects as up
from primary.contact import PrimaryConfig
from primary.session import PrimarySession
from secondary import session as down
from secondary.applier import INLINE_BYTES, Applier
from secondary.attach import attach
from tests.heart import Rig, pattern

HISTORY = (Generation(1, 1, "a"),)
STREAM = 77
PEER = b"peer"
SIZE = 17 << 20


class Joined:
    """A primary's and a secondary's session with nothing between them, established."""

    def __init__(self) -> None:
        volumes = (("disk0", SIZE),)
        here = Standing("pair", "a", "primary", HISTORY, True, 1)
        there = Standing("pair", "b", "secondary", HISTORY, True)
        self.primary = PrimarySession(PrimaryConfig(volumes, 1 << 30), here, instance=1, stream=STREAM)
        config = down.SecondaryConfig(volumes, 4096, 100)
        self.secondary = down.SecondarySession(config, there, down.Position(stream=STREAM), free_blocks=100)
        self.seen: list[up.Effect] = []
        self.work: list[down.Work] = []
        self.connect()

    def connect(self) -> None:
        self.up(self.primary.connect(0.0))

    def up(self, effects: Sequence[up.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, up.Send):
                self.down(self.secondary.receive(PEER, effect.frames, 0.0))
            else:
                self.seen.append(effect)

    def down(self, effects: Sequence[down.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, down.Send):
                self.up(self.primary.receive(effect.frames, 0.0))
            elif isinstance(effect, down.Apply | down.Checkpoint):
                self.work.append(effect)

    def ask(self, token: object) -> None:
        self.up([up.Send(frames) for frames in self.primary.checkpoint(token, 0.0)])

    def of(self, kind: type[Any]) -> list[Any]:
        return [effect for effect in self.seen if isinstance(effect, kind)]


def test_who_asked_is_told_and_the_stream_goes_on() -> None:
    pair = Joined()
    pair.ask("first")
    pair.down(pair.secondary.checkpoint_missed(1, 1, "Somebody sleeps."))
    pair.down(pair.secondary.acknowledge(90))
    assert pair.of(up.CheckpointFailed) == [up.CheckpointFailed("first", "Somebody sleeps.")]
    assert pair.secondary.connected
    pair.ask("second")
    pair.down(pair.secondary.checkpointed(2, 2, 0.5))
    pair.down(pair.secondary.acknowledge(100))
    assert [(done.number, done.token) for done in pair.of(up.CheckpointDone)] == [(2, "second")]
    assert pair.primary.idle
    assert not pair.of(up.Cut)


def test_the_news_is_not_lost_with_a_connection() -> None:
    """The barrier counts as applied when the primary comes back: it must not take that for a checkpoint."""
    pair = Joined()
    pair.ask("first")
    pair.secondary.disconnected(PEER, "cut")
    assert pair.secondary.checkpoint_missed(1, 1, "Somebody sleeps.") == []
    assert pair.secondary.acknowledge(90) == []
    pair.up(pair.primary.disconnected("cut", 0.0))
    pair.connect()
    assert [failed.token for failed in pair.of(up.CheckpointFailed)] == ["first"]
    assert not pair.of(up.CheckpointDone)
    pair.ask("second")
    assert pair.work[-1] == down.Checkpoint(2, 2)


def test_news_of_a_checkpoint_that_nobody_asked_for_end_the_session() -> None:
    pair = Joined()
    failed = wire.Failed(pair.primary._session, 1, "checkpoint", 5, 0, "")
    assert isinstance(pair.primary.receive(wire.encode(failed), 0.0)[0], up.Cut)


class NoLedger:
    """What the applier tells the metadata, for nobody."""

    def resync_begun(self, stream: int, sequence: int, *, keep_checkpoint: bool) -> None: ...

    def resync_ended(self, history: History) -> None: ...

    def resize(self, sizes: Sequence[int], *, exact: bool) -> tuple[tuple[int, ...], str]:
        return tuple(sizes), ""

    def grow(self, sizes: Sequence[int]) -> tuple[str, bytes]:
        return "", b""

    def checkpointed(self, number: int) -> None: ...


class Watched(DiskLayer):
    """Sees to it that the event loop does nothing that takes long."""

    late = False

    def before(self, kind: Kind, offset: int, length: int) -> None:
        if kind != "extents" and length > INLINE_BYTES and threading.current_thread() is threading.main_thread():
            self.late = True


class Failing(Watched):
    """Loses writes."""

    def flush(self) -> None:
        raise OSError(errno.EIO, "no flush")


def with_applier(
    directory: Path,
    scene: Callable[[Joined, Applier, Rig], Any],
    *,
    timeout_s: float = 5.0,
    disk_type: type[Watched] = Watched,
) -> None:
    """Run ``scene`` on a loop, with a pair whose secondary does its work for real."""

    async def run() -> None:
        directory.mkdir()
        made = Rig(directory, (SIZE,), timeout_s=timeout_s)
        pair = Joined()
        disk = disk_type(made.disks[0])
        applier = Applier(pair.secondary, made.pair, [disk], NoLedger(), pair.down)
        try:
            await scene(pair, applier, made)
            assert not disk.late
        finally:
            await applier.stop()
            applier.close()
            made.close()

    asyncio.run(run())


def drain(pair: Joined, applier: Applier) -> None:
    work, pair.work = pair.work, []
    for item in work:
        applier.put(item)
    applier.drain()


@contextlib.contextmanager
def a_reader_in_the_way(pair: Joined, applier: Applier, made: Rig) -> Iterator[None]:
    """A checkpoint is asked for, and waits."""
    with attach(made.settings.directory) as view, view.volumes["disk0"].cow_request_begin(0, 1, shared=True):
        pair.ask("first")
        drain(pair, applier)
        assert applier.waits == 1
        yield


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def test_a_reader_that_does_not_let_go_costs_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    async def scene(pair: Joined, applier: Applier, made: Rig) -> None:
        epoch = made.buffer.header.epoch
        with a_reader_in_the_way(pair, applier, made):
            await until(lambda: pair.of(up.CheckpointFailed))
        assert "held by process" in pair.of(up.CheckpointFailed)[0].sentence
        assert made.buffer.header.epoch == epoch
        error = made.buffer.header.get_error()
        assert error is not None
        assert error.case is Failure.EMPTYING
        assert made.buffer.header.failures() == {Failure.EMPTYING: 1}
        pair.ask("second")
        drain(pair, applier)
        await until(lambda: pair.of(up.CheckpointDone))
        assert pair.secondary.connected
        assert made.buffer.header.epoch == epoch + 1
        assert made.buffer.header.get_error() is None
        assert made.buffer.header.failures() == {Failure.EMPTYING: 1}

    with_applier(tmp_path / "rig", scene, timeout_s=0.2)


def test_a_flush_that_fails_while_a_checkpoint_waits_for_a_reader_ends_it(tmp_path: Path) -> None:
    async def scene(pair: Joined, applier: Applier, made: Rig) -> None:
        epoch = made.buffer.header.epoch
        with a_reader_in_the_way(pair, applier, made):
            with pytest.raises(OSError, match="no flush"):  # in the thread of another one, say
                applier.flush()
        await until(lambda: pair.of(up.Cut) or pair.of(up.CheckpointDone))
        assert made.buffer.header.epoch == epoch, "a checkpoint of a disk that lost writes"
        assert not pair.of(up.CheckpointDone)
        assert not pair.secondary.position.exact

    with_applier(tmp_path / "rig", scene, disk_type=Failing)


@pytest.mark.parametrize(("length", "in_thread"), [(1 << 20, False), (16 << 20, True)])
def test_large_zeroes_do_not_hold_the_loop_up(tmp_path: Path, length: int, in_thread: bool) -> None:
    """16 MiB is what one message of the stream clears: its old contents are copied in the thread."""

    async def scene(pair: Joined, applier: Applier, made: Rig) -> None:
        made.stream(0, pattern(16 << 20, 3))
        made.checkpoint()
        before = bytes(made.oracle.disk)
        extents = wire.EXTENT_STRUCT.pack(0, length, 0, 0, ZERO, 0, 0)
        pair.up([up.Send(frames) for frames in pair.primary.write(extents, b"", 50, 0, "pin", 0.0)])
        drain(pair, applier)
        await until(lambda: pair.primary.idle)
        assert applier.waits == int(in_thread)
        with attach(made.settings.directory) as view:
            assert view.volumes["disk0"].read(0, 16 << 20) == before[: 16 << 20]
        assert Path(made.paths[0]).read_bytes()[:length] == bytes(length)

    with_applier(tmp_path / "rig", scene)


@pytest.mark.parametrize("kind", [DISCARD, ZERO])
def test_what_is_a_hole_already_takes_no_room_when_it_is_discarded(tmp_path: Path, kind: int) -> None:
    """A client that discards a whole thin disk would fill the hidden disk again and again with nothing."""

    async def scene(pair: Joined, applier: Applier, made: Rig) -> None:
        async def changed(first: int, last: int, flags: int = 0) -> int:
            """Blocks that were copied for a request on blocks ``first`` to ``last``."""
            before = applier._jobs[0].used_blocks
            extents = wire.EXTENT_STRUCT.pack(first * 4096, (last - first + 1) * 4096, 0, 0, kind, flags, 0)
            pair.up([up.Send(frames) for frames in pair.primary.write(extents, b"", 1, 0, "pin", 0.0)])
            drain(pair, applier)
            await until(lambda: pair.primary.idle)
            return applier._jobs[0].used_blocks - before

        assert await changed(0, 99) == 100
        made.checkpoint()
        assert await changed(0, 99) == 0
        assert await changed(10, 20) == 0
        assert await changed(99, 100) == 2, "in part a hole"
        assert Path(made.paths[0]).read_bytes()[: 101 * 4096] == bytes(101 * 4096)
        if kind == ZERO:
            assert await changed(0, 9, NO_HOLE) == 10, "it is to have room of its own"
            assert made.disks[0].extents(0, 10 * 4096) == [(10 * 4096, 0)]

    with_applier(tmp_path / "rig", scene)
