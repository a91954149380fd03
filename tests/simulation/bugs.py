"""Planted bugs: proof that the checkers see.

Each is a small change to the product that a tired programmer could make, with a number of seeds within which the
simulation has to find it. ``hunt(name)`` runs seeds until one fails, and then the same seeds on the product as it is,
which must pass. The options of a hunt switch on the trouble without which its bug cannot
show; all else stays random.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import common.intent
import common.wire
import primary.alignment
import primary.engine
import primary.guard
import primary.knowledge
import primary.ledger
import primary.mirror
import primary.verifier
import primary.window
import secondary.applier
import secondary.backup
import secondary.commit
import secondary.header
import secondary.link
import secondary.node
import secondary.promotion
import secondary.replica
import secondary.session
import secondary.spill
import secondary.view
from common.batch import DISCARD
from common.errors import WireError
from secondary.session import Apply, Checkpoint
from tests.simulation.clock import PROCESS
from tests.simulation.options import Options, draw
from tests.simulation.runner import Result, run


@dataclass(frozen=True)
class Bug:
    """``seeds``: it is found within so many. ``invariant``: by a check of this one, or of one of these: a disk that
    differs is called exact, or never becomes equal. ``options``: what a hunt sets."""

    plant: Callable[[Put], None]
    seeds: int
    invariant: str
    options: dict[str, Any]

    @property
    def invariants(self) -> list[str]:
        return self.invariant.split(" or ")


@dataclass
class Found:
    """What came of a hunt. ``tried``: seeds until it was over; ``result``: the one that failed; ``clean``: one that
    failed without the bug, which must not be."""

    name: str
    tried: int
    result: Result | None = None
    clean: Result | None = None

    @property
    def good(self) -> bool:
        """The bug was found, by the check that is there for it, and nothing else."""
        return self.result is not None and self.result.what in BUGS[self.name].invariants and self.clean is None

    def describe(self) -> str:
        """One line."""
        if self.clean is not None:
            return f"FAILED {self.name}: without it: {self.clean.describe()}"
        if self.result is None:
            return f"FAILED {self.name}: not found in {self.tried} seeds"
        if not self.good:
            wanted = BUGS[self.name].invariant
            return f"FAILED {self.name}: seed {self.result.seed} finds it, but not by {wanted}: {self.result.failure!r}"
        return f"ok     {self.name}: seed {self.result.seed} of {BUGS[self.name].seeds}: {self.result.failure}"


BUGS: dict[str, Bug] = {}
NONE: frozenset[str] = frozenset()
Put = Callable[[Any, str, Any], None]
"""(owner, attribute, new value)"""
Patch = Callable[[Put], None]


def bug(seeds: int, invariant: str, **options: Any) -> Callable[[Patch], Patch]:
    """Register a bug."""

    def register(plant: Patch) -> Patch:
        BUGS[plant.__name__] = Bug(plant, seeds, invariant, options)
        return plant

    return register


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """The product with this bug in it; taken out on leaving."""
    undo: list[tuple[Any, str, Any]] = []

    def put(owner: Any, attribute: str, value: Any) -> None:
        undo.append((owner, attribute, vars(owner)[attribute]))
        setattr(owner, attribute, value)

    BUGS[name].plant(put)
    try:
        yield
    finally:
        for owner, attribute, value in reversed(undo):
            setattr(owner, attribute, value)


def hunt(name: str, *, start: int = 0) -> Found:
    """Seeds from ``start`` on, with the bug and without it."""
    known = BUGS[name]
    found = Found(name, 0)
    with planted(name):
        while found.tried < known.seeds and found.result is None:
            result = _run(known, start + found.tried)
            found.tried += 1
            if result.failure is not None:
                found.result = result
    for seed in range(start, start + found.tried):
        result = _run(known, seed)
        if result.failure is not None:
            found.clean = result
            break
    return found


def _run(known: Bug, seed: int) -> Result:
    options: Options = replace(draw(random.Random(seed), seed), **known.options)
    return run(seed, options)


@bug(20, "I4", troubles=NONE, sync=True)
def acknowledge_before_apply(put: Put) -> None:
    """The secondary acknowledges a batch and writes it a little later."""
    real = secondary.applier.Applier._do

    def do(self: Any, work: Any) -> None:
        if not isinstance(work, Apply):
            real(self, work)
            return
        self._applied(work)

        def write() -> None:
            self._copy(work.extents, wait=True)
            self._write(work, work.extents)

        self._loop.call_later(0.01, write)

    put(secondary.applier.Applier, "_do", do)


@bug(20, "I1", troubles=NONE, guest=True, interval_s=0.3)
def skip_the_epoch_check(put: Put) -> None:
    """A reader takes any entry of the map for a current one."""
    real = secondary.view.VolumeView.least

    def least(self: Any, state: int) -> int:
        real(self, state)
        return 1 << 32

    put(secondary.view.VolumeView, "least", least)


@bug(20, "I2", troubles=frozenset({"cut", "reset"}), loss="continue", steps=120, tempo_s=0.1, failover="")
def forget_a_dirty_bit(put: Put) -> None:
    """What a lost secondary may lack is not marked."""
    put(primary.mirror.Mirror, "mark_dirty", lambda self, extents: None)


@bug(20, "I1", troubles=NONE, guest=True)
def cow_after_write(put: Put) -> None:
    """Old contents are copied when they are old no more."""

    def do(self: Any, work: Any) -> None:
        if not isinstance(work, Apply):
            real(self, work)
            return
        self._write(work, work.extents)
        self._copy(work.extents, wait=True)
        self._applied(work)

    real = secondary.applier.Applier._do
    put(secondary.applier.Applier, "_do", do)


@bug(40, "I1", troubles=frozenset({"preempt"}), guest=True, steps=120)
def look_up_outside_the_request(put: Put) -> None:
    """A reader looks the blocks up, and something happens before its request begins."""

    def read(self: Any, offset: int, view: memoryview, *, wait: bool) -> None:
        mask = self._mask
        segments = self.look_up(offset, len(view), self.least(self._words[secondary.header.W_STATE]))
        platter = self.disk.platter
        platter.between(platter, "look-up")
        request = self._begin((((offset & ~mask), (offset + len(view) + mask) & ~mask),), wait, shared=True)
        try:
            self.copy_segments(segments, view, wait=wait)
        finally:
            self.requests.release(request)

    put(secondary.view.VolumeView, "_read", read)


@bug(60, "I2", troubles=frozenset({"stale", "reset", "jitter"}), steps=120, failover="")
def replay_without_session_check(put: Put) -> None:
    """A batch of a session that is over is applied like any other."""
    real = secondary.session.SecondarySession._tell_off

    def tell_off(self: Any, peer: bytes, message: Any) -> Any:
        if not isinstance(message, common.wire.Batch):
            return real(self, peer, message)
        self._hand_out(self._received + 1)
        return [Apply(self._received, message, False, list(common.wire.EXTENT_STRUCT.iter_unpack(message.extents)))]

    put(secondary.session.SecondarySession, "_tell_off", tell_off)


@bug(60, "I5", troubles=frozenset({"cut"}), failover="latest", steps=120, tempo_s=0.1)
def promote_without_a_generation(put: Put) -> None:
    """The side that takes over goes on in the generation of the one that led."""
    put(secondary.promotion, "extend", lambda history, identity, side: history)


@bug(40, "I2", troubles=frozenset({"reset", "jitter"}), steps=120)
def drop_a_replayed_batch(put: Put) -> None:
    """The first batch after a reconnect is left out."""
    real = primary.window.Window.rewind

    def rewind(self: Any, received: int, free: int) -> int:
        count: int = real(self, received, free)
        for entry in list(self.waiting)[:count]:
            if entry[primary.window.KIND] == common.wire.BATCH and entry[primary.window.PIN] is None:
                continue
            if entry[primary.window.KIND] == common.wire.BATCH:
                self.waiting.remove(entry)
                pin, queued_at = entry[primary.window.PIN], entry[primary.window.QUEUED_AT]
                empty = primary.window.batch_entry(b"", b"", 0, 0, pin, queued_at)
                self.used += empty[primary.window.COST] - entry[primary.window.COST]
                self.waiting.appendleft(empty)
                break
        return count

    put(primary.window.Window, "rewind", rewind)


@bug(20, "I4", troubles=NONE, sync=True)
def acknowledge_before_durable(put: Put) -> None:
    """FUA is answered when the write is in the page cache."""

    def applied(self: Any, work: Any) -> None:
        self._header.applied_sequence = work.sequence
        self.session.applied(work.sequence)
        if work.flush:
            self.session.durable(self.session.point())

    put(secondary.applier.Applier, "_applied", applied)


@bug(60, "I2 or liveness", troubles=frozenset({"cut", "one_way", "reset", "jitter", "kill_secondary", "slow"}),
     loss="continue", steps=120, tempo_s=0.1, failover="", blocks=(40, 40))  # fmt: skip
def clear_a_dirty_bit_too_early(put: Put) -> None:
    """A piece of a resync that was under way when the secondary went is not marked again, nor anywhere else."""

    def go_alone(self: Any, state: str, reason: str, unacknowledged: Any) -> None:
        guests = [batch for batch in unacknowledged if not batch.flags & common.wire.RESYNC_DATA]
        for batch in unacknowledged:
            if batch.flags & common.wire.RESYNC_DATA and batch.pin is not None:
                batch.pin.unpin()
        for unfinished in self.knowledge._unfinished:
            unfinished.clear_all()  # which would put it right
        real_go(self, state, reason, guests)

    real_go = primary.engine.Engine._go_alone
    put(primary.engine.Engine, "_go_alone", go_alone)


@bug(20, "I3", troubles=NONE, small_pool=6, blocks=(40,), steps=120)
def a_barrier_overtakes(put: Put) -> None:
    """A checkpoint goes in front of the writes that wait."""
    real = primary.window.Window.wait

    def wait(self: Any, entry: Any) -> None:
        real(self, entry)
        if entry[primary.window.KIND] == common.wire.CHECKPOINT and not self.sync_open:
            self.waiting.appendleft(self.waiting.pop())

    put(primary.window.Window, "wait", wait)


@bug(40, "I2 or liveness", troubles=frozenset({"kill_primary", "cut"}), loss="continue", steps=120, tempo_s=0.1,
     failover="")  # fmt: skip
def no_write_intent(put: Put) -> None:
    """Regions are written to before their bit is on the disk."""

    def require(self: Any, volume: int, operations: Any, done: Callable[[int], None]) -> None:
        for _, offset, length, _, _ in operations:
            self._mark(volume, offset, length)
        self._loop.call_soon(done, 0)

    put(primary.guard.IntentGuard, "require", require)


@bug(20, "I4", troubles=frozenset({"cut"}), loss="continue", sync=True, steps=120, tempo_s=0.1)
def go_alone_without_a_generation(put: Put) -> None:
    """A primary that lost its secondary answers its clients at once."""

    def go_alone(self: Any, state: str, reason: str, unacknowledged: Any) -> None:
        for batch in unacknowledged:
            self.mirror.mark_dirty(batch.extents)
        self._set_state(state, reason)
        self._let_go(unacknowledged)

    put(primary.engine.Engine, "_go_alone", go_alone)


@bug(60, "I2", troubles=frozenset({"power_secondary"}), steps=120, tempo_s=0.1, failover="")
def an_empty_ledger(put: Put) -> None:
    """What was applied and not recorded counts as safe when the secondary's host goes down."""
    put(primary.ledger.Ledger, "add_to", lambda self, bitmaps: None)


