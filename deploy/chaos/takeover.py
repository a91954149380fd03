"""A takeover from a leader that lives: it is paused, cut off, or nothing is wrong with it, and its clients go on.

    load ─▶ old leader ──────── fault ──────────────── heal ──▶ it knows ─▶ EIO, or alone in a generation of its own
                                  failover (--force, --primary-dead)
                                  new load ─▶ new leader ──────────────────────────────────▶ rejoin of the old one

What has to be true of it (DESIGN, I4 and I5), whatever is drawn:

* No generation has acknowledgements of both sides; the new leader acknowledges in its new one only.
* In sync mode what the old leader acknowledged in the generation that both shared is in what was taken over, whenever
  the client heard of it. In async mode what is not is counted, and bounded by the ``lag`` before the fault.
* A leader that was only paused, or that can hear the other side, never goes on alone: it is fenced, its clients get
  EIO, and nothing is acknowledged any more. Neither does one with ``on_peer_loss = block``.
* A leader that was cut off, with ``on_peer_loss = continue``, may have gone on alone: nobody could tell it. Then it did
  so in a generation of its own, which the other side never saw, and that is called split brain: ``rejoin`` is refused
  until somebody names the side whose writes are thrown away, and says how many bytes these may be. The run counts them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from common.errors import NbdError, NeedsForce, NotRunning, OperationFailed, PeerRefused, TandemDiskError, TimedOut
from common.metadata import load
from common.nbd_client import NbdClient, NbdClientError
from common.settings import Role
from deploy.chaos.expectation import BLOCK, Breach
from deploy.chaos.judgement import judge_failover
from deploy.chaos.writer import Writer
from deploy.faults import Fault, Paused
from deploy.layout import SIDES
from deploy.roles import judge

if TYPE_CHECKING:
    from deploy.chaos.campaign import PairUnderChaos

WAYS: Final = ("paused", "paused", "cut", "cut", "cut", "well")
"""What the old leader is when it is taken over from, and how often."""
KNOWS_S: Final = 40.0
"""Until a leader that was left behind says so: it dials again after at most five seconds, or after a pause of its
variety's."""


