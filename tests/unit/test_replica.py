"""The guest's view in every stage: reads, batches of writes, zeroes, discards, flushes, and what has to wait."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from common import limits
from common.batch import DISCARD, FAST_ZERO, FUA, NO_HOLE, WRITE, ZERO, Operation, Volume, WriteBatch
from common.disk import HOLE, CountingDisk, DelayDisk, DiskLayer, Fault, FaultDisk
from secondary.commit import failover_checkpoint, failover_latest
from secondary.header import Failure, Stage
from secondary.replica import GuestVolume
from tests.conftest import wait_until
from tests.heart import Rig, pattern, rig

BLOCK = 4096
SIZE = (1 << 20) + 1234


class Plain:
    """A receive buffer that nobody pools."""

    def __init__(self, data: bytes) -> None:
        self.view = memoryview(data)

    def pin(self) -> None:
        pass

    def unpin(self) -> None:
        pass


class Collected:
    """What a batch was finished with."""

    def __init__(self) -> None:
        self.answers: list[Mapping[int, int] | None] = []

    def batch(self, operations: list[Operation], data: bytes = b"") -> WriteBatch:
        fua = any(operation[4] & FUA for operation in operations)
        return WriteBatch(operations, Plain(data), 0, len(data), fua, self.answers.append)


@pytest.fixture(params=[512, BLOCK, 65536])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path / "rig", (SIZE,), block_size=request.param) as made:
        yield made


def layered(pair: Rig, layer: FaultDisk | DelayDisk | CountingDisk) -> GuestVolume:
    return GuestVolume(pair.buffer.volumes[0], layer)


def failure(pair: Rig) -> Failure | None:
    error = pair.buffer.header.get_error()
    return error.case if error is not None else None


def test_writes_at_any_offset_and_length_overlay_the_checkpoint(pair: Rig) -> None:
    pair.stream(0, pattern(300_000, 1))
    for offset, length in [
        (0, 1),
        (511, 2),
        (4095, 2),
        (70_000, 1),
        (65_535, 70_000),
        (SIZE - 1, 1),
        (SIZE - 5000, 5000),
    ]:
        pair.guest_write(offset, pattern(length, offset))
        pair.check()
    pair.stream(60_000, pattern(SIZE - 60_000, 2))
    pair.check()
    for offset, length in [(0, SIZE), (1, SIZE - 1), (65_000, 70_001), (SIZE - 1, 1), (130_000, 4096), (5, 0)]:
        assert pair.read(offset, length) == pair.oracle.view[offset : offset + length]
    pair.checkpoint()
    pair.check()


def test_operations_of_a_batch_take_effect_in_their_order(pair: Rig) -> None:
    done = Collected()
    data = bytes(range(1, 256)) * 40
    operations: list[Operation] = [
        (WRITE, 100, 8000, 0, 0),
        (ZERO, 50, 200, 0, NO_HOLE),
        (WRITE, 120, 10, 300, 0),
        (DISCARD, 0, 100_000, 0, 0),
        (WRITE, 0, 0, 0, 0),
        (WRITE, 8000, 2000, 10, FUA),
        (ZERO, 9000, 70_000, 0, FAST_ZERO),
    ]
    pair.guest.submit(done.batch(operations, data))
    assert done.answers == [{6: errno.EOPNOTSUPP}]
    pair.oracle.guest(100, data[:8000])
    pair.oracle.guest(50, bytes(200))
    pair.oracle.guest(120, data[300:310])
    pair.oracle.guest(8000, data[10:2010])
    pair.check()
    assert pair.buffer.volumes[0].counter(6) == 6


def test_a_read_is_one_request_and_gives_it_back(pair: Rig) -> None:
    pair.read(0, SIZE)
    with pair.buffer.volumes[0].requests.try_begin(0, SIZE):
        with pytest.raises(BlockingIOError):
            pair.read(5, 1)
        with pytest.raises(BlockingIOError):
            pair.guest.apply([(ZERO, 5, 1, 0, 0)], memoryview(b""), wait=False)
        assert pair.guest.block_status(0, 1000) == [(1000, 0)]
    pair.check()


def test_a_full_active_disk_is_enospc_for_what_no_longer_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MIN_POOL", 4 * BLOCK)
    made = Rig(tmp_path, (1 << 20,), buffer_bytes=8 * BLOCK)
    data = pattern(8 * BLOCK, 1)
    operations = [(WRITE, 0, 3 * BLOCK, 0, 0), (WRITE, 50 * BLOCK, 2 * BLOCK, 0, 0), (WRITE, 90 * BLOCK, 1, 0, 0)]
    with pytest.raises(BlockingIOError):  # one of them might have to wait when others are done
        made.guest.apply(operations, memoryview(data), wait=False)
    made.check()
    assert made.guest.apply(operations, memoryview(data), wait=True) == {1: errno.ENOSPC}
    made.oracle.guest(0, data[: 3 * BLOCK])
    made.oracle.guest(90 * BLOCK, data[:1])
    made.check()
    assert failure(made) is Failure.ACTIVE_DISK
    with pytest.raises(OSError) as caught:
        made.guest.write(100 * BLOCK, b"x")
    assert caught.value.errno == errno.ENOSPC
    made.guest_write(90 * BLOCK + 5, b"in place")
    made.checkpoint()
    made.guest_write(100 * BLOCK, b"x")
    made.check()
    made.close()


def test_a_fill_that_fails_fails_that_write_only_and_stamps_nothing(pair: Rig) -> None:
    start = 65536
    disk = FaultDisk(pair.guest.disk, Fault(frozenset({"read"}), errno.EIO, start=2 * start, end=2 * start + 1))
    guest = layered(pair, disk)
    done = Collected()
    data = pattern(2 * start, 3)
    # The second write covers whole blocks and a part of one that cannot be read.
    guest.submit(done.batch([(WRITE, 0, 5, 0, 0), (WRITE, 5, 2 * start, 0, 0), (WRITE, 4 * start, 100, 0, 0)], data))
    assert done.answers == [{1: errno.EIO}]
    disk.heal()
    pair.oracle.guest(0, data[:5])
    pair.oracle.guest(4 * start, data[:100])
    pair.check()
    assert failure(pair) is Failure.SECONDARY_DISK


def test_case_4_a_read_error_of_the_secondary_disk_reaches_the_guest(pair: Rig) -> None:
    guest = layered(pair, FaultDisk(pair.guest.disk, Fault(frozenset({"read"}), errno.EIO)))
    for read in (guest.read_into, guest.read_blocking):
        with pytest.raises(OSError) as caught:
            read(0, memoryview(bytearray(100)))
        assert caught.value.errno == errno.EIO
    assert failure(pair) is Failure.SECONDARY_DISK


def test_a_cold_read_is_left_to_a_thread(pair: Rig) -> None:
    guest = layered(pair, DelayDisk(pair.guest.disk))
    view = memoryview(bytearray(100))
    with pytest.raises(BlockingIOError):
        guest.read_into(0, view)
    guest.read_blocking(0, view)
    assert view == pair.oracle.view[:100]
    with pair.buffer.volumes[0].requests.try_begin(0, SIZE):
        pass


def test_contended_batches_finish_later_in_their_order(pair: Rig) -> None:
    order: list[int] = []
    done = asyncio.Event()

    async def scenario() -> None:
        request = pair.buffer.volumes[0].requests.cow_request_begin(0, 1)
        for number, operation in enumerate([(0, b"a" * 10), (5, b"b" * 10), (400_000, b"c" * 10), (8, b"d")]):
            offset, data = operation

            def finish(errors: Mapping[int, int] | None, number: int = number) -> None:
                assert errors is None
                order.append(number)
                if number == 3:
                    done.set()

            batch = WriteBatch([(WRITE, offset, len(data), 0, 0)], Plain(data), 0, len(data), False, finish)
            pair.guest.submit(batch)
            pair.oracle.guest(offset, data)
        await asyncio.sleep(0)
        assert order == []
        request.end()
        await asyncio.wait_for(done.wait(), 10)
        wait_until(lambda: not pair.guest._working, what="the worker to end")

    asyncio.run(scenario())
    assert order == [0, 1, 2, 3]
    pair.check()
    inline = Collected()
    pair.guest.submit(inline.batch([(ZERO, 0, 5, 0, 0)]))
    assert inline.answers == [None]


def test_a_holder_that_does_not_let_go_fails_the_write_and_is_recorded(tmp_path: Path) -> None:
    made = Rig(tmp_path, timeout_s=0.1)
    with made.buffer.volumes[0].requests.cow_request_begin(0, 1):
        assert made.guest.apply([(ZERO, 0, 1, 0, 0)], memoryview(b""), wait=True) == {0: errno.EIO}
    error = made.buffer.header.get_error()
    assert error is not None
    assert "held by process" in error.sentence
    made.close()


def test_block_status_shows_the_disk_s_holes_but_not_those_under_the_buffer(tmp_path: Path) -> None:
    with rig(tmp_path / "rig") as made:
        pair = made
        pair.disks[0].discard(0, 1 << 20)
        pair.oracle.disk[:] = bytes(1 << 20)
        pair.oracle.checkpoint()
        assert pair.guest.block_status(0, 1 << 20) == [(1 << 20, HOLE | 2)]
        pair.guest_write(BLOCK * 3, b"x")
        pair.stream(BLOCK * 5, b"y")
        assert pair.guest.block_status(0, 8 * BLOCK) == [
            (3 * BLOCK, 3), (BLOCK, 0), (BLOCK, 3), (BLOCK, 0), (2 * BLOCK, 3),
        ]  # fmt: skip
        assert pair.guest.block_status(5 * BLOCK + 10, 10) == [(10, 0)]
        failover_latest(pair.pair, force=True)
        assert pair.guest.block_status(0, 6 * BLOCK) == [(5 * BLOCK, 3), (BLOCK, 0)]


def promote(pair: Rig) -> None:
    """With old contents in the hidden disk, guest writes in the active one, and both in one block."""
    pair.stream(10_000, pattern(200_000, 1))
    pair.guest_write(100_000, pattern(200_000, 2))
    failover_checkpoint(pair.pair)


def view(pair: Rig) -> bytes:
    return pair.read(0, SIZE)


def test_failover_writes_go_to_the_disk_and_partial_ones_into_the_buffer_too(pair: Rig) -> None:
    promote(pair)
    assert pair.buffer.header.stage is Stage.FAILOVER
    assert view(pair) == pair.oracle.view
    written: list[tuple[int, int]] = []
    pair.guest.on_write = lambda offset, length: written.append((offset, length))
    for offset, length in [(9_999, 3), (99_990, 20), (150_001, 70_000), (SIZE - 1, 1), (20_000, 1)]:
        before = Path(pair.paths[0]).read_bytes()
        written.clear()
        pair.guest_write(offset, pattern(length, offset))
        assert view(pair) == pair.oracle.view
        after = Path(pair.paths[0]).read_bytes()
        assert after[offset : offset + length] == pattern(length, offset)
        for position in (index for index in range(SIZE) if before[index] != after[index]):
            assert any(start <= position < start + count for start, count in written)
    pair.guest.operate(ZERO, 30_000, 40_000, NO_HOLE)
    pair.oracle.guest(30_000, bytes(40_000))
    assert view(pair) == pair.oracle.view
    pair.guest.operate(DISCARD, 120_001, 1)
    assert view(pair) == pair.oracle.view
    pair.guest.operate(DISCARD, 131_072, 65_536)
    pair.oracle.guest(131_072, bytes(65_536))
    assert view(pair) == pair.oracle.view


def test_failover_failed_writes_go_where_the_block_is(pair: Rig) -> None:
    promote(pair)
    header = pair.buffer.header
    header.store_state(Stage.FAILOVER_FAILED, header.epoch, syncing=False)
    disk = FaultDisk(pair.guest.disk, Fault(frozenset({"write", "zero"}), errno.EIO))
    guest = layered(pair, disk)
    # Buffered blocks don't need the disk that failed, and don't lose their place.
    data = pattern(150_000, 7)
    guest.write(70_000, data)
    pair.oracle.guest(70_000, data)
    assert view(pair) == pair.oracle.view
    guest.operate(ZERO, 70_000, 100)
    pair.oracle.guest(70_000, bytes(100))
    guest.operate(DISCARD, 70_000, 100)
    assert view(pair) == pair.oracle.view
    with pytest.raises(OSError) as caught:
        guest.write(SIZE - 10, b"x")
    assert caught.value.errno == errno.EIO
    disk.heal()
    guest.write(SIZE - 10, b"x")
    pair.oracle.guest(SIZE - 10, b"x")
    guest.write(290_000, bytes(100_000))  # half of it buffered
    pair.oracle.guest(290_000, bytes(100_000))
    assert view(pair) == pair.oracle.view


def test_done_is_a_plain_disk_without_requests(pair: Rig) -> None:
    pair.stream(0, pattern(100_000, 1))
    failover_latest(pair.pair)
    with pair.buffer.volumes[0].requests.cow_request_begin(0, SIZE):
        assert pair.read(0, 100_000) == pair.oracle.disk[:100_000]
        pair.guest.write(5, b"hello")
        pair.guest.operate(ZERO, 10, 100)
    pair.oracle.stream(5, b"hello")
    pair.oracle.stream(10, bytes(100))
    pair.oracle.checkpoint()
    pair.check()


def test_flush_and_fua_reach_the_disk_after_promotion_only(tmp_path: Path) -> None:
    with rig(tmp_path / "rig") as made:
        disk = CountingDisk(made.guest.disk)
        faults = FaultDisk(disk)
        guest = GuestVolume(made.buffer.volumes[0], faults)
        answers: list[object] = []

        async def scenario() -> None:
            event = asyncio.Event()

            def done(answer: object) -> None:
                answers.append(answer)
                event.set()

            async def wait() -> object:
                await asyncio.wait_for(event.wait(), 10)
                event.clear()
                return answers.pop()

            def write() -> None:
                guest.submit(WriteBatch([(WRITE, 0, 1, 0, FUA)], Plain(b"x"), 0, 1, True, done))

            guest.flush(done)
            assert await wait() == 0
            write()
            assert await wait() is None
            assert disk.calls["flush"] == 0
            failover_latest(made.pair, force=True)
            guest.flush(done)
            assert await wait() == 0
            write()
            assert await wait() is None
            assert disk.calls["flush"] == 2
            faults.fail(Fault(frozenset({"flush"}), errno.EIO))
            guest.flush(done)
            assert await wait() == errno.EIO
            write()
            assert await wait() == {0: errno.EIO}

        asyncio.run(scenario())
        assert failure(made) is Failure.SECONDARY_DISK


def test_fua_of_what_could_be_written_is_durable_beside_what_could_not(tmp_path: Path) -> None:
    """Seed 100004072: requests that arrive together are one batch, and one of them failed."""
    with rig(tmp_path / "rig") as made:
        disk = CountingDisk(made.guest.disk)
        faults = FaultDisk(disk)
        guest = GuestVolume(made.buffer.volumes[0], faults)
        failover_latest(made.pair, force=True)
        faults.fail(Fault(frozenset({"write"}), errno.ENOSPC, start=BLOCK, end=2 * BLOCK))
        collected = Collected()

        async def scenario() -> None:
            operations = [(WRITE, at * BLOCK, 1, 0, FUA) for at in range(3)]
            guest.submit(collected.batch(operations, b"x"))
            while not collected.answers:  # noqa: ASYNC110 - a thread answers
                await asyncio.sleep(0.001)

        asyncio.run(asyncio.wait_for(scenario(), 10))
        assert collected.answers == [{1: errno.ENOSPC}]
        assert disk.calls["flush"] == 1


def test_fua_of_a_batch_that_a_failover_overtakes_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The secondary process switches the stage between the look at it and the request of the batch."""
    with rig(tmp_path / "rig") as made:
        disk = CountingDisk(made.guest.disk)
        guest = GuestVolume(made.buffer.volumes[0], disk)
        collected = Collected()

        def begin(*args: Any, **kwargs: Any) -> Any:
            failover_checkpoint(made.pair)
            return real(*args, **kwargs)

        async def scenario() -> None:
            guest.submit(collected.batch([(WRITE, 5 * BLOCK, BLOCK, 0, FUA)], pattern(BLOCK, 9)))
            while not collected.answers:  # noqa: ASYNC110 - a thread answers
                await asyncio.sleep(0.001)

        real = guest._begin
        monkeypatch.setattr(guest, "_begin", begin)
        asyncio.run(asyncio.wait_for(scenario(), 10))
        assert collected.answers == [None]
        assert Path(made.paths[0]).read_bytes()[5 * BLOCK : 6 * BLOCK] == pattern(BLOCK, 9)
        assert disk.calls["flush"] == 1


