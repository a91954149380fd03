"""A pair on this machine, as a Python object: what the command line, the tests, the demo and the benchmarks use.

    with Pair.create(Path("/tmp/p"), PairOptions(size=1 << 30)) as pair:
        pair.up()
        pair.wait_protected()
        print(pair.status()["primary"]["nbd_uri"])
        pair.checkpoint()

``status`` merges what both sides and the supervisor know (``deploy.overview``).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from common.child import Child
from common.control import ControlClient, error_from_dict
from common.errors import AddressInUse, ConfigError, NeedsForce, NotRunning, OperationFailed, TandemDiskError, TimedOut
from common.failures import Failure
from common.settings import NodeSettings, Role
from deploy.diverged import check_room, save_diverged
from deploy.hosts import Side
from deploy.launcher import STOP_TIMEOUT_S, locked, read_state, release_buffer, remove_buffer, starting, stop_supervisor
from deploy.layout import SIDES, PairDirectory, PairOptions
from deploy.overview import merge
from deploy.peer import (
    as_owner,
    check_switchover,
    follow,
    is_run_by_systemd,
    let_peer_lead,
    other,
    start_command,
    told_by_peer,
)
from deploy.presence import (
    answers,
    at_rest,
    control_path,
    must_not_run,
    roles_held,
    status_of,
    wait_for_orphans,
    watched,
    without_peer,
    written_alone,
)
from deploy.roles import accept_disks, choose_loser, give_up, judge, judge_again, lacks_nothing, readable, remembered
from secondary.buffer import DiskBuffer

__all__ = ["Checkpoint", "Pair", "PairOptions", "Resync"]

COMMAND_TIMEOUT_S: Final = 120.0
START_TIMEOUT_S: Final = 120.0
RESIZE_TIMEOUT_S: Final = 120.0
VERIFY_TIMEOUT_S: Final = 30 * 24 * 3600.0
"""A verification takes as long as the disks are large and guests let it."""
PEER_LOSS_TIMEOUT_S: Final = 30.0
DYING_S: Final = 0.3
"""How long a process that was killed may take to end, before it counts as alive."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that both sides have: its number, and how long it took."""

    number: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Resync:
    """Progress of bringing the secondary disk in line."""

    active: bool
    done_bytes: int
    total_bytes: int
    state: str


