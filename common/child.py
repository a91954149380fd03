"""A child process seen from its parent: start it, hear that it is ready, stop it.

The counterpart of ``common.process``. Used by the launcher (blocking calls) and by the secondary process for its export
process (the ``_async`` calls on an event loop).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import site
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Final

from common.control import error_from_dict
from common.errors import OperationFailed, TandemDiskError, TimedOut
from common.settings import NodeSettings

READY_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 30.0
MAX_READY_LINE: Final = 65536


def settings_memfd(settings: NodeSettings) -> int:
    """An inheritable-on-request descriptor that holds ``settings`` as JSON, positioned at its start."""
    fd = os.memfd_create("tandemdisk-settings", os.MFD_CLOEXEC)
    os.write(fd, settings.to_json().encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def python_command(module: str) -> list[str]:
    """The command line that runs ``module`` in this interpreter.

    ``-P`` keeps the working directory out of the module path: a user's own folder called ``common`` must not be
    imported.
    """
    return [sys.executable, "-P", "-m", module]


def python_environment() -> dict[str, str]:
    """The environment in which ``python_command`` finds this very copy of the packages, installed or not.

    NumPy's linear algebra, which no process of ours uses, would start a thread for each processor when it is loaded: a
    fifth of the processor time that a process takes until it is ready.
    """
    environment = {"OPENBLAS_NUM_THREADS": "1"} | os.environ
    root = str(Path(__file__).resolve().parent.parent)
    installed = {str(Path(p).resolve()) for p in (*site.getsitepackages(), site.getusersitepackages())}
    if root not in installed:
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{inherited}" if inherited else root
    return environment


class Child:
    """One running process of the pair. It gets a session of its own, so that Ctrl-C reaches it only through its
    parent.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], ready_fd: int) -> None:
        self.name = name
        self.process = process
        self.info: dict[str, Any] | None = None
        """What the process told with its readiness; None before."""
        self._ready_fd = ready_fd
        self._listening: asyncio.AbstractEventLoop | None = None
        """The loop that looks at ``_ready_fd``."""
        self._line = bytearray()

    @classmethod
    def start(
        cls,
        module: str,
        settings: NodeSettings,
        *,
        stderr: int | IO[bytes] | None = None,
        prefix: tuple[str, ...] = (),
    ) -> Child:
        """Start ``python -m module`` with ``settings``; it dies with this process.

        Call it on a thread that lives as long as this process (see ``common.process``). ``stderr`` takes the child's
        log; None: this process' own. ``prefix``: a command that becomes the child, say in another namespace.
        """
        fd = settings_memfd(settings)
        try:
            return cls.launch(module, ["--settings-fd", str(fd)], pass_fds=(fd,), stderr=stderr, prefix=prefix)
        finally:
            os.close(fd)

    @classmethod
    def launch(
        cls,
        module: str,
        arguments: list[str],
        *,
        pass_fds: tuple[int, ...] = (),
        stderr: int | IO[bytes] | None = None,
        outlives_us: bool = False,
        prefix: tuple[str, ...] = (),
    ) -> Child:
        """Start ``python -m module`` with ``arguments`` and a ready descriptor; unless it ``outlives_us``, it dies
        with us. ``prefix`` must exec the command, not fork it.
        """
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        command = [*prefix, *python_command(module), *arguments, "--ready-fd", str(write_fd)]
        if not outlives_us:
            command += ["--parent", str(os.getpid())]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=(*pass_fds, write_fd),
                env=python_environment(),
                start_new_session=True,
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        os.set_blocking(read_fd, False)
        return cls(module, process, read_fd)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> dict[str, Any]:
        """What the child told when it was ready; raises the error that it reported instead (it is dead then), or
        TimedOut.
        """
        deadline = time.monotonic() + timeout_s
        while not self._read_ready():
            poll = select.poll()
            poll.register(self._ready_fd, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimedOut(
                    f"The {self.name} process was not ready within {timeout_s:g} s.", hint="Its log may say why."
                )
        return self._take_ready()

    async def wait_ready_async(self, timeout_s: float = READY_TIMEOUT_S) -> dict[str, Any]:
        """``wait_ready`` for an event loop."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._ready_fd, readable.set)
        self._listening = loop
        try:
            async with asyncio.timeout(timeout_s):
                while not self._read_ready():
                    readable.clear()
                    await readable.wait()
        except TimeoutError as error:
            raise TimedOut(
                f"The {self.name} process was not ready within {timeout_s:g} s.", hint="Its log may say why."
            ) from error
        finally:
            self._listen_no_more()
        if not self._told().get("ready"):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self.wait_async()
        return self._take_ready(0.0)

    def _read_ready(self) -> bool:
        """True once the whole line, or its absence, is known."""
        while True:
            try:
                chunk = os.read(self._ready_fd, MAX_READY_LINE)
            except BlockingIOError:
                return False
            self._line += chunk
            if not chunk or self._line.endswith(b"\n"):
                return True

    def _told(self) -> dict[str, Any]:
        """What the child said; empty if it ended without a word."""
        told: dict[str, Any] = json.loads(self._line) if self._line else {}
        return told

    def _take_ready(self, timeout_s: float = STOP_TIMEOUT_S) -> dict[str, Any]:
        """``timeout_s``: for the end of one that is not ready."""
        self._close_ready()
        told = self._told()
        if told.get("ready"):
            self.info = told
            return told
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        if not told:
            code = self.process.returncode
            how = exit_reason(code) if code is not None else "it said nothing, and does not end"
            raise OperationFailed(
                f"The {self.name} process ended before it was ready: {how}.", hint="Its log says why."
            )
        error: TandemDiskError = error_from_dict(
            {"sentence": told.get("error"), "hint": told.get("hint"), "exit_code": told.get("exit_code")}
        )
        raise error

    def _listen_no_more(self) -> None:
        if self._listening is not None:
            self._listening.remove_reader(self._ready_fd)
            self._listening = None

    def _close_ready(self) -> None:
        """Whoever stops a child need not wait until nobody waits for its readiness: a closed descriptor that the loop
        still looks at would hide the next one of its number."""
        self._listen_no_more()
        if self._ready_fd >= 0:
            os.close(self._ready_fd)
            self._ready_fd = -1

    def poll(self) -> int | None:
        """The exit code (negative: the signal), None while it runs."""
        return self.process.poll()

    def wait(self, timeout_s: float) -> int:
        """The exit code of a child that is on its way out; killed if that takes longer than ``timeout_s``."""
        self._close_ready()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """SIGTERM, wait, SIGKILL if it takes longer than ``timeout_s``; the exit code."""
        self._close_ready()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def release(self) -> None:
        """Let go of a child that outlives us, for good: no exit code, and no warning that it still runs."""
        self._close_ready()
        self.process.returncode = 0

    async def wait_async(self) -> int:
        """The exit code, once the process ended. Woken by its pidfd: no polling, no thread."""
        if (code := self.process.poll()) is not None:
            return code
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        pidfd = os.pidfd_open(self.process.pid)
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        return self.process.wait()

    async def stop_async(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """``stop`` for an event loop."""
        self._close_ready()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                return await self.wait_async()
        except TimeoutError:
            self.process.kill()
            return await self.wait_async()


def exit_reason(code: int) -> str:
    """``killed by SIGKILL`` or ``exit code 3``, as a person would say it."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}"
