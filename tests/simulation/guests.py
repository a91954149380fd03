"""Stories about who goes first: guests or a resync, on a cable that is too narrow for both.

What went over the cable is counted there, message by message, whatever the primary says of itself. Time is virtual, so
bytes a second are as exact as any other number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from common import wire
from tests.simulation.scenarios import born, expect, scenario
from tests.simulation.simulator import Simulation

CABLE = 100_000.0
"""Bytes a second."""
WINDOW = 20_000
FLOOR = 20_000
BLOCK = 1024
PIECE = 2048
BLOCKS = 300


class Meter:
    """Bytes of data that came over the cable to the secondary, by whom."""

    def __init__(self, sim: Simulation) -> None:
        self._count: Counter[str] = Counter()
        listener = sim.world.network.listeners["sim://b"]
        before = listener.on_frames

        def on_frames(peer: bytes, frames: list[Any]) -> None:
            batch = wire.decode(tuple(frames))
            if isinstance(batch, wire.Batch):
                self._count["resync" if batch.flags & wire.RESYNC_DATA else "guest"] += sum(map(len, frames))
            before(peer, frames)

        listener.on_frames = on_frames

    def read(self) -> Counter[str]:
        """Bytes since the last time, under ``resync`` and ``guest``."""
        count, self._count = self._count, Counter()
        return count


async def apart(sim: Simulation) -> Meter:
    """A pair whose primary went on alone and wrote all over its disk."""
    await born(sim)
    sim.world.network.set_cut(True, True)
    await sim.until(lambda: engine(sim).state == "alone", 30, "a primary that goes on alone")
    while engine(sim).status()["dirty_bytes"][0] < BLOCKS * BLOCK * 0.9:
        sim.write()
        await sim.pause(0.002)
    sim.world.network.manners.bytes_per_s = CABLE
    sim.world.network.set_cut(False, False)
    meter = Meter(sim)
    await sim.until(lambda: engine(sim).session.syncing, 30, "a resync")
    return meter


def engine(sim: Simulation) -> Any:
    assert sim.primary is not None
    return sim.primary.node.engine


async def while_guests_write(sim: Simulation, share: float, over: Callable[[], bool]) -> None:
    """Clients keep ``share`` of the window filled, as far as they are let."""
    while not over():
        for _ in range(8):  # a batch without data takes nothing of the window
            if engine(sim).session.lag_bytes() >= share * WINDOW or not sim.write():
                break
        await sim.pause(0.001)


def after(sim: Simulation, seconds: float) -> Callable[[], bool]:
    end = sim.world.loop.now + seconds
    return lambda: sim.world.loop.now >= end


@scenario(blocks=(BLOCKS,), block_size=BLOCK, window_bytes=WINDOW, guest=False)
async def guests_go_before_a_resync(sim: Simulation) -> None:
    """Alone it has the cable; beside a guest that writes a little it takes what is left; one that fills the window
    stops it; and it ends when that one does."""
    meter = await apart(sim)
    await sim.pause(0.5)
    alone = meter.read()
    expect(alone["resync"] > 0.8 * 0.5 * CABLE and not alone["guest"], f"alone it sent {alone} in half a second")
    await while_guests_write(sim, 0.35, after(sim, 0.5))
    beside = meter.read()
    expect(0 < beside["resync"] < 0.8 * alone["resync"], f"it did not give way: {alone}, then {beside}")
    await while_guests_write(sim, 1.0, after(sim, 1.0))
    stopped = meter.read()
    expect(engine(sim).session.syncing, "the resync is over")
    expect(stopped["resync"] <= WINDOW, f"it went on beside guests that filled the window: {stopped}")
    expect(stopped["guest"] > 0.8 * CABLE, f"guests did not get the cable: {stopped}")
    await sim.until(sim.protected, 30, "the end of the resync")
    await sim.rest()


@scenario(blocks=(BLOCKS,), block_size=BLOCK, window_bytes=WINDOW, guest=False)
async def a_floor_is_kept_whatever_guests_do(sim: Simulation) -> None:
    """With ``resync_floor`` it goes on at that rate, and no faster, and ends, beside guests that never let go."""
    for host in sim.world.hosts.values():
        host.settings = replace(host.settings, resync_floor=FLOOR)
    meter = await apart(sim)
    rates = []
    while engine(sim).session.syncing:
        await while_guests_write(sim, 1.0, after(sim, 1.0))
        rates.append(meter.read())
    whole = rates[:-1]
    expect(len(whole) >= 4, f"it was over in no time: {rates}")
    sent, written = (sum(count[who] for count in whole) for who in ("resync", "guest"))
    # pieces that are zero in part travel as less than they count for
    expect(0.6 * FLOOR * len(whole) <= sent <= 1.1 * FLOOR * len(whole), f"the floor is not what it got: {rates}")
    expect(min(count["resync"] for count in whole) >= 0.4 * FLOOR, f"it stood still meanwhile: {rates}")
    expect(written >= 0.7 * (CABLE - FLOOR) * len(whole), f"guests did not get the rest: {rates}")
    await sim.until(sim.protected, 30, "the end of the resync")
    await sim.rest()
