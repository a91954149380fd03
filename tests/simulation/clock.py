"""Virtual time: an asyncio loop on which hours pass in milliseconds, and processes that can be killed between two
callbacks.

``VirtualLoop`` is asyncio's own loop with another clock underneath: when nothing is ready it moves the time to the
next timer. So the product's own tasks, timeouts and timers run on it unchanged, in one order for one seed.

Everything that runs belongs to a ``Process`` (a context variable, which asyncio hands from callback to callback). A
killed process' callbacks never run again: no ``finally``, no goodbye, as with SIGKILL. A stopped one's wait until it
goes on, as with SIGSTOP.

Threads do not exist here: what the product gives to an executor runs in one piece at some later instant, in order for
each executor. Where it would wait for a CowRequest that the simulator holds (a slow reader), it is run when that one
ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import weakref
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class Killed(BaseException):
    """The process that runs now dies at this very point."""


class Process:
    """What can be killed and stopped as one. ``rate``: how fast its clock runs."""

    def __init__(self, name: str, rate: float = 1.0, offset: float = 0.0) -> None:
        self.name = name
        self.rate = rate
        self.offset = offset
        self.dead = False
        self.stopped = False
        self.held: list[Any] = []
        """Handles that wait for SIGCONT."""
        self.tasks: weakref.WeakSet[Any] = weakref.WeakSet()
        self.zombies: list[Any] = []
        """Tasks of a dead process: kept, so that nothing of them runs before the end of the simulation."""
        self.buffers: list[Any] = []
        self.files: list[Any] = []
        """What holds descriptors, as long as they are open."""
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)


class Once:
    """Something that happens once; any number of futures hear of it."""

    def __init__(self) -> None:
        self.happened = False
        self._waiting: list[asyncio.Future[None]] = []

    def set(self) -> None:
        self.happened = True
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def future(self) -> asyncio.Future[None]:
        """Done when it has happened."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.happened:
            future.set_result(None)
        else:
            self._waiting.append(future)
        return future


PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Turn:
    """A callback that is ready: what the loop needs of an ``asyncio.Handle``, and nothing else, as a life makes
    thousands of them."""

    __slots__ = ("args", "callback", "context")
    callback: Any
    """None: cancelled."""
    args: tuple[Any, ...]
    context: contextvars.Context

    def cancel(self) -> None:
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        return self.callback is None


class Timer(float):
    """The same at a time, which it is itself: a heap of them compares numbers."""

    __slots__ = ("args", "callback", "context")
    callback: Any
    args: tuple[Any, ...]
    context: contextvars.Context

    def cancel(self) -> None:
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return float(self)


