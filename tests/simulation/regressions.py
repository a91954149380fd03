"""A story for each bug that the simulation found: it goes wrong without the fix.

A seed's meaning changes with everything that draws random numbers before its bug; a story's does not. The seed in each
docstring is the one that found the bug, on the commits before its fix.
"""

from __future__ import annotations

from common.wire import Resync, Welcome, decode
from tests.simulation.clients import Clients
from tests.simulation.host import Host
from tests.simulation.network import TO_DIALER, TO_LISTENER
from tests.simulation.oracle import Violation
from tests.simulation.processes import Running
from tests.simulation.scenarios import SCENARIOS, born, expect, scenario, told, writes
from tests.simulation.simulator import Simulation

_OLDER = set(SCENARIOS)


async def protected_again(sim: Simulation) -> None:
    """Until both sides are in line, with whatever has to be started for it."""
    healing, sim.healing = sim.healing, True  # which has the supervisor start what should run
    await sim.until(sim.protected, 60, "a protected pair")
    sim.healing = healing


async def takes_over(sim: Simulation, target: str = "latest") -> None:
    """The following side is promoted, and leads."""
    taking = sim.following
    answer = await told(sim, "failover", to=target, force=True)
    expect(not isinstance(answer, Exception), f"refused: {answer}")
    await sim.until(lambda: sim.leading is taking, 30, "the lead of the other side")


async def slowly_taking_over(sim: Simulation) -> Host:
    """The leading side is dead, and the other one, on a slow machine, was told to take over; that one."""
    for role in ("primary", "secondary"):
        sim.kill(sim.leading.process(role), 1000)
    taking = sim.following
    sim.watched = [taking.side]
    await sim.pause(0.5)
    sim.world.loop.slowness = 0.02
    sim.failover("latest", force=True)
    return taking


async def at_the_moment(
    sim: Simulation, condition: object, seconds: float, what: str, *, step_s: float = 0.0005
) -> None:
    """``until``, looking every ``step_s``."""
    assert callable(condition)
    deadline = sim.world.loop.now + seconds
    while not condition():
        if sim.world.loop.now > deadline:
            raise Violation("scenario", f"{what} did not come within {seconds:g} s")
        await sim.pause(step_s)


def generation(sim: Simulation, side: str) -> int:
    """Number of the newest generation in a side's metadata."""
    metadata = sim.world.oracle.metadata(sim.world.hosts[side].metadata)
    return metadata.history[-1].number if metadata is not None and metadata.history else 0


async def rejoined(sim: Simulation) -> None:
    """The side that was left behind follows the one that took over."""
    sim.watched = ["a", "b"]
    sim.healing = True
    sim.restart_at.clear()
    sim.rejoin()
    await sim.until(sim.protected, 120, "a protected pair")
    sim.healing = False


def operator_stops(process: Running | None) -> None:
    """``tandemdisk down``, for one process."""
    assert process is not None
    process.lifecycle.stop.set()


@scenario(small_pool=12, blocks=(40,))
async def free_blocks_belong_to_what_is_acknowledged(sim: Simulation) -> None:
    """Seed 131: old contents are read in the thread, and the acknowledgement meanwhile counted the blocks that this
    had taken already: twice, to the primary. Its credit went below zero, and it put checkpoint barriers for ever."""
    await born(sim)
    sim.world.loop.slowness = 0.01
    sim.b.faults.cold = 1.0
    for _ in range(300):
        sim.write()
        await sim.pause(0.01)
        assert sim.primary is not None
        credit = sim.primary.node.engine.session.statistics().credit_blocks
        expect(credit >= 0, f"the primary has a credit of {credit} blocks")
    sim.b.faults.cold = 0.0
    await sim.rest()


@scenario(loss="block")
async def a_side_that_took_over_waits_for_nobody(sim: Simulation) -> None:
    """Seed 31: on_peer_loss = block, and the promoted side's writes waited for the one that had died."""
    await born(sim)
    sim.kill(sim.primary, 1000)
    sim.watched = ["b"]
    await sim.pause(0.2)
    await takes_over(sim)
    await sim.until(sim.write, 10, "a client of side b")
    acknowledged = sim.world.oracle.acknowledged
    await sim.until(lambda: sim.world.oracle.acknowledged > acknowledged, 5, "an answer of side b")


