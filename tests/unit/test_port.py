"""The two ZeroMQ sockets: everything sent arrives, in order; who has the wrong key stays outside; a loss is noticed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import zmq

from common.errors import AddressInUse
from common.keys import CurveKeys
from common.port import COPY_BELOW, Dialer, Frame, Listener, zmq_context

DEADLINE_S = 20.0


class Log:
    """Collects what a port tells and lets a test wait for it."""

    def __init__(self) -> None:
        self.frames: list[list[bytes]] = []
        self.peers: list[bytes] = []
        self.ups = 0
        self.downs: list[str] = []
        self._changed = asyncio.Event()

    def on_frames(self, frames: list[bytes]) -> None:
        self.frames.append(frames)
        self._changed.set()

    def on_peer_frames(self, peer: bytes, frames: list[Frame]) -> None:
        self.peers.append(peer)
        self.on_frames([bytes(frame) for frame in frames])

    def on_drained(self) -> None:
        self._changed.set()

    def connection_up(self) -> None:
        self.ups += 1
        self._changed.set()

    def connection_down(self, reason: str) -> None:
        self.downs.append(reason)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


def run(test: Callable[[zmq.Context[zmq.Socket[bytes]]], Awaitable[None]]) -> None:
    async def main() -> None:
        with zmq_context() as context:
            await test(context)

    asyncio.run(main())


def keys() -> tuple[CurveKeys, CurveKeys]:
    (public_a, secret_a), (public_b, secret_b) = zmq.curve_keypair(), zmq.curve_keypair()
    return CurveKeys(public_a, secret_a, public_b), CurveKeys(public_b, secret_b, public_a)


@pytest.mark.parametrize("curve", [False, True])
def test_everything_arrives_in_order(tmp_path: Path, curve: bool) -> None:
    mine, theirs = keys() if curve else (None, None)

    async def test(context: zmq.Context[zmq.Socket[bytes]]) -> None:
        here, there = Log(), Log()
        address = f"ipc://{tmp_path}/s"
        listener = Listener(context, address, theirs, there.on_peer_frames, there.on_drained, there.on_drained)
        dialer = Dialer(context, address, mine, here.on_frames, here.on_drained, here)
        await here.until(lambda: here.ups == 1)
        sizes = [0, 1, 4096, COPY_BELOW, 2 * COPY_BELOW] * 20
        sent = [[b"%d" % index, os.urandom(size)] for index, size in enumerate(sizes)]
        for message in sent:
            assert dialer.send(message)
        await there.until(lambda: len(there.frames) == len(sent))
        assert there.frames == sent
        for index in range(100):
            assert listener.send(there.peers[0], [b"answer", b"%d" % index])
        await here.until(lambda: len(here.frames) == 100)
        assert here.frames == [[b"answer", b"%d" % index] for index in range(100)]
        listener.close()
        await here.until(lambda: bool(here.downs))
        dialer.close()

    run(test)


def test_a_wrong_key_stays_outside(tmp_path: Path) -> None:
    _, theirs = keys()
    stranger, _ = keys()
    wrong = CurveKeys(stranger.public, stranger.secret, theirs.public)

    async def test(context: zmq.Context[zmq.Socket[bytes]]) -> None:
        here, there = Log(), Log()
        address = f"ipc://{tmp_path}/s"
        listener = Listener(context, address, theirs, there.on_peer_frames, there.on_drained, there.on_drained)
        dialer = Dialer(context, address, wrong, here.on_frames, here.on_drained, here)
        dialer.send([b"let me in"])
        await here.until(lambda: bool(here.downs))
        assert "keys do not match" in here.downs[0]
        assert here.ups == 0
        assert not there.frames
        dialer.close()
        listener.close()

    run(test)


def test_a_second_listener_is_refused() -> None:
    async def test(context: zmq.Context[zmq.Socket[bytes]]) -> None:
        log = Log()
        first = Listener(context, "tcp://127.0.0.1:*", None, log.on_peer_frames, log.on_drained, log.on_drained)
        address = str(first.socket.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")
        with pytest.raises(AddressInUse, match="in use"):
            Listener(context, address, None, log.on_peer_frames, log.on_drained, log.on_drained)
        first.close()

    run(test)
