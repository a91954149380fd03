"""Stories, as in ``regressions``, of disks that fail and of processes that die in the middle of their work on them."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import Any

from common.errors import NeedsForce, OperationFailed
from common.intent import INTENT_FILE
from deploy.roles import accept_disks
from primary.resync import ResyncPlan
from secondary.applier import NOWHERE
from secondary.header import PairHeader
from secondary.session import BeginResync, EndResync
from tests.simulation.commands import flip, switchover, verified
from tests.simulation.regressions import REGRESSIONS, at_the_moment, generation, operator_stops, protected_again
from tests.simulation.scenarios import SCENARIOS, born, expect, scenario, told, writes
from tests.simulation.simulator import Simulation
from tests.simulation.swarm import Copy

_OLDER = set(SCENARIOS)


@scenario(blocks=(16,), small_pool=12, troubles=frozenset({"kill_inside"}))
async def the_secondary_dies_in_the_middle_of_a_batch(sim: Simulation) -> None:
    """Seed 108439: the next one told its primary of less room in the hidden disk than there had been before the batch
    that it was killed in. The primary put a checkpoint before that batch, and half of it became part of that."""
    await born(sim)
    for _ in range(40):
        sim.b.faults.kill = 0.1
        for _ in range(6):
            sim.write()
        await sim.pause(0.01)
        sim.b.faults.kill = 0.0
        await protected_again(sim)
    await sim.rest()


@scenario(blocks=(16,), small_pool=12, loss="block", troubles=frozenset({"disk_secondary"}))
async def the_secondary_disk_fails_in_the_middle_of_a_batch(sim: Simulation) -> None:
    """Seed 111510: the same without a death."""
    await born(sim)
    for _ in range(40):
        sim.b.faults.write = 0.3
        for _ in range(6):
            sim.write()
        await sim.pause(0.01)
        sim.b.faults.write = 0.0
        await protected_again(sim)
    await sim.rest()


@scenario()
async def a_checkpoint_comes_right_behind_a_failed_flush(sim: Simulation) -> None:
    """Seed 109708: the flush had failed in the thread, the loop had not heard of it, and took a checkpoint of a disk
    that had lost writes."""
    await born(sim)
    for _ in range(5):
        await writes(sim, 10)
        sim.world.loop.slowness = 0.5
        sim.b.faults.flush = 1.0
        sim.act("flush")
        await at_the_moment(sim, lambda: sim.world.oracle.forgotten, 10, "a flush that fails")
        sim.b.faults.flush = 0.0
        sim.checkpoint()
        await sim.pause(0.01)
        sim.world.loop.slowness = 0.002
        await protected_again(sim)
    await sim.rest()


@scenario()
async def a_failover_comes_right_behind_a_failed_flush(sim: Simulation) -> None:
    """Seed 65187: the flush of the promotion itself found nothing left to complain of, and the side led with a disk
    that had lost writes. First a flush that a client asked for, then the secondary's own."""
    await born(sim)
    for asked_for in (True, False):
        await writes(sim, 10)
        sim.world.loop.slowness = 0.5
        sim.b.faults.flush = 1.0
        if asked_for:
            sim.act("flush")
        await at_the_moment(sim, lambda: sim.world.oracle.forgotten, 10, "a flush that fails")
        sim.b.faults.flush = 0.0
        answer = await told(sim, "failover", to="latest", force=True)
        expect(isinstance(answer, Exception), "a disk that lost writes took over")
        sim.world.loop.slowness = 0.002
        await protected_again(sim)
    await sim.rest()


async def a_flush_of_the_primary_fails(sim: Simulation) -> None:
    await protected_again(sim)
    await writes(sim, 5)
    sim.leading.faults.flush = 1.0
    sim.act("flush")
    assert sim.primary is not None
    knowledge = sim.primary.node.engine.knowledge
    await sim.until(lambda: knowledge.lost_writes, 10, "a flush that fails")
    sim.leading.faults.flush = 0.0
    await writes(sim, 2)
    await sim.pause(11.0)  # bits would be cleared
    await protected_again(sim)


