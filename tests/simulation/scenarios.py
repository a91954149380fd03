"""Named stories, told on the simulator: each says what happens, in order, and what has to be true in the end.

    @scenario
    async def a_cut_cable(sim): ...

``tell(name)`` runs one. Whatever a story does, the checks of every step go on, and it ends with ``rest`` unless it
says otherwise.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from common.errors import NeedsForce, OperationFailed, TandemDiskError
from secondary.header import Stage
from tests.simulation.options import Options
from tests.simulation.oracle import Violation
from tests.simulation.runner import Result, run
from tests.simulation.simulator import Simulation

Story = Callable[[Simulation], Awaitable[None]]

SCENARIOS: dict[str, tuple[Story, Options]] = {}
CALM = Options(blocks=(24, 16), guest=True, steps=1)


def scenario(**options: Any) -> Callable[[Story], Story]:
    """Register a story; ``options`` differ from ``CALM``."""

    def register(story: Story) -> Story:
        SCENARIOS[story.__name__] = story, replace(CALM, **options)
        return story

    return register


def tell(name: str, seed: int = 1) -> Result:
    """Run the story called ``name``."""
    story, options = SCENARIOS[name]
    return run(seed, options, life=story, again=f"--scenario {name}")


# What stories are made of


async def born(sim: Simulation) -> None:
    """A protected pair with a few writes in it."""
    sim.start("b")
    await sim.pause(0.1)
    sim.start("a")
    await sim.until(sim.protected, 30, "a protected pair")
    await writes(sim, 20)


async def writes(sim: Simulation, count: int) -> None:
    """``count`` batches of a client, a few milliseconds apart."""
    for _ in range(count):
        sim.write()
        await sim.pause(0.004)


async def told(sim: Simulation, name: str, **args: Any) -> Any:
    """What a command answers; its error, if it is one."""
    answers: list[Any] = []
    sim.command(sim.primary if name == "checkpoint" else sim.secondary, name, answers.append, **args)
    await sim.until(lambda: answers, 90, f"an answer to {name}")
    return answers[0]


def expect(condition: object, sentence: str) -> None:
    """The moral of a story."""
    if not condition:
        raise Violation("scenario", sentence)


def moved(sim: Simulation) -> int:
    """Bytes that resyncs of the leading primary have moved."""
    assert sim.primary is not None
    return int(sim.primary.node.engine.status()["counters"]["resync_moved_bytes"])


# The stories


@scenario()
async def a_quiet_life(sim: Simulation) -> None:
    """Writes, checkpoints, a guest that looks on."""
    await born(sim)
    for _ in range(5):
        await writes(sim, 10)
        sim.checkpoint()
        sim.act("guest_read")
        await sim.pause(0.05)
    await sim.rest()


@scenario()
async def a_short_cut_resynchronises_nothing(sim: Simulation) -> None:
    """The connection breaks while writes are in flight: the window is replayed, no bitmap is touched."""
    await born(sim)
    before = moved(sim)
    for _ in range(5):
        sim.write()
        sim.world.network.break_all()
        await writes(sim, 3)
        await sim.until(sim.protected, 30, "a session that goes on")
    expect(moved(sim) == before, "a short cut moved bytes by resync")
    await sim.rest()


@scenario()
async def a_cable_that_flaps(sim: Simulation) -> None:
    """It comes and goes, often for less than a handshake takes. Nothing is asked twice, nobody gives up: when it stays,
    the pair is in line within the time that a patient supervisor gives it."""
    await born(sim)
    sim.world.network.manners.delay_s = 0.02
    for number in range(60):
        sim.world.network.set_cut(True, number % 3 != 1)
        await writes(sim, 1 + number % 7)
        await sim.pause(0.01 + 0.29 * sim.chance.random())
        if number % 2:
            sim.world.network.break_all()
        sim.world.network.set_cut(False, False)
        await sim.pause((0.01, 0.06, 0.15)[number % 3])
    ends = [process.name for process in sim.world.ends if not process.alive]
    expect(not ends, f"processes ended over it: {ends}")
    await sim.until(sim.protected, 15, "a protected pair on a cable that stays")
    await sim.rest()


@scenario()
async def the_secondary_is_away_for_long(sim: Simulation) -> None:
    """Cut for longer than the patience: the primary goes on alone, in a generation of its own, and resynchronises
    only what it wrote."""
    await born(sim)
    before = moved(sim)
    sim.world.network.set_cut(True, True)
    await sim.pause(5.0)
    generation = sim.world.oracle.metadata(sim.a.metadata)
    await writes(sim, 2)
    expect(generation is not None and len(generation.history) == 2, "no generation of its own")
    sim.world.network.set_cut(False, False)
    await sim.until(sim.protected, 60, "a protected pair")
    size = sum(sim.world.sizes)
    expect(moved(sim) - before < size // 2, "much more was moved than was written")
    await sim.rest()


@scenario(loss="block")
async def writers_wait_for_the_secondary(sim: Simulation) -> None:
    """on_peer_loss = block: nobody is answered alone."""
    await born(sim)
    sim.world.network.set_cut(True, True)
    await sim.pause(0.01)
    sim.write()
    acknowledged = sim.world.oracle.acknowledged
    await sim.pause(20)
    expect(sim.world.oracle.acknowledged == acknowledged, "a write was acknowledged alone")
    sim.world.network.set_cut(False, False)
    await sim.rest()


@scenario()
async def the_secondary_is_killed_and_comes_back(sim: Simulation) -> None:
    """Its buffer and its place in the stream survive it: a replay, no resync."""
    await born(sim)
    before = moved(sim)
    sim.write()
    sim.kill(sim.secondary, 0.5)
    await sim.pause(0.6)
    sim.supervise()
    await sim.until(sim.protected, 30, "a protected pair")
    expect(moved(sim) == before, "a restart of the secondary moved bytes by resync")
    await sim.rest()


@scenario()
async def the_power_of_the_secondary_fails(sim: Simulation) -> None:
    """What it had not made durable is sent again, and its checkpoint is a new one."""
    await born(sim)
    sim.power("b", 1.0)
    await sim.pause(1.1)
    sim.supervise()
    await sim.rest()


@scenario()
async def the_primary_is_killed(sim: Simulation) -> None:
    """Its write-intent bitmap says where it may have written what the secondary lacks."""
    await born(sim)
    await writes(sim, 5)
    sim.kill(sim.primary, 0.5)
    await sim.pause(0.6)
    sim.supervise()
    await sim.rest()


@scenario()
async def failover_to_latest_loses_nothing(sim: Simulation) -> None:
    """The primary dies in the middle of its writes; all that were acknowledged are on the other side."""
    await born(sim)
    for _ in range(10):
        sim.write()
    sim.kill(sim.primary, 1000)
    await sim.pause(0.2)
    sim.watched = ["b"]
    answer = await told(sim, "failover", to="latest", force=True)
    expect(not isinstance(answer, TandemDiskError), f"refused: {answer}")
    await sim.until(lambda: sim.leading is sim.b, 10, "the lead of side b")
    await sim.until(sim.write, 10, "a client of side b")


@scenario()
async def failover_to_the_checkpoint_goes_back(sim: Simulation) -> None:
    """Writes after the checkpoint are not there any more; the guest's own are."""
    await born(sim)
    sim.checkpoint()
    await sim.pause(0.1)
    await writes(sim, 10)
    assert sim.export is not None
    sim.clients.guest_write(sim.export)
    sim.kill(sim.primary, 1000)
    sim.watched = ["b"]
    await sim.pause(0.2)
    answer = await told(sim, "failover", to="checkpoint", force=True)
    expect(not isinstance(answer, TandemDiskError), f"refused: {answer}")
    await sim.until(lambda: sim.leading is sim.b, 10, "the lead of side b")


