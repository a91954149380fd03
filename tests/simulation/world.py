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
import errno
import functools
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from xxhash import xxh3_64_hexdigest

import common.child
import common.control
import common.disk
import common.export
import common.intent
import common.metadata
import common.port
import common.transport
import primary.node
import secondary.buffer
import secondary.guest
import secondary.header
import secondary.holders
import secondary.node
import secondary.replica
import secondary.spill
import secondary.waits
from common import limits
from common.errors import DiskError, TandemDiskError
from common.intent import IntentFile
from primary.thrift import Thrift
from secondary.buffer import DiskBuffer
from secondary.header import PairHeader, Stage
from secondary.locks import Description
from secondary.replica import GuestVolume
from secondary.requests import RequestTable
from secondary.spill import Spill
from tests.simulation.clock import PROCESS, VirtualLoop, thread_of, time_of
from tests.simulation.disk import Countdown, MetadataFile, Platter, SimDisk
from tests.simulation.files import CountedOs, IntentOs, SpillOs, fail_intents
from tests.simulation.host import OTHER, SIDES, Host
from tests.simulation.network import Network, SimDialer, SimListener
from tests.simulation.options import Options
from tests.simulation.oracle import Oracle, Violation
from tests.simulation.processes import Running, SimChild, SimControl, SimControlClient, SimLifecycle, SimServer
from tests.simulation.scale import scaled

MAINS = {"primary": primary.node, "secondary": secondary.node, "export": secondary.guest}
REAL_TIME = {"common.disk"}
"""Modules that keep the real clock: nothing that a simulation does depends on it."""
MOST_STEPS = 300_000
"""Callbacks in one life; the usual one has a few thousand. More are a failure of liveness."""


def _worthwhile(thrift: Thrift, _payload: memoryview, pending: int) -> bool:
    """Payloads are small here, and links have no rate: compress whatever need not wait for the thread, every other one
    in it."""
    thrift.speed = 1e12 if thrift.speed < 1e12 else 1.0
    return pending == 0


def _no_holders(_path: str, _ranges: Any, *, shared: bool = False) -> list[tuple[int, str]]:
    """All of them are this process."""
    return []


@functools.lru_cache(maxsize=1)
def _rooms(_loaded: int) -> list[Any]:
    """The product's modules, while ``_loaded`` modules are loaded."""
    known = re.compile(r"(common|primary|secondary)\b|deploy\.roles$")
    return [module for name, module in sys.modules.items() if known.match(name) and name not in REAL_TIME]


