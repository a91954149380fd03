"""Two simulated machines that run the product's own processes: ``primary.node``, ``secondary.node`` and
``secondary.guest``, whole.

What lies underneath is exchanged while a simulation runs (``World.open``): the clock, the event loop, ZeroMQ, disks,
metadata files, the NBD server, the control sockets, child processes and random numbers. The disk buffer and its
CowRequests are real: files in shared memory, locked through the kernel. Names are exchanged by identity in every
module that imported them, so a refactoring of the product does not silently bring the real thing back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common.child
import common.control
import common.disk
import common.export
import common.intent
import common.metadata
import common.port
import primary.node
import primary.questions
import secondary.guest
import secondary.node
from common import limits
from common.errors import DiskError, NotRunning, TandemDiskError
from common.process import Lifecycle
from common.settings import BufferSettings, ExportSettings, NodeSettings, ReplicationSettings, VolumeSettings
from primary.resync import ResyncLimits
from secondary.buffer import DiskBuffer
from secondary.header import PairHeader
from secondary.replica import GuestVolume
from tests.simulation.clock import PROCESS, Once, Process, VirtualLoop, thread_of, time_of
from tests.simulation.disk import Faults, MetadataFile, Platter, SimDisk
from tests.simulation.network import Network, SimDialer, SimListener
from tests.simulation.options import Options
from tests.simulation.oracle import Oracle, Violation

SIDES = ("a", "b")
OTHER = {"a": "b", "b": "a"}
MAINS = {"primary": primary.node, "secondary": secondary.node, "export": secondary.guest}
REAL_TIME = {"secondary.requests", "secondary.holders", "common.disk"}
"""Modules that keep the real clock: they wait for the kernel, and in a simulation they never do."""
MOST_STEPS = 300_000
"""Callbacks in one life; the usual one has a few thousand."""
HEARTBEAT_S, PEER_TIMEOUT_S = 0.5, 2.5


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
            await asyncio.wait_for(self._empty.wait(), timeout_s)


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


class Host:
    """One machine: disks, metadata, memory (the directory of the disk buffer), processes."""

    def __init__(self, world: World, side: str) -> None:
        options = world.options
        self.side = side
        self.chance = random.Random(world.chance.getrandbits(64))
        self.faults = Faults(killer=world.kill)  # type: ignore[arg-type]
        self.directory = f"{world.directory}/{side}"
        Path(self.directory).mkdir()
        for index in range(len(world.sizes)):
            Path(f"{self.directory}/disk{index}.raw").touch()  # looked at, never read
        self.platters = [
            Platter(f"{self.directory}/disk{index}.raw", size, self.chance, self.faults)
            for index, size in enumerate(world.sizes)
        ]
        for platter in self.platters:
            platter.changed = world.disk_changed
            platter.forgot = lambda: world.disk_forgot(side)
            platter.between = world.between
        self.metadata = MetadataFile(self.chance, self.faults, name=f"{side} metadata")
        self.rate = self.offset = 0.0
        self.settings = NodeSettings(
            pair_id="simulated",
            side=side,
            directory=self.directory,
            volumes=tuple(VolumeSettings(f"v{index}", platter.name) for index, platter in enumerate(self.platters)),
            export=ExportSettings(unix=f"{self.directory}/nbd.sock"),
            replication=ReplicationSettings(
                listen=f"sim://{side}",
                connect=f"sim://{OTHER[side]}",
                window_bytes=options.window_bytes,
                heartbeat_s=HEARTBEAT_S,
                peer_timeout_s=PEER_TIMEOUT_S,
            ),
            buffer=BufferSettings(f"{self.directory}/memory", world.buffer_bytes, options.block_size),
            mode="sync" if options.sync else "async",
            checkpoint_interval_s=options.interval_s,
            initial_sync="assume" if options.assume else "full",
            on_peer_loss=options.loss,  # type: ignore[arg-type]
        )
        self.processes: dict[str, Running] = {}
        self.off = False

    def process(self, role: str) -> Running | None:
        """The process of that role, if it is alive."""
        found = self.processes.get(role)
        return found if found is not None and found.alive else None


class World:
    """See the module. Use ``open``."""

    def __init__(self, options: Options, chance: random.Random, directory: str) -> None:
        self.options = options
        self.chance = chance
        self.directory = directory
        self.loop = VirtualLoop(random.Random(chance.getrandbits(64)))
        self.network = Network(self.loop, random.Random(chance.getrandbits(64)), self._traced)
        block = options.block_size
        self.sizes = [count * block - (512 if options.odd_end else 0) for count in options.blocks]
        slots = [min(count, options.small_pool or count) for count in options.blocks]
        self.buffer_bytes = 2 * sum(slots) * block + 2 * len(slots) * block
        self.min_pool = options.small_pool * block if options.small_pool else limits.MIN_POOL
        self.oracle = Oracle(self.sizes, sync=options.sync)
        self.hosts = {side: Host(self, side) for side in SIDES}
        self.violation: BaseException | None = None
        self.trace: Callable[[str], None] = lambda _line: None
        self.slow_readers = 0
        self.preempt = 0.0
        self.nested = False
        self.on_between: Callable[[Platter, str, Running | None], None] = lambda _platter, _kind, _process: None
        self._random = random.Random(chance.getrandbits(64))
        self._changed = False
        pool = min(slots)
        self.most_blocks = max(1, pool // 2) if not options.large else 20
        """Blocks that one batch touches at most; above half a pool the primary cuts it, and a checkpoint may fall in
        between."""
        self.oracle.may_be_torn = (
            options.large or pool < 4 or bool(options.troubles & {"kill_inside", "disk_secondary"})
        )
        self.oracle.cut = options.large or pool < 4
        self.loop.after = self._after
        self.loop.crashed = lambda process: self.kill(process)  # type: ignore[arg-type]
        self.loop.blocked = lambda: self.slow_readers > 0
        self.ends: list[Running] = []
        self.own_operations: list[Any] = []
        """Batches that the oracle knows as the leading side's; the others come from before it led."""

    # The exchange of what lies underneath

    @classmethod
    @contextlib.contextmanager
    def open(cls, options: Options, chance: random.Random) -> Iterator[World]:
        """A world whose patches are in place; undone on leaving."""
        directory = tempfile.mkdtemp(prefix="td-sim-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        world = cls(options, chance, directory)
        undo = world._exchange()
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        asyncio.set_event_loop(world.loop)
        try:
            yield world
        finally:
            for restore in reversed(undo):
                restore()
            world._bury()
            logging.disable(level)
            asyncio.set_event_loop(None)
            shutil.rmtree(directory, ignore_errors=True)

    def _exchange(self) -> list[Callable[[], None]]:
        fake_time, fake_threads = time_of(self.loop), thread_of(self.loop)
        fake_secrets = SimpleNamespace(randbits=self._random.getrandbits)
        import secrets

        swaps: list[tuple[Any, Any]] = [
            (time, fake_time), (secrets, fake_secrets), (common.disk.FileDisk, self._open_disk),
            (common.port.Dialer, SimDialer), (common.port.Listener, SimListener),
            (common.port.zmq_context, contextlib.nullcontext),
            (common.export.NbdServer, SimServer), (common.control.ControlServer, SimControl),
            (common.child.Child, SimChild),
            (common.control.ControlClient, SimControlClient), (common.metadata.load, self._load),
            (common.metadata.save, self._save),
        ]  # fmt: skip
        undo: list[Callable[[], None]] = []
        for name, module in list(sys.modules.items()):
            known = name.split(".")[0] in ("common", "primary", "secondary") or name == "deploy.roles"
            if not known or name in REAL_TIME:
                continue
            for attribute, value in list(vars(module).items()):
                for real, fake in swaps:
                    if value is real:
                        self._set(undo, module, attribute, fake)
                if value is threading and name == "secondary.replica":
                    self._set(undo, module, attribute, fake_threads)
        self._set(undo, limits, "MIN_POOL", self.min_pool)
        self._scale(undo)
        self._set(undo, secondary.node, "RECORD_INTERVAL_S", 1.0)
        self._set(undo, SimDialer, "network", self.network)
        self._set(undo, SimListener, "network", self.network)
        self._set(undo, SimChild, "world", self)
        self._set(undo, SimServer, "world", self)
        self._observe(undo)
        return undo

    def _scale(self, undo: list[Callable[[], None]]) -> None:
        """Disks are tiny here: so are the pieces in which a resync asks and sends, or it would be over in one."""
        unit = max(self.options.block_size, 2048)
        small = {"PIECE": unit, "LOOK": 8 * unit, "IN_FLIGHT": 4 * unit, "BUSY_IN_FLIGHT": 2 * unit,
        "QUESTION_BYTES": unit,
                 "HOLE_QUESTION": 4 * unit,
                 "ResyncLimits": functools.partial(ResyncLimits, piece=unit, in_flight=4 * unit)}  # fmt: skip
        region = 1 << max(12, self.options.block_size.bit_length() - 1)
        small |= {"REGION": region, "REGION_SHIFT": region.bit_length() - 1, "AHEAD": 2, "FORGET_INTERVAL_S": 2.0}
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith(("primary.", "common.intent")):
                for name in small.keys() & vars(module).keys():
                    self._set(undo, module, name, small[name])
        self._set(undo, primary.questions.Inquiry.ask, "__defaults__", (unit,))
        self._set(undo, common.intent.IntentFile.__init__, "__defaults__", (region,))

    @staticmethod
    def _set(undo: list[Callable[[], None]], owner: Any, name: str, value: Any) -> None:
        missing = object()
        old = getattr(owner, name) if name == "__defaults__" else vars(owner).get(name, missing)
        setattr(owner, name, value)
        undo.append(lambda: delattr(owner, name) if old is missing else setattr(owner, name, old))

    def _observe(self, undo: list[Callable[[], None]]) -> None:
        """Look over the product's shoulder: nodes and buffers as they are made, the state word, the guest's writes."""
        world = self
        store, apply, init = PairHeader.store_state, GuestVolume.apply, DiskBuffer.__init__

        def store_state(header: PairHeader, stage: Any, epoch: int, *, syncing: bool) -> None:
            old = (int(header.stage), header.epoch, header.syncing)
            store(header, stage, epoch, syncing=syncing)
            world._stored(header, old, (int(stage), epoch, syncing))

        def guest_apply(volume: GuestVolume, operations: Any, view: memoryview, *, wait: bool) -> Any:
            first = world.oracle.starts[volume.buffer.index]
            stage = int(volume.buffer.header.stage)
            try:
                errors = apply(volume, operations, view, wait=wait)
            except BlockingIOError:
                raise
            except BaseException:
                world.oracle.guest_unsure(first, operations)
                raise
            side = next(
                host.side for host in world.hosts.values() if volume.buffer.header.path.startswith(host.directory)
            )
            if any(operations is known for known in world.own_operations):
                return errors
            world.guard(world.oracle.guest_wrote, side, first, operations, view, errors, stage)
            return errors

        def buffer_init(buffer: DiskBuffer, *args: Any, **options: Any) -> None:
            process = PROCESS.get()
            if process is not None:
                process.buffers.append(buffer)
            init(buffer, *args, **options)

        self._set(undo, PairHeader, "store_state", store_state)
        self._set(undo, GuestVolume, "apply", guest_apply)
        self._set(undo, DiskBuffer, "__init__", buffer_init)
        for cls in (primary.node.PrimaryNode, secondary.node.SecondaryNode, secondary.guest.GuestProcess):
            self._note_nodes(undo, cls)

    def _note_nodes(self, undo: list[Callable[[], None]], cls: Any) -> None:
        make = cls.__init__

        def node_init(node: Any, *args: Any, **options: Any) -> None:
            process = PROCESS.get()
            assert isinstance(process, Running)
            process.node = node
            make(node, *args, **options)

        self._set(undo, cls, "__init__", node_init)

    def _bury(self) -> None:
        """The end of the world: nothing of it shall run, or stay open."""
        self.trace = lambda _line: None
        self.violation = self.violation or Violation("end", "")
        hook, sys.unraisablehook = sys.unraisablehook, lambda _unraisable: None
        for process in self.ends:
            self.loop.kill(process)
            for task in process.zombies:
                with contextlib.suppress(BaseException), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    task.get_coro().close()
            process.zombies.clear()
            self._close_buffers(process)
        self.loop.close()
        sys.unraisablehook = hook

    def _open_disk(self, path: str, *_args: Any, **_options: Any) -> SimDisk:
        for host in self.hosts.values():
            for platter in host.platters:
                if platter.name == path:
                    process = PROCESS.get()
                    return SimDisk(platter, forgetful=isinstance(process, Running) and process.role == "secondary")
        raise DiskError(f"{path} does not exist.")

    def _file(self, path: str) -> MetadataFile:
        for host in self.hosts.values():
            if path == f"{host.directory}/metadata":
                return host.metadata
        raise AssertionError(path)

    def _load(self, path: str) -> Any:
        return self._file(path).load(path)

    def _save(self, path: str, metadata: Any) -> None:
        process = PROCESS.get()
        newest = metadata.history[-1].number if metadata.history else 0
        self.trace(
            f"save {path} by {process.name if process else 'operator'}: {metadata.role} generation {newest} clean "
            f"{metadata.clean} "
            f"syncing {metadata.syncing} consistent {metadata.consistent} at "
            f"{metadata.stream % 1000}:{metadata.sequence}"
        )
        self._file(path).save(path, metadata)

    # Processes

    def spawn(self, host: Host, role: str) -> Running:
        """Start a process of the product."""
        process = Running(host, role, 1.0 + host.rate, host.offset)
        host.processes[role] = process
        self.ends.append(process)
        oracle = self.oracle
        if role == "primary" and oracle.promoted and oracle.promoted_side == host.side:
            oracle.lead(host.side, host.platters)
        elif role != "secondary" and oracle.leader == host.side:
            self.guard(oracle.primary_started, host.platters, power_lost=host.off)
        host.off = False
        self.trace(f"start {process.name}")
        process.run(self._launch, process)
        return process

    def _launch(self, process: Running) -> None:
        process.lifecycle = SimLifecycle(process.role)
        self.loop.create_task(self._live(process))

    async def _live(self, process: Running) -> None:
        main: Any = MAINS[process.role].main
        lifecycle = process.lifecycle
        try:
            await main(process.host.settings, lifecycle)
            error = lifecycle.failure
        except Exception as raised:
            error = raised
        process.error = error
        process.ended = True
        self.trace(f"end {process.name} {type(error).__name__ if error else ''} {error or ''}")
        for child in process.children:
            if child.alive:
                self.kill(child)
        self.network.process_gone(process, silently=False)
        self._close_buffers(process)
        process.exit.set()
        self.loop.kill(process)
        if error is not None and not isinstance(error, TandemDiskError):
            raise error

    def kill(self, process: Running, *, silently: bool = False) -> None:
        """SIGKILL, or with ``silently`` the loss of power."""
        if process.dead:
            return
        self.trace(f"kill {process.name}")
        for child in process.children:
            self.kill(child, silently=silently)
        self.loop.kill(process)
        self.network.process_gone(process, silently=silently)
        self._close_buffers(process)
        process.exit.set()

    @staticmethod
    def _close_buffers(process: Running) -> None:
        """What the kernel does with the mappings and locks of a process that is gone."""
        for buffer in process.buffers:
            with contextlib.suppress(Exception):
                buffer.close()

    def lose_power(self, host: Host) -> None:
        """The machine stops, and with it everything that was not on stable storage."""
        self.trace(f"power off {host.side}")
        for process in list(host.processes.values()):
            if process.alive:
                self.kill(process, silently=True)
        for platter in host.platters:
            platter.lose_power()
        host.metadata.lose_power()
        shutil.rmtree(host.settings.buffer.directory, ignore_errors=True)
        host.off = True
        self.oracle.memory_lost(host.side, host.platters, host.metadata, self.hosts[OTHER[host.side]].metadata)

    # Checks

    def disk_changed(self) -> None:
        self._changed = True

    def disk_forgot(self, side: str) -> None:
        """A failed flush lost writes."""
        if side == self.secondary_host().side:
            self.oracle.forgotten = True
            self.oracle.unsure[:] = True

    def guard(self, check: Callable[..., None], *args: Any, **options: Any) -> None:
        """Run a check; the first violation ends the run."""
        if self.violation is not None:
            return
        try:
            check(*args, **options)
        except Violation as violation:
            self.violation = violation
            self.trace(f"VIOLATION {violation}")

    def _after(self) -> None:
        if self.loop.failures and self.violation is None:
            self.violation = self.loop.failures[0]
        if self.loop.steps > MOST_STEPS and self.violation is None:
            self.violation = Violation("liveness", f"{MOST_STEPS} callbacks, and no end in sight")
        if self._changed or self.oracle.forgotten:
            self._changed = False
            self.check_secondary()

    def secondary_host(self) -> Host:
        """The side that is, or was, the secondary."""
        return self.hosts[OTHER[self.oracle.leader]]

    def check_secondary(self) -> None:
        host = self.secondary_host()
        process = host.process("secondary")
        if process is None or self.oracle.promoted:
            return
        self.guard(self.oracle.check_secondary, host.platters, exact=self.exact(process))

    @staticmethod
    def exact(process: Running | None) -> bool | None:
        """Whether the secondary itself says that its disk is at a point of the stream; None if it does not say
        anything yet."""
        if process is None or process.node is None or "session" not in process.node.__dict__:
            return None
        position = process.node.session.position
        return bool(
            position.exact
            and not position.syncing
            and (position.applied or process.host.settings.initial_sync == "assume")
        )

    def _stored(self, header: PairHeader, old: tuple[int, int, bool], new: tuple[int, int, bool]) -> None:
        for host in self.hosts.values():
            if header.path.startswith(host.directory):
                process = host.process("secondary")
                self.trace(f"state {host.side} {old} -> {new}")
                self.guard(
                    self.oracle.state_stored,
                    host.side,
                    old,
                    new,
                    header.checkpoint.number,
                    host.platters,
                    exact=self.exact(process),
                )

    def between(self, platter: Platter, kind: str) -> None:
        """In the middle of a disk operation another process may run."""
        if self.nested or not self.preempt or self._random.random() > self.preempt:
            return
        self.nested = True
        process = PROCESS.get()
        try:
            self.on_between(platter, kind, process if isinstance(process, Running) else None)
        finally:
            self.nested = False

    def _traced(self, direction: int, message: tuple[bytes, ...]) -> None:
        self.trace(
            f"send {direction} {len(message)} {sum(map(len, message))} {message[0][:2].hex()} {message[0][-8:].hex()}"
        )
