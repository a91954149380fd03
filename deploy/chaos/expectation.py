"""What each block of the disk may hold: the oracle of a chaos run, in a file outside of the pair.

Every write has a number, and fills its blocks with that number and the block's own; every ZEROES-th one asks for
zeroes instead. The file holds two numbers a block: the write that was acknowledged last, and the one that was sent
last, stored before it is sent. A write without an acknowledgement leaves its blocks in doubt: they may hold it or not,
until somebody has looked (``settle``); from then on what was seen stays.

Zeroes do not tell which request made them: a block that holds them is as old or as new (``newest``) as is most in the
pair's favour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK: Final = 4096
ZEROES: Final = 11
"""Write number n asks for zeroes if n is a multiple of this."""
APART: Final = ZEROES * 1_000_000
"""Between the numbers of two loads that go on beside each other."""
TORN: Final = (1 << 64) - 1
"""Instead of a number, of a block that was found torn: by a disk that failed in the middle of a write in doubt."""
_WORDS: Final = BLOCK // 16

Numbers = npt.NDArray[np.uint64]


class Breach(Exception):
    """Something that must not be. ``lost``: writes that were acknowledged are gone."""

    def __init__(self, sentence: str, lost: int = 0) -> None:
        super().__init__(sentence)
        self.lost = lost


class Wrong(NamedTuple):
    """A block that holds what it may not: ``found`` instead of write number ``acknowledged``; -1: torn or alien."""

    block: int
    found: int
    acknowledged: int


def contents_of(number: int, first: int, count: int) -> bytes:
    """What write ``number`` puts into ``count`` blocks from ``first`` on."""
    data = np.empty((count, _WORDS, 2), np.uint64)
    data[:, :, 0] = number
    data[:, :, 1] = np.arange(first, first + count, dtype=np.uint64)[:, None]
    return data.tobytes()


class Expectation:
    """One thread writes at a time; ``snapshot`` may be called from any."""

    def __init__(self, path: Path, blocks: int) -> None:
        self.blocks = blocks
        self._file = np.memmap(path, np.uint64, "w+", shape=(2, blocks))
        self.acknowledged: Numbers = self._file[0]
        self.sent: Numbers = self._file[1]
        self.doubt: dict[int, set[int]] = {}
        self.number = 0
        self.log: list[tuple[int, int, int]] = []
        """(number, first block, count) of all writes since ``settle``, in the order in which they were sent."""
        self.answered_bytes = 0

    def fork(self, path: Path, found: npt.NDArray[np.int64]) -> Expectation:
        """That of a load that goes on from ``found``, beside this one, with numbers that this one does not reach."""
        other = Expectation(path, self.blocks)
        other.settle(found)
        other.number = self.number + APART
        return other

    def begin(self, first: int, count: int) -> tuple[int, bytes]:
        """Note a write that is about to be sent; its number and contents, all zeroes if it shall ask for these."""
        self.number += 1
        number = self.number
        self.sent[first : first + count] = number
        self.log.append((number, first, count))
        for block in range(first, first + count):
            self.doubt.setdefault(block, set()).add(number)
        if number % ZEROES == 0:
            return number, bytes(count * BLOCK)
        return number, contents_of(number, first, count)

    def acknowledge(self, number: int, first: int, count: int) -> None:
        """The write was answered well: nothing older may be found there from now on."""
        self.acknowledged[first : first + count] = number
        self.answered_bytes += count * BLOCK
        for block in range(first, first + count):
            newer = {other for other in self.doubt.get(block, ()) if other > number}
            if newer:
                self.doubt[block] = newer
            else:
                self.doubt.pop(block, None)

    def snapshot(self) -> tuple[Numbers, Numbers]:
        """Copies of the numbers that were acknowledged and sent."""
        return np.array(self.acknowledged), np.array(self.sent)

    def decode(self, data: bytes | bytearray | memoryview) -> npt.NDArray[np.int64]:
        """The write that each block holds, whole; 0: zeroes, -1: no write of ours, or two of them."""
        cells = np.frombuffer(data, np.uint64).reshape(self.blocks, _WORDS, 2)
        numbers = cells[:, 0, 0]
        own = np.where(numbers != 0, np.arange(self.blocks, dtype=np.uint64), np.uint64(0))
        whole = np.all(cells[:, :, 0] == numbers[:, None], axis=1) & np.all(cells[:, :, 1] == own[:, None], axis=1)
        return np.where(whole & (numbers <= self.number), numbers.astype(np.int64), -1)

    def newest(self, found: npt.NDArray[np.int64], high: Numbers | None = None) -> npt.NDArray[np.int64]:
        """``found`` with the latest request for zeroes, not after ``high``, instead of 0: zeroes are no older."""
        newest = np.array(found)
        for number, first, count in self.log:
            if number % ZEROES == 0:
                cells = slice(first, first + count)
                made = found[cells] == 0
                if high is not None:
                    made &= high[cells] >= number
                newest[cells][made] = number
        return newest

    def allows(self, block: int, data: bytes | bytearray) -> bool:
        """Whether one block may hold ``data``: what was acknowledged last, or a write in doubt."""
        cells = np.frombuffer(data, np.uint64).reshape(_WORDS, 2)
        found = int(cells[0, 0])
        acknowledged, doubts = int(self.acknowledged[block]), self.doubt.get(block, set())
        if not (np.all(cells[:, 0] == found) and np.all(cells[:, 1] == (block if found else 0))):
            return bool(doubts) or acknowledged == TORN
        if not found:
            return any(number % ZEROES == 0 for number in (acknowledged, *doubts))
        return found == acknowledged or found in doubts

    def wrong(self, found: npt.NDArray[np.int64]) -> list[Wrong]:
        """Blocks that hold neither what was acknowledged nor a write in doubt."""
        acknowledged = self.acknowledged.astype(np.int64)
        zeroes = (found == 0) & (self.newest(found) >= acknowledged)
        suspects = np.flatnonzero((found != acknowledged) & ~zeroes).tolist()
        return [
            Wrong(block, int(found[block]), int(self.acknowledged[block]))
            for block in suspects
            if int(found[block]) not in self.doubt.get(block, ()) and not (found[block] == -1 and block in self.doubt)
        ]

    def out_of_range(self, found: npt.NDArray[np.int64], low: Numbers, high: Numbers) -> list[Wrong]:
        """Blocks that hold anything older than ``low`` or newer than ``high``."""
        old = self.newest(found, high) < low.astype(np.int64)
        bad = np.flatnonzero(old | (found > high.astype(np.int64))).tolist()
        return [Wrong(block, int(found[block]), int(low[block])) for block in bad]

    def missing_bytes(self, found: npt.NDArray[np.int64], low: Numbers) -> int:
        """Bytes of the blocks that hold something older than the data of ``low``; zeroes are a request without any."""
        missing = (self.newest(found) < low.astype(np.int64)) & (low % ZEROES != 0)
        return int(np.count_nonzero(missing)) * BLOCK

    def not_a_beginning(self, found: npt.NDArray[np.int64]) -> list[Wrong]:
        """Blocks that lack a write although a later one is there: what was found is no beginning of the order."""
        newest = int(found.max())
        found = self.newest(found)
        wrong: list[Wrong] = []
        for number, first, count in self.log:
            if number >= newest:
                break
            part = found[first : first + count]
            wrong += [Wrong(first + int(i), int(part[i]), number) for i in np.flatnonzero(part < number)]
        return wrong

    def settle(self, found: npt.NDArray[np.int64]) -> None:
        """Nothing is in flight, and this was read: it stays, whatever was in doubt."""
        self.acknowledged[:] = found.astype(np.uint64)
        self.sent[:] = self.acknowledged
        self.doubt.clear()
        self.log.clear()


def none_wrong(wrong: list[Wrong], where: str, volume: str = "the volume") -> None:
    """Breach if anything is."""
    if wrong:
        first = wrong[0]
        raise Breach(
            f"{len(wrong)} blocks of {volume} are wrong {where}: block {first.block} holds write {first.found}, write "
            f"{first.acknowledged} was due.", len(wrong),
        )  # fmt: skip
