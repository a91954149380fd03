"""The write-intent bitmap: what was marked is found after any crash; what is damaged counts as marked."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from common.bitmap import DirtyBitmap
from common.errors import DiskError
from common.intent import PAGE, IntentFile

SIZES = (1 << 20, 300_000)
REGION = 1024


def marked(intent: IntentFile) -> list[list[tuple[int, int]]]:
    bitmaps = [DirtyBitmap(size, 512) for size in SIZES]
    intent.add_to(bitmaps)
    return [list(bitmap.runs()) for bitmap in bitmaps]


def test_marks_survive_and_are_rounded_to_regions(tmp_path: Path) -> None:
    path = str(tmp_path / "intent")
    intent = IntentFile(path, SIZES, REGION)
    assert not intent.found
    assert not intent.covers(0, 0, 1)
    intent.set_ranges([(0, 1023, 2), (1, 299_999, 1)])
    assert intent.covers(0, 0, 2048)
    assert not intent.covers(0, 2047, 2)
    assert intent.covers(1, 299_500, 500)
    assert intent.synchronous_writes == 2
    intent.close()
    again = IntentFile(path, SIZES, REGION)
    assert again.found
    assert marked(again) == [[(0, 2048)], [(299_008, 992)]]
    assert os.stat(path).st_mode & 0o777 == 0o600
    again.close()


def test_cleared_lazily_but_never_what_is_dirty(tmp_path: Path) -> None:
    path = str(tmp_path / "intent")
    intent = IntentFile(path, SIZES, REGION)
    rng = random.Random(1)
    dirty = [DirtyBitmap(size, 512) for size in SIZES]
    for _ in range(300):
        volume = rng.randrange(2)
        offset = rng.randrange(SIZES[volume])
        length = rng.randint(1, min(5000, SIZES[volume] - offset))
        if not intent.covers(volume, offset, length):
            intent.set_ranges([(volume, offset, length)])
        dirty[volume].set_range(offset, length)
        if rng.random() < 0.1:
            for bitmap in dirty:
                bitmap.clear_range(rng.randrange(bitmap.size // 2), bitmap.size // 3)
            regions = intent.keep_only(dirty)
            assert regions == sum(len(r) for r in ({o // REGION for o, _ in bitmap.runs(512)} for bitmap in dirty))
        found = [DirtyBitmap(size, 512) for size in SIZES]
        other = IntentFile(path, SIZES, REGION)
        other.add_to(found)
        other.close()
        for mine, theirs in zip(dirty, found, strict=True):
            assert all(theirs.any_in(o, n) for o, n in mine.runs(512))
    intent.close()


def test_torn_pages_and_other_layouts_count_as_marked(tmp_path: Path) -> None:
    path = str(tmp_path / "intent")
    intent = IntentFile(path, SIZES, 16)  # several pages of bits
    intent.set_ranges([(0, 0, 1)])
    intent.close()
    data = bytearray(Path(path).read_bytes())
    assert len(data) > 3 * PAGE
    data[PAGE + 100] ^= 1
    Path(path).write_bytes(data)
    torn = IntentFile(path, SIZES, 16)
    assert torn.found
    assert torn.damaged_pages == 1
    assert torn.covers(0, 0, 4088 * 8 * 16)
    assert not torn.covers(1, 200_000, 1)
    torn.close()
    Path(path).write_bytes(bytes(data[: PAGE + 50]))
    cut = IntentFile(path, SIZES, 16)
    assert cut.covers(0, 0, SIZES[0])
    cut.close()
    other = IntentFile(path, (SIZES[0],), 16)
    assert not other.found
    assert other.covers(0, 0, SIZES[0]), "nothing is known: everything may have been written"
    other.close()


def test_growth_keeps_the_marks_and_marks_what_is_new(tmp_path: Path) -> None:
    path = str(tmp_path / "intent")
    intent = IntentFile(path, SIZES, REGION)
    intent.set_ranges([(0, 1023, 2), (1, 7, 1)])
    larger = (SIZES[0] + 5000, SIZES[1])
    intent.grow(larger)
    found = intent.ranges()
    assert found == [(0, 0, 2048), (0, SIZES[0], 5000), (1, 0, 1024)]
    intent.set_ranges([(1, 299_999, 1)])
    intent.close()
    again = IntentFile(path, larger, REGION)
    assert again.found
    assert again.ranges() == [*found, (1, 299_008, 992)]
    assert not Path(f"{path}.new").exists()
    again.close()
    # the metadata were replaced, and then the host went down: the file has yet to follow, or the other way round
    for sizes, at_least in (((larger[0], SIZES[1] + REGION), (1, SIZES[1], REGION)), (SIZES, (1, 299_999, 1))):
        late = IntentFile(path, sizes, REGION)
        assert late.found
        assert late.covers(*at_least)
        assert late.covers(0, 1023, 2)
        assert not late.covers(0, 2048, 1)
        late.close()
    with pytest.raises(DiskError, match="cannot be"):
        IntentFile(str(tmp_path / "gone" / "intent"), SIZES, REGION)


def test_every_flipped_bit_leads_to_too_much_never_too_little(tmp_path: Path) -> None:
    path = str(tmp_path / "intent")
    intent = IntentFile(path, SIZES, REGION)
    intent.set_ranges([(0, 5000, 3000), (1, 7, 7)])
    intent.close()
    good = Path(path).read_bytes()
    rng = random.Random(2)
    for index in [*range(60), *(rng.randrange(len(good)) for _ in range(300))]:
        data = bytearray(good)
        data[index] ^= 1 << rng.randrange(8)
        Path(path).write_bytes(data)
        found = IntentFile(path, SIZES, REGION)
        assert found.covers(0, 5000, 3000)
        assert found.covers(1, 7, 7)
        found.close()


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=str(tmp_path)):
        IntentFile(str(tmp_path), SIZES)
    intent = IntentFile(str(tmp_path / "intent"), SIZES)
    intent.close()
    with pytest.raises(DiskError, match="cannot be written"):
        intent.set_ranges([(0, 0, 1)])
    assert not intent.covers(0, 0, 1)
