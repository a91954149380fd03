"""CowRequest: threads, processes, forks, the dead and the stopped, fairness."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import TimedOut
from secondary import requests, waits
from secondary.holders import find_holders
from secondary.locks import SETLK, UNLOCK_ALL
from secondary.requests import PRESENCE, CowRequest, RequestTable
from tests.conftest import wait_until

BLOCK = 4096
SIZE = 1 << 20


@pytest.fixture
def waiting() -> memoryview:
    return memoryview(bytearray(8)).cast("Q")


@pytest.fixture
def table(tmp_path: Path, waiting: memoryview) -> Iterator[RequestTable]:
    made = RequestTable(str(tmp_path / "requests"), SIZE, BLOCK, name="disk0", timeout_s=5, waiting=waiting)
    yield made
    made.close()


OTHER = """
import sys
from secondary.requests import RequestTable
table = RequestTable(sys.argv[1], {size}, {block}, timeout_s=30)
for line in sys.stdin:
    command, start, end, shared = line.split()
    if command == "begin":
        request = table.cow_request_begin(int(start), int(end), shared=shared == "True")
    elif command == "try":
        try:
            request = table.try_begin(int(start), int(end), shared=shared == "True")
        except BlockingIOError:
            print("blocked", flush=True)
            continue
    else:
        request.end()
    print("ok", flush=True)
"""


class Other:
    """Another process with the same table, driven line by line."""

    def __init__(self, path: str) -> None:
        code = OTHER.format(size=SIZE, block=BLOCK)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def send(self, command: str, start: int = 0, end: int = 0, *, shared: bool = False) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command} {start} {end} {shared}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, command: str, start: int = 0, end: int = 0, *, shared: bool = False) -> str:
        self.send(command, start, end, shared=shared)
        return self.answer()


@contextmanager
def other(table: RequestTable) -> Iterator[Other]:
    made = Other(table.path)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


def blocked(table: RequestTable, start: int, end: int, *, shared: bool = False) -> bool:
    try:
        table.try_begin(start, end, shared=shared).end()
    except BlockingIOError:
        return True
    return False


# One process


def test_exclusive_requests_exclude_all_shared_ones_only_exclusive(table: RequestTable) -> None:
    with table.cow_request_begin(BLOCK, 2 * BLOCK):
        assert blocked(table, BLOCK, 2 * BLOCK)
        assert blocked(table, 0, SIZE, shared=True)
        assert not blocked(table, 0, BLOCK)
        assert not blocked(table, 2 * BLOCK, SIZE)
    with table.cow_request_begin(0, BLOCK, shared=True):
        assert blocked(table, 0, BLOCK)
        assert not blocked(table, 0, BLOCK, shared=True)
    assert not blocked(table, 0, SIZE)


def test_ranges_are_rounded_out_to_blocks(table: RequestTable) -> None:
    with table.cow_request_begin(BLOCK + 1, BLOCK + 2) as request:
        assert (request.start, request.end_offset) == (BLOCK, 2 * BLOCK)
        assert blocked(table, BLOCK, BLOCK + 1)
        assert not blocked(table, 0, BLOCK)
    for start, end in [(-1, 1), (5, 5), (6, 5), (0, SIZE + 1)]:
        with pytest.raises(ValueError):
            table.cow_request_begin(start, end)


def test_ending_one_request_does_not_free_what_another_of_this_process_covers(table: RequestTable) -> None:
    """The caveat of the kernel's locks: an unlock frees the range whoever locked it, within one description."""
    first = table.cow_request_begin(0, 4 * BLOCK, shared=True)
    second = table.cow_request_begin(BLOCK, 2 * BLOCK, shared=True)
    table.cow_request_end(second)
    second.end()  # once more does nothing
    assert blocked(table, BLOCK, 2 * BLOCK)
    first.end()
    assert not blocked(table, 0, SIZE)


