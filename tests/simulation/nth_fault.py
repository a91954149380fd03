"""n-th-fault loops, as SQLite tests itself: every disk, metadata and send call of a phase fails, one at a time.

A phase prepares a pair, says ``begin``, and does something: it starts, synchronises, takes over. From ``begin`` on each
call to a disk, a metadata file, a write-intent file, a spill file or the stream is counted, and each file of the disk
buffer that is made. Run number n lets the n-th of them fail:
*once*, or *from then on* for its device, until the phase is over. (A send that fails breaks the connection; a write
that fails may have been done in part.) Then the fault is gone, the pair has to come to rest, and the oracle, which
looked on all the time, compares everything. The loop goes on until a run in which nothing failed, because the phase has
no n-th call.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from common.errors import TandemDiskError
from tests.simulation.commands import switchover
from tests.simulation.options import Options
from tests.simulation.runner import Result, run
from tests.simulation.scenarios import CALM, born, writes
from tests.simulation.simulator import Simulation

Phase = Callable[[Simulation], Awaitable[None]]

PHASES: dict[str, tuple[Phase, Options]] = {}
PATIENCE_S = 8.0
"""How long a phase waits for its end, which a fault may prevent."""


def phase(**options: Any) -> Callable[[Phase], Phase]:
    """Register a phase; ``options`` differ from a scenario's."""

    def register(story: Phase) -> Phase:
        PHASES[story.__name__] = story, replace(CALM, **options)
        return story

    return register


@dataclass
class Outcome:
    """One run. ``hit``: what failed first; empty if the phase has no ``number``-th call."""

    phase: str
    number: int
    sticky: bool
    hit: str
    calls: int
    result: Result

    def describe(self) -> str:
        """For a person: what failed, what came of it, and how to see it again."""
        return (
            f"{self.phase}: call {self.number} ({self.hit}) fails {'from then on' if self.sticky else 'once'}: "
            f"{self.result.describe()}"
        )


def fail(name: str, number: int, *, sticky: bool, keep_log: bool = False) -> Outcome:
    """Run the phase, and let its call ``number`` fail (0: none)."""
    story, options = PHASES[name]
    outcome = Outcome(name, number, sticky, "", 0, Result(1, options))

    async def life(sim: Simulation) -> None:
        countdown = sim.world.countdown
        countdown.fail_at, countdown.sticky = number, sticky
        sim.world.oracle.may_be_torn = True  # a write of a batch may fail behind another one of it
        try:
            await story(sim)
        finally:
            countdown.armed = False
            outcome.hit, outcome.calls = countdown.hit, countdown.calls
        sim.world.trace(f"over, {countdown.calls} calls, failed: {countdown.hit}")
        sim.chance = random.Random(number)  # half of the runs end with one more failover
        sim.watched = ["a", "b"]
        await sim.rest()

    kind = " --from-then-on" * sticky
    again = f"--nth-fault {name} --number {number}{kind}"
    outcome.result = run(1, options, keep_log=keep_log, life=life, again=again)
    return outcome


def loop(name: str, *, sticky: bool, every: int = 1) -> Iterator[Outcome]:
    """Every ``every``-th call of a phase fails, in a run of its own, until a run without a fault."""
    number = 1
    while True:
        outcome = fail(name, number, sticky=sticky)
        yield outcome
        if not outcome.hit:
            return
        number += every


# What phases are made of


def begin(sim: Simulation) -> None:
    """From here on calls are counted."""
    sim.world.countdown.armed = True
    for batch in sim.world.oracle.lineage.batches:
        batch.risky = batch.risky or not batch.finished  # it may reach the disk from now on
    sim.world.trace("begin")


async def reached(sim: Simulation, condition: Callable[[], Any], *, supervised: bool = True) -> bool:
    """Whether ``condition`` came true in time."""
    deadline = sim.world.loop.now + PATIENCE_S
    while not condition():
        if sim.world.loop.now > deadline:
            return False
        if supervised:
            sim.supervise()
        await sim.pause(0.05)
    return True


async def without_its_primary(sim: Simulation) -> None:
    """Side a dies with writes on their way; an operator will decide."""
    await born(sim)
    await writes(sim, 5)
    sim.act("guest_write")
    for _ in range(3):
        sim.write()
    sim.kill(sim.primary, 1000)
    sim.watched = ["b"]
    await sim.pause(0.5)


async def take_over(sim: Simulation, target: str) -> None:
    """The operator's command, twice if need be, and its end."""
    for _ in range(2):
        answers: list[Any] = []
        sim.command(sim.secondary, "failover", answers.append, to=target, force=True)
        await reached(sim, lambda answers=answers: answers or sim.leading is sim.b)  # type: ignore[misc]
        if answers and not isinstance(answers[0], TandemDiskError):
            break
    if await reached(sim, lambda: sim.leading is sim.b):
        await reached(sim, sim.write)
    await writes(sim, 2)


# The phases


@phase()
async def start(sim: Simulation) -> None:
    """Both sides for the first time, and the first synchronisation."""
    begin(sim)
    sim.start("b")
    await sim.pause(0.1)
    sim.start("a")
    await reached(sim, sim.protected)


