"""A simulated network between the two hosts, with the manners of ZeroMQ over TCP, good and bad.

A connection delivers in order, after a delay. It breaks (both ends hear of it, what was under way is gone), hangs
(one direction or both pass nothing on until the cut heals), or dies silently with its host. A dialer reconnects by
itself; what it was given meanwhile goes out on the next connection, as ZeroMQ does it. Beyond TCP's manners, as a
faulty box in between would have them: messages lost, repeated, damaged, cut short, strangers' messages, and messages
of a connection that is gone, delivered later.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.simulation.clock import PROCESS, Process, VirtualLoop
from tests.simulation.disk import Countdown

Message = tuple[bytes, ...]
TO_LISTENER, TO_DIALER = 0, 1


@dataclass
class Manners:
    """How the network behaves now; chances per message, times in seconds."""

    delay_s: float = 0.0005
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0
    """What the cable carries each way; 0: everything at once."""
    lose: float = 0.0
    repeat: float = 0.0
    damage: float = 0.0
    cut_short: float = 0.0
    junk: float = 0.0
    stale: float = 0.0
    """Chance that a message of a broken connection arrives after all, on a later one."""
    crash_notice_s: float = 1.0


class Connection:
    """One connection; ``identity`` is what the listener's end calls it."""

    def __init__(self, network: Network, dialer: SimDialer, listener: SimListener, identity: bytes) -> None:
        self.network = network
        self.dialer = dialer
        self.listener = listener
        self.identity = identity
        self.alive = True
        self.queues: tuple[deque[tuple[float, Message]], deque[tuple[float, Message]]] = (deque(), deque())
        self._due = [0.0, 0.0]
        self._busy_until = [0.0, 0.0]
        self._timers: list[Any] = [None, None]

    def send(self, direction: int, frames: Sequence[Any]) -> None:
        network = self.network
        if network.countdown.strikes("stream", "send"):
            self.break_()
            return
        message: Message = tuple(map(bytes, frames))
        network.sent += 1
        network.trace(direction, message)
        manners = network.manners
        for copy in network.mangle(message):
            due = network.loop.now + manners.delay_s + network.chance.random() * manners.jitter_s
            if manners.bytes_per_s:
                self._busy_until[direction] = max(self._busy_until[direction], network.loop.now) + (
                    sum(map(len, copy)) / manners.bytes_per_s
                )
                due = max(due, self._busy_until[direction] + manners.delay_s)
            if due > self._due[direction]:
                self._due[direction] = due
            self.queues[direction].append((self._due[direction], copy))
        self.schedule(direction)

    def receiver(self, direction: int) -> Process | None:
        return self.listener.process if direction == TO_LISTENER else self.dialer.process

    def schedule(self, direction: int) -> None:
        """Deliver what is due, at its time, unless that direction is cut."""
        queue = self.queues[direction]
        if self._timers[direction] is not None or not queue or not self.alive or self.network.is_cut(self, direction):
            return
        process = self.receiver(direction)
        context = process.context.copy() if process is not None else None
        self._timers[direction] = self.network.loop.call_at(queue[0][0], self._deliver, direction, context=context)

    def _deliver(self, direction: int) -> None:
        timer, self._timers[direction] = self._timers[direction], None
        if timer is not None:
            timer.cancel()  # it may be called ahead of its time
        queue = self.queues[direction]
        if not self.alive or self.network.is_cut(self, direction):
            return
        now = self.network.loop.now
        port: Any = self.listener if direction == TO_LISTENER else self.dialer
        some = False
        while queue and queue[0][0] <= now and bool(self.alive) and not port.closed:
            message = queue.popleft()[1]
            some = True
            if direction == TO_LISTENER:
                port.on_frames(self.identity, [memoryview(frame) for frame in message])
            else:
                port.on_frames(list(message))
        if some and not port.closed:
            port.on_drained()
        self.schedule(direction)

    def hurry(self, direction: int) -> None:
        """Deliver all that is under way in a direction, in the process that gets it."""
        queue = self.queues[direction]
        for index, (_, message) in enumerate(queue):
            queue[index] = self.network.loop.now, message
        process = self.receiver(direction)
        if process is None:
            return
        try:
            process.context.copy().run(self._deliver, direction)
        except BaseException:
            if not process.dead:
                raise

    def break_(self, *, tell: bool = True, reason: str = "the connection broke") -> None:
        """Everything under way is gone. ``tell``: the ends hear of it soon; otherwise later."""
        if not self.alive:
            return
        self.alive = False
        network = self.network
        network.connections.remove(self)
        if network.manners.stale:
            for direction, queue in enumerate(self.queues):
                for _, message in queue:
                    if network.chance.random() < network.manners.stale:
                        network.left_over.append((direction, self.identity, message))
        pause = 0.0 if tell else network.manners.crash_notice_s * network.chance.random() * 10
        network.later(self.dialer.process, pause + network.some_delay(), self.dialer.broke, self, reason)
        network.later(self.listener.process, pause + network.some_delay(), self.listener.broke)


