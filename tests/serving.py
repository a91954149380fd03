"""An NbdServer in a thread of its own, for tests whose clients are synchronous or other programs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from common.batch import Volume
from common.export import NbdServer
from common.nbd_client import NbdClient
from common.settings import ExportSettings

T = TypeVar("T")


class Served:
    """A running server. ``call`` runs a function on its event loop."""

    def __init__(self, server: NbdServer, loop: asyncio.AbstractEventLoop, default: str) -> None:
        self.server = server
        self.loop = loop
        self.default = default

    def uri(self, name: str | None = None) -> str:
        """Where the volume ``name`` is served, on the Unix socket if there is one."""
        return self.call(lambda: self.server.uris(self.default if name is None else name)[0])

    def call(self, function: Callable[[], T]) -> T:
        """The result of ``function``, called on the server's loop."""
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        self.loop.call_soon_threadsafe(run)
        return done.result(20)


@contextlib.contextmanager
def serving(directory: Path, *volumes: Volume, tcp: bool = False) -> Iterator[Served]:
    """Serve ``volumes`` on ``directory/nbd.sock``, and on a free TCP port of loopback if ``tcp``."""
    settings = ExportSettings(unix=str(directory / "nbd.sock"), host="127.0.0.1" if tcp else None, port=0)
    started: concurrent.futures.Future[Served] = concurrent.futures.Future()
    finish = asyncio.Event()

    async def run() -> None:
        try:
            server = NbdServer(volumes, default=volumes[0].name)
            await server.listen(settings)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(Served(server, asyncio.get_running_loop(), volumes[0].name))
        await finish.wait()
        await server.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="nbd-server")
    thread.start()
    try:
        served = started.result(20)
        try:
            yield served
        finally:
            served.loop.call_soon_threadsafe(finish.set)
    finally:
        thread.join(20)
        assert not thread.is_alive()


def raw(served: Served, *, structured: bool = False) -> socket.socket:
    """A connection in transmission phase whose bytes are the test's business."""
    client = NbdClient(served.uri(), structured=structured)
    connection = client._socket.dup()
    connection.settimeout(20)
    client._socket.close()
    return connection
