"""The supervisor: starts the processes of a pair on this machine, watches them, stops them in order.

    python -m deploy.launcher --dir DIR --ready-fd N [--parent PID]

One supervisor a directory (a lock sees to that), whether ``tandemdisk up`` stays in the foreground or not:

* **Start**: each side as what its metadata says that it is, the secondary first, then, when it says that it is ready,
the
  primary. Beside a side that a former run has left promoted its old primary is not started: it would only be refused.
* **Watch**: a pidfd a child. A death is recorded with its reason and shows in ``status``; nothing is restarted behind
  the operator's back, because whether to restart or to fail over is a decision. ``tandemdisk up`` again starts what
  is dead.
* **Stop**: the primary first, with a final checkpoint, then the secondary; whoever does not end in time is killed. Then
  the disk buffer is empty and its memory is given back; a buffer that still matters is kept, and the answer says so.
* **No orphans**: the children die with the supervisor, even by SIGKILL (PR_SET_PDEATHSIG), and it dies with its
  parent when that stays in the foreground.

Commands on DIR/supervisor.control: ``status``, ``start`` {"roles": […]}, ``stop_side`` {"role": …}, ``stop`` {"purge":
false}.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from common.arguments import flag_of
from common.child import Child, exit_reason
from common.control import ControlClient, ControlServer
from common.errors import AddressInUse, ConfigError, DiskError, NeedsForce, NotRunning, OperationFailed, TandemDiskError
from common.process import Lifecycle, fields, live
from common.settings import NodeSettings, Role
from deploy.layout import ROLES, PairDirectory
from deploy.roles import judge, process_role, readable
from secondary.buffer import DiskBuffer

STOP_TIMEOUT_S: Final = 60.0
STARTING_S: Final = 10.0
"""How long a command waits for the socket of a supervisor that another one starts; it takes a third of a second."""
"""For a process to end by itself: the final checkpoint and flushing what is in flight included."""
STATUS_TIMEOUT_S: Final = 5.0

COMMIT_STAGES: Final = frozenset({"FAILOVER", "FAILOVER_FAILED"})
"""States of a secondary in which its buffer holds what is not yet on its disk."""

log = logging.getLogger("launcher")


class Supervisor:
    """The processes of the pair in ``directory``, as children of this process."""

    def __init__(self, directory: PairDirectory, lifecycle: Lifecycle) -> None:
        self.directory = directory
        self.settings = directory.settings()
        self._lifecycle = lifecycle
        self._children: dict[Role, Child] = {}
        """By what the side is configured as, whatever it is now."""
        self._processes: dict[Role, Role] = {}
        """What the child of each side runs as."""
        self._deaths: dict[Role, dict[str, Any]] = self._former_deaths()
        self._stopping = False
        self._busy = asyncio.Lock()

    # Starting

    async def start(self, roles: tuple[Role, ...] = ROLES) -> dict[str, Any]:
        """Start what is configured, wanted and not running; what is running then. Raises what a process reported."""
        async with self._busy:
            if self._stopping:
                raise OperationFailed("The pair is being stopped.", hint="Wait, then give the command again.")
            started: list[Role] = []
            behind = self._left_behind()
            processes = {role: process_role(settings, role) for role, settings in self.settings.items()}
            for role in sorted(self.settings, key=lambda role: (processes[role] == "primary", ROLES.index(role))):
                if role not in roles or self._running(role):
                    continue
                if role == behind:
                    log.info("%s left alone reason='the other side leads'", role)
                    continue
                try:
                    await self._start_as_it_is(role)
                except NeedsForce as error:
                    if not any(map(self._running, self.settings)):
                        raise
                    # the other side may have to take over from this one, and has to run for that
                    log.warning("%s stays down reason=%r", role, error.sentence)
                else:
                    started.append(role)
            return {"started": started, "children": self._describe_children()}

    def _left_behind(self) -> Role | None:
        """The side that calls itself primary and may not be started as one."""
        try:
            judgement = judge(self.settings)
        except DiskError as error:
            for role in readable(self.settings):
                start = f"tandemdisk {role} --config {self.directory.config(role)}"
                error.hint = f"{error.hint} To have the other side take over, start it by itself first: `{start}`."
            raise
        if len([1 for standing in judgement.standings.values() if standing.role == "primary"]) < 2:
            return None
        return judgement.loser or "primary"

    async def _start_as_it_is(self, role: Role) -> None:
        """A command may change what the side is while its process comes up as what it was."""
        while True:
            self._processes[role] = process = process_role(self.settings[role], role)
            try:
                return await self._start_one(role)
            except TandemDiskError:
                if process_role(self.settings[role], role) == process:
                    raise

    async def _start_one(self, role: Role) -> None:
        settings = self.settings[role]
        prefix = self.directory.prefix(role)
        process = self._processes[role]
        if process == "primary" and DiskBuffer.exists(settings.buffer.directory):
            remove_buffer(settings.buffer.directory)  # of the time before its promotion, which is complete
        child = _start_child(process, settings, prefix)
        self._children[role] = child
        log.info("started %s", fields({"role": role, "process": process, "pid": child.pid}))
        try:
            await child.wait_ready_async()
        except BaseException as error:
            # One that only failed to say anything is still there.
            code = await child.stop_async()
            self._record_death(role, child, code, sentence=str(error) if isinstance(error, TandemDiskError) else None)
            raise
        self._deaths.pop(role, None)
        self._save()
        self._lifecycle.critical(self._watch(role, child), f"watch {role}")

    async def _watch(self, role: Role, child: Child) -> None:
        code = await child.wait_async()
        self._record_death(role, child, code)

    def _running(self, role: Role) -> bool:
        child = self._children.get(role)
        return child is not None and child.poll() is None

    # What is known about them

    def _record_death(self, role: Role, child: Child, code: int, sentence: str | None = None) -> None:
        reason = exit_reason(code) if sentence is None else f"{exit_reason(code)}: {sentence}"
        if self._stopping and code == 0:
            reason = "stopped"
        self._deaths[role] = {"pid": child.pid, "exit_code": code, "reason": reason, "at": _now()}
        log.log(
            logging.INFO if self._stopping else logging.WARNING,
            "ended %s",
            fields({"role": role, "pid": child.pid, "reason": reason}),
        )
        self._save()

    def _describe_children(self) -> dict[str, Any]:
        described: dict[str, Any] = {}
        for role in self.settings:
            child = self._children.get(role)
            code = None if child is None else child.poll()
            if child is not None and code is None:
                described[role] = {"alive": True, "pid": child.pid}
            elif role in self._deaths:
                described[role] = {"alive": False, **self._deaths[role]}
            elif child is not None and code is not None:  # it ended just now: its death is not recorded yet
                described[role] = {
                    "alive": False, "pid": child.pid, "exit_code": code, "reason": exit_reason(code), "at": _now()
                }  # fmt: skip
            else:
                described[role] = {"alive": False, "pid": None, "exit_code": None, "reason": "not started", "at": None}
        return described

    def status(self) -> dict[str, Any]:
        """What ``tandemdisk status`` merges with the processes' own answers."""
        return {"pid": os.getpid(), "children": self._describe_children()}

    def _save(self) -> None:
        """Keep what is known for a time when no supervisor runs. A full disk costs that, and no process of the pair."""
        path = self.directory.supervisor_state
        temporary = path.with_suffix(".json.new")
        try:
            temporary.write_text(json.dumps(self.status()))
            temporary.replace(path)
        except OSError as error:
            log.warning("state not kept %s", fields({"path": path, "reason": error.strerror}))
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _former_deaths(self) -> dict[Role, dict[str, Any]]:
        children = read_state(self.directory).get("children", {})
        return {
            role: {key: children[role].get(key) for key in ("pid", "exit_code", "reason", "at")}
            for role in ROLES
            if role in children and not children[role].get("alive")
        }

    # Stopping

    async def stop(self, *, purge: bool = False) -> dict[str, Any]:
        """Stop the primary, then the secondary, then release the buffer's memory; a report. Idempotent."""
        self._stopping = True
        async with self._busy:
            report: dict[str, Any] = {"stopped": [], "killed": [], "buffers": []}
            told = {role: await self._ask(role) for role in self.settings}
            clean = False
            for role in sorted(self.settings, key=lambda role: not self._leads(role, told[role])):
                if not self._running(role):
                    continue
                if self._leads(role, told[role]):
                    clean = await self._stop_one(role, report, checkpoint=True)
                else:
                    told[role] = await self._ask(role) or told[role]  # the final checkpoint has emptied the buffer
                    await self._stop_one(role, report)
            for role, settings in self.settings.items():
                if self._processes.get(role, role) == "secondary" or DiskBuffer.exists(settings.buffer.directory):
                    report["buffers"].append(release_buffer(settings, told[role], clean=clean, purge=purge))
            self._save()
            return report

    async def stop_side(self, role: Role) -> dict[str, Any]:
        """Stop one side's process in good order, the rest goes on; a report as of ``stop``."""
        async with self._busy:
            report: dict[str, Any] = {"stopped": [], "killed": [], "clean": False}
            if self._running(role):
                told = await self._ask(role)
                report["clean"] = await self._stop_one(role, report, checkpoint=self._leads(role, told))
            return report

    def _leads(self, role: Role, told: dict[str, Any] | None) -> bool:
        """Whether the side is the primary, by its own word, or if it says nothing by what it was started as."""
        return self._processes.get(role, role) == "primary" if told is None else told.get("role") == "primary"

    def _control(self, role: Role) -> str:
        return self.settings[role].control_path(self._processes.get(role, role))

    async def _ask(self, role: Role) -> dict[str, Any] | None:
        if not self._running(role):
            return None
        try:
            return await ControlClient(self._control(role), STATUS_TIMEOUT_S).call_async("status")
        except TandemDiskError as error:
            log.warning("%s did not tell its state reason=%r", role, str(error))
            return None

    async def _stop_one(self, role: Role, report: dict[str, Any], **args: object) -> bool:
        """True if the process ended in good order."""
        child = self._children[role]
        path = self._control(role)
        asked = True
        try:
            await ControlClient(path, STOP_TIMEOUT_S).call_async("stop", **args)
        except TandemDiskError as error:
            # It may be hung, or on its way out already: the signal below decides.
            log.warning("stop was not answered %s", fields({"role": role, "reason": error}))
            asked = False
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S if asked else 0):
                code = await child.wait_async()
        except TimeoutError:
            code = await child.stop_async()
        report["stopped" if code == 0 else "killed"].append(role)
        return code == 0 and asked