def test_several_ranges_are_taken_all_or_nothing(table: RequestTable) -> None:
    with table.cow_request_begin(8 * BLOCK, 9 * BLOCK):
        assert table.try_ranges([(0, BLOCK), (8 * BLOCK, 9 * BLOCK)], shared=False) is None
        assert not blocked(table, 0, BLOCK)
    held = table.try_ranges([(0, BLOCK), (8 * BLOCK, 9 * BLOCK)], shared=False)
    assert held is not None
    assert blocked(table, 0, BLOCK)
    assert blocked(table, 8 * BLOCK, SIZE)
    table.release(held)


def test_begin_waits_for_a_thread(table: RequestTable) -> None:
    request = table.cow_request_begin(0, BLOCK)
    order: list[str] = []

    def second() -> None:
        with table.cow_request_begin(0, BLOCK):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    wait_until(lambda: find_intents(table), what="the second request queues up")
    order.append("first")
    request.end()
    thread.join(10)
    assert order == ["first", "second"]


def find_intents(table: RequestTable) -> bool:
    return bool(find_holders(table.path, [(waits.INTENT, waits.INTENT + SIZE)]))


def test_wait_for_overlapping_requests(table: RequestTable) -> None:
    table.wait_for_overlapping_requests(0, SIZE)
    request = table.cow_request_begin(0, BLOCK, shared=True)
    table.wait_for_overlapping_requests(BLOCK, SIZE)
    waited = threading.Event()

    def wait() -> None:
        table.wait_for_overlapping_requests(0, BLOCK)
        waited.set()

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: find_intents(table), what="the wait queues up")
    assert not waited.is_set()
    request.end()
    assert waited.wait(10)
    thread.join(10)
    assert not blocked(table, 0, SIZE)


def test_a_wait_that_takes_too_long_names_the_holder(table: RequestTable) -> None:
    with table.cow_request_begin(0, BLOCK), pytest.raises(TimedOut, match=rf"process {os.getpid()} \(") as caught:
        table.cow_request_begin(0, SIZE, timeout_s=0.1)
    assert "disk0" in str(caught.value)
    assert "kill -CONT" in caught.value.hint
    # The wait that was given up gives back what the kernel grants it later.
    wait_until(lambda: not blocked(table, 0, SIZE), what="the abandoned wait to let go")


def test_a_reader_that_waits_too_long_names_no_other_reader(table: RequestTable) -> None:
    """Whoever reads the sentence ends that process."""
    with other(table) as writer, other(table) as reader:
        assert writer.ask("begin", 0, BLOCK) == "ok"
        assert reader.ask("begin", 8 * BLOCK, SIZE, shared=True) == "ok"
        for many in (False, True):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(TimedOut) as raised:
                if many:
                    patch.setattr(requests, "MAX_LENT", 0)
                table.cow_request_begin(0, SIZE, shared=True, timeout_s=0.01)
            assert f"process {writer.process.pid} (" in str(raised.value)
            assert f"process {reader.process.pid} (" not in str(raised.value)
        with pytest.raises(TimedOut, match=f"process {reader.process.pid} "):
            table.cow_request_begin(0, SIZE, timeout_s=0.01)


