"""Every bound of the system, in one place, and how they relate."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# NBD
MAX_PAYLOAD: Final = 32 * MIB
"""Largest payload of one NBD request, doc/proto.md "Block size constraints"."""
RECEIVE_BUFFER: Final = 2 * MIB
"""One pooled receive buffer; a larger request gets a buffer of its own."""
RECEIVE_BUFFERS: Final = 64
"""Pooled receive buffers of a process; when all are pinned, exports stop reading."""

# Blocks
MIN_BLOCK: Final = 512
DEFAULT_BLOCK: Final = 4 * KIB
MAX_BLOCK: Final = 1 * MIB

# Replication stream
DEFAULT_WINDOW: Final = 64 * MIB
"""Bytes of unacknowledged batches (payload plus extents) before the exports stop reading."""
DEFAULT_BUSY_POLL_US: Final = 200
MAX_BUSY_POLL_US: Final = 10_000
MAX_BATCH_EXTENTS: Final = 16384
MAX_BATCH_PAYLOAD: Final = MAX_PAYLOAD + RECEIVE_BUFFER
ZERO_CHUNK: Final = 16 * MIB
"""A zero or discard is forwarded in pieces of at most this length, so that one message needs a bounded part of the
pool."""
MAX_HEADER: Final = 1 * MIB
MAX_VOLUMES: Final = 64
MAX_VOLUME: Final = (1 << 48) - 1
"""Bytes of one: the disk buffer's header has 48 bits for them."""

# Pool
MIN_POOL: Final = ZERO_CHUNK + 2 * MAX_BLOCK
DEFAULT_SPILL: Final = 16 * 1024 * MIB
"""Old contents that may go to a file when a resync is larger than the pool."""
PRESSURE_PERCENT: Final = 75
"""Use of a pool at which the secondary asks for a checkpoint."""

assert MIN_BLOCK <= DEFAULT_BLOCK <= MAX_BLOCK
assert MIN_BLOCK & (MIN_BLOCK - 1) == 0
assert RECEIVE_BUFFER < MAX_PAYLOAD <= MAX_BATCH_PAYLOAD
assert MAX_BATCH_PAYLOAD < DEFAULT_WINDOW
assert MAX_BATCH_EXTENTS * 24 < MAX_HEADER