class SimDialer:
    """In place of what ``common.transport.dial`` makes."""

    network: Network

    def __init__(
        self, _context: Any, address: str, _keys: Any, on_frames: Callable[[list[bytes]], None],
        on_drained: Callable[[], None], watcher: Any,
    ) -> None:  # fmt: skip
        self.address = address
        self.on_frames = on_frames
        self.on_drained = on_drained
        self.watcher = watcher
        self.closed = False
        self.process = PROCESS.get()
        self.connection: Connection | None = None
        self._waiting: list[Message] = []
        self._tries = 0
        self.network.dialers.append(self)
        self._again(0.0)

    def _again(self, pause_s: float) -> None:
        network = self.network
        network.later(self.process, pause_s + network.some_delay(), self._dial)

    def _dial(self) -> None:
        if self.closed or self.connection is not None:
            return
        network = self.network
        listener = network.listeners.get(self.address)
        reachable = (
            listener is not None and not listener.closed and listener.process is not None
            and not listener.process.stopped and not network.cut[TO_LISTENER] and not network.cut[TO_DIALER]
        )  # fmt: skip
        if not reachable:
            self._tries += 1
            self._again(min(1.0, 0.05 * 2 ** min(self._tries, 5)))
            return
        assert listener is not None
        self._tries = 0
        network.count += 1
        connection = Connection(network, self, listener, b"c%d" % network.count)
        self.connection = connection
        network.connections.append(connection)
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            connection.send(TO_LISTENER, message)
        network.haunt(connection)
        self.watcher.connection_up()

    def broke(self, connection: Connection, reason: str) -> None:
        """ZeroMQ tells, and dials again by itself."""
        if self.closed or self.connection is not connection:
            return
        self.connection = None
        self._again(0.05)
        self.watcher.connection_down(reason)

    def send(self, frames: Sequence[Any]) -> bool:
        if self.connection is None:
            self._waiting.append(tuple(bytes(frame) for frame in frames))
        elif self.connection.alive:
            self.connection.send(TO_LISTENER, frames)
        return True

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.network.dialers.remove(self)
        if self.connection is not None:
            # what the socket had taken over in good order still goes out now and then (LINGER is 0, the kernel's
            # buffer is not)
            self.connection.break_()


class SimListener:
    """In place of what ``common.transport.listen`` makes."""

    network: Network

    def __init__(
        self, _context: Any, address: str, _keys: Any, on_frames: Callable[[bytes, list[Any]], None],
        on_drained: Callable[[], None], on_disconnected: Callable[[], None],
    ) -> None:  # fmt: skip
        self.address = address
        self.on_frames = on_frames
        self.on_drained = on_drained
        self.on_disconnected = on_disconnected
        self.closed = False
        self.process = PROCESS.get()
        assert address not in self.network.listeners, "two listeners on one address"
        self.network.listeners[address] = self

    def send(self, peer: bytes, frames: Sequence[Any]) -> bool:
        for connection in self.network.connections:
            if connection.identity == peer and connection.listener is self:
                connection.send(TO_DIALER, frames)
                return True
        return False

    def trust(self, _peer: bytes) -> None:
        pass

    def broke(self) -> None:
        if not self.closed:
            self.on_drained()
            self.on_disconnected()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        del self.network.listeners[self.address]
        for connection in list(self.network.connections):
            if connection.listener is self:
                connection.break_()