@scenario()
async def the_primary_disk_loses_writes(sim: Simulation) -> None:
    """By reading: a flush failed, the next one had nothing to complain of, and the stop counted as one of a disk that
    has everything; after a kill its contents won over those of the secondary, which alone has what was lost."""
    await born(sim)
    for manner in ("stop", "kill"):
        await a_flush_of_the_primary_fails(sim)
        marked = sim.primary.node.engine.mirror.guard.file.ranges()  # type: ignore[union-attr]
        expect(marked, "the write-intent bitmap was cleared")
        sim.watched = []
        if manner == "stop":
            operator_stops(sim.primary)
            await sim.until(lambda: sim.primary is None, 30, "the end of the primary")
        else:
            sim.kill(sim.primary, 1000)
        refused = sim.start("a")
        await sim.until(lambda now=refused: not now.alive, 10, "a refusal")  # type: ignore[misc]
        expect(isinstance(refused.error, NeedsForce), f"it ended with {refused.error!r}")
        sim.watched = ["a", "b"]
        sim.restart_at.clear()
    await a_flush_of_the_primary_fails(sim)
    answer: list[Any] = []
    sim.command(sim.primary, "clear_error", answer.append)
    await sim.until(lambda: answer, 10, "an answer to clear_error")
    sim.kill(sim.primary, 0.1)
    accepted = sim.counts["disks accepted"]
    await protected_again(sim)
    expect(sim.counts["disks accepted"] == accepted == 2, "an operator's word is forgotten")
    await sim.rest()


@scenario()
async def the_roles_are_swapped_since_the_primary_disk_lost_writes(sim: Simulation) -> None:
    """As README advises: the side that lost writes follows, and is compared as a whole."""
    await born(sim)
    await a_flush_of_the_primary_fails(sim)
    expect(await switchover(sim), "the roles are not swapped")
    flip(sim, 7)
    await protected_again(sim)
    expect(not (await verified(sim))["differing"], "what was lost stayed lost")
    await sim.rest()


@scenario()
async def a_failover_to_the_checkpoint_comes_behind_a_failed_flush(sim: Simulation) -> None:
    """By reading: what was lost may have been written before the checkpoint, whose buffer does not hold it. A flush
    that failed before, and the one of the failover itself."""
    await born(sim)
    for before in (True, False):
        await protected_again(sim)
        await writes(sim, 10)
        sim.checkpoint()
        await sim.pause(0.5)
        await writes(sim, 3)
        sim.world.network.set_cut(True, True)
        await sim.pause(6.0)
        sim.b.faults.flush = 1.0
        if before:
            assert sim.secondary is not None
            await sim.secondary.node.applier.make_durable()
            sim.b.faults.flush = 0.0
        for _ in range(2):
            answer = await told(sim, "failover", to="checkpoint", force=False)
            expect(isinstance(answer, NeedsForce), f"a checkpoint of a disk that lost writes took over: {answer!r}")
        sim.b.faults.flush = 0.0
        answer = await told(sim, "failover", to="latest", force=True)
        expect(isinstance(answer, OperationFailed), f"its latest state took over: {answer!r}")
        sim.kill(sim.secondary, 1000)  # the next process knows it, too
        sim.start("b")
        await sim.pause(0.5)
        answer = await told(sim, "failover", to="checkpoint", force=False)
        expect(isinstance(answer, NeedsForce), f"forgotten by a process that came then: {answer!r}")
        sim.world.network.set_cut(False, False)
    await protected_again(sim)
    await sim.rest()


@scenario(loss="block")
async def a_secondary_of_another_pair_answers(sim: Simulation) -> None:
    """By reading: with on_peer_loss = block, a refusal began a generation although no write went on alone. After a
    failover both sides would have had one of their own: split brain, and nothing that differs."""
    await born(sim)
    sim.kill(sim.secondary, 1000)
    sim.watched = ["a"]
    host = sim.b
    settings, metadata = host.settings, host.metadata.now
    memory = replace(settings.buffer, directory=f"{host.directory}/another")
    host.settings = replace(settings, pair_id="another", buffer=memory)
    host.metadata.now = host.metadata.stable = None
    sim.start("b")
    await sim.until(sim.write, 10, "a client of side a")
    primary = sim.primary
    assert primary is not None
    await sim.until(lambda: primary.node.engine.state == "refused", 30, "a refusal")
    await writes(sim, 3)
    await sim.pause(1.0)
    expect(generation(sim, "a") == 1, "a generation began, and every write waits")
    expect(sim.clients.outstanding, "a write was acknowledged alone")
    sim.kill(sim.b.process("secondary"), 1000)
    host.settings = settings
    host.metadata.now = host.metadata.stable = metadata
    sim.watched = ["a", "b"]
    await sim.rest()