@scenario()
async def the_commit_is_interrupted(sim: Simulation) -> None:
    """Killed during the commit of a failover: it is finished by the next process."""
    await born(sim)
    await writes(sim, 20)
    sim.kill(sim.primary, 1000)
    sim.watched = ["b"]
    await sim.pause(0.2)
    sim.failover("checkpoint", force=True)
    await sim.until(lambda: sim.world.oracle.promoted or sim.leading is sim.b, 10, "a failover under way")
    for _ in range(3):
        sim.b.faults.kill = 0.3
        await sim.pause(0.05)
        sim.b.faults.kill = 0.0
        sim.kill(sim.b.process("secondary"), 0.1)
        await sim.pause(0.2)
        sim.supervise()
    sim.healing = True
    await sim.until(lambda: sim.leading is sim.b, 60, "the lead of side b")


@scenario()
async def the_commit_meets_a_full_disk(sim: Simulation) -> None:
    """FAILOVER_FAILED: everything can still be read; the failover is repeated when the disk is put right."""
    await born(sim)
    await writes(sim, 20)
    sim.kill(sim.primary, 1000)
    sim.watched = ["b"]
    await sim.pause(0.2)
    sim.b.faults.write, sim.b.faults.code = 1.0, 28
    sim.failover("checkpoint", force=True)
    await sim.pause(0.5)
    secondary = sim.b.process("secondary")
    assert secondary is not None
    expect(secondary.node.buffer.header.stage is Stage.FAILOVER_FAILED, "the commit did not fail")
    for _ in range(10):
        sim.act("guest_read")
        await sim.pause(0.01)
    sim.b.faults.write = 0.0
    sim.failover("checkpoint")
    await sim.until(lambda: sim.leading is sim.b, 30, "the lead of side b")


