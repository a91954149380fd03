"""The control channel over a real socket: answers, errors that keep their class, junk, time-outs, stale sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from common.control import ControlClient, ControlServer, error_from_dict, error_to_dict
from common.errors import (
    BY_EXIT_CODE,
    AddressInUse,
    ConfigError,
    NeedsForce,
    NotRunning,
    OperationFailed,
    TandemDiskError,
    TimedOut,
)


def serving(path: Path, test: Callable[[ControlServer, ControlClient], Awaitable[None]]) -> None:
    """Run ``test`` against a server with a few commands."""

    async def main() -> None:
        release = asyncio.Event()

        async def echo(args: dict[str, Any]) -> dict[str, Any]:
            return args

        async def refuse(args: dict[str, Any]) -> dict[str, Any]:
            raise NeedsForce("The primary is alive.", hint="Use --force.")

        async def breaks(args: dict[str, Any]) -> dict[str, Any]:
            raise ZeroDivisionError("oops")

        async def wait(args: dict[str, Any]) -> dict[str, Any]:
            await release.wait()
            return {"waited": True}

        async def let_go(args: dict[str, Any]) -> dict[str, Any]:
            release.set()
            return {}

        commands = {"echo": echo, "refuse": refuse, "breaks": breaks, "wait": wait, "release": let_go}
        server = ControlServer(str(path), commands)
        await server.start()
        try:
            await test(server, ControlClient(str(path)))
        finally:
            await server.close()
        assert not path.exists()

    asyncio.run(main())


def test_call_and_call_async(short_dir: Path) -> None:
    async def test(server: ControlServer, client: ControlClient) -> None:
        assert await client.call_async("echo", x=1, y="é") == {"x": 1, "y": "é"}
        assert await asyncio.to_thread(client.call, "echo", big="x" * 300_000) == {"big": "x" * 300_000}
        assert stat.S_IMODE(Path(server.path).stat().st_mode) == 0o600

    serving(short_dir / "c", test)


def test_errors_keep_class_sentence_and_hint(short_dir: Path) -> None:
    async def test(server: ControlServer, client: ControlClient) -> None:
        with pytest.raises(NeedsForce) as caught:
            await client.call_async("refuse")
        assert (caught.value.sentence, caught.value.hint) == ("The primary is alive.", "Use --force.")
        with pytest.raises(OperationFailed, match="ZeroDivisionError: oops"):
            await client.call_async("breaks")
        with pytest.raises(ConfigError, match="Known commands: breaks, echo"):
            await client.call_async("nothing")

    serving(short_dir / "c", test)


def test_requests_of_one_connection_run_concurrently(short_dir: Path) -> None:
    async def test(server: ControlServer, client: ControlClient) -> None:
        reader, writer = await asyncio.open_unix_connection(server.path)
        for number, command in enumerate(("wait", "echo", "release")):
            writer.write(json.dumps({"id": number, "command": command}).encode() + b"\n")
        answers = {(answer := json.loads(await reader.readline()))["id"]: answer for _ in range(3)}
        assert answers[0]["result"] == {"waited": True}
        assert all(answer["ok"] for answer in answers.values())
        writer.close()

    serving(short_dir / "c", test)


@pytest.mark.parametrize(
    "junk",
    [
        b"\x00\xff\n",
        b"[]\n",
        b'{"command": 1}\n',
        b'{"command": "echo", "args": []}\n',
        b"[" * 10**5 + b"\n",
        b"x" * (1 << 21),
    ],
)
def test_junk_ends_that_connection_only(short_dir: Path, junk: bytes) -> None:
    async def test(server: ControlServer, client: ControlClient) -> None:
        reader, writer = await asyncio.open_unix_connection(server.path)
        writer.write(junk)
        answer = json.loads(await reader.readline())
        assert not answer["ok"]
        assert answer["error"]["exit_code"] == 10
        writer.close()
        assert await client.call_async("echo", still="here") == {"still": "here"}

    serving(short_dir / "c", test)


def test_a_silent_process_times_out(short_dir: Path) -> None:
    async def test(server: ControlServer, client: ControlClient) -> None:
        client.timeout_s = 0.05
        with pytest.raises(TimedOut, match="did not answer wait"):
            await client.call_async("wait")
        with pytest.raises(TimedOut, match="did not answer wait"):
            await asyncio.to_thread(client.call, "wait")

    serving(short_dir / "c", test)


def test_a_process_that_hangs_is_not_away_however_often_it_was_asked(short_dir: Path) -> None:
    """Those who asked before fill its backlog, and the kernel refuses the next ones."""
    path = str(short_dir / "control")
    client = ControlClient(path, timeout_s=0.03)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        for _ in range(2):
            with pytest.raises(TimedOut):
                client.call("status")
            with pytest.raises(TimedOut):
                asyncio.run(client.call_async("status"))


def test_a_full_backlog_is_waited_for(short_dir: Path) -> None:
    path = str(short_dir / "control")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as before:
        listener.bind(path)
        listener.listen(0)
        before.connect(path)

        async def scenario() -> None:
            asking = asyncio.create_task(ControlClient(path).call_async("status"))
            await asyncio.sleep(0)
            listener.accept()[0].close()
            listener.setblocking(False)
            answering, _ = await asyncio.get_running_loop().sock_accept(listener)
            with answering:
                answering.sendall(b'{"id": 1, "ok": true, "result": {"well": true}}\n')
                assert await asking == {"well": True}

        asyncio.run(asyncio.wait_for(scenario(), 10))


def test_nobody_there(short_dir: Path) -> None:
    for client in (ControlClient(str(short_dir / "none")), ControlClient("/" + "x" * 200)):
        with pytest.raises((NotRunning, ConfigError)):
            client.call("status")
        with pytest.raises((NotRunning, ConfigError)):
            asyncio.run(client.call_async("status"))


def test_a_stale_socket_is_replaced_and_a_live_one_respected(short_dir: Path) -> None:
    path = short_dir / "c"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def test(server: ControlServer, client: ControlClient) -> None:
        assert await client.call_async("echo") == {}
        with pytest.raises(AddressInUse):
            await ControlServer(str(path), {}).start()

    serving(path, test)


def test_a_path_too_long_is_a_config_error(short_dir: Path) -> None:
    with pytest.raises(ConfigError, match="Unix allows 107"):
        asyncio.run(ControlServer(str(short_dir / ("x" * 108)), {}).start())


@pytest.mark.parametrize("cls", BY_EXIT_CODE.values())
def test_every_error_class_crosses_the_channel(cls: type[TandemDiskError]) -> None:
    back = error_from_dict(json.loads(json.dumps(error_to_dict(cls("What.", hint="Do.")))))
    assert type(back) is cls
    assert str(back) == "What. Do."