@scenario()
async def the_power_fails_before_a_start_is_noted_in_a_resync(sim: Simulation) -> None:
    """By reading, beside seed 64866: a RESYNC, or a checkpoint that an operator asked for, went out before the start
    was noted, and the next process was refused as an older copy."""
    await born(sim)
    for what in ("resync", "checkpoint", "resync", "checkpoint"):
        operator_stops(sim.primary)
        await sim.until(lambda: sim.a.process("primary") is None, 30, "the end of the primary")
        if what == "resync":
            sim.power("b", 1000)
            sim.start("b")
            await sim.pause(0.5)
        sim.world.loop.slowness = 2.0
        sim.start("a")
        state = "primary syncing" if what == "resync" else "primary protected"
        await at_the_moment(sim, lambda state=state: state in sim.standing(), 30, "a start", step_s=0.0001)
        sim.world.loop.slowness = 0.002
        sim.command(sim.primary, "checkpoint")
        await sim.pause(0.01)
        sim.power("a", 0.1)
        await sim.pause(0.3)
        await protected_again(sim)
    await sim.rest()


@scenario()
async def a_secondary_that_lost_its_power_ends_before_its_resync(sim: Simulation) -> None:
    """Seed 203940: the process that came after it found the disk buffer that was made in between, and believed that
    the disk was where that said."""
    await born(sim)
    for stopped in (True, False):
        await sim.pause(2.0)  # something is recorded
        await writes(sim, 10)
        sim.world.network.set_cut(True, True)
        sim.power("b", 1000)
        sim.start("b")
        await sim.pause(0.5)
        if stopped:
            operator_stops(sim.secondary)
            await sim.until(lambda: sim.secondary is None, 30, "the end of the secondary")
        else:
            sim.kill(sim.secondary, 1000)
        sim.start("b")
        await sim.pause(0.5)
        await writes(sim, 3)
        sim.world.network.set_cut(False, False)
        await protected_again(sim)
        await sim.until(sim.equal, 10, "equal disks")
    await sim.rest()


@scenario()
async def two_flushes_fail_at_the_end_of_a_resync(sim: Simulation) -> None:
    """Seed 218848: one that a client asked for while the last one of the resync was under way, and then that. What had
    been queued before was still taken for void when it was gone: the next RESYNC was, too, and no flush ever ended."""
    await born(sim)
    for _ in range(10):
        sim.world.network.set_cut(True, True)
        await sim.pause(5.0)
        await writes(sim, 10)
        sim.world.network.set_cut(False, False)
        assert sim.secondary is not None
        queue = sim.secondary.node.applier._queue
        deadline = sim.world.loop.now + 30
        while not (queue and isinstance(queue[0], EndResync)) and sim.world.loop.now < deadline:
            sim.act("flush")
            await sim.pause(0.0002)
        sim.b.faults.flush = 1.0
        await sim.pause(0.02)
        sim.b.faults.flush = 0.0
        await protected_again(sim)
        sim.act("flush")
        await protected_again(sim)
    await sim.rest()


