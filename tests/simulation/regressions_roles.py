"""Stories, as in ``regressions``, of sides that lead in turn and of volumes that grow: what the operator of the swarm
(``swarm``) met."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from common.batch import ZERO, Operation, WriteBatch
from common.errors import DiskError, NeedsForce, PeerRefused, TandemDiskError
from common.intent import INTENT_FILE, IntentFile
from deploy.roles import choose_loser, give_up, judge, remembered
from secondary.buffer import DiskBuffer
from secondary.exporter import Exporter
from secondary.guest import GuestProcess
from secondary.header import PairHeader, Stage
from tests.simulation.clients import SimBuffer
from tests.simulation.commands import switchover
from tests.simulation.disk import SECTOR
from tests.simulation.host import Host
from tests.simulation.network import TO_LISTENER
from tests.simulation.regressions import (
    REGRESSIONS,
    at_the_moment,
    generation,
    operator_stops,
    protected_again,
    rejoined,
    slowly_taking_over,
    takes_over,
)
from tests.simulation.scenarios import SCENARIOS, born, expect, scenario, told, writes
from tests.simulation.simulator import Simulation

_OLDER = set(SCENARIOS)


async def led_by_b(sim: Simulation) -> None:
    """Side b has taken over, and side a follows it."""
    await born(sim)
    sim.kill(sim.primary, 1000)
    sim.watched = ["b"]
    await sim.pause(0.5)
    await takes_over(sim)
    await sim.until(sim.write, 30, "a client of the promoted side")
    await rejoined(sim)


@scenario()
async def a_side_that_was_left_behind_refuses_nobody(sim: Simulation) -> None:
    """Seed 359: side b leads, and side a is told to take over all the same. Its greeting was refused by side b's
    secondary process, in the name of what side b was, and it fenced itself: nobody led."""
    await led_by_b(sim)
    await takes_over(sim)
    await sim.pause(1.0)
    acknowledged = sim.world.oracle.acknowledged
    await writes(sim, 5)
    await sim.until(lambda: sim.world.oracle.acknowledged > acknowledged, 20, "an answer of the side that took over")
    await sim.rest()


@scenario()
async def a_leading_export_process_has_a_successor(sim: Simulation) -> None:
    """Seeds 323 and 1460: it went on alone in the generation in which its predecessor had led, and side a followed."""
    await led_by_b(sim)
    for _ in range(3):
        both = generation(sim, "a")
        expect(generation(sim, "b") == both, "the sides are not in one generation")
        sim.world.network.set_cut(True, True)
        sim.world.kill(sim.b.process("export"))  # type: ignore[arg-type]
        acknowledged = sim.world.oracle.acknowledged
        await sim.until(lambda: sim.b.process("export") is not None, 30, "another export process")
        await sim.until(
            lambda before=acknowledged: sim.write() and sim.world.oracle.acknowledged > before,  # type: ignore[misc]
            30, "an answer of it",
        )  # fmt: skip
        expect(generation(sim, "b") > both, "it acknowledged alone what side a knows nothing of, in their generation")
        sim.world.network.set_cut(False, False)
        await protected_again(sim)
    await sim.rest()


@scenario(commands=frozenset({"resize", "dirty_growth"}))
async def a_resize_that_cannot_be_noted_is_not_clean(sim: Simulation) -> None:
    """Seed 3098: the write-intent file could not be replaced when the metadata had the new size already. The stop
    behind that was called clean, and what was new was never compared."""
    await born(sim)
    for host in (sim.a, sim.b):
        sim.operator.grow(host, 0, host.platters[0].size + 4 * sim.options.block_size)
    sim.a.faults.intents = 1.0
    answers: list[object] = []
    sim.command(sim.primary, "resize", answers.append)
    await sim.until(lambda: answers, 30, "an answer to resize")
    expect(isinstance(answers[0], TandemDiskError), f"not refused: {answers}")
    sim.a.faults.intents = 0.0
    await sim.until(sim.protected, 30, "a pair at rest")
    operator_stops(sim.primary)
    await sim.until(lambda: sim.a.process("primary") is None, 30, "the end of the primary")
    await protected_again(sim)
    await sim.until(sim.equal, 30, "equal disks, as they are served")
    await sim.rest()


@scenario(commands=frozenset({"resize"}))
async def a_promoted_side_grows_when_all_is_noted(sim: Simulation) -> None:
    """Seed 30423: its exports showed the new size before what is new was marked, and the marking failed."""
    await led_by_b(sim)
    before = sim.b.platters[0].size
    for host in (sim.a, sim.b):
        sim.operator.grow(host, 0, before + 4 * sim.options.block_size)
    sim.b.faults.intents = 1.0
    answers: list[object] = []
    sim.command(sim.primary, "resize", answers.append)
    await sim.until(lambda: answers, 30, "an answer to resize")
    expect(isinstance(answers[0], TandemDiskError), f"not refused: {answers}")
    assert sim.primary is not None
    assert sim.primary.server is not None
    sizes = [volume.size for volume in sim.primary.server.volumes.values()]
    expect(sizes[0] == before, f"clients are shown {sizes[0]} bytes, and the resize failed")
    sim.b.faults.intents = 0.0
    await sim.rest()


@scenario(commands=frozenset({"resize", "dirty_growth"}))
async def more_is_added_while_the_last_of_it_is_confirmed(sim: Simulation) -> None:
    """Seed 107002758: what the first resize had added was compared, and with the answer to that the second one's was
    thought to be, too."""
    await born(sim)
    assert sim.primary is not None
    alignment = sim.primary.node.engine.alignment
    once = alignment.resync_command

    async def slowly(args: dict[str, object]) -> object:
        told = await once(args)
        await asyncio.sleep(2.0)
        return told

    alignment.resync_command = slowly
    for _ in range(2):
        for host in (sim.a, sim.b):
            sim.operator.grow(host, 0, host.platters[0].size + 8 * sim.options.block_size)
        sim.command(sim.primary, "resize")
        await sim.pause(1.0)
    await sim.until(sim.equal, 10, "equal disks after two resizes")
    await sim.rest()


@scenario(commands=frozenset({"resize", "dirty_growth"}))
async def what_was_added_cannot_be_read_at_first(sim: Simulation) -> None:
    """Seed 1009682: it was found to differ, and the disk failed before it was sent. Nobody sent it any more."""
    await born(sim)
    for host in (sim.a, sim.b):
        sim.operator.grow(host, 0, host.platters[0].size + 8 * sim.options.block_size)
    assert sim.primary is not None
    bitmaps = sim.primary.node.engine.mirror.bitmaps
    sim.command(sim.primary, "resize")
    for _ in range(20000):
        if any(bitmaps):
            break
        await sim.pause(0.0005)
    sim.a.faults.read = 1.0
    await sim.pause(3.0)
    expect(any(bitmaps), "it was sent, although it cannot be read")
    sim.a.faults.read = 0.0
    await sim.until(sim.equal, 10, "equal disks after a resize")
    await sim.rest()


@scenario()
async def a_primary_is_asked_while_it_stops(sim: Simulation) -> None:
    """Seed 8489: a verification began behind the goodbye. Seed 9037: a connection came up behind it."""
    for life in range(8):
        if life == 0:
            await born(sim)
        sim.world.loop.slowness = 0.1
        primary = sim.primary
        operator_stops(primary)
        for _ in range(400):
            if sim.primary is not primary:
                break
            sim.command(primary, "verify", repair=False)
            if life % 2:
                sim.world.network.break_all()
            await sim.pause(0.001)
        sim.world.loop.slowness = 0.002
        await sim.until(lambda ended=primary: not ended.alive, 60, "the end of a primary")  # type: ignore[misc]
        await protected_again(sim)
    await sim.rest()


@scenario()
async def an_export_process_is_stopped_while_it_begins_to_lead(sim: Simulation) -> None:
    """Seed 521358: the engine that it was making when the stop came was nobody's, and its files stayed open."""
    await born(sim)
    for life in range(4):
        taking = await slowly_taking_over(sim)

        def begins(taking: Host = taking) -> bool:
            export = taking.process("export")
            return export is not None and any(isinstance(file, IntentFile) for file in export.files)

        await at_the_moment(sim, begins, 30, "an engine in the making")
        export = taking.process("export")
        assert export is not None
        expect(export.node.engine is None, "the engine was made in no time")
        if life % 2:
            sim.write()  # the stop waits for its answer
        operator_stops(export)
        await sim.until(lambda ended=export: not ended.alive, 30, "the end of the export process")  # type: ignore[misc]
        sim.world.loop.slowness = 0.002
        await sim.until(lambda: sim.primary is not None and sim.primary.node.engine is not None, 30, "an engine")
        await rejoined(sim)
    await sim.rest()


