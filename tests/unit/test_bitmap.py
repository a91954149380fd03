"""DirtyBitmap against a set of block numbers."""

from __future__ import annotations

import random
import timeit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import bitmap as bitmap_module
from common.bitmap import DirtyBitmap
from common.errors import WireError


class Model:
    """The same as a set."""

    def __init__(self, size: int, block_size: int) -> None:
        self.size, self.block_size = size, block_size
        self.marked: set[int] = set()

    def set_range(self, offset: int, length: int) -> None:
        if length:
            self.marked |= set(range(offset // self.block_size, (offset + length - 1) // self.block_size + 1))

    def clear_range(self, offset: int, length: int) -> None:
        for block in list(self.marked):
            begin, end = block * self.block_size, min(self.size, (block + 1) * self.block_size)
            if offset <= begin and end <= offset + length:
                self.marked.discard(block)

    def runs(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for block in sorted(self.marked):
            begin, end = block * self.block_size, min(self.size, (block + 1) * self.block_size)
            if found and found[-1][0] + found[-1][1] == begin:
                found[-1] = found[-1][0], end - found[-1][0]
            else:
                found.append((begin, end - begin))
        return found


NUMBERS = st.integers(0, 10**6)
STEPS = st.lists(st.tuples(st.sampled_from(["set", "clear", "many"]), NUMBERS, NUMBERS), max_size=30)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([1, 3, 7, 8, 64]), STEPS)
def test_behaves_like_a_set_of_blocks(size: int, block_size: int, actions: list[tuple[str, int, int]]) -> None:
    bitmap, model = DirtyBitmap(size, block_size), Model(size, block_size)
    for verb, a, b in actions:
        offset = a % size
        length = b % (size - offset + 1)
        if verb == "set":
            bitmap.set_range(offset, length)
            model.set_range(offset, length)
        elif verb == "clear":
            bitmap.clear_range(offset, length)
            model.clear_range(offset, length)
        else:
            rng = random.Random(b)
            pairs = [(o, rng.randint(1, size - o)) for o in (rng.randrange(size) for _ in range(5))]
            array = np.array(pairs, dtype=np.uint64)
            bitmap.set_ranges(array[:, 0], array[:, 1])
            for o, n in pairs:
                model.set_range(o, n)
    assert list(bitmap.runs()) == model.runs()
    assert bitmap.count() == len(model.marked)
    assert bitmap.dirty_bytes() == sum(length for _, length in model.runs())
    assert bool(bitmap) == bool(model.marked)
    for offset in range(0, size, max(1, size // 50)):
        assert (offset in bitmap) == (offset // block_size in model.marked)
        assert bitmap.any_in(offset, size - offset) == any(b >= offset // block_size for b in model.marked)
    assert DirtyBitmap.from_bytes(bitmap.to_bytes()) == bitmap


CHANGES = ("set", "clear", "many", "all", "none", "union", "grow", "copy", "stored")
QUESTIONS = ("count", "bool", "run", "any")


def change(verb: str, bitmap: DirtyBitmap, model: Model, a: int, b: int) -> DirtyBitmap:
    """Do it to both; the bitmap to go on with."""
    size = model.size
    offset = a % size
    length = b % (size - offset) + 1
    if a % 2:  # whole strides of 64 blocks
        stride = 64 * model.block_size
        offset = offset // stride * stride
        length = min(length // stride * stride + stride, size - offset)
    match verb:
        case "set":
            bitmap.set_range(offset, length)
            model.set_range(offset, length)
        case "clear":
            bitmap.clear_range(offset, length)
            model.clear_range(offset, length)
        case "many":
            bitmap.set_ranges(np.array([offset, 0], dtype=np.uint64), np.array([length, 1], dtype=np.uint64))
            model.set_range(offset, length)
            model.set_range(0, 1)
        case "all":
            bitmap.set_all()
            model.set_range(0, size)
        case "none":
            bitmap.clear_all()
            model.marked.clear()
        case "union":
            other = DirtyBitmap(size, model.block_size)
            other.set_range(offset, length)
            bitmap.union(other)
            model.set_range(offset, length)
        case "grow":
            model.size += b % 100 * model.block_size
            bitmap.grow(model.size)
        case "copy":
            twin = bitmap.copy()
            bitmap.set_all()
            return twin
        case "stored":
            return DirtyBitmap.from_bytes(bitmap.to_bytes())
    return bitmap


def check(question: str, bitmap: DirtyBitmap, model: Model, a: int) -> None:
    offset = a % model.size
    later = [(begin, length) for begin, length in model.runs() if begin + length > offset]
    match question:
        case "count":
            assert bitmap.count() == len(model.marked)
        case "bool":
            assert bool(bitmap) == bool(model.marked)
        case "run":
            block = offset // model.block_size * model.block_size
            expected = None
            if later:
                begin, length = later[0]
                expected = max(begin, block), begin + length - max(begin, block)
            assert bitmap.next_run(offset) == expected
        case "any":
            assert bitmap.any_in(offset, model.size - offset) == bool(later)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 400),
    st.sampled_from([1, 8]),
    st.lists(st.tuples(st.sampled_from(CHANGES + QUESTIONS), NUMBERS, NUMBERS), max_size=40),
)
def test_answers_between_changes_are_those_of_a_set(
    blocks: int, block_size: int, actions: list[tuple[str, int, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:  # strides of 64 blocks, so that there are several
        patch.setattr(bitmap_module, "_STRIDE_SHIFT", 3)
        patch.setattr(bitmap_module, "_STRIDE", 8)
        patch.setattr(bitmap_module, "_BLOCK_SHIFT", 6)
        size = blocks * block_size
        bitmap, model = DirtyBitmap(size, block_size), Model(size, block_size)
        for verb, a, b in actions:
            if verb in QUESTIONS:
                check(verb, bitmap, model, a)
            else:
                bitmap = change(verb, bitmap, model, a, b)
        for question in QUESTIONS:
            check(question, bitmap, model, 0)
        assert list(bitmap.runs()) == model.runs()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40_000), st.integers(0, 16), st.lists(st.tuples(NUMBERS, st.integers(1, 70)), max_size=20))
def test_a_coarser_bitmap_takes_over_every_block_that_a_finer_one_touches(
    size: int, shift: int, marked: list[tuple[int, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:  # strides of 4096 blocks
        patch.setattr(bitmap_module, "_STRIDE_SHIFT", 9)
        patch.setattr(bitmap_module, "_STRIDE", 512)
        patch.setattr(bitmap_module, "_BLOCK_SHIFT", 12)
        fine, coarse = DirtyBitmap(size, 1), DirtyBitmap(size, 1 << shift)
        coarse.set_range(size // 2, 1)
        expected = {size // 2 >> shift}
        for a, b in marked:
            offset, length = a % size, min(b, size - a % size)
            fine.set_range(offset, length)
            expected |= {block >> shift for block in range(offset, offset + length)}
        coarse.union(fine)
        assert {offset >> shift for offset, _ in coarse.runs(1)} == expected
        assert coarse.count() == len(expected)
        assert set(np.flatnonzero(coarse.flags()).tolist()) == expected
        assert len(coarse.flags()) == coarse.blocks


def test_what_taking_over_costs_does_not_depend_on_the_number_of_runs() -> None:
    def cost_s(runs: int) -> float:
        fine, coarse = DirtyBitmap(4 << 30, 4096), DirtyBitmap(4 << 30, 64 * 1024)
        for number in range(runs):
            fine.set_range(number * 128 * 1024, 4096)
        seconds = min(timeit.repeat(lambda: coarse.union(fine), number=1, repeat=3))
        assert coarse.count() == runs
        return seconds

    assert cost_s(20_000) < 100 * cost_s(20)  # run by run it is 1000 times as much


def test_what_counting_costs_does_not_depend_on_the_size_of_the_disk() -> None:
    def cost_s(size: int) -> float:
        bitmap = DirtyBitmap(size, 4096)

        def change_and_ask() -> None:
            bitmap.set_range(size // 2, 4096)
            assert bitmap.count() == 1
            assert bitmap
            assert bitmap.copy().count() == 1

        return min(timeit.repeat(change_and_ask, number=1, repeat=5))

    assert cost_s(4 << 40) < 200 * cost_s(4 << 30)  # as many times the size would be 1024


def test_runs_are_cut_to_a_limit_and_cover_everything() -> None:
    bitmap = DirtyBitmap(100 * 4096 + 5, 4096)
    bitmap.set_all()
    runs = list(bitmap.runs(limit=3 * 4096))
    assert all(length <= 3 * 4096 for _, length in runs)
    assert sum(length for _, length in runs) == bitmap.size == bitmap.dirty_bytes()
    assert bitmap.next_run(5 * 4096 + 17, 1) == (5 * 4096, 4096)
    assert bitmap.next_run(bitmap.size - 1) == (100 * 4096, 5)
    assert bitmap.next_run(bitmap.size) is None


def test_a_terabyte_is_searched_quickly_and_far_bits_are_found() -> None:
    bitmap = DirtyBitmap(1 << 40, 4096)
    far = (1 << 40) - 4096
    bitmap.set_range(far, 1)
    assert bitmap.next_run(0) == (far, 4096)
    bitmap.set_all()
    bitmap.clear_range(far, 4096)
    assert bitmap.next_run(0) == (0, far)
    assert bitmap.count() == (1 << 28) - 1


def test_union_of_different_block_sizes_and_growth() -> None:
    fine, coarse = DirtyBitmap(10_000, 512), DirtyBitmap(10_000, 4096)
    fine.set_range(5000, 1)
    coarse.union(fine)
    assert list(coarse.runs()) == [(4096, 4096)]
    fine.union(coarse)
    assert fine.count() == 8
    twin = fine.copy()
    twin.clear_all()
    assert not twin
    assert twin != fine
    before = list(fine.runs())
    fine.grow(20_000)
    assert fine.size == 20_000
    assert list(fine.runs()) == before
    fine.set_range(19_999, 1)
    assert fine.count() == 9
    assert fine != "x"


def test_every_damaged_byte_is_noticed() -> None:
    bitmap = DirtyBitmap(999, 3)
    bitmap.set_range(100, 200)
    data = bitmap.to_bytes()
    for index in range(len(data)):
        for bit in (1, 0x80):
            damaged = bytearray(data)
            damaged[index] ^= bit
            try:
                read = DirtyBitmap.from_bytes(bytes(damaged))
            except WireError:
                continue
            # the only bits that say nothing about the disk are zlib's own flags
            assert read == bitmap
    for end in range(len(data)):
        with pytest.raises(WireError):
            DirtyBitmap.from_bytes(data[:end])
    with pytest.raises(WireError):
        DirtyBitmap.from_bytes(data + b"x")