def release_buffer(
    settings: NodeSettings, status: dict[str, Any] | None, *, clean: bool, purge: bool
) -> dict[str, Any]:
    """Give the memory of the disk buffer back unless that would lose something; what was done, and why.

    ``status`` is the last one of the secondary, which has ended since; ``clean``: the primary ended in good order
    before it.
    """
    directory = settings.buffer.directory
    if not DiskBuffer.exists(directory):
        return {"directory": directory, "kept": False, "why": None}
    why = _reason_to_keep(status, clean)
    if why is None or purge:
        remove_buffer(directory)
    kept = DiskBuffer.exists(directory)
    log.info("buffer %s", fields({"directory": directory, "kept": kept, "why": why or "nothing in it matters"}))
    return {"directory": directory, "kept": kept, "why": why}


def _start_child(role: Role, settings: NodeSettings, prefix: tuple[str, ...]) -> Child:
    directory = Path(settings.directory)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (directory / "log").open("ab") as file:
            return Child.start(role, settings, stderr=file, prefix=prefix)
    except OSError as error:
        raise OperationFailed(f"Cannot start the {role} in {directory}: {error.strerror}.") from error


def _reason_to_keep(status: dict[str, Any] | None, clean: bool) -> str | None:
    """Why the buffer must outlive its process; None if nothing in it matters.

    After a clean stop the final checkpoint has emptied the hidden disk, and what the guest may have written to the
    active disk since is scratch by definition: it would be gone at the next checkpoint anyway.
    """
    if status is None:
        return "the secondary did not tell what it holds"
    if status.get("state") in COMMIT_STAGES:
        return "the failover's commit goes on from it at the next start"
    buffer = status.get("buffer") or {}
    if status.get("role") == "primary" or not buffer.get("bytes") or (clean and not buffer.get("hidden_bytes")):
        return None
    return "it holds the last checkpoint, and no final one was taken"


