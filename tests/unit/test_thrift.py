"""When to compress: ``Thrift`` on modelled ways of known speeds, against the same ways with everything sent plain.

The model is three servers in a row (the primary's processor, the link, the secondary's, which expands four times as
fast as the primary compresses) and a window. It knows nothing of trials, samples or queues.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import pytest

from common.compression import make_compressor
from common.limits import KIB, MIB
from primary.thrift import PROBE, PROBE_EVERY, TRIAL, Thrift

RANDOM = memoryview(random.Random(1).randbytes(256 * KIB))
TEXT = memoryview((b"".join(b"line %d of many, and each says much the same\n" % n for n in range(8000)))[: 256 * KIB])
SLOWEST = 0.95
"""Part of the speed without compression that has to be reached, wherever that is."""


@dataclass
class Way:
    """Bytes a second of each server; ``ratio``: what compression makes of the contents; ``window`` bytes unanswered."""

    primary: float
    compressor: float
    link: float
    secondary: float
    ratio: float
    window: int = 64 * MIB

    def run(self, batches: int, length: int = 256 * KIB, thrift: Thrift | None = None, begin: float = 0.0) -> float:
        """Seconds until ``batches`` are acknowledged."""
        payload = (TEXT if self.ratio > 1 else RANDOM)[:length]
        acks: deque[tuple[float, int]] = deque()
        packed_at = sent_at = done_at = begin
        first = getattr(self, "_sequence", 0)
        in_flight = 0
        for sequence in range(first + 1, first + batches + 1):
            while acks and (in_flight + length > self.window or acks[0][0] <= packed_at):
                at, acked = acks.popleft()
                in_flight -= length
                packed_at = max(packed_at, at)
                if thrift is not None:
                    thrift.acknowledged(acked, max(at, begin))
            compress = thrift is not None and thrift.worthwhile(payload, 0)
            wire = int(length / self.ratio) if compress else length
            packed_at += length / self.primary
            if thrift is not None:
                if compress:
                    packed_at += length / self.compressor
                    thrift.took(length, length / self.compressor)
                thrift.sent(sequence, length, wire, packed_at)
            sent_at = max(sent_at, packed_at) + wire / self.link
            expanding = length / self.compressor / 4 if compress else 0.0
            done_at = max(done_at, sent_at) + length / self.secondary + expanding
            acks.append((done_at, sequence))
            in_flight += length
        for at, acked in acks:
            if thrift is not None:
                thrift.acknowledged(acked, at)
        self._sequence = first + batches
        return done_at - begin

    def gain(self, batches: int = 16000, length: int = 256 * KIB) -> float:
        """Speed beside that of the same way without compression."""
        thrift = Thrift(make_compressor())
        return self.run(batches, length) / self.run(batches, length, thrift)


@pytest.mark.parametrize(("link", "least"), [(12e6, 2.5), (119e6, 2.0)])
@pytest.mark.parametrize("window", [64 * MIB, 2 * MIB])
def test_a_slow_link_carries_more(link: float, least: float, window: int) -> None:
    """In sync mode as well, where what is on its way is no more than a client's queue."""
    assert Way(1e9, 500e6, link, 800e6, 3.0, window).gain(4000) >= least


@pytest.mark.parametrize("seed", range(12))
def test_never_much_slower_than_plain(seed: int) -> None:
    """Whatever the speeds are, and whichever server is the slowest one."""
    chance = random.Random(seed)

    def between(low: float, high: float) -> float:
        return float(low * (high / low) ** chance.random())

    way = Way(
        between(150e6, 2e9), between(100e6, 3e9), between(10e6, 5e9), between(50e6, 2e9),
        chance.choice([1.0, 1.3, 2.0, 4.0]), chance.choice([64 * MIB, 8 * MIB, 1 * MIB]),
    )  # fmt: skip
    assert way.gain() >= SLOWEST, way


def test_a_fast_link_and_a_slow_compressor() -> None:
    assert Way(400e6, 300e6, 5e9, 350e6, 3.0).gain() >= SLOWEST


def test_one_write_at_a_time_does_not_wait_for_a_compressor() -> None:
    thrift = Thrift(make_compressor())
    Way(1e9, 400e6, 1e9, 1e9, 3.0, window=64 * KIB).run(2000, 64 * KIB, thrift)
    assert thrift.compressed == 0


def test_the_link_becomes_slow_and_fast_again() -> None:
    thrift = Thrift(make_compressor())
    way = Way(1e9, 400e6, 1.2e9, 500e6, 3.0)
    end = way.run(4000, thrift=thrift)
    quick = thrift.compressed
    way.link = 12e6
    end += way.run(2000, thrift=thrift, begin=end)
    assert thrift.compressed - quick > 1200
    way.link, before = 1.2e9, thrift.compressed
    way.run(8000, thrift=thrift, begin=end)
    assert thrift.compressed - before < 2500


def test_contents_that_do_not_shrink_are_seldom_looked_at() -> None:
    looks = 0
    compress = make_compressor()

    def counted(data: bytes) -> bytes:
        nonlocal looks
        looks += 1
        return compress(data)

    thrift = Thrift(counted)
    Way(1e9, 400e6, 12e6, 800e6, 1.0).run(2000, thrift=thrift)
    assert thrift.compressed == 0
    assert looks < 2000 / 16


def test_the_link_is_measured_while_all_is_compressed() -> None:
    """A small part goes plain for that, and no more."""
    thrift = Thrift(make_compressor())
    Way(1e9, 900e6, 12e6, 800e6, 3.0).run(3 * PROBE_EVERY // (256 * KIB), thrift=thrift)
    plain = 3 * PROBE_EVERY // (256 * KIB) - thrift.compressed
    assert thrift.link == pytest.approx(12e6, rel=0.1)
    assert plain * 256 * KIB < 4 * (PROBE + 256 * KIB) + 2 * TRIAL


def test_a_lost_connection_leaves_nothing_on_its_way() -> None:
    thrift = Thrift(make_compressor())
    way = Way(1e9, 400e6, 12e6, 800e6, 3.0)
    way.run(300, thrift=thrift)
    thrift.sent(10_000, 64 * KIB, 64 * KIB, 50.0)
    thrift.reset()
    thrift.acknowledged(10_000, 60.0)
    assert thrift.link == pytest.approx(12e6, rel=0.2)
    assert not thrift.worthwhile(TEXT[: 16 * KIB], 1 << 40), "nothing is on its way: the compressor's queue decides"
