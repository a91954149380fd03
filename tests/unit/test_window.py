"""The primary's window by itself: what a session cannot easily be brought to."""

from __future__ import annotations

from common.batch import WRITE
from common.wire import BATCH, CHECKPOINT, EXTENT_STRUCT
from primary.window import KIND, Window, batch_entry


def test_a_barrier_is_sent_although_the_credit_is_below_zero() -> None:
    """Seed 131 of the simulation: the barrier that would have made room waited for room, and another one was put before
    it, for ever."""
    window = Window(1 << 20, 1, None, True)
    window.pool, window.block_size, window.credit = 4, 4096, -1
    window.wait(batch_entry(EXTENT_STRUCT.pack(0, 4096, 0, 0, WRITE, 0, 0), bytes(4096), 1, 0, object(), 0.0))

    assert len(window.pump(1, 0.0)) == 2
    assert [entry[KIND] for entry in window.in_flight] == [CHECKPOINT, BATCH]
    assert window.credit == 3