@scenario()
async def a_region_is_written_to_while_its_bit_is_cleared(sim: Simulation) -> None:
    """Seed 297: the bit of a region that was written to while bits were being cleared went with the others. After a
    crash of the primary nobody knew that the block differs."""
    for life in range(4):
        if life == 0:
            await born(sim)
        assert sim.primary is not None
        guard = sim.primary.node.engine.mirror.guard
        sim.world.loop.slowness = 1.0
        await at_the_moment(sim, lambda guard=guard: not any(any(marks) for marks in guard.marks), 20, "a clearing")
        await writes(sim, 4)
        await at_the_moment(
            sim, lambda guard=guard: any(any(marks) for marks in guard.marks) and not guard._requiring, 20, "marks"
        )
        await sim.pause(1.9)
        sim.world.loop.slowness = 0.002
        sim.world.network.set_cut(True, True)
        await writes(sim, 6)
        sim.kill(sim.primary, 0.1)
        sim.world.network.set_cut(False, False)
        await sim.pause(0.2)
        await protected_again(sim)
        await sim.until(sim.equal, 10, "equal disks")


@scenario()
async def the_export_process_dies_as_it_begins_to_lead(sim: Simulation) -> None:
    """Seed 263: the next export process was never told to lead."""
    await born(sim)
    for life in range(6):
        taking = await slowly_taking_over(sim)
        await at_the_moment(sim, lambda taking=taking: sim.leading is taking, 30, "the lead of the other side")
        await sim.pause(life * 0.008)
        sim.kill(taking.process("export"), 1000)
        sim.world.loop.slowness = 0.002
        await sim.until(lambda: sim.primary is not None and sim.primary.node.engine is not None, 30, "an engine")
        await rejoined(sim)
    await sim.rest()


@scenario()
async def the_export_process_dies_when_it_leads(sim: Simulation) -> None:
    """Seed 263, too: the secondary process wrote metadata over its engine's that were older, without the generation in
    which the engine had gone on alone."""
    await born(sim)
    sim.kill(sim.primary, 1000)
    sim.watched = ["b"]
    await sim.pause(0.5)
    await takes_over(sim)
    await sim.until(sim.write, 30, "a client of the promoted side")
    await rejoined(sim)
    sim.world.network.set_cut(True, True)
    await sim.pause(5.0)
    alone = generation(sim, "b")
    await writes(sim, 5)
    expect(alone == 3, "no generation of its own")
    sim.kill(sim.b.process("export"), 1000)
    await sim.until(lambda: sim.primary is not None and sim.primary.node.engine is not None, 30, "an engine")
    expect(generation(sim, "b") >= alone, "the side went back in its history")
    sim.world.network.set_cut(False, False)
    await sim.rest()


@scenario()
async def the_secondary_is_lost_at_the_end_of_a_resync(sim: Simulation) -> None:
    """Seed 1879: the secondary has taken over the primary's generation, the primary does not hear of it, and goes on
    in that generation without it."""
    await born(sim)
    sim.world.network.set_cut(True, True)
    await sim.pause(5.0)
    await writes(sim, 3)
    expect(generation(sim, "a") == 2, "no generation of its own")
    sim.world.network.set_cut(False, False)
    await at_the_moment(sim, lambda: generation(sim, "b") == 2, 60, "the end of the resync")
    sim.world.network.set_cut(True, True)
    await sim.pause(5.0)
    await writes(sim, 3)
    expect(generation(sim, "a") == 3, "the primary went on in a generation that its secondary has")
    sim.world.network.set_cut(False, False)
    await sim.rest()


