"""Hostile input to every socket of a running pair: nothing crashes, hangs or grows, and the clients beside it notice
nothing (invariant I7).

Recorded sessions are mutated (bits, cuts, repetitions, lengths), and junk is sent as it is; what a stranger could seal
correctly (checksums, framing) is sent sealed, with contents that cannot be.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from common import nbd, wire
from common.generation import Generation, Standing
from common.settings import NodeSettings
from deploy.layout import ROLES
from deploy.pair import Pair, PairOptions
from tests.pairs import MIB, QUICK, Load, compare_disks, contents, primary_uri, running
from tests.recording import recording

SIZE = 4 * MIB
GROWTH = 8 * MIB
"""More than one process may hold after an attack than after the same one before: what it needs it has by then."""
PATIENCE_S = 0.02

SOAK = [pytest.mark.soak, pytest.mark.timeout(900)]
ROUNDS = [pytest.param(12, id="short"), pytest.param(750, id="long", marks=SOAK)]


def mutated(chance: random.Random, data: bytes) -> bytes:
    """``data`` with something wrong in it."""
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(result)) if result else 0
        match chance.randrange(6):
            case 0 if result:
                result[at] ^= 1 << chance.randrange(8)
            case 1:
                result[at : at + 8] = chance.choice((b"\xff" * 8, bytes(8), struct.pack(">Q", 1 << 40)))
            case 2:
                del result[at:]
            case 3:
                result[at:at] = chance.randbytes(chance.randrange(64))
            case 4:
                result += result[at : at + 256]
            case _:
                result[at : at + 4] = struct.pack(">I", chance.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF)))
    return bytes(result)


def throw(path: str, data: bytes) -> None:
    """Send ``data`` to the Unix socket, look at what comes back for a moment, hang up."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(path)
        with contextlib.suppress(OSError):
            sock.sendall(data)
            while sock.recv(65536):
                pass


def nbd_session() -> bytes:
    """What a client sends: options, a write, a read, a flush, a goodbye."""
    name = b"disk0"
    go = len(name).to_bytes(4, "big") + name + struct.pack(">H", 0)
    options = nbd.CLIENT_FLAGS.pack(3)
    for option, data in ((nbd.NBD_OPT_STRUCTURED_REPLY, b""), (nbd.NBD_OPT_LIST, b""), (nbd.NBD_OPT_GO, go)):
        options += nbd.OPTION.pack(nbd.IHAVEOPT, option, len(data)) + data
    # Reads only: a mutated write that is still a write would be one, and may change the disk.
    read = nbd.REQUEST.pack(nbd.REQUEST_HEAD | nbd.NBD_CMD_READ, b"12345678", 0, 4096)
    flush = nbd.REQUEST.pack(nbd.REQUEST_HEAD | nbd.NBD_CMD_FLUSH, b"12345679", 0, 0)
    return options + read + flush + read


def stream_messages(chance: random.Random, pair_id: str) -> list[list[bytes]]:
    """Messages with good checksums that cannot be: of strangers, of no session, of impossible extents."""
    standing = Standing(pair_id, "a", "primary", (Generation(chance.getrandbits(64), 9, "a"),), True)
    stranger = Standing("other", "a", "primary", (Generation(5, 1, "a"),), True)
    extent = wire.EXTENT_STRUCT.pack(chance.getrandbits(63), 4096, 0, chance.randrange(9), 0, 0, 0)
    session = chance.getrandbits(64)
    messages: list[wire.Message] = [
        wire.Hello(session, 0, chance.choice((0, wire.PROTOCOL_VERSION, 99)), 7, 3, (("disk0", SIZE),), stranger),
        wire.Hello(session, 0, wire.PROTOCOL_VERSION + 1, 7, 3, (("disk0", SIZE),), standing),
        wire.Batch(session, chance.getrandbits(40), 0, extent, memoryview(b"x" * 4096)),
        wire.Checkpoint(session, 4, 5),
        wire.Ping(session, 0, float("nan")),
        wire.Resync(session, 5, 2, True, False),
        wire.Synced(session, 6, standing.history),
        wire.Verify(session, 7, chance.randbytes(48)),
        wire.Bye(session, 0, "x" * 1000),
        wire.Ack(session, 1, 2**63, 2**63, 7, 100),
        wire.Ask(session, 0, standing.history),
        wire.Ask(session, 0, ()),
    ]
    return [[bytes(frame) for frame in wire.encode(message)] for message in messages]