class Pair:
    """The pair in a directory. Cheap to make; holds no connection, so it stays valid whatever the processes do."""

    def __init__(self, directory: Path) -> None:
        self.directory = PairDirectory(directory)
        self._supervisor: Child | None = None
        """The supervisor, if this object started it."""

    @classmethod
    def create(cls, directory: Path, options: PairOptions) -> Self:
        """Make a new pair in ``directory`` (images, configurations); nothing runs yet."""
        pair = cls(directory)
        pair.directory.create(options)
        return pair

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.down(purge=True)

    def settings(self, role: Role) -> NodeSettings:
        """The settings of one side, as its configuration file says now."""
        sides = self.directory.settings()
        if role not in sides:
            raise NotRunning(
                f"The {role} is not configured in {self.directory.path}.", hint="It lives on another host."
            )
        return sides[role]

    # Life

    def up(self, *, detach: bool = False) -> dict[str, Any]:
        """Start what is not running, wait until it is ready; what the supervisor says.

        The supervisor dies with this process unless ``detach`` is true (call it on a thread that lives as long as the
        process). Raises what a process reported; what was started is stopped again then, if it was all new.
        """
        client = ControlClient(self.directory.supervisor_control, START_TIMEOUT_S)
        with contextlib.suppress(NotRunning):
            return client.call("start")
        with starting(self.directory):
            wait_for_orphans(self.directory)
            arguments = ["--dir", str(self.directory.path)]
            with self.directory.supervisor_log.open("ab") as log:
                child = Child.launch("deploy.launcher", arguments, stderr=log, outlives_us=detach)
            try:
                told = child.wait_ready(START_TIMEOUT_S)
            except BaseException:
                child.stop(2 * STOP_TIMEOUT_S)
                raise
        if detach:
            child.release()
        else:
            if self._supervisor is not None:  # it was killed: this one took its place
                self._supervisor.wait(STOP_TIMEOUT_S)
            self._supervisor = child
        return told

    def create_or_resume(self, options: PairOptions, *, detach: bool = False) -> dict[str, Any]:
        """``up`` for a directory that may hold a pair already; ``options`` must not contradict it then.

        A new pair that does not come up leaves nothing behind.
        """
        if is_run_by_systemd(self.directory):
            name = self.directory.path.name
            raise ConfigError(
                f"systemd runs the side in {self.directory.path}: `up` would start it twice.",
                hint=f"`systemctl start tandemdisk-{next(iter(self.directory.settings()))}@{name}`.",
            )
        fresh = not self.directory.holds_a_pair()
        if fresh:
            existed = self.directory.path.exists()
            self.directory.create(options)
        elif differences := self.directory.differences(options):
            raise ConfigError(
                f"{self.directory.path} holds a pair already, and it is another:",
                problems=tuple(differences),
                hint="Leave these options out to start that pair, or choose another --dir.",
            )
        try:
            return self.up(detach=detach)
        except BaseException as error:
            if fresh:
                self._undo(error, existed)
            raise

    def _undo(self, error: BaseException, keep_directory: bool) -> None:
        """Leave nothing of a start that failed, except what the logs say about an error that has no good sentence."""
        if isinstance(error, OperationFailed):
            error.hint = f"{error.hint}\n{self.directory.log_tail()}".strip()
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.directory))
            except AddressInUse:
                return  # another command found the pair meanwhile and runs it
            except OSError:
                pass  # there is no room for a lock: nobody has it
            for settings in self.directory.settings().values():
                if os.path.isdir(settings.buffer.directory):
                    remove_buffer(settings.buffer.directory)
            self.directory.remove(keep_directory=keep_directory)

    def is_supervising(self) -> bool:
        """True if the supervisor is a child of this object's, so that the pair stops with it."""
        return self._supervisor is not None

    def wait_supervisor(self) -> int:
        """Until the supervisor ends (somebody else gave ``down``); its exit code."""
        assert self._supervisor is not None
        code = self._supervisor.process.wait()
        self._supervisor = None
        return code

    def down(self, *, purge: bool = False) -> dict[str, Any]:
        """Stop everything in order; a report of what was stopped and what became of the buffer. Idempotent.

        ``purge`` gives the memory of the buffer back even if it holds a checkpoint that exists nowhere else.
        """
        try:
            report = stop_supervisor(self.directory, purge=purge)
        except NotRunning:
            if self._supervisor is not None:  # it lost its socket, or it is about to end by a signal
                self._supervisor.stop(4 * STOP_TIMEOUT_S)
            report = self._stop_unsupervised(purge)
        if self._supervisor is not None:
            self._supervisor.wait(STOP_TIMEOUT_S)
            self._supervisor = None
        self._wait_gone()
        return report

    def _stop_unsupervised(self, purge: bool) -> dict[str, Any]:
        """Stop processes that run by themselves (``tandemdisk primary --config DIR/primary.toml``), if any."""
        wait_for_orphans(self.directory)
        stopped: list[Role] = []
        told: dict[Role, dict[str, Any]] = {}
        for role in dict.fromkeys((self.leader(), *SIDES)):  # a former primary that is fenced follows nobody
            with contextlib.suppress(TandemDiskError):
                told[role] = self._stop_side(role, checkpoint=role == self.leader())
                stopped.append(role)
        self._wait_gone()
        buffers: list[dict[str, Any]] = []
        clean = self.leader() in stopped
        for role, settings in self.directory.settings().items():
            if role == self.follower() or DiskBuffer.exists(settings.buffer.directory):
                with contextlib.suppress(TandemDiskError):
                    buffers.append(release_buffer(settings, told.get(role), clean=clean, purge=purge))
        hosts = self.directory.hosts()  # of a supervisor that was killed, and its guardian with it
        removed = [hosts.tag] if hosts is not None and hosts.down_if_left() else []
        return {"stopped": stopped, "killed": [], "buffers": buffers, "hosts": removed}

    def _stop_side(self, role: Role, **args: object) -> dict[str, Any]:
        """Tell the process to stop and wait until it has: it lets go of disks and buffer last. Its last status."""
        client = self.client(role, STOP_TIMEOUT_S)
        status = client.call("status")
        with watched(int(status["pid"])) as ended:
            client.call("stop", **args)
            ended(STOP_TIMEOUT_S)
        return status

    def _wait_gone(self) -> None:
        """Until nobody answers on any control socket: then the directory is free for a new start."""
        for path in (self.directory.supervisor_control, *self._control_paths()):
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while answers(path):
                if time.monotonic() > deadline:
                    raise TimedOut(f"The process at {path} did not end.", hint="Its log may say why.")
                time.sleep(0.01)

    def _control_paths(self) -> list[str]:
        with contextlib.suppress(TandemDiskError):
            sides = self.directory.settings().values()
            return [settings.control_path(process) for settings in sides for process in SIDES]
        return []

    # Commands

    def client(self, role: Role, timeout_s: float = COMMAND_TIMEOUT_S) -> ControlClient:
        """The control channel of the side that is configured as ``role``, whatever it is now."""
        return ControlClient(control_path(self.settings(role), role), timeout_s)

    def leader(self) -> Role:
        """The side that is primary now, by what both remember; named by what it is configured as."""
        return judge(readable(self.directory.settings())).leader or "primary"

    def follower(self) -> Role:
        """The other one. After a failover it is the promoted side until its old primary has rejoined."""
        standings = judge(readable(self.directory.settings())).standings
        following: list[Role] = [role for role, standing in standings.items() if standing.role == "secondary"]
        return following[0] if len(following) == 1 else "secondary"

    def checkpoint(self) -> Checkpoint:
        """Take a checkpoint; returns when the secondary has switched epochs."""
        taken = self.client(self.leader()).call("checkpoint")
        return Checkpoint(number=int(taken["checkpoint"]), seconds=float(taken["seconds"]))

    def verify(self, *, repair: bool = False) -> dict[str, Any]:
        """Compare both disks while guests write: number, bytes and list of the extents that differ.

        They are marked for the next resync, or sent at once with ``repair``.
        """
        return self.client(self.leader(), VERIFY_TIMEOUT_S).call("verify", repair=repair)

    def resync(self, *, full: bool = False) -> dict[str, Any]:
        """Send what is marked as differing while guests write; ``full`` compares both disks by checksums first.

        Returns "asked_bytes", "differing_bytes", "moved_bytes", "seconds". The pair has to be protected: one that is
        not resynchronises by itself.
        """
        return self.client(self.leader(), VERIFY_TIMEOUT_S).call("resync", full=full)

    def resize(self, volume: str | None = None, size: int | None = None) -> dict[str, Any]:
        """Grow a volume (or all) to ``size``, or to what both disks have since they were grown, while guests write.

        Returns "volumes": "name", "size", "before" of each. Image files that the pair made are grown to ``size`` first.
        Existing connections keep the old size; new ones see the new one, on both exports, on return. OperationFailed
        unless the pair is protected, or with the side whose disk is too small; nothing ever shrinks.
        """
        client = self.client(self.leader(), RESIZE_TIMEOUT_S)
        now = client.call("status")
        if size is not None and now["state"] == "protected":
            for told in now["volumes"]:
                if volume in (None, told["name"]) and size > told["size"]:
                    self.directory.grow_images(told["name"], size)
        done = client.call("resize", volume=volume, size=size)
        wanted = [told["size"] for told in done["volumes"]]
        with contextlib.suppress(NotRunning):  # the other side may be elsewhere
            follower = self.client(self.follower())
            deadline = time.monotonic() + RESIZE_TIMEOUT_S
            while [told["size"] for told in follower.call("status")["volumes"]] != wanted:
                if time.monotonic() > deadline:
                    raise TimedOut(f"The secondary does not show the new size within {RESIZE_TIMEOUT_S:g} s.")
                time.sleep(0.01)
        return done

    def rejoin(self, *, discard: Side | None = None, dry_run: bool = False) -> dict[str, Any]:
        """Make the side that was left behind the secondary of the one that leads, and start what does not run.

        ``discard`` names the side whose writes are thrown away when both wrote (split brain), which is refused without.
        With ``dry_run`` nothing happens; the answer says what would. Raises PeerRefused, or OperationFailed if there is
        nothing to do. A side on another machine is asked; the command has to be given where the loser is. "start" is
        the command that starts what was not started, because no supervisor of ours runs here.
        """
        sides = self.directory.settings()
        with roles_held({} if dry_run else sides):
            return self._rejoin(sides, discard, dry_run=dry_run)

    def _rejoin(self, sides: dict[Role, NodeSettings], discard: Side | None, *, dry_run: bool) -> dict[str, Any]:
        judgement = judge(sides, told_by_peer(sides), written_alone(sides))
        loser = choose_loser(judgement, discard)
        winner = other(loser)
        standing = judgement.standings[loser]
        report: dict[str, Any] = {
            "side": standing.side,
            "sentence": judgement.sentence,
            "split_brain": judgement.split_brain,
            "blocks": standing.own_blocks,
            "bytes": standing.own_bytes,
            "dry_run": dry_run,
            "saved": [],
            "start": None,
        }
        if loser in sides and sides[loser].keep_diverged:
            check_room(sides[loser])
        if dry_run:
            return report
        if loser not in sides:
            raise OperationFailed(
                f"Side {standing.side} has to rejoin, and is on the other host.",
                hint=f"Give the command there: `tandemdisk rejoin --dir DIR{f' --discard {discard}' * bool(discard)}`.",
            )
        self._stop_one(loser)
        if loser == judgement.mixed and winner in sides:
            self._stop_one(winner)  # it fenced itself when the loser took over
        with as_owner(sides[loser]), at_rest(sides[loser]):
            try:  # it may have written alone before it stopped, and the other side may have stopped, too
                judgement = judge_again(sides, told_by_peer(sides), loser, discard)
            except TandemDiskError as error:
                start = start_command(self.directory, loser)
                error.hint = f"{error.hint} Side {standing.side} is stopped, and otherwise as it was: `{start}`."
                raise
            if sides[loser].keep_diverged:
                report["saved"] = save_diverged(sides[loser])
            give_up(sides[loser], judgement.standings[winner].history)
        if not self._start_all(winner):
            report["start"] = start_command(self.directory, loser)
        return report

    def accept_disks(self) -> NodeSettings:
        """The disks of the side that leads are right as they are, though it refuses them; it must not run. Its
        settings."""
        leader = self.leader()
        settings = self.settings(leader)
        must_not_run(settings, leader)
        with roles_held({leader: settings}), as_owner(settings), at_rest(settings):
            accept_disks(settings)
        return settings

    def switchover(self) -> dict[str, Any]:
        """Swap the roles without losing a write: the primary stops with a final checkpoint, the secondary takes over,
        the old primary follows it. Raises OperationFailed, with the roles as they were, if the pair is not
        protected. A secondary on another machine is told to; "start" is then as of ``rejoin``."""
        started = time.perf_counter()
        sides = self.directory.settings()
        with roles_held(sides):
            done = self._switch(sides)
        return done | {"seconds": time.perf_counter() - started}

    def _switch(self, sides: dict[Role, NodeSettings]) -> dict[str, Any]:
        old, new = self.leader(), self.follower()
        now = self.client(old).call("status")
        state, across = now["state"], len(sides) == 1
        if across and now["role"] == "secondary":
            raise OperationFailed(
                f"Side {sides[old].side} follows, and the one that leads is on the other host.",
                hint="Give the command there.",
            )
        if state != "protected" or (old == new and not across):
            raise OperationFailed(
                f"Roles can be swapped only while the pair is protected; it is {str(state).lower()}.",
                hint="`tandemdisk failover` takes over from a primary that is dead.",
            )
        if across:
            return self._switch_across(old, sides[old])
        try:
            self._stop_one(old)
            if not lacks_nothing(sides[new], sides[old]):
                raise OperationFailed(
                    "The primary lost its secondary, or did not stop in good order, before the roles were swapped.",
                    hint="They are as they were. Wait until `tandemdisk status` says protected, and try again.",
                )
            self.wait_for(lambda now: without_peer(now[new]), "without its old primary", PEER_LOSS_TIMEOUT_S)
            done = self.client(new).call("failover", to="latest", force=False)
        except BaseException as error:
            self._put_back(old, sides[old], error)
            raise
        follow(sides[old], judge(sides).standings[new].history)
        return {**done, "start": None if self._start_all(new) else start_command(self.directory, old)}

    def _put_back(self, role: Role, settings: NodeSettings, error: BaseException) -> None:
        """A swap that ``error`` ended has stopped a side: the supervisor starts it again. If there is none, or it
        cannot, the error says so: whoever stopped the supervisor meanwhile wants nothing to be started."""
        trouble = ""
        try:
            if self._start_all(role):
                return
        except TandemDiskError as another:
            trouble = f" {another.sentence}"
        if isinstance(error, TandemDiskError):
            start = start_command(self.directory, role)
            error.hint = f"{error.hint} Side {settings.side} is stopped: `{start}`.{trouble}".strip()

    def _switch_across(self, old: Role, settings: NodeSettings) -> dict[str, Any]:
        """``switchover`` where the secondary is on another machine."""
        check_switchover(self.directory, old, settings)
        start = start_command(self.directory, old)
        self._stop_one(old)
        ended = remembered(settings)
        try:
            if ended is None or not ended.clean:
                raise OperationFailed("The primary lost its secondary, or did not stop in good order, before the swap.")
            standing = let_peer_lead(settings, ended)
        except NotRunning as error:
            error.hint = (
                "It may have taken over or not. `tandemdisk rejoin --dry-run` asks it again: if it leads, rejoin; if "
                f"not, the roles are as they were: `{start}`."
            )
            raise
        except TandemDiskError as error:
            error.hint = f"{error.hint} The roles are as they were.".strip()
            self._put_back(old, settings, error)
            raise
        follow(settings, standing.history)
        run = self._start_all(other(old))
        generation = standing.history[-1].number
        return {"to": "latest", "generation": generation, "nbd_uri": None, "start": None if run else start}

    def _stop_one(self, role: Role) -> None:
        """Stop the process of one side, if it runs."""
        try:
            ControlClient(self.directory.supervisor_control, 4 * STOP_TIMEOUT_S).call("stop_side", role=role)
        except NotRunning:
            with contextlib.suppress(NotRunning):
                self._stop_side(role, checkpoint=True)

    def _start_all(self, leader: Role) -> bool:
        """Start what does not run, and tell the leader that the other side is there. False if there is no supervisor:
        sides that run by themselves are started by whoever started them."""
        try:
            ControlClient(self.directory.supervisor_control, START_TIMEOUT_S).call("start")
        except NotRunning:
            return False
        with contextlib.suppress(TandemDiskError):
            self.client(leader).call("redial")
        return True

    def failover(self, to: str = "latest", *, force: bool = False, primary_dead: bool = False) -> dict[str, Any]:
        """Promote the secondary, ``to`` "latest" or "checkpoint"; what it says. Its export is writable then.

        Raises NeedsForce when the primary is alive and connected, or when guest writes would be lost. A primary whose
        end the supervisor has seen is not alive, even while the secondary has yet to notice; of one that no supervisor
        here looks after, ``primary_dead`` says so.
        """
        client = self.client(self.follower())
        dead = primary_dead or self._primary_is_dead()
        try:
            return client.call("failover", to=to, force=force, primary_dead=dead)
        except NeedsForce:
            if dead or not self._primary_is_dead(DYING_S):
                raise
        return client.call("failover", to=to, force=force, primary_dead=True)

    def _primary_is_dead(self, patience_s: float = 0.0) -> bool:
        """True if the supervisor has seen the primary's process end, or it does within ``patience_s`` (SIGKILL takes a
        moment), and no other one answers in its place."""
        leader = self.leader()
        child = self._supervisor_status().get("children", {}).get(leader, {})
        pid = child.get("pid")
        if pid is None:
            return False
        if child.get("alive"):
            with watched(pid) as ended:
                try:
                    ended(patience_s)
                except TimedOut:
                    return False
        return not answers(self.client(leader).path)

    def clear_error(self) -> None:
        """Forget the last failure of both sides, as far as they run. NotRunning if neither does."""
        answered = 0
        for role in SIDES:
            with contextlib.suppress(NotRunning):
                self.client(role).call("clear_error")
                answered += 1
        if not answered:
            raise NotRunning("Neither side is running.", hint="There is no failure to forget.")

    def status(self) -> dict[str, Any]:
        """Both sides, merged as the module says, whatever is dead. Raises ConfigError if there is no pair here."""
        sides = self.directory.settings()
        supervisor = self._supervisor_status()
        answers = {role: status_of(role, sides.get(role), supervisor) for role in SIDES}
        return merge(answers["primary"], answers["secondary"], supervisor, next(iter(sides.values())))

    def _supervisor_status(self) -> dict[str, Any]:
        try:
            return ControlClient(self.directory.supervisor_control, 5.0).call("status")
        except TandemDiskError:
            # Its children died with it, whatever it last wrote about them.
            state = read_state(self.directory)
            for child in state.get("children", {}).values():
                if child.pop("alive", False):
                    child["reason"] = "its supervisor is gone"
            return {**state, "pid": None}

    # Waiting

    def resync_progress(self) -> Resync:
        """How far the resync is, from the primary."""
        status = self.client(self.leader()).call("status")
        resync = status.get("resync") or {}
        if (status.get("error") or {}).get("case") == Failure.PRIMARY_DISK:
            raise error_from_dict(status["error"])
        return Resync(
            active=bool(resync.get("active")),
            done_bytes=int(resync.get("done_bytes") or 0),
            total_bytes=int(resync.get("total_bytes") or 0),
            state=str(status.get("state")),
        )

    def progress(self, pause_s: float = 0.1) -> Iterator[Resync]:
        """Progress of the resync until the pair is protected; the last one has state "protected"."""
        while True:
            now = self.resync_progress()
            yield now
            if now.state == "protected":
                return
            time.sleep(pause_s)

    def wait_protected(self, timeout_s: float = 60.0) -> None:
        """Until both sides are connected and in line. Raises TimedOut with the state that it is in instead."""
        self.wait_for(lambda status: status["state"] == "protected", "protected", timeout_s)

    def wait_for(
        self, condition: Callable[[dict[str, Any]], object], what: str, timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """The first status for which ``condition`` holds. Raises TimedOut that names ``what`` and the last state."""
        deadline = time.monotonic() + timeout_s
        pause_s = 0.002
        while not condition(status := self.status()):
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"The pair was not {what} within {timeout_s:g} s; it is {status['state']}.",
                    hint=f"The logs are in {self.directory.path}.",
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)
        return status