@scenario()
async def a_write_comes_while_the_lead_is_handed_over(sim: Simulation) -> None:
    """Found while reading after seed 263: a write between the engine's look at the write-intent bitmap and its
    first own one was in nobody's books, and a rejoining side lacked it."""
    await born(sim)
    for life in range(8):
        await sim.pause(6.0)  # the bits of what was before are cleared
        taking = await slowly_taking_over(sim)
        await at_the_moment(sim, lambda taking=taking: sim.leading is taking, 30, "the lead of the other side")
        await sim.pause(life * 0.005)
        await sim.until(sim.write, 30, "a client of the promoted side")
        await sim.until(lambda: sim.primary is not None and sim.primary.node.engine is not None, 30, "an engine")
        sim.world.loop.slowness = 0.002
        await rejoined(sim)
        await sim.until(sim.equal, 10, "equal disks")
    await sim.rest()


@scenario()
async def the_primary_loses_its_power_after_bits_were_cleared(sim: Simulation) -> None:
    """Seed 913: bits were cleared when the secondary had everything, whether the primary's own disk had it or not."""
    await born(sim)
    for _ in range(3):
        await writes(sim, 10)
        await sim.pause(5.0)
        sim.power("a", 0.5)
        await sim.pause(0.6)
        await protected_again(sim)
    await sim.rest()


@scenario()
async def the_power_fails_after_a_stop_in_good_order(sim: Simulation) -> None:
    """Seed 1041: a clean stop of the primary was noted before its disk was durable."""
    await born(sim)
    for _ in range(3):
        await writes(sim, 10)
        await sim.until(sim.protected, 30, "a protected pair")
        operator_stops(sim.primary)
        await sim.until(lambda: sim.a.process("primary") is None, 30, "the end of the primary")
        sim.power("a", 0.1)
        await sim.pause(0.2)
        await protected_again(sim)
    await sim.rest()


@scenario()
async def the_metadata_disk_fails_while_bits_are_cleared(sim: Simulation) -> None:
    """Seed 1219: that was the end of the primary."""
    await born(sim)
    process = sim.primary
    sim.a.faults.save = 1.0
    for _ in range(8):
        await writes(sim, 3)
        await sim.pause(1.0)
    sim.a.faults.save = 0.0
    expect(process is not None and process.alive, "the primary ended")
    await sim.rest()


@scenario()
async def a_failover_that_cannot_be_noted(sim: Simulation) -> None:
    """Seeds 3261, 4298: the promotion could not be made durable, and the secondary stayed deaf to its primary, while
    it answered its pings."""
    await born(sim)
    sim.b.faults.save = 1.0
    answer = await told(sim, "failover", to="latest", force=True)
    expect(isinstance(answer, Exception), "a promotion that is nowhere noted")
    sim.b.faults.save = 0.0
    await writes(sim, 3)
    await protected_again(sim)
    expect(generation(sim, "b") == generation(sim, "a"), "the generations differ")
    await writes(sim, 10)
    await sim.rest()


@scenario()
async def a_failover_is_repeated_until_it_can_be_noted(sim: Simulation) -> None:
    """The same, with an operator who goes on trying: the second attempt comes in the middle of the retreat."""
    await born(sim)
    sim.b.faults.save = 1.0
    sim.kill(sim.primary, 1000)
    sim.watched = ["b"]
    for target in ("checkpoint", "latest"):
        answer = await told(sim, "failover", to=target, force=True)
        expect(isinstance(answer, Exception), "a promotion that is nowhere noted")
    sim.b.faults.save = 0.0
    await takes_over(sim)
    await sim.until(sim.write, 10, "a client of side b")
    sim.start("a")
    await sim.pause(4.0)
    expect(sim.a.process("primary") is None, "the former primary was not turned away")
    await rejoined(sim)
    await sim.rest()


@scenario()
async def a_primary_comes_while_its_secondary_takes_over(sim: Simulation) -> None:
    """Seed 3572: between the decision and its being durable a primary was let in, and moved the place in the stream
    that the promotion is to begin at."""
    await born(sim)
    sim.kill(sim.primary, 1000)
    await sim.pause(0.2)
    before = sim.b.process("secondary").node.session.point()  # type: ignore[union-attr]
    sim.start("a")
    await sim.pause(0.0005)
    sim.world.loop.slowness = 1.0
    sim.failover("latest", force=True)
    await sim.until(lambda: sim.leading is sim.b, 30, "the lead of side b")
    metadata = sim.world.oracle.metadata(sim.b.metadata)
    assert metadata is not None
    expect(dict(metadata.bases).get(before.stream) == before.sequence, f"it begins at {metadata.bases}")
    sim.world.loop.slowness = 0.002
    await sim.rest()