class World:
    """See the module. Use ``open``."""

    def __init__(self, options: Options, chance: random.Random, directory: str) -> None:
        self.options = options
        self.chance = chance
        self.directory = directory
        self.loop = VirtualLoop(random.Random(chance.getrandbits(64)))
        self.countdown = Countdown()
        self.network = Network(self.loop, random.Random(chance.getrandbits(64)), self._traced)
        self.network.countdown = self.countdown
        block = options.block_size
        self.sizes = [count * block - (512 if options.odd_end else 0) for count in options.blocks]
        """Bytes of the volumes at their birth."""
        self.rooms = [size + options.growth * block for size in self.sizes]
        """Bytes up to which they may grow."""
        slots = [min(count, options.small_pool or count) for count in options.blocks]
        most = [min(count + options.growth, options.small_pool or count + options.growth) for count in options.blocks]
        self.buffer_bytes = 2 * sum(most) * block + 2 * len(slots) * block
        self.min_pool = options.small_pool * block if options.small_pool else limits.MIN_POOL
        self.oracle = Oracle(self.rooms, sync=options.sync)
        self.hosts = {side: Host(self, side) for side in SIDES}
        self.intents = IntentOs(self)
        self.violation: BaseException | None = None
        self.left_streams: set[int] = set()
        """Of sides that gave the primary role up: exact there is not exact in the stream that they follow."""
        self.trace: Callable[[str], None] = lambda _line: None
        self.slow_readers = 0
        self.preempt = 0.0
        self.nested = False
        self.turns = 0
        """Another process ran in the middle of a disk operation."""
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
        self.unending = False
        """Only the network gives trouble, and nobody commands anything: no process has a reason to end (I7)."""
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
            (common.transport.dial, SimDialer), (common.transport.listen, SimListener),
            (common.port.zmq_context, contextlib.nullcontext),
            (common.export.NbdServer, SimServer), (common.control.ControlServer, SimControl),
            (common.child.Child, SimChild),
            (common.control.ControlClient, SimControlClient), (common.metadata.load, self._load),
            (common.metadata.save, self._save), (secondary.holders.find_holders, _no_holders),
        ]  # fmt: skip
        undo: list[Callable[[], None]] = []
        fakes = {id(real): fake for real, fake in swaps}
        for module in _rooms(len(sys.modules)):
            for attribute, value in list(vars(module).items()):
                if id(value) in fakes:
                    self._set(undo, module, attribute, fakes[id(value)])
        self._set(undo, secondary.replica, "threading", fake_threads)
        self._set(undo, limits, "MIN_POOL", self.min_pool)
        for owner, name, value in scaled(self.options, _rooms(len(sys.modules))):
            self._set(undo, owner, name, value)
        if "compress" in self.options.policies:
            self._set(undo, Thrift, "worthwhile", _worthwhile)
        self._set(undo, secondary.node, "RECORD_INTERVAL_S", 1.0)
        self._set(undo, SimDialer, "network", self.network)
        self._set(undo, SimListener, "network", self.network)
        self._set(undo, SimChild, "world", self)
        self._set(undo, SimServer, "world", self)
        self._observe(undo)
        return undo

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
        hand_over = GuestVolume.hand_over

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

        def handed_over(volume: GuestVolume, successor: Any) -> None:
            if not volume.buffer.index:  # the first of them all
                world.oracle.handed_over()
            hand_over(volume, successor)

        def buffer_init(buffer: DiskBuffer, *args: Any, **options: Any) -> None:
            process = PROCESS.get()
            if process is not None:
                process.buffers.append(buffer)
            init(buffer, *args, **options)

        self._never_wait(undo)
        self._files(undo)
        self._note_files(undo, IntentFile)
        self._note_files(undo, Spill)
        self._set(undo, PairHeader, "store_state", store_state)
        self._set(undo, GuestVolume, "apply", guest_apply)
        self._set(undo, GuestVolume, "hand_over", handed_over)
        self._set(undo, DiskBuffer, "__init__", buffer_init)
        for cls in (primary.node.PrimaryNode, secondary.node.SecondaryNode, secondary.guest.GuestProcess):
            self._note_nodes(undo, cls)

    def _never_wait(self, undo: list[Callable[[], None]]) -> None:
        """Whoever waits for the kernel here waits for ever, as nobody else runs meanwhile: somebody holds a request
        that he will not end."""
        world = self

        def stuck(table: RequestTable, what: str) -> None:
            world.violation = world.violation or Violation("liveness", f"{what} of {table.path} is never let go of")
            raise table.timed_out(table.whole(), what)

        def wait(self: Any, _limit_s: float) -> None:
            stuck(self._table, f"the request on {self._ranges}")

        def wait_byte(table: RequestTable, byte: int, *, shared: bool = False, timeout_s: Any = None) -> Description:
            description = table.try_byte(byte, shared=shared)
            if description is None:
                stuck(table, f"byte {byte:#x}")
            assert description is not None
            return description

        self._set(undo, secondary.waits.Wait, "result", wait)
        self._set(undo, RequestTable, "wait_byte", wait_byte)

    def _files(self, undo: list[Callable[[], None]]) -> None:
        """Small files: their calls may fail, and the power may go."""
        self._set(undo, IntentFile, "_write_pages", fail_intents(self))
        self._set(undo, common.intent, "os", self.intents)
        self._set(undo, os, "unlink", functools.partial(IntentOs.unlink, self.intents))
        space = ("open", "posix_fallocate")
        self._set(undo, secondary.buffer, "os", CountedOs(self, "memory", space, errno.ENOSPC))
        self._set(undo, secondary.header, "os", CountedOs(self, "memory", space, errno.ENOSPC))
        self._set(undo, secondary.spill, "os", SpillOs(self))

    def _note_files(self, undo: list[Callable[[], None]], cls: Any) -> None:
        """Descriptors belong to a process: the kernel closes them when it dies."""
        make, shut = cls.__init__, cls.close

        def init(file: Any, *args: Any, **options: Any) -> None:
            make(file, *args, **options)
            process = PROCESS.get()
            if process is not None:
                process.files.append(file)

        def close(file: Any) -> None:
            shut(file)
            process = PROCESS.get()
            if process is not None:
                process.files = [other for other in process.files if other is not file]

        self._set(undo, cls, "__init__", init)
        self._set(undo, cls, "close", close)

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
                    if process is not None and self.countdown.strikes(platter.device, "open"):
                        raise DiskError(f"{self._short(path)} cannot be opened: Input/output error.")
                    return SimDisk(platter, forgetful=isinstance(process, Running) and process.role == "secondary")
        raise DiskError(f"{path} does not exist.")

    def _file(self, path: str) -> MetadataFile:
        for host in self.hosts.values():
            if path == f"{host.directory}/metadata":
                return host.metadata
        raise AssertionError(path)

    def host_of(self, path: str) -> Host | None:
        """Whose file it is."""
        return next((host for host in self.hosts.values() if path.startswith(f"{host.directory}/")), None)

    def _short(self, path: str) -> str:
        """For sentences that are sent: the directory of a run has a name of its own, and the trace has not."""
        return path.removeprefix(self.directory)

    def _load(self, path: str) -> Any:
        return self._file(path).load(self._short(path))

    def _save(self, path: str, metadata: Any) -> None:
        process = PROCESS.get()
        newest = metadata.history[-1].number if metadata.history else 0
        self.trace(
            f"save {path} by {process.name if process else 'operator'}: {metadata.role} generation {newest} clean "
            f"{metadata.clean} "
            f"syncing {metadata.syncing} consistent {metadata.consistent} at "
            f"{metadata.stream % 1000}:{metadata.sequence}"
        )
        self._file(path).save(self._short(path), metadata)
        self.intents.directory_synced(path.rpartition("/")[0])
        if process is None or not process.dead:
            self.guard(self.oracle.sizes_noted, metadata.side, metadata)
        if metadata.role != "secondary":
            return
        if process is None:
            self.left_streams.add(metadata.stream)
        elif isinstance(process, Running) and process.host is self.secondary_host() and not metadata.syncing:
            self.guard(self.oracle.resync_noted, process.host.platters)

    # Processes

    def spawn(self, host: Host, role: str) -> Running:
        """Start a process of the product."""
        process = Running(host, role, 1.0 + host.rate, host.offset)
        host.processes[role] = process
        self.ends.append(process)
        oracle = self.oracle
        if role == "primary" and oracle.promoted and oracle.promoted_side == host.side:
            own = oracle.metadata(host.metadata)
            if not oracle.mixed and own is not None and not own.committing:  # else it has to refuse
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
        if self.unending and not process.dead:
            self.guard(_raise, "I7", f"{process.name} ended ({error!r}), and nothing but messages can be the reason")
        if process.files and lifecycle.is_ready and not process.dead:
            held = ", ".join(type(file).__name__ for file in process.files)
            self.guard(_raise, "descriptors", f"{process.name} ended ({error}) and had not closed: {held}")
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
        """What the kernel does with the mappings, locks and descriptors of a process that is gone."""
        files, process.files = process.files, []
        for open_ in (*process.buffers, *files):
            with contextlib.suppress(Exception):
                open_.close()

    def lose_power(self, host: Host) -> None:
        """The machine stops, and with it everything that was not on stable storage."""
        self.trace(f"power off {host.side}")
        for process in list(host.processes.values()):
            if process.alive:
                self.kill(process, silently=True)
        for platter in host.platters:
            platter.lose_power()
        host.metadata.lose_power()
        self.intents.lose_power(host)
        shutil.rmtree(host.settings.buffer.directory, ignore_errors=True)
        host.off = True
        self.oracle.memory_lost(host.side, host.platters, host.metadata, self.hosts[OTHER[host.side]].metadata)

    def happened(self) -> Counter[str]:
        """What there was to look at, and what was looked at."""
        oracle = self.oracle
        counts = Counter(self.network.counts)
        for host in self.hosts.values():
            counts.update(host.faults.struck)
        counts["messages"] = self.network.sent
        counts["checkpoints"] = oracle.checkpoint_count
        counts["guest reads checked"] = oracle.reads
        counts["prefixes checked"] = oracle.prefix_checks
        counts["prefixes not checked"] = oracle.inexact
        counts["promotions"] = oracle.promotions
        counts["generations"] = len(oracle.generations)
        counts["turns in between"] = self.turns
        counts["intents lost with the power"] = self.intents.lost
        counts["lives without an end"] = self.unending
        counts.update((*self.options.policies, *self.options.paths))
        return counts

    # Checks

    def disk_changed(self) -> None:
        self._changed = True

    def disk_forgot(self, side: str) -> None:
        """A failed flush lost writes."""
        if side == self.secondary_host().side:
            self.oracle.forgotten = True
            self.oracle.unsure[:] = True

    def disk_lost(self, side: str, volume: int, sectors: list[int], versions: list[int]) -> None:
        """These were on a disk, and are not any more."""
        if side == self.secondary_host().side:
            for sector, version in zip(sectors, versions, strict=True):
                self.oracle.lost.setdefault(self.oracle.starts[volume] + sector, set()).add(version)

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
        if self.violation is not None:
            self.loop.stop()

    @property
    def disk_may_fail(self) -> bool:
        """The primary disk may refuse a write that comes now."""
        options = self.options
        return "disk_primary" in options.troubles or "intents" in options.commands or self.countdown.armed

    def secondary_host(self) -> Host:
        """The side that is, or was, the secondary."""
        return self.hosts[OTHER[self.oracle.leader]]

    def check_secondary(self) -> None:
        host = self.secondary_host()
        process = host.process("secondary")
        if process is None or self.oracle.promoted or self._has_led(process):
            return
        self.guard(self.oracle.check_secondary, host.platters, exact=self.exact(process))

    @staticmethod
    def _has_led(process: Running) -> bool:
        """It took over once, and was left behind since: it follows nobody."""
        buffer = process.node.__dict__.get("buffer") if process.node is not None else None
        return buffer is not None and buffer.header.stage is Stage.DONE

    def exact(self, process: Running | None) -> bool | None:
        """Whether the secondary itself says that its disk is at a point of the stream; None if it does not say
        anything yet. That both disks are alike to begin with (``initial_sync = assume``) is said of the pair's birth
        only."""
        if process is None or process.node is None or "session" not in process.node.__dict__:
            return None
        position = process.node.session.position
        if position.stream in self.left_streams:
            return None  # rejoined after a stop in good order: exact in the stream that it sent itself
        alike = self.options.assume and not self.oracle.promoted_side
        return bool(position.exact and not position.syncing and (position.applied or alike))

    def _stored(self, header: PairHeader, old: tuple[int, int, bool], new: tuple[int, int, bool]) -> None:
        for host in self.hosts.values():
            if header.path.startswith(host.directory):
                process = host.process("secondary")
                self.trace(f"state {host.side} {old} -> {new}")
                number, exact = header.checkpoint.number, self.exact(process)
                self.guard(self.oracle.state_stored, host.side, old, new, number, host.platters, exact=exact)

    def between(self, platter: Platter, kind: str) -> None:
        """In the middle of a disk operation another process may run."""
        if self.nested or not self.preempt or self._random.random() > self.preempt:
            return
        self.nested = True
        self.turns += 1
        process = PROCESS.get()
        try:
            self.on_between(platter, kind, process if isinstance(process, Running) else None)
        finally:
            self.nested = False

    def _traced(self, direction: int, message: tuple[bytes, ...]) -> None:
        digest = xxh3_64_hexdigest(b"".join(message))
        self.trace(f"send {direction} {len(message)} {sum(map(len, message))} {message[0][:2].hex()} {digest}")


def _raise(invariant: str, sentence: str) -> None:
    raise Violation(invariant, sentence)
