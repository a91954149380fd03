"""The operator's commands that compare the two sides or change their roles, step by step as ``deploy/pair.py`` gives
them, and stories about them."""

from __future__ import annotations

from typing import Any

from common.errors import TandemDiskError
from deploy.roles import choose_loser, give_up, judge, lacks_nothing, remembered
from tests.simulation.disk import SECTOR
from tests.simulation.scenarios import born, expect, scenario, told, writes
from tests.simulation.simulator import Simulation


async def verified(sim: Simulation, *, repair: bool = False) -> dict[str, Any]:
    """What a verification finds; it has to get through."""
    answers: list[Any] = []
    sim.command(sim.primary, "verify", answers.append, repair=repair)
    await sim.until(lambda: answers, 60, "the end of a verification")
    expect(not isinstance(answers[0], TandemDiskError), f"refused: {answers[0]}")
    found: dict[str, Any] = answers[0]
    return found


def flip(sim: Simulation, sector: int) -> None:
    """One bit of the secondary disk turns over, and nobody is told."""
    for image in (sim.following.platters[0].contents, sim.following.platters[0].stable):
        image[sector * SECTOR + 100] ^= 4


async def switchover(sim: Simulation) -> bool:
    """Swap the roles: False if the side that follows would not take over; then they are as they were."""
    old, new = sim.leading, sim.following
    role = "primary" if old.process("primary") is not None else "secondary"
    process = old.process(role)
    follower = new.process("secondary")
    if process is None or follower is None:
        return False
    sim.watched = [new.side]
    answers: list[Any] = []
    sim.command(process, "stop", answers.append, checkpoint=True)
    await sim.until(lambda: answers or not process.alive, 90, "an answer to stop")
    process.lifecycle.stop.set()  # SIGTERM, if it would not
    await sim.until(lambda: not process.alive, 90, "the end of a primary that was told to stop")
    if not follower.alive or not lacks_nothing(new.settings, old.settings):
        # a follower that died in the meantime may have lost with its power what it had; its successor knows that, and
        # would refuse
        sim.watched = ["a", "b"]
        return False
    oracle = sim.world.oracle
    inside = oracle.inside(oracle.noted[old.side]) & ~oracle.poisoned & ~oracle.corrupt
    different = oracle.versions(old.platters) != oracle.versions(new.platters)
    expect(not (different & inside).any(), "the side that is to take over lacks something, and is said not to")
    for _ in range(40):  # until it has noticed
        answers.clear()
        sim.command(new.process("secondary"), "failover", answers.append, to="latest", force=False)
        await sim.until(lambda: answers or new.process("secondary") is None, 30, "an answer to failover")
        if not answers or not isinstance(answers[0], TandemDiskError):
            break
        await sim.pause(0.1)
    winner = remembered(new.settings)
    sim.watched = ["a", "b"]
    if not answers or isinstance(answers[0], TandemDiskError) or winner is None or winner.role != "primary":
        return False
    give_up(old.settings, winner.history, in_line=True)
    sim.counts["switchovers"] += 1
    return True


@scenario()
async def a_verification_under_writes_finds_nothing(sim: Simulation) -> None:
    """It asks in the stream, so it cannot be wrong, whatever clients do meanwhile."""
    await born(sim)
    answers: list[Any] = []
    for _ in range(4):
        answers.clear()
        sim.command(sim.primary, "verify", answers.append)
        while not answers:
            sim.write()
            await sim.pause(0.001)
        expect(not isinstance(answers[0], TandemDiskError) and not answers[0]["differing"], f"found {answers[0]}")
    await sim.rest()


