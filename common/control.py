"""The control channel: a local socket, mode 0600, on which a process answers commands in JSON lines.

    client → {"id": 1, "command": "checkpoint", "args": {}}
    server → {"id": 1, "ok": true, "result": {"checkpoint": 7, "seconds": 0.0021}}
    server → {"id": 1, "ok": false, "error": {"sentence": "…", "hint": "…", "exit_code": 6}}

Requests of one connection run concurrently and are answered as they finish (the id tells which), so a ``status`` never
waits behind a ``checkpoint``. An error crosses the channel as what it is: the client raises the class of
``common.errors`` whose exit code the server named. A line that is no request ends that connection, after an answer
that says why.

The file system is the access control: whoever may open the socket may give commands. The socket is bound under a umask
that leaves it to its owner, so there is no instant at which it is open to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from common.errors import (
    BY_EXIT_CODE,
    AddressInUse,
    ConfigError,
    NotRunning,
    OperationFailed,
    ProtocolError,
    TandemDiskError,
    TimedOut,
)

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

MAX_LINE: Final = 1024 * 1024
"""Longest request or answer in bytes; a status of 64 volumes is about 20 KiB."""
MAX_SOCKET_PATH: Final = 107
"""Bytes of a Unix socket's path, ``sockaddr_un.sun_path`` less its terminating zero (unix(7))."""
BACKLOG: Final = 64
CONNECT_AGAIN_S: Final = 0.01
MAX_RUNNING: Final = 64
"""Requests of one connection that are worked on at a time; the next ones wait in its socket."""

log = logging.getLogger("control")


def error_to_dict(error: BaseException) -> dict[str, Any]:
    """The error as it travels: in answers on the control channel and in a process' readiness line."""
    if isinstance(error, TandemDiskError):
        return {"sentence": error.sentence, "hint": error.hint, "exit_code": error.exit_code}
    return {
        "sentence": f"Unexpected {type(error).__name__}: {error}.",
        "hint": "Its traceback is in the log.",
        "exit_code": 1,
    }


def error_from_dict(raw: Mapping[str, Any]) -> TandemDiskError:
    """The error that ``error_to_dict`` described, as an instance of the class with that exit code."""
    sentence = raw.get("sentence")
    hint = raw.get("hint")
    code = raw.get("exit_code")
    cls = BY_EXIT_CODE.get(code, OperationFailed) if isinstance(code, int) else OperationFailed
    return cls(sentence if isinstance(sentence, str) else repr(dict(raw)), hint=hint if isinstance(hint, str) else "")


def bind_private_socket(path: str) -> socket.socket:
    """A Unix stream socket bound to ``path``, mode 0600, not listening yet.

    A socket file that nobody listens on is what a killed process left behind: it is replaced. Raises ConfigError when
    the path is too long for a socket address, AddressInUse when somebody answers there.
    """
    check_socket_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        umask = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(umask)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"{path} is taken by another process.", hint="Stop that process first.") from error
        raise OperationFailed(f"Cannot make the socket {path}: {error.strerror}.") from error
    except BaseException:
        sock.close()
        raise
    return sock


def check_socket_path(path: str) -> None:
    """Raise ConfigError when ``path`` does not fit into a Unix socket address."""
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise ConfigError(
            f"The socket path {path} has {length} bytes; Unix allows {MAX_SOCKET_PATH}.",
            hint="Use a directory with a shorter path.",
        )


def _remove_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
    raise AddressInUse(f"{path} is taken: another process answers there.", hint="Stop that process first.")


class ControlServer:
    """Answers ``handlers`` by name on the socket at ``path``.

    A handler gets the request's ``args`` and returns the result. A TandemDiskError that it raises is the answer; any
    other exception is logged with its traceback and answered as a failure, and the process goes on.
    """

    def __init__(self, path: str, handlers: Mapping[str, Handler]) -> None:
        self.path = path
        self._handlers = dict(handlers)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._inode: tuple[int, int] | None = None

    async def start(self) -> None:
        """Listen. Raises AddressInUse when another process answers at ``path``, ConfigError when the path is too
        long.
        """
        sock = bind_private_socket(self.path)
        status = os.stat(self.path)
        self._inode = (status.st_dev, status.st_ino)
        self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=MAX_LINE, backlog=BACKLOG)

    async def close(self) -> None:
        """Stop listening and remove the socket; commands under way are cancelled, except the one that called this."""
        if self._server is None:
            return
        self._server.close()
        current = asyncio.current_task()
        pending = [task for task in self._tasks if task is not current]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        self._server = None
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(self.path)
            if (status.st_dev, status.st_ino) == self._inode:  # else a successor has bound its own there
                os.unlink(self.path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        running: set[asyncio.Task[None]] = set()
        try:
            while line := await reader.readline():
                request = _parse_request(line)
                task = asyncio.create_task(self._answer(request, writer))
                for group in (running, self._tasks):
                    group.add(task)
                    task.add_done_callback(group.discard)
                if len(running) >= MAX_RUNNING:
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*running)
        except (ProtocolError, ValueError) as error:  # ValueError: a line longer than MAX_LINE
            log.warning("request refused reason=%r", str(error))
            wrong = (
                error
                if isinstance(error, ProtocolError)
                else ProtocolError(f"A request is longer than {MAX_LINE} bytes.")
            )
            await _send(writer, {"id": None, "ok": False, "error": error_to_dict(wrong)})
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, request: tuple[object, str, dict[str, Any]], writer: asyncio.StreamWriter) -> None:
        number, command, args = request
        try:
            handler = self._handlers.get(command)
            if handler is None:
                known = ", ".join(sorted(self._handlers))
                raise ConfigError(f"There is no command {command[:80]!r} here.", hint=f"Known commands: {known}.")
            answer = {"id": number, "ok": True, "result": await handler(args)}
        except TandemDiskError as error:
            answer = {"id": number, "ok": False, "error": error_to_dict(error)}
        except Exception as error:
            log.exception("command failed command=%s", command)
            answer = {"id": number, "ok": False, "error": error_to_dict(error)}
        await _send(writer, answer)


