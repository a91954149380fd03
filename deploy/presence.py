"""Which processes of a pair are there, and how they are reached."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil

from common.control import ControlClient
from common.disk import FileDisk
from common.errors import DiskError, NotRunning, OperationFailed, TandemDiskError, TimedOut
from common.settings import NodeSettings, Role
from deploy.launcher import STOP_TIMEOUT_S, read_state
from deploy.layout import SIDES, PairDirectory
from deploy.roles import process_role, remembered


def wait_for_orphans(directory: PairDirectory) -> None:
    """A supervisor that was killed took its children along: wait until they have let go of disks and sockets."""
    state = read_state(directory)
    supervisor = state.get("pid")
    if _runs(supervisor, "deploy.launcher", "--dir", str(directory.path)):
        return  # it lives, though it does not answer: it will refuse the one that is about to start
    for child in state.get("children", {}).values():
        # since a restart of the machine its number may be that of another pair's process
        if child.get("alive") and _runs(child["pid"], "--parent", str(supervisor)):
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.wait_procs([psutil.Process(child["pid"])], timeout=STOP_TIMEOUT_S)


def _runs(pid: int | None, *words: str) -> bool:
    """Whether the process ``pid`` is there, and was started with these words in its command line, one behind the
    other."""
    try:
        line = psutil.Process(pid).cmdline() if pid else []
    except psutil.Error:
        return False
    return any(tuple(line[at : at + len(words)]) == words for at in range(len(line)))


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
    with contextlib.suppress(DiskError):  # of metadata that cannot be read: nothing is started by them
        return settings.control_path(process_role(settings, configured))
    return settings.control_path(configured)


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


def status_of(role: Role, settings: NodeSettings | None, supervisor: Mapping[str, Any]) -> dict[str, Any]:
    """What the process of a side says of itself; of one that does not answer, what its metadata and its ``supervisor``
    know."""
    if settings is None:
        return {"role": role, "pid": None, "state": "elsewhere", "nbd_uri": None, "error": None}
    try:
        return ControlClient(control_path(settings, role), 5.0).call("status")
    except TandemDiskError as error:
        known = supervisor.get("children", {}).get(role, {})
        trouble: str | None = None
        try:
            metadata = remembered(settings)
        except DiskError as unreadable:
            metadata, trouble = None, unreadable.sentence
        now = metadata.role if metadata is not None else role
        if known.get("alive"):
            return {
                "role": now,
                "pid": known["pid"],
                "state": "unresponsive",
                "nbd_uri": None,
                "reason": str(error),
            }
        reason = trouble or known.get("reason") or "not started"
        return {
            "role": now,
            "pid": None,
            "state": "stopped" if reason == "stopped" else "dead",
            "nbd_uri": None,
            "reason": reason,
            "died_at": known.get("at"),
            "exit_code": known.get("exit_code"),
        }


@contextlib.contextmanager
def at_rest(settings: NodeSettings) -> Iterator[None]:
    """In it no process of the side runs, and none gets further in its start than to its disks, which comes before it
    reads its metadata. DiskError if one does already, whether it answers or not. What is not there is nobody's."""
    with contextlib.ExitStack() as stack:
        for volume in settings.volumes:
            if os.path.exists(volume.disk):
                stack.callback(FileDisk(volume.disk, read_only=True).close)
        yield


@contextlib.contextmanager
def roles_held(sides: Mapping[Role, NodeSettings]) -> Iterator[None]:
    """In it no other command changes what these sides are. OperationFailed if one does. The lock vanishes with its
    holder."""
    with contextlib.ExitStack() as stack:
        for settings in sides.values():
            try:
                directory = os.open(settings.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # it never ran
            stack.callback(os.close, directory)
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OperationFailed(
                    f"Another command is changing what side {settings.side} is.",
                    hint="Wait for it, look at `tandemdisk status`, and try again if there is something left to do.",
                ) from None
        yield
