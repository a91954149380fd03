"""Where samples are taken: one in each equal part, of data where there are any."""

from __future__ import annotations

import asyncio
from pathlib import Path

from common.disk import FileDisk
from primary.mirror import Mirror
from primary.questions import QUESTION_BYTES, Range
from primary.samples import SAMPLES, sample_ranges
from tests.pairs import MIB, random_bytes


def sampled(directory: Path, seeds: int, *sizes: int, data: tuple[int, int] = (0, 0)) -> list[list[Range]]:
    """The samples of volumes of ``sizes`` that hold so many ``data`` bytes at an offset, by each seed."""

    async def ask() -> list[list[Range]]:
        volumes = []
        for index, size in enumerate(sizes):
            path = directory / f"{index}.raw"
            with path.open("wb") as file:
                file.truncate(size)
                file.seek(data[0])
                file.write(random_bytes(1, data[1]))
            volumes.append((f"v{index}", FileDisk(str(path))))
        mirror = Mirror(volumes, sync=True, block_size=4096, on_disk_error=lambda _what, _error: None)
        try:
            return [sample_ranges(mirror.volumes, seed) for seed in range(seeds)]
        finally:
            mirror.close()

    return asyncio.run(ask())


def test_each_part_of_all_volumes_has_its_sample(tmp_path: Path) -> None:
    sizes = (96 * MIB, 3 * MIB + 100, 29 * MIB)
    seen = sampled(tmp_path, 20, *sizes)
    part = sum(sizes) / SAMPLES
    starts = (0, sizes[0], sizes[0] + sizes[1])
    for ranges in seen:
        assert len(ranges) == SAMPLES
        for number, (index, offset, length) in enumerate(ranges):
            assert offset % QUESTION_BYTES == 0
            assert 0 < length == min(QUESTION_BYTES, sizes[index] - offset)
            assert abs(starts[index] + offset - number * part) <= part + 2 * QUESTION_BYTES
    assert len({tuple(ranges) for ranges in seen}) == 20, "other places each time"


def test_a_small_disk_is_sampled_as_a_whole(tmp_path: Path) -> None:
    size = 5 * MIB + 1
    every = [(0, at, min(QUESTION_BYTES, size - at)) for at in range(0, size, QUESTION_BYTES)]
    assert sampled(tmp_path, 1, size) == [every]


def test_data_are_preferred_to_holes(tmp_path: Path) -> None:
    """4 GiB of hole with a megabyte of data at the end of one part: it is asked about wherever the place fell."""
    for ranges in sampled(tmp_path, 50, 4096 * MIB, data=(1007 * MIB, MIB)):
        assert any(1007 * MIB <= at < 1008 * MIB for _, at, _ in ranges)
