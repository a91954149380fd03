"""A seed's life: a pair is born, lives through what its options allow, everything is healed, and it must come to rest.

    seed ─▶ options (swarm) ─▶ steps at random: clients, commands, troubles; checks all the time
         ─▶ heal ─▶ both sides protected and equal within ``PATIENCE_S`` of virtual time, every client answered
         ─▶ a last checkpoint is exact, a last failover keeps everything

The same seed and options give the same trace, byte for byte (``runner.Result.trace`` is its hash).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from common.errors import NeedsForce, TandemDiskError
from deploy.roles import accept_disks, choose_loser, give_up, judge, mixed_disks, process_role, remembered
from secondary.header import Stage
from tests.simulation.clients import Clients
from tests.simulation.host import OTHER, Host
from tests.simulation.network import Manners
from tests.simulation.options import FLAPPING
from tests.simulation.oracle import Violation
from tests.simulation.processes import Running
from tests.simulation.swarm import WEIGHTS as COMMANDS
from tests.simulation.swarm import Operator
from tests.simulation.troubles import Troubles
from tests.simulation.world import World

PATIENCE_S = 240.0

WEIGHTS = {
    "write": 40.0, "read": 2.0, "flush": 2.0, "guest_read": 10.0, "guest_write": 3.0, "checkpoint": 2.0,
    "cut": 1.0, "one_way": 1.0, "reset": 1.5, "bad_messages": 1.0, "kill_primary": 0.7, "kill_secondary": 1.0,
    "kill_export": 0.7, "power_primary": 0.5, "power_secondary": 0.5, "pause": 0.7, "stop": 0.6,
    "disk_primary": 0.7, "disk_secondary": 0.7, "slow": 0.7, "metadata": 0.7, "kill_inside": 0.7, "slow_reader": 1.5,
}  # fmt: skip
NETWORK = {"cut", "one_way", "reset", "bad_messages", "stale", "jitter", FLAPPING}
VERIFYING = {"verify", "corrupt"}
ALWAYS = ("write", "read", "flush", "checkpoint")


class Simulation:
    """One life in an open world. Scenarios use its verbs one by one; ``live`` draws them at random."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.options = world.options
        self.seed = seed
        self.chance = random.Random(seed ^ 0x5EED)
        self.clients = Clients(world, random.Random(seed ^ 0xC11E))
        self.counts: Counter[str] = Counter()
        self.step = 0
        self.watched = ["a", "b"]
        self.restart_at: dict[str, float] = {}
        self.born = {"a": "primary", "b": "secondary"}
        self.healing = False
        self.troubles = Troubles(self)
        self.operator = Operator(self)
        world.on_between = self._between

    # Verbs

    @property
    def a(self) -> Host:
        return self.world.hosts["a"]

    @property
    def b(self) -> Host:
        return self.world.hosts["b"]

    @property
    def leading(self) -> Host:
        """The side whose clients' writes count."""
        return self.world.hosts[self.world.oracle.leader]

    @property
    def following(self) -> Host:
        return self.world.hosts[OTHER[self.world.oracle.leader]]

    @property
    def primary(self) -> Running | None:
        """The process that serves the clients of the leading side."""
        return self.leading.process("primary") or self.leading.process("export")

    @property
    def secondary(self) -> Running | None:
        """The process that follows, or has taken over and not finished that."""
        return self.following.process("secondary")

    @property
    def export(self) -> Running | None:
        export = self.following.process("export")
        leads = export is not None and export.node is not None and export.node.__dict__.get("engine") is not None
        return None if leads else export

    def role(self, side: str) -> str:
        """What a side is started as, by what it remembers."""
        return process_role(self.world.hosts[side].settings, self.born[side])  # type: ignore[arg-type]

    def start(self, side: str) -> Running:
        """Start the process of that side's role."""
        host = self.world.hosts[side]
        host.edit()
        return self.world.spawn(host, self.role(side))

    async def pause(self, seconds: float) -> None:
        """Let virtual time go by."""
        await asyncio.sleep(seconds)
        if self.world.violation is not None:
            raise Stop

    async def until(self, condition: Callable[[], Any], seconds: float, what: str) -> None:
        """Wait in virtual time for a condition that has to come."""
        deadline = self.world.loop.now + seconds
        while not condition():
            if self.world.loop.now > deadline:
                raise Violation("liveness", f"{what} did not happen within {seconds:g} s: {self.standing()}")
            if self.healing:
                self.supervise()
            await self.pause(0.05)

    def write(self) -> bool:
        process = self.primary
        return process is not None and not process.stopped and self.clients.write(process)

    def command(
        self, process: Running | None, name: str, then: Callable[[Any], None] | None = None, **args: Any
    ) -> None:
        """Give a control command, as the command line would; ``then`` gets its result or its error."""
        if process is None or name not in process.handlers:
            return
        world, handler = self.world, process.handlers[name]

        async def run() -> None:
            try:
                result = await handler(args)
            except TandemDiskError as error:
                world.trace(f"refused {name} {error}")
                if then is not None:
                    then(error)
                return
            world.trace(f"done {name} {result.get('checkpoint')}")
            if then is not None:
                then(result)

        process.run(world.loop.create_task, run())

    def checkpoint(self) -> None:
        """An operator's checkpoint: exactly what was submitted when it is asked for."""
        process, world = self.primary, self.world
        if process is None or "checkpoint" not in process.handlers:
            return
        handler = process.handlers["checkpoint"]
        node = process.node

        async def run() -> None:
            if node.engine is None or node.engine.mirror.detaching or node.engine.mirror._held:
                return
            lineage, index = world.oracle.lineage, len(world.oracle.lineage.batches)
            with contextlib.suppress(TandemDiskError):
                result = await handler({})
                self.counts["operator checkpoints"] += 1
                world.guard(world.oracle.checkpoint_done, result["checkpoint"], lineage, index)

        process.run(world.loop.create_task, run())

    def kill(self, process: Running | None, seconds: float) -> bool:
        """SIGKILL; the supervisor starts it again after ``seconds``. False: nobody is there."""
        if process is None:
            return False
        self.world.kill(process)
        self.restart_at[process.host.side] = self.world.loop.now + seconds
        return True

    def power(self, side: str, seconds: float) -> None:
        """The machine loses its power and comes back after ``seconds``."""
        host = self.world.hosts[side]
        self.world.lose_power(host)
        self.restart_at[side] = self.world.loop.now + seconds

    def later(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        self.world.loop.call_later(seconds, call, *args)

    # The supervisor

    def supervise(self) -> None:
        """Start what should run and does not."""
        now = self.world.loop.now
        for side in self.watched:
            host = self.world.hosts[side]
            if host.process("primary") is not None or host.process("secondary") is not None:
                continue
            due = self.restart_at.setdefault(side, now + self.chance.random())
            if now >= due:
                del self.restart_at[side]
                self._accept_what_lost_writes(host)
                self.start(side)

    def _accept_what_lost_writes(self, host: Host) -> None:
        """The operator, once a side has refused to lead with such a disk: here it is right."""
        own = remembered(host.settings)
        if own is not None and own.lost_writes and own.role == "primary" and isinstance(self._end_of(host), NeedsForce):
            self.world.trace(f"side {host.side} accepts its disk")
            with contextlib.suppress(TandemDiskError):  # it cannot be noted now: the operator tries again
                accept_disks(host.settings)
                self.counts["disks accepted"] += 1

    def _end_of(self, host: Host) -> BaseException | None:
        """What the last process of ``host`` ended with, if it ended by itself."""
        ends = [process for process in self.world.ends if process.host is host and process.role != "export"]
        return ends[-1].error if ends and ends[-1].ended else None

    # Life

    async def live(self) -> None:
        """The whole life, from birth to rest."""
        chance, options = self.chance, self.options
        self.troubles.manners()
        first = chance.choice("ab")
        self.start(first)
        await self.pause(chance.random() * chance.choice((0.0, 0.1, 6.0)))
        self.start(OTHER[first])
        if chance.random() < 0.5:
            with contextlib.suppress(TimeoutError):
                await self._protected(5.0)
        names = [name for name in WEIGHTS if name in ALWAYS or name in options.troubles
                 or (options.guest and name.startswith("guest"))]  # fmt: skip
        names += [name for name in COMMANDS if name in options.commands]
        weights = np.cumsum([WEIGHTS.get(name) or COMMANDS[name] for name in names]).tolist()
        failover_at = chance.randrange(options.steps // 2, options.steps) if options.failover else -1
        self.world.unending = not options.commands and not options.failover and options.troubles <= NETWORK
        if FLAPPING in options.troubles:
            flapping = random.Random(f"flaps {self.seed}")
            self.troubles.flap(flapping, flapping.random() * options.steps * options.tempo_s)
        for self.step in range(options.steps):
            self.supervise()
            if self.step == failover_at:
                await self._failover_somehow()
            else:
                self.act(chance.choices(names, cum_weights=weights)[0])
            await self.pause(chance.expovariate(1 / options.tempo_s))
        await self.rest()

    def act(self, name: str) -> None:
        """Do one thing, and count it, unless there was nobody to do it to."""
        if name not in ("write", "guest_read", "read"):
            self.world.trace(f"act {name}")
        verb = getattr(self, f"_do_{name}", None) or getattr(self.operator, name, None) or getattr(self.troubles, name)
        self.counts[name] += verb() is not False

    def _do_write(self) -> None:
        for _ in range(self.chance.choice((1, 4, 8) if self.options.dense else (1, 1, 2, 6))):
            if not self.write():
                return

    def _do_read(self) -> None:
        if self.primary is not None and not self.primary.stopped:
            self.clients.read(self.primary)

    def _do_flush(self) -> None:
        if self.primary is not None and not self.primary.stopped:
            self.clients.flush(self.primary)

    def _do_guest_read(self) -> None:
        if self.export is not None:
            self.clients.guest_read(self.export)

    def _do_guest_write(self) -> None:
        if self.export is not None and not self.export.stopped:
            self.clients.guest_write(self.export)

    def _do_checkpoint(self) -> None:
        self.checkpoint()

    def _between(self, platter: Any, kind: str, process: Running | None) -> None:
        """In the middle of a disk operation of ``process``: the other process of the secondary gets a turn."""
        export, secondary = self.export, self.secondary
        if process is secondary and export is not None and export.alive and not export.stopped:
            if self.options.guest and self.chance.random() < 0.3:
                self.clients.guest_write(export)
            else:
                self.clients.guest_read(export)
        elif process is export and secondary is not None and not secondary.stopped:
            if self.chance.random() < 0.5:
                self.write()
            self.world.network.hurry(secondary)

    # Failover

    async def _failover_somehow(self) -> None:
        """The primary goes away in some manner; an operator decides."""
        chance = self.chance
        manner = chance.choice(("kill", "power", "cut", "pause", "stop", "none"))
        self.world.trace(f"failover to {self.options.failover} after {manner}")
        await self.lose_primary(manner)
        for _ in range(chance.randint(1, 3)):
            self.failover(self.options.failover, force=chance.random() < 0.3)
            await self.pause(chance.random())

    async def lose_primary(self, manner: str) -> None:
        """The primary goes away, and may come back."""
        chance, world, primary = self.chance, self.world, self.primary
        if manner == "kill":
            self.kill(primary, 3 + chance.random() * 5)
        elif manner == "power":
            self.power(self.leading.side, 3 + chance.random() * 5)
        elif manner == "cut":
            world.network.set_cut(True, True)
            self.later(4 + chance.random() * 5, self.troubles.join)
        elif manner == "pause" and primary is not None:
            primary.stopped = True
            self.later(chance.random() * 8, lambda: world.loop.resume(primary))
        elif manner == "stop" and primary is not None and primary.lifecycle.is_ready:
            primary.lifecycle.stop.set()
        await self.pause(chance.choice((0.0, 0.05, 1.0, 4.0)) * chance.random())

    def failover(self, target: str, *, force: bool = False) -> None:
        """The operator's command."""
        self.command(self.secondary, "failover", to=target, force=force)

    # Rest

    def heal(self) -> None:
        """No more troubles."""
        world = self.world
        self.healing = True
        self.troubles.good_messages()
        world.network.manners = Manners(stale=world.network.manners.stale, delay_s=world.network.manners.delay_s)
        for host in world.hosts.values():
            faults = host.faults
            faults.read = faults.write = faults.flush = faults.save = faults.intents = 0.0
            faults.cold = faults.kill = 0.0
            for process in host.processes.values():
                if process.alive and process.stopped:
                    world.loop.resume(process)
        world.network.set_cut(False, False)
        self.operator.even()
        self.restart_at.clear()

    async def rest(self) -> None:
        """Heal, wait until the pair is at rest, compare everything."""
        self.heal()
        self.world.trace("healed")
        await self.operator.finished()
        await self._finish_promotion()
        await self._protected(PATIENCE_S)
        await self.until(self.equal, 30.0, "equal disks")
        await self.answered()
        if not self.options.commands & VERIFYING:  # which compares, too
            await self._identical()
        await self._last_commands()
        await self._last_checkpoint()
        if self.chance.random() < 0.5:
            await self._last_failover()

    async def _last_commands(self) -> None:
        if "resize" in self.options.commands:
            await self.operator.last_resize()
        if self.options.commands & VERIFYING:
            await self.operator.last_verification()

    async def protect(self) -> None:
        """Until the pair is protected, with whatever has to be done for it."""
        await self._protected(PATIENCE_S)

    def primaries(self) -> list[str]:
        """The sides that call themselves primary."""
        known = [remembered(host.settings) for host in self.world.hosts.values()]
        return [metadata.side for metadata in known if metadata is not None and metadata.role == "primary"]

    def rejoin(self) -> None:
        """The operator's command: the side that was left behind gives the primary role up."""
        world = self.world
        a, b = self.a.settings, self.b.settings
        judgement = judge({"primary": a, "secondary": b})
        loser = {"primary": self.a, "secondary": self.b}[
            choose_loser(judgement, self.following.side if judgement.split_brain else None)  # type: ignore[arg-type]
        ]
        if loser is self.leading:
            raise Violation("I5", f"the side that took over is to rejoin: {judgement.sentence}")
        for role in ("primary", "secondary"):
            process = loser.process(role)
            if process is not None:
                world.kill(process)
        winner = remembered(self.leading.settings)
        assert winner is not None
        world.trace(f"rejoin {loser.side}: {judgement.sentence}")
        self.counts["rejoins"] += 1
        give_up(loser.settings, winner.history)

    def refused_mixture(self, host: Host) -> bool:
        """A process of ``host`` has refused to start, because its commit cannot be completed."""
        own = remembered(host.settings)
        if own is None or not mixed_disks(host.settings, own):
            return False
        return isinstance(self._end_of(host), NeedsForce)

    def decide_on_mixture(self, *, accept: bool) -> None:
        """The operator's word for the side that refused."""
        world, taking, other = self.world, self.following, self.leading
        world.trace(f"side {taking.side} holds a mixture, accepted {accept}")
        self.counts["mixtures"] += 1
        if accept:
            accept_disks(taking.settings)
        else:
            choose_loser(judge({"primary": self.a.settings, "secondary": self.b.settings}), taking.side)  # type: ignore[arg-type]
            if (process := other.process("primary") or other.process("secondary")) is not None:
                world.kill(process)
            winner = remembered(other.settings)
            assert winner is not None
            give_up(taking.settings, winner.history)
        world.oracle.decided(accepted=accept)

    async def _finish_promotion(self) -> None:
        """A side that has taken over completes its commit, and leads."""
        deadline = self.world.loop.now + PATIENCE_S
        while self.world.oracle.promoted:
            if self.world.loop.now > deadline:
                raise Violation("liveness", f"the failover is not complete after {PATIENCE_S:g} s: {self.standing()}")
            self.supervise()
            process = self.secondary
            node: Any = process.node if process is not None else None
            if node is not None and "link" in node.__dict__ and node.buffer.header.stage is Stage.FAILOVER_FAILED:
                self.failover("checkpoint")
            if process is None and self.refused_mixture(self.following):
                self.decide_on_mixture(accept=self.chance.random() < 0.5)
            await self.pause(0.2)
        taking = self.following
        own = remembered(taking.settings)
        if own is not None and own.role == "primary" and self.role(taking.side) == "secondary":
            # promoted durably, and interrupted before anything else; or not durably, and it is being taken back

            def over() -> bool:
                now = remembered(taking.settings)
                return self.leading is taking or now is None or now.role == "secondary"

            await self.until(over, PATIENCE_S, f"the promotion of side {taking.side}")

    async def _protected(self, seconds: float) -> None:
        deadline = self.world.loop.now + seconds
        while not self.protected():
            if self.world.loop.now > deadline:
                if not self.healing:
                    raise TimeoutError
                raise Violation("liveness", f"not protected after {seconds:g} s: {self.standing()}")
            self.supervise()
            if self.healing and not self.world.oracle.promoted and len(self.primaries()) == 2:
                await self._finish_promotion()
                self.rejoin()
            await self.pause(0.1)

    def protected(self) -> bool:
        """By the primary's own word, and nothing in flight."""
        process = self.primary
        engine = process.node.__dict__.get("engine") if process is not None and process.node is not None else None
        if engine is None or self.secondary is None or process is None or process.lifecycle.stop.is_set():
            return False
        return bool(engine.serving and engine.state == "protected" and engine.session.idle)

    def standing(self) -> str:
        """How things are, for a failure."""
        parts = []
        for process in (self.primary, self.secondary):
            if process is None:
                parts.append("down")
            elif process.role != "secondary":
                engine = process.node.__dict__.get("engine") if process.node is not None else None
                if engine is not None:
                    parts.append(
                        f"primary {engine.state} ({engine.reason}) session {engine.session.state.name} "
                        f"idle {engine.session.idle}"
                    )
            elif process.node is not None and "session" in process.node.__dict__:
                parts.append(f"secondary {process.node.session.position}")
        ended = [f"{p.name}: {p.error}" for p in self.world.ends[-6:] if p.ended]
        return "; ".join([*parts, *ended])

    def equal(self) -> bool:
        oracle = self.world.oracle
        one, other = oracle.versions(self.leading.platters), oracle.versions(self.following.platters)
        different = (one != other) & ~oracle.poisoned
        if self.options.growth:
            different &= oracle.inside(self.served())
        return not different.any()

    def served(self) -> list[int]:
        """Sizes of the volumes as the leading side serves them: a resize of it may have failed, and be to come."""
        server = self.primary.server if self.primary is not None else None
        volumes = server.volumes.values() if server is not None else ()
        return [int(volume.size) for volume in volumes] or list(self.world.sizes)

    async def _identical(self) -> None:
        """Every byte is the same on both sides. Where a disk failed an operator's resync may have to see to it."""
        for _ in range(10):
            if not self.operator.differing().any():
                return
            self.counts["resyncs at rest"] += 1
            answers: list[Any] = []
            self.command(self.primary, "resync", answers.append, full=False)
            await self.until(lambda answers=answers: answers, 60.0, "an answer to resync")  # type: ignore[misc]
            await self.pause(0.2)
            await self._protected(PATIENCE_S)
            await self.answered()
        where = np.flatnonzero(self.operator.differing())[:8].tolist()
        raise Violation("equality", f"disks of a protected pair at rest differ, after a resync, too: {where}")

    async def answered(self) -> None:
        def left() -> int:
            return sum(process.alive for _, process in self.clients.outstanding.values())

        # each answer may take a while, where every thread is slow; all of them together as long as anything
        deadline = self.world.loop.now + PATIENCE_S
        while before := left():
            if self.world.loop.now > deadline:
                raise Violation("liveness", f"{before} batches have no answer yet: {self.standing()}")
            await self.until(lambda before=before: left() < before, 20.0, "an answer to every client")  # type: ignore[misc]
        oracle = self.world.oracle
        wrong = (oracle.versions(self.leading.platters) != oracle.model) & ~oracle.poisoned
        if wrong.any():
            raise Violation(
                "I6", f"the primary disk is not what its clients wrote: {np.flatnonzero(wrong)[:8].tolist()}"
            )

    async def _last_checkpoint(self) -> None:
        done: list[Any] = []
        for _ in range(20):
            await self._protected(PATIENCE_S)
            done.clear()
            self.command(self.primary, "checkpoint", done.append)
            await self.until(lambda: done, 90.0, "the end of a last checkpoint")
            if not isinstance(done[0], TandemDiskError):
                break
        else:
            raise Violation("liveness", f"no checkpoint of a protected pair: {done[0]}")
        await self._whole_view()

    async def _whole_view(self) -> None:
        """All of the guest's view, read once."""
        await self.until(
            lambda: self.export is not None and self.export.server is not None and self.export.server.listening,
            30.0,
            "an export of the secondary",
        )
        export = self.export
        assert export is not None
        assert export.server is not None
        for index, volume in enumerate(export.server.volumes.values()):
            contents = bytearray(volume.size)
            export.run(volume.read_blocking, 0, memoryview(contents))
            self.world.oracle.check_guest_read(self.world.oracle.starts[index], bytes(contents))

    async def _last_failover(self) -> None:
        for _ in range(self.chance.randint(0, 4)):
            self.write()
        await self.pause(0.2 * self.chance.random())
        taking = self.following
        self.watched = [taking.side]
        for role in ("primary", "secondary"):
            process = self.leading.process(role)
            if process is not None:
                self.world.kill(process)
        await self.pause(PEER_PAUSE_S)
        target = self.chance.choice(("latest", "checkpoint"))
        done: list[Any] = []
        self.command(self.secondary, "failover", done.append, to=target, force=True)
        await self.until(lambda: done, 30.0, "a last failover")
        if isinstance(done[0], TandemDiskError):
            raise Violation("liveness", f"no failover of a protected pair: {done[0]}")
        await self._finish_promotion()
        await self.until(lambda: self.leading is taking, PATIENCE_S, "the lead of the promoted side")
        await self.until(lambda: self.write(), 30.0, "a client of the promoted side")
        for _ in range(3):
            self.write()
            await self.pause(0.05)
        await self.answered()


PEER_PAUSE_S = 0.5


class Stop(Exception):
    """A check has failed: no further."""
