"""Which processes of a pair are there, and how they are reached."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil

from common.control import ControlClient
from common.disk import FileDisk
from common.errors import NotRunning, OperationFailed, TandemDiskError, TimedOut
from common.settings import NodeSettings, Role
from deploy.layout import SIDES
from deploy.roles import process_role


def process_of(pid: int | None, module: str) -> psutil.Process | None:
    """The process ``pid`` if it runs and is still the one that runs ``module``."""
    try:
        process = psutil.Process(pid) if pid else None
        return process if process is not None and module in process.cmdline() else None
    except psutil.Error:
        return None


@contextlib.contextmanager
def watched(pid: int) -> Iterator[Callable[[float], None]]:
    """A function that waits until the process that is ``pid`` now has ended; its parent is left to reap it."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield lambda _timeout_s: None
        return

    def ended(timeout_s: float) -> None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise TimedOut(f"The process {pid} did not end within {timeout_s:g} s.", hint="Its log may say why.")

    try:
        yield ended
    finally:
        os.close(pidfd)


def control_path(settings: NodeSettings, configured: Role) -> str:
    """The control socket of a side's process: the one that somebody listens on, else what it would be started as."""
    for process in SIDES:
        path = settings.control_path(process)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(path)
            return path
    return settings.control_path(process_role(settings, configured))


def must_not_run(settings: NodeSettings, configured: Role) -> None:
    """OperationFailed if a process of the side runs: what it keeps about its disks is its own then."""
    if answers(control_path(settings, configured)):
        raise OperationFailed(f"Side {settings.side} runs: it has its disks.", hint="See `tandemdisk status`.")


def without_peer(side: Mapping[str, Any]) -> bool:
    """What ``status`` says of a side: it has no peer, or is dead itself."""
    return side["pid"] is None or ("peer" in side and not side["peer"]["connected"])


def written_alone(sides: Mapping[Role, NodeSettings]) -> dict[Role, int]:
    """The bytes that each side alone wrote, at most, of those that lead and whose processes answer."""
    found: dict[Role, int] = {}
    for role, settings in sides.items():
        with contextlib.suppress(TandemDiskError):
            told = ControlClient(control_path(settings, role), 5.0).call("status")
            if told.get("role") == "primary" and told.get("own_bytes") is not None:
                found[role] = int(told["own_bytes"])
    return found


def answers(path: str) -> bool:
    """Whether anybody listens on a control socket."""
    try:
        ControlClient(path, 1.0).call("status")
    except NotRunning:
        return False
    except TandemDiskError:
        return True
    return True


@contextlib.contextmanager
def at_rest(settings: NodeSettings) -> Iterator[None]:
    """In it no process of the side runs, and none gets further in its start than to its disks, which comes before it
    reads its metadata. DiskError if one does already, whether it answers or not. What is not there is nobody's."""
    with contextlib.ExitStack() as stack:
        for volume in settings.volumes:
            if os.path.exists(volume.disk):
                stack.callback(FileDisk(volume.disk, read_only=True).close)
        yield
