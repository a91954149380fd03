"""The operator of a random life: what ``Options.commands`` allows, at any moment, as ``deploy/pair.py`` does it.

A command that takes its time (switchover, takeover) goes on beside the life, one at a time. Being refused is no
failure: most moments of most lives are bad ones. What a command says it has done is compared with the disks:

    resize       both sides' metadata have the new size, durably; nobody's volumes ever shrink (``Oracle.sizes_noted``)
    verify       nothing is named that cannot differ; what differed all the time is; what was repaired is right
    switchover   both disks are alike when the roles are swapped
    takeover     what a failover has to keep is checked by the oracle, in either direction
    restore      a disk that is called exact is; both are alike at rest
"""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.errors import TandemDiskError
from deploy.roles import judge
from tests.simulation.clock import Killed
from tests.simulation.disk import SECTOR
from tests.simulation.options import LEADS
from tests.simulation.oracle import Violation

if TYPE_CHECKING:
    from tests.simulation.host import Host
    from tests.simulation.simulator import Simulation

WEIGHTS = {
    "resize": 1.5, "verify": 1.5, "corrupt": 0.7, "resync": 0.5, "switchover": 1.0, "takeover": 0.8, "rejoin": 3.0,
    "intents": 0.7, "restore": 1.0,
}  # fmt: skip


class Copy(NamedTuple):
    """What was durable on a machine at one moment."""

    disks: list[bytes]
    metadata: bytes

    @classmethod
    def of(cls, host: Host) -> Copy:
        assert host.metadata.stable is not None
        return cls([bytes(platter.stable) for platter in host.platters], host.metadata.stable)

    def put_back(self, host: Host) -> None:
        """Nothing runs there."""
        for platter, image in zip(host.platters, self.disks, strict=True):
            platter.restore(image)
        host.metadata.now = host.metadata.stable = self.metadata