class _NoSelector:
    """Waiting for nothing is not needed: the loop moves its own clock."""

    def select(self, timeout: float | None) -> list[Any]:
        return []

    def close(self) -> None:
        pass


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module. ``chance`` is the simulation's random numbers; ``after`` runs after every callback."""

    def __init__(self, chance: Any) -> None:
        super().__init__()
        self._selector = _NoSelector()
        self.now = 1000.0
        self.chance = chance
        self.after: Callable[[], None] = lambda: None
        self.crashed: Callable[[Process], None] = lambda _process: None
        self.blocked: Callable[[], bool] = lambda: False
        """A CowRequest is held by somebody slow: what may wait for one is not run now."""
        self.slowness = 0.002
        self.steps = 0
        self.failures: list[BaseException] = []
        self.owners: weakref.WeakKeyDictionary[Any, Process] = weakref.WeakKeyDictionary()
        self._lanes: dict[int, Lane] = {}
        self.set_exception_handler(self._note_failure)
        self.set_task_factory(_make_task)

    # asyncio's own hooks

    def time(self) -> float:
        return self.now

    def _process_events(self, event_list: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        return self.call_soon(callback, *args, context=context)

    def add_signal_handler(self, *_args: Any) -> None:  # type: ignore[override]
        pass

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        turn = Turn()
        turn.callback, turn.args = callback, args
        turn.context = contextvars.copy_context() if context is None else context
        self._ready.append(turn)  # type: ignore[attr-defined]
        return turn

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        timer = Timer(when)
        timer.callback, timer.args = callback, args
        timer.context = contextvars.copy_context() if context is None else context
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        return timer

    def _run_once(self) -> None:
        scheduled = self._scheduled  # type: ignore[attr-defined]
        ready = self._ready  # type: ignore[attr-defined]
        while scheduled and scheduled[0].callback is None:
            heapq.heappop(scheduled)
        if not ready and scheduled and not self._stopping and scheduled[0] > self.now:  # type: ignore[attr-defined]
            self.now = float(scheduled[0])
        while scheduled and scheduled[0] <= self.now:
            ready.append(heapq.heappop(scheduled))
        for _ in range(len(ready)):
            turn = ready.popleft()
            if turn.callback is None:
                continue
            process = turn.context.get(PROCESS)
            if process is not None:
                if process.dead:
                    continue
                if process.stopped:
                    process.held.append(turn)
                    continue
            self.steps += 1
            try:
                turn.context.run(turn.callback, *turn.args)
            except Killed:
                if process is not None and not process.dead:
                    self.crashed(process)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                if process is None or not process.dead:
                    self.failures.append(error)
            self.after()

    def _note_failure(self, _loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        process = self.owners.get(context.get("future") or context.get("task")) or PROCESS.get()
        gone = process is not None and process.dead  # what a dead process meets on its way out is nobody's fault
        if error is not None and not isinstance(error, Killed) and not gone:
            self.failures.append(error)

    # Processes

    def kill(self, process: Process) -> None:
        """SIGKILL: nothing of the process runs any more."""
        process.dead = True
        process.zombies += [task for task in process.tasks if not task.done()]
        process.tasks.clear()
        process.held.clear()  # after that: a task that has not begun is held by nothing else
        for task in process.zombies:
            task._log_destroy_pending = False

    def resume(self, process: Process) -> None:
        """SIGCONT."""
        process.stopped = False
        held, process.held = process.held, []
        self._ready.extend(held)  # type: ignore[attr-defined]

    # Threads

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """``func`` runs in one piece, later; jobs of one executor in order."""
        future: asyncio.Future[Any] = self.create_future()
        lane = self._lanes.get(id(executor)) if executor is not None else None
        if lane is None or lane.process is not PROCESS.get():
            lane = Lane(executor, PROCESS.get())
            if executor is not None:
                self._lanes[id(executor)] = lane
        lane.jobs.append((future, func, args))
        if not lane.busy:
            lane.busy = True
            self.call_later(self._pause(), self._job, lane)
        return future

    def _pause(self) -> float:
        return float(self.chance.random() * self.slowness) if self.slowness else 0.0

    def _job(self, lane: Lane) -> None:
        if self.blocked():
            self.call_later(0.01, self._job, lane)
            return
        future, func, args = lane.jobs.popleft()
        try:
            result, error = func(*args), None
        except Exception as raised:
            result, error = None, raised
        self.call_later(self._pause(), _finish, future, result, error)
        if lane.jobs:
            self.call_later(self._pause(), self._job, lane)
        else:
            lane.busy = False
            self._lanes.pop(id(lane.executor), None)


def _make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    process = PROCESS.get()
    if process is not None:
        process.tasks.add(task)
        assert isinstance(loop, VirtualLoop)
        loop.owners[task] = process
    return task


class Lane:
    """The jobs of one executor."""

    def __init__(self, executor: Any, process: Process | None) -> None:
        self.executor = executor
        self.process = process
        self.jobs: deque[tuple[asyncio.Future[Any], Any, Any]] = deque()
        self.busy = False


def _finish(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def time_of(loop: VirtualLoop) -> Any:
    """A stand-in for the module ``time``: each process' own clock."""

    def monotonic() -> float:
        process = PROCESS.get()
        return loop.now if process is None else process.offset + loop.now * process.rate

    def wall() -> float:
        return 1.7e9 + loop.now

    return SimpleNamespace(
        monotonic=monotonic, perf_counter=monotonic, time=wall, sleep=lambda _seconds: None,
        thread_time=monotonic, time_ns=lambda: int(wall() * 1e9), monotonic_ns=lambda: int(monotonic() * 1e9),
        strftime=lambda *_args: "", gmtime=lambda *_args: None,
    )  # fmt: skip


def thread_of(loop: VirtualLoop) -> Any:
    """A stand-in for ``threading``: a started thread is a job of the loop."""
    import threading

    class Thread:
        def __init__(self, *, target: Callable[[], None], name: str = "", daemon: bool = True, args: Any = ()) -> None:
            self._target = target
            self._args = args

        def start(self) -> None:
            loop.run_in_executor(self, self._target, *self._args)

    return SimpleNamespace(Thread=Thread, Lock=threading.Lock, Event=threading.Event)
