"""A TCP proxy whose wire can be cut, slowed, delayed and broken on demand, without root.

    with Proxy(("127.0.0.1", 10810)) as proxy:      dial proxy.address instead
        proxy.cut("forward")                        what the dialling side sends stays in the proxy
        proxy.heal()                                … and arrives now
        proxy.reset()                               connections break; new ones are taken

It forwards bytes, so a cut is what a network's is to TCP: nothing arrives, and everything does, in order, when it is
healed before somebody gave up. ``target`` may be a function, asked for each new connection: a proxy that finds its way
(``deploy.redirect``) is the same proxy.

Runs on a thread of its own with an event loop of its own; its methods may be called from any other thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Final, Literal, Self

from common.errors import AddressInUse, ConfigError
from common.nbd_uri import NbdUri

Target = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""
Direction = Literal["forward", "backward", "both"]

CHUNK: Final = 64 * 1024
QUEUED_CHUNKS: Final = 64
"""Bound of what a delayed or cut direction holds; then its sender is no longer read."""
CALL_TIMEOUT_S: Final = 10.0


def target_of(uri: str) -> Target:
    """Where the server of an NBD URI listens."""
    parsed = NbdUri.parse(uri)
    return parsed.socket if parsed.socket is not None else (parsed.host or "localhost", parsed.port)


class _Wire:
    """One direction, for all connections."""

    def __init__(self) -> None:
        self.whole = asyncio.Event()
        self.whole.set()


class Proxy:
    """See the module. Listening once the context is entered."""

    def __init__(
        self, target: Target | Callable[[], Target | None], listen: tuple[str, int] = ("127.0.0.1", 0)
    ) -> None:
        self._choose: Callable[[], Target | None] = target if callable(target) else lambda: target
        self._listen = listen
        self.delay_s = 0.0
        """Added to each direction, for bytes that arrive from now on."""
        self.rate: float | None = None
        """Bytes a second of each direction of each connection; None: no limit."""
        self.address = listen
        """Where it listens, the port filled in."""
        self.forwarded = 0
        self.accepted = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    # Life

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._call(self._open())
        except OSError as error:
            self._end()
            raise AddressInUse(f"Cannot listen on {self._listen[0]}:{self._listen[1]}: {error.strerror}.") from error
        except ValueError:  # an empty label, one of more than 63 characters, or NUL
            self._end()
            raise ConfigError(f"Cannot listen on {self._listen[0][:100]!r}: that is no name of a host.") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._call(self._close())
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_TIMEOUT_S)

    async def _open(self) -> None:
        self._wires = {"forward": _Wire(), "backward": _Wire()}
        self._server = await asyncio.start_server(self._accepted, *self._listen, limit=CHUNK)
        self.address = self._server.sockets[0].getsockname()[:2]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._reset()

    # Faults

    def cut(self, direction: Direction = "both") -> None:
        """Hold what is sent in ``direction`` back (``forward``: from who dialled to the target)."""
        self._call(self._set_whole(direction, False))

    def heal(self) -> None:
        """Let everything flow again, at full speed and without delay."""
        self.delay_s, self.rate = 0.0, None
        self._call(self._set_whole("both", True))

    def reset(self) -> None:
        """Break every connection."""
        self._call(self._reset())

    async def _set_whole(self, direction: Direction, whole: bool) -> None:
        for name, wire in self._wires.items():
            if direction in (name, "both"):
                (wire.whole.set if whole else wire.whole.clear)()

    async def _reset(self) -> None:
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    # Connections

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = self._loop.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        # Here and not in the task: a reset may fall before its first step, or into the choice of the target, and a
        # client whose connection nobody serves or closes would wait for ever.
        task.add_done_callback(lambda _task: writer.transport.abort())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = await asyncio.to_thread(self._choose)
        far: asyncio.StreamWriter | None = None
        try:
            if target is None:
                return
            if isinstance(target, str):
                far_reader, far = await asyncio.open_unix_connection(target, limit=CHUNK)
            else:
                far_reader, far = await asyncio.open_connection(*target, limit=CHUNK)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(reader, far, self._wires["forward"]))
                group.create_task(self._carry(far_reader, writer, self._wires["backward"]))
        except (OSError, asyncio.CancelledError, ExceptionGroup):
            pass
        finally:
            if far is not None:
                far.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wire: _Wire) -> None:
        """One direction of one connection, until its sender closes it."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_CHUNKS)

        async def receive() -> None:
            while True:
                data = await reader.read(CHUNK)
                await queue.put((self._loop.time() + self.delay_s, data))
                if not data:
                    return

        receiving = asyncio.create_task(receive())
        try:
            free_at = 0.0
            while True:
                due, data = await queue.get()
                await self._until(max(due, free_at))
                await wire.whole.wait()
                if not data:
                    break
                if self.rate is not None:
                    free_at = max(free_at, self._loop.time()) + len(data) / self.rate
                writer.write(data)
                await writer.drain()
                self.forwarded += len(data)
            if writer.can_write_eof():
                with contextlib.suppress(OSError):
                    writer.write_eof()
        finally:
            receiving.cancel()

    async def _until(self, when: float) -> None:
        pause_s = when - self._loop.time()
        if pause_s > 0:
            await asyncio.sleep(pause_s)