@bug(60, "I3", troubles=frozenset({"preempt"}), failover="checkpoint", guest=True, steps=120, tempo_s=0.01)
def marks_that_stay(put: Put) -> None:
    """A write of the promoted side goes to the disk, and its block stays in the buffer, too."""
    put(secondary.replica, "clear_marks", lambda layer, first, last: None)


@bug(20, "I1", troubles=NONE, guest=True)
def discards_are_not_copied(put: Put) -> None:
    """Copy-before-write is for writes, is it not?"""
    real = secondary.applier.Applier._copy

    def copy(self: Any, extents: Any, *, wait: bool) -> Any:
        return real(self, [extent for extent in extents if extent[4] != DISCARD], wait=wait)

    put(secondary.applier.Applier, "_copy", copy)


@bug(20, "I3", troubles=NONE, steps=60)
def a_checkpoint_before_its_turn(put: Put) -> None:
    """The secondary takes a checkpoint when it hears of it, not when its turn comes."""

    def put_work(self: Any, work: Any) -> None:
        if isinstance(work, Checkpoint) and self._queue and isinstance(self._queue[-1], Apply):
            last = self._queue.pop()
            self._queue.append(Checkpoint(last.sequence, work.number))
            self._queue.append(last._replace(sequence=work.sequence))
            return
        real(self, work)

    real = secondary.applier.Applier.put
    put(secondary.applier.Applier, "put", put_work)


