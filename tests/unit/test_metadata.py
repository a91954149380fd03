"""The metadata file: written whole, read only if it is exactly what was written."""

from __future__ import annotations

import asyncio
import os
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from xxhash import xxh3_64_intdigest

from common.errors import DiskError
from common.generation import MAX_HISTORY, Generation, extend
from common.metadata import FORMAT, MAGIC, Metadata, load, parse, save, serialise
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


def test_disks_last_changed_before_1970(tmp_path: Path) -> None:
    """As file systems and archives have them."""
    disk = tmp_path / "disk"
    disk.touch()
    os.utime(disk, ns=(0, -5))
    changed = replace(SAMPLE, disks=((disk.stat().st_ino, disk.stat().st_mtime_ns),))
    assert changed.disks[0][1] == -5
    save(str(tmp_path / "metadata"), changed)
    assert load(str(tmp_path / "metadata")) == changed


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


def sealed(fields: object, version: int = FORMAT) -> bytes:
    body: bytes = msgpack.packb(fields)
    header = MAGIC + version.to_bytes(4, "little") + len(body).to_bytes(4, "little")
    return header + xxh3_64_intdigest(body, xxh3_64_intdigest(header)).to_bytes(8, "little") + body


def test_a_well_sealed_body_of_another_shape_is_refused() -> None:
    good = msgpack.unpackb(serialise(SAMPLE)[24:])
    assert parse(sealed(good), "p") == SAMPLE
    bad: list[object] = [
        [], 5, {}, {**good, "more": 1}, {**good, "role": "king"}, {**good, "clean": 1}, {**good, "stream": True},
        {**good, "history": [[1, 2]]}, {**good, "history": [[-1, 2, "a"]]},
        {**good, "history": [[1, 2, "a"]] * (MAX_HISTORY + 1)},
        {**good, "volumes": [["v", "x"]]}, {**good, "bases": [5]},
    ]
    for fields in bad:
        with pytest.raises(DiskError, match="does not hold"):
            parse(sealed(fields), "p")
    with pytest.raises(DiskError, match="format 3"):
        parse(sealed(good, version=3), "p")
    with pytest.raises(DiskError, match="not a metadata file"):
        parse(b"x" * 100, "p")


def test_the_format_before_is_read_and_only_as_what_it_was() -> None:
    fields = msgpack.unpackb(serialise(SAMPLE)[24:])
    with pytest.raises(DiskError, match="format 1 holds"):
        parse(sealed(fields, version=1), "p")
    del fields["committing"], fields["lost_writes"]
    assert parse(sealed(fields, version=1), "p") == SAMPLE
    with pytest.raises(DiskError, match="format 2 holds"):
        parse(sealed(fields), "p")


FIELDS: dict[str, Any] = msgpack.unpackb(serialise(SAMPLE)[24:])
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**64 - 1, -(2**63), 1.5, float("nan"), float("inf"), "", "x", "primary", b"", b"x",
    "x" * 70_000, [], [[]], [[[]]], [[1, 2]], [[1, 2, 3]], [["x", 1]], [["x", -1]], [[1, 2, "a"]] * 3, [[1, 2, 5]],
    {}, {"a": 1},
)  # fmt: skip
RAW = (
    b"", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff",
    b"\x91" * 500_000, b"\x81\xa1a" * 300_000 + b"\xc0", b"\x81\x90\xc0", b"\x81\x01\xc0", b"\xa2\xff\xfe",
    b"\xc7\x0c\xff" + b"\xff" * 12, b"\xd6\xff\xff\xff\xff\xff", b"\x82\xa1a\x01\xa1a\x02",
)  # fmt: skip
MUTANTS = [pytest.param(500, id="short"), pytest.param(100_000, id="long", marks=pytest.mark.soak)]


