"""The independent model of a pair, and the checks of the invariants against it.

Contents are versions: every write op of a client gets a number of its own, and each 512-byte sector that it covers is
filled with that number. So a disk is an array of numbers, and who wrote what is visible in it. Zeroes and discards
are version 0.

A *lineage* is one stretch of the primary's life: the contents of its disk when its process started, and the batches
submitted since, in order. The secondary disk must be a prefix of one (I2). What the oracle knows of the product it
takes from outside: contents of disks, answers to clients, metadata as it is on stable storage, and the one state word
of the disk buffer as it is stored.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.batch import DISCARD, WRITE
from common.metadata import Metadata, parse
from secondary.header import Stage
from tests.simulation.disk import SECTOR, MetadataFile, Platter
from tests.simulation.lineage import ClientBatch, Extent, Lineage, Tracked, Versions

_NOTHING: Mapping[int, set[int]] = {}


class Violation(AssertionError):
    """An invariant does not hold."""

    def __init__(self, invariant: str, sentence: str) -> None:
        super().__init__(f"{invariant}: {sentence}")
        self.invariant = invariant


class Oracle:
    """See the module. Sectors of all volumes are numbered through; ``starts[i]`` is the first of volume i."""

    def __init__(self, sizes: list[int], *, sync: bool) -> None:
        self.sync = sync
        self.starts = [sum(sizes[:i]) // SECTOR for i in range(len(sizes))]
        self.sectors = sum(sizes) // SECTOR
        self.version = 0
        self.lineage = Lineage(np.zeros(self.sectors, np.uint64))
        self.lineages = [self.lineage]
        self.model = np.zeros(self.sectors, np.uint64)
        """The primary disk after everything submitted."""
        self.poisoned = np.zeros(self.sectors, bool)
        """An operation on them failed: their contents are nobody's promise until they are written again."""
        self.unsure = np.zeros(self.sectors, bool)
        """The same for the guest's view, or the promoted disk."""
        self.fresh = np.zeros(self.sectors, bool)
        """Disks grew by these, and the two sides' held different things there: alike when written, or compared."""
        self.corrupt = np.zeros(self.sectors, bool)
        """A bit of one side's disk turned over there, once: in what is behind the version of the sector."""
        self.ever_poisoned = np.zeros(self.sectors, bool)
        self.shown = [0] * len(sizes)
        """Bytes of each volume that a client of a leading side saw: never less from then on."""
        self.noted: dict[str, tuple[int, ...]] = {}
        """Bytes of the volumes by each side's metadata."""
        self.tracked: Tracked | None = None
        self.rivals: list[Tracked] = []
        """What the disk may be as well: a primary that lost all it wrote begins where the one before it began."""
        self.forgotten = False
        """The secondary disk lost writes in a flush that failed, and the secondary has yet to say so."""
        self.lost: dict[int, set[int]] = {}
        """What the secondary had, and lost in flushes that failed and with its power: versions, by sector."""
        self.promised: list[tuple[ClientBatch, list[Extent]]] = []
        """Acknowledged with FUA, and lost by a secondary that is being synchronised: stable at the end of that."""
        self.handover: tuple[Versions, Versions] | None = None
        """The secondary disk, and what of it was stable, when its side took over: all that it confirmed is there."""
        self.may_be_torn = False
        self.cut = False
        """The primary may cut batches in pieces, and then a checkpoint may fall between two of them."""
        self.view: Versions | None = None
        """What the guest has to see: checkpoint and its own writes; after a promotion, the disk."""
        self.leader = "a"
        """The side whose clients' writes count."""
        self.promoted = False
        """The other side has taken over, and its commit is not complete: ``view`` is what its clients see."""
        self.promoted_side = ""
        self.mixed = ""
        """A side that lost its memory before its commit was complete: its disk is neither state, and it may not serve
        before an operator has decided."""
        self.through = np.zeros(self.sectors, bool)
        """The guest wrote here during the commit: stable when it asks for that."""
        self.checkpoints: dict[int, tuple[int, Versions, NDArray[np.bool_]]] = {}
        """By number: batches, the disk, and where it is nobody's promise."""
        self.taken: set[int] = set()
        self.acknowledged = 0
        self.operations = 0
        self.generations: dict[int, str] = {}
        self.guest_acknowledged = 0
        self.reads = 0
        self.seen: tuple[Versions, ...] = ()
        self._parsed: dict[bytes, Metadata] = {}
        self.checkpoint_count = 0
        self.promotions = 0
        self.prefix_checks = 0
        """Of a disk that the secondary called exact."""
        self.inexact = 0
        """Checks that had to be left out, because it did not."""

    # Disks as versions

    def versions(self, platters: list[Platter]) -> Versions:
        if len(platters) == 1:
            return platters[0].versions
        return np.concatenate([platter.versions for platter in platters])

    def stable(self, platters: list[Platter]) -> Versions:
        if len(platters) == 1:
            return platters[0].stable_versions
        return np.concatenate([platter.stable_versions for platter in platters])

    def metadata(self, file: MetadataFile) -> Metadata | None:
        """What the side would know after a loss of power."""
        if file.stable is None:
            return None
        known = self._parsed.get(file.stable)
        if known is None:
            known = self._parsed[file.stable] = parse(file.stable, "metadata")
        return known

    # Clients of the primary

    def new_version(self) -> int:
        self.version += 1
        return self.version

    def lead(self, side: str, platters: list[Platter]) -> None:
        """From now on ``side`` is the primary, with what its disks hold."""
        if side != self.leader:
            self.checkpoints.clear()
        self.leader = side
        self.promoted = False
        self.promoted_side = side
        self.view = self.tracked = None
        self.unsure[:] = False
        now = self.versions(platters)
        self.lineage = Lineage(now.copy())
        self.lineages = [self.lineage]
        self.model = now.copy()
        self.poisoned[:] = False

    def handed_over(self) -> None:
        """A promoted side's engine is given what its volumes have kept for it, one volume after the other."""
        self.lineage.sort(lambda batch: 0 if batch.finished else bisect(self.starts, batch.extents[0][0]))

    def primary_started(self, platters: list[Platter], *, power_lost: bool) -> None:
        """A new process: what its disk holds is where it begins."""
        now = self.versions(platters)
        if not power_lost:
            wrong = (now != self.model) & ~self.poisoned & ~self._unfinished()
            if wrong.any():
                raise Violation(
                    "I6", f"the primary disk lost what was written before its process ended: {_where(wrong)}"
                )
        self.lineage = Lineage(now.copy())
        self.lineages = [*self.lineages[-4:], self.lineage]
        self.model = now.copy()
        self.poisoned[:] = False

    def _unfinished(self) -> NDArray[np.bool_]:
        mask = np.zeros(self.sectors, bool)
        for batch in self.lineage.batches:
            if not batch.finished:
                for first, last, _ in batch.extents:
                    mask[first:last] = True
        return mask

    def submitted(self, extents: list[Extent], fua: bool, process: Any, *, risky: bool = False) -> ClientBatch:
        """A client sends a batch; call it before the product gets it."""
        lineage = self.lineage
        batch = ClientBatch(len(lineage.batches) + 1, extents, fua, process, lineage, risky)
        lineage.append(batch)
        for first, last, version in extents:
            self.model[first:last] = version
            self.poisoned[first:last] = False
        return batch

    def answered(
        self, batch: ClientBatch, errors: Any, primary: list[Platter], secondary: list[Platter],
        mine: MetadataFile, theirs: MetadataFile, side: str,
    ) -> None:  # fmt: skip
        """The client got its answer."""
        if batch.finished:
            raise Violation("answers", f"batch {batch.index} was answered twice")
        batch.finished = True
        if errors:
            for number, (first, last, _) in enumerate(batch.extents):
                if number in errors and batch.lineage is self.lineage:
                    self.poisoned[first:last] = self.ever_poisoned[first:last] = True
            if len(errors) == len(batch.extents):
                return
        self.acknowledged += len(batch.extents) - len(errors or ())
        good = [extent for number, extent in enumerate(batch.extents) if number not in (errors or {})]
        self._present("I6", self.versions(primary), batch, good, "acknowledged and not on the primary disk")
        if batch.fua:
            self._present(
                "durability", self.stable(primary), batch, good, "acknowledged with FUA and not stable on the primary"
            )
        if batch.lineage is not self.lineage and side == self.leader:
            return
        own, other = self.metadata(mine), self.metadata(theirs)
        assert own is not None
        self._one_writer(own, side)
        if not self.sync:
            return
        alone = not other or not own.history or own.history[-1].identity not in {g.identity for g in other.history}
        if side == self.leader and not self.promoted:
            confirmed: tuple[Versions, Versions] | None = self.versions(secondary), self.stable(secondary)
        else:
            confirmed = self.handover  # the answer was on its way when the other side took over
        if confirmed is None:
            return
        missing = self._missing(confirmed[0], batch, good, excused=self.lost)
        if not missing:
            if not alone:
                batch.lineage.owed = max(batch.lineage.owed, batch.index)
                if batch.fua:
                    # what a secondary in its resync had lost is stable again at the end of that, before it may lead
                    excused = self.lost if other and other.syncing else _NOTHING
                    what = "acknowledged with FUA and not stable on the secondary"
                    self._present("I4", confirmed[1], batch, good, what, excused)
                    if excused:
                        self.promised.append((batch, good))
        elif not alone and not self.forgotten:
            raise Violation(
                "I4",
                f"batch {batch.index} is acknowledged; the secondary lacks it and the primary did not start a "
                f"generation of its own (sectors {missing})",
            )

    def _one_writer(self, own: Metadata, side: str) -> None:
        """I5: in one generation one side writes."""
        if own.role != "primary" or not own.history:
            raise Violation("I5", f"side {side} acknowledged a write and is {own.role} by its metadata")
        identity = own.history[-1].identity
        if self.generations.setdefault(identity, side) != side:
            raise Violation("I5", f"both sides acknowledged writes in {own.history[-1]}")

    def _missing(
        self, disk: Versions, batch: ClientBatch, extents: list[Extent], excused: Mapping[int, set[int]] = _NOTHING
    ) -> list[int]:
        """Sectors of the batch where ``disk`` holds neither it nor something later, and did not lose such a thing."""
        found: list[int] = []
        for first, last, version in extents:
            for sector in (np.flatnonzero(disk[first:last] != version) + first).tolist():
                held = (int(disk[sector]), *excused.get(sector, ()))
                if not any(self._later(batch, sector, one) for one in held):
                    found.append(sector)
        return found

    def _later(self, batch: ClientBatch, sector: int, version: int) -> bool:
        return bool(self.poisoned[sector]) or batch.lineage.wrote(sector, version, batch.index)

    def resync_noted(self, platters: list[Platter]) -> None:
        """The secondary has noted the end of a resync."""
        promised, self.promised = self.promised, []
        for batch, extents in promised:
            if batch.lineage is self.lineage:
                self._present("I4", self.stable(platters), batch, extents, "not stable at the end of the resync")

    def _present(
        self, invariant: str, disk: Versions, batch: ClientBatch, extents: list[Extent], what: str,
        excused: Mapping[int, set[int]] = _NOTHING,
    ) -> None:  # fmt: skip
        missing = self._missing(disk, batch, extents, excused)
        if missing:
            raise Violation(invariant, f"batch {batch.index} is {what}: sectors {missing}")

    def check_primary_read(self, first: int, contents: bytes) -> None:
        """A client of the primary read; sectors with unanswered writes may show either."""
        got = self._sector_versions(first, contents)
        span = slice(first, first + len(got))
        wrong = (got != self.model[span]) & ~self.poisoned[span]
        if wrong.any() and (wrong & ~self._unfinished()[span]).any():
            raise Violation(
                "read", f"the primary's export shows other contents than were written: {_where(wrong)} from {first}"
            )

    # The secondary disk

    def check_secondary(self, platters: list[Platter], *, exact: bool | None, exactly: bool = False) -> None:
        """I2. ``exact``: by the product's own word the disk is at a point of the stream (None: nobody is there to ask).
        ``exactly``: at the end of a batch."""
        if exact is None or self.promoted:
            return
        if not exact:
            self.inexact += 1
            self.tracked = None
            self.forgotten = False
            return
        if self.forgotten:
            return
        self.prefix_checks += 1
        disk = self.versions(platters)
        tracked = self.tracked
        if tracked is None:
            if not self._follow(self._fitting(disk)):
                raise Violation(
                    "I2",
                    f"the secondary calls its disk exact, and it is no prefix of the primary's writes: "
                    f"{_where(disk != self.model)} differ from the latest",
                )
            return
        if self._follow([one for one in (tracked, *self.rivals) if self._advance(one, disk, strictly=exactly)]):
            return
        if tracked.lineage is not self.lineage and self._follow(self._fitting(disk)):
            return
        raise Violation(
            "I2",
            f"the secondary disk is no prefix of the primary's writes after batch {tracked.count}: "
            f"{_where(disk != tracked.model)}",
        )

    def _fitting(self, disk: Versions) -> list[Tracked]:
        """Of every lineage that ``disk`` is a prefix of, where it is in it; the latest lineage first."""
        all_of_them = [Tracked(one, 0, one.base.copy(), self.fresh.copy()) for one in reversed(self.lineages)]
        return [tracked for tracked in all_of_them if self._advance(tracked, disk, strictly=False)]

    def _follow(self, fitting: list[Tracked]) -> bool:
        """The disk is one of these, if there is any."""
        if fitting:
            self.tracked, *self.rivals = fitting
        return bool(fitting)

    def _advance(self, tracked: Tracked, disk: Versions, *, strictly: bool) -> bool:
        """Move ``tracked`` on to where ``disk`` is."""
        lineage, count = tracked.lineage, tracked.count
        if (disk == tracked.model).all():
            return True
        model, loose = tracked.model.copy(), tracked.loose.copy()
        if self.may_be_torn and count and not strictly:
            # a batch that begins and ends with the same bytes in a sector looks complete before it is
            wrong = (disk != model) & ~loose
            for first, last, version in lineage.batches[count - 1].extents:
                wrong[first:last] &= disk[first:last] != version
            if not wrong.any():
                return True
        torn: Tracked | None = None
        while True:
            wrong = (disk != model) & ~loose
            if not wrong.any():
                # what looks complete may be pieces of a batch before it, the others of which are yet to come
                tracked.count, tracked.model, tracked.loose = (
                    (torn.count, torn.model, torn.loose) if torn is not None else (count, model, loose)
                )
                return True
            if count == len(lineage.batches):
                break
            if self.may_be_torn and torn is None and not strictly:
                for first, last, version in lineage.batches[count].extents:
                    wrong[first:last] &= disk[first:last] != version
                if not wrong.any():
                    torn = Tracked(lineage, count, model.copy(), loose.copy())
            count += 1
            lineage.apply(model, count, loose)
        if torn is not None:
            tracked.count, tracked.model, tracked.loose = torn.count, torn.model, torn.loose
            return True
        return False

    # The state word of the disk buffer

    def state_stored(
        self, side: str, old: tuple[int, int, bool], new: tuple[int, int, bool], number: int, secondary: list[Platter],
        *, exact: bool | None,
    ) -> None:  # fmt: skip
        """(stage, epoch, syncing) before and after one store."""
        if side == self.leader:
            return
        (old_stage, old_epoch, _), (stage, epoch, syncing) = old, new
        if stage == Stage.RUNNING:
            if syncing:
                self.view = None
            elif old_stage == Stage.NONE or epoch != old_epoch:
                self._checkpoint(number, secondary, exact=exact)
        elif stage == Stage.FAILOVER and old_stage == Stage.RUNNING:
            if self.view is None:
                raise Violation("I3", "a failover to the checkpoint without one")
            self.promotions += 1
            self.promoted = True
            self.promoted_side = side
            self.through[:] = False
            self.handover = self.versions(secondary).copy(), self.stable(secondary).copy()
        elif stage == Stage.DONE and old_stage == Stage.RUNNING:
            if not self.promoted:  # else it was before its host went down
                self.promotions += 1
                self._latest(secondary, exact=exact)
                self.handover = self.versions(secondary).copy(), self.stable(secondary).copy()
            self.lead(side, secondary)
        elif stage == Stage.DONE and old_stage == Stage.FAILOVER:
            assert self.view is not None
            wrong = (self.versions(secondary) != self.view) & ~self.unsure
            if wrong.any():
                raise Violation(
                    "I3", f"the commit is complete, and the disk is not what the guest saw: {_where(wrong)}"
                )
            self.lead(side, secondary)

    def _checkpoint(self, number: int, secondary: list[Platter], *, exact: bool | None) -> None:
        self.check_secondary(secondary, exact=exact, exactly=not self.cut)
        self.view = self.versions(secondary).copy()
        self.unsure[:] = False
        self.checkpoint_count += 1
        self.taken.add(number)
        self.checkpoints.pop(number, None)
        if self.tracked is not None:
            self.checkpoints[number] = (self.tracked.count, self.view.copy(), self.tracked.loose.copy())

    def checkpoint_done(self, number: int, lineage: Lineage, index: int) -> None:
        """I3: an operator's checkpoint is exactly what was submitted before it was asked for."""
        if lineage is not self.lineage:
            return
        known = self.checkpoints.get(number)
        if known is None and number in self.taken:
            return  # of a disk that nobody knew well enough to compare
        if known is None:
            raise Violation("I3", f"checkpoint {number} is reported and was never taken")
        count, taken, loose = known
        wanted, also = self._after(lineage, index)
        if ((taken != wanted) & ~loose & ~also).any():
            raise Violation("I3", f"checkpoint {number} was asked for behind batch {index} and taken at batch {count}")

    def _after(self, lineage: Lineage, count: int) -> tuple[Versions, NDArray[np.bool_]]:
        model, loose = lineage.base.copy(), self.fresh.copy()
        for number in range(1, count + 1):
            lineage.apply(model, number, loose)
        return model, loose

    def _latest(self, secondary: list[Platter], *, exact: bool | None) -> None:
        self.check_secondary(secondary, exact=exact)
        if self.forgotten:
            return
        if self.tracked is None and exact is None:  # it has not met the side that it follows, since a switchover
            self._follow(self._fitting(self.versions(secondary)))
        if self.tracked is None:
            raise Violation("I4", "a failover to the latest state of a disk that is at no point of the stream")
        tracked = self.tracked
        while tracked.count < tracked.lineage.owed:
            # batches without effect do not show
            tracked.count += 1
            tracked.lineage.apply(tracked.model, tracked.count, tracked.loose)
        # those may have been followed by others, which show
        if not self._advance(tracked, self.versions(secondary), strictly=False):
            raise Violation(
                "I4", f"the failover keeps {self.tracked.count} batches, {self.tracked.lineage.owed} were acknowledged"
            )

    # The guest

    def guest_wrote(self, side: str, first: int, operations: Any, view: memoryview, errors: Any, stage: int) -> None:
        """The guest's batch was carried out in one step, on a volume that starts at sector ``first``."""
        if side == self.leader:
            # accepted by a side that was taking over, carried out when it had: before all that came since
            for number, (kind, offset, length, position, _) in enumerate(operations):
                if number not in (errors or {}):
                    version = int.from_bytes(view[position : position + 8], "little") if kind == WRITE else 0
                    self.lineage.base[first + offset // SECTOR : first + (offset + length) // SECTOR] = version
            self.model = self._after(self.lineage, len(self.lineage.batches))[0]
            return
        if self.view is None:
            if any(number not in (errors or {}) for number in range(len(operations))):
                raise Violation("I1", "a guest's write was accepted where there is nothing to write on")
            return
        for number, (kind, offset, length, position, _) in enumerate(operations):
            begin = first + offset // SECTOR
            end = begin + length // SECTOR
            self.through[begin:end] |= stage != Stage.RUNNING
            if errors and number in errors:
                self.unsure[begin:end] = True
            elif kind == DISCARD:
                if stage != Stage.RUNNING:
                    self.unsure[begin:end] = True
            else:
                version = int.from_bytes(view[position : position + 8], "little") if kind == WRITE else 0
                self.view[begin:end] = version
                self.unsure[begin:end] = False

    def guest_unsure(self, first: int, operations: Any) -> None:
        """The guest's batch was interrupted by the death of its process."""
        for _, offset, length, _, _ in operations:
            self.unsure[first + offset // SECTOR : first + (offset + length) // SECTOR] = True

    def check_guest_read(self, first: int, contents: bytes) -> None:
        """I1."""
        self.reads += 1
        got = self._sector_versions(first, contents)
        if self.view is None:
            raise Violation("I1", f"the guest could read sector {first} where there is no checkpoint")
        span = slice(first, first + len(got))
        wrong = (got != self.view[span]) & ~self.unsure[span]
        if wrong.any():
            raise Violation(
                "I1",
                f"the guest does not see the checkpoint and its writes: {_where(wrong)} from {first}, "
                f"{got[wrong][:4].tolist()} instead of {self.view[span][wrong][:4].tolist()}",
            )

    def _sector_versions(self, first: int, contents: bytes) -> Versions:
        """The version of each sector from ``first`` on; every word of it must say the same."""
        words = np.frombuffer(contents, np.uint64).reshape(-1, SECTOR // 8)
        different = words != words[:, :1]
        if different.any() and (different.any(axis=1) & ~self.corrupt[first : first + len(words)]).any():
            raise Violation("contents", "a sector is a mixture of two writes")
        return words[:, 0]

    # Sizes

    def grew(self, side: str, first: int, found: Versions) -> None:
        """The operator made a disk of ``side`` larger; what it ``found`` there begins at sector ``first``."""
        span = slice(first, first + len(found))
        if side != self.leader:
            if self.view is not None:
                self.view[span] = found
            return
        self.model[span] = found
        for lineage in self.lineages:
            lineage.base[span] = found
        if self.tracked is not None:
            for tracked in (self.tracked, *self.rivals):
                tracked.model[span] = found

    def size_shown(self, side: str, index: int, size: int) -> None:
        """A client of ``side`` connects and is told the size of a volume."""
        if side != self.leader or self.promoted:
            return
        if size < self.shown[index]:
            raise Violation("size", f"volume {index} had {self.shown[index]} bytes, and {size} now")
        self.shown[index] = size

    def sizes_noted(self, side: str, metadata: Metadata) -> None:
        """A side noted its metadata, durably: volumes never shrink."""
        sizes = tuple(size for _, size in metadata.volumes)
        before = self.noted.get(side, sizes)
        if any(now < then for now, then in zip(sizes, before, strict=True)):
            raise Violation("size", f"side {side} notes {sizes} bytes after {before}")
        self.noted[side] = sizes

    def inside(self, sizes: Sequence[int]) -> NDArray[np.bool_]:
        """Which sectors belong to volumes of so many bytes."""
        mask = np.zeros(self.sectors, bool)
        for first, size in zip(self.starts, sizes, strict=True):
            mask[first : first + size // SECTOR] = True
        return mask

    def memory_lost(self, side: str, platters: list[Platter], metadata: MetadataFile, leader: MetadataFile) -> None:
        """The secondary's host went down: checkpoint and guest writes were in its memory."""
        if side == self.leader:
            return
        own, other = self.metadata(metadata), self.metadata(leader)
        known = {generation.identity for generation in other.history} if other is not None else set()
        if own is not None and own.role == "primary" and own.failover and own.history[-1].identity not in known:
            self.promoted = True
            self.promoted_side = side
        if self.promoted:
            self.handover = None
            now = self.versions(platters)
            interrupted = own is not None and own.failover == "checkpoint" and self.view is not None
            if interrupted and ((now != self.view) & ~self.unsure & ~self.through).any():
                self.mixed = side
            self.view = now.copy()
            self.unsure[:] = False
        else:
            self.view = None
        self.tracked = None

    def serves(self, side: str) -> None:
        """A process of ``side`` lets clients in."""
        if side == self.mixed:
            raise Violation("I3", f"side {side} serves a disk of which a part was to be committed, and is lost")

    def decided(self, *, accepted: bool) -> None:
        """An operator has: the side whose commit was interrupted leads with what it has, or the other one leads on."""
        self.mixed = ""
        if not accepted:
            self.promoted = False
            self.view = self.tracked = None


def _where(mask: NDArray[np.bool_]) -> str:
    found = np.flatnonzero(mask).tolist()
    return f"{len(found)} sectors {found[:8]}"
