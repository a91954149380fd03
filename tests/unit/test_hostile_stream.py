"""Whoever reaches the replication port without keys: frames of any shape, connections that lead nowhere, memory that
is announced and never sent. The oracle is a second reader of RFC 37, which has the whole stream before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from common import limits, zmtp
from common.plain import MAX_CONNECTIONS, STRANGERS_MESSAGE, PlainDialer, PlainListener
from common.zmtp import Inbox, ZmtpError
from tests.unit.test_port import DEADLINE_S, Log

LIMIT = 300_000
ROUNDS = [pytest.param(300, id="short"), pytest.param(30_000, id="long", marks=pytest.mark.soak)]
STRANGERS = [pytest.param(60, id="short"), pytest.param(6000, id="long", marks=pytest.mark.soak)]
SIZES = (0, 0, 1, 2, 7, 200, 255, 256, 4095, 4096, 4097, 70_000, LIMIT - 1, LIMIT, LIMIT + 1)
LIES = (1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def frame(chance: random.Random) -> bytes:
    """A frame, most of them well made."""
    flags = chance.choice((0, 0, 0, 0, 1, 1, 1, 4, 4, chance.randrange(256)))
    size = chance.choice(SIZES[:6] if chance.random() < 0.7 else SIZES)
    told = chance.choice(LIES) if chance.random() < 0.03 else size
    if told > 255 or chance.random() < 0.2:
        return bytes((flags | 2,)) + struct.pack(">Q", told) + bytes(size)
    return bytes((flags & ~2, told)) + chance.randbytes(size)


def stream(chance: random.Random) -> bytes:
    """What a stranger might send, from the greeting on, cut anywhere."""
    hello = bytearray(zmtp.greeting())
    if chance.random() < 0.2:
        hello[chance.randrange(64)] = chance.randrange(256)
    body = b"".join(frame(chance) for _ in range(chance.choice((1, 3, 10, 40))))
    whole = bytes(hello) + (zmtp.ready(b"DEALER") if chance.random() < 0.8 else b"") + body
    return whole if chance.random() < 0.5 else whole[: chance.randrange(len(whole))]


def second_reader(data: bytes) -> tuple[list[list[bytes]], list[bytes], bool]:
    """Messages, commands, and whether it was refused, by RFC 37 and the limits of the module."""
    messages: list[list[bytes]] = []
    commands: list[bytes] = []
    if data[:1] not in (b"", b"\xff") or (len(data) > 9 and not data[9] & 1):
        return messages, commands, True
    if len(data) < 64:
        return messages, commands, False
    if data[10] < 3 or data[12:32].rstrip(b"\0") != b"NULL":
        return messages, commands, True
    at = 64
    parts: list[bytes] = []
    while at + 2 <= len(data):
        flags, long = data[at], bool(data[at] & 2)
        if long and at + 9 > len(data):
            break
        size = int.from_bytes(data[at + 1 : at + 9], "big") if long else data[at + 1]
        command = bool(flags & 4)
        most = zmtp.MAX_COMMAND if command else LIMIT - sum(len(part) for part in parts)
        if flags & 0xF8 or (command and flags & 1) or size > most:
            return messages, commands, True
        start = at + (9 if long else 2)
        if start + size > len(data):
            break
        at = start + size
        content = data[start:at]
        if command:
            commands.append(content)
            continue
        parts.append(content)
        if not flags & 1:
            messages.append(parts)
            parts = []
        elif len(parts) == zmtp.MAX_FRAMES:
            return messages, commands, True
    return messages, commands, False


def fed(data: bytes, cuts: Callable[[], int]) -> tuple[list[list[bytes]], list[bytes], bool, int]:
    """The same from an Inbox that is fed pieces of ``cuts()`` bytes, and the most memory that it held."""
    inbox, most, at = Inbox(LIMIT), 0, 0
    messages: list[list[bytes]] = []
    refused = False
    try:
        while at < len(data):
            room = inbox.room()
            count = min(cuts(), len(room), len(data) - at)
            room[:count] = data[at : at + count]
            del room
            at += count
            messages += [[bytes(part) for part in message] for message in inbox.received(count)]
            most = max(most, len(inbox._buffer) + sum(map(len, inbox._spares)))
    except ZmtpError:
        refused = True
    return messages, [bytes(command) for command in inbox.commands], refused, most


@pytest.mark.parametrize("rounds", ROUNDS)
def test_any_stream_is_read_as_the_standard_says(rounds: int) -> None:
    for seed in range(rounds):
        chance = random.Random(seed)
        data = stream(chance)
        messages, commands, refused = second_reader(data)
        ways = [(1 << 30,), (1, 2, 63, 500, 70_000)]
        if len(data) < 1000:
            ways.append((1,))
        for sizes in ways:
            got, told, ended, memory = fed(data, partial(chance.choice, sizes))
            assert ended == refused, seed
            # What arrives together with what is refused is not handed out any more.
            assert (got, told) == (messages, commands) or (refused and got == messages[: len(got)]), seed
            assert memory <= (zmtp.SPARES + 1) * (LIMIT + zmtp.BUFFER), seed


def test_what_is_announced_in_pieces_is_limited_as_a_whole() -> None:
    inbox = Inbox(LIMIT)
    opening = zmtp.greeting() + zmtp.prefix(200_000, zmtp.MORE)
    data = opening + bytes(200_000) + zmtp.prefix(100_001)
    with pytest.raises(ZmtpError, match="too long"):
        while data:
            room = inbox.room()
            count = min(len(room), len(data))
            room[:count] = data[:count]
            del room
            inbox.received(count)
            data = data[count:]


# A listener and its honest peer


class Peers:
    """A listener with one honest peer that it trusts, as a session does."""

    def __init__(self, directory: Path) -> None:
        self.path = f"{directory}/s"
        self.here, self.there = Log(), Log()
        self.listener = PlainListener(
            f"ipc://{self.path}", self.there.on_peer_frames, self.there.on_drained, self.there.on_drained
        )
        self.dialer = PlainDialer(f"ipc://{self.path}", self.here.on_frames, self.here.on_drained, self.here)

    async def meet(self) -> None:
        await self.here.until(lambda: self.here.ups == 1)
        self.dialer.send([b"hello"])
        await self.there.until(lambda: len(self.there.frames) == 1)
        self.honest = self.there.peers[0]
        self.listener.trust(self.honest)

    async def still_talk(self) -> None:
        """A long message there, an answer back."""
        payload = os.urandom(2 * limits.MIB)
        self.there.frames.clear()
        self.there.peers.clear()
        assert self.dialer.send([b"batch", payload])
        await self.there.until(lambda: [b"batch", payload] in self.there.frames)
        assert self.there.peers[self.there.frames.index([b"batch", payload])] == self.honest
        answers = len(self.here.frames)
        assert self.listener.send(self.honest, [b"ack"])
        await self.here.until(lambda: len(self.here.frames) > answers)
        assert not self.here.downs

    def connect(self) -> socket.socket:
        stranger = socket.socket(socket.AF_UNIX)
        stranger.setblocking(False)
        stranger.connect(self.path)
        return stranger

    def close(self) -> None:
        self.dialer.close()
        self.listener.close()


@contextlib.contextmanager
def nothing_uncaught() -> Iterator[None]:
    """In it no callback of the running loop may raise: the loop would only log that."""
    raised: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: raised.append(told))
    yield
    assert not raised


def met(tmp_path: Path, attack: Callable[[Peers], Awaitable[None]]) -> None:
    """The attack, beside peers who talk before and after it."""

    async def test() -> None:
        with nothing_uncaught():
            peers = Peers(tmp_path)
            await peers.meet()
            await peers.still_talk()
            await attack(peers)
            await peers.still_talk()
            peers.close()

    asyncio.run(test())


async def hung_up(strangers: list[socket.socket]) -> None:
    """Until the listener has closed every one of these."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(DEADLINE_S):
        for stranger in strangers:
            try:
                while await loop.sock_recv(stranger, 65536):
                    pass
            except ConnectionResetError:
                pass
            stranger.close()