@scenario()
async def a_flush_fails_while_a_resync_begins(sim: Simulation) -> None:
    """By reading: the beginning of the resync said that the disk is where the stream is, over the news of the flush, to
    the session and in the header. What the flush had lost was never sent again."""
    await born(sim)
    for life in range(12):
        running = sim.secondary
        assert running is not None
        node, queue = running.node, running.node.applier._queue

        def begins(queue: Any = queue) -> bool:
            return bool(queue) and isinstance(queue[0], BeginResync)

        node._recorder.cancel()  # its turn comes when the story says so
        await writes(sim, 10)
        sim.world.network.set_cut(True, True)
        await sim.pause(3.0)
        await writes(sim, 2)
        sim.world.loop.slowness = 0.5
        sim.world.network.set_cut(False, False)
        await at_the_moment(sim, begins, 20, "a resync")
        sim.b.faults.flush = 1.0
        recording = running.run(sim.world.loop.create_task, node._record_now())
        await at_the_moment(sim, lambda done=recording.done: sim.world.oracle.forgotten or done(), 20, "a flush")
        sim.b.faults.flush = 0.0
        if life % 2:
            await at_the_moment(sim, lambda begins=begins: not begins(), 20, "the end of its beginning")
            sim.kill(running, 0.1)
        sim.world.loop.slowness = 0.002
        await protected_again(sim)
        await sim.until(sim.equal, 10, "equal disks")
    await sim.rest()


@scenario()
async def a_stop_comes_while_a_repair_reads_its_last_piece(sim: Simulation) -> None:
    """The piece was marked no more, and nothing was on its way: the stop counted as clean, and the difference was
    forgotten."""
    await born(sim)
    flip(sim, 7)
    assert sim.primary is not None
    primary = sim.primary
    mirror = primary.node.engine.mirror
    sim.a.faults.cold = 1.0
    sim.world.loop.slowness = 0.5
    sim.command(primary, "verify", [].append, repair=True)

    def reads_the_last_piece() -> bool:
        plan: Any = getattr(mirror.overlap, "__self__", None)
        return isinstance(plan, ResyncPlan) and not plan.all_sent and not any(mirror.bitmaps)

    await at_the_moment(sim, reads_the_last_piece, 60, "the last piece of a repair")
    primary.lifecycle.stop.set()
    await sim.until(lambda: sim.primary is None, 30, "the end of the primary")
    sim.a.faults.cold = 0.0
    sim.world.loop.slowness = 0.002
    sim.start("a")
    await sim.until(sim.protected, 30, "a protected pair")
    expect(not (await verified(sim))["differing"], "the primary forgot what it had not repaired")
    await sim.rest()


