"""Compressed payloads: bounded, checked by the hash of the original, and in the order of the stream."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import pytest
import zstandard

from common import wire
from common.compression import MAX_COMPRESSED, expand, make_compressor
from common.errors import WireError
from common.limits import KIB, MIB
from common.wire import Frames
from primary.packer import Packer
from primary.thrift import Thrift

TEXT = b"".join(b"line %d of many, and each says much the same\n" % n for n in range(8000))[: 256 * KIB]


def plain(payload: bytes, sequence: int = 2, flags: int = 0) -> Frames:
    extents = wire.EXTENT_STRUCT.pack(4096, len(payload), 0, 0, 0, 0, 0)
    return wire.encode_batch(1, sequence, flags, extents, wire.payload_check(payload)), memoryview(payload)


def packed(payload: bytes, flags: int = 0) -> Frames:
    header, _ = plain(payload, flags=flags)
    return wire.compress_batch(header, make_compressor()(payload), len(payload), wire.payload_check(payload))


@pytest.mark.parametrize("length", [100, 4096, 256 * KIB])
@pytest.mark.parametrize("flags", [0, wire.FLUSH, wire.RESYNC_DATA])
def test_a_compressed_batch_is_the_batch(length: int, flags: int) -> None:
    frames = packed(TEXT[:length], flags)
    assert len(frames[1]) < length
    assert wire.decode(frames) == wire.decode(plain(TEXT[:length], flags=flags))


def test_every_flipped_bit_and_every_truncation_is_noticed() -> None:
    """In the header and in the zstd frame alike: the checksum is that of the original."""
    frames = [bytes(frame) for frame in packed(TEXT[:1000])]
    right = wire.decode(frames)
    for index, frame in enumerate(frames):
        for bit in range(len(frame) * 8):
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            try:
                got = wire.decode([*frames[:index], bytes(damaged), *frames[index + 1 :]])
            except WireError:
                continue
            assert got == right, "a bit that zstd does not look at"
        for length in range(len(frame)):
            with pytest.raises(WireError):
                wire.decode([*frames[:index], frame[:length], *frames[index + 1 :]])


@pytest.mark.parametrize("claim", [1000, MAX_COMPRESSED, MAX_COMPRESSED + 1, 2**32 - 1])
def test_a_bomb_is_refused_before_it_is_expanded(claim: int) -> None:
    """Few bytes that stand for gigabytes; the header says the truth, or something smaller."""
    compressor = zstandard.ZstdCompressor().compressobj(size=1 << 30)
    bomb = b"".join(compressor.compress(bytes(64 * MIB)) for _ in range(16)) + compressor.flush()
    assert len(bomb) < 64 * KIB
    with pytest.raises(WireError):
        expand(bomb, claim)


def test_other_frames_are_refused() -> None:
    one = make_compressor()(TEXT[:4096])
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(TEXT[:4096])
    for wrong in (one + b"more", one + one, one[:-1], unsized, b"", b"none at all", TEXT[:5000]):
        with pytest.raises(WireError):
            expand(wrong, 4096)
    with pytest.raises(WireError):
        expand(one, 4095)
    assert expand(one, 4096) == TEXT[:4096]


def test_flag_and_layout_belong_together() -> None:
    header, payload = packed(TEXT[:1000])
    for wrong in ((b"\x96" + bytes(header[1:]), payload), (header,), (plain(TEXT[:1000], flags=wire.COMPRESSED))):
        with pytest.raises(WireError):
            wire.decode(wrong)


class Always(Thrift):
    """Compresses whatever shrinks."""

    def worthwhile(self, payload: memoryview, pending: int) -> bool:
        return True


class Socket:
    """What comes out of a packer; ``inline`` False: everything goes through its thread."""

    def __init__(self, inline: bool) -> None:
        self.frames: list[Frames] = []
        self.packer = Packer()
        self.packer.thrift = Always(make_compressor())
        self.packer.thrift.speed = 1e12 if inline else 1.0
        self._came = asyncio.Event()

    def attach(self) -> None:
        self.packer.attach(self._take, lambda: None)

    def _take(self, frames: Frames) -> bool:
        self.frames.append(frames)
        self._came.set()
        return True

    async def until(self, count: int) -> list[wire.Message]:
        async with asyncio.timeout(20):
            while len(self.frames) < count:
                self._came.clear()
                await self._came.wait()
        self.packer.close()
        return [wire.decode(frames) for frames in self.frames]


@pytest.mark.parametrize("inline", [True, False])
def test_the_order_stays_whatever_is_compressed_where(inline: bool) -> None:
    async def story() -> None:
        socket = Socket(inline)
        socket.attach()
        chance = random.Random(1)
        given: list[Frames] = []
        for sequence in range(1, 60):
            length = chance.choice([20, 5000, 60_000, 256 * KIB])
            payload = TEXT[:length] if chance.random() < 0.7 else chance.randbytes(length)
            frames = plain(payload, sequence) if chance.random() < 0.8 else wire.encode(wire.Checkpoint(1, sequence, 1))
            given.append(frames)
            assert socket.packer.send(frames)
        assert await socket.until(len(given)) == [wire.decode(frames) for frames in given]
        assert any(frames[0][0] == 0x97 for frames in socket.frames)
        told = socket.packer.statistics()
        assert told["wire_bytes"] == sum(len(frames[1]) for frames in socket.frames if len(frames) == 2)
        assert told["original_bytes"] == sum(len(frames[1]) for frames in given if len(frames) == 2)

    asyncio.run(story())


def test_what_waits_for_the_compressor_is_dropped_with_its_connection() -> None:
    async def story() -> None:
        socket = Socket(inline=False)
        socket.attach()
        socket.packer.send(plain(TEXT, 1))
        socket.packer.send(wire.encode(wire.Ping(1, 1, 0.5)))
        socket.attach()
        socket.packer.send(plain(TEXT, 7))
        assert [message.sequence for message in await socket.until(1)] == [7]

    asyncio.run(story())


def test_a_connection_does_not_wait_for_what_the_last_one_gave_to_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        socket = Socket(inline=False)
        socket.attach()
        real, done = socket.packer._work, []

        def work(view: memoryview) -> Any:
            done.append(bytes(view[:4]))
            return real(view)

        monkeypatch.setattr(socket.packer, "_work", work)
        given = threading.Event()
        socket.packer._executor.submit(given.wait, 20)  # its one thread does this before what is given next
        for sequence in range(1, 6):
            socket.packer.send(plain(b"gone" + TEXT, sequence))
        socket.attach()
        socket.packer.send(plain(b"here" + TEXT, 7))
        await asyncio.sleep(0)  # what is called off is so with the next turn of the loop
        given.set()
        assert [message.sequence for message in await socket.until(1)] == [7]
        assert done == [b"here"], "what nobody wants any more was compressed first"

    asyncio.run(story())


def test_a_buffer_used_again_while_it_waits_is_refused_by_the_other_end() -> None:
    async def story() -> None:
        socket = Socket(inline=False)
        socket.attach()
        payload = bytearray(TEXT)
        given = threading.Event()

        def use_again() -> None:
            given.wait(20)
            payload[:5] = b"other"

        socket.packer._executor.submit(use_again)  # its one thread does this before what is given next
        extents = wire.EXTENT_STRUCT.pack(0, len(payload), 0, 0, 0, 0, 0)
        header = wire.encode_batch(1, 1, 0, extents, wire.payload_check(payload))
        socket.packer.send((header, memoryview(payload)))
        given.set()
        with pytest.raises(WireError, match="checksum"):
            await socket.until(1)

    asyncio.run(story())
