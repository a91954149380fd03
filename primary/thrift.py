"""When to compress a batch for the wire: only where the link, and not a processor, is what holds replication up.

Compression trades processor time for time on the link. Whether that pays is asked in the order of what asking costs:

1. *The queue.* The link must have enough to do for as long as compressing takes: what is on its way, at the rate of the
   link, must last longer. With one write in flight that does not hold, so a client that waits for each answer does not
   wait for a compressor as well, unless the link is plainly slow (``SLOW``). Where the compressor is what holds things
   up the queue runs dry, and batches go plain.
2. *The contents.* A few KiB out of the batch are compressed. What does not shrink by a fifth goes plain; the next ones
   then are not looked at, about twice as many each time, up to ``MAX_SKIP``.
3. *The result.* On a link that is not plainly slow both ways are tried in turn for a while, and the one that
   got more of the original bytes acknowledged per second is kept; the other one is tried again after 16 such *trials*,
   then 32, then 64. So a wrong guess costs a few per cent of the time in the beginning and less than two later.

The rate of the link is that of plain batches, while more was on its way behind them: compressed ones may have waited
for a processor. Where everything is compressed, ``PROBE`` bytes of every ``PROBE_EVERY`` go plain for its sake.

``now`` is any monotonic clock in seconds; lengths are bytes of original payload unless they are called *wire*.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from common.compression import MAX_COMPRESSED
from common.limits import KIB, MIB

LEAST: Final = 8 * KIB
"""A smaller payload is not worth the look."""
SAMPLE: Final = 4 * KIB
WORTH: Final = 0.8
"""Part of its size to which a sample has to shrink."""
MAX_SKIP: Final = 31
SLOW: Final = 20.0
"""A link that takes that many times longer than the compressor needs no trial: were it a processor that was taken for
the link, compressing would cost a twentieth."""
BETTER: Final = 1.05
TRIAL: Final = 16 * MIB
FIRST_PAUSE: Final = 16
LONGEST_PAUSE: Final = 64
PROBE: Final = 2 * MIB
PROBE_EVERY: Final = 256 * MIB
INTERVAL_S: Final = 0.02
INTERVAL: Final = 1 * MIB
"""The rate of the link is taken over that much time, or that many bytes."""
LEAST_INTERVAL: Final = 256 * KIB
"""Where a run of plain batches ends sooner, it has to have had that many."""
QUEUE_UNKNOWN: Final = 512 * KIB
"""On its way, before anything is compressed for a link whose rate is not known."""
FIRST_PROBE: Final = 8 * MIB
FIRST_SPEED: Final = 400e6
"""Bytes a second of the compressor until it was measured: what it does with text."""


class Trials:
    """Which of the two ways is better, found by trying: go ``compressing`` or not.

    A trial lasts until ``TRIAL`` bytes are sent beyond what was on its way when it began: what is acknowledged before
    its end tells how things are while all goes that way. Rates are those of time in which something was unacknowledged.
    """

    def __init__(self, number: int, in_flight: int) -> None:
        self.compressing = True
        self.number = number
        self.rates: dict[bool, float] = {}
        self._left = in_flight + TRIAL
        self._pause = FIRST_PAUSE
        self._until_other = FIRST_PAUSE
        self._measured = 0
        self._busy_s = 0.0

    def sent(self, original: int, in_flight: int) -> None:
        """A batch goes out; ``in_flight`` bytes are unacknowledged with it."""
        self._left -= original
        if self._left > 0:
            return
        self._note()
        self.number += 1
        self.compressing = self._next()
        self._left = in_flight + TRIAL

    def acknowledged(self, trial: int, original: int, busy_s: float) -> None:
        """``original`` bytes that were sent in ``trial`` are there, ``busy_s`` after those before."""
        if trial == self.number:
            self._measured += original
            self._busy_s += busy_s

    def _note(self) -> None:
        measured, busy_s = self._measured, self._busy_s
        self._measured, self._busy_s = 0, 0.0
        if measured >= TRIAL // 4 and busy_s > 0:
            rate = measured / busy_s
            self.rates[self.compressing] = (rate + self.rates.get(self.compressing, rate)) / 2

    def _next(self) -> bool:
        for way in (True, False):
            if way not in self.rates:
                return way
        best = self.rates[True] > BETTER * self.rates[False]
        self._until_other -= 1
        if self._until_other > 0:
            return best
        self._pause = self._until_other = min(2 * self._pause, LONGEST_PAUSE)
        return not best


class Thrift:
    """See the module. Feed it what is sent and acknowledged; ask ``worthwhile`` for each batch."""

    def __init__(self, compress: Callable[[bytes], bytes]) -> None:
        self.speed = FIRST_SPEED
        """Bytes a second of the compressor."""
        self.link: float | None = None
        """Bytes a second of the link; None: not known yet."""
        self.trials = Trials(0, 0)
        self.original_bytes = self.wire_bytes = self.compressed = 0
        self._compress = compress
        self._flights: deque[tuple[int, int, int, int]] = deque()
        """(sequence, original, wire, trial) of every batch on its way."""
        self._ahead = 0
        """Wire bytes on their way."""
        self._in_flight = 0
        self._skip = self._skipping = 0
        self._until_probe = FIRST_PROBE
        self._last_ack = 0.0
        self._interval_s = 0.0
        self._interval_bytes = 0
        self._settled: float | None = None
        """The link for which the trials are."""

    # Before a batch

    def worthwhile(self, payload: memoryview, pending: int) -> bool:
        """Whether to compress ``payload`` while ``pending`` bytes wait for the compressor already."""
        length = len(payload)
        if not LEAST <= length <= MAX_COMPRESSED or not self._link_waits(length, pending):
            return False
        self._until_probe -= length
        if self._until_probe < 0:
            if self._until_probe < -PROBE:
                self._until_probe = PROBE_EVERY
            return False
        return self._shrinks(payload)

    def _link_waits(self, length: int, pending: int) -> bool:
        link = self.link
        if link is None:
            return self._ahead >= QUEUE_UNKNOWN
        if link * SLOW > self.speed and not self.trials.compressing:
            return False
        seconds = (length + pending) / self.speed
        return seconds < self._ahead / link or SLOW * seconds < length / link

    def _shrinks(self, payload: memoryview) -> bool:
        if self._skipping:
            self._skipping -= 1
            return False
        half, middle = SAMPLE // 2, len(payload) // 2
        sample = bytes(payload[:half]) + bytes(payload[middle : middle + half])
        if len(self._compress(sample)) <= WORTH * len(sample):
            self._skip = 0
            return True
        self._skip = self._skipping = min(2 * self._skip + 1, MAX_SKIP)
        return False

    def took(self, length: int, seconds: float) -> None:
        """The compressor needed ``seconds`` of its thread for ``length`` bytes."""
        if seconds > 0:
            self.speed += (length / seconds - self.speed) * 0.1

    # The way

    def sent(self, sequence: int, original: int, wire: int, now: float) -> None:
        """A batch is on its way; ``wire < original`` if it is compressed."""
        if not self._flights:
            self._last_ack = now
        self._flights.append((sequence, original, wire, self.trials.number))
        self._ahead += wire
        self._in_flight += original
        self.original_bytes += original
        self.wire_bytes += wire
        self.compressed += wire < original
        self.trials.sent(original, self._in_flight)

    def acknowledged(self, applied: int, now: float) -> None:
        """Everything up to the sequence ``applied`` is there."""
        flights = self._flights
        if not flights or flights[0][0] > applied:
            return
        busy_s, self._last_ack = now - self._last_ack, now
        plain_bytes, plain, first = 0, True, True
        while flights and flights[0][0] <= applied:
            _, original, wire, trial = flights.popleft()
            self._ahead -= wire
            self._in_flight -= original
            plain = plain and wire == original
            plain_bytes += wire
            self.trials.acknowledged(trial, original, busy_s if first else 0.0)
            first = False
        if not plain or not flights:
            self._measure(LEAST_INTERVAL)  # ends here, without what may have waited for something else
            return
        self._interval_s += busy_s
        self._interval_bytes += plain_bytes
        if self._interval_s >= INTERVAL_S:
            self._measure(0)
        elif self._interval_bytes >= INTERVAL:
            self._measure(INTERVAL)

    def _measure(self, least: int) -> None:
        """An interval for the rate of the link is over; one of less than ``least`` bytes tells nothing."""
        if self._interval_bytes >= least and self._interval_s > 0:
            rate = self._interval_bytes / self._interval_s
            self.link = rate if self.link is None else (self.link + rate) / 2
            if self._settled is None or not self._settled / 3 < self.link < 3 * self._settled:
                self._settled = self.link
                self.trials = Trials(self.trials.number + 1, self._in_flight)
        self._interval_s, self._interval_bytes = 0.0, 0

    def reset(self) -> None:
        """The connection is gone, and with it all that was on its way. What was learned stays."""
        self._flights.clear()
        self._ahead = self._in_flight = 0