def control_lines(chance: random.Random) -> bytes:
    """What is no command, or one with impossible arguments."""
    odd: list[object] = [
        {"command": "status", "args": {"x": [[[[]]]]}, "id": {"a": [1]}}, {"command": ""}, [], 5, None,
        {"command": "clear_error", "args": 5}, {"command": "nothing" * 100, "args": {}},
        {"command": "status", "args": {}, "id": 10**400},
        {"command": "checkpoint", "args": {"timeout_s": chance.choice(["soon", None, [], {}])}},
        {"command": "verify", "args": {"repair": {"a": 1}}}, {"command": "failover", "args": {"to": ["latest"]}},
    ]
    lines = [json.dumps(value).encode() + b"\n" for value in odd]
    deep = b'{"command": "status", "args": ' + b'{"a":' * 20000 + b"1" + b"}" * 20001 + b"\n"
    return chance.choice([*lines, *lines, b"".join(lines), deep, b"x" * (2 * MIB), chance.randbytes(500) + b"\n"])


def at_the_stream(path: Path, pair: Pair, chance: random.Random, rounds: int) -> None:
    """Of both sides: who leads listens, too, for a stale primary and for whoever asks."""
    for role in ROLES:
        at_the_listener(path, pair.settings(role), chance, rounds // 2)


def at_the_listener(path: Path, settings: NodeSettings, chance: random.Random, rounds: int) -> None:
    target = str(settings.replication.listen).removeprefix("ipc://")
    with zmq.Context() as context:
        (path / "rec").unlink(missing_ok=True)
        with recording(path / "rec", target) as heard, context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(f"ipc://{path}/rec")
            for frames in stream_messages(chance, settings.pair_id):
                dealer.send_multipart(frames)
            assert dealer.poll(2000)
        recorded = bytes(heard)
        assert recorded
        with context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.SNDTIMEO, 1000)
            dealer.connect(f"ipc://{target}")
            for _ in range(rounds):
                for frames in stream_messages(chance, settings.pair_id):
                    with contextlib.suppress(zmq.Again):
                        frame = chance.randrange(len(frames))
                        dealer.send_multipart(frames)
                        frames[frame] = mutated(chance, frames[frame])
                        dealer.send_multipart(frames * chance.choice((1, 1, 1, 5)))
    for _ in range(rounds):
        throw(target, mutated(chance, recorded))
        throw(target, recorded[: chance.randrange(len(recorded))])
        throw(target, chance.randbytes(chance.randrange(1, 400)))


def at_the_exports(path: Path, pair: Pair, chance: random.Random, rounds: int) -> None:
    session = nbd_session()
    for _ in range(rounds):
        for side in ("a", "b"):
            junk = chance.choice((mutated(chance, session), chance.randbytes(99)))
            throw(f"{pair.directory.path}/{side}/nbd.sock", junk)


def at_the_control_sockets(path: Path, pair: Pair, chance: random.Random, rounds: int) -> None:
    for _ in range(rounds):
        for name in ("a/primary", "b/secondary", "b/export", "supervisor"):
            throw(f"{pair.directory.path}/{name}.control", control_lines(chance))


