"""The sockets of the stream, the loop's own and libzmq's, each with each: everything sent arrives, in order; who has
the wrong key stays outside; a loss is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import zmq

from common import zmtp
from common.addresses import Endpoint, endpoints
from common.errors import AddressInUse, ConfigError
from common.keys import CurveKeys
from common.plain import PlainDialer, PlainListener
from common.port import COPY_BELOW, Dialer, Frame, Listener, zmq_context
from common.transport import Context

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


def run(test: Callable[[Context], Awaitable[None]]) -> None:
    async def main() -> None:
        with zmq_context() as context:
            await test(context)

    asyncio.run(main())


def keys() -> tuple[CurveKeys, CurveKeys]:
    (public_a, secret_a), (public_b, secret_b) = zmq.curve_keypair(), zmq.curve_keypair()
    return CurveKeys(public_a, secret_a, public_b), CurveKeys(public_b, secret_b, public_a)


def make_dialer(kind: str, context: Context, address: str, secrets: CurveKeys | None, log: Log) -> Dialer | PlainDialer:
    if kind == "plain":
        return PlainDialer(address, log.on_frames, log.on_drained, log)
    return Dialer(context, address, secrets, log.on_frames, log.on_drained, log)


def make_listener(
    kind: str, context: Context, address: str, secrets: CurveKeys | None, log: Log
) -> Listener | PlainListener:
    if kind == "plain":
        return PlainListener(address, log.on_peer_frames, log.on_drained, log.on_drained)
    return Listener(context, address, secrets, log.on_peer_frames, log.on_drained, log.on_drained)


PAIRINGS = [("plain", "plain"), ("plain", "libzmq"), ("libzmq", "plain"), ("libzmq", "libzmq"), ("curve", "curve")]


@pytest.mark.parametrize(("dialing", "listening"), PAIRINGS)
def test_everything_arrives_in_order(tmp_path: Path, dialing: str, listening: str) -> None:
    mine, theirs = keys() if dialing == "curve" else (None, None)

    async def test(context: Context) -> None:
        here, there = Log(), Log()
        address = f"ipc://{tmp_path}/s"
        listener = make_listener(listening, context, address, theirs, there)
        dialer = make_dialer(dialing, context, address, mine, here)
        await here.until(lambda: here.ups == 1)
        sizes = [0, 1, 4096, COPY_BELOW, 2 * COPY_BELOW] * 20
        sent = [[b"%d" % index, os.urandom(size)] for index, size in enumerate(sizes)]
        assert dialer.send(sent[0])
        await there.until(lambda: len(there.frames) == 1)
        listener.trust(there.peers[0])  # only who is in session may send the long ones
        for message in sent[1:]:
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


@pytest.mark.parametrize(("dialing", "listening"), PAIRINGS[:3])
def test_a_listener_that_comes_back_is_found(tmp_path: Path, dialing: str, listening: str) -> None:
    async def test(context: Context) -> None:
        here, there = Log(), Log()
        address = f"ipc://{tmp_path}/s"
        dialer = make_dialer(dialing, context, address, None, here)
        for times in (1, 2):
            listener = make_listener(listening, context, address, None, there)
            await here.until(lambda times=times: here.ups == times)  # type: ignore[misc]
            assert dialer.send([b"hello"])
            await there.until(lambda times=times: len(there.frames) == times)  # type: ignore[misc]
            downs = len(here.downs)
            listener.close()
            await here.until(lambda downs=downs: len(here.downs) > downs)  # type: ignore[misc]
        dialer.close()

    run(test)


def test_a_peer_that_takes_nothing_blocks_nobody(tmp_path: Path) -> None:
    """What does not fit into the socket waits here, in order, and another connection goes on."""

    async def test(context: Context) -> None:
        here, other, there = Log(), Log(), Log()
        address = f"ipc://{tmp_path}/s"
        listener = make_listener("plain", context, address, None, there)
        slow = await asyncio.open_unix_connection(f"{tmp_path}/s")
        slow[1].write(zmtp.greeting() + zmtp.ready(b"DEALER") + zmtp.prefix(4) + b"slow")
        await there.until(lambda: len(there.frames) == 1)
        payload = os.urandom(64 << 10)
        for _ in range(200):  # 12 MiB, many times what the kernel takes
            assert listener.send(there.peers[0], [payload])
        dialer = make_dialer("plain", context, address, None, other)
        await other.until(lambda: other.ups == 1)
        dialer.send([b"quick"])
        await there.until(lambda: len(there.frames) == 2)
        assert listener.send(there.peers[1], [b"answer"])
        await other.until(lambda: other.frames == [[b"answer"]])
        head = len(zmtp.greeting() + zmtp.ready(b"ROUTER"))
        await slow[0].readexactly(head)
        for _ in range(200):
            assert await slow[0].readexactly(9 + len(payload)) == zmtp.prefix(len(payload)) + payload
        slow[1].close()
        dialer.close()
        listener.close()
        assert not here.frames

    run(test)


def test_no_handshake_and_a_wrong_one_close_that_connection_alone(tmp_path: Path) -> None:
    async def test(context: Context) -> None:
        good, there = Log(), Log()
        address = f"ipc://{tmp_path}/s"
        listener = make_listener("plain", context, address, None, there)
        dialer = make_dialer("plain", context, address, None, good)
        await good.until(lambda: good.ups == 1)
        for junk in (
            b"GET / HTTP/1.1\r\n\r\n",
            zmtp.greeting() + zmtp.ready(b"PUB"),
            zmtp.greeting() + zmtp.prefix(5) + b"hello",
            zmtp.greeting() + zmtp.command(b"READY", b"\xff"),
        ):
            reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/s")
            writer.write(junk)
            async with asyncio.timeout(DEADLINE_S):
                await reader.read()  # until the listener hangs up
            writer.close()
        dialer.send([b"still here"])
        await there.until(lambda: there.frames == [[b"still here"]])
        dialer.close()
        listener.close()

    run(test)


def test_questions_whose_answers_nobody_reads_end_the_connection(tmp_path: Path) -> None:
    async def test(context: Context) -> None:
        there = Log()
        listener = make_listener("plain", context, f"ipc://{tmp_path}/s", None, there)
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as peer:
            peer.setblocking(False)
            await loop.sock_connect(peer, f"{tmp_path}/s")
            await loop.sock_sendall(peer, zmtp.greeting() + zmtp.ready(b"DEALER"))
            pings = zmtp.command(b"PING", b"\0\1" + bytes(16)) * 1000
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                async with asyncio.timeout(DEADLINE_S):
                    while True:
                        await loop.sock_sendall(peer, pings)
        listener.close()

    run(test)


def test_a_wrong_key_stays_outside(tmp_path: Path) -> None:
    _, theirs = keys()
    stranger, _ = keys()
    wrong = CurveKeys(stranger.public, stranger.secret, theirs.public)

    async def test(context: Context) -> None:
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


@pytest.mark.parametrize("kind", ["plain", "libzmq"])
def test_a_second_listener_is_refused(kind: str) -> None:
    async def test(context: Context) -> None:
        log = Log()
        first = make_listener(kind, context, "tcp://127.0.0.1:*", None, log)
        if isinstance(first, PlainListener):
            address = f"tcp://127.0.0.1:{first.port}"
        else:
            address = str(first.socket.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")
        with pytest.raises(AddressInUse, match="in use"):
            make_listener(kind, context, address, None, log)
        first.close()

    run(test)


@pytest.mark.parametrize("kind", ["plain", "libzmq"])
def test_a_stale_socket_file_is_replaced(tmp_path: Path, kind: str) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(f"{tmp_path}/s")

    async def test(context: Context) -> None:
        log, there = Log(), Log()
        listener = make_listener(kind, context, f"ipc://{tmp_path}/s", None, there)
        dialer = make_dialer("plain", context, f"ipc://{tmp_path}/s", None, log)
        await log.until(lambda: log.ups == 1)
        assert os.stat(tmp_path / "s").st_mode & 0o777 == 0o600
        dialer.close()
        listener.close()
        assert kind == "libzmq" or not (tmp_path / "s").exists()  # libzmq removes it later, from a thread

    run(test)


@pytest.mark.parametrize("host", ["no..such", "nosuch.invalid"])
def test_a_name_that_cannot_be_found_is_told_once_and_tried_again(
    host: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(context: Context) -> None:
        loop = asyncio.get_running_loop()
        tried = asyncio.Semaphore(0)

        def look_up(address: str) -> list[Endpoint]:
            loop.call_soon_threadsafe(tried.release)
            return endpoints(address)

        monkeypatch.setattr("common.plain.endpoints", look_up)
        dialer = make_dialer("plain", context, f"tcp://{host}:7420", None, Log())
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(3):
                await tried.acquire()
        assert [record.getMessage().split(": ")[0] for record in caplog.records] == [f"cannot look up tcp://{host}:7420"]
        assert not dialer.send([b"nobody"])
        dialer.close()

    run(test)


def test_a_name_may_take_longer_to_look_up_than_a_connection_to_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two name servers is dead: every look-up takes five seconds."""
    monkeypatch.setattr("common.plain.CONNECT_TIMEOUT_MS", 20)
    looked_up: list[str] = []

    def look_up(address: str) -> list[Endpoint]:
        looked_up.append(address)
        threading.Event().wait(0.1)
        return [(socket.AF_UNIX, f"{tmp_path}/s")]

    monkeypatch.setattr("common.plain.endpoints", look_up)

    async def test(context: Context) -> None:
        here, there = Log(), Log()
        listener = make_listener("libzmq", context, f"ipc://{tmp_path}/s", None, there)
        dialer = make_dialer("plain", context, "tcp://secondary.example:7420", None, here)
        await here.until(lambda: here.ups == 1)
        assert len(looked_up) == 1
        dialer.close()
        listener.close()

    run(test)


