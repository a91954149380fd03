"""What every process of a pair does the same way: take settings, tell readiness, log, stop on signals, die with its
parent.

    python -m primary --settings-fd N [--ready-fd M] [--parent PID]

* **Settings** come as JSON in an inherited file descriptor (a memfd): nothing on the command line, nothing in the
  environment, no second validation.
* **Readiness** is told, not guessed: one JSON line on the ready descriptor, ``{"ready": true, …}`` once the process
  serves, or ``{"error": sentence, "hint": …, "exit_code": n}`` just before it exits with that code. systemd is told
  too if it asked.
* **Watchdog**: with systemd's ``WatchdogSec`` the event loop says twice in that time that it turns; one that hangs is
  killed and started again.
* **Stopping**: SIGTERM, SIGINT and SIGHUP set ``Lifecycle.stop``; the process' ``main`` waits for it, winds down,
  returns.
* **No orphans**: with ``--parent`` the kernel sends SIGTERM when the parent dies, however it dies (PR_SET_PDEATHSIG,
  prctl(2)). The kernel means the parent *thread*: spawn from a thread that lives as long as the process. A process
  that is half of its parent's side (the export) ends with it, by SIGKILL: whoever sees that side dead may take over.
* **Failing**: a TandemDiskError ends the process with its own exit code and one sentence; anything else is our bug: a
  traceback in the log and exit code 1.

``common.child`` is the other end: what the parent does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from selectors import BaseSelector
from typing import Any, Final, NoReturn, TextIO

from common.control import error_to_dict
from common.errors import TandemDiskError
from common.polling import PollingSelector
from common.settings import NodeSettings

PR_SET_PDEATHSIG: Final = 1
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

log = logging.getLogger("process")


class Lifecycle:
    """A process' life as its ``main`` sees it: say ``ready``, wait for ``stop``."""

    def __init__(self, name: str, ready_fd: int | None = None, *, top_level: bool = True) -> None:
        self.name = name
        self.top_level = top_level
        """True if no process of ours started this one: then it is the one that systemd asked about."""
        self.stop = asyncio.Event()
        """Set when the process shall wind down: by a signal, by a control command, or by ``fail``."""
        self.failure: BaseException | None = None
        self.is_ready = False
        self._ready_fd = ready_fd
        self._tasks: set[asyncio.Task[Any]] = set()

    def ready(self, info: Mapping[str, object] | None = None) -> None:
        """Tell the parent (and systemd) that the process serves; ``info`` rides along. Call it once."""
        assert not self.is_ready, "readiness is told once"
        self.is_ready = True
        self._tell({"ready": True, **(info or {})})
        if self.top_level:
            notify_systemd(f"READY=1\nMAINPID={os.getpid()}")
            self._keep_watchdog_quiet()
        log.info("ready %s", fields(info or {}))

    def _keep_watchdog_quiet(self) -> None:
        """Say that the loop turns, twice in the time that systemd gives it (sd_watchdog_enabled(3))."""
        interval_s = watchdog_interval_s()
        if interval_s is not None:
            notify_systemd("WATCHDOG=1")
            asyncio.get_running_loop().call_later(interval_s / 2, self._keep_watchdog_quiet)

    def fail(self, error: BaseException) -> None:
        """Stop because of ``error``: it decides the exit code. The first one counts."""
        if self.failure is None:
            self.failure = error
        self.stop.set()

    def critical(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run ``work`` in the background; an exception out of it fails the process (unlike a bare task's, which
        vanishes).
        """
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._critical_done)
        return task

    def _critical_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def failed(self, error: BaseException) -> int:
        """Report ``error`` (log, and the parent if it still waits for readiness); the exit code."""
        described = error_to_dict(error)
        if isinstance(error, TandemDiskError):
            log.error("failed exit_code=%d sentence=%r", error.exit_code, str(error))
        else:
            log.critical("failed unexpectedly", exc_info=error)
        if not self.is_ready:
            self._tell({"error": described["sentence"], "hint": described["hint"], "exit_code": described["exit_code"]})
        code: int = described["exit_code"]
        return code

    def _tell(self, line: Mapping[str, object]) -> None:
        if self._ready_fd is None:
            return
        with contextlib.suppress(BrokenPipeError):  # the parent is gone or no longer cares
            os.write(self._ready_fd, json.dumps(line).encode() + b"\n")
        os.close(self._ready_fd)
        self._ready_fd = None


Main = Callable[[NodeSettings, Lifecycle], Awaitable[None]]


def run(main: Main, name: str, *, orphaned: signal.Signals = signal.SIGTERM) -> NoReturn:
    """Be the process ``name``: read the command line, run ``main`` until it returns, exit.

    ``main`` builds the process, calls ``lifecycle.ready``, waits for ``lifecycle.stop`` and winds down before it
    returns. ``orphaned``: what comes when the parent dies.
    """
    arguments = _parse_arguments(name)

    selector = PollingSelector()

    async def with_settings(lifecycle: Lifecycle) -> None:
        settings = NodeSettings.from_json(read_settings(arguments.settings_fd))
        if len(os.sched_getaffinity(0)) > 1:
            selector.limit_s = settings.busy_poll_us / 1e6
        await main(settings, lifecycle)

    fd, parent = arguments.ready_fd, arguments.parent
    live(with_settings, name, ready_fd=fd, parent=parent, orphaned=orphaned, selector=selector)


def live(
    main: Callable[[Lifecycle], Awaitable[None]],
    name: str,
    *,
    ready_fd: int | None = None,
    parent: int | None = None,
    orphaned: signal.Signals = signal.SIGTERM,
    selector: BaseSelector | None = None,
) -> NoReturn:
    """``run`` for a process with another command line: run ``main`` on an event loop with all duties done; exit."""
    set_up_logging(name)
    if parent is not None:
        die_with_parent(parent, orphaned)
    if ready_fd is not None:
        os.set_inheritable(ready_fd, False)
    lifecycle = Lifecycle(name, ready_fd, top_level=parent is None)
    try:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
            runner.run(_live(main, lifecycle))
        code = 0 if lifecycle.failure is None else lifecycle.failed(lifecycle.failure)
    except Exception as error:
        code = lifecycle.failed(error)
    log.info("stopped exit_code=%d", code)
    logging.shutdown()
    sys.exit(code)


async def _live(main: Callable[[Lifecycle], Awaitable[None]], lifecycle: Lifecycle) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_loop_exception)
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM and signal.getsignal(number) == signal.SIG_IGN:
            continue  # as nohup and the shell's & want it
        loop.add_signal_handler(number, _stop_by_signal, lifecycle, number)
    tune_garbage_collector()
    await main(lifecycle)


def _stop_by_signal(lifecycle: Lifecycle, number: signal.Signals) -> None:
    if not lifecycle.stop.is_set():
        log.info("stopping signal=%s", number.name)
        if lifecycle.top_level:
            notify_systemd("STOPPING=1")
    lifecycle.stop.set()


def _log_loop_exception(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    log.error("event loop: %s", context.get("message"), exc_info=error)


def _parse_arguments(name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=f"The {name} process of a pair. `tandemdisk` starts it; the settings come in a file descriptor.",
    )
    parser.add_argument("--settings-fd", type=int, required=True, help="inherited descriptor with the settings as JSON")
    parser.add_argument(
        "--ready-fd", type=int, help="inherited descriptor that gets one JSON line when the process serves or fails"
    )
    parser.add_argument("--parent", type=int, metavar="PID", help="stop when this parent process dies")
    return parser.parse_args()


def read_settings(fd: int) -> bytes:
    """All of the inherited descriptor ``fd``, from its start; closes it."""
    with open(fd, "rb") as file:
        file.seek(0)
        return file.read()


def die_with_parent(parent_pid: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send a signal when the parent dies; do so now if it is dead already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it died before the request above: no signal will come
        os.kill(os.getpid(), number)


def notify_systemd(message: str) -> None:
    """sd_notify(3): one datagram to $NOTIFY_SOCKET, nothing if that is not set."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock, contextlib.suppress(OSError):
        sock.sendto(message.encode(), address)


def watchdog_interval_s() -> float | None:
    """Seconds within which systemd wants to hear from this process; None if it does not."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or int(microseconds) == 0:
        return None
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # meant for a process whose environment we inherited
    return int(microseconds) / 1e6


class _LineFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123456Z INFO primary[4711] link: peer connected session=…``"""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{whole}.{int(record.created % 1 * 1_000_000):06d}Z"

    def formatMessage(self, record: logging.LogRecord) -> str:
        who = f"{self._process}[{os.getpid()}]"
        return f"{self.formatTime(record)} {record.levelname} {who} {record.name}: {record.getMessage()}"


class _Lines(logging.StreamHandler[TextIO]):
    """To stderr. A line that cannot be written (the disk of the log is full) is lost, and no more than that."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def set_up_logging(name: str, level: int = logging.INFO) -> None:
    """Log to stderr, one line an event; exceptions that end a thread are logged too."""
    handler = _Lines(sys.stderr)
    handler.setFormatter(_LineFormatter(name))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    threading.excepthook = _log_thread_exception


def _log_thread_exception(args: threading.ExceptHookArgs) -> None:
    thread = args.thread.name if args.thread is not None else "?"
    log.error("thread died thread=%s", thread, exc_info=args.exc_value)


def fields(values: Mapping[str, object]) -> str:
    """``key=value`` pairs for a log line; values with blanks are quoted."""
    return " ".join(f"{key}={_quoted(value)}" for key, value in values.items())


def _quoted(value: object) -> str:
    text = str(value)
    return repr(text) if not text or any(c.isspace() or c in "\"'=" for c in text) else text


def tune_garbage_collector() -> None:
    """Take what the imports made out of the collector's sight and let it look less often.

    The data path makes tuples and memoryviews without cycles: the default threshold of 700 would walk them hundreds of
    times a second and free nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