def _parse_request(line: bytes) -> tuple[object, str, dict[str, Any]]:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"A request is not JSON: {error}.") from error
    if (
        not isinstance(raw, dict)
        or not isinstance(raw.get("command"), str)
        or not isinstance(raw.get("args", {}), dict)
    ):
        raise ProtocolError("A request must be an object with a command (string) and args (object).")
    if not isinstance(raw.get("id"), str | int | float | None):
        raise ProtocolError("The id of a request must be a number or a string.")
    return raw.get("id"), raw["command"], raw.get("args", {})


async def _send(writer: asyncio.StreamWriter, answer: Mapping[str, Any]) -> None:
    with contextlib.suppress(ConnectionError):
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()


class ControlClient:
    """Gives commands to the process that listens at ``path``; one connection a call, so it survives that process'
    restarts.
    """

    def __init__(self, path: str, timeout_s: float = 10.0) -> None:
        self.path = path
        self.timeout_s = timeout_s

    def call(self, command: str, /, **args: object) -> dict[str, Any]:
        """The result of ``command``, or the error that the process answered with.

        Raises NotRunning when nobody listens or the process went away before it answered, TimedOut after ``timeout_s``.
        """
        deadline = time.monotonic() + self.timeout_s
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            try:
                sock.settimeout(self.timeout_s)
                while not _connects(sock, self.path):
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    time.sleep(CONNECT_AGAIN_S)
                sock.sendall(_request(command, args))
                line = _receive_line(sock, deadline)
            except TimeoutError as error:
                raise _timed_out(self.path, command, self.timeout_s) from error
            except OSError as error:
                raise _not_running(self.path, command, error) from error
        return _result(line, self.path, command)

    async def call_async(self, command: str, /, **args: object) -> dict[str, Any]:
        """``call`` for an event loop."""
        try:
            async with asyncio.timeout(self.timeout_s):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    sock.setblocking(False)
                    while not _connects(sock, self.path):  # noqa: ASYNC110 - nothing tells of room in a backlog
                        await asyncio.sleep(CONNECT_AGAIN_S)
                    reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE)
                except BaseException:
                    sock.close()
                    raise
                try:
                    writer.write(_request(command, args))
                    line = await reader.readline()
                finally:
                    writer.close()
        except TimeoutError as error:
            raise _timed_out(self.path, command, self.timeout_s) from error
        except OSError as error:
            raise _not_running(self.path, command, error) from error
        except ValueError as error:
            raise ProtocolError(f"The answer to {command} is longer than {MAX_LINE} bytes.") from error
        return _result(line, self.path, command)


def _connects(sock: socket.socket, path: str) -> bool:
    """False where a process listens that has taken nobody for so long that its backlog is full: it hangs, or is
    stopped, which is not to be away."""
    try:
        sock.connect(path)
    except BlockingIOError:
        return False
    return True


def _request(command: str, args: Mapping[str, object]) -> bytes:
    return json.dumps({"id": 1, "command": command, "args": args}).encode() + b"\n"


def _receive_line(sock: socket.socket, deadline: float) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        sock.settimeout(remaining)
        chunk = sock.recv(65536)
        if not chunk:
            break
        received += chunk
        if len(received) > MAX_LINE:
            raise ProtocolError(f"An answer is longer than {MAX_LINE} bytes.")
    return bytes(received)


def _result(line: bytes, path: str, command: str) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise NotRunning(f"The process at {path} ended before it answered {command}.", hint="Its log says why.")
    try:
        raw = json.loads(line)
        if raw["ok"]:
            result = raw["result"]
            if not isinstance(result, dict):
                raise TypeError("the result is not an object")
            return result
        error = error_from_dict(raw["error"])
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ProtocolError(f"The answer to {command} makes no sense: {line[:200]!r} ({problem}).") from problem
    raise error


def _timed_out(path: str, command: str, timeout_s: float) -> TimedOut:
    return TimedOut(
        f"The process at {path} did not answer {command} within {timeout_s:g} s.", hint="Its log may say why."
    )


def _not_running(path: str, command: str, error: OSError) -> TandemDiskError:
    if isinstance(error, PermissionError):
        return OperationFailed(
            f"{path} belongs to another user.", hint="Give the command as the user who started the pair."
        )
    if "too long" in str(error):
        return ConfigError(f"The socket path {path} is too long.", hint="Use a directory with a shorter path.")
    return NotRunning(f"Nobody answers {command} at {path}.", hint="Start the process first, or look into its log.")