@scenario()
async def a_flipped_bit_is_found_and_put_right(sim: Simulation) -> None:
    """Just that block, on the disk where it was flipped."""
    await born(sim)
    flip(sim, 7)
    found = await verified(sim)
    block = sim.options.block_size
    expect(found["extents"] == [["v0", 7 * SECTOR // block * block, block]], f"found {found['extents']}")
    found = await verified(sim, repair=True)
    expect(found["repaired"], "not repaired")
    await sim.until(sim.protected, 30, "a protected pair")
    expect(not (await verified(sim))["differing"], "the repair is not complete")
    expect(sim.a.platters[0].contents == sim.b.platters[0].contents, "the disks differ after the repair")
    await sim.rest()


@scenario(block_size=4096, blocks=(16,))
async def a_bit_that_turns_over_in_a_hole_is_named_alone(sim: Simulation) -> None:
    """Seed 230006826: with blocks of 64 KiB and more the whole hole was named, up to 4 MiB of it."""
    sim.start("b")
    sim.start("a")
    await sim.until(sim.protected, 30, "a protected pair")
    flip(sim, 42)
    found = await verified(sim)
    expect(found["extents"] == [["v0", 42 * SECTOR // 4096 * 4096, 4096]], f"found {found['extents']}")
    await verified(sim, repair=True)
    await sim.rest()


@scenario()
async def differences_that_were_found_outlive_the_primary(sim: Simulation) -> None:
    """A verification without repair leaves them to the next resync: that may be the one after a crash, or a stop."""
    await born(sim)
    for killed in (True, False):
        await sim.pause(25)  # the write-intent bitmap has forgotten what was written
        flip(sim, 7)
        found = (await verified(sim))["extents"]
        expect(len(found) == 1, f"the flipped bit is not found, but {found}")
        assert sim.primary is not None
        if killed:
            sim.kill(sim.primary, 1000)
        else:
            sim.primary.lifecycle.stop.set()
        await sim.until(lambda: sim.primary is None, 30, "the end of the primary")
        sim.start("a")
        await sim.until(sim.protected, 30, "a protected pair")
        expect(not (await verified(sim))["differing"], "the primary forgot what the verification found")
        expect(sim.a.platters[0].contents == sim.b.platters[0].contents, "the disks differ after the resync")
    await sim.rest()


@scenario(blocks=(400,))
async def a_full_resync_that_was_asked_for_outlives_the_primary(sim: Simulation) -> None:
    """Whoever gave the command was not answered; what it had yet to compare is compared all the same."""
    await born(sim)
    await sim.pause(25)  # the write-intent bitmap has forgotten what was written
    flip(sim, 390)
    primary = sim.primary
    assert primary is not None
    sim.b.faults.cold = 1.0
    sim.command(primary, "resync", full=True)
    engine = primary.node.engine
    await sim.until(lambda: engine.status()["resync"]["active"], 30, "a resync")
    sim.kill(primary, 1000)
    sim.b.faults.cold = 0.0
    sim.start("a")
    await sim.until(sim.protected, 60, "a protected pair")
    expect(not (await verified(sim))["differing"], "the bit that turned over is still there")
    await sim.rest()


@scenario()
async def the_roles_are_swapped_and_swapped_back(sim: Simulation) -> None:
    """Nothing is lost, and nothing has to be sent: the side that stopped lacks nothing."""
    await born(sim)
    for _ in range(3):
        await writes(sim, 10)
        taking = sim.following
        expect(await switchover(sim), "the roles were not swapped")
        await sim.until(lambda now=taking: sim.leading is now, 30, "the lead of the other side")  # type: ignore[misc]
        sim.healing = True
        await sim.until(sim.protected, 60, "a protected pair")
        sim.healing = False
        await sim.until(sim.write, 30, "a client of the other side")
        expect(not (await verified(sim))["differing"], "the disks differ after a switchover")
    expect(sim.counts["switchovers"] == 3, "fewer than three switchovers")
    await sim.rest()


@scenario()
async def a_rejoin_is_looked_at_before_it_is_done(sim: Simulation) -> None:
    """The dry run names the side and what it would overwrite, and changes nothing."""
    await born(sim)
    sim.world.network.set_cut(True, True)
    await sim.pause(4)
    await writes(sim, 5)
    answer = await told(sim, "failover", to="latest", force=True)
    expect(not isinstance(answer, TandemDiskError), f"refused: {answer}")
    await sim.until(lambda: sim.leading is sim.b, 30, "the lead of side b")
    before = [host.metadata.stable for host in (sim.a, sim.b)]
    judgement = judge({"primary": sim.a.settings, "secondary": sim.b.settings})
    expect(judgement.split_brain, f"both sides wrote: {judgement.sentence}")
    expect(choose_loser(judgement, "a") == "primary", "the side that is to give up is not the one that was named")
    expect(judgement.standings["primary"].own_bytes > 0, "side a wrote alone, and the dry run says nothing of it")
    expect([host.metadata.stable for host in (sim.a, sim.b)] == before, "a dry run changed something")
    sim.world.network.set_cut(False, False)
    await sim.rest()
    expect(sim.counts["rejoins"] == 1, "nobody had to rejoin")