def sealed_bytes(body: bytes) -> bytes:
    """A file whose checksum is right, whatever its body is."""
    header = MAGIC + FORMAT.to_bytes(4, "little") + len(body).to_bytes(4, "little")
    return header + xxh3_64_intdigest(body, xxh3_64_intdigest(header)).to_bytes(8, "little") + body


def load_or_refuse(data: bytes) -> Metadata | None:
    """Metadata that would be written as it was read, or a DiskError that names the file, not longer than a screen."""
    found, refusal = None, None
    try:
        found = parse(data, "/where/metadata")
    except DiskError as error:
        refusal = error
    if refusal is not None:
        assert refusal.exit_code == 3
        assert "/where/metadata" in refusal.sentence
        assert len(str(refusal)) < 2000
    assert found is None or parse(serialise(found), "again") == found
    return found


def test_any_value_in_any_field() -> None:
    for name in FIELDS:
        for value in VALUES:
            found = load_or_refuse(sealed_bytes(msgpack.packb({**FIELDS, name: value})))
            if found is not None:
                told = msgpack.unpackb(serialise(found)[24:])
                assert told == {**FIELDS, name: value}, (name, value)
                assert type(told[name]) is type(value), (name, value)
        assert load_or_refuse(sealed_bytes(msgpack.packb({n: v for n, v in FIELDS.items() if n != name}))) is None


@pytest.mark.parametrize("body", RAW, ids=range(len(RAW)))
def test_a_well_sealed_body_that_is_no_map_of_fields(body: bytes) -> None:
    assert load_or_refuse(sealed_bytes(body)) is None


def test_parts_of_two_files_are_none() -> None:
    one, other = serialise(SAMPLE), serialise(replace(SAMPLE, stream=77, checkpoint=900, clean=False))
    for cut in range(1, min(len(one), len(other))):
        for mixed in (one[:cut] + other[cut:], other[:cut] + one[cut:]):
            assert load_or_refuse(mixed) is None or mixed in (one, other)
    for doubled in (one + one, one + other, one[:24] + one, one * 3):
        assert load_or_refuse(doubled) is None


@pytest.mark.parametrize("rounds", MUTANTS)
def test_mutants_that_are_sealed_again(rounds: int) -> None:
    """Whoever damages the body and corrects the checksum makes metadata that can be, or is told that it cannot."""
    good = serialise(SAMPLE)[24:]
    for seed in range(rounds):
        chance = random.Random(seed)
        body = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 5))):
            at = chance.randrange(len(body) or 1)
            match chance.randrange(5):
                case 0 if body:
                    body[at] = chance.choice((0xC0, 0xC2, 0xCF, 0xDD, 0xDF, 0xDB, 0xFF, 0x90, chance.randrange(256)))
                case 1:
                    del body[at : at + chance.randrange(20)]
                case 2:
                    body[at:at] = bytes(body[chance.randrange(len(body) or 1) :][: chance.randrange(30)])
                case 3:
                    body[at : at + 5] = b"\xdd" + struct.pack(">I", chance.choice((0, 1, 2**16, 2**32 - 1)))
                case _:
                    del body[at:]
        load_or_refuse(sealed_bytes(bytes(body)))


def test_no_more_is_read_than_metadata_can_be_long() -> None:
    with pytest.raises(DiskError, match="/dev/zero"):
        load("/dev/zero")


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


def test_what_is_noted_soon_never_overtakes_what_is_newer(tmp_path: Path) -> None:
    """It waited for its turn when the newer was asked for, and was written behind it."""
    path = str(tmp_path / "metadata")

    async def change() -> None:
        record = Record(path, SAMPLE)
        record.update_soon(checkpoint=4)
        record.update_soon(checkpoint=5, lost_writes=True)
        await record.update_async(lost_writes=False)
        while record._writing:  # noqa: ASYNC110
            await asyncio.sleep(0)
        record.close()

    asyncio.run(change())
    found = load(path)
    assert found is not None
    assert (found.checkpoint, found.lost_writes) == (5, False)
