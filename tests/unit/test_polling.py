"""Busy polling: nothing is missed by it, and it is done only where events follow each other quickly."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable

import pytest

from common.polling import PollingSelector

LONG_S = 60.0
"""A limit that no wait of these tests reaches: every wait is a short one."""


def run(selector: PollingSelector, main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await main()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(bounded())


async def echo(turns: int) -> None:
    """``turns`` messages to a thread and back; the loop waits for each, also for one that came at once."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)

    def answer() -> None:
        while data := theirs.recv(1):
            theirs.sendall(data)

    thread = threading.Thread(target=answer)
    thread.start()
    loop = asyncio.get_running_loop()
    for turn in range(turns):
        ours.send(bytes((turn % 256,)))
        came = asyncio.Event()
        loop.add_reader(ours, came.set)
        await came.wait()
        assert ours.recv(1) == bytes((turn % 256,))
    loop.remove_reader(ours)
    ours.close()
    thread.join()
    theirs.close()


@pytest.mark.parametrize("limit_s", [0.0, 1e-6, LONG_S])
def test_nothing_is_missed(limit_s: float) -> None:
    selector = PollingSelector()
    selector.limit_s = limit_s
    run(selector, lambda: echo(300))
    assert (selector.polled_s > 0) == (limit_s > 0) or limit_s == 1e-6


def test_timers_and_calls_from_threads_come_while_it_polls() -> None:
    selector = PollingSelector()
    selector.limit_s = LONG_S

    async def main() -> None:
        await echo(300)
        assert selector.polled_s > 0
        loop = asyncio.get_running_loop()
        called = asyncio.Event()
        loop.call_later(0.01, called.set)
        await called.wait()
        called.clear()
        thread = threading.Thread(target=loop.call_soon_threadsafe, args=(called.set,))
        thread.start()
        await called.wait()
        thread.join()
        assert await asyncio.to_thread(lambda: 7) == 7

    run(selector, main)


def test_who_waits_long_does_not_poll() -> None:
    """Every wait is longer than the limit: it never begins. And what was begun ends after a few."""
    selector = PollingSelector()
    selector.limit_s = 1e-9

    async def idle(waits: int) -> None:
        for _ in range(waits):
            await asyncio.sleep(0.001)

    async def main() -> None:
        await idle(20)
        assert selector.polled_s == 0
        selector.limit_s = LONG_S
        await echo(300)
        selector.limit_s = 1e-9
        polled_s = 0.0
        while polled_s != selector.polled_s:
            polled_s = selector.polled_s
            await idle(10)
        assert polled_s > 0
        await idle(20)
        assert selector.polled_s == polled_s

    run(selector, main)