def test_who_only_holds_connections_keeps_nobody_out(tmp_path: Path) -> None:
    async def attack(peers: Peers) -> None:
        held = []
        for number in range(2 * MAX_CONNECTIONS):
            held.append(peers.connect())
            if number % 2:
                held[-1].send(zmtp.greeting() + zmtp.ready(b"DEALER"))
            await asyncio.sleep(0)
        newcomer = Log()
        dialer = PlainDialer(f"ipc://{peers.path}", newcomer.on_frames, newcomer.on_drained, newcomer)
        await newcomer.until(lambda: newcomer.ups == 1)
        dialer.send([b"me too"])
        await peers.there.until(lambda: [b"me too"] in peers.there.frames)
        assert len(peers.listener._connections) <= MAX_CONNECTIONS
        dialer.close()
        for stranger in held:
            stranger.close()

    met(tmp_path, attack)


def test_memory_that_a_stranger_announces_is_not_taken(tmp_path: Path) -> None:
    """The longest message that the session may send is refused from others; what they may send is held for each."""

    async def attack(peers: Peers) -> None:
        before = psutil.Process().memory_info().rss
        opening = zmtp.greeting() + zmtp.ready(b"DEALER")
        strangers = [peers.connect() for _ in range(MAX_CONNECTIONS // 2)]
        for number, stranger in enumerate(strangers):
            told = STRANGERS_MESSAGE + 1 if number % 2 else limits.MAX_BATCH_PAYLOAD
            stranger.send((opening if number % 4 < 2 else zmtp.greeting()) + zmtp.prefix(told))
            await asyncio.sleep(0)
        await hung_up(strangers)
        assert psutil.Process().memory_info().rss - before < 64 * limits.MIB

    met(tmp_path, attack)


@pytest.mark.parametrize("piece", [b"\0\0", b"\1\0", b"\4\0", b"\4\6\5PING\0", b"\1\1x" * 7 + b"\0\1x"])
def test_small_frames_without_end_hold_nobody_up(tmp_path: Path, piece: bytes) -> None:
    async def attack(peers: Peers) -> None:
        strangers = [peers.connect() for _ in range(4)]
        flood = piece * (100_000 // len(piece))
        for stranger in strangers:
            stranger.send(zmtp.greeting() + zmtp.ready(b"DEALER"))
        loop = asyncio.get_running_loop()

        async def pour(stranger: socket.socket) -> None:
            try:
                while True:
                    await loop.sock_sendall(stranger, flood)
            except OSError:
                stranger.close()

        pouring = [loop.create_task(pour(stranger)) for stranger in strangers]
        for _ in range(3):
            await peers.still_talk()
        for task in pouring:
            task.cancel()
        await asyncio.gather(*pouring, return_exceptions=True)
        for stranger in strangers:
            stranger.close()

    met(tmp_path, attack)


def test_a_byte_at_a_time_is_listened_to_and_costs_nothing(tmp_path: Path) -> None:
    async def attack(peers: Peers) -> None:
        slow = peers.connect()
        loop = asyncio.get_running_loop()
        for byte in zmtp.greeting() + zmtp.ready(b"DEALER") + zmtp.prefix(3) + b"slo":
            await loop.sock_sendall(slow, bytes((byte,)))
            await asyncio.sleep(0)
        await peers.there.until(lambda: [b"slo"] in peers.there.frames)
        slow.close()

    met(tmp_path, attack)


@pytest.mark.parametrize("rounds", STRANGERS)
def test_strangers_of_any_kind_change_nothing_for_others(tmp_path: Path, rounds: int) -> None:
    async def attack(peers: Peers) -> None:
        chance = random.Random(rounds)
        loop = asyncio.get_running_loop()
        for _ in range(rounds):
            stranger = peers.connect()
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await loop.sock_sendall(stranger, stream(chance))
            except OSError:  # turned out in the middle
                pass
            stranger.close()

    met(tmp_path, attack)