NAN, INFINITE = float("nan"), float("inf")
WRONG: tuple[object, ...] = ("soon", [], {}, [[[]]], -1, 1.5, 10**50, NAN, INFINITE, "\ud800\0", ["latest"])
ARGUMENTS: dict[str, dict[str, tuple[object, ...]]] = {
    "checkpoint": {"timeout_s": ("soon", [], {}, True, -1, 10**50, 1e300, NAN, INFINITE)},
    "verify": {"repair": (*WRONG, 0, "true")}, "resync": {"full": (*WRONG, 1)},
    "resize": {"volume": (*WRONG, True), "size": (*WRONG, True)},
    "failover": {"to": (*WRONG, True, None), "force": (*WRONG, 1), "primary_dead": (*WRONG, 1)},
    "stop": {"checkpoint": (*WRONG, 1), "purge": (*WRONG, 1)}, "stop_side": {"role": (*WRONG, None, True)},
    "start": {"roles": ("soon", {"a": 1}, 5, True, ["king"], [["primary"]], [{}])}, "nothing" * 1000: {"x": WRONG},
}  # fmt: skip
TAKEN: Mapping[str, frozenset[str]] = {
    "a/primary": frozenset(("checkpoint", "verify", "resync", "resize", "stop", "nothing" * 1000)),
    "b/secondary": frozenset(("failover", "stop", "nothing" * 1000)),
    "b/export": frozenset(("stop",)),
    "supervisor": frozenset(("stop", "stop_side", "start")),
}
"""Who takes which; to others they are asked as well, and refused for that."""
NOT_THERE = {("supervisor", "checkpoint"), ("a/primary", "purge"), ("b/secondary", "purge"), ("b/export", "purge")}
"""Arguments of ``stop`` that a process does not know, and so does not look at: giving them would stop it."""


def at_every_command(path: Path, pair: Pair, chance: random.Random, rounds: int) -> None:
    """Arguments of every wrong type for every command that there is: a sentence for each."""
    for name, taken in TAKEN.items():
        for command, arguments in ARGUMENTS.items():
            for argument, values in arguments.items():
                if command == "stop" and (name, argument) in NOT_THERE:
                    continue
                for value in values:
                    args = {"to": "latest"} | {argument: value} if command == "failover" else {argument: value}
                    error = refused(f"{pair.directory.path}/{name}.control", command, args)
                    assert not error["sentence"].startswith("Unexpected"), (name, command, args, error)
                    code = 1 if command == "resize" and isinstance(value, str) and argument == "volume" else 2
                    assert error["exit_code"] == code or command not in taken, (name, command, args, error)


def refused(socket_path: str, command: str, args: dict[str, object]) -> dict[str, Any]:
    """The error that a command is answered with."""
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as answers:
        sock.settimeout(30)
        sock.connect(socket_path)
        sock.sendall(json.dumps({"id": 1, "command": command, "args": args}).encode() + b"\n")
        answer = json.loads(answers.readline())
    assert not answer["ok"], (command, args, answer)
    error: dict[str, Any] = answer["error"]
    return error


def processes(pair: Pair) -> list[psutil.Process]:
    now = pair.status()
    pids = (now["primary"]["pid"], now["secondary"]["pid"], now["secondary"]["export_pid"])
    return [psutil.Process(pid) for pid in pids]


@pytest.mark.local_hosts
@pytest.mark.parametrize("attack", [at_the_stream, at_the_exports, at_the_control_sockets, at_every_command])
@pytest.mark.parametrize("rounds", ROUNDS)
def test_hostile_input_changes_nothing(
    short_dir: Path, attack: Callable[[Path, Pair, random.Random, int], None], rounds: int
) -> None:
    with running(short_dir / "p", PairOptions(size=SIZE, overrides=QUICK)) as pair:
        with Load(primary_uri(pair), seed=3, depth=4) as load:
            load.wait_for(50)
            there = processes(pair)
            attack(short_dir, pair, random.Random(5), rounds)
            before = [process.memory_info().rss for process in there]
            attack(short_dir, pair, random.Random(5), rounds)
            load.wait_for(load.answered + 50)
            assert [process.pid for process in processes(pair)] == [process.pid for process in there], "one died"
            grown = [process.memory_info().rss - size for process, size in zip(there, before, strict=True)]
            assert max(grown) < GROWTH, grown
        assert load.end is None
        assert pair.status()["state"] == "protected"
        pair.checkpoint()
        compare_disks(pair)
        assert contents(primary_uri(pair)) == load.model(size=SIZE)
        home = pair.directory.path
        logs = "".join(path.read_text(errors="replace") for path in (*home.glob("*/log"), home / "supervisor.log"))
        assert "event loop:" not in logs, "an exception that nobody caught"
        assert "Traceback" not in logs, "an exception that nobody foresaw"