@bug(60, "I2", troubles=frozenset({"power_primary", "cut"}), loss="continue", steps=120, tempo_s=0.1, failover="",
     commands=NONE)  # fmt: skip
def intents_not_synced(put: Put) -> None:
    """The bits of the write-intent file are written, and nobody sees to it that they stay."""
    real = common.intent.IntentFile._write

    def write(self: Any, pages: Any, *, durable: bool) -> None:
        real(self, pages, durable=False)

    put(common.intent.IntentFile, "_write", write)


@bug(20, "I7", troubles=frozenset({"bad_messages", "stale", "reset"}), failover="", commands=NONE)
def a_wire_error_ends_the_process(put: Put) -> None:
    """What a peer sends, and nobody can read, is an error like any other."""
    real = secondary.link.Link._received

    def received(self: Any, peer: bytes, frames: Any) -> None:
        try:
            common.wire.decode(frames)
        except WireError as error:
            process: Any = PROCESS.get()
            process.lifecycle.fail(error)
        real(self, peer, frames)

    put(secondary.link.Link, "_received", received)


@bug(40, "liveness", troubles=NONE, commands=frozenset({"resize", "dirty_growth"}), steps=60)
def new_space_is_not_marked(put: Put) -> None:
    """What a disk holds where it grew is zeroes, is it not?"""

    async def grow(self: Any, sizes: Any) -> None:
        self.ledger.grow(sizes)
        for bitmaps in (self.suspects, self._unfinished):
            for bitmap, size in zip(bitmaps, sizes, strict=True):
                bitmap.grow(size)

    put(primary.knowledge.Knowledge, "grow", grow)


