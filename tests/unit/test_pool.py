"""The buffer pool: pins, bounds, waiting."""

from __future__ import annotations

import pytest

from common.pool import LARGE_COUNT, LARGE_KEPT, LARGE_SIZE, BufferPool, PooledBuffer


def test_the_last_unpin_gives_a_buffer_back() -> None:
    pool = BufferPool(4096, 1)
    buffer = pool.acquire()
    assert buffer is not None
    buffer.pin()
    buffer.unpin()
    assert pool.used == 1
    assert pool.acquire() is None
    buffer.unpin()
    assert pool.used == 0
    assert pool.acquire() is buffer


def test_unpinning_too_often_is_our_bug() -> None:
    pool = BufferPool(4096, 1)
    buffer = pool.acquire()
    assert buffer is not None
    buffer.unpin()
    with pytest.raises(AssertionError):
        buffer.unpin()


def test_each_connection_may_keep_one_and_the_others_stay_for_work() -> None:
    pool = BufferPool(4096, 2)
    for _ in range(3):
        pool.admit()
    held = [pool.acquire() for _ in range(5)]
    assert all(held)
    assert pool.acquire() is None
    pool.dismiss()
    for buffer in held:
        assert buffer is not None
        buffer.unpin()
    assert [pool.acquire() is not None for _ in range(5)] == [True] * 4 + [False]


def test_large_buffers_are_few_and_only_some_are_kept() -> None:
    pool = BufferPool(4096, 1)
    held: list[PooledBuffer] = []
    while (buffer := pool.acquire(LARGE_SIZE)) is not None:
        held.append(buffer)
    assert len(held) == LARGE_COUNT
    assert all(len(buffer.view) == LARGE_SIZE for buffer in held)
    assert pool.acquire() is not None, "small ones do not depend on them"
    for buffer in held:
        buffer.unpin()
    again = [pool.acquire(LARGE_SIZE) for _ in range(LARGE_COUNT)]
    assert len([buffer for buffer in again if buffer in held]) == LARGE_KEPT


def test_waiting_ends_with_the_next_buffer_that_comes_back() -> None:
    pool = BufferPool(4096, 1)
    buffer = pool.acquire()
    assert buffer is not None
    calls: list[int] = []
    pool.wait(lambda: calls.append(1))
    pool.wait(lambda: calls.append(2))
    assert not calls
    buffer.unpin()
    assert calls == [1, 2]
    again = pool.acquire()
    assert again is not None
    again.unpin()
    assert calls == [1, 2]