@scenario()
async def the_marks_of_a_failover_cannot_be_read(sim: Simulation) -> None:
    """n-th fault, failover_to_checkpoint: the export process marks in the same file, so it is read before it is marked
    in; that failed, and was no error of the disk. The failover ended in a traceback, and the side stayed deaf."""
    await born(sim)
    sim.checkpoint()
    await writes(sim, 5)
    countdown = sim.world.countdown
    countdown.only, countdown.armed = "b intents pread", True
    for number in range(1, 100):
        countdown.calls, countdown.fail_at, countdown.hit = 0, number, ""
        answer = await told(sim, "failover", to="checkpoint", force=True)
        if not isinstance(answer, TandemDiskError):
            break  # what was read failed behind it, or not at all
        await sim.until(sim.protected, 30, "a pair that goes on as it was")
    countdown.armed = False
    expect(countdown.fail_at > 3, "hardly anything was read")
    sim.watched = ["a", "b"]
    await sim.rest()


@scenario()
async def the_disk_buffer_cannot_be_opened_in_the_middle_of_a_commit(sim: Simulation) -> None:
    """n-th fault, commit_goes_on: a process that comes then ends with a sentence, and makes no new buffer: the commit
    is in the old one."""
    await born(sim)
    sim.checkpoint()
    await writes(sim, 5)
    sim.kill(sim.primary, 1000)
    sim.watched = ["b"]
    await sim.pause(0.5)
    sim.b.faults.write = 1.0
    sim.failover("checkpoint", force=True)
    await sim.until(lambda: sim.world.oracle.promoted, 10, "a failover under way")
    await sim.pause(0.5)
    sim.kill(sim.b.process("secondary"), 1000)
    sim.b.faults.write = 0.0
    sim.world.countdown.only, sim.world.countdown.armed = "b memory open", True
    failing = sim.start("b")
    await sim.until(lambda: not failing.alive, 10, "the end of a process without a buffer")
    expect(isinstance(failing.error, DiskError), f"it ended without a sentence: {failing.error!r}")
    sim.world.countdown.armed = False
    sim.watched = ["a", "b"]
    await sim.rest()