@bug(20, "verify", troubles=NONE, commands=frozenset({"verify", "corrupt"}))
def a_verification_looks_at_the_first_block_of_a_piece(put: Put) -> None:
    """A piece that differs is looked at block by block, up to the first one."""
    real = primary.verifier.Verifier._heard

    def heard(self: Any, index: int, offset: int, length: int, differs: bool | None) -> None:
        first = offset % vars(primary.verifier)["QUESTION_BYTES"] == 0
        real(self, index, offset, length, differs and (first or not self._fine) if differs is not None else None)

    put(primary.verifier.Verifier, "_heard", heard)


@bug(20, "verify", troubles=NONE, commands=frozenset({"verify", "corrupt"}))
def a_repair_repairs_nothing(put: Put) -> None:
    """It asks whether blocks differ, and takes no for an answer."""
    real = primary.alignment.Alignment._verify

    async def verify(self: Any, verifier: Any, *, repair: bool) -> Any:
        return await real(self, verifier, repair=False)

    put(primary.alignment.Alignment, "_verify", verify)


@bug(60, "I2", troubles=frozenset({"cut"}), commands=frozenset({"takeover", "rejoin"}), loss="continue", failover="",
     steps=120, tempo_s=0.5)  # fmt: skip
def a_rejoin_forgets_what_was_written_alone(put: Put) -> None:
    """The side that gives up does not tell where its own writes are."""
    put(secondary.node.SecondaryNode, "_own_writes", lambda self: b"")


@bug(20, "I1", troubles=frozenset({"cut", "jitter"}), small_pool=4, blocks=(42,), guest=True,
     loss="continue", steps=240, tempo_s=0.1, failover="", interval_s=0.0, large=False, dense=False,
     commands=NONE)  # fmt: skip
def a_spill_file_without_contents(put: Put) -> None:
    """Old contents that find no room in memory are written nowhere."""
    put(secondary.spill, "write", lambda fd, path, offset, data: None)
