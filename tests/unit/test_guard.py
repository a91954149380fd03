"""The write-intent bitmap at work: what it forgets, and what that costs."""

from __future__ import annotations

import asyncio
import random
import time
import timeit
from pathlib import Path

import pytest

from common.bitmap import DirtyBitmap
from common.intent import REGION, IntentFile
from common.limits import MIB
from primary.guard import IntentGuard


@pytest.mark.parametrize("block_size", [512, 4096, MIB, REGION])
def test_the_guard_forgets_what_nobody_wants_and_nothing_else(tmp_path: Path, block_size: int) -> None:
    rng = random.Random(block_size)
    sizes = [100 * REGION + 512, 40 * REGION]
    wanted = [DirtyBitmap(size, block_size) for size in sizes]
    written = [set(rng.sample(range(count), 30)) for count in (101, 40)]
    lacking = [set(rng.sample(sorted(regions), 12)) for regions in written]
    late = (1, rng.choice(sorted(written[1] - lacking[1])))
    for bitmap, regions in zip(wanted, lacking, strict=True):
        for region in regions:
            bitmap.set_range(min(region * REGION + rng.randrange(REGION), bitmap.size - 1), 1)

    async def scene() -> None:
        guard = IntentGuard(IntentFile(str(tmp_path / "intent"), sizes), sizes)
        await guard.mark([(v, r * REGION, 1) for v, regions in enumerate(written) for r in regions])

        async def promise() -> None:
            assert [{r for r, mark in enumerate(marks) if mark} for marks in guard.marks] == lacking
            await guard.mark([(late[0], late[1] * REGION, 512)])

        assert await guard.forget(wanted, promise) == 12 + 12 + 1
        lacking[late[0]].add(late[1])
        assert [{r for r, mark in enumerate(marks) if mark} for marks in guard.marks] == lacking
        guard.close()

    asyncio.run(scene())
    file = IntentFile(str(tmp_path / "intent"), sizes)
    found = [{r for r in range(-(-size // REGION)) if file.covers(v, r * REGION, 1)} for v, size in enumerate(sizes)]
    assert found == lacking
    file.close()


def test_forgetting_in_many_places_does_not_hold_the_loop_up(tmp_path: Path) -> None:
    size = 80_000 * REGION
    wanted = DirtyBitmap(size, REGION)
    for region in range(0, 80_000, 2):
        wanted.set_range(region * REGION, REGION)

    async def scene() -> float:
        guard = IntentGuard(IntentFile(str(tmp_path / "intent"), [size]), [size])
        await guard.mark([(0, 0, size)])
        begun = time.thread_time()
        left = await guard.forget([wanted], lambda: asyncio.sleep(0))
        seconds = time.thread_time() - begun
        assert left == 40_000
        guard.close()
        return seconds

    walking_s = min(timeit.repeat(lambda: list(wanted.runs()), number=1, repeat=1))
    assert asyncio.run(scene()) < walking_s / 3
