"""A verification whose answers get lost with a connection: what was not answered is asked again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from common.disk import HOLE, ZERO, DiskLayer, FileDisk
from common.wire import QUESTION, Frames
from primary.mirror import Mirror
from primary.questions import PIECE, QUESTION_BYTES, Range
from primary.verifier import Verifier
from tests.pairs import random_bytes

BLOCK = 4096


class StartsWithAHole(DiskLayer):
    """The first block is a hole, whatever the file system says."""

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        hole = max(0, min(BLOCK - offset, length))
        found = [(hole, HOLE | ZERO), (length - hole, 0)]
        return [extent for extent in found if extent[0]]


class Secondary:
    """A carrier, its session, and a secondary that has ``contents``; the answers to the VERIFYs numbered ``lost`` (from
    1) do not come through."""

    config = SimpleNamespace(window_bytes=1 << 20)

    def __init__(self, contents: bytes, lost: set[int], *, slow: bool = False) -> None:
        self.session: Any = self
        self.asked = self.bytes = 0
        self._slow = slow
        self._contents = contents
        self._lost = lost

    def lag_bytes(self) -> int:
        return 0

    def verify(self, questions: bytes, token: Any, _now: float) -> list[Frames]:
        self.asked += 1
        self.bytes += sum(np.frombuffer(questions, dtype=QUESTION)["length"].tolist())
        differing = bytes(
            xxh3_64_intdigest(self._contents[offset : offset + length]) != digest
            for offset, length, _, _, digest in np.frombuffer(questions, dtype=QUESTION).tolist()
        )
        answer = None if self.asked in self._lost else differing
        if self._slow:
            asyncio.get_running_loop().call_later(0.02, token.answered, answer)
        else:
            token.answered(answer)
        return []

    def send(self, _messages: Sequence[Frames]) -> None:
        pass


@pytest.mark.parametrize("lost", [set[int](), {1}, {2}, {3}, {2, 3}, {2, 4}, {3, 5}])
def test_a_difference_is_found_whichever_answer_is_lost(tmp_path: Path, lost: set[int]) -> None:
    """VERIFY 1 asks about the whole piece, 2 about the hole that it begins with, 3 about the rest of it."""

    async def verify() -> list[Range]:
        path = tmp_path / "disk.raw"
        path.write_bytes(bytes(BLOCK) + random_bytes(1, QUESTION_BYTES - BLOCK))
        disk = StartsWithAHole(FileDisk(str(path)))
        mirror = Mirror([("v", disk)], sync=True, block_size=BLOCK, on_disk_error=lambda _what, _error: None)
        contents = b"\1" + path.read_bytes()[1:]
        mirror.carrier = Secondary(contents, lost)
        try:
            async with asyncio.timeout(5):
                return await Verifier(mirror).run()
        finally:
            mirror.close()

    assert asyncio.run(verify()) == [(0, 0, BLOCK)]


def test_nothing_is_asked_twice_while_answers_are_on_their_way(tmp_path: Path) -> None:
    """The last piece of a volume whose size is no multiple of one was asked about again and again until its answer
    came."""
    path = tmp_path / "disk.raw"
    path.write_bytes(random_bytes(1, PIECE + QUESTION_BYTES + 512))
    secondary = Secondary(path.read_bytes(), set(), slow=True)

    async def verify() -> list[Range]:
        mirror = Mirror([("v", FileDisk(str(path)))], sync=True, block_size=BLOCK, on_disk_error=lambda *_: None)
        mirror.carrier = secondary
        try:
            async with asyncio.timeout(5):
                return await Verifier(mirror).run()
        finally:
            mirror.close()

    assert asyncio.run(verify()) == []
    assert secondary.bytes == path.stat().st_size