@scenario()
async def a_primary_that_lives_is_not_taken_over(sim: Simulation) -> None:
    """A failover without force is refused while the primary is connected; with force the primary fences itself."""
    await born(sim)
    answer = await told(sim, "failover", to="latest", force=False)
    expect(isinstance(answer, NeedsForce), f"not refused: {answer}")
    answer = await told(sim, "failover", to="latest", force=True)
    expect(not isinstance(answer, TandemDiskError), f"refused: {answer}")
    await sim.until(lambda: sim.leading is sim.b, 30, "the lead of side b")
    await sim.pause(5)
    await sim.rest()


@scenario()
async def no_checkpoint_before_the_first_synchronisation(sim: Simulation) -> None:
    """A secondary that never was complete cannot take over."""
    sim.start("b")
    await sim.pause(0.5)
    for target in ("latest", "checkpoint"):
        answer = await told(sim, "failover", to=target, force=True)
        expect(isinstance(answer, OperationFailed), f"{target} was not refused: {answer}")
    sim.start("a")
    await sim.rest()


@scenario()
async def there_and_back_again(sim: Simulation) -> None:
    """Failover, rejoin, and failover back; every time all that was acknowledged is there."""
    await born(sim)
    for _ in range(2):
        taking = sim.following
        for role in ("primary", "secondary"):
            sim.kill(sim.leading.process(role), 1000)
        sim.watched = [taking.side]
        await sim.pause(0.5)
        answer = await told(sim, "failover", to="latest", force=True)
        expect(not isinstance(answer, TandemDiskError), f"refused: {answer}")
        await sim.until(lambda now=taking: sim.leading is now, 30, "the lead of the other side")  # type: ignore[misc]
        await sim.until(sim.write, 30, "a client of the other side")
        await writes(sim, 10)
        sim.watched = ["a", "b"]
        sim.healing = True
        sim.restart_at.clear()
        sim.rejoin()
        await sim.until(sim.protected, 120, "a protected pair")
        sim.healing = False
    await sim.rest()