@scenario()
async def the_primary_dies_as_it_makes_its_intent_file(sim: Simulation) -> None:
    """It was away (`write_intent` was off, say). The next process found an empty one, and took it for the knowledge of
    all that was written."""
    await born(sim)
    sim.world.network.set_cut(True, True)
    await sim.pause(4)
    await writes(sim, 10)
    sim.kill(sim.primary, 1000)
    path = Path(f"{sim.a.directory}/{INTENT_FILE}")
    path.unlink()
    dying = sim.start("a")
    await at_the_moment(sim, path.exists, 5, "an intent file")
    sim.kill(dying, 0.1)
    sim.world.network.set_cut(False, False)
    await protected_again(sim)
    expect(sim.equal(), "what was written alone is forgotten")
    await sim.rest()


@scenario()
async def the_secondary_is_lost_while_the_primary_is_told_to_stop(sim: Simulation) -> None:
    """n-th fault, roles_are_swapped: what the primary acknowledged alone in its last seconds was given up, because the
    switchover went on. The follower takes over only from a side that ended in good order, in a generation of both."""
    await born(sim)
    for number in range(5):
        for _ in range(3):
            sim.write()
        sim.later(0.0002 * number, sim.world.network.set_cut, True, True)
        expect(not await switchover(sim), "the roles were swapped, and the follower cannot have everything")
        expect(sim.leading is sim.a, "the other side leads")
        sim.world.network.set_cut(False, False)
        await protected_again(sim)
    await sim.rest()