class Network:
    """See the module."""

    def __init__(self, loop: VirtualLoop, chance: random.Random, trace: Callable[[int, Message], None]) -> None:
        self.loop = loop
        self.countdown = Countdown()
        self.chance = chance
        self.trace = trace
        self.manners = Manners()
        self.cut = [False, False]
        """Nothing passes: towards the listener, towards the dialer."""
        self.listeners: dict[str, SimListener] = {}
        self.dialers: list[SimDialer] = []
        self.connections: list[Connection] = []
        self.left_over: list[tuple[int, bytes, Message]] = []
        self.count = 0
        self.sent = 0
        self.counts: Counter[str] = Counter()
        """What a faulty box in between did."""

    def some_delay(self) -> float:
        return self.manners.delay_s + self.chance.random() * self.manners.jitter_s

    def later(self, process: Process | None, pause_s: float, call: Callable[..., None], *args: Any) -> None:
        """Call in the process, if that lives then."""
        context = process.context.copy() if process is not None else None
        self.loop.call_later(pause_s, call, *args, context=context)

    def hurry(self, process: Process) -> None:
        """What is on its way to the listener of ``process`` arrives now."""
        for connection in list(self.connections):
            if connection.listener.process is process:
                connection.hurry(TO_LISTENER)

    def is_cut(self, connection: Connection, direction: int) -> bool:
        return self.cut[direction]

    def set_cut(self, to_listener: bool, to_dialer: bool) -> None:
        """Cut or heal each direction. What hangs in a healed one is delivered then."""
        self.cut = [to_listener, to_dialer]
        for connection in list(self.connections):
            for direction in (TO_LISTENER, TO_DIALER):
                connection.schedule(direction)

    def break_all(self) -> None:
        for connection in list(self.connections):
            connection.break_()

    def process_gone(self, process: Process, *, silently: bool) -> None:
        """Its sockets close; ``silently``: its host went down, and nobody tells the other end."""
        for connection in list(self.connections):
            if process in (connection.dialer.process, connection.listener.process):
                connection.break_(tell=not silently)
        for address, listener in list(self.listeners.items()):
            if listener.process is process:
                listener.closed = True
                del self.listeners[address]
        for dialer in list(self.dialers):
            if dialer.process is process:
                dialer.closed = True
                self.dialers.remove(dialer)

    def mangle(self, message: Message) -> list[Message]:
        """What a faulty box in between makes of a message."""
        manners, chance = self.manners, self.chance
        if not (manners.lose or manners.repeat or manners.damage or manners.cut_short or manners.junk):
            return [message]
        out = [message]
        if chance.random() < manners.lose:
            self.counts["messages lost"] += 1
            return []
        if chance.random() < manners.repeat:
            self.counts["messages repeated"] += 1
            out.append(message)
        if chance.random() < manners.damage:
            self.counts["messages damaged"] += 1
            out[0] = damaged(message, chance)
        if chance.random() < manners.cut_short:
            self.counts["messages cut short"] += 1
            frame = chance.randrange(len(message))
            kept = message[frame][: chance.randint(0, max(0, len(message[frame]) - 1))]
            out[0] = (*message[:frame], kept, *message[frame + 1 :])
        if chance.random() < manners.junk:
            self.counts["messages of strangers"] += 1
            out.append(tuple(chance.randbytes(chance.randint(0, 60)) for _ in range(chance.randint(1, 3))))
        return out

    def haunt(self, connection: Connection) -> None:
        """Messages of connections that are gone come out of a faulty box's memory."""
        left_over, self.left_over = self.left_over, []
        self.chance.shuffle(left_over)
        self.counts["messages delivered late"] += len(left_over)
        for direction, identity, message in left_over:
            if direction == TO_DIALER or self.chance.random() < 0.5:
                connection.queues[direction].append((self.loop.now + self.some_delay(), message))
                connection.schedule(direction)
            else:
                self.later(connection.listener.process, self.some_delay() * 3, self._from_the_dead, connection.listener,
                           identity, message)  # fmt: skip

    @staticmethod
    def _from_the_dead(listener: SimListener, identity: bytes, message: Message) -> None:
        if not listener.closed:
            listener.on_frames(identity, [memoryview(frame) for frame in message])
            listener.on_drained()


def damaged(message: Message, chance: random.Random) -> Message:
    """One bit of it turned over."""
    sizes = [len(frame) for frame in message]
    if not sum(sizes):
        return message
    frame = chance.choices(range(len(message)), weights=[max(size, 0) or 0 for size in sizes])[0]
    data = bytearray(message[frame])
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return (*message[:frame], bytes(data), *message[frame + 1 :])