@scenario()
async def a_partition_and_two_writers(sim: Simulation) -> None:
    """Both sides write while they cannot see each other: each in its own generation, and one of them has to give up."""
    await born(sim)
    sim.world.network.set_cut(True, True)
    await sim.pause(4)
    await writes(sim, 5)
    answer = await told(sim, "failover", to="latest", force=True)
    expect(not isinstance(answer, TandemDiskError), f"refused: {answer}")
    await sim.until(lambda: sim.leading is sim.b, 30, "the lead of side b")
    await writes(sim, 5)
    sim.world.network.set_cut(False, False)
    await sim.pause(12)
    await sim.rest()
    expect(sim.counts["rejoins"] == 1, "nobody had to rejoin")


@scenario()
async def a_hung_secondary_is_left_behind(sim: Simulation) -> None:
    """SIGSTOP for longer than the patience, then SIGCONT: it finds out that it was left."""
    await born(sim)
    process = sim.secondary
    assert process is not None
    process.stopped = True
    await writes(sim, 3)
    await sim.pause(4)
    await writes(sim, 3)
    sim.world.loop.resume(process)
    await sim.rest()


@scenario(small_pool=6, blocks=(40,))
async def a_pool_that_is_too_small(sim: Simulation) -> None:
    """More is written between two checkpoints than the hidden disk holds: checkpoints come by themselves, nothing is
    dropped."""
    await born(sim)
    await writes(sim, 100)
    expect(sim.world.oracle.checkpoint_count > 5, "no checkpoints by themselves")
    await sim.rest()


@scenario(small_pool=4, blocks=(40,))
async def a_resync_larger_than_the_pool(sim: Simulation) -> None:
    """The checkpoint cannot be kept; it is given up rather than the resync."""
    await born(sim)
    sim.world.network.set_cut(True, True)
    await sim.pause(4)
    await writes(sim, 60)
    sim.world.network.set_cut(False, False)
    await sim.rest()


@scenario()
async def a_flush_of_the_secondary_fails(sim: Simulation) -> None:
    """What its kernel forgot is sent again."""
    await born(sim)
    sim.b.faults.flush = 1.0
    for _ in range(20):
        sim.write()
        sim.act("flush")
        await sim.pause(0.1)
    sim.b.faults.flush = 0.0
    await sim.rest()


@scenario()
async def rubbish_on_the_wire(sim: Simulation) -> None:
    """Damaged, cut, repeated, lost and strange messages end sessions, and nothing else."""
    await born(sim)
    manners = sim.world.network.manners
    manners.damage = manners.cut_short = manners.repeat = manners.lose = manners.junk = 0.05
    manners.stale = 0.5
    await writes(sim, 200)
    await sim.rest()


@scenario()
async def the_metadata_disk_fails(sim: Simulation) -> None:
    """The primary cannot note that it goes on alone: it does not go on."""
    await born(sim)
    sim.a.faults.save = 1.0
    sim.world.network.set_cut(True, True)
    await writes(sim, 3)
    await sim.pause(6)
    sim.a.faults.save = 0.0
    sim.world.network.set_cut(False, False)
    sim.supervise()
    await sim.rest()


@scenario(small_pool=3, blocks=(40,))
async def a_batch_of_the_guest_does_not_fit(sim: Simulation) -> None:
    """Seed 71036: a part of it was done, and seen, before the thread did it as a whole."""
    await born(sim)
    sim.world.loop.slowness, sim.b.faults.cold = 0.05, 0.3
    for count in range(400):
        assert sim.export is not None
        sim.clients.guest_write(sim.export)
        for _ in range(8):
            sim.clients.guest_read(sim.export)
        if count % 5 == 0:
            sim.checkpoint()
        await sim.pause(0.06)
    sim.world.loop.slowness, sim.b.faults.cold = 0.002, 0.0
    await sim.rest()