@scenario()
async def the_last_checkpoint_before_a_stop_cannot_be_taken(sim: Simulation) -> None:
    """The export was closed for it already; then the command failed, and a primary without clients went on, until
    somebody sent it a signal. On both sides: a promoted one leads from its export process."""
    await born(sim)
    for _ in range(2):
        process = sim.leading.process("primary") or sim.leading.process("secondary")
        assert process is not None
        sim.write()
        sim.world.network.set_cut(True, True)
        answers: list[Any] = []
        sim.command(process, "stop", answers.append, checkpoint=True)
        await sim.until(lambda now=process: not now.alive, 30, "the end of what was told to stop")  # type: ignore[misc]
        expect(answers and not isinstance(answers[0], TandemDiskError), f"refused: {answers}")
        expect(answers[0]["checkpoint"] is None, "a checkpoint was taken")
        sim.world.network.set_cut(False, False)
        sim.start(sim.leading.side)
        await protected_again(sim)
        expect(await switchover(sim), "the roles were not swapped")
        await protected_again(sim)
    promoted = sim.leading.process("secondary")
    assert promoted is not None
    sim.kill(sim.leading.process("export"), 1000)
    sim.command(promoted, "stop", answers.append, checkpoint=True)
    await sim.until(lambda: not promoted.alive, 30, "the end of a side whose export process had died")
    sim.start(sim.leading.side)
    await protected_again(sim)
    await sim.rest()


@scenario()
async def a_stop_comes_while_the_primary_looks_for_its_secondary(sim: Simulation) -> None:
    """It looked on for all of `peer_timeout_s`, which may be minutes, and went alone in a generation of its own before
    it stopped. Now it is as if it had never been started."""
    await born(sim)
    sim.watched = []
    operator_stops(sim.primary)
    await sim.until(lambda: sim.primary is None, 30, "the end of the primary")
    sim.world.network.set_cut(True, True)
    before = generation(sim, "a")
    primary = sim.start("a")
    await at_the_moment(sim, lambda: primary.node is not None and "status" in primary.handlers, 5, "a start")
    operator_stops(primary)
    await sim.until(lambda: not primary.alive, 0.5, "the end of what was told to stop")
    metadata = sim.world.oracle.metadata(sim.a.metadata)
    expect(metadata is not None and metadata.clean, "the stop does not count as clean")
    expect(generation(sim, "a") == before, "it went alone")
    sim.world.network.set_cut(False, False)
    sim.start("a")
    sim.watched = ["a", "b"]
    await protected_again(sim)
    await sim.rest()


@scenario()
async def a_side_is_stopped_while_it_takes_over(sim: Simulation) -> None:
    """By reading: the end of the secondary was noted on top of its promotion, as one in good order of a primary."""
    await born(sim)
    sim.kill(sim.primary, 1000)
    sim.watched = []
    await sim.pause(0.5)
    assert sim.secondary is not None
    record = sim.secondary.node.record
    real = record.update_async

    async def update_async(**changes: Any) -> None:
        """The thread has to wait for a while: the promotion is being written."""
        await asyncio.sleep(2.0)
        await real(**changes)

    record.update_async = update_async
    sim.world.loop.slowness = 0.1
    sim.failover("latest", force=True)
    await sim.pause(0.01)
    operator_stops(sim.secondary)
    await sim.until(lambda: sim.b.process("secondary") is None, 60, "the end of the secondary")
    own = remembered(sim.b.settings)
    assert own is not None
    expect(own.role == "primary", "the failover did not come that far")
    expect(not own.clean, "what is noted as the end of a primary is that of a secondary")
    sim.world.loop.slowness = 0.002
    sim.watched = ["b"]
    await rejoined(sim)
    await sim.rest()