class Takeover:
    """One, of the pair ``subject``, which is protected and has no other fault."""

    def __init__(self, subject: PairUnderChaos) -> None:
        self.subject, self.pair, self.chance = subject, subject.pair, subject.chance
        self.old: Role = self.pair.leader()
        self.new: Role = "secondary" if self.old == "primary" else "primary"
        self.way = self.chance.choice(WAYS)
        self.past = {generation.identity for generation in self._history(self.old)}
        self.shared = max(self._history(self.old), key=lambda generation: generation.number).identity
        self.before: Writer = subject.writer

    def _history(self, role: Role) -> tuple[Any, ...]:
        metadata = load(str(self.pair.directory.path / SIDES[role] / "metadata"))
        return metadata.history if metadata is not None else ()

    def run(self) -> None:
        """Until the old leader has rejoined. OperationFailed if the pair is in no state for it; Breach."""
        subject = self.subject
        standings = judge(self.pair.directory.settings()).standings
        if self.pair.status()["state"] != "protected" or standings[self.old].history != standings[self.new].history:
            raise OperationFailed("not now")
        for other in subject.beside:
            other.writer.rest()
        self.before.watch(lambda generation: generation == self.shared)
        subject.note_lag(self.old)
        fault = self._fault()
        try:
            if fault is not None:
                fault.begin()
            subject.pause(0.0, subject.peer_timeout_s if self.chance.random() < 0.5 else 0.05)
            done = self._fail_over()
            if done is None:
                return
            try:
                self._two_sides(done, fault)
            except TandemDiskError as error:
                raise Breach(f"In a takeover from a leader that was {self.way}: {error}") from error
        finally:
            if fault is not None:
                fault.heal()
            subject.writer.watch(None)

    def _fault(self) -> Fault | None:
        subject = self.subject
        if self.way == "paused":
            pid = subject.pid(self.old)
            return Paused(pid) if pid is not None else None
        if self.way == "cut":
            return subject.cable[self.chance.choice(sorted(name for name in subject.cable if name.startswith("cut")))]
        return None

    def _fail_over(self) -> dict[str, Any] | None:
        """What the new leader says; None if it may not take over."""
        target = self.chance.choice(("latest", "latest", "latest", "checkpoint"))
        word = "force" if self.way == "well" else self.chance.choice(("force", "primary_dead"))
        try:
            return self.pair.failover(target, **{word: True})
        except (OperationFailed, NeedsForce, NotRunning, TimedOut):
            self.subject.tally.recoveries["takeover refused"] += 1
            return None

    def _two_sides(self, done: dict[str, Any], fault: Fault | None) -> None:
        subject, chance = self.subject, self.chance
        with subject.client(SIDES[self.new]) as client:
            found = subject.read(client)
        subject.judge_beside(done["to"], int(done["checkpoint"]), SIDES[self.new])
        expectation = subject.expectation.fork(subject.expectation_path(), found)
        after = Writer(expectation, chance.getrandbits(31), subject.generation_of)
        after.watch(lambda generation: generation is not None and generation not in self.past)
        try:
            after.aim(SIDES[self.new], subject.uri(SIDES[self.new]))
            subject.pause(0.0, 2 * subject.peer_timeout_s if chance.random() < 0.6 else 0.1)
            if fault is not None:
                fault.heal()
            alone = self._wait_until_it_knows()
            if not alone:
                self._refuses_writes()
            try:
                self.before.rest()
            except TimedOut as error:
                raise Breach(f"A client of the leader that was left behind hangs: {error}") from error
            self.before.close()
            self._judge(done, found, after, alone=alone)
        finally:
            subject.succeed(after, expectation)
        self._rejoin(alone=alone)

    def _wait_until_it_knows(self) -> bool:
        """Whether it has gone on in a generation of its own."""
        deadline = time.monotonic() + KNOWS_S + self.subject.variety.pause_s
        state = ""
        while state not in ("fenced", "refused"):
            if time.monotonic() > deadline:
                raise Breach(f"The leader that was left behind does not know it: it is {state or 'silent'}.")
            self.subject.pause(0.005, 0.02)
            told = self.subject.ask(self.old)
            state = str(told.get("engine") or told.get("state") or "")
        followed = {generation.identity for generation in self._history(self.new)}
        alone = any(generation.identity not in followed for generation in self._history(self.old))
        if alone and (self.way != "cut" or self.subject.on_peer_loss == "block"):
            raise Breach(f"A leader that was {self.way} went on alone, beside the one that took over.")
        if alone != (state == "refused"):
            raise Breach(f"A leader that was left behind is {state}, and its history says alone={alone}.")
        return alone

    def _refuses_writes(self) -> None:
        """Fenced: an error for whoever writes, and not a word of success."""
        acknowledged = self.before.acknowledged
        try:
            with NbdClient(self.subject.uri(SIDES[self.old])) as client:
                client.write(0, bytes(BLOCK))
        except NbdClientError:
            pass
        except (NbdError, NotRunning) as error:
            raise Breach(f"A fenced leader does not answer its clients: {error}") from error
        else:
            raise Breach("A fenced leader acknowledges a write.", 1)
        self.subject.pause(0.02, 0.05)
        if self.before.acknowledged > acknowledged + _IN_THE_SOCKET:
            raise Breach("A fenced leader acknowledges writes.", self.before.acknowledged - acknowledged)

    def _judge(self, done: dict[str, Any], found: Any, after: Writer, *, alone: bool) -> None:
        subject, before = self.subject, self.before
        if before.trouble is not None or before.wrong:
            raise Breach(f"At the leader that was left behind: {before.trouble or before.wrong}.")
        judge_failover(subject, done["to"], int(done["checkpoint"]), found, before.expectation, probe=None)
        if before.strays and not alone:
            raise Breach("A fenced leader acknowledged writes in no generation of the pair.", len(before.strays))
        if after.strays:
            raise Breach(
                f"The new leader acknowledged {len(after.strays)} writes before its generation was noted.",
                len(after.strays),
            )
        shared = [generation for generation, sides in subject.writers(after).items() if len(sides) > 1]
        if shared:
            raise Breach(f"Both sides acknowledged writes in generation {shared[0]:016x}.", 1)

    def _rejoin(self, *, alone: bool) -> None:
        pair, tally = self.pair, self.subject.tally
        own = {block for stray in self.before.strays for block in range(stray.first, stray.first + stray.length)}
        if alone:
            try:
                pair.rejoin()
            except PeerRefused:
                pass
            else:
                raise Breach("A split brain was resolved without anybody's word.", len(own))
        told = pair.rejoin(discard=SIDES[self.old] if alone else None)
        if told["side"] != SIDES[self.old] or told["split_brain"] != alone or told["bytes"] < len(own) * BLOCK:
            raise Breach(f"After a takeover `rejoin` says {told}; {len(own)} blocks were written alone={alone}.")
        tally.takeovers[f"{self.way}, {'split brain' if alone else 'fenced'}"] += 1
        tally.alone += len(self.before.strays)


_IN_THE_SOCKET: Final = 64
"""Acknowledgements that a client may not have read yet."""
