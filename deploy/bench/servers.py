"""Child processes of a benchmark: started so that they cannot outlive it, and asked for what they used.

A server dies with its parent (PR_SET_PDEATHSIG), whatever kills the parent. CPU seconds are user plus system time of
all threads, also of those that ended; they come in ticks of 10 ms, so that a difference over a second is good to 2 %.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

from common.errors import OperationFailed, TimedOut

START_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 5.0
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one process, in bytes."""

    peak: int
    """VmHWM: the most that was ever resident, shared memory included."""
    private: int
    """RssAnon now."""
    shared: int
    """RssShmem now: mapped pages of a memory file system, such as the disk buffer, which several processes share."""

    def most(self, other: Memory) -> Memory:
        """The larger of each figure."""
        return Memory(max(self.peak, other.peak), max(self.private, other.private), max(self.shared, other.shared))


def die_with_parent() -> None:
    """For ``preexec_fn``: the kernel kills this child when the thread that started it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def cpu_seconds(pid: int) -> float:
    """User plus system seconds that ``pid`` has used so far; 0.0 if it is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def memory(pid: int) -> Memory | None:
    """What ``pid`` holds; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return None
    kilobytes = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key in ("VmHWM", "RssAnon", "RssShmem"):
            kilobytes[key] = int(value.split()[0])
    return Memory(*(kilobytes.get(key, 0) * 1024 for key in ("VmHWM", "RssAnon", "RssShmem")))


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Return once ``condition()`` holds; TimedOut naming ``what`` if it does not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimedOut(f"{what} did not happen within {timeout_s:g} s.")
        time.sleep(0.005)


def listens(path: Path) -> bool:
    """Whether somebody takes connections at the Unix socket ``path``."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False  # not bound, or bound and not listening yet
    return True


class Servers:
    """The processes of one peer, by name. Leaving the context kills and reaps all of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self.commands: list[str] = []
        """The command lines, for the report."""

    def start(self, name: str, command: Sequence[str], *, ready: Callable[[], bool]) -> int:
        """Start ``command`` and wait until it is ``ready``; its pid. OperationFailed with what it said if it ends."""
        log = self._directory / f"{name}.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=die_with_parent
            )
        self._children[name] = child
        self.commands.append(" ".join(command))

        def listening() -> bool:
            if child.poll() is not None:
                said = log.read_text(errors="replace").strip()
                raise OperationFailed(f"{command[0]} ended with {child.returncode}: {said}")
            return ready()

        wait_until(listening, START_TIMEOUT_S, f"The start of {name}")
        return child.pid

    def pids(self) -> dict[str, int]:
        """The processes that are still there."""
        return {name: child.pid for name, child in self._children.items() if child.poll() is None}

    def kill(self, name: str) -> None:
        """SIGKILL one of them and reap it."""
        child = self._children[name]
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.wait(STOP_TIMEOUT_S)

    def close(self) -> None:
        """End all: SIGTERM first, SIGKILL for who does not listen."""
        for child in self._children.values():
            if child.poll() is None:
                child.terminate()
        for child in self._children.values():
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