async def fails_in_its_commit(sim: Simulation) -> None:
    """The side that follows takes over at its checkpoint, and its host loses its power before the disk is that."""
    taking = sim.following
    sim.checkpoint()
    await sim.pause(0.5)
    await writes(sim, 10)
    sim.kill(sim.primary, 1000)
    sim.watched = [taking.side]
    await sim.pause(0.5)
    taking.faults.write = 1.0
    sim.failover("checkpoint", force=True)
    await sim.until(lambda: sim.world.oracle.promoted, 10, "a failover under way")
    await sim.pause(0.5)
    taking.faults.write = 0.0
    sim.power(taking.side, 0.1)
    await sim.pause(0.2)
    sim.supervise()
    await sim.until(lambda: sim.refused_mixture(taking), 10, "a refusal")
    sim.start(taking.side)
    await sim.pause(0.5)
    expect(sim.refused_mixture(taking), "it is refused once only")


@scenario()
async def the_power_fails_in_the_middle_of_a_commit(sim: Simulation) -> None:
    """By reading: the rest of what was to be committed was in memory, and the side led with a mixture, without a word.
    Now an operator decides: the other side leads on, or the mixture is what is left."""
    await born(sim)
    for accept in (False, True):
        await fails_in_its_commit(sim)
        judgement = judge({"primary": sim.a.settings, "secondary": sim.b.settings})
        with pytest.raises(PeerRefused, match="mixture"):
            choose_loser(judgement, None)
        taking, other = sim.following, sim.leading
        sim.decide_on_mixture(accept=accept)
        sim.watched = ["a", "b"] if not accept else [taking.side]
        sim.restart_at.clear()
        if not accept:
            await protected_again(sim)
            expect(sim.leading is other, "the mixture leads")
        else:
            sim.start(taking.side)
            await sim.until(lambda now=taking: sim.leading is now, 30, "the lead of a mixture")  # type: ignore[misc]
    await rejoined(sim)
    await sim.rest()


@scenario()
async def a_secondary_process_is_started_on_a_mixture(sim: Simulation) -> None:
    """Whoever starts it, by itself or with its old role: it makes no new buffer, and serves nobody."""
    await born(sim)
    await fails_in_its_commit(sim)
    process = sim.world.spawn(sim.b, "secondary")
    await sim.until(lambda: not process.alive, 10, "a refusal")
    expect(isinstance(process.error, NeedsForce), f"it ended with {process.error!r}")
    expect(not DiskBuffer.exists(sim.b.settings.buffer.directory), "it made a disk buffer")
    sim.watched = ["a", "b"]
    await sim.rest()


@scenario()
async def the_connection_breaks_while_the_primary_starts(sim: Simulation) -> None:
    """Seed 102004118: whoever hung up behind the greeting was taken for a stranger with other keys, and the primary
    ended."""
    await born(sim)
    network = sim.world.network
    sim.watched = []
    sim.kill(sim.primary, 1000)
    await sim.pause(0.2)
    primary = sim.start("a")
    await at_the_moment(sim, lambda: any(c.queues[TO_LISTENER] for c in network.connections), 5, "a greeting")
    sim.kill(sim.secondary, 1000)
    await sim.until(lambda: primary.lifecycle.is_ready, 30, "a primary that serves clients alone")
    sim.watched = ["a", "b"]
    sim.restart_at.clear()
    await protected_again(sim)
    await sim.rest()


