"""The primary's link where nobody greets back: whom it takes for a stranger."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, cast

import pytest
import zmq

from common import plain, port
from common.keys import CurveKeys
from common.port import SILENT, zmq_context
from primary.contact import State
from primary.link import Link

DEADLINE_S = 20.0
CALLS = 3


class Waiting:
    """A session that nothing was heard for: it has no deadlines."""

    state = State.IDLE

    def next_deadline(self) -> None:
        return None


def pair_of_keys(kind: str) -> CurveKeys | None:
    return CurveKeys(*zmq.curve_keypair(), zmq.curve_keypair()[0]) if kind == "curve" else None


async def called(listener: socket.socket, link: Link, *, hangs_up: bool) -> None:
    """Until the link has come ``CALLS`` times and was told of the last one but one."""
    loop = asyncio.get_running_loop()
    taken: list[socket.socket] = []
    async with asyncio.timeout(DEADLINE_S):
        while len(taken) < CALLS:
            connection, _ = await loop.sock_accept(listener)
            taken.append(connection)
            if hangs_up:
                connection.close()
        while not link.trouble:  # noqa: ASYNC110 - the link tells nobody
            await asyncio.sleep(0.001)
    for connection in taken:
        connection.close()


@pytest.mark.parametrize("hangs_up", [False, True], ids=["silent", "hangs up"])
@pytest.mark.parametrize("kind", ["plain", "curve"])
def test_who_says_nothing_is_no_stranger(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str, hangs_up: bool
) -> None:
    """A primary that starts while its secondary hangs would be refused for its keys; it may go on alone."""
    for module in (plain, port):
        monkeypatch.setattr(module, "HANDSHAKE_TIMEOUT_MS", 10_000 if hangs_up else 150)

    async def scenario() -> None:
        with zmq_context() as context, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(short_dir / "s"))
            listener.listen(8)
            listener.setblocking(False)
            effects: list[Any] = []
            link = Link(cast(Any, Waiting()), context, f"ipc://{short_dir}/s", pair_of_keys(kind), effects.append)
            link.open()
            await called(listener, link, hangs_up=hangs_up)
            assert link.turned_away == hangs_up
            assert (link.trouble == SILENT) != hangs_up
            link.close()

    asyncio.run(scenario())


def test_a_listener_that_takes_nobody_is_no_stranger(short_dir: Path) -> None:
    """Its backlog is full of those who came before: it hangs."""

    async def scenario() -> None:
        with zmq_context() as context, socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as one:
            listener.bind(str(short_dir / "s"))
            listener.listen(0)
            one.connect(str(short_dir / "s"))
            link = Link(cast(Any, Waiting()), context, f"ipc://{short_dir}/s", None, lambda _effect: None)
            link.open()
            dialer = cast(plain.PlainDialer, link._dialer)
            async with asyncio.timeout(DEADLINE_S):
                while dialer._pause_ms < 4 * port.RECONNECT_MS:  # noqa: ASYNC110 - nobody is told
                    await asyncio.sleep(0.001)
            assert link.trouble == ""
            assert not link.turned_away
            link.close()

    asyncio.run(scenario())