@scenario()
async def a_failover_for_which_no_file_can_be_opened(sim: Simulation) -> None:
    """By reading: too many open files, where all requests have to end. The failover ended in a traceback, and the
    secondary stayed deaf to its primary, while it answered its pings."""

    def stopped(**_args: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    await born(sim)
    assert sim.secondary is not None
    backup = sim.secondary.node.backup
    for target in ("latest", "checkpoint"):
        backup.stopped = stopped
        answer = await told(sim, "failover", to=target, force=True)
        expect(isinstance(answer, OperationFailed), f"{answer!r} is no refusal")
        del backup.stopped
        await writes(sim, 3)
        await protected_again(sim)
        expect(generation(sim, "b") == generation(sim, "a"), "the generations differ")
    await writes(sim, 10)
    await sim.rest()


@scenario()
async def the_secondary_dies_between_the_stream_and_its_number(sim: Simulation) -> None:
    """By reading: a resync goes to another numbering, and the process was killed between two stores. The next one
    stood in the new stream at the number that it had had in the old one: what lay before that was never sent."""
    await born(sim)
    await writes(sim, 10)
    kept: Any = PairHeader.__dict__["applied_sequence"]
    found: list[tuple[int, int]] = []

    def setter(self: PairHeader, value: int) -> None:
        if (self.stream_id, self.applied_sequence) != before and not found:
            found.append((self.stream_id, self.applied_sequence))
            sim.b.faults.die()
        kept.fset(self, value)

    assert sim.secondary is not None
    node = sim.secondary.node
    before = node.buffer.header.stream_id, node.buffer.header.applied_sequence
    sim.kill(sim.primary, 1000)
    sim.start("a")
    headers: Any = PairHeader
    headers.applied_sequence = property(kept.fget, setter)
    try:
        await sim.until(lambda: found, 30, "a resync in another stream")
    finally:
        headers.applied_sequence = kept
    expect(found[0][0] in (before[0], NOWHERE), f"it stands at {found[0]}, and was at {before}")
    sim.watched = ["a", "b"]
    await protected_again(sim)
    await sim.rest()


@scenario(sync=False, blocks=(400,))
async def writes_wait_for_their_bits_longer_than_a_stop_does(sim: Simulation) -> None:
    """Seed 106000846: clients were cut off, and what they had sent was written behind the end of the stream, by a side
    that called itself clean."""
    await born(sim)
    primary = sim.primary
    sim.world.loop.slowness = 4.0
    for _ in range(30):
        sim.write()
    operator_stops(primary)
    assert primary is not None
    await sim.until(lambda: not primary.alive, 120, "the end of the primary")
    sim.world.loop.slowness = 0.002
    await protected_again(sim)
    await sim.until(sim.equal, 10, "equal disks")
    await sim.rest()


@scenario(blocks=(400,))
async def the_primary_is_killed_while_it_compares_the_whole_disk(sim: Simulation) -> None:
    """Seeds 123001722, 123003755, 123006334: the process that came then went by the write-intent bitmap of the one that
    was killed, in which was what had been written since, and not what had yet to be compared."""
    await born(sim)
    await sim.pause(25)  # the write-intent bitmap has forgotten what was written
    for accepted in (True, False):
        sim.kill(sim.primary, 1000)
        if accepted:
            accept_disks(sim.a.settings)
        else:
            os.unlink(f"{sim.a.directory}/{INTENT_FILE}")
        flip(sim, 390)
        sim.b.faults.cold = 1.0
        sim.world.loop.slowness = 0.5
        sim.start("a")
        await at_the_moment(sim, lambda: _compares_in_the_new_stream(sim), 60, "a comparison", step_s=0.0001)
        sim.kill(sim.primary, 1000)
        sim.b.faults.cold = 0.0
        sim.world.loop.slowness = 0.002
        sim.start("a")
        await sim.until(sim.protected, 30, "a protected pair")
        expect(not (await verified(sim))["differing"], "the comparison that was interrupted is forgotten")
    await sim.rest()


@scenario()
async def the_secondary_is_lost_again_before_the_first_time_is_noted(sim: Simulation) -> None:
    """Seed 210002687: a generation had begun and was on its way to the metadata; the next session, which was all
    resync, ended, and another one began beside it. The secondary was told of the first and the primary kept the second:
    split brain, and nothing that differed."""
    await born(sim)
    for _ in range(10):
        sim.world.loop.slowness = 0.5
        sim.b.faults.read = 1.0  # of old contents that are to be copied
        await writes(sim, 4)
        await sim.pause(1.0)
        sim.b.faults.read = 0.0
        sim.world.loop.slowness = 0.002
        await protected_again(sim)
        expect(generation(sim, "a") == generation(sim, "b"), "the generations differ")
    await sim.rest()


@scenario()
async def a_verification_is_asked_of_a_primary_that_stops(sim: Simulation) -> None:
    """Seed 230007130: it began behind the point where all such things are ended, and had no session in the middle."""
    await born(sim)
    for _ in range(3):
        await writes(sim, 5)
        primary = sim.primary
        assert primary is not None
        sim.world.loop.slowness = 0.1
        sim.a.faults.cold = 1.0
        sim.act("flush")
        operator_stops(primary)
        while primary.alive:
            sim.command(primary, "verify", repair=False)
            await sim.pause(0.001)
        sim.a.faults.cold = 0.0
        sim.world.loop.slowness = 0.002
        await protected_again(sim)
    await sim.rest()


@scenario(blocks=(400,))
async def the_secondary_goes_back_to_an_older_copy(sim: Simulation) -> None:
    """Seed 52301: its host was put back to what it was in an earlier stream, all writes of which the primary had known
    when it started. What it had sent since, and what it had cleared its bitmaps of, was never compared."""
    await born(sim)
    await sim.pause(2.0)
    sim.watched = ["a"]
    for clean in (False, True):
        copy = Copy.of(sim.b)
        sim.kill(sim.primary, 0.1)
        await protected_again(sim)
        await writes(sim, 10)
        if clean:
            operator_stops(sim.primary)
            await protected_again(sim)
        sim.power("b", 1000)
        copy.put_back(sim.b)
        sim.start("b")
        await protected_again(sim)
        await sim.until(sim.equal, 10, "equal disks")
    sim.watched = ["a", "b"]
    await sim.rest()


@scenario(blocks=(40,))
async def the_connection_breaks_at_the_end_of_a_resync(sim: Simulation) -> None:
    """By reading: all of a resync was in the stream, and not all of it had arrived. The next connection called the pair
    protected, with a secondary that had no checkpoint; and where the answer to the last checkpoint was all that was
    lost, the resync never ended, in ``status`` and in the write-intent bitmap."""
    await born(sim)
    sim.world.network.manners.delay_s = 0.02
    for arrived in (False, True):
        await writes(sim, 10)
        sim.kill(sim.primary, 1000)
        sim.start("a")
        await at_the_moment(sim, lambda: "primary syncing" in sim.standing(), 30, "a resync")
        assert sim.primary is not None
        assert sim.secondary is not None
        engine, session = sim.primary.node.engine, sim.secondary.node.session
        await at_the_moment(sim, lambda there=session: there.position.syncing, 30, "its beginning")
        watched = (lambda there=session: not there.position.syncing, lambda here=engine: not here.session.syncing)
        await at_the_moment(sim, watched[not arrived], 30, "its end")
        sim.world.network.break_all()
        sim.world.loop.slowness = 0.5  # of the flush that ends it
        await sim.pause(0.05)
        await at_the_moment(sim, lambda here=engine: here.state == "protected", 30, "a protected pair")
        expect(not session.position.syncing, "the pair is called protected, and its secondary is not in line")
        expect(not engine.status()["resync"]["active"], "the resync has no end")
        sim.world.loop.slowness = 0.002
        await sim.pause(25)  # the write-intent bitmap forgets what was written
        expect(not engine.mirror.guard.file.ranges(), "the write-intent bitmap is not cleared")
    await sim.rest()


@scenario(blocks=(400,), loss="block")
async def the_primary_is_killed_while_it_compares_an_older_copy(sim: Simulation) -> None:
    """By reading, beside seed 52301: the older copy had gone over to the stream of the primary that compared it as a
    whole, and stood at a place in it from which the next primary, by what it found marked, knew every write."""
    await born(sim)
    await sim.pause(2.0)
    copy = Copy.of(sim.b)
    sim.kill(sim.primary, 0.1)
    await protected_again(sim)
    await sim.pause(25)  # the write-intent bitmap has forgotten what was written
    await writes(sim, 3)
    sim.power("b", 1000)
    sim.watched = ["a"]
    copy.put_back(sim.b)
    flip(sim, 390)
    sim.world.loop.slowness = 0.5
    secondary = sim.start("b")
    await at_the_moment(sim, lambda: _compares_in_the_new_stream(sim), 60, "a comparison", step_s=0.0001)
    session = secondary.node.session
    await at_the_moment(sim, lambda: session.position.syncing, 60, "its beginning", step_s=0.0001)
    sim.world.network.set_cut(True, True)
    sim.world.network.break_all()
    sim.world.loop.slowness = 0.002
    await sim.until(lambda: session.position.recorded == session.position.applied, 10, "a note of the place")
    sim.kill(sim.primary, 0.1)
    sim.world.network.set_cut(False, False)
    sim.watched = ["a", "b"]
    await protected_again(sim)
    expect(not (await verified(sim))["differing"], "the comparison that was interrupted is forgotten")
    await sim.rest()


def _compares_in_the_new_stream(sim: Simulation) -> bool:
    """The secondary has gone over to the stream of the primary that compares, durably, and has yet to be compared."""
    primary, noted = sim.primary, sim.world.oracle.metadata(sim.b.metadata)
    if primary is None or primary.node is None or noted is None or not noted.syncing:
        return False
    engine = primary.node.engine
    return bool(noted.stream == engine.session.stream and engine.state == "syncing" and all(engine.knowledge.suspects))


REGRESSIONS += [name for name in SCENARIOS if name not in _OLDER]