@scenario()
async def a_failover_is_repeated_while_the_next_process_finishes_it(sim: Simulation) -> None:
    """By reading: the process was killed behind the note of its promotion. The next one finished that, and an operator
    who asked again, for another target, was heard beside it: refused in the middle, which left the side deaf to the
    former primary, and nobody turned that away."""
    await born(sim)
    sim.checkpoint()
    await writes(sim, 5)
    sim.kill(sim.primary, 1000)
    sim.watched = []
    await sim.pause(0.5)
    start = Exporter.start

    async def slowly(exporter: Exporter) -> None:
        await start(exporter)
        await asyncio.sleep(0.16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairHeader, "store_state", lambda *_args, **_options: sim.b.faults.die())
        sim.failover("checkpoint", force=True)
        await sim.until(lambda: sim.b.process("secondary") is None, 10, "the end of a process")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exporter, "start", slowly)
        sim.world.loop.slowness = 0.1
        secondary = sim.start("b")
        answers: list[Any] = []
        await at_the_moment(sim, lambda: "failover" in secondary.handlers, 20, "a process that takes commands")
        sim.command(secondary, "failover", answers.append, to="latest", force=True)
        await sim.until(lambda: answers, 30, "an answer")
        sim.world.loop.slowness = 0.002
    await sim.until(lambda: sim.leading is sim.b, 30, "the lead of the other side")
    sim.start("a")
    await sim.pause(4.0)
    expect(sim.a.process("primary") is None, "the former primary was not turned away")
    await rejoined(sim)
    await sim.rest()


@scenario()
async def a_flush_fails_before_a_side_begins_to_lead(sim: Simulation) -> None:
    """By reading: its clients were told, and the engine that came next was not: it cleared its bitmaps and believed its
    disk after a stop."""
    await born(sim)
    sim.kill(sim.primary, 1000)
    sim.watched = []
    await sim.pause(0.5)
    begin = GuestProcess._begin_to_lead

    async def slowly(process: GuestProcess) -> None:
        await asyncio.sleep(0.5)
        await begin(process)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuestProcess, "_begin_to_lead", slowly)
        sim.failover("latest", force=True)
        export = sim.export
        assert export is not None
        await sim.until(lambda: export.node.buffer.header.stage is Stage.DONE, 10, "a promotion")
        sim.b.faults.flush = 1.0
        codes: list[int] = []
        export.run(export.node.volumes[0].flush, codes.append)
        await sim.until(lambda: codes, 10, "an answer")
        sim.b.faults.flush = 0.0
        await sim.until(lambda: sim.leading is sim.b, 30, "the lead of the other side")
        await sim.until(lambda: export.node.engine is not None, 30, "an engine")
    noted = sim.world.oracle.metadata(sim.b.metadata)
    expect(codes[0] and noted is not None and noted.lost_writes, f"forgotten: {noted}")
    await rejoined(sim)
    await sim.rest()


@scenario(loss="block")
async def an_operator_decides_against_a_promotion(sim: Simulation) -> None:
    """By reading: a primary that was fenced over a takeover met the other side again as its secondary, called itself
    protected, and answered EIO to everybody. It ends here: what side b acknowledged meanwhile is thrown away, which no
    check would believe."""
    await born(sim)
    primary = sim.primary
    assert primary is not None
    primary.stopped = True
    sim.watched = []
    sim.failover("latest", force=True)
    await sim.until(lambda: sim.leading is sim.b, 30, "the lead of the other side")
    sim.world.loop.resume(primary)
    engine = primary.node.engine
    await sim.until(lambda: engine.state == "fenced", 30, "a fenced primary")
    for process in list(sim.b.processes.values()):
        sim.world.kill(process)
    winner = remembered(sim.a.settings)
    assert winner is not None
    give_up(sim.b.settings, winner.history)
    sim.start("b")
    await sim.until(lambda: engine.state == "protected", 30, "a protected pair")
    errors: list[Any] = []
    operations: list[Operation] = [(ZERO, 0, SECTOR, 0, 0)]
    batch = WriteBatch(operations, SimBuffer(SECTOR), 0, 0, False, errors.append)
    primary.run(engine.mirror.volumes[0].submit, batch)
    await sim.until(lambda: errors, 10, "an answer")
    expect(not errors[0], f"a protected primary answers {errors[0]}")


REGRESSIONS += [name for name in SCENARIOS if name not in _OLDER]
