"""Conversations that took place, said again with something wrong (I7): what an NBD client sent to a server, what two
session cores sent to each other, what a ControlClient sent to a process. Nothing crashes, hangs or grows, and whoever
is connected beside it notices nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import random
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from common import limits, nbd
from common.control import MAX_LINE, ControlClient, ControlServer, _result
from common.disk import FileDisk
from common.errors import NeedsForce, ProtocolError, TandemDiskError
from common.nbd_client import NbdClient
from tests.recording import damaged, recording
from tests.serving import Served, serving
from tests.unit.pair import Pair
from tests.unit.test_hostile_nbd import SIZE, Honest, connect, read_out, send
from tests.unit.test_hostile_sessions import sealed
from tests.unit.test_session import hello, kinds
from tests.volumes import PlainVolume

GROWTH = 16 * limits.MIB
"""More that a process may hold after an attack than after the same one before: what it needs it has by then."""
SOAK = [pytest.mark.soak, pytest.mark.timeout(900)]
ROUNDS = [pytest.param(150, id="short"), pytest.param(8000, id="long", marks=SOAK)]
LIVES = [pytest.param(60, id="short"), pytest.param(3000, id="long", marks=SOAK)]
DEADLINE_S = 20.0


# An NBD client


@pytest.fixture
def served(short_dir: Path) -> Iterator[Served]:
    """A scratch volume, which is the default one, and that of an honest client."""
    disks = []
    for name in ("scratch", "disk"):
        (short_dir / name).write_bytes(b"")
        with (short_dir / name).open("r+b") as file:
            file.truncate(SIZE)
        disks.append(FileDisk(str(short_dir / name)))
    with serving(
        short_dir, *(PlainVolume(disk, name) for disk, name in zip(disks, ("scratch", "disk"), strict=True))
    ) as one:
        yield one
    for disk in disks:
        disk.close()


def nbd_session(served: Served, directory: Path) -> list[bytes]:
    """What a client sends: its flags, its options, its requests with their data, one by one."""
    with recording(directory / "r", served.uri().partition("socket=")[2]) as heard:
        with NbdClient(f"nbd+unix:///scratch?socket={directory}/r", timeout_s=DEADLINE_S) as client:
            for at in (0, 65536, SIZE - 8192):
                client.write(at, bytes(range(256)) * 32, fua=at == 65536)
            assert client.read(65536, 8192) == bytes(range(256)) * 32
            client.zero(0, 16384, no_hole=True)
            client.trim(65536, 4096)
            client.flush()
            assert client.block_status(0, SIZE)
            cookies = {client.submit_read(4096 * number, 4096) for number in range(8)}
            while cookies:
                cookies -= {completion.cookie for completion in client.collect(1)}
    data = bytes(heard)
    messages, at = [data[:4]], 4
    while data[at : at + 8] == nbd.IHAVEOPT:
        length = nbd.OPTION.size + int.from_bytes(data[at + 12 : at + 16], "big")
        messages.append(data[at : at + length])
        at += length
    while at < len(data):
        kind, length = int.from_bytes(data[at + 6 : at + 8], "big"), nbd.REQUEST.size
        if kind == nbd.NBD_CMD_WRITE:
            length += int.from_bytes(data[at + 24 : at + 28], "big")
        messages.append(data[at : at + length])
        at += length
    assert b"".join(messages) == data
    assert len(messages) > 18
    return messages


def grown(attack: Any) -> int:
    """Bytes that this process holds more after an attack than after the equal one before: the least of two, because
    what leaks grows with each."""
    sizes = []
    for _ in range(3):
        attack()
        sizes.append(int(psutil.Process().memory_info().rss))
    return min(sizes[1] - sizes[0], sizes[2] - sizes[1])


@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_recorded_nbd_client(served: Served, short_dir: Path, rounds: int) -> None:
    messages = nbd_session(served, short_dir)

    def attack() -> None:
        chance = random.Random(7)
        for number in range(rounds):
            stranger = connect(served)
            send(stranger, b"".join(damaged(chance, messages)))
            read_out(stranger)
            if number % 50 == 0:
                honest.goes_on()

    with Honest(served.uri("disk")) as honest:
        assert grown(attack) < GROWTH
        honest.goes_on()
    (short_dir / "r").unlink()
    assert len(nbd_session(served, short_dir)) == len(messages)


# A primary and a secondary


@cache
def life() -> tuple[tuple[tuple[bytes, bytes], ...], tuple[bytes, ...]]:
    """What a primary and a secondary say to each other: first contact, resync, writes, flushes, verify, checkpoints."""
    pair = Pair(5)
    down: list[tuple[bytes, bytes]] = []
    up: list[bytes] = []
    for step in range(400):
        pair.tick(0.02)
        if step > 40 and pair.primary.window_open:
            pair.write((step % pair.blocks, (7 * step) % pair.blocks), flush=step % 5 == 0)
        if step % 60 == 59:
            pair.checkpoint()
            pair.verify([1, 2, 3])
        down += [(peer, msgpack.packb(list(frames))) for peer, frames in pair.to_secondary]
        up += [msgpack.packb(list(frames)) for _, frames in pair.to_primary]
        pair.deliver(50)
        pair.resync_step()
        pair.work()
        pair.acknowledge()
    assert pair.checkpoints
    return tuple(down), tuple(up)


def frames_of(chance: random.Random, message: bytes) -> list[bytes]:
    """The frames of a message that may be damaged, half of them with a checksum that is right again."""
    try:
        frames = msgpack.unpackb(message)
    except ValueError:
        frames = [message]
    if not isinstance(frames, list) or not all(isinstance(frame, bytes) for frame in frames):
        frames = [message]
    if frames and len(frames[0]) > 9 and chance.random() < 0.5:
        frames[0] = sealed(frames[0][:-9])
    return frames


@pytest.mark.parametrize("lives", LIVES)
def test_a_recorded_primary(lives: int) -> None:
    """Against a secondary that stands where the recorded one stood; then a good primary is heard."""
    messages = [message for _, message in life()[0]]
    peer = life()[0][0][0]
    for seed in range(lives):
        chance = random.Random(seed)
        session = Pair(5).secondary
        for step, message in enumerate([messages[0], *damaged(chance, messages)][:300]):
            for effect in session.receive(peer, frames_of(chance, message), step * 0.01):
                assert type(effect).__name__
            session.acknowledge(4)
        for late in range(20):
            session.handle_timer(10.0 + late)
        told = kinds(session.receive(b"new", hello(number=2**31, instance=2), 100.0))
        assert "Connected" in told or "Refused" in told, (seed, told)


@pytest.mark.parametrize("lives", LIVES)
def test_a_recorded_secondary(lives: int) -> None:
    messages = life()[1]
    for seed in range(lives):
        chance = random.Random(seed)
        pair = Pair(5)
        session = pair.primary
        session.connect(0.0)
        for step, message in enumerate([messages[0], *damaged(chance, messages)][:300]):
            session.receive(tuple(frames_of(chance, message)), step * 0.01)
        now = 10.0
        for _ in range(60):
            deadline = session.next_deadline()
            if deadline is None:
                break
            now = max(now, deadline)
            session.handle_timer(now)
        assert session.connect(now), "it greets again"


def kept(attack: Callable[[], object]) -> int:
    """Bytes that Python holds more after an attack than after the one before, which was the first."""
    attack()
    gc.collect()
    tracemalloc.start()
    attack()
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held


def test_what_peers_say_is_not_kept() -> None:
    """One session of each side hears damaged conversations on and on, the secondary from ever new peers as well."""
    down, up = [message for _, message in life()[0]][:60], life()[1][:60]
    chance, pair = random.Random(1), Pair(5)
    pair.primary.connect(0.0)
    moments = itertools.count()

    def attack() -> None:
        for _ in range(40):
            now = next(moments) * 0.01
            for message in damaged(chance, down):
                peer = chance.choice((life()[0][0][0], chance.randbytes(8)))
                pair.secondary.receive(peer, frames_of(chance, message), now)
                pair.secondary.acknowledge(4)
            for message in damaged(chance, up):
                pair.primary.receive(tuple(frames_of(chance, message)), now)
            pair.secondary.handle_timer(now)
            pair.primary.connect(now)

    assert kept(attack) < 64 * limits.KIB


# Whoever gives commands


async def echo(args: dict[str, Any]) -> dict[str, Any]:
    return args


async def refuse(_args: dict[str, Any]) -> dict[str, Any]:
    raise NeedsForce("The primary is alive.", hint="Use --force.")


COMMANDS = {"echo": echo, "refuse": refuse}


def exchange(path: str, data: bytes) -> list[dict[str, Any]]:
    """The answers to ``data``, until the server hangs up."""
    received = bytearray()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(path)
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while chunk := sock.recv(1 << 16):
                received += chunk
        except (BrokenPipeError, ConnectionResetError):
            pass  # it hung up on what was no request
    return [json.loads(line) for line in received.splitlines()]


def good(answer: dict[str, Any]) -> bool:
    """A result, or a sentence that is no surprise."""
    return bool(answer["ok"]) or not answer["error"]["sentence"].startswith("Unexpected")


@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_recorded_control_client(short_dir: Path, caplog: pytest.LogCaptureFixture, rounds: int) -> None:
    caplog.set_level(logging.CRITICAL, "control")  # what is logged would be kept, and count as growth
    path = str(short_dir / "c")

    def record() -> list[bytes]:
        lines: list[bytes] = []
        client = ControlClient(str(short_dir / "r"))
        spoken: tuple[dict[str, Any], ...] = (
            {}, {"to": "latest", "force": False}, {"a": [1, {"b": None}]}, {"x": "y" * 5000},
        )  # fmt: skip
        for number, args in enumerate(spoken):
            (short_dir / "r").unlink(missing_ok=True)
            with recording(short_dir / "r", path) as heard:
                if number == 1:
                    with pytest.raises(NeedsForce):
                        client.call("refuse", **args)
                else:
                    assert client.call("echo", **args) == args
            lines.append(bytes(heard))
        assert all(line.endswith(b"\n") for line in lines)
        return lines * 3

    def attack() -> None:
        lines = record()

        def again() -> None:
            chance = random.Random(3)
            for _ in range(rounds):
                assert all(map(good, exchange(path, b"".join(damaged(chance, lines)))))

        assert grown(again) < GROWTH
        assert exchange(path, b"x" * (MAX_LINE + 2))[0]["error"]["exit_code"] == ProtocolError.exit_code

    async def main() -> None:
        server = ControlServer(path, COMMANDS)
        await server.start()
        beside_reader, beside = await asyncio.open_unix_connection(path)
        await asyncio.to_thread(attack)
        beside.write(b'{"id": 9, "command": "echo", "args": {"still": "there"}}\n')
        assert json.loads(await beside_reader.readline()) == {"id": 9, "ok": True, "result": {"still": "there"}}
        beside.close()
        await server.close()

    asyncio.run(main())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
REQUESTS = JSON | st.fixed_dictionaries(
    {"command": st.sampled_from(["echo", "refuse", "status", ""]) | JSON}, optional={"args": JSON, "id": JSON}
)


def test_any_json_is_a_request_or_is_refused(short_dir: Path) -> None:
    path = str(short_dir / "c")

    @examples(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(REQUESTS, min_size=1, max_size=4))
    def ask(values: list[Any]) -> None:
        lines = b"".join(json.dumps(value).encode() + b"\n" for value in values)
        answers = exchange(path, lines + b'{"id": "last", "command": "echo"}\n')
        assert all(map(good, answers))
        assert len(answers) <= len(values) + 1
        assert answers, "nobody is left without an answer"
        if all(answer["id"] is not None or answer["ok"] for answer in answers) and len(answers) == len(values) + 1:
            assert {"id": "last", "ok": True, "result": {}} in answers

    async def main() -> None:
        server = ControlServer(path, COMMANDS)
        await server.start()
        await asyncio.to_thread(ask)
        await server.close()

    asyncio.run(main())


@examples(max_examples=60, deadline=None)
@given(st.binary(max_size=200) | st.builds(lambda value: json.dumps(value).encode() + b"\n", JSON))
def test_any_answer_is_an_answer_or_a_protocol_error(line: bytes) -> None:
    with contextlib.suppress(TandemDiskError):
        assert isinstance(_result(line, "/where", "status"), dict)
