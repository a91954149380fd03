"""What goes wrong in a random life: one verb for each kind of trouble. Each heals by itself after a while. A verb that
finds nothing to trouble returns False."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.simulation.options import FLAPPING

if TYPE_CHECKING:
    from tests.simulation.host import Host
    from tests.simulation.simulator import Simulation


MANNERS = {"jitter", "stale", "preempt", "clocks"}
"""Troubles that last as long as the life."""


class Troubles:
    """Of one life; chances are the life's own."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.world = sim.world
        self.chance = sim.chance

    def manners(self) -> None:
        troubles, chance, world = self.sim.options.troubles, self.chance, self.world
        manners = world.network.manners
        for name in sorted(troubles & MANNERS):
            self.sim.counts[name] += 1
        if "jitter" in troubles:
            manners.delay_s = chance.choice((0.0001, 0.002, 0.05))
            manners.jitter_s = chance.choice((0.001, 0.02, 0.2))
        if "stale" in troubles:
            manners.stale = 0.4
        if "preempt" in troubles:
            # a turn in each of many small operations, with as many again, would have no end
            world.preempt = 0.02 if self.sim.options.dense else 0.3
        if "clocks" in troubles:
            for host in world.hosts.values():
                host.rate = chance.uniform(-0.1, 0.1)
                host.offset = chance.uniform(0, 1e6)
        if "slow" in troubles:
            world.loop.slowness = chance.choice((0.01, 0.1, 0.5))

    def cut(self) -> None:
        self.world.network.set_cut(True, True)
        self._heal_later(self.join)

    def one_way(self) -> None:
        up = self.chance.random() < 0.5
        self.world.network.set_cut(up, not up)
        self._heal_later(self.join)

    def join(self) -> None:
        network = self.world.network
        if self.chance.random() < 0.5:
            network.break_all()
        network.set_cut(False, False)

    def _heal_later(self, heal: Callable[[], None]) -> None:
        self.sim.later(self.chance.choice((0.05, 0.5, 1.0, 4.0, 8.0)) * self.chance.random(), heal)

    def flap(self, chance: random.Random, begin_s: float) -> None:
        """The cable comes and goes, sometimes for less than a handshake takes; ``chance`` is this trouble's own."""
        self.world.loop.create_task(self._flap(chance, begin_s))

    async def _flap(self, chance: random.Random, begin_s: float) -> None:
        sim, network = self.sim, self.world.network
        await asyncio.sleep(begin_s)
        for _ in range(chance.randint(8, 20)):
            if sim.healing:
                return
            sim.counts[FLAPPING] += 1
            network.set_cut(True, True)
            await asyncio.sleep(chance.uniform(0.01, 0.3))
            if sim.healing:
                return
            if chance.random() < 0.5:
                network.break_all()
            network.set_cut(False, False)
            await asyncio.sleep(chance.choice((0.002, 0.06, 0.3)) * chance.random())

    def reset(self) -> None:
        self.world.network.break_all()

    def bad_messages(self) -> None:
        chance, manners = self.chance, self.world.network.manners
        for name in ("lose", "repeat", "damage", "cut_short", "junk"):
            setattr(manners, name, chance.choice((0.0, 0.02, 0.1)))
        self._heal_later(self.good_messages)

    def good_messages(self) -> None:
        manners = self.world.network.manners
        manners.lose = manners.repeat = manners.damage = manners.cut_short = manners.junk = 0.0

    def kill_primary(self) -> bool:
        return self.sim.kill(self.sim.primary, self.chance.random() * 4)

    def kill_secondary(self) -> bool:
        return self.sim.kill(self.sim.secondary, self.chance.random() * 4)

    def kill_export(self) -> bool:
        if self.sim.export is None:
            return False
        self.world.kill(self.sim.export)
        return True

    def power_primary(self) -> None:
        self.sim.power(self.sim.leading.side, self.chance.random() * 8)

    def power_secondary(self) -> None:
        self.sim.power(self.sim.following.side, self.chance.random() * 8)

    def pause(self) -> bool:
        process = self.chance.choice((self.sim.primary, self.sim.secondary, self.sim.export))
        if process is None or process.stopped:
            return False
        process.stopped = True
        self._heal_later(lambda: self.world.loop.resume(process))
        return True

    def stop(self) -> bool:
        process = self.chance.choice((self.sim.primary, self.sim.secondary))
        if process is None or not process.lifecycle.is_ready:
            return False
        process.lifecycle.stop.set()
        return True

    def disk_primary(self) -> None:
        self._disk_trouble(self.sim.leading)

    def disk_secondary(self) -> None:
        self._disk_trouble(self.sim.following)

    def _disk_trouble(self, host: Host) -> None:
        chance, faults = self.chance, host.faults
        faults.troubled = True
        faults.code = chance.choice((5, 28))
        kind = chance.choice(("read", "write", "flush", "all"))
        likelihood = chance.choice((0.05, 0.5, 1.0))
        for name in ("read", "write", "flush"):
            if kind in (name, "all"):
                setattr(faults, name, likelihood)

        def heal() -> None:
            faults.read = faults.write = faults.flush = 0.0

        self._heal_later(heal)

    def slow(self) -> None:
        for host in self.world.hosts.values():
            host.faults.cold = self.chance.choice((0.0, 0.2, 1.0))

    def metadata(self) -> None:
        host = self.chance.choice((self.sim.a, self.sim.b))
        host.faults.save = self.chance.choice((0.2, 1.0))
        self._heal_later(lambda: setattr(host.faults, "save", 0.0))

    def intents(self) -> None:
        """The file of the write-intent bitmap cannot be written."""
        host = self.chance.choice((self.sim.a, self.sim.b))
        host.faults.intents = self.chance.choice((0.2, 1.0))
        self._heal_later(lambda: setattr(host.faults, "intents", 0.0))

    def kill_inside(self) -> None:
        host = self.chance.choice((self.sim.a, self.sim.b))
        host.faults.kill = 0.05
        self.sim.later(self.chance.random(), lambda: setattr(host.faults, "kill", 0.0))

    def slow_reader(self) -> None:
        if self.sim.export is not None:
            self.sim.clients.slow_read(self.sim.export, self.chance.choice((0.01, 0.1, 0.8)))