@phase()
async def work(sim: Simulation) -> None:
    """Clients of both sides."""
    await born(sim)
    begin(sim)
    for _ in range(4):
        await writes(sim, 3)
        for name in ("flush", "read", "guest_write", "guest_read"):
            sim.act(name)
    await reached(sim, sim.protected)


@phase()
async def checkpoint(sim: Simulation) -> None:
    """A checkpoint under writes."""
    await born(sim)
    begin(sim)
    await writes(sim, 3)
    sim.checkpoint()
    await writes(sim, 3)
    sim.act("guest_read")
    await reached(sim, sim.protected)


@phase()
async def resync(sim: Simulation) -> None:
    """The secondary was away for longer than the patience, and comes back."""
    await born(sim)
    sim.world.network.set_cut(True, True)
    await sim.pause(4.0)
    await writes(sim, 8)
    begin(sim)
    sim.world.network.set_cut(False, False)
    await reached(sim, lambda: sim.primary is not None and sim.primary.node.engine.state != "alone")
    await writes(sim, 2)
    await reached(sim, sim.protected)


@phase(small_pool=4, blocks=(40,))
async def large_resync(sim: Simulation) -> None:
    """The same, larger than the pool."""
    await born(sim)
    sim.world.network.set_cut(True, True)
    await sim.pause(4.0)
    await writes(sim, 40)
    begin(sim)
    sim.world.network.set_cut(False, False)
    await reached(sim, sim.protected)


@phase(small_pool=4, blocks=(42,))
async def resync_that_spills(sim: Simulation) -> None:
    """The same where the checkpoint outlives it, in the spill file; a guest reads there, and a failover commits it."""
    await born(sim)
    sim.checkpoint()
    sim.world.network.set_cut(True, True)
    await sim.pause(4.0)
    await writes(sim, 20)
    begin(sim)
    sim.world.network.set_cut(False, False)
    for _ in range(60):
        sim.act("guest_read")
        await sim.pause(0.002)
    await reached(sim, sim.protected)


@phase()
async def recovery_of_the_primary(sim: Simulation) -> None:
    """It was killed in the middle of writes, and starts again."""
    await born(sim)
    for _ in range(5):
        sim.write()
    sim.kill(sim.primary, 0.0)
    begin(sim)
    await reached(sim, sim.protected)
    await writes(sim, 2)


@phase()
async def recovery_of_the_secondary(sim: Simulation) -> None:
    """Its host lost its power."""
    await born(sim)
    for _ in range(5):
        sim.write()
    sim.power("b", 0.0)
    begin(sim)
    await writes(sim, 3)
    await reached(sim, sim.protected)


@phase()
async def recovery_of_both(sim: Simulation) -> None:
    """The power of both hosts failed at once."""
    await born(sim)
    for _ in range(5):
        sim.write()
    for side in "ab":
        sim.power(side, 0.0)
    begin(sim)
    await reached(sim, sim.protected)
    await writes(sim, 2)


@phase()
async def stop_and_start(sim: Simulation) -> None:
    """Both sides stop in good order, and start again."""
    await born(sim)
    begin(sim)
    for process in (sim.primary, sim.secondary):
        if process is not None:
            process.lifecycle.stop.set()
    await reached(sim, lambda: sim.primary is None and sim.secondary is None, supervised=False)
    await reached(sim, sim.protected)


@phase()
async def failover_to_latest(sim: Simulation) -> None:
    """Everything that was applied is kept."""
    await without_its_primary(sim)
    begin(sim)
    await take_over(sim, "latest")


@phase()
async def failover_to_checkpoint(sim: Simulation) -> None:
    """The buffer is committed."""
    await without_its_primary(sim)
    begin(sim)
    await take_over(sim, "checkpoint")


@phase()
async def commit_goes_on(sim: Simulation) -> None:
    """The process that took over was killed before its commit, which had met a full disk, was complete."""
    await without_its_primary(sim)
    sim.b.faults.write = 1.0
    sim.failover("checkpoint", force=True)
    await sim.until(lambda: sim.world.oracle.promoted, 10, "a failover under way")
    await sim.pause(0.5)
    sim.kill(sim.b.process("secondary"), 0.0)
    sim.b.faults.write = 0.0
    begin(sim)
    await reached(sim, lambda: sim.leading is sim.b)
    await writes(sim, 2)


@phase()
async def rejoin(sim: Simulation) -> None:
    """The side that was left behind comes back as secondary."""
    await without_its_primary(sim)
    await take_over(sim, "latest")
    sim.watched = ["a", "b"]
    sim.restart_at.clear()
    begin(sim)
    with contextlib.suppress(TandemDiskError):
        sim.rejoin()
    await reached(sim, sim.protected)
    await writes(sim, 2)


@phase()
async def roles_are_swapped(sim: Simulation) -> None:
    """A switchover, and the first writes of the new primary."""
    await born(sim)
    begin(sim)
    with contextlib.suppress(TandemDiskError):
        await switchover(sim)
    await reached(sim, sim.protected)
    await writes(sim, 2)
