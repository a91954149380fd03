"""Cycles of chaos: load, faults at random moments, heal, recover, compare every byte.

A run is a row of pairs, each with options of its own (swarm testing) and some cycles of life. A cycle ends when the
pair is protected again and everything was read: the leader's export against the expectation, the follower's disk and
its guest's view against the leader's. A checkpoint under load is a test of its own: the guest's view may hold nothing
older than what was acknowledged before it and nothing newer than what was sent until it was there.

What a failover to latest may leave behind in async mode is what the leader did not have confirmed: right before it is
killed it is asked how much that is (``lag``), and of what was acknowledged before that question no more may be missing.

Who may take over from a leader that died is what an operator who looks at both hosts would decide: the follower, if
both sides stand in the same generation; a primary that had gone on alone is started again instead. How a leader that
lives is taken over from says ``deploy.chaos.takeover``.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from common.errors import NbdError, NeedsForce, NotRunning, OperationFailed, TandemDiskError, TimedOut
from common.metadata import load
from common.nbd_client import NbdClient
from common.settings import Mode, Role
from deploy.chaos.beside import Beside
from deploy.chaos.breakage import FileLimit, cable, encrypt, new_tracebacks
from deploy.chaos.disks import Choice, breakable
from deploy.chaos.expectation import BLOCK, Breach, Expectation, Numbers, Wrong, none_wrong
from deploy.chaos.guest import Guest
from deploy.chaos.judgement import judge_failover
from deploy.chaos.kinds import LASTING, possible
from deploy.chaos.takeover import Takeover
from deploy.chaos.tally import Tally
from deploy.chaos.variety import PEER_TIMEOUT_S, draw
from deploy.chaos.writer import REST_S, Writer
from deploy.faults import Fault, HostGone, Killed, Paused
from deploy.hosts import Side
from deploy.launcher import read_state
from deploy.layout import SIDES
from deploy.pair import Pair
from deploy.roles import judge, remembered

CONVERGE_S: Final = 40.0
COMMAND_S: Final = 0.3
"""For a checkpoint under faults: nothing is healed while it is waited for."""
ANSWER_S: Final = 0.3
"""For a question under faults: who is paused does not answer."""
PATIENCE_S: Final = 3.0
"""For the last answers to the load, before it is looked whether a death was noticed only now."""
OVERLOAD_S: Final = 10.0
"""For a follower to keep up with the load, where the leader may leave behind one that does not: then the load rests."""
CYCLES_A_PAIR: Final = 20
READ: Final = 1 << 20


class PairUnderChaos:
    """One pair and its cycles."""

    def __init__(
        self, directory: Path, seed: int, chance: random.Random, mode: Mode, hosts: str, tally: Tally,
        kinds: Collection[str] = (),
    ) -> None:  # fmt: skip
        """``kinds``: only these faults are drawn; all if there are none."""
        self.chance, self.tally, self.mode, self.kinds = chance, tally, mode, kinds
        self.variety = draw(chance, random.Random(f"policies {seed}"), mode, hosts)
        tally.varieties.append(self.variety.words)
        blocks, options = self.variety.blocks, self.variety.options
        self.on_peer_loss = self.variety.on_peer_loss
        self.peer_timeout_s = PEER_TIMEOUT_S
        self.converge_s = CONVERGE_S + self.variety.pause_s
        self.pair = Pair.create(directory, options)
        if hosts == "local" and self.variety.encrypted:
            encrypt(self.pair)
        self.guest = Guest(blocks, seed) if self.variety.guest else None
        """Writes on the follower, where checkpoints are rare enough for it."""
        self._loads = 0
        self._former: list[Writer] = []
        """Loads of sides that were taken over from."""
        self.expectation = Expectation(self.expectation_path(), blocks)
        self.writer = Writer(self.expectation, seed, self.generation_of)
        self.beside: list[Beside] = []
        """The load on the second volume, if there is one."""
        if options.volumes == 2:
            self.beside = [Beside("disk1", self.expectation_path(), blocks, ~seed, self.generation_of)]
        self.cable: dict[str, Fault] = {}
        self.disks: dict[tuple[str, Side], Choice] = {}
        self.known: tuple[int, Numbers, Numbers] | None = None
        """The last checkpoint that was asked for: its number, what was acknowledged before and sent until then."""
        self.owed: tuple[Numbers, int] | None = None
        """What was acknowledged when the leader told how many bytes the follower had not confirmed, and these."""
        self._kinds: list[str] = []
        self._logs: dict[Path, int] = {}
        self._tick = threading.Event()

    def expectation_path(self) -> Path:
        """Of a load that begins now."""
        self._loads += 1
        return self.pair.directory.path.with_suffix(f".expected{self._loads}")

    def succeed(self, writer: Writer, expectation: Expectation) -> None:
        """The load is ``writer``'s from now on; the one that was ends."""
        self.writer.close()
        self._former.append(self.writer)
        self.writer, self.expectation = writer, expectation
        self.errors = writer.errors
        self.known = self.owed = None

    def writers(self, *more: Writer) -> dict[int, set[str]]:
        """By generation: the sides that acknowledged writes in it."""
        merged: dict[int, set[str]] = {}
        for writer in (*self._former, self.writer, *more, *(other.writer for other in self.beside)):
            for generation, sides in list(writer.writers.items()):
                merged.setdefault(generation, set()).update(sides)
        return merged

    def generation_of(self, side: str) -> int | None:
        metadata = load(str(self.pair.directory.path / side / "metadata"))
        if metadata is None or metadata.role != "primary" or not metadata.history:
            return None
        return metadata.history[-1].identity

    def live(self, proceed: Callable[[], bool]) -> None:
        """Up, cycles while ``proceed``, down."""
        with cable(self.pair) as self.cable, breakable(self.pair, self.chance, self.tally) as self.disks:
            try:
                with self.pair:
                    self.pair.up()
                    self.pair.wait_protected(self.converge_s)
                    for _ in range(CYCLES_A_PAIR):
                        if not proceed():
                            break
                        self._cycle()
                        self.tally.cycles += 1
            finally:
                self.writer.close()
                for other in self.beside:
                    other.writer.close()
                if self.guest is not None:
                    self.guest.end()
                    self.tally.guest_writes += self.guest.acknowledged
                    self.tally.guest_writes_kept += self.guest.kept
                for writer in (*self._former, self.writer, *(other.writer for other in self.beside)):
                    self.tally.acknowledged += writer.acknowledged
                    self.tally.refused_writes += writer.errors
                    self.tally.reads += writer.reads
                    self.tally.refused_reads += writer.errors_of_reads
                self.tally.generations += len(self.writers())
                self.tally.two_writers += sum(len(sides) > 1 for sides in self.writers().values())

    # A cycle

    def _cycle(self) -> None:
        self.errors = self.writer.errors
        self._aim()
        self._aim_guest()
        self.pause(0.0, 0.05 if self.guest is None else 0.2)
        faults: list[Fault] = []
        try:
            shares = self._possible()
            kinds = self.chance.choices(list(shares), list(shares.values()), k=self.chance.choice((1, 1, 2, 3)))
            if self.mode == "async" and kinds[0] == "cable":
                kinds[1:] = ["kill leader"]  # what it had not sent yet is lost
            if kinds[0] == "takeover":
                kinds[1:] = []  # both sides live, and lead
            self._kinds = kinds
            for number, kind in enumerate(kinds):
                with contextlib.suppress(TandemDiskError, ProcessLookupError):  # it hit a pair that is broken already
                    fault = self._begin(kind, broken=number > 0)
                    if fault is not None:
                        faults.append(fault)
                self.pause(0.0, 0.08)
            if any(isinstance(fault, LASTING) or fault in self.cable.values() for fault in faults):
                self.pause(0.0, 2 * PEER_TIMEOUT_S if self.chance.random() < 0.4 else 0.1)
        finally:
            for fault in faults:
                fault.heal()
            self._end_guest()
        with self.tally.phase("recovery"):
            self._recover()
        with self.tally.phase("comparison"):
            self._compare()

    def _possible(self) -> dict[str, int]:
        return possible(self.kinds, self.disks, SIDES[self.pair.leader()], self.pair.directory.hosts() is not None)

    def pause(self, least: float, most: float) -> None:
        self._tick.wait(self.chance.uniform(least, most))

    def _aim(self) -> None:
        side = SIDES[self.pair.leader()]
        self.aim_at(side)

    def aim_at(self, side: str) -> None:
        """All load goes to the exports of ``side``."""
        self.writer.aim(side, self.uri(side))
        for other in self.beside:
            other.writer.aim(side, self.uri(side, other.name))

    def rest(self, patience_s: float = REST_S, *, abandon: bool = False) -> None:
        """No load any more."""
        self.writer.rest(patience_s, abandon=abandon)
        for other in self.beside:
            other.writer.rest(patience_s, abandon=abandon)

    def judge_beside(self, target: str, number: int, side: str) -> None:
        """The second volume after a failover, as ``side`` exports it."""
        for other in self.beside:
            with self.client(side, other.name) as client:
                found = other.expectation.decode(self.read_bytes(client))
            other.judge_failover(target, number, found, self.mode)

    def _aim_guest(self) -> None:
        if self.guest is not None:
            follower: Role = "secondary" if self.pair.leader() == "primary" else "primary"
            self.guest.begin(
                self.uri(SIDES[follower]), lambda: self.ask(follower).get("checkpoint"), self.expectation.number
            )

    def _end_guest(self) -> None:
        if self.guest is not None:
            self.guest.end()
            if self.guest.wrong:
                raise Breach(f"Under load {self.guest.wrong}.", 1)

    def guests(self, checkpoint: int | None = None) -> set[int]:
        """Blocks in which the guest may have written, on one checkpoint or on any."""
        return self.guest.touched(checkpoint) if self.guest is not None else set()

    def uri(self, side: str, volume: str = "disk0") -> str:
        return f"nbd+unix:///{volume}?socket={self.pair.directory.path}/{side}/nbd.sock"

    def _begin(self, kind: str, *, broken: bool) -> Fault | None:
        leader = self.pair.leader()
        follower: Role = "secondary" if leader == "primary" else "primary"
        verb, _, what = kind.partition(" ")
        if kind == "checkpoint":
            self._checkpoint(COMMAND_S)
            self._check_view(SIDES[follower])
        elif kind == "takeover":
            if broken:
                return None
            self._end_guest()
            self._checkpoint(COMMAND_S)  # nothing of the guest's is left
            with self.tally.phase("takeover"):
                Takeover(self).run()
        elif kind == "switchover":
            if broken:
                return None  # its writes may have to wait for what is healed only afterwards
            self._switchover()
        elif verb in ("ENOSPC", "EIO"):
            make = self.disks.get((verb, SIDES[leader if what == "leader" else follower]))
            if make is None:
                return None  # roles were swapped since it was drawn
            self.tally.faults[kind] += 1
            fault = make()
            fault.begin()
            return fault
        elif kind == "cable":
            kind = self.chance.choice(sorted(self.cable))
        else:
            return self._break_process(kind, verb, what, leader, follower)
        self.tally.faults[kind] += 1
        if kind in self.cable:
            fault = self.cable[kind]
            fault.begin()
            return fault
        return None

    def _break_process(self, kind: str, verb: str, what: str, leader: Role, follower: Role) -> Fault | None:
        if what == "export":
            pids = [self.ask(role).get("export_pid") for role in (leader, follower)]
        elif verb == "host":
            return self._lose_host(leader if what == "gone leader" else follower, leader)
        elif what == "both":
            pids = [self.pid(role) for role in (leader, follower)]
        else:
            pids = [self.pid(leader if what == "leader" else follower)]
        if kind in ("kill leader", "kill both"):
            self.note_lag(leader)
        fault: Fault | None = None
        for pid in pids:
            if pid is None:
                continue
            self.tally.faults[kind] += 1
            if verb == "EFBIG":
                fault = FileLimit(pid, self.chance.choice((0, 4096, self.expectation.blocks * BLOCK // 2)))
            else:
                fault = Killed(pid) if verb == "kill" else Paused(pid)
            fault.begin()
        return fault

    def _lose_host(self, role: Role, leader: Role) -> Fault:
        hosts = self.pair.directory.hosts()
        assert hosts is not None
        if role == leader:
            self.note_lag(leader)
        self.tally.faults["host gone"] += 1
        fault = HostGone(hosts, SIDES[role])
        fault.begin()
        return fault

    def pid(self, role: Role) -> int | None:
        """What the supervisor has written down: nobody has to answer for it."""
        child = read_state(self.pair.directory).get("children", {}).get(role, {})
        return int(child["pid"]) if child.get("alive") else None

    def ask(self, role: Role) -> dict[str, Any]:
        with contextlib.suppress(TandemDiskError):
            return self.pair.client(role, ANSWER_S).call("status")
        return {}

    def note_lag(self, leader: Role) -> None:
        low = self.expectation.snapshot()[0]
        lag = self.ask(leader).get("lag") or {}
        if lag.get("bytes") is not None:
            self.owed = (low, int(lag["bytes"]))

    def _check_view(self, side: str) -> None:
        """The guest's view of the checkpoint that was just taken, under load; no later one may have come since."""
        assert self.known is not None
        number, low, high = self.known
        with NbdClient(self.uri(side), timeout_s=CONVERGE_S) as client:
            found = self.read(client)
        follower: Role = "secondary" if self.pair.leader() == "primary" else "primary"
        if self.ask(follower).get("checkpoint") == number:
            guests = self.guests()
            wrong = [one for one in self.expectation.out_of_range(found, low, high) if one.block not in guests]
            none_wrong(wrong, f"in the guest's view of checkpoint {number}")
            for other in self.beside:
                with self.client(side, other.name) as client:
                    view = other.expectation.decode(self.read_bytes(client))
                if self.ask(follower).get("checkpoint") == number:
                    other.judge_view(number, view)
            self.tally.views += 1

    def _checkpoint(self, timeout_s: float = CONVERGE_S / 2) -> None:
        low, _ = self.expectation.snapshot()
        for other in self.beside:
            other.begin_checkpoint()
        leader = self.pair.client(self.pair.leader(), timeout_s + 1)
        number = int(leader.call("checkpoint", timeout_s=timeout_s)["checkpoint"])
        self.known = (number, low, self.expectation.snapshot()[1])
        for other in self.beside:
            other.end_checkpoint(number)

    def _switchover(self) -> None:
        if self.pair.status()["state"] != "protected":
            raise OperationFailed("not now")
        self._end_guest()
        self.rest(PATIENCE_S)
        self.pair.switchover()
        self._aim()

    # Recovery

    def _recover(self) -> None:
        """All is healed; whatever is dead is started again, or taken over from."""
        deadline = time.monotonic() + self.converge_s
        patient = time.monotonic() + OVERLOAD_S if self.variety.pause_s else deadline
        now = self.pair.status()
        leader = self.pair.leader()
        if now[leader]["pid"] is None and self.chance.random() < 0.75 and self._may_take_over(now, leader):
            self._fail_over()
        while True:
            try:
                if any(self.pair.status()[role]["pid"] is None for role in SIDES):
                    self.tally.recoveries["restart"] += 1
                    self._accept_disk()
                    self.pair.up()
                if time.monotonic() > patient:
                    patient = deadline
                    self.rest(PATIENCE_S)
                self.pair.wait_for(
                    lambda now: now["state"] == "protected" or None in (now["primary"]["pid"], now["secondary"]["pid"]),
                    "protected", max(0.1, patient - time.monotonic()),
                )  # fmt: skip
                if self.pair.status()["state"] == "protected":
                    return
            except TandemDiskError as error:
                if time.monotonic() > deadline:
                    raise Breach(f"The pair does not recover: {error}") from error
                self.pause(0.02, 0.05)

    def _accept_disk(self) -> None:
        """The leader does not start with a disk of which a flush failed; this one lost nothing in that."""
        leader = self.pair.leader()
        metadata = remembered(self.pair.settings(leader))
        if metadata is not None and metadata.lost_writes and self.pair.status()[leader]["pid"] is None:
            self.pair.accept_disks()
            self.tally.recoveries["disk accepted"] += 1

    def _may_take_over(self, now: dict[str, Any], leader: Role) -> bool:
        follower: Role = "secondary" if leader == "primary" else "primary"
        standings = judge(self.pair.directory.settings()).standings
        return (
            now[follower]["pid"] is not None
            and len(standings) == 2
            and standings[leader].history == standings[follower].history
        )

    def _fail_over(self) -> None:
        target = self.chance.choice(("latest", "checkpoint") if self.guests() else ("latest",) * 3 + ("checkpoint",))
        new = "b" if SIDES[self.pair.leader()] == "a" else "a"
        self.rest(abandon=True)
        started = time.monotonic()
        forced = False
        try:
            try:
                done = self.pair.failover(target)
            except NeedsForce:
                if self.guest is None or target == "checkpoint":
                    raise
                forced = True
                done = self.pair.failover(target, force=True)  # what the guest wrote is dropped
            answered = time.monotonic()
        except (OperationFailed, NeedsForce, NotRunning):
            self.tally.recoveries["failover refused"] += 1
            self._aim()
            return
        with self.client(new) as client:
            connected = time.monotonic()
            number, data = self.expectation.begin(0, 1)
            if not any(data):
                number, data = self.expectation.begin(0, 1)
            client.write(0, data)
            self.expectation.acknowledge(number, 0, 1)
            self.tally.failover(
                target, decided=done["seconds"], answered=answered - started, connected=connected - answered,
                written=time.monotonic() - connected, beside=self._kinds,
            )  # fmt: skip
            self.tally.recoveries[f"failover to {target}{', forced' if forced else ''}"] += 1
            if self.guest is not None:
                self.expectation.number = max(self.expectation.number, self.guest.number)
            found = self.read(client)
        self.judge_beside(target, int(done["checkpoint"]), new)
        self.expectation.log.pop()
        if self.guest is not None and not forced:
            self.guest.judge(target, int(done["checkpoint"]), found)
        judge_failover(self, target, int(done["checkpoint"]), found, self.expectation, probe=number)
        self.expectation.settle(found)
        self.known = self.owed = None
        if self.guest is not None:
            self.guest.forget()
        self.aim_at(new)
        self.pause(0.0, 0.05)
        self.pair.rejoin()
        self.tally.recoveries["rejoin"] += 1

    # Comparison

    def _compare(self) -> None:
        self._aim()
        self.pause(0.0, 0.01)
        deadline = time.monotonic() + self.converge_s
        while True:
            try:
                self.rest(PATIENCE_S)
                break
            except TimedOut as error:
                if time.monotonic() > deadline:
                    raise Breach(f"The load hung: {error}") from error
                self._recover()  # "protected" was the word of a leader that had yet to notice a death
        for writer in (self.writer, *(other.writer for other in self.beside)):
            if writer.trouble is not None:
                raise Breach(f"The load hung: {writer.trouble}")
            if writer.wrong:
                raise Breach(f"Under load {writer.wrong}.", 1)
        while True:
            try:
                self._checkpoint()
                break
            except TandemDiskError as error:
                if time.monotonic() > deadline:
                    raise Breach(f"No checkpoint can be taken: {error}") from error
                self._recover()
        if self.writer.errors != self.errors or any(other.failed for other in self.beside):
            self._repair(deadline)
        leader = self.pair.leader()
        with self.client(SIDES[leader]) as client:
            found = self.read(client)
        none_wrong(self.expectation.wrong(found), "in the leader's export")
        follower: Role = "secondary" if leader == "primary" else "primary"
        for role in (leader, follower):
            disk = Path(self.pair.settings(role).volumes[0].disk).read_bytes()
            different = np.flatnonzero(self.expectation.decode(disk) != found)
            if len(different):
                at = int(different[0])
                there = int(self.expectation.decode(disk)[at])
                raise Breach(
                    f"{len(different)} blocks of the {'leader' if role == leader else 'follower'}'s disk differ from "
                    f"what its leader exports, block {at} holds write {there} instead of {int(found[at])}.",
                    len(different),
                )
        with self.client(SIDES[follower]) as client:
            view = self.read(client)
        none_wrong(
            [Wrong(int(at), int(view[at]), int(found[at])) for at in np.flatnonzero(view != found)],
            "in the guest's view of the last checkpoint",
        )
        self._compare_beside(leader, follower)
        self.tally.views += 1
        self.expectation.settle(found)
        self.known = self.known and (self.known[0], *self.expectation.snapshot())
        self.owed = (self.expectation.snapshot()[0], 0)
        self.tally.comparisons += 1
        if trace := new_tracebacks(self.pair.directory.path, self._logs):
            raise Breach(f"An error that nobody caught, in {trace}")

    def _compare_beside(self, leader: Role, follower: Role) -> None:
        for other in self.beside:
            shown: list[bytes] = []
            for role in (leader, follower):
                with self.client(SIDES[role], other.name) as client:
                    shown.append(self.read_bytes(client))
            one, two = (Path(self.pair.settings(role).volumes[1].disk).read_bytes() for role in (leader, follower))
            other.compare(shown[0], (one, two), shown[1])

    def _repair(self, deadline: float) -> None:
        """What the leader's disk refused and the follower's took differs, by design, until a resync or a repair."""
        while True:
            try:
                self.pair.verify(repair=True)
                self._checkpoint()
                return
            except TandemDiskError as error:
                if time.monotonic() > deadline:
                    raise Breach(f"A repair is not possible: {error}") from error
                self._recover()

    def client(self, side: str, volume: str = "disk0") -> NbdClient:
        """A connection to the export of ``side``, whose process may be about to be started again."""
        deadline = time.monotonic() + self.converge_s
        while True:
            try:
                return NbdClient(self.uri(side, volume))
            except (NotRunning, NbdError) as error:
                if time.monotonic() > deadline:
                    raise Breach(f"The export of side {side} does not come back: {error}") from error
                self.pause(0.005, 0.02)

    def read(self, client: NbdClient) -> npt.NDArray[np.int64]:
        return self.expectation.decode(self.read_bytes(client))

    def read_bytes(self, client: NbdClient) -> bytes:
        """All of an export."""
        data = bytearray(client.size)
        pieces = ((at, min(READ, client.size - at)) for at in range(0, client.size, READ))
        for offset, piece in client.read_many(pieces, depth=4):
            data[offset : offset + len(piece)] = piece
        return bytes(data)


def campaign(
    directory: Path, seed: int, mode: Mode, hosts: str, tally: Tally, proceed: Callable[[], bool],
    kinds: Collection[str] = (),
) -> None:  # fmt: skip
    """Pair after pair while ``proceed``; a Breach goes into ``tally`` and ends the run, its directory kept."""
    number = 0
    while proceed() and not tally.failure:
        chance = random.Random(f"{seed}/{number}")
        home = directory / str(number)
        subject = PairUnderChaos(home, seed + number, chance, mode, hosts, tally, kinds)
        tally.pairs += 1
        try:
            subject.live(proceed)
        except Breach as breach:
            tally.lost += breach.lost
            tally.failure = f"pair {number} ({subject.variety}): {breach}"
        except TandemDiskError as error:
            tally.failure = f"pair {number} ({subject.variety}): {error}"
        else:
            subject.pair.directory.remove()
            for path in directory.glob(f"{number}.expected*"):
                path.unlink()
        number += 1