def remove_buffer(directory: str) -> None:
    """Free the memory of a buffer on which no process runs; its directory goes, too, unless somebody else's files are
    in it.
    """
    try:
        DiskBuffer.remove(directory)
        os.rmdir(directory)
    except (TandemDiskError, OSError) as error:
        log.warning("buffer not removed %s", fields({"directory": directory, "reason": error}))


def read_state(directory: PairDirectory) -> dict[str, Any]:
    """What the last supervisor in ``directory`` knew, as ``Supervisor.status`` tells it; empty if there was none. What
    is damaged of the file is not in it."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        state = json.loads(directory.supervisor_state.read_text())
        if isinstance(state, dict):
            children = state.get("children")
            known = {role: children.get(role) for role in ROLES} if isinstance(children, dict) else {}
            described = {role: _described(child) for role, child in known.items() if isinstance(child, dict)}
            return {"pid": _pid(state.get("pid")), "children": described}
    return {}


def _described(child: dict[str, Any]) -> dict[str, Any]:
    told = {key: child.get(key) for key in ("exit_code", "reason", "at")}
    known = {key: value for key, value in told.items() if isinstance(value, int | str | None)}
    return {"alive": child.get("alive") is True, "pid": _pid(child.get("pid")), **known}


def _pid(value: object) -> int | None:
    """``value`` if a process may have that number (proc(5), pid_max)."""
    return value if type(value) is int and 0 < value <= 1 << 22 else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


async def supervise(path: Path, lifecycle: Lifecycle) -> None:
    """Be the supervisor of the pair in ``path`` until told to stop."""
    directory = PairDirectory(path)
    with locked(directory), directory.hosts_held():
        supervisor = Supervisor(directory, lifecycle)
        loop = asyncio.get_running_loop()

        async def status(_args: dict[str, Any]) -> dict[str, Any]:
            return supervisor.status()

        async def start(args: dict[str, Any]) -> dict[str, Any]:
            wanted = args.get("roles") or ROLES
            if not isinstance(wanted, list | tuple) or not set(map(str, wanted)) <= set(ROLES):
                raise ConfigError(f"The argument roles must be a list of {' and '.join(ROLES)}.")
            return await supervisor.start(tuple(role for role in ROLES if role in wanted))

        async def stop(args: dict[str, Any]) -> dict[str, Any]:
            report = await supervisor.stop(purge=flag_of(args, "purge"))
            loop.call_soon(lifecycle.stop.set)  # after the answer
            return report

        async def stop_side(args: dict[str, Any]) -> dict[str, Any]:
            role: Any = args.get("role")
            if role not in ROLES:
                raise ConfigError(f"The argument role must be {' or '.join(ROLES)}.")
            return await supervisor.stop_side(role)

        handlers = {"status": status, "start": start, "stop": stop, "stop_side": stop_side}
        control = ControlServer(directory.supervisor_control, handlers)
        await control.start()
        try:
            started = await _unless_stopped(supervisor, lifecycle)
            lifecycle.ready({"pid": os.getpid(), **started})
            await lifecycle.stop.wait()
        finally:
            await supervisor.stop()
            await control.close()


async def _unless_stopped(supervisor: Supervisor, lifecycle: Lifecycle) -> dict[str, Any]:
    """Start the pair; a stop signal meanwhile ends that."""
    starting = asyncio.create_task(supervisor.start())
    stopped = asyncio.create_task(lifecycle.stop.wait())
    await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        raise OperationFailed("The start was interrupted.")
    return await starting


@contextlib.contextmanager
def locked(directory: PairDirectory) -> Iterator[None]:
    """Be the only supervisor of ``directory``; the lock vanishes with its holder."""
    with open(directory.supervisor_lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AddressInUse(
                f"Another supervisor is at work in {directory.path}.", hint="`tandemdisk status` shows it."
            ) from error
        yield


@contextlib.contextmanager
def starting(directory: PairDirectory) -> Iterator[None]:
    """A supervisor is about to be there: who stops the pair waits for it."""
    # a description of its own: the supervisor inherits the one that it logs to
    with open(directory.supervisor_log, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def stop_supervisor(directory: PairDirectory, *, purge: bool) -> dict[str, Any]:
    """Tell the supervisor to stop, also one that another command is just starting. NotRunning if there is none."""
    client = ControlClient(directory.supervisor_control, 4 * STOP_TIMEOUT_S)
    deadline = time.monotonic() + STARTING_S
    while True:
        to_come = _is_starting(directory)
        try:
            return client.call("stop", purge=purge)
        except NotRunning:
            if not to_come or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _is_starting(directory: PairDirectory) -> bool:
    """Whether somebody is in the middle of starting a supervisor, which has no socket at first."""
    try:
        with open(directory.supervisor_log, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def main() -> None:
    """The process."""
    parser = argparse.ArgumentParser(prog="python -m deploy.launcher", description="Supervisor of a pair.")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--parent", type=int)
    arguments = parser.parse_args()
    live(
        lambda lifecycle: supervise(arguments.dir, lifecycle),
        "supervisor",
        ready_fd=arguments.ready_fd,
        parent=arguments.parent,
    )


if __name__ == "__main__":
    main()
