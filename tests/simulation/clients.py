"""Clients of both exports: they know what they wrote, and what their answers promise."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np

from common.batch import DISCARD, FAST_ZERO, NO_HOLE, WRITE, ZERO, Operation, WriteBatch
from secondary.header import Stage
from tests.simulation.disk import SECTOR
from tests.simulation.lineage import Extent
from tests.simulation.oracle import Violation

if TYPE_CHECKING:
    from tests.simulation.processes import Running
    from tests.simulation.world import World


class SimBuffer:
    """A receive buffer. When nobody has it pinned it is used again: its contents turn to rubbish at once."""

    def __init__(self, size: int) -> None:
        self.memory = bytearray(size)
        self.view = memoryview(self.memory)
        self.pins = 1

    def pin(self) -> None:
        assert self.pins > 0
        self.pins += 1

    def unpin(self) -> None:
        self.pins -= 1
        assert self.pins >= 0, "a buffer was given back twice"
        if not self.pins:
            self.memory[:] = b"\xee" * len(self.memory)


class Clients:
    """Makes requests at random and hands the answers to the oracle."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self.world = world
        self.chance = chance
        self.outstanding: dict[int, tuple[Any, Any]] = {}
        """Batches without an answer: (batch, process)."""
        self._count = 0
        self._sizes: dict[tuple[Running, int], int] = {}

    def _operations(self, first: int, size: int, most: int) -> tuple[list[Operation], list[Extent], SimBuffer, bool]:
        """A batch on a volume that starts at sector ``first``; it touches ``most`` blocks."""
        chance, oracle = self.chance, self.world.oracle
        operations: list[Operation] = []
        extents: list[Extent] = []
        payload = bytearray()
        fua = chance.random() < 0.12
        sectors = size // SECTOR
        room = most
        block = self.world.options.block_size
        dense = self.world.options.dense
        for _ in range(chance.choice((4, 16, 40) if dense else (1, 1, 2, 3, 5))):
            length = chance.randint(1, min((1 if dense else 3) * block // SECTOR, sectors))
            start = chance.randrange(sectors - length + 1)
            room -= ((start + length) * SECTOR - 1) // block - start * SECTOR // block + 1
            if room < 0 and operations:
                break
            if room < 0:
                length = 1
            kind = chance.choices((WRITE, ZERO, DISCARD), cum_weights=(8, 9, 10))[0]
            flags = chance.choice((0, NO_HOLE, FAST_ZERO)) if kind == ZERO else 0
            version = oracle.new_version() if kind == WRITE else 0
            payload += b"\x11" * chance.choice((0, 28))
            operations.append((kind, start * SECTOR, length * SECTOR, len(payload) if kind == WRITE else 0, flags))
            extents.append((first + start, first + start + length, version))
            if kind == WRITE:
                payload += version.to_bytes(8, "little") * (length * SECTOR // 8)
        buffer = SimBuffer(len(payload) + 16)
        buffer.view[: len(payload)] = payload
        return operations, extents, buffer, fua

    def _size(self, process: Running, index: int, volume: Any) -> int:
        """Of a volume, as the client knows it: since it connected, which may be now."""
        world = self.world
        if not world.options.growth:
            return world.sizes[index]
        known = self._sizes.get((process, index))
        if known is None or self.chance.random() < 0.3:
            known = self._sizes[process, index] = int(volume.size)
            world.guard(world.oracle.size_shown, process.host.side, index, known)
        return known

    # The primary's

    def write(self, process: Running) -> bool:
        """One batch to the primary's export; False if it takes none now."""
        server = process.server
        if server is None or not server.listening or server.paused:
            return False
        world = self.world
        index = self.chance.randrange(len(world.sizes))
        volume = list(server.volumes.values())[index]
        host = process.host
        size = self._size(process, index, volume)
        operations, extents, buffer, fua = self._operations(world.oracle.starts[index], size, world.most_blocks)
        batch = world.oracle.submitted(extents, fua, process, risky=world.disk_may_fail or host.faults.troubled)
        world.own_operations.append(operations)
        self._count += 1
        number = self._count
        self.outstanding[number] = batch, process
        server.begun()
        world.trace(f"write {process.name} {operations} {fua}")

        def finish(errors: Any) -> None:
            if process.dead:
                return
            world.trace(f"answer {number} {errors}")
            self.outstanding.pop(number, None)
            other = world.hosts["b" if host.side == "a" else "a"]
            world.guard(
                world.oracle.answered,
                batch,
                errors,
                host.platters,
                other.platters,
                host.metadata,
                other.metadata,
                host.side,
            )
            server.done()
            buffer.unpin()

        end = max((at + length for kind, _, length, at, _ in operations if kind == WRITE), default=0)
        start = min((at for kind, _, _, at, _ in operations if kind == WRITE), default=0)
        self._guarded(process, volume.submit, WriteBatch(operations, buffer, start, end, fua, finish))
        return True

    def flush(self, process: Running) -> None:
        """Everything answered before is stable when the answer comes."""
        server, world = process.server, self.world
        if server is None or not server.listening:
            return
        oracle = world.oracle
        lineage = oracle.lineage
        expected = oracle.model.copy()
        open_ = oracle._unfinished()
        count = len(lineage.batches)
        host = process.host
        volume = next(iter(server.volumes.values()))
        end = self._size(process, 0, volume) // SECTOR
        server.begun()

        def done(code: int) -> None:
            if process.dead:
                return
            server.done()
            world.trace(f"flushed {code}")
            if code or oracle.lineage is not lineage:
                return
            same = ~open_ & ~oracle.poisoned
            same[end:] = False  # another volume's
            for batch in lineage.batches[count:]:
                for first, last, _ in batch.extents:
                    same[first:last] = False
            # a guest's write that was accepted before this side took over may have been carried out since
            stable = oracle.stable(host.platters)
            wrong = (stable != expected) & (stable != oracle.model) & same
            if wrong.any():
                world.guard(
                    _raise, "durability", f"flushed and not stable on the primary: {np.flatnonzero(wrong)[:8].tolist()}"
                )

        self._guarded(process, volume.flush, done)

    def read(self, process: Running) -> None:
        server, world = process.server, self.world
        if server is None or not server.listening:
            return
        index, volume, offset, length = self._range(process)
        contents = bytearray(length)
        try:
            process.run(volume.read_into, offset, memoryview(contents))
        except OSError:
            return
        except BaseException:
            if not process.dead:
                raise
            return
        world.guard(world.oracle.check_primary_read, world.oracle.starts[index] + offset // SECTOR, bytes(contents))

    def _range(self, process: Running) -> tuple[int, Any, int, int]:
        """(number of a volume, the volume, offset, length)"""
        index = self.chance.randrange(len(self.world.sizes))
        assert process.server is not None
        volume = list(process.server.volumes.values())[index]
        sectors = self._size(process, index, volume) // SECTOR
        length = self.chance.randint(1, min(sectors, self.chance.choice((1, 4, 64))))
        return index, volume, self.chance.randrange(sectors - length + 1) * SECTOR, length * SECTOR

    # The guest's

    @staticmethod
    def _leads(volume: Any) -> bool:
        """Its side has taken over, and may not know yet that it was left: who comes now is no guest of a checkpoint."""
        leads: bool = volume.buffer.header.stage == Stage.DONE
        return leads

    def guest_write(self, process: Running) -> None:
        server, world = process.server, self.world
        if server is None or not server.listening:
            return
        index = self.chance.randrange(len(world.sizes))
        volume = list(server.volumes.values())[index]
        if self._leads(volume):
            return
        size = self._size(process, index, volume)
        operations, _, buffer, fua = self._operations(world.oracle.starts[index], size, 20)
        host = process.host
        server.begun()
        world.trace(f"guest write {operations} {fua}")

        def finish(errors: Any) -> None:
            if process.dead:
                return
            world.trace(f"guest answer {errors}")
            server.done()
            buffer.unpin()
            stage = volume.buffer.header.stage
            if errors or stage < Stage.FAILOVER:
                return
            world.oracle.guest_acknowledged += len(operations)
            own = world.oracle.metadata(host.metadata)
            assert own is not None
            world.guard(world.oracle._one_writer, own, host.side)

        start = min((at for kind, _, _, at, _ in operations if kind == WRITE), default=0)
        self._guarded(process, volume.submit, WriteBatch(operations, buffer, start, len(buffer.memory), fua, finish))

    def guest_read(self, process: Running) -> None:
        server, world = process.server, self.world
        if server is None or not server.listening or not process.alive:
            return
        index, volume, offset, length = self._range(process)
        if self._leads(volume):
            return
        contents = bytearray(length)
        first = world.oracle.starts[index] + offset // SECTOR

        def later() -> None:
            if process.alive:
                try:
                    volume.read_blocking(offset, memoryview(contents))
                except OSError:
                    return
                self._late_read(process, first, bytes(contents))

        try:
            process.run(volume.read_into, offset, memoryview(contents))
        except BlockingIOError:
            if not world.nested:
                process.run(world.loop.run_in_executor, None, later)
            return
        except OSError as error:
            if world.oracle.view is not None and not (process.host.faults.any() or world.countdown.armed):
                world.guard(_raise, "I1", f"the guest gets {error} where there is a checkpoint")
            return
        except BaseException:
            if not process.dead:
                raise
            return
        world.guard(world.oracle.check_guest_read, first, bytes(contents))

    def _late_read(self, process: Running, first: int, contents: bytes) -> None:
        """Judge what a guest reads some time after it asked: its side may have taken over meanwhile."""
        leads = process.host.side == self.world.oracle.leader
        check = self.world.oracle.check_primary_read if leads else self.world.oracle.check_guest_read
        self.world.guard(check, first, contents)

    def slow_read(self, process: Running, seconds: float) -> None:
        """A reader that dawdles in the middle of a read: its request is held, then it looks up and copies."""
        server, world = process.server, self.world
        if server is None or not server.listening:
            return
        index, volume, offset, length = self._range(process)
        if self._leads(volume):
            return
        try:
            request = volume.buffer.requests.try_begin(offset, offset + length, shared=True)
        except BlockingIOError:
            request = None
        if request is None:
            return
        world.slow_readers += 1
        first = world.oracle.starts[index] + offset // SECTOR
        contents = bytearray(length)

        def look() -> None:
            state = volume.buffer.header.state
            volume.copy_segments(volume.look_up(offset, length, volume.least(state)), memoryview(contents))
            self._late_read(process, first, bytes(contents))

        def end() -> None:
            world.slow_readers -= 1
            if not process.alive:
                return  # its locks went with it
            try:
                process.run(look)
            except OSError:
                pass
            except BaseException:
                if not process.dead:
                    raise
                return
            request.end()

        world.loop.call_later(seconds, end)

    def _guarded(self, process: Running, call: Any, *args: Any) -> None:
        """Call into the product from outside: the process may die in the middle."""
        try:
            process.run(call, *args)
        except BaseException:
            if not process.dead:
                raise
        if not self.world.nested:
            self.world._after()


def _raise(invariant: str, sentence: str) -> None:
    raise Violation(invariant, sentence)
