"""A pair in memory: both session cores, a link that loses, repeats and delays, and an oracle that knows better.

Disks are lists of version numbers, one a block: the batch with index k writes k into each block that it touches. So a
disk is the primary's history cut after batch k exactly if each block holds the last version that is not after k.

The primary's shell here does what MirroredDisk does, in the simplest way: it is the second implementation of the
contract in primary/session.py. The secondary's disk has a cache: only a flush makes it survive ``power_cut``.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from xxhash import xxh3_64_intdigest

from common import wire
from common.batch import WRITE
from common.bitmap import DirtyBitmap
from common.generation import Generation, History, Standing, extend
from primary import effects as up
from primary.contact import PrimaryConfig, State
from primary.ledger import Ledger, mark
from primary.session import PrimarySession
from secondary import session as down

BLOCK = 512
Loss = Literal["continue", "block"]
OLD_PEER = b"old"


@dataclass
class Batch:
    """A batch the client sent. ``flush`` waits for durability."""

    index: int
    blocks: tuple[int, ...]
    flush: bool
    upto: int


@dataclass
class SecondaryHost:
    """The secondary's disk, buffer header (memory) and metadata (durable)."""

    blocks: int
    cache: list[int] = field(default_factory=list)
    stable: list[int] = field(default_factory=list)
    header: down.Position = field(default_factory=down.Position)
    metadata: down.Position = field(default_factory=down.Position)
    history: History = ()
    consistent: bool = False
    old: dict[int, int] | None = None
    """The hidden disk: old contents since the last checkpoint; None: nothing is copied."""

    def __post_init__(self) -> None:
        self.cache = [0] * self.blocks
        self.stable = [0] * self.blocks

    def checkpoint_view(self) -> list[int]:
        assert self.old is not None
        return [self.old.get(block, version) for block, version in enumerate(self.cache)]


