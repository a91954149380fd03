"""zstd for the payload of a batch: one frame out, one frame in, both bounded.

A payload is compressed as a whole into one zstd frame, at most ``MAX_COMPRESSED`` bytes of it: so either end needs
memory and time for that much and no more (measured: 1.5 to 4 GiB/s in, 5 GiB/s and more out, on pages that compress
well; about a quarter of that on text). The length of the original travels in the header of the batch, and a frame that
says anything else of itself is refused before a byte of it is expanded: a few bytes cannot become gigabytes.

zstandard is imported when the first payload is packed or expanded, so a pair that does not compress never loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from common import limits
from common.errors import WireError

if TYPE_CHECKING:
    import zstandard

MAX_COMPRESSED: Final = 2 * limits.RECEIVE_BUFFER
"""Bytes of original payload; a larger one (a single request of more than 4 MiB) is sent as it is."""
LEVEL: Final = 1

_decompressor: zstandard.ZstdDecompressor | None = None


def make_compressor(level: int = LEVEL) -> Callable[[bytes | bytearray | memoryview], bytes]:
    """A function that makes one frame of what it is given. It lets go of the interpreter's lock; not for two threads
    at once."""
    import zstandard

    return zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False).compress


def expand(payload: bytes | bytearray | memoryview, length: int) -> memoryview:
    """The ``length`` bytes of which ``payload`` was made. WireError unless it is one frame of exactly so many."""
    import zstandard

    global _decompressor
    if not len(payload) < length <= MAX_COMPRESSED:
        raise WireError(f"a compressed payload of {len(payload)} bytes cannot stand for {length}, at most "
                        f"{MAX_COMPRESSED}")
    if _decompressor is None:
        _decompressor = zstandard.ZstdDecompressor()
    try:
        told = zstandard.frame_content_size(payload)
        if told != length:
            raise WireError(f"a compressed payload says that it has {told} bytes, its header says {length}")
        original = _decompressor.decompress(payload, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"a compressed payload of {len(payload)} bytes is none: {error}") from None
    if len(original) != length:
        raise WireError(f"a compressed payload has {len(original)} bytes, its header says {length}")
    return memoryview(original)


assert MAX_COMPRESSED <= limits.MAX_BATCH_PAYLOAD
