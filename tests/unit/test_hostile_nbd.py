"""Whoever reaches the NBD port: options and requests that are well formed and impossible, many of them, and connections
that lead nowhere. A client beside them reads what it wrote, and does not wait for them.

What each option and request must be answered is in ``test_nbd_handshake`` and ``test_nbd_transmission``.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from common import limits, nbd
from common.disk import FileDisk
from common.export import MAX_CONNECTIONS
from common.nbd_client import NbdClient
from common.nbd_handshake import MAX_QUERIES, MAX_STEPS, ServerHandshake
from tests.serving import Served, serving
from tests.volumes import PlainVolume

SIZE = 4 * limits.MIB
DEADLINE_S = 20.0
ROUNDS = [pytest.param(120, id="short"), pytest.param(12_000, id="long", marks=pytest.mark.soak)]
NUMBERS = (0, 1, 2, 511, 4096, 65536, 1 << 31, (1 << 32) - 1)
OFFSETS = (0, 1, SIZE - 1, SIZE, SIZE + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def option(number: int, data: bytes = b"", told: int | None = None) -> bytes:
    return nbd.OPTION.pack(nbd.IHAVEOPT, number, len(data) if told is None else told) + data


def text(value: bytes, told: int | None = None) -> bytes:
    return struct.pack(">I", len(value) if told is None else told) + value


FLAGS = nbd.CLIENT_FLAGS.pack(3)
STRUCTURED = option(nbd.NBD_OPT_STRUCTURED_REPLY)
GO = option(nbd.NBD_OPT_GO, text(b"disk") + struct.pack(">H", 0))
CONTEXTS = option(nbd.NBD_OPT_SET_META_CONTEXT, text(b"disk") + struct.pack(">I", 1) + text(b"base:allocation"))


def some_option(chance: random.Random) -> bytes:
    """An option, known or not, whose parts contradict each other more often than not."""
    number = chance.choice((1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 77, chance.getrandbits(32)))
    name = chance.choice((b"disk", b"", b"none", b"d" * 5000, b"\xff\xfe", b"di\0sk"))
    data = text(name, chance.choice((None, None, None, *NUMBERS)))
    if number in (nbd.NBD_OPT_LIST_META_CONTEXT, nbd.NBD_OPT_SET_META_CONTEXT):
        queries = [chance.choice((b"base:allocation", b"base:", b"qemu:x", b"", b"q" * 4000)) for _ in range(3)]
        data += struct.pack(">I", chance.choice((0, 3, 3, *NUMBERS)))
        data += b"".join(text(query, chance.choice((None, None, *NUMBERS))) for query in queries)
    elif number in (nbd.NBD_OPT_INFO, nbd.NBD_OPT_GO):
        asked = [chance.randrange(70_000) & 0xFFFF for _ in range(chance.choice((0, 1, 300)))]
        data += struct.pack(f">H{len(asked)}H", chance.choice((len(asked), len(asked), 65535)), *asked)
    elif chance.random() < 0.6:
        data = b""
    return option(number, data, chance.choice((None, None, None, None, None, 0, len(data) + 1, 70_000)))


def some_request(chance: random.Random) -> bytes:
    """A request that writes nothing: what may not be written anyway, or no write at all."""
    kind = chance.choice((0, 0, 3, 5, 6, 7, 7, 8, 77, 65535))
    flags = chance.choice((0, 0, 0, 1, 2, 4, 8, 16, 0x8000))
    offset, length = chance.choice(OFFSETS), chance.choice(NUMBERS)
    if kind == nbd.NBD_CMD_WRITE_ZEROES:
        offset = max(offset, SIZE)
    return nbd.REQUEST.pack(nbd.REQUEST_HEAD | flags << 16 | kind, chance.randbytes(8), offset, length)


@pytest.fixture
def served(short_dir: Path) -> Iterator[Served]:
    path = short_dir / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    disk = FileDisk(str(path))
    with serving(short_dir, PlainVolume(disk, "disk")) as running:
        yield running
    disk.close()


class Honest:
    """A client that goes on with its work as long as the context lasts, and what became of it."""

    def __init__(self, uri: str) -> None:
        self.rounds = 0
        self._uri = uri
        self._ending = False
        self._failure: BaseException | None = None
        self._more = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="honest")

    def _run(self) -> None:
        chance = random.Random(1)
        model = bytearray(SIZE)
        try:
            with NbdClient(self._uri, timeout_s=DEADLINE_S) as client:
                while not self._ending:
                    at, data = chance.randrange(SIZE - 5000), chance.randbytes(5000)
                    model[at : at + 5000] = data
                    client.write(at, data)
                    assert client.read(at - at % 512, 5000) == model[at - at % 512 : at - at % 512 + 5000]
                    with self._more:
                        self.rounds += 1
                        self._more.notify_all()
                assert client.read(0, SIZE) == model
        except BaseException as error:
            self._failure = error

    def goes_on(self) -> None:
        """A few more rounds from now on."""
        with self._more:
            enough = self.rounds + 3
            assert self._more.wait_for(lambda: self.rounds >= enough or self._failure, DEADLINE_S), "held up"
        assert self._failure is None

    def __enter__(self) -> Honest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending = True
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        assert self._failure is None, self._failure


def connect(served: Served) -> socket.socket:
    stranger = socket.socket(socket.AF_UNIX)
    stranger.settimeout(DEADLINE_S)
    stranger.connect(served.uri().partition("socket=")[2])
    return stranger


def send(stranger: socket.socket, data: bytes) -> None:
    """As much of it as is taken; the server may hang up in the middle."""
    with contextlib.suppress(OSError):
        stranger.sendall(data)


def read_out(stranger: socket.socket) -> None:
    """All answers, until the server hangs up; we have said all that we had to say."""
    with contextlib.suppress(OSError):
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(1 << 20):
            pass
    stranger.close()


def options_without_end(stranger: socket.socket) -> None:
    send(stranger, FLAGS + option(nbd.NBD_OPT_LIST) * 20_000)


def queries_without_end(stranger: socket.socket) -> None:
    count = 16_000
    many = option(nbd.NBD_OPT_SET_META_CONTEXT, text(b"disk") + struct.pack(">I", count) + bytes(4 * count))
    send(stranger, FLAGS + STRUCTURED + many * 60)


def options_that_announce_much(stranger: socket.socket) -> None:
    send(stranger, FLAGS + option(77, b"x" * 100_000, (1 << 32) - 1) + option(nbd.NBD_OPT_LIST))


def refused_requests_without_end(stranger: socket.socket) -> None:
    beyond = nbd.REQUEST.pack(nbd.REQUEST_HEAD | nbd.NBD_CMD_READ, b"cookie..", (1 << 64) - 1, (1 << 32) - 1)
    send(stranger, FLAGS + STRUCTURED + GO + beyond * 20_000)


def block_status_of_everything(stranger: socket.socket) -> None:
    status = nbd.REQUEST.pack(nbd.REQUEST_HEAD | nbd.NBD_CMD_BLOCK_STATUS, b"cookie..", 0, SIZE)
    send(stranger, FLAGS + STRUCTURED + CONTEXTS + GO + status * 500)


def block_status_without_a_context(stranger: socket.socket) -> None:
    status = nbd.REQUEST.pack(nbd.REQUEST_HEAD | nbd.NBD_CMD_BLOCK_STATUS, b"cookie..", 0, (1 << 32) - 1)
    send(stranger, FLAGS + GO + status * 1000)


def a_write_that_never_comes(stranger: socket.socket) -> None:
    write = nbd.REQUEST.pack(nbd.REQUEST_HEAD | nbd.NBD_CMD_WRITE, b"cookie..", 0, limits.MAX_PAYLOAD)
    send(stranger, FLAGS + GO + write + b"x" * 1000)


ATTACKS = [
    options_without_end, queries_without_end, options_that_announce_much, refused_requests_without_end,
    block_status_of_everything, block_status_without_a_context, a_write_that_never_comes,
]  # fmt: skip


def besiege(served: Served, attack: Callable[[socket.socket], None], honest: Honest) -> None:
    """Four strangers at once; some of them read what they are told, and some do not."""
    strangers = [connect(served) for _ in range(4)]
    threads = [threading.Thread(target=attack, args=(stranger,)) for stranger in strangers]
    threads += [threading.Thread(target=read_out, args=(stranger,)) for stranger in strangers[:2]]
    for thread in threads[:4]:
        thread.start()
    honest.goes_on()
    for thread in threads[4:]:
        thread.start()
    honest.goes_on()
    for stranger in strangers[2:]:
        with contextlib.suppress(OSError):
            stranger.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    for stranger in strangers:
        stranger.close()
    honest.goes_on()


@pytest.mark.parametrize("attack", ATTACKS)
def test_clients_beside_it_go_on(served: Served, attack: Callable[[socket.socket], None]) -> None:
    """And what the second attack adds to the memory that the first one took is next to nothing."""
    with Honest(served.uri()) as honest:
        honest.goes_on()
        sizes = []
        for _ in range(3):
            besiege(served, attack, honest)
            sizes.append(psutil.Process().memory_info().rss)
        # what leaks grows with every attack; the rest of this process may grow beside one
        assert min(sizes[1] - sizes[0], sizes[2] - sizes[1]) < 8 * limits.MIB, sizes


@pytest.mark.parametrize("rounds", ROUNDS)
def test_options_and_requests_of_any_kind(served: Served, rounds: int) -> None:
    chance = random.Random(rounds)
    with Honest(served.uri()) as honest:
        for number in range(rounds):
            stranger = connect(served)
            haggling = b"".join(some_option(chance) for _ in range(chance.randrange(12)))
            opening = chance.choice((FLAGS, FLAGS + STRUCTURED, FLAGS + STRUCTURED + CONTEXTS))
            requests = b"".join(some_request(chance) for _ in range(chance.randrange(20)))
            send(stranger, opening + (haggling + GO if chance.random() < 0.5 else GO + requests) + requests)
            read_out(stranger)
            if number % 40 == 0:
                honest.goes_on()
        honest.goes_on()


def test_who_only_holds_connections_keeps_nobody_out(served: Served) -> None:
    with Honest(served.uri()) as honest:
        honest.goes_on()
        held = []
        for number in range(MAX_CONNECTIONS + 20):
            held.append(connect(served))
            send(held[-1], FLAGS if number % 2 else FLAGS[:2])
        with NbdClient(served.uri(), timeout_s=DEADLINE_S) as newcomer:
            assert newcomer.read(0, 512)
        honest.goes_on()
        for stranger in held:
            stranger.close()


class Export:
    name, read_only, multi_conn, preferred_block, size = "disk", False, True, 4096, SIZE


def test_one_turn_of_the_loop_answers_a_few_options() -> None:
    handshake = ServerHandshake({"disk": Export()}, "disk")
    data = memoryview(FLAGS + option(nbd.NBD_OPT_LIST) * 10_000)
    assert handshake.receive(data) == len(FLAGS) + (MAX_STEPS - 1) * len(option(nbd.NBD_OPT_LIST))
    queries = text(b"disk") + struct.pack(">I", MAX_QUERIES + 1) + bytes(4 * (MAX_QUERIES + 1))
    handshake = ServerHandshake({"disk": Export()}, "disk")
    handshake.receive(memoryview(FLAGS + STRUCTURED))
    handshake.take_output()
    handshake.receive(memoryview(option(nbd.NBD_OPT_SET_META_CONTEXT, queries)))
    _, _, kind, _ = nbd.OPTION_REPLY.unpack_from(handshake.take_output())
    assert kind == nbd.NBD_REP_ERR_TOO_BIG