@scenario()
async def a_reader_dies_in_the_middle_of_its_read(sim: Simulation) -> None:
    """Seed 2940: its request was ended by nobody, and the secondary waited for it."""
    await born(sim)
    sim.healing = True  # the secondary may die as well, and is started again
    for _ in range(5):
        while sim.export is None or not sim.export.lifecycle.is_ready:
            sim.supervise()  # it may have been the secondary process that died
            await sim.pause(0.05)
        sim.clients.slow_read(sim.export, 0.01)
        sim.b.faults.kill = 1.0
        await sim.pause(0.011)
        sim.b.faults.kill = 0.0
        sim.checkpoint()
        await writes(sim, 20)
    await sim.rest()


@scenario(block_size=4096, blocks=(40,), small_pool=3)
async def every_thread_is_slow(sim: Simulation) -> None:
    """Seed 4839: many writes, each of them after the one before it: all are answered in the end."""
    await born(sim)
    sim.world.loop.slowness = 0.5
    sim.a.faults.cold = sim.b.faults.cold = 1.0
    for _ in range(300):
        sim.write()
        await sim.pause(0.001)
    await sim.rest()


@scenario()
async def the_guest_asks_before_a_failover_and_hears_after_it(sim: Simulation) -> None:
    """Seed 1738: a cold read of the guest, begun on the secondary, is answered by a side that leads."""
    await born(sim)
    sim.kill(sim.primary, 1000)
    sim.watched = ["b"]
    sim.b.faults.cold = 1.0
    await sim.pause(0.2)
    sim.failover("latest", force=True)
    clients: Clients = sim.clients
    while sim.leading is sim.a:
        sim.world.loop.slowness = 2.0
        assert sim.export is not None
        clients.guest_read(sim.export)
        sim.world.loop.slowness = 0.002
        await sim.pause(0.001)
    await sim.until(sim.write, 10, "a client of side b")
    await writes(sim, 5)
    await sim.pause(3.0)


@scenario()
async def a_commit_whose_blocks_cannot_be_noted(sim: Simulation) -> None:
    """n-th fault, failover_to_checkpoint: side b had taken over durably, and could not mark in its write-intent file
    what the commit moves. No commit began, and the failover could not be repeated: it had been done already."""
    await born(sim)
    await writes(sim, 10)
    sim.kill(sim.primary, 1000)
    sim.watched = ["b"]
    await sim.pause(0.2)
    sim.failover("checkpoint", force=True)
    await at_the_moment(sim, lambda: generation(sim, "b") == 2, 10, "the promotion")
    sim.b.faults.intents = 1.0
    await sim.pause(1.0)
    sim.b.faults.intents = 0.0
    answer = await told(sim, "failover", to="checkpoint")
    expect(not isinstance(answer, Exception), f"refused: {answer}")
    await sim.until(lambda: sim.leading is sim.b, 30, "the lead of side b")
    sim.watched = ["a", "b"]


@scenario()
async def the_guest_writes_while_a_failover_is_noted(sim: Simulation) -> None:
    """Seeds 7922, 8634, 10595, 14275: there were no writes of the guest when a failover to latest was decided, there
    were when it was durable, and then it was refused: a side that was neither the one nor the other."""
    await born(sim)
    sim.checkpoint()
    await sim.pause(0.1)
    sim.kill(sim.primary, 1000)
    sim.watched = ["b"]
    await sim.pause(0.2)
    sim.world.loop.slowness = 0.05
    answers: list[object] = []
    sim.command(sim.secondary, "failover", answers.append, to="latest")
    for _ in range(100):
        await sim.pause(0.003)
        if sim.export is not None:
            sim.clients.guest_write(sim.export)
    await sim.until(lambda: answers, 30, "an answer to the failover")
    if isinstance(answers[0], Exception):
        expect(generation(sim, "b") == 1, "refused, and noted")
        await takes_over(sim, "checkpoint")
    await sim.until(lambda: sim.leading is sim.b, 30, "the lead of side b")
    await sim.until(sim.write, 10, "a client of side b")
    await sim.pause(2.0)


