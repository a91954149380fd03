"""The metadata file: written whole, read only if it is exactly what was written."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
from xxhash import xxh3_64_intdigest

from common.errors import DiskError
from common.generation import Generation, extend
from common.metadata import MAGIC, Metadata, load, parse, save, serialise
from common.record import Record

SAMPLE = Metadata(
    pair_id="db1", side="a", role="primary", volumes=(("root", 1 << 30), ("data", 1 << 40)),
    history=(Generation(0xFFFF_FFFF_FFFF_FFFF, 1, "a"), Generation(7, 2, "b")), consistent=True, clean=True,
    stream=9, sequence=10, checkpoint=3, base=7, bases=((9, 10), (11, 12)),
)


def test_round_trip_and_absence(tmp_path: Path) -> None:
    path = str(tmp_path / "metadata")
    assert load(path) is None
    save(path, SAMPLE)
    assert load(path) == SAMPLE
    changed = replace(SAMPLE, history=extend(SAMPLE.history, 99, "a"), clean=False)
    save(path, changed)
    assert load(path) == changed
    assert os.listdir(tmp_path) == ["metadata"]
    assert (tmp_path / "metadata").stat().st_mode & 0o777 == 0o600
    assert SAMPLE.standing(5, 20).own_bytes == 20


def test_every_flipped_byte_and_every_truncation_is_noticed() -> None:
    data = serialise(SAMPLE)
    for index in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[index] ^= 1 << bit
            with pytest.raises(DiskError, match="/where/metadata"):
                parse(bytes(damaged), "/where/metadata")
    for end in range(len(data)):
        with pytest.raises(DiskError, match="/where/metadata"):
            parse(data[:end], "/where/metadata")
    with pytest.raises(DiskError, match="checksum"):
        parse(data + b"\0", "/where/metadata")


def sealed(fields: object, version: int = 1) -> bytes:
    body: bytes = msgpack.packb(fields)
    header = MAGIC + version.to_bytes(4, "little") + len(body).to_bytes(4, "little")
    return header + xxh3_64_intdigest(body, xxh3_64_intdigest(header)).to_bytes(8, "little") + body


def test_a_well_sealed_body_of_another_shape_is_refused() -> None:
    good = msgpack.unpackb(serialise(SAMPLE)[24:])
    assert parse(sealed(good), "p") == SAMPLE
    bad: list[object] = [
        [], 5, {}, {**good, "more": 1}, {**good, "role": "king"}, {**good, "clean": 1}, {**good, "stream": True},
        {**good, "history": [[1, 2]]}, {**good, "history": [[-1, 2, "a"]]}, {**good, "history": [[1, 2, "a"]] * 65},
        {**good, "volumes": [["v", "x"]]}, {**good, "bases": [5]},
    ]
    for fields in bad:
        with pytest.raises(DiskError, match="does not hold"):
            parse(sealed(fields), "p")
    with pytest.raises(DiskError, match="format 2"):
        parse(sealed(good, version=2), "p")
    with pytest.raises(DiskError, match="not a metadata file"):
        parse(b"x" * 100, "p")


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot be read"):
        load(str(tmp_path))
    with pytest.raises(DiskError, match="cannot be written"):
        save(str(tmp_path / "missing" / "metadata"), SAMPLE)
    (tmp_path / "directory").mkdir()
    with pytest.raises(DiskError, match="cannot be written"):
        save(str(tmp_path / "directory"), SAMPLE)
    assert not (tmp_path / "directory.new").exists()


async def closed_with_changes_to_come(path: str) -> list[str]:
    """What the loop complains of when a record is closed while one change is written and another waits."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context)))
    record = Record(path, SAMPLE)
    record.update_soon(checkpoint=4)
    record.update_soon(checkpoint=5)
    record.close()
    record.update_soon(checkpoint=6)
    for _ in range(5):
        await asyncio.sleep(0)
    return complaints


def test_a_record_that_is_closed_begins_nothing_more(tmp_path: Path) -> None:
    path = str(tmp_path / "metadata")
    assert asyncio.run(closed_with_changes_to_come(path)) == []
    found = load(path)
    assert found is not None
    assert found.checkpoint == 4