def test_a_stop_does_not_wait_for_a_name_to_be_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name server can be reached, which takes the look-up half a minute to find out."""
    begun, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def look_up(_address: str) -> list[Endpoint]:
        begun.set()
        gate.wait(5)
        ended.set()
        return []

    monkeypatch.setattr("common.plain.endpoints", look_up)

    async def test(context: Context) -> None:
        dialer = make_dialer("plain", context, "tcp://secondary.example:7420", None, Log())
        await asyncio.to_thread(begun.wait, DEADLINE_S)
        dialer.close()

    run(test)
    assert not ended.is_set()
    gate.set()
    assert ended.wait(DEADLINE_S)


@contextlib.contextmanager
def black_hole() -> Iterator[Endpoint]:
    """Who connects there hears nothing."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):  # more than wait to be accepted
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        yield socket.AF_INET, listener.getsockname()


def test_an_address_of_a_name_that_does_not_answer_does_not_hide_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its IPv6 address leads nowhere, or the kernel here has no such family; the other one does."""
    monkeypatch.setattr("common.plain.CONNECT_TIMEOUT_MS", 20)

    async def test(context: Context) -> None:
        here, there = Log(), Log()
        listener = make_listener("libzmq", context, f"ipc://{tmp_path}/s", None, there)
        dialer = make_dialer("plain", context, "tcp://secondary.example:7420", None, here)
        await here.until(lambda: here.ups == 1)
        dialer.close()
        listener.close()

    with black_hole() as nowhere:
        unknown = (socket.AF_APPLETALK, ("::1", 1))
        monkeypatch.setattr(
            "common.plain.endpoints", lambda _address: [unknown, nowhere, (socket.AF_UNIX, f"{tmp_path}/s")]
        )
        run(test)


def test_a_name_that_cannot_be_found_is_nothing_to_listen_on() -> None:
    async def test(context: Context) -> None:
        with pytest.raises(ConfigError, match=r"Cannot listen for replication on tcp://no\.\.such:7420"):
            make_listener("plain", context, "tcp://no..such:7420", None, Log())

    run(test)