@scenario()
async def the_welcome_gets_lost(sim: Simulation) -> None:
    """Seeds 7640, 8091: the secondary was in session, the primary was not, and each took the other's signs of life for
    a reason to wait."""
    await born(sim)
    await sim.pause(5.0)  # all is recorded, or the news of that would end the session
    network = sim.world.network
    sim.kill(sim.primary, 1000)
    await sim.pause(0.2)
    sim.start("a")
    lost = 0
    for _ in range(3000):
        for queue in (connection.queues[TO_DIALER] for connection in network.connections):
            for item in [item for item in queue if isinstance(decode(item[1]), Welcome)]:
                queue.remove(item)
                lost += 1
        await sim.pause(0.0001)
    expect(lost, "nobody was welcomed")
    await protected_again(sim)
    await sim.rest()


@scenario()
async def a_refusal_comes_while_the_primary_starts(sim: Simulation) -> None:
    """Seed 11281: between the greeting and the first client the other side was promoted, and the primary served its
    clients alone, in a generation that both had."""
    await born(sim)
    sim.kill(sim.primary, 1000)
    await sim.pause(0.2)
    sim.world.loop.slowness = 2.0
    sim.start("a")
    process = sim.a.process("primary")
    assert process is not None
    await at_the_moment(sim, lambda: process.node is not None and process.node.engine.state == "syncing", 10, "a start",
                        step_s=0.0001)  # fmt: skip
    sim.world.loop.slowness = 0.002  # what the primary is about to note takes its time; all else does not
    sim.failover("checkpoint", force=True)
    for _ in range(500):
        if process.alive:
            sim.clients.write(process)
        await sim.pause(0.01)
    fenced = process.alive and process.node.engine.state == "fenced"  # it had begun to serve
    expect(fenced or not process.alive, "a primary that was refused serves clients")
    await sim.rest()


@scenario()
async def a_disk_that_lost_writes_is_stopped_in_good_order(sim: Simulation) -> None:
    """Seed 14802: and was noted as clean, at a point that it did not hold; its next process believed that."""
    await born(sim)
    sim.b.faults.flush = 1.0
    for _ in range(5):
        await writes(sim, 3)
        sim.act("flush")
        await sim.pause(0.05)
    sim.b.faults.flush = 0.0
    sim.world.network.set_cut(True, True)
    position = sim.b.process("secondary").node.session.position  # type: ignore[union-attr]
    expect(not position.exact, "no flush has failed")
    operator_stops(sim.b.process("secondary"))
    await sim.until(lambda: sim.b.process("secondary") is None, 30, "the end of the secondary")
    metadata = sim.world.oracle.metadata(sim.b.metadata)
    assert metadata is not None
    expect(not metadata.clean, "a disk that lost writes is noted as clean")
    sim.start("b")
    await sim.pause(1.0)
    answer = await told(sim, "failover", to="latest", force=True)
    expect(isinstance(answer, Exception), "a disk that lost writes took over")
    sim.world.network.set_cut(False, False)
    await sim.rest()


@scenario()
async def a_secondary_dies_before_it_hears_of_a_failed_flush(sim: Simulation) -> None:
    """Seed 30257: the next process believed a disk that had lost writes, and the pair was called protected for good."""
    await born(sim)
    await writes(sim, 10)
    sim.world.loop.slowness = 0.5
    sim.b.faults.flush = 1.0
    sim.act("flush")
    await at_the_moment(sim, lambda: sim.world.oracle.forgotten, 10, "a flush that fails")
    sim.b.faults.flush = 0.0
    sim.world.loop.slowness = 0.002
    sim.kill(sim.b.process("secondary"), 0.2)
    await sim.pause(0.3)
    await sim.rest()