def test_many_threads_with_several_ranges_each_neither_collide_nor_deadlock(table: RequestTable) -> None:
    owner = [0] * 16
    problems: list[str] = []
    stop = time.monotonic() + 1.5

    def hammer(me: int) -> None:
        random_ = random.Random(me)
        while time.monotonic() < stop:
            blocks = sorted(random_.sample(range(16), random_.randint(1, 5)))
            shared = False
            held = table.wait_ranges([(b * BLOCK, (b + 1) * BLOCK) for b in blocks], shared=shared)
            for block in blocks:
                if owner[block]:
                    problems.append(f"{block} is {owner[block]}'s, not {me}'s")
                owner[block] = me
            for block in blocks:
                if owner[block] != me:
                    problems.append(f"{block} was taken from {me}")
                owner[block] = 0
            table.release(held)

    threads = [threading.Thread(target=hammer, args=(number + 1,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not problems


# The event loop


def test_awaiting_a_request_does_not_block_the_loop(table: RequestTable) -> None:
    async def scenario() -> None:
        first = await table.cow_request_begin_async(0, BLOCK)
        second = asyncio.create_task(table.cow_request_begin_async(0, SIZE))
        third = asyncio.create_task(table.wait_for_overlapping_requests_async(0, BLOCK))
        other_ = await table.cow_request_begin_async(8 * BLOCK, 9 * BLOCK, shared=True)
        other_.end()
        assert not second.done()
        assert not third.done()
        first.end()
        (await asyncio.wait_for(second, 10)).end()
        await asyncio.wait_for(third, 10)

    asyncio.run(scenario())
    assert not blocked(table, 0, SIZE)


def test_a_cancelled_wait_leaves_nothing_locked(table: RequestTable) -> None:
    async def scenario() -> None:
        with table.cow_request_begin(0, BLOCK):
            task = asyncio.create_task(table.cow_request_begin_async(0, BLOCK))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(asyncio.wait_for(scenario(), 10))
    wait_until(lambda: not blocked(table, 0, BLOCK), what="the cancelled wait to let go")


def test_an_awaited_timeout_names_the_holder(table: RequestTable) -> None:
    table.timeout_s = 0.1

    async def scenario() -> None:
        with pytest.raises(TimedOut, match=str(os.getpid())):
            await table.cow_request_begin_async(0, BLOCK)

    with table.cow_request_begin(0, BLOCK):
        asyncio.run(scenario())


# Processes


def test_processes_exclude_each_other(table: RequestTable) -> None:
    with other(table) as process:
        assert process.ask("begin", 0, BLOCK, shared=True) == "ok"
        assert blocked(table, 0, BLOCK)
        assert not blocked(table, 0, BLOCK, shared=True)
        assert process.ask("end") == "ok"
        with table.cow_request_begin(0, BLOCK):
            assert process.ask("try", 0, BLOCK) == "blocked"
            process.send("begin", 0, BLOCK)
        assert process.answer() == "ok"


def test_a_killed_holder_releases_at_once(table: RequestTable) -> None:
    with other(table) as process:
        assert process.ask("begin", 0, BLOCK) == "ok"
        got: list[float] = []

        def wait() -> None:
            with table.cow_request_begin(0, BLOCK):
                got.append(time.monotonic())

        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: find_intents(table), what="the wait queues up")
        killed = time.monotonic()
        process.process.kill()
        thread.join(10)
        assert got[0] - killed < 1.0


def test_a_killed_waiter_leaves_no_obstacle(table: RequestTable) -> None:
    with other(table) as process:
        with table.cow_request_begin(0, BLOCK):
            process.send("begin", 0, SIZE)
            wait_until(lambda: find_intents(table), what="the other process queues up")
            process.process.kill()
            process.process.wait()
        assert not blocked(table, 0, SIZE)


def test_a_stopped_holder_holds_up_only_those_that_overlap_it(table: RequestTable) -> None:
    with other(table) as process:
        assert process.ask("begin", 0, BLOCK, shared=True) == "ok"
        process.process.send_signal(signal.SIGSTOP)
        try:
            for block in range(1, 200):
                with table.cow_request_begin(block * BLOCK, (block + 1) * BLOCK, timeout_s=0.5):
                    pass
            with pytest.raises(TimedOut, match=rf"process {process.process.pid} \("):
                table.cow_request_begin(0, BLOCK, timeout_s=0.2)
        finally:
            process.process.send_signal(signal.SIGCONT)
        assert process.ask("end") == "ok"
        wait_until(lambda: not blocked(table, 0, SIZE), what="the abandoned wait to let go")


def test_a_wait_for_several_ranges_that_is_given_up_keeps_none_of_them(table: RequestTable) -> None:
    """A batch of the backup job, of which a stopped reader holds the second block, and then the third: nobody is to
    wait for the others."""
    ranges = [(block * BLOCK, (block + 1) * BLOCK) for block in (0, 4, 8)]
    with other(table) as process:
        assert process.ask("begin", *ranges[1], shared=True) == "ok"
        last = table.cow_request_begin(*ranges[2], shared=True)
        process.process.send_signal(signal.SIGSTOP)
        with pytest.raises(TimedOut) as raised:
            table.wait_ranges([*ranges[:2], (16 * BLOCK, 17 * BLOCK)], shared=False, timeout_s=0.1)
        assert f"process {os.getpid()} " not in str(raised.value)
        with pytest.raises(TimedOut):
            table.wait_ranges(ranges, shared=False, timeout_s=0.1)
        table.cow_request_begin(*ranges[0], timeout_s=1).end()
        process.process.send_signal(signal.SIGCONT)
        assert process.ask("end") == "ok"
        table.cow_request_begin(*ranges[1], timeout_s=5).end()
        last.end()
        wait_until(lambda: not table._lent, what="both waits to end")
        assert not blocked(table, 0, SIZE)


def test_one_that_is_stopped_while_it_waits_holds_nobody_up(
    table: RequestTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its place in the queue, and no request: nobody could be named, and nothing would ever be granted."""
    monkeypatch.setattr(waits, "PATIENCE_S", 0.05)
    with other(table) as process:
        with table.cow_request_begin(0, BLOCK):
            process.send("begin", 0, SIZE)
            wait_until(lambda: find_intents(table), what="the other process queues up")
            process.process.send_signal(signal.SIGSTOP)
            wait_until(lambda: all_stopped(process.process.pid), what="all of its threads to stop")
        assert find_intents(table)
        assert not find_holders(table.path, table.whole())
        granted: list[CowRequest] = []
        for ranges in ((0, SIZE), (BLOCK, 2 * BLOCK)):
            held = table.cow_request_begin(*ranges)
            thread = threading.Thread(target=lambda span=ranges: granted.append(table.cow_request_begin(*span)))
            thread.start()
            wait_until(lambda: table._lent, what="the wait for its turn")
            held.end()
            thread.join(10)
            granted.pop().end()
        process.process.send_signal(signal.SIGCONT)
        assert process.answer() == "ok"
        assert blocked(table, 0, BLOCK)
        assert process.ask("end") == "ok"
        wait_until(lambda: not table._lent, what="the places that were given up")
        assert not find_intents(table)


def all_stopped(pid: int) -> bool:
    stats = [Path(f"/proc/{pid}/task/{thread}/stat").read_text() for thread in os.listdir(f"/proc/{pid}/task")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def test_one_that_waits_for_a_stopped_holder_gives_way_to_the_others(table: RequestTable) -> None:
    """A checkpoint waits for everybody; while what it waits for is stuck it must not stop everybody, too."""
    with other(table) as process:
        assert process.ask("begin", 0, BLOCK, shared=True) == "ok"
        process.process.send_signal(signal.SIGSTOP)
        errors: list[TimedOut] = []

        def checkpoint() -> None:
            try:
                table.cow_request_begin(0, SIZE, timeout_s=2.0).end()
            except TimedOut as error:
                errors.append(error)

        thread = threading.Thread(target=checkpoint)
        thread.start()
        wait_until(lambda: find_intents(table), what="the checkpoint queues up")
        started = time.monotonic()
        table.cow_request_begin(8 * BLOCK, 9 * BLOCK, timeout_s=10).end()
        assert time.monotonic() - started < 2 * waits.PATIENCE_S + 0.5
        thread.join(10)
        process.process.send_signal(signal.SIGCONT)
        assert str(process.process.pid) in str(errors[0])


def test_a_forked_child_neither_holds_nor_frees_what_its_parent_has(table: RequestTable) -> None:
    request = table.cow_request_begin(0, BLOCK)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            request.end()  # the parent's: nothing happens
            mine = table.try_begin(BLOCK, 2 * BLOCK)
            os.write(ready[1], b"r" if blocked(table, 0, BLOCK) else b"x")
            os.read(go[0], 1)
            mine.end()
            status = 0
        finally:
            os._exit(status)
    assert os.read(ready[0], 1) == b"r"
    assert blocked(table, 0, BLOCK)
    assert blocked(table, BLOCK, 2 * BLOCK)
    request.end()
    assert not blocked(table, 0, BLOCK)  # although the child lives on
    os.write(go[1], b"g")
    assert os.waitpid(child, 0)[1] == 0
    assert not blocked(table, 0, SIZE)
    for fd in (*ready, *go):
        os.close(fd)


# Fairness


def test_a_stream_of_readers_does_not_starve_a_checkpoint(table: RequestTable) -> None:
    stop = threading.Event()
    reads = [0, 0, 0]

    def reader(me: int) -> None:
        random_ = random.Random(me)
        previous = table.cow_request_begin(0, SIZE, shared=True)
        while not stop.is_set():
            # Overlap the next with the last, so that at no instant none is in flight - unless a begin has to queue.
            start = random_.randrange(200) * BLOCK
            try:
                following = table.try_begin(start, start + 8 * BLOCK, shared=True)
            except BlockingIOError:
                previous.end()
                following = table.cow_request_begin(start, start + 8 * BLOCK, shared=True)
            else:
                previous.end()
            previous = following
            reads[me] += 1
        previous.end()

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: min(reads) > 10, what="all readers to read")
    longest = 0.0
    for _ in range(20):
        started = time.monotonic()
        with table.cow_request_begin(0, SIZE, timeout_s=4):
            longest = max(longest, time.monotonic() - started)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert longest < 2.0


def test_a_stream_of_copies_does_not_starve_a_reader(table: RequestTable) -> None:
    with other(table):
        stop = threading.Event()
        copies = [0, 0]

        def copy(me: int) -> None:
            while not stop.is_set():
                with table.cow_request_begin(0, 64 * BLOCK):
                    copies[me] += 1

        threads = [threading.Thread(target=copy, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: min(copies) > 10, what="both to copy")
        longest = 0.0
        for block in range(20):
            started = time.monotonic()
            with table.cow_request_begin(block * BLOCK, (block + 1) * BLOCK, shared=True, timeout_s=4):
                longest = max(longest, time.monotonic() - started)
        stop.set()
        for thread in threads:
            thread.join(10)
        assert longest < 2.0


# Presence


def test_the_backup_job_is_alone_only_while_nobody_is_present(table: RequestTable) -> None:
    job = RequestTable(table.path, SIZE, BLOCK)
    alone = job.try_alone()
    assert alone is not None
    with pytest.raises(BlockingIOError):
        table.try_begin(0, BLOCK, shared=True)
    job.release(alone)
    request = table.try_begin(0, BLOCK, shared=True)
    assert job.try_alone() is None
    table.leave()  # not while a request is in flight
    assert job.try_alone() is None
    request.end()
    assert job.try_alone() is None  # present between requests, too
    table.leave()
    alone = job.try_alone()
    assert alone is not None
    entered = threading.Event()

    def enter() -> None:
        with table.cow_request_begin(0, BLOCK, shared=True):
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    assert not entered.is_set()
    job.release(alone)
    assert entered.wait(10)
    thread.join(10)
    job.close()


def test_a_slow_backup_job_is_not_alone_again_and_again_beside_a_reader_that_comes(
    table: RequestTable, waiting: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches whose old contents are cold: it is alone for longer than an announcement is valid, and then not for a
    moment."""
    monkeypatch.setattr(requests, "ANNOUNCE_S", 0.02)
    job = RequestTable(table.path, SIZE, BLOCK, waiting=waiting)
    comes, entered = threading.Event(), threading.Event()

    def read() -> None:
        comes.set()
        with table.cow_request_begin(0, BLOCK, shared=True):
            entered.set()

    reader = threading.Thread(target=read)
    alone = job.try_alone()
    reader.start()
    assert comes.wait(10)
    turns = 0
    while alone is not None and turns < 12:
        turns += 1
        assert not entered.wait(0.06)  # old contents are read
        job.release(alone)
        alone = job.try_alone()
    if alone is not None:
        job.release(alone)
    assert entered.wait(10)
    reader.join(10)
    assert turns <= 6
    job.close()


def test_internal_bytes_time_out_with_the_holder_too(table: RequestTable) -> None:
    held = table.wait_byte(PRESENCE, shared=True)
    with pytest.raises(TimedOut, match=str(os.getpid())):
        table.wait_byte(PRESENCE, timeout_s=0.05)
    table.release(held)


def test_a_lock_that_the_kernel_has_no_memory_for_leaves_none(
    table: RequestTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def lock(fd: int, command: int, argument: bytes) -> object:
        nonlocal calls
        calls += command == SETLK and argument != UNLOCK_ALL
        if calls == 2:
            calls += 1
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return fcntl.fcntl(fd, command, argument)

    table.try_begin(0, 1).end()
    monkeypatch.setattr(requests, "_fcntl", lock)
    with pytest.raises(OSError, match="No locks available"):
        table.try_ranges(((0, BLOCK), (4 * BLOCK, 5 * BLOCK)), shared=False)
    calls = 1
    with pytest.raises(OSError, match="No locks available"):
        table.try_byte(PRESENCE + 1)
    monkeypatch.undo()
    other = RequestTable(table.path, SIZE, BLOCK, timeout_s=1)
    other.cow_request_begin(0, SIZE).end()
    other.leave()
    table.leave()  # all that was taken is back, so nobody is present
    alone = other.try_alone()
    assert alone is not None
    other.close()


def test_a_wait_for_which_there_is_no_descriptor_or_thread_loses_none(
    table: RequestTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    held = table.try_begin(0, BLOCK)
    table.release(table.take())  # one that is free
    monkeypatch.setattr(table, "_open", refuse)
    for _ in range(2):
        with pytest.raises(OSError, match="Too many open files"):
            table.cow_request_begin(0, BLOCK)
    monkeypatch.undo()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(2):
        with pytest.raises(OSError, match="Too many open files"):
            table.cow_request_begin(0, BLOCK)
    monkeypatch.undo()
    held.end()
    assert len(table._free) + 1 == len(table._all)  # that of the presence
    assert not table._lent


def test_waits_behind_a_stopped_holder_do_not_become_more_and_more(
    table: RequestTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever tries again and again, for hours: each attempt left a thread and two descriptors behind."""
    monkeypatch.setattr(requests, "MAX_LENT", 6)
    other = RequestTable(table.path, SIZE, BLOCK)
    held = other.try_begin(0, BLOCK, shared=True)
    for _ in range(8):
        with pytest.raises(TimedOut, match="bytes 0 to 4096 of volume disk0, held by process"):
            table.cow_request_begin(0, BLOCK, timeout_s=0.005)
    waiting = [thread for thread in threading.enumerate() if thread.name == "cow wait disk0"]
    assert len(waiting) == 3
    assert len(table._all) <= 6 + 2
    late = threading.Thread(target=lambda: table.cow_request_begin(0, BLOCK).end())
    late.start()
    held.end()
    late.join(5)
    assert not late.is_alive()
    for thread in waiting:
        thread.join(5)
    assert not table._lent
    other.close()


def test_a_table_is_closed_while_an_abandoned_wait_is_left_behind(tmp_path: Path) -> None:
    """Its helper finds out when the kernel grants it what nobody wants any more, and touches no file but its own."""
    path = str(tmp_path / "requests")
    holder, table = RequestTable(path, SIZE, BLOCK), RequestTable(path, SIZE, BLOCK, timeout_s=0.05)
    request = holder.cow_request_begin(0, BLOCK)
    with pytest.raises(TimedOut):
        table.cow_request_begin(0, BLOCK)
    helpers = [thread for thread in threading.enumerate() if thread.name == "cow wait "]
    assert len(helpers) == 1
    before = len(os.listdir("/proc/self/fd"))
    table.close()
    lent = len(os.listdir("/proc/self/fd"))
    assert lent < before
    others = [os.open(path, os.O_RDWR) for _ in range(8)]  # descriptors take the numbers that became free
    request.end()
    for thread in helpers:
        thread.join(10)
    assert len(os.listdir("/proc/self/fd")) == lent + len(others) - 2, "its two descriptions, and none of ours"
    for fd in others:
        os.close(fd)
    holder.cow_request_begin(0, SIZE).end()
    holder.close()
