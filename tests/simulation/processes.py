"""In place of what a process of the product has around it: lifecycle, NBD server, control socket, child processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import common.export
from common.errors import NotRunning, TandemDiskError
from common.process import Lifecycle
from common.settings import NodeSettings
from tests.simulation.clock import PROCESS, Once, Process

if TYPE_CHECKING:
    from tests.simulation.host import Host
    from tests.simulation.world import World


class SimLifecycle(Lifecycle):
    """A ``Lifecycle`` that tells nobody but the simulation."""

    def __init__(self, name: str) -> None:
        super().__init__(name, None, top_level=False)
        self.info: dict[str, Any] | None = None
        self.told = Once()

    def ready(self, info: Any = None) -> None:
        self.is_ready = True
        self.info = dict(info or {})
        self.told.set()


class Running(Process):
    """A process of the product: what it made that the simulation talks to."""

    def __init__(self, host: Host, role: str, rate: float, offset: float) -> None:
        super().__init__(f"{host.side}.{role}", rate, offset)
        self.host = host
        self.role = role
        self.node: Any = None
        self.server: SimServer | None = None
        self.handlers: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self.children: list[Running] = []
        self.lifecycle: SimLifecycle
        self.ended = False
        self.error: BaseException | None = None
        self.exit = Once()

    @property
    def alive(self) -> bool:
        return not self.dead and not self.ended

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call something in the process, as its event loop would."""
        return self.context.copy().run(call, *args)


class SimServer:
    """In place of ``common.export.NbdServer``: no sockets; the simulation submits to the volumes itself."""

    world: World

    def __init__(self, volumes: Any, *, default: str) -> None:
        self.volumes = {volume.name: volume for volume in volumes}
        self.listening = False
        self.paused = False
        self.in_flight = 0
        self._empty = asyncio.Event()
        self._empty.set()
        process = PROCESS.get()
        assert isinstance(process, Running)
        process.server = self

    async def listen(self, _settings: Any) -> None:
        self.listening = True
        process = PROCESS.get()
        assert isinstance(process, Running)
        self.world.guard(self.world.oracle.serves, process.host.side)

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def begun(self) -> None:
        self.in_flight += 1
        self._empty.clear()

    def done(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._empty.set()

    def uris(self, name: str) -> list[str]:
        return [f"nbd+unix:///{name}"]

    def statistics(self) -> Any:
        return common.export.Statistics(0, 0, **dict.fromkeys(_STATISTICS, 0))

    async def close(self, timeout_s: float = 10.0) -> None:
        self.listening = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()


_STATISTICS = list(common.export.Statistics.__slots__)[2:]


class SimControl:
    """In place of ``common.control.ControlServer``."""

    def __init__(self, path: str, handlers: Any) -> None:
        self.path = path
        self.handlers = dict(handlers)

    async def start(self) -> None:
        process = PROCESS.get()
        assert isinstance(process, Running)
        process.handlers = self.handlers

    async def close(self) -> None:
        process = PROCESS.get()
        assert isinstance(process, Running)
        process.handlers = {}


class SimControlClient:
    """In place of ``common.control.ControlClient``: calls the handler of another simulated process."""

    def __init__(self, path: str, timeout_s: float = 10.0) -> None:
        self.path = path
        self.timeout_s = timeout_s

    async def call_async(self, command: str, /, **args: object) -> dict[str, Any]:
        world = SimChild.world
        directory, _, name = self.path.rpartition("/")
        host = next(host for host in world.hosts.values() if host.directory == directory)
        process = host.process(name.removesuffix(".control"))
        if process is None or command not in process.handlers:
            raise NotRunning(f"Nobody listens at {self.path}.")
        answer = process.run(world.loop.create_task, process.handlers[command](args))
        await asyncio.wait((answer, process.exit.future()), return_when=asyncio.FIRST_COMPLETED, timeout=self.timeout_s)
        if not answer.done():
            raise NotRunning(f"The process at {self.path} went away, or did not answer.")
        result: dict[str, Any] = answer.result()
        return result


class SimChild:
    """In place of ``common.child.Child``: another simulated process."""

    world: World

    def __init__(self, process: Running) -> None:
        self.process = process
        self.pid = id(process)

    @classmethod
    def start(cls, module: str, _settings: NodeSettings, **_options: Any) -> SimChild:
        parent = PROCESS.get()
        assert isinstance(parent, Running)
        role = {"secondary.guest": "export", "secondary": "secondary", "primary": "primary"}[module]
        child = cls.world.spawn(parent.host, role)
        parent.children.append(child)
        return cls(child)

    async def wait_ready_async(self, timeout_s: float = 60.0) -> dict[str, Any]:
        process = self.process
        await asyncio.wait(
            (process.lifecycle.told.future(), process.exit.future()), return_when=asyncio.FIRST_COMPLETED
        )
        if process.lifecycle.info is None:
            if isinstance(process.error, TandemDiskError):
                raise process.error
            raise TandemDiskError("The export process ended before it was ready.")
        return process.lifecycle.info

    def poll(self) -> int | None:
        return None if self.process.alive else -9

    async def wait_async(self) -> int:
        await self.process.exit.future()
        return 0 if self.process.ended else -9

    async def stop_async(self, timeout_s: float = 30.0) -> int:
        if self.process.alive:
            self.process.lifecycle.stop.set()
        return await self.wait_async()
