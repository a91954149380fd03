"""The other direction: whoever is dialled answers with what it should not (I7). An NBD server to our client, a
secondary to a primary's connection, a peer to the command that asks where it stands. Answers that were given, with
something wrong in them; who asked has an error of its own kind and is not held up, and the next good answer is heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import msgpack
import pytest

from common import limits, nbd, plain, wire, zmtp
from common.disk import FileDisk
from common.errors import NbdError, PeerRefused, TandemDiskError, WireError
from common.inquiry import _Inquiry
from common.nbd_client import NbdClient, list_exports
from common.nbd_stream import _ANSWERS
from common.plain import PlainDialer, PlainListener
from tests.recording import damaged
from tests.serving import serving
from tests.unit import test_config
from tests.unit.test_hostile_recorded import grown, life
from tests.unit.test_hostile_stream import LIMIT, fed, nothing_uncaught, second_reader
from tests.unit.test_port import DEADLINE_S, Log
from tests.unit.test_session import PRIMARY, SECONDARY
from tests.volumes import PlainVolume

SIZE = 1 * limits.MIB
SOAK = [pytest.mark.soak, pytest.mark.timeout(900)]
ROUNDS = [pytest.param(50, id="short"), pytest.param(20_000, id="long", marks=SOAK)]
DIALS = [pytest.param(40, id="short"), pytest.param(5000, id="long", marks=SOAK)]
GROWTH = 8 * limits.MIB
DATA = bytes(range(256)) * 32


# An NBD server


class Server:
    """Somebody at the Unix socket ``path``, for one client after the other: ``serve`` has its connection."""

    def __init__(self, path: Path) -> None:
        self.uri = f"nbd+unix:///scratch?socket={path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            with accepted, contextlib.suppress(OSError):
                self.serve(accepted)

    def serve(self, client: socket.socket) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


class Saying(Server):
    """Says what it is given, whatever it is asked."""

    def __init__(self, path: Path, *says: bytes) -> None:
        super().__init__(path)
        self._says = b"".join(says)

    def serve(self, client: socket.socket) -> None:
        client.sendall(self._says)
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):
            pass


class Garbling(Server):
    """Between a client and the server at ``target``: one of the answers is garbled, and the last one then."""

    def __init__(self, path: Path, target: str) -> None:
        super().__init__(path)
        self.chance = random.Random(0)
        self.good = True
        self._target = target

    def serve(self, client: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(self._target)
            asking = threading.Thread(target=self._ask, args=(client, server), daemon=True)
            asking.start()
            left = self.chance.randrange(12)
            while answer := server.recv(65536):
                if not self.good and not left:
                    third = len(answer) // 3
                    answer = b"".join(damaged(self.chance, [answer[:third], answer[third:-third], answer[-third:]]))
                client.sendall(answer)
                if not self.good and not left:
                    break
                left -= 1
            for one in (client, server):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            asking.join(DEADLINE_S)

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while request := client.recv(65536):
                server.sendall(request)
            server.shutdown(socket.SHUT_WR)


def talk(uri: str) -> None:
    """What a client does; every answer is looked at as those who ask do."""
    with NbdClient(uri, timeout_s=DEADLINE_S) as client:
        client.write(0, DATA)
        assert len(client.read(0, 16384)) == 16384
        client.flush()
        told = 0
        for offset, length, _ in client.extents(0, SIZE):
            assert offset == told
            told += length
        assert told == SIZE
        assert sum(len(data) for _, data in client.read_many([(4096 * n, 4096) for n in range(8)])) == 32768


@pytest.mark.parametrize("rounds", ROUNDS)
def test_an_nbd_server_whose_answers_are_garbled(short_dir: Path, rounds: int) -> None:
    with (short_dir / "disk").open("wb") as file:
        file.truncate(SIZE)
    disk = FileDisk(str(short_dir / "disk"))
    with serving(short_dir, PlainVolume(disk, "scratch")) as served:
        target = served.uri().partition("socket=")[2]
        with Garbling(short_dir / "s", target) as server:

            def attack() -> None:
                server.good, refused = False, 0
                for seed in range(rounds):
                    server.chance = random.Random(seed)
                    try:
                        talk(server.uri)
                    except TandemDiskError:
                        refused += 1
                assert refused > rounds / 2
                server.good = True
                talk(server.uri)

            assert grown(attack) < GROWTH
    disk.close()


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return nbd.OPTION_REPLY.pack(nbd.NBD_REP_MAGIC, option, kind, len(data)) + data


def chunk(kind: int, data: bytes, cookie: int, flags: int = 1) -> bytes:
    return nbd.CHUNK.pack(nbd.NBD_STRUCTURED_REPLY_MAGIC, flags, kind, cookie.to_bytes(8, "big"), len(data)) + data


GREETING = nbd.GREETING.pack(nbd.NBDMAGIC, nbd.IHAVEOPT, 3)
EXPORT = nbd.INFO_EXPORT.pack(nbd.NBD_INFO_EXPORT, SIZE, nbd.NBD_FLAG_HAS_FLAGS)
NAME = nbd.NBD_INFO_NAME.to_bytes(2, "big") + b"\xff\xfe"
AGREED = (
    GREETING + reply(nbd.NBD_OPT_STRUCTURED_REPLY, nbd.NBD_REP_ACK)
    + reply(nbd.NBD_OPT_SET_META_CONTEXT, nbd.NBD_REP_META_CONTEXT, bytes(4) + nbd.BASE_ALLOCATION)
    + reply(nbd.NBD_OPT_SET_META_CONTEXT, nbd.NBD_REP_ACK) + reply(nbd.NBD_OPT_GO, nbd.NBD_REP_INFO, EXPORT)
    + reply(nbd.NBD_OPT_GO, nbd.NBD_REP_INFO, NAME) + reply(nbd.NBD_OPT_GO, nbd.NBD_REP_ACK)
)  # fmt: skip
HALF = bytes(8) + bytes(2048)


@pytest.mark.parametrize(
    "said",
    [
        chunk(nbd.NBD_REPLY_TYPE_NONE, b"", 1), chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, HALF, 1),
        chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, HALF, 1, 0) * 2 + chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, HALF, 1),
        chunk(nbd.NBD_REPLY_TYPE_BLOCK_STATUS, bytes(12), 1),
    ],
    ids=["nothing", "half", "one half thrice", "another answer"],
)  # fmt: skip
def test_a_read_that_is_answered_in_part_is_no_zeroes(short_dir: Path, said: bytes) -> None:
    with Saying(short_dir / "s", AGREED, said) as server, NbdClient(server.uri, timeout_s=DEADLINE_S) as client:
        assert client.name == "\ufffd\ufffd", "a name that is no UTF-8"
        with pytest.raises(NbdError, match=r"bytes of a read|more data|without a length"):
            client.read(0, 4096)


def test_extents_without_length_have_an_end(short_dir: Path) -> None:
    empty = [chunk(nbd.NBD_REPLY_TYPE_BLOCK_STATUS, bytes(12), cookie) for cookie in range(1, 99)]
    with Saying(short_dir / "s", AGREED, *empty) as server, NbdClient(server.uri, timeout_s=DEADLINE_S) as client:
        with pytest.raises(NbdError, match="without a length"):
            list(client.extents())


def test_options_that_are_answered_without_end_are_not_kept(short_dir: Path) -> None:
    one = reply(nbd.NBD_OPT_LIST, nbd.NBD_REP_SERVER, bytes(1000))
    with Saying(short_dir / "s", GREETING, one * (2 * _ANSWERS // len(one))) as server:
        with pytest.raises(NbdError, match="without end"):
            list_exports(server.uri, timeout_s=DEADLINE_S)


# A secondary, below its messages


def framed(messages: Sequence[bytes], socket_type: bytes) -> list[bytes]:
    """Recorded messages as ZMTP puts them on the wire, behind its handshake; one piece each."""
    bodies = [b"".join(bytes(piece) for piece in zmtp.pieces(msgpack.unpackb(message))) for message in messages]
    return [zmtp.greeting(), zmtp.ready(socket_type), *bodies]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_recorded_streams_are_read_as_the_standard_says(rounds: int) -> None:
    for number, messages in enumerate((life()[1], [message for _, message in life()[0]])):
        recorded = framed(messages[:60], b"ROUTER")
        assert not second_reader(b"".join(recorded))[2]
        for seed in range(rounds // 2):
            chance = random.Random(f"{number}/{seed}")
            data = b"".join(damaged(chance, recorded))
            expected, told, refused = second_reader(data)
            got, commands, ended, memory = fed(data, partial(chance.choice, (1, 63, 500, 70_000)))
            assert ended == refused, seed
            assert (got, commands) == (expected, told) or (refused and got == expected[: len(got)]), seed
            assert memory <= (zmtp.SPARES + 1) * (LIMIT + zmtp.BUFFER), seed


@pytest.mark.parametrize("dials", DIALS)
def test_a_recorded_secondary_of_a_dialer(short_dir: Path, monkeypatch: pytest.MonkeyPatch, dials: int) -> None:
    """Each dial meets another damaged conversation; then somebody well behaved is there, and is heard."""
    monkeypatch.setattr(plain, "RECONNECT_MS", 1)
    monkeypatch.setattr(plain, "RECONNECT_MAX_MS", 1)
    recorded = framed(life()[1][:60], b"ROUTER")
    path = f"{short_dir}/s"

    async def test() -> None:
        loop, log, chance = asyncio.get_running_loop(), Log(), random.Random(dials)
        decoded = 0

        def received(frames: list[bytes]) -> None:
            nonlocal decoded
            with contextlib.suppress(WireError):
                wire.decode(frames)
                decoded += 1

        with nothing_uncaught(), socket.socket(socket.AF_UNIX) as hostile:
            hostile.bind(path)
            hostile.listen()
            hostile.setblocking(False)
            dialer = PlainDialer(f"ipc://{path}", received, log.on_drained, log)
            async with asyncio.timeout(DEADLINE_S + dials):
                for _ in range(dials):
                    accepted, _ = await loop.sock_accept(hostile)
                    with accepted, contextlib.suppress(OSError):
                        await loop.sock_sendall(accepted, b"".join(damaged(chance, recorded)))
            hostile.close()
            Path(path).unlink()
            ups, there = log.ups, Log()
            listener = PlainListener(f"ipc://{path}", there.on_peer_frames, there.on_drained, there.on_drained)
            await log.until(lambda: log.ups > ups)
            assert dialer.send([b"hello"])
            await there.until(lambda: there.frames == [[b"hello"]])
            assert decoded > dials
            dialer.close()
            listener.close()

    asyncio.run(test())


# A peer that is asked where it stands


@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_recorded_answer_of_where_a_side_stands(short_dir: Path, rounds: int) -> None:
    """All that is damaged is no answer; the good one behind it is. A refusal is one, too."""
    settings = test_config.settings(replication={"connect": f"ipc://{short_dir}/s", "listen": "ipc:///l"})

    async def answered(refuse: bool) -> object:
        chance = random.Random(rounds)
        listener: PlainListener

        def asked(peer: bytes, frames: Any) -> None:
            session = wire.decode(frames).session
            told = wire.encode(wire.Told(session, 0, SECONDARY))
            junk = [wire.encode(wire.Told(session + 1, 0, PRIMARY)), wire.encode(wire.Ping(session, 0, 0.0))]
            for _ in range(min(rounds, 500)):  # as many as a queue takes
                head = damaged(chance, [bytes(frame) for frame in told])[: zmtp.MAX_FRAMES]
                if head and head != [bytes(frame) for frame in told]:
                    listener.send(peer, head)
            for frames in junk:
                listener.send(peer, frames)
            listener.send(peer, wire.encode(wire.Refuse(session, 0, "rejoin", "not me")) if refuse else told)

        listener = PlainListener(settings.replication.connect or "", asked, lambda: None, lambda: None)
        try:
            return await _Inquiry(settings, ()).answer(DEADLINE_S)
        finally:
            listener.close()

    async def test() -> None:
        with nothing_uncaught():
            assert await answered(refuse=False) == SECONDARY
            with pytest.raises(PeerRefused, match="not me"):
                await answered(refuse=True)

    asyncio.run(test())