def test_a_flush_that_fails_fails_those_that_wait_for_it(tmp_path: Path) -> None:
    """The kernel tells only one of two flushes what it lost."""
    calls = 0

    class OnceDisk(DiskLayer):
        def flush(self) -> None:
            nonlocal calls
            calls += 1
            begun.set()
            assert asked.wait(10)
            if failures:
                raise failures.pop()

    begun, asked = threading.Event(), threading.Event()
    failures = [OSError(errno.EIO, "lost")]
    with rig(tmp_path / "rig") as made:
        guest = GuestVolume(made.buffer.volumes[0], OnceDisk(made.guest.disk))
        failover_latest(made.pair, force=True)
        answers: list[int] = []

        async def scenario() -> None:
            guest.flush(answers.append)
            await asyncio.to_thread(begun.wait, 10)
            for _ in range(2):
                guest.flush(answers.append)
            await asyncio.to_thread(wait_until, lambda: flushes() == 3)
            asked.set()
            while len(answers) < 3:  # noqa: ASYNC110 - a thread answers
                await asyncio.sleep(0.001)
            assert answers == [errno.EIO] * 3
            assert calls == 1
            guest.flush(answers.append)
            while len(answers) < 4:  # noqa: ASYNC110 - a thread answers
                await asyncio.sleep(0.001)
            assert answers.pop() == 0

        def flushes() -> int:
            return sum(thread.name.startswith("flush") for thread in threading.enumerate())

        asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_flush_under_way_or_arriving_is_known_to_who_leads_next(tmp_path: Path) -> None:
    """The kernel tells of what it lost only once: to a flush that nobody remembers, and the engine takes the disk for
    good."""

    class StuckDisk(DiskLayer):
        def flush(self) -> None:
            begun.set()
            assert asked.wait(10)
            raise OSError(errno.EIO, "lost")

    class Successor:
        def flush(self, done: Callable[[int], None]) -> None:
            done(-1)

    begun, asked = threading.Event(), threading.Event()
    with rig(tmp_path / "rig") as made:
        guest = GuestVolume(made.buffer.volumes[0], StuckDisk(made.guest.disk))
        failover_latest(made.pair, force=True)
        answers: list[int] = []

        async def scenario() -> None:
            guest.flush(answers.append)
            await asyncio.to_thread(begun.wait, 10)
            pausing = asyncio.create_task(guest.pause())
            for _ in range(3):
                await asyncio.sleep(0)
            assert not pausing.done()
            asked.set()
            await pausing
            assert guest.lost_writes
            assert answers == [errno.EIO]
            guest.flush(answers.append)
            assert answers == [errno.EIO], "it would be done behind the engine's back"
            guest.hand_over(cast(Volume, Successor()))
            assert answers == [errno.EIO, -1]

        asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_request_that_cannot_be_made_is_an_error_of_its_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files: the client is told, and the connection goes on."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with rig(tmp_path / "rig") as made:
        collected = Collected()
        monkeypatch.setattr(made.guest.requests, "try_ranges", refuse)
        made.guest.submit(collected.batch([(WRITE, 0, 1, 0, 0), (WRITE, BLOCK, 1, 0, 0)], b"x"))
        assert collected.answers == [{0: errno.EIO, 1: errno.EIO}]
        assert failure(made) is Failure.ACTIVE_DISK
        monkeypatch.undo()
        made.check()


def test_with_its_last_client_the_export_stops_being_in_the_backup_job_s_way(tmp_path: Path) -> None:
    with rig(tmp_path / "rig") as made:
        table = made.buffer.volumes[0].requests
        made.guest.client_connected()
        made.guest.client_connected()
        made.read(0, 1)
        made.guest.client_gone()
        assert table.try_alone() is None
        made.guest.client_gone()
        alone = table.try_alone()
        assert alone is not None
        table.release(alone)


def test_guest_writers_in_several_threads_never_get_the_same_slot(tmp_path: Path) -> None:
    with rig(tmp_path / "rig", (1 << 22,)) as made:

        def write(me: int) -> None:
            for block in range(me, 1024, 4):
                made.guest.write(block * BLOCK, pattern(BLOCK, block))

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for block in range(1024):
            assert made.read(block * BLOCK, BLOCK) == pattern(BLOCK, block)
        assert made.buffer.volumes[0].active.used(1) == 1024
