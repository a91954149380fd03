"""Durability on request: who asks when, and what a flush that fails means for those who wait."""

from __future__ import annotations

import asyncio
import errno
import threading

from common.flusher import Flusher


class Gate:
    """A disk whose flushes wait to be told how they end."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.errors: list[OSError] = []
        self.calls = 0

    def flush(self) -> None:
        self.calls += 1
        self.begun.release()
        assert self.go.acquire(timeout=10)
        if self.errors:
            raise self.errors.pop()


def run(errors: list[OSError]) -> tuple[list[tuple[str, int]], int, int]:
    """One asks, two more while its flush runs, one when all have their answers; (who, errno), flushes, errors told."""

    async def scenario() -> None:
        flusher = Flusher([disk], told.append)
        flusher.request(lambda code: answers.append(("first", code)))
        await asyncio.to_thread(disk.begun.acquire)
        for name in ("second", "third"):
            flusher.request(lambda code, name=name: answers.append((name, code)))  # type: ignore[misc]
        disk.go.release(3)
        while len(answers) < 3:  # noqa: ASYNC110 - a thread answers
            await asyncio.sleep(0.001)
        flusher.request(lambda code: answers.append(("last", code)))
        while len(answers) < 4:  # noqa: ASYNC110 - a thread answers
            await asyncio.sleep(0.001)
        await asyncio.to_thread(flusher.close)

    disk = Gate()
    disk.errors = errors
    told: list[OSError] = []
    answers: list[tuple[str, int]] = []
    asyncio.run(asyncio.wait_for(scenario(), 10))
    return answers, disk.calls, len(told)


def test_who_asks_while_a_flush_runs_shares_the_next_one() -> None:
    assert run([]) == ([("first", 0), ("second", 0), ("third", 0), ("last", 0)], 3, 0)


def test_a_flush_that_fails_fails_those_who_wait() -> None:
    """What they wrote may be among what the kernel lost, and it tells of that only once."""
    failed = [("first", errno.EIO), ("second", errno.EIO), ("third", errno.EIO), ("last", 0)]
    assert run([OSError(errno.EIO, "lost")]) == (failed, 2, 1)


def test_who_waits_for_another_flush_at_the_end_is_told_that_there_is_none() -> None:
    """A client's flush takes longer than a stop waits, and there is one behind it."""

    async def scenario() -> None:
        flusher = Flusher([disk], lambda _error: None)
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: uncaught.append(context))
        flusher.request(lambda code: answers.append(("first", code)))
        await asyncio.to_thread(disk.begun.acquire)
        flusher.request(lambda code: answers.append(("second", code)))
        disk.go.release()
        flusher.close()
        while len(answers) < 2 and not uncaught:  # noqa: ASYNC110 - a thread answers
            await asyncio.sleep(0.001)

    disk = Gate()
    answers: list[tuple[str, int]] = []
    uncaught: list[dict[str, object]] = []
    asyncio.run(asyncio.wait_for(scenario(), 10))
    assert not uncaught
    assert sorted(answers) == [("first", 0), ("second", errno.EIO)]
    assert disk.calls == 1