class Operator:
    """Of one life."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.world = sim.world
        self.busy = False
        self._planted: dict[int, float] = {}
        """Sector -> when its bit turned over."""
        self._copy: Copy | None = None

    # Commands that take their time

    def _begin(self, command: Coroutine[Any, Any, Any]) -> bool:
        if self.busy:
            command.close()
            return False
        self.busy = True
        self.world.loop.create_task(self._go_on(command))
        return True

    async def _go_on(self, command: Coroutine[Any, Any, Any]) -> None:
        from tests.simulation.simulator import Stop

        try:
            with contextlib.suppress(TandemDiskError, Killed, Stop):
                await command
        except Violation as violation:
            self.world.violation = self.world.violation or violation
        finally:
            self.busy = False
            self.sim.watched = ["a", "b"]

    async def finished(self) -> None:
        """Until nothing goes on any more."""
        await self.sim.until(lambda: not self.busy, 300.0, "the end of an operator's command")

    def switchover(self) -> bool:
        """Swap the roles, if the pair is protected."""
        from tests.simulation.commands import switchover

        if self.world.oracle.promoted or not self.sim.protected():
            return False
        return self._begin(switchover(self.sim))

    def takeover(self) -> bool:
        """The primary goes away in some manner, the other side takes over, and the primary may come back."""
        return self._begin(self._take_over())

    async def _take_over(self) -> None:
        sim, chance = self.sim, self.sim.chance
        taking = sim.following
        await sim.lose_primary(chance.choice(("kill", "power", "cut", "pause", "stop", "none")))
        target = chance.choice(("latest", "latest", "checkpoint"))
        for _ in range(chance.randint(1, 3)):
            if sim.leading is not taking:
                sim.failover(target, force=chance.random() < 0.4)
            await sim.pause(chance.random())
        if chance.random() < 0.5:
            await sim.pause(chance.random() * 2)
            self.rejoin()

    def rejoin(self) -> None:
        """If two sides call themselves primary: the one that was left behind gives the role up."""
        sim = self.sim
        if self.world.oracle.promoted or len(sim.primaries()) < 2:
            return
        with contextlib.suppress(TandemDiskError, Killed):
            judgement = judge({"primary": sim.a.settings, "secondary": sim.b.settings})
            ahead = judgement.loser == ("primary" if sim.leading is sim.a else "secondary")
            if ahead and not judgement.split_brain:
                return  # promoted durably, and not at work yet
            loser = sim.following
            sim.rejoin()
            sim.restart_at.pop(loser.side, None)

    # Sizes

    def resize(self) -> None:
        """Disks grow, and then the volumes; sometimes one disk only."""
        sim, chance = self.sim, self.sim.chance
        known = [self.world.oracle.metadata(host.metadata) for host in self.world.hosts.values()]
        if not all(metadata is not None and metadata.history for metadata in known):
            return  # two new sides whose disks have different sizes are no pair
        index = chance.randrange(len(self.world.sizes))
        more = chance.choice((1, 1, 2, 5, 8)) * sim.options.block_size
        for host in self.world.hosts.values():
            if chance.random() < 0.9:
                self.grow(host, index, host.platters[index].size + more)
        name = chance.choice((None, f"v{index}"))
        size = None
        if name is not None and chance.random() < 0.4:
            size = min(host.platters[index].size for host in self.world.hosts.values())
        self._ask_for_size(name, size, [])

    def _ask_for_size(self, name: str | None, size: int | None, answers: list[Any]) -> None:
        leading, following = self.sim.leading, self.sim.following

        def told(answer: Any) -> None:
            answers.append(answer)
            if isinstance(answer, TandemDiskError):
                return
            self.sim.counts["resizes"] += any(v["size"] > v["before"] for v in answer["volumes"])
            now = tuple(volume["size"] for volume in answer["volumes"])
            for host in (leading, following):
                metadata = self.world.oracle.metadata(host.metadata)
                noted = tuple(size for _, size in metadata.volumes) if metadata is not None else ()
                if any(have < wanted for have, wanted in zip(noted, now, strict=True)):
                    self.world.guard(_raise, "size", f"grown to {now}, and side {host.side} notes {noted}")

        self.sim.command(self.sim.primary, "resize", told, volume=name, size=size)

    def grow(self, host: Host, index: int, size: int) -> None:
        platter, oracle = host.platters[index], self.world.oracle
        size = min(size, platter.room)
        sectors = (size - platter.size) // SECTOR
        if sectors <= 0:
            return
        first = oracle.starts[index] + platter.size // SECTOR
        found = np.zeros(sectors, np.uint64)
        if "dirty_growth" in self.sim.options.commands:
            found[:] = [oracle.new_version() for _ in range(sectors)]
            oracle.fresh[first : first + sectors] = True
            if oracle.tracked is not None:
                oracle.tracked.loose[first : first + sectors] = True
        self.world.trace(f"grow {platter.device} to {size}")
        platter.grow(size, np.repeat(found, SECTOR // 8).tobytes())
        oracle.grew(host.side, first, found)

    def even(self) -> None:
        """The smaller one of two disks grows, too: one side may have the new size already."""
        for index in range(len(self.world.sizes)):
            size = max(host.platters[index].size for host in self.world.hosts.values())
            for host in self.world.hosts.values():
                self.grow(host, index, size)

    async def last_resize(self) -> None:
        """Of a pair at rest: it has to work."""
        sim = self.sim
        sizes = [min(platter.size + 2 * sim.options.block_size, platter.room) for platter in sim.a.platters]
        for host in self.world.hosts.values():
            for index, size in enumerate(sizes):
                self.grow(host, index, size)
        for _ in range(20):
            await sim.protect()
            answers: list[Any] = []
            self._ask_for_size(None, None, answers)
            await sim.until(lambda answers=answers: answers, 90.0, "the end of a resize")  # type: ignore[misc]
            refused = answers[0]
            if not isinstance(refused, TandemDiskError) or "nothing to grow" in refused.sentence:
                break
            await sim.pause(5.0)  # another one is under way, and its threads are slow
        else:
            raise Violation("liveness", f"no resize of a protected pair: {refused}")
        noted = {side: self.world.oracle.noted[side] for side in "ab"}
        if noted["a"] != noted["b"]:
            raise Violation("size", f"the sides have different sizes: {noted}")
        await sim.until(sim.equal, 60.0, "equal disks after a resize")

    # Contents

    def corrupt(self) -> None:
        """A bit of the disk that follows turns over, and nobody is told."""
        sim, oracle = self.sim, self.world.oracle
        if sim.following.side not in oracle.noted:
            return
        versions = oracle.versions(sim.following.platters)
        sectors = np.flatnonzero((versions != 0) & oracle.inside(oracle.noted[sim.following.side])).tolist()
        if not sectors:
            return
        sector = sim.chance.choice(sectors)
        index = max(index for index, first in enumerate(oracle.starts) if first <= sector)
        platter = sim.following.platters[index]
        at = (sector - oracle.starts[index]) * SECTOR + sim.chance.randrange(8, SECTOR)
        bit = 1 << sim.chance.randrange(8)
        for image in (platter.contents, platter.stable):
            image[at] ^= bit
        self.world.trace(f"corrupt {platter.device} {at}")
        oracle.corrupt[sector] = True
        self._planted[sector] = self.world.loop.now

    def restore(self) -> bool:
        """A copy of the machine that follows is made, or what was made before is put in its place."""
        sim, world = self.sim, self.world
        if sim.options.failover or LEADS & sim.options.commands or world.oracle.promoted:
            return False
        host, copy = sim.following, self._copy
        if copy is None or sim.chance.random() < 0.4:
            if host.metadata.stable is None:
                return False
            self._copy = Copy.of(host)
            world.trace(f"copied {host.side}")
            return True
        sim.power(host.side, 1 + sim.chance.random() * 4)

        def put_back() -> None:
            if any(process.alive for process in host.processes.values()):
                return
            world.trace(f"restored {host.side}")
            copy.put_back(host)
            world.oracle.promised.clear()
            sim.counts["older copies"] += 1

        sim.later(0.5, put_back)
        return True

    def resync(self) -> None:
        """``tandemdisk resync``, with or without ``--full``."""
        self.sim.command(self.sim.primary, "resync", full=self.sim.chance.random() < 0.5)

    def verify(self) -> None:
        """Under whatever goes on."""
        sim, oracle = self.sim, self.world.oracle
        repair = sim.chance.random() < 0.6
        leading, began = sim.leading, self.world.loop.now
        before = self._bad()

        def told(answer: Any) -> None:
            if isinstance(answer, TandemDiskError) or sim.leading is not leading:
                return
            sim.counts["verifications"] += 1
            named = self._named(answer)
            calm = not sim.options.troubles & {"disk_primary", "disk_secondary"} and not self.world.countdown.armed
            if calm and not self._explained(answer):
                self.world.guard(_raise, "verify", f"nothing can differ in some of {answer['extents']}")
            still = [sector for sector in self._bad() & before if self._planted[sector] < began]
            if missed := [sector for sector in still if not named[sector]]:
                self.world.guard(_raise, "verify", f"sectors {missed} differ all the time, and are not named")
            if repair and (left := [sector for sector in still if named[sector]]):
                self.world.guard(_raise, "verify", f"sectors {left} were repaired, and still differ")
            sim.counts["corruptions found"] += bool((named & oracle.corrupt).any())

        sim.command(sim.primary, "verify", told, repair=repair)

    def _bad(self) -> set[int]:
        """Sectors in which a planted bit is wrong on the side that follows, and only there; in what is served."""
        inside = self.world.oracle.inside(self.sim.served())
        return {
            sector for sector in self._planted
            if inside[sector] and self._mixed(self.sim.following, sector) and not self._mixed(self.sim.leading, sector)
        }  # fmt: skip

    def _mixed(self, host: Host, sector: int) -> bool:
        starts = self.world.oracle.starts
        index = max(index for index, first in enumerate(starts) if first <= sector)
        at = (sector - starts[index]) * SECTOR
        contents = bytes(host.platters[index].contents[at : at + SECTOR])
        return contents != contents[:8] * (SECTOR // 8)

    def _named(self, answer: dict[str, Any]) -> Any:
        """The sectors of the extents that a verification names."""
        mask = np.zeros(self.world.oracle.sectors, bool)
        for name, offset, length in answer["extents"]:
            first = self.world.oracle.starts[int(name[1:])]
            mask[first + offset // SECTOR : first + (offset + length) // SECTOR] = True
        return mask

    def _explained(self, answer: dict[str, Any]) -> bool:
        """Whether each extent holds something that may differ."""
        oracle = self.world.oracle
        reasons = oracle.corrupt | oracle.fresh | oracle.ever_poisoned
        for name, offset, length in answer["extents"]:
            first = oracle.starts[int(name[1:])]
            if not reasons[first + offset // SECTOR : first + -(-(offset + length) // SECTOR)].any():
                return False
        return True

    async def last_verification(self) -> None:
        """Of a pair at rest: exactly the blocks that differ, byte by byte; repaired, the disks are the same."""
        sim = self.sim
        preempt, self.world.preempt = self.world.preempt, 0.0  # nobody writes meanwhile
        await sim.answered()
        if "corrupt" in sim.options.commands and sim.chance.random() < 0.5:
            self.corrupt()
        for repair in (False, True):
            answer = await self._verified(repair=repair)
            wanted = self.differing()
            sim.counts["corruptions found"] += bool(wanted.any() and not repair)
            if not repair and self._named(answer).tolist() != wanted.tolist():
                where = np.flatnonzero(wanted).tolist()
                raise Violation("verify", f"it names {answer['extents']}, and sectors {where[:8]} differ")
        await sim.protect()
        if self.differing().any():
            raise Violation("verify", f"{int(self.differing().sum())} sectors differ after a repair")
        self.world.preempt = preempt

    async def _verified(self, *, repair: bool) -> dict[str, Any]:
        sim = self.sim
        for _ in range(20):
            await sim.protect()
            answers: list[Any] = []
            sim.command(sim.primary, "verify", answers.append, repair=repair)
            await sim.until(lambda answers=answers: answers, 90.0, "the end of a verification")  # type: ignore[misc]
            if not isinstance(answers[0], TandemDiskError):
                found: dict[str, Any] = answers[0]
                return found
            await sim.pause(0.5)
        raise Violation("liveness", f"no verification of a protected pair: {answers[0]}")

    def differing(self) -> Any:
        """Sectors of the blocks whose bytes differ, within the volumes."""
        oracle, block = self.world.oracle, self.sim.options.block_size
        mask = np.zeros(oracle.sectors, bool)
        sizes = [min(all_) for all_ in zip(oracle.noted["a"], oracle.noted["b"], self.sim.served(), strict=True)]
        pairs = zip(self.sim.leading.platters, self.sim.following.platters, sizes, oracle.starts, strict=True)
        for one, other, size, first in pairs:
            for offset in range(0, size, block):
                end = min(offset + block, size)
                if one.contents[offset:end] != other.contents[offset:end]:
                    mask[first + offset // SECTOR : first + end // SECTOR] = True
        return mask


def _raise(invariant: str, sentence: str) -> None:
    raise Violation(invariant, sentence)