@scenario()
async def a_resync_begins_while_a_failover_is_decided(sim: Simulation) -> None:
    """Seed 60950: the decision fell before the resync began, and what took over was a mixture of two times."""
    await born(sim)
    sim.world.network.set_cut(True, True)
    await sim.pause(5.0)
    await writes(sim, 10)
    sim.world.network.set_cut(False, False)
    node = sim.b.process("secondary").node  # type: ignore[union-attr]
    await at_the_moment(sim, lambda: node.session.connected, 30, "a session")
    sim.world.loop.slowness = 0.1
    await at_the_moment(sim, lambda: node.applier._busy, 30, "the beginning of a resync", step_s=0.0001)
    answer = await told(sim, "failover", to="latest", force=True)
    sim.world.loop.slowness = 0.002
    expect(isinstance(answer, Exception), "a disk in the middle of a resync took over")
    await sim.rest()


@scenario()
async def the_power_fails_behind_a_failover(sim: Simulation) -> None:
    """Seed 60509: the side that had taken over lost what its former primary, stopped in good order, still had, and
    nobody knew where they differed."""
    await born(sim)
    operator_stops(sim.primary)
    await sim.until(lambda: sim.a.process("primary") is None, 30, "the end of the primary")
    sim.watched = ["b"]
    await takes_over(sim)
    sim.power("b", 0.1)
    await sim.pause(0.5)
    await rejoined(sim)
    await sim.rest()


@scenario(loss="block")
async def the_primary_disk_fails_during_a_resync(sim: Simulation) -> None:
    """Seeds 13263, 15040, 65253: on_peer_loss = block, and the primary disk could not be read for a piece. The stream
    went on in the middle of the resync, and nobody sent the rest of it."""
    await born(sim)
    sim.kill(sim.secondary, 1000)
    sim.power("b", 1000)
    await sim.pause(0.2)
    sim.a.faults.read = 1.0
    sim.start("b")
    assert sim.primary is not None
    engine = sim.primary.node.engine
    await at_the_moment(sim, lambda: engine.state == "blocked", 30, "a read that failed", step_s=0.0001)
    sim.a.faults.read = 0.0
    await sim.rest()


@scenario(loss="block")
async def a_write_waits_for_a_secondary_that_took_over(sim: Simulation) -> None:
    """Seed 11734: on_peer_loss = block, and what was on its way when the other side took over was never answered."""
    await born(sim)
    sim.world.network.set_cut(True, True)
    await sim.pause(0.01)
    await sim.until(sim.write, 10, "a client of side a")
    expect(sim.clients.outstanding, "a write was acknowledged alone")
    await sim.pause(4.0)
    await takes_over(sim)
    sim.world.network.set_cut(False, False)
    await sim.until(lambda: not sim.clients.outstanding, 30, "an answer of the side that was left behind")
    await sim.rest()


@scenario()
async def the_beginning_of_a_resync_gets_lost(sim: Simulation) -> None:
    """Seed 14402: a secondary that was told nothing but RESYNC did not miss it, and both waited for ever."""
    await born(sim)
    sim.power("b", 0.1)
    await sim.pause(0.2)
    lost = 0
    for _ in range(80000):
        sim.supervise()
        for queue in (connection.queues[TO_LISTENER] for connection in sim.world.network.connections):
            for item in [item for item in queue if isinstance(decode(item[1]), Resync)]:
                queue.remove(item)
                lost += 1
        if lost:
            break
        await sim.pause(0.0001)
    expect(lost, "no resync began")
    await protected_again(sim)
    await sim.rest()


@scenario(interval_s=0.02)
async def the_power_fails_before_a_start_is_noted(sim: Simulation) -> None:
    """Seed 64866: a checkpoint by itself went out before, and the next process was refused as an older copy."""
    await born(sim)
    for life in range(6):
        operator_stops(sim.primary)
        await sim.until(lambda: sim.a.process("primary") is None, 30, "the end of the primary")
        sim.world.loop.slowness = 2.0
        sim.start("a")
        await at_the_moment(sim, lambda: "primary protected" in sim.standing(), 30, "a start", step_s=0.0001)
        sim.world.loop.slowness = 0.002
        await sim.pause(0.03 + 0.03 * life)
        sim.power("a", 0.1)
        await sim.pause(0.3)
        await protected_again(sim)
    await sim.rest()


REGRESSIONS = [name for name in SCENARIOS if name not in _OLDER]
