"""The resync's plan and the ledger, against disks of version numbers and plain sets."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace

import pytest

from common import wire
from common.bitmap import DirtyBitmap
from primary.ledger import FOLD_BYTES, Ledger
from primary.questions import QUESTION_BYTES
from primary.resync import DecayingRate, Piece, ResyncLimits, ResyncPlan, thin_extents
from primary.synchroniser import RUNS, Synchroniser

BLOCK = 512
FAST = ResyncLimits(piece=4 * BLOCK, in_flight=16 * BLOCK)


def bitmaps(*sizes: int) -> list[DirtyBitmap]:
    return [DirtyBitmap(size, BLOCK) for size in sizes]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_guests_do_meanwhile_the_target_ends_up_equal(seed: int) -> None:
    """Reads take time, writes come at any moment, it is interrupted: nothing old ever overwrites something new."""
    rng = random.Random(seed)
    blocks = 60
    source = [rng.randrange(3) for _ in range(blocks)]
    target = [source[i] if rng.random() < 0.5 else -1 for i in range(blocks)]
    dirty = bitmaps(blocks * BLOCK)
    for i in range(blocks):
        if source[i] != target[i]:
            dirty[0].set_range(i * BLOCK, BLOCK)
    plan = ResyncPlan(dirty, FAST, 0.0)
    reading: list[tuple[Piece, list[int]]] = []
    moving: list[Piece] = []
    version = 10
    for step in range(4000):
        guests = 3 if step < 2000 else 0
        match rng.choices(["take", "read", "confirm", "guest", "interrupt"], [10, 10, 10, guests, 0.2])[0]:
            case "take":
                piece = plan.next_piece(0.0, step * 0.01)
                if piece is not None:
                    first, count = piece.offset // BLOCK, piece.length // BLOCK
                    reading.append((piece, source[first : first + count]))
            case "read" if reading:
                piece, contents = reading.pop(rng.randrange(len(reading)))
                if rng.random() < 0.05:
                    plan.give_back(piece)
                elif plan.hand_over(piece):
                    target[piece.offset // BLOCK : (piece.offset + piece.length) // BLOCK] = contents
                    moving.append(piece)
            case "confirm" if moving:
                plan.confirm(moving.pop(0), step * 0.01)
            case "guest":
                version += 1
                i = rng.randrange(blocks)
                plan.wrote(0, i * BLOCK, BLOCK)
                source[i] = target[i] = version
            case "interrupt":
                plan = ResyncPlan(plan.unfinished(), FAST, step * 0.01)
                reading, moving = [], []
        if plan.finished:
            break
    assert plan.finished
    assert plan.all_sent
    assert source == target


def test_pieces_walk_all_volumes_and_progress_adds_up() -> None:
    marks = bitmaps(10 * BLOCK, 7 * BLOCK, 100)
    for bitmap in marks:
        bitmap.set_all()
    total = sum(bitmap.size for bitmap in marks)
    plan = ResyncPlan(marks, ResyncLimits(piece=4 * BLOCK, in_flight=8 * BLOCK), 0.0)
    now, seen = 0.0, []
    assert plan.progress(now).total_bytes == total
    while not plan.finished:
        piece = plan.next_piece(0.0, now)
        assert piece is not None
        seen.append((piece.volume, piece.offset, piece.length))
        assert plan.hand_over(piece)
        now += 0.5
        plan.confirm(piece, now)
        assert plan.progress(now).total_bytes == total
    assert seen == [(0, 0, 2048), (0, 2048, 2048), (0, 4096, 1024), (1, 0, 2048), (1, 2048, 1536), (2, 0, 100)]
    progress = plan.progress(now)
    assert progress.done_bytes == total
    assert progress.left_s == 0.0
    assert 200 < progress.rate < 4096


def test_the_rate_is_that_of_now() -> None:
    """A minute of holes at a gibibyte a second says nothing of what the data behind them take."""
    rate = DecayingRate(0.0)
    for step in range(1, 601):
        rate.note(100 << 20, step / 10)
    assert rate.value == pytest.approx(1000 << 20)
    for step in range(601, 801):
        rate.note(1 << 20, step / 10)
    assert rate.value == pytest.approx(10 << 20, rel=0.15)
    assert rate.left_s(100 << 20) == pytest.approx(10, rel=0.15)
    rate.note(0, 200.0)
    rate.note(0, 320.0)
    assert rate.value < 1, "it stands still"
    assert DecayingRate(0.0).left_s(1) is None


def test_guests_go_first_unless_there_is_a_floor() -> None:
    def taken(limits: ResyncLimits, share: float, now: float = 10.0) -> int:
        marks = bitmaps(1000 * BLOCK)
        marks[0].set_all()
        plan = ResyncPlan(marks, limits, 0.0)
        pieces = 0
        while plan.next_piece(share, now) is not None:
            pieces += 1
        return pieces

    limits = ResyncLimits(piece=4 * BLOCK, in_flight=64 * BLOCK)
    assert taken(limits, 0.0) == 16
    assert taken(limits, 0.25) == 4
    assert taken(limits, 0.5) == 0
    assert taken(limits, 1.0) == 0
    floor = ResyncLimits(piece=4 * BLOCK, in_flight=64 * BLOCK, floor=1e6)
    assert taken(floor, 1.0) == 2
    late = ResyncLimits(piece=4 * BLOCK, in_flight=64 * BLOCK, deadline_s=5.0)
    assert taken(late, 1.0) == 2
    early = ResyncLimits(piece=4 * BLOCK, in_flight=64 * BLOCK, floor=1.0)
    assert taken(early, 1.0) == 1, "one piece is ahead of a floor of a byte a second"


def test_a_ceiling_is_kept() -> None:
    marks = bitmaps(10_000 * BLOCK)
    marks[0].set_all()
    ceiling = 100 * BLOCK
    plan = ResyncPlan(marks, ResyncLimits(piece=4 * BLOCK, in_flight=64 * BLOCK, ceiling=ceiling), 0.0)
    now, moved = 0.0, 0
    while now < 10.0:
        piece = plan.next_piece(0.0, now)
        if piece is None:
            assert plan.pause_s(now) > 0.0
            now += plan.pause_s(now) + 1e-6
            continue
        assert plan.hand_over(piece)
        plan.confirm(piece, now)
        moved += piece.length
    assert 0.9 * ceiling * 10 <= moved <= 1.1 * ceiling * 10


def test_differences_found_later_are_moved_too() -> None:
    marks = bitmaps(10 * BLOCK)
    plan = ResyncPlan(marks, FAST, 0.0)
    assert plan.finished
    assert plan.next_piece(0.0, 0.0) is None
    plan.mark(0, 3 * BLOCK, 1)
    piece = plan.next_piece(0.0, 0.0)
    assert piece is not None
    assert (piece.offset, piece.length) == (3 * BLOCK, BLOCK)


def test_zero_blocks_travel_without_data() -> None:
    contents = bytearray(10 * BLOCK + 100)
    contents[2 * BLOCK + 5] = 1
    contents[3 * BLOCK] = 1
    contents[-1] = 1
    extents, data = thin_extents(3, 7 * BLOCK, memoryview(contents), BLOCK)
    rows = [row[:5] for row in wire.EXTENT_STRUCT.iter_unpack(extents)]
    at = 7 * BLOCK
    assert rows == [
        (at, 2 * BLOCK, 0, 3, 1), (at + 2 * BLOCK, 2 * BLOCK, 2 * BLOCK, 3, 0), (at + 4 * BLOCK, 6 * BLOCK, 0, 3, 1),
        (at + 10 * BLOCK, 100, 10 * BLOCK, 3, 0),
    ]
    assert data == 2 * BLOCK + 100
    assert thin_extents(0, 0, memoryview(bytes(BLOCK)), BLOCK)[1] == 0
    assert thin_extents(0, 0, memoryview(b"\1" * 5), BLOCK)[1] == 5


@pytest.mark.parametrize("seed", range(30))
def test_the_ledger_never_forgets_what_is_not_recorded(seed: int) -> None:
    """Against a list of (sequence, block); with extents repeated so often that buckets are folded."""
    rng = random.Random(seed)
    size = 64 * BLOCK
    ledger = Ledger([size, size], BLOCK)
    many = FOLD_BYTES // 24 // 3 if seed % 3 == 0 else 1
    sent: list[tuple[int, int, int]] = []
    sequence = recorded = 0
    for _ in range(200):
        sequence += 1
        match rng.choice(["send", "send", "send", "barrier", "record"]):
            case "send":
                volume, block = rng.randrange(2), rng.randrange(64)
                ledger.sent(sequence, wire.EXTENT_STRUCT.pack(block * BLOCK, BLOCK, 0, volume, 0, 0, 0) * many)
                sent.append((sequence, volume, block))
            case "barrier":
                ledger.barrier(sequence)
            case "record":
                recorded = rng.randint(recorded, sequence)
                ledger.recorded(recorded)
    account = bitmaps(size, size)
    ledger.add_to(account)
    for number, volume, block in sent:
        assert number <= recorded or block * BLOCK in account[volume]
    ledger.recorded(sequence)
    account = bitmaps(size, size)
    ledger.add_to(account)
    assert not any(account), "what is recorded is dropped"
    ledger.sent(sequence + 1, wire.EXTENT_STRUCT.pack(0, 1, 0, 0, 0, 0, 0))
    ledger.clear()
    ledger.add_to(account)
    assert not any(account)


def test_what_differs_in_many_places_is_not_walked_over_in_one_turn_of_the_loop() -> None:
    size = 4096 * 16 * 5000
    known, suspects = DirtyBitmap(size, 4096), DirtyBitmap(size, QUESTION_BYTES)
    for offset in range(0, size, QUESTION_BYTES):
        known.set_range(offset, 4096)
    suspects.set_range(0, 1)
    known.set_range(0, QUESTION_BYTES)
    resync = Synchroniser.__new__(Synchroniser)
    resync.mirror = SimpleNamespace(volumes=[None], bitmaps=[known])  # type: ignore[assignment]
    resync.suspects = [suspects]
    resync._pace = SimpleNamespace(drained=lambda: asyncio.sleep(0))  # type: ignore[assignment]

    async def turns() -> int:
        comparing = asyncio.create_task(resync._compare())
        count = 0
        while not comparing.done():
            await asyncio.sleep(0)
            count += 1
        await comparing
        return count

    assert asyncio.run(turns()) > 5000 // RUNS
    assert not suspects