class Pair:
    """See the module. ``rng`` decides everything that is left to chance."""

    def __init__(self, seed: int, *, blocks: int = 48, pool: int = 24, loss: Loss = "continue") -> None:
        self.rng = random.Random(seed)
        self.now = 100.0
        self.blocks, self.pool, self.loss = blocks, pool, loss
        self.disk = [0] * blocks
        self.writes: list[list[int]] = [[0] for _ in range(blocks)]
        self.index = 0
        self.history: History = (Generation(1000, 1, "a"),)
        self.base = 1000
        self.dirty = DirtyBitmap(blocks * BLOCK, BLOCK)
        self.host = SecondaryHost(blocks)
        self.instances = 0
        self.checkpoints: dict[int, list[int]] = {}
        self.log: list[str] = []
        self.finished: list[Batch] = []
        self.outstanding: dict[int, Batch] = {}
        self.failed_flushes = 0
        self.resyncs: list[bool] = []
        self.moved = 0
        self.refusals: list[str] = []
        self.bases: dict[int, int] = {}
        self.late: list[tuple[bytes, ...]] = []
        self.connection = 0
        self.to_secondary: list[tuple[bytes, tuple[bytes, ...]]] = []
        self.to_primary: list[tuple[int, tuple[bytes, ...]]] = []
        self.link_up = True
        self.fail_apply = self.fail_flush = False
        self.resync_cursor: int | None = None
        self.verdicts: list[tuple[Any, bytes | None]] = []
        self.connect_pending = True
        self.alone = False
        self.strict = True
        self.forgot = False
        """What the secondary had applied may be missing again until a resync ends."""
        self.stream = 0
        self.primary: PrimarySession
        self.secondary: down.SecondarySession
        self.ledger: Ledger
        self.start_primary(clean=False)
        self.start_secondary()

    # ------------------------------------------------------------------------------------------------ processes

    def start_primary(self, *, clean: bool) -> None:
        """Start a primary process; ``clean``: the one before stopped with everything acknowledged."""
        self.instances += 1
        next_sequence = 1
        if clean:
            next_sequence = self.primary.last_sequence + 1
        else:
            self.stream = self.rng.getrandbits(63) + 1
        self.ledger = Ledger([self.blocks * BLOCK], BLOCK)
        standing = Standing("pair", "a", "primary", self.history, True, self.base)
        config = PrimaryConfig((("v", self.blocks * BLOCK),), 24_000, on_peer_loss=self.loss)
        self.primary = PrimarySession(
            config, standing, instance=self.instances, stream=self.stream, next_sequence=next_sequence,
            bases=self.bases, ledger=self.ledger,
        )
        self.resync_cursor = None
        self.connect_pending = True

    def stop_primary(self, *, clean: bool) -> None:
        """The process ends; a new one starts. A write-intent bitmap would hold what the old one knew."""
        certain = self.primary.idle and self.primary.state is State.ESTABLISHED and not self.primary.syncing
        if clean and certain:
            self.on_primary(self.primary.close("stopped"))
            self.ledger.add_to([self.dirty])
            had_dirt = bool(self.dirty)
            if not had_dirt:
                self.drop_connection()
                self.start_primary(clean=True)
                return
        self.ledger.add_to([self.dirty])
        for extents in self.primary.pending_extents():
            mark([self.dirty], extents)
        # clients of a killed primary never hear of their writes
        self.outstanding.clear()
        self.bases[self.stream] = self.primary._window.recorded
        self.drop_connection()
        self.start_primary(clean=False)

    def start_secondary(self) -> None:
        """Start a secondary process on what the host remembers."""
        host = self.host
        standing = Standing("pair", "b", "secondary", host.history, host.consistent)
        self.queue: list[down.Work] = []
        self.flushes: list[down.Point] = []
        self.secondary = down.SecondarySession(
            down.SecondaryConfig((("v", self.blocks * BLOCK),), BLOCK, self.pool), standing, host.header,
            free_blocks=self.free(),
        )

    def kill_secondary(self) -> None:
        """SIGKILL: memory of the host (cache, header, buffer) stays."""
        self.drop_connection()
        self.start_secondary()

    def power_cut(self) -> None:
        """The secondary's host goes down: some of its cache reached the disk, header and buffer are gone."""
        host = self.host
        host.cache = [c if self.rng.random() < 0.5 else s for c, s in zip(host.cache, host.stable, strict=True)]
        host.stable = list(host.cache)
        meta = host.metadata
        host.header = down.Position(meta.stream, meta.recorded, meta.recorded, meta.recorded, meta.checkpoint, False,
                                    meta.syncing)
        host.old = None
        host.consistent = False
        self.forgot = True
        self.kill_secondary()

    # ------------------------------------------------------------------------------------------------- the clients

    def write(self, blocks: tuple[int, ...], *, flush: bool = False) -> None:
        """A client's batch: one extent a block, versions in the payload."""
        self.index += 1
        batch = Batch(self.index, blocks, flush, self.index)
        for block in blocks:
            self.disk[block] = self.index
            self.writes[block].append(self.index)
        if not self.primary.attached:
            self.go_alone(batch)
            return
        gap = b"hdr"
        payload = b"".join(gap + self.index.to_bytes(BLOCK, "little") for _ in blocks)
        extents = b"".join(
            wire.EXTENT_STRUCT.pack(block * BLOCK, BLOCK, i * (BLOCK + 3) + 3, 0, WRITE, 0, 0)
            for i, block in enumerate(blocks)
        )
        self.outstanding[batch.index] = batch
        flags = wire.FLUSH if flush else 0
        self.send(self.primary.write(extents, memoryview(payload), len(blocks), flags, batch, self.now))

    def go_alone(self, batch: Batch) -> None:
        """Detached: a new generation first, then dirty bits."""
        if not self.alone:
            self.alone = True
            self.history = extend(self.history, self.rng.getrandbits(63) + 1, "a")
            self.primary.standing = self.primary.standing._replace(history=self.history)
        for block in batch.blocks:
            self.dirty.set_range(block * BLOCK, BLOCK)

    def checkpoint(self) -> None:
        if self.primary.attached and not self.primary.syncing and self.primary.state is not State.WELCOMED:
            self.send(self.primary.checkpoint(self.index, self.now))

    def verify(self, blocks: list[int]) -> None:
        """Ask for the hashes of what the primary disk holds now."""
        questions = np.zeros(len(blocks), dtype=wire.QUESTION)
        for i, block in enumerate(blocks):
            content = self.disk[block].to_bytes(BLOCK, "little")
            questions[i] = (block * BLOCK, BLOCK, 0, 0, xxh3_64_intdigest(content))
        self.send(self.primary.verify(questions.tobytes(), tuple(blocks), self.now))

    # ------------------------------------------------------------------------------------------- the primary's shell

    def send(self, messages: list[tuple[Any, ...]]) -> None:
        for frames in messages:
            self.put(frames)

    def put(self, frames: tuple[Any, ...]) -> None:
        if self.link_up and not self.connect_pending:
            self.to_secondary.append((b"c%d" % self.connection, tuple(bytes(f) for f in frames)))

    def on_primary(self, effects: list[up.Effect]) -> None:
        for effect in effects:
            match effect:
                case up.Send(frames):
                    self.put(frames)
                case up.Reconnect():
                    self.drop_connection()
                    self.connect_pending = True
                case up.Acknowledged(pins=pins):
                    for batch in pins:
                        self.finish(batch)
                case up.FlushFailed(pins=pins):
                    for batch in pins:
                        self.failed_flushes += 1
                        self.outstanding.pop(batch.index)
                case up.Lost(unacknowledged=batches) | up.Refused(unacknowledged=batches):
                    self.on_lost(effect, batches)
                case up.ResyncNeeded(full=full):
                    self.begin_resync(full)
                case up.CheckpointDone(number=number, token=token):
                    self.check_checkpoint(number, token)
                case up.Verified(token=token, differing=differing):
                    self.verdicts.append((token, differing))
                case up.Starved():
                    self.log.append("starved")
                    if self.primary._window.sync_open:
                        self.send(self.primary.give_up_checkpoint(self.now))
                case _:
                    self.log.append(type(effect).__name__)

    def on_lost(self, effect: up.Lost | up.Refused, batches: list[Any]) -> None:
        if isinstance(effect, up.Refused):
            self.refusals.append(effect.sentence)
        self.log.append(type(effect).__name__)
        if self.primary.attached:
            assert not batches
            return
        for extents, _, pin in batches:
            mark([self.dirty], extents)
            if pin is not None:
                self.go_alone(pin)
                self.outstanding.pop(pin.index)
        # what the planner had not sent is still in self.dirty; what it had sent is in the ledger until recorded
        self.resync_cursor = None

    def finish(self, batch: Batch) -> None:
        """I4: what is acknowledged is on the secondary; with FLUSH on its stable storage."""
        self.outstanding.pop(batch.index)
        self.finished.append(batch)
        for block in batch.blocks:
            there = self.host.cache[block] >= batch.index
            assert there or self.forgot, f"batch {batch.index} acknowledged, block {block} is not there"
            if batch.flush and not self.forgot:
                assert self.host.stable[block] >= batch.index

    def begin_resync(self, full: bool) -> None:
        if full:
            self.dirty.set_all()
        self.ledger.add_to([self.dirty])
        self.ledger.clear()
        self.resyncs.append(full)
        self.on_primary(self.primary.begin_resync(full=full, keep_checkpoint=self.rng.random() < 0.5, now=self.now))
        self.resync_cursor = 0

    def resync_step(self) -> None:
        """Send one dirty piece; at the end, finish."""
        if self.resync_cursor is None or not self.primary.syncing or self.primary.state is not State.ESTABLISHED:
            return
        run = self.dirty.next_run(0, 4 * BLOCK)
        if run is None:
            self.resync_cursor = None
            self.alone = False
            self.base = self.history[-1].identity
            self.primary.standing = self.primary.standing._replace(base=self.base)
            self.send(self.primary.finish_resync(self.index, self.now))
            return
        offset, length = run
        self.dirty.clear_range(offset, length)
        first, count = offset // BLOCK, length // BLOCK
        self.moved += count
        payload = b"".join(v.to_bytes(BLOCK, "little") for v in self.disk[first : first + count])
        extents = wire.EXTENT_STRUCT.pack(offset, length, 0, 0, WRITE, 0, 0)
        self.send(self.primary.write(extents, payload, count, wire.RESYNC_DATA, None, self.now))

    # ----------------------------------------------------------------------------------------- the secondary's shell

    def free(self) -> int:
        return self.pool - len(self.host.old) if self.host.old is not None else self.pool

    def on_secondary(self, effects: list[down.Effect]) -> None:
        for effect in effects:
            match effect:
                case down.Send(peer, frames):
                    self.to_primary.append((int(peer[1:]) if peer != OLD_PEER else -1, tuple(bytes(f) for f in frames)))
                case down.Connected() | down.Disconnected() | down.Refused() | down.Asked():
                    self.log.append(type(effect).__name__)
                case _:
                    self.queue.append(effect)

    def work(self) -> None:
        """Do the oldest work, or a flush that was begun."""
        if self.flushes and (not self.queue or self.rng.random() < 0.2):
            self.flush_secondary(self.flushes.pop(0))
            return
        if not self.queue:
            return
        host, session = self.host, self.secondary
        if self.fail_apply and isinstance(self.queue[0], down.Apply):
            self.fail_apply = False
            effects = session.failed_apply(self.queue[0].sequence, 5, "the disk of the secondary gave an I/O error")
            self.queue.clear()
            self.on_secondary(effects)
            return
        match self.queue.pop(0):
            case down.Apply(sequence, batch, flush, _):
                self.apply(batch)
                session.applied(sequence)
                if flush:
                    self.flushes.append(session.point())
            case down.Checkpoint(sequence, number):
                self.checkpoints[number] = list(host.cache)
                host.old = {}
                host.consistent = True
                if self.rng.random() < 0.5:
                    self.record()
                self.on_secondary(session.checkpointed(sequence, number, 0.001))
            case down.BeginResync(sequence, _, _, keep):
                if not keep:
                    host.old, host.consistent = None, False
                session.resync_begun(sequence, consistent=host.consistent)
                host.metadata = session.position
            case down.EndResync(sequence, history):
                host.history = history
                self.forgot = False
                if host.old is None:
                    host.old = {}
                session.resync_ended(sequence, history)
                host.metadata = session.position
            case down.Verify(sequence, questions):
                self.on_secondary(session.verified(sequence, self.compare(questions)))
        host.header = session.position
        self.check_prefix()

    def apply(self, batch: wire.Batch) -> None:
        host = self.host
        for offset, length, position, _, _, _, _ in wire.EXTENT_STRUCT.iter_unpack(batch.extents):
            for step in range(0, length, BLOCK):
                block = (offset + step) // BLOCK
                data = batch.payload[position + step : position + step + BLOCK]
                if host.old is not None and block not in host.old:
                    host.old[block] = host.cache[block]
                    assert len(host.old) <= self.pool, "the pool overflowed: the credit was wrong"
                host.cache[block] = int.from_bytes(data, "little")

    def flush_secondary(self, point: down.Point) -> None:
        """fdatasync, begun at ``point``, is over; it is noted in the metadata now and then."""
        if self.fail_flush:
            self.fail_flush = False
            self.flushes.clear()
            lost = self.rng.random() < 0.5
            effects = self.secondary.failed_flush(point, 5, "the secondary could not flush its disk")
            self.queue.clear()
            self.secondary.drop_work()
            self.on_secondary(effects)
            if lost:
                self.host.cache = list(self.host.stable)
                self.forgot = True
            self.host.header = self.host.metadata = self.secondary.position
            return
        self.host.stable = list(self.host.cache)
        self.secondary.durable(point)
        if self.rng.random() < 0.5:
            self.host.metadata = self.secondary.position
            self.secondary.recorded(point)
            self.host.metadata = self.secondary.position
        self.host.header = self.secondary.position

    def record(self) -> None:
        """fdatasync of the disk, then a durable note of it, as after a checkpoint."""
        self.host.stable = list(self.host.cache)
        point = self.secondary.point()
        self.secondary.recorded(point)
        self.host.header = self.host.metadata = self.secondary.position

    def compare(self, questions: bytes) -> bytes:
        array = np.frombuffer(questions, dtype=wire.QUESTION)
        return bytes(
            xxh3_64_intdigest(self.host.cache[int(q["offset"]) // BLOCK].to_bytes(BLOCK, "little")) != int(q["hash"])
            for q in array
        )

    def acknowledge(self) -> None:
        self.on_secondary(self.secondary.acknowledge(self.free()))

    # ------------------------------------------------------------------------------------------------------ oracle

    def is_prefix(self, disk: list[int]) -> bool:
        """Whether ``disk`` is the primary's history cut after a batch (or in the last, if that was cut in pieces)."""
        last = max(disk)
        torn = False
        for block, version in enumerate(disk):
            versions = self.writes[block]
            expected = versions[bisect_right(versions, last) - 1]
            if version != expected:
                if expected == last and version == versions[bisect_right(versions, last) - 2]:
                    torn = True
                    continue
                return False
        return not torn or self.pool < 12

    def check_prefix(self) -> None:
        """I2, except while a resync is under way."""
        position = self.secondary.position
        if self.strict and position.exact and not position.syncing and position.applied:
            assert self.is_prefix(self.host.cache), f"not a prefix: {self.host.cache}"

    def check_checkpoint(self, number: int, token: int | None) -> None:
        """I3: checkpoint ``number`` is the primary's contents when it was asked for."""
        snapshot = self.checkpoints[number]
        assert self.is_prefix(snapshot)
        if token is not None:
            expected = [versions[bisect_right(versions, token) - 1] for versions in self.writes]
            assert snapshot == expected
        if self.host.old is not None and number == max(self.checkpoints) and not self.forgot:
            assert self.host.checkpoint_view() == snapshot

    # -------------------------------------------------------------------------------------------------------- link

    def drop_connection(self) -> None:
        """Everything in flight on the connection is gone, except what arrives much later, from an old identity."""
        self.late = [frames for _, frames in self.to_secondary if self.rng.random() < 0.3]
        self.to_secondary.clear()
        self.to_primary.clear()
        self.connection += 1

    def cut(self) -> None:
        self.drop_connection()
        self.on_primary(self.primary.disconnected("cut", self.now))

    def deliver(self, count: int) -> None:
        """Move up to ``count`` messages each way."""
        for _ in range(count):
            if self.to_secondary and self.link_up:
                peer, frames = self.to_secondary.pop(0)
                self.on_secondary(self.secondary.receive(peer, frames, self.now))
            if self.to_primary and self.link_up:
                connection, frames = self.to_primary.pop(0)
                if connection == self.connection:
                    self.on_primary(self.primary.receive(frames, self.now))

    def deliver_late(self) -> None:
        """Messages of a connection that is gone, some twice, in any order."""
        self.rng.shuffle(self.late)
        for frames in self.late:
            for _ in range(self.rng.randint(1, 2)):
                self.on_secondary(self.secondary.receive(OLD_PEER, frames, self.now))
        self.late = []

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.on_primary(self.primary.handle_timer(self.now))
        self.on_secondary(self.secondary.handle_timer(self.now))
        if self.connect_pending and self.link_up and self.primary.state is not State.CLOSED:
            self.connect_pending = False
            self.on_primary(self.primary.connect(self.now))

    def settle(self, rounds: int = 3000) -> None:
        """Heal everything and run until both are quiet and equal in the eyes of the primary."""
        self.link_up, self.fail_apply, self.fail_flush = True, False, False
        for _ in range(rounds):
            self.tick(0.05)
            self.deliver(50)
            self.resync_step()
            for _ in range(50):
                self.work()
            self.acknowledge()
            quiet = not (self.to_secondary or self.to_primary or self.queue or self.flushes)
            if quiet and self.primary.state is State.ESTABLISHED and self.primary.idle and not self.primary.syncing:
                return
        raise AssertionError(f"did not settle: {self.primary.state} {self.primary.statistics()} "
                             f"{self.secondary.position} {self.log[-20:]} {self.refusals[-1:]}")
