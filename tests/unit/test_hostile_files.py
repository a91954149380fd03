"""The files of a pair, as anything may have left them: taken as they were meant, or refused in a sentence (I7).

Examples by hand, and mutants, are in ``test_metadata``, ``test_config`` and ``test_intent``; here are values of any
kind, pair files, and the files of which every byte is turned over.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from common.config import load_config
from common.errors import ConfigError, DiskError
from common.intent import IntentFile
from common.limits import MIB
from common.metadata import serialise
from common.settings import BufferSettings
from deploy.hosts import NetnsHosts
from deploy.launcher import read_state
from deploy.layout import PairDirectory
from deploy.pairfile import load_pair_file
from secondary import header as h
from secondary.buffer import BufferVolume, DiskBuffer
from secondary.commit import held_extents
from secondary.header import PAGE, Stage
from tests.heart import pattern, rig
from tests.unit import test_config, test_metadata

PAIR_FILE = (Path(__file__).parents[2] / "deploy" / "examples" / "pair.toml").read_bytes()
ROUNDS = [pytest.param(100, id="short"), pytest.param(10_000, id="long", marks=pytest.mark.soak)]
EXAMPLES = examples(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20)
PLAIN = SCALARS | st.binary(max_size=20)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


# Metadata


@EXAMPLES
@given(st.dictionaries(st.sampled_from(sorted(test_metadata.FIELDS)) | st.text(max_size=9), VALUES, max_size=5))
def test_metadata_with_any_values_in_fields(changes: dict[str, Any]) -> None:
    body = msgpack.packb({**test_metadata.FIELDS, **changes}, unicode_errors="surrogatepass")
    test_metadata.load_or_refuse(test_metadata.sealed_bytes(body))


@EXAMPLES
@given(st.binary(max_size=400), st.integers(0, 60))
def test_metadata_of_any_bytes(junk: bytes, kept: int) -> None:
    good = serialise(test_metadata.SAMPLE)
    assert test_metadata.load_or_refuse(junk) is None
    test_metadata.load_or_refuse(test_metadata.sealed_bytes(junk))
    test_metadata.load_or_refuse(test_metadata.sealed_bytes(good[24 : 24 + kept] + junk))


# Configurations and pair files

TOML_SCALARS = st.booleans().map(lambda value: str(value).lower()) | st.integers().map(str) | st.text(max_size=20).map(
    json.dumps
) | st.floats(allow_nan=False, allow_infinity=False).map(str)  # fmt: skip
TOML_VALUES = TOML_SCALARS | st.lists(TOML_SCALARS, max_size=3).map(lambda items: f"[{', '.join(items)}]")


def keys_of(text: str) -> list[int]:
    return [number for number, line in enumerate(text.splitlines()) if " = " in line]


def changed(text: str, changes: dict[int, str]) -> bytes:
    """``text`` with other values for some of its keys."""
    lines = text.splitlines()
    for number, value in changes.items():
        lines[number] = f"{lines[number].partition(' = ')[0]} = {value}"
    return "\n".join(lines).encode(errors="surrogatepass")


@EXAMPLES
@given(st.dictionaries(st.sampled_from(keys_of(test_config.GOOD)), TOML_VALUES, max_size=4))
def test_a_configuration_with_any_values(tmp_path: Path, changes: dict[int, str]) -> None:
    test_config.load_or_refuse(tmp_path / "c.toml", changed(test_config.GOOD, changes))


def pair_or_refuse(path: Path, data: bytes) -> bool:
    """Two hosts, or a sentence that a person can read; whether it was taken."""
    path.write_bytes(data)
    refusal = None
    try:
        pair = load_pair_file(path)
        assert {host.role for host in pair.hosts.values()} == {"primary", "secondary"}
    except ConfigError as error:
        refusal = error
    assert refusal is None or len(str(refusal)) < 40_000
    return refusal is None


@EXAMPLES
@given(st.dictionaries(st.sampled_from(keys_of(PAIR_FILE.decode())), TOML_VALUES, max_size=3))
def test_a_pair_file_with_any_values(tmp_path: Path, changes: dict[int, str]) -> None:
    pair_or_refuse(tmp_path / "pair.toml", changed(PAIR_FILE.decode(), changes))


@pytest.mark.parametrize("rounds", ROUNDS)
def test_mutants_of_a_pair_file(tmp_path: Path, rounds: int) -> None:
    assert pair_or_refuse(tmp_path / "pair.toml", PAIR_FILE)
    for seed in range(rounds):
        pair_or_refuse(tmp_path / "pair.toml", test_config.mutated(random.Random(seed), PAIR_FILE))
    for data in (
        b"x = " + b"[" * 100_000,
        PAIR_FILE + b"#" * (2 << 20),
        PAIR_FILE * 2,
        b"\xff\xfe",
        b"a = " + b"9" * 9000,
    ):
        assert not pair_or_refuse(tmp_path / "pair.toml", data)
    for key in keys_of(PAIR_FILE.decode()):
        for value in test_config.VALUES:
            pair_or_refuse(tmp_path / "pair.toml", changed(PAIR_FILE.decode(), {key: value}))
    with pytest.raises(ConfigError, match="no configuration"):
        load_pair_file(Path("/dev/zero"))


def knew(home: PairDirectory) -> dict[str, Any]:
    """What the last supervisor knew, as all who look at it need it: a map of children whose pids may be ones."""
    state = read_state(home)
    for child in state.get("children", {}).values():
        assert isinstance(child["alive"], bool)
        assert child["pid"] is None or 0 < child["pid"] <= 1 << 22
        assert isinstance(child.get("reason"), str | int | None)
    assert state.keys() <= {"pid", "children"}
    return state


@EXAMPLES
@given(
    VALUES.filter(lambda value: not isinstance(value, bytes)) | st.fixed_dictionaries({"tag": SCALARS, "rate": SCALARS})
)
def test_hosts_and_what_a_supervisor_knew(tmp_path: Path, value: Any) -> None:
    home = PairDirectory(tmp_path)
    text = json.dumps(value, default=str)
    for data in (text, text[: len(text) // 2], "[" * 20_000):
        home.hosts_file.write_text(data)
        home.supervisor_state.write_text(data)
        with contextlib.suppress(ConfigError):
            assert isinstance(home.hosts(), NetnsHosts)
        knew(home)
    for data in ('{"tag": "lab", "rate": null}', '{"tag": "lab", "rate": "1gbit"}'):
        home.hosts_file.write_text(data)
        assert isinstance(home.hosts(), NetnsHosts)


# Every byte turned over


def flipped(data: bytes, seed: int) -> Iterator[tuple[int, bytes]]:
    """Each byte with a bit turned over, one at a time."""
    chance = random.Random(seed)
    for index in range(len(data)):
        yield index, data[:index] + bytes((data[index] ^ 1 << chance.randrange(8),)) + data[index + 1 :]


def test_every_byte_of_what_a_supervisor_knew(tmp_path: Path) -> None:
    """Nothing depends on it but what is said of the dead, and whom a start waits for."""
    home = PairDirectory(tmp_path)
    death = {"alive": False, "pid": 71, "exit_code": -9, "reason": "killed by SIGKILL", "at": "2024-05-01T00:00:00"}
    state = {"pid": 70, "children": {"secondary": death, "primary": {"alive": True, "pid": 72}}}
    home.supervisor_state.write_text(json.dumps(state))
    assert json.loads(json.dumps(knew(home)["children"]["secondary"])) == death
    for _, data in flipped(json.dumps(state).encode(), 3):
        home.supervisor_state.write_bytes(data)
        knew(home)


@pytest.mark.parametrize("step", [pytest.param(9, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_every_byte_of_a_configuration_and_of_a_pair_file(tmp_path: Path, step: int) -> None:
    """Refused in a sentence, or another configuration: what such a file says is all that anybody knows of it."""
    path, refused = tmp_path / "c.toml", 0
    for _, data in islice(flipped(test_config.GOOD.encode(), 1), 0, None, step):
        path.write_bytes(data)
        try:
            load_config(path, "primary")
        except ConfigError:
            refused += 1
    assert refused > len(test_config.GOOD) / step / 3
    for _, data in islice(flipped(PAIR_FILE, 2), 0, None, step):
        pair_or_refuse(path, data)


def test_every_byte_of_a_write_intent_file(tmp_path: Path) -> None:
    """Detected: then all counts as written. Or harmless: nothing reads it. Never is less marked than was."""
    path, sizes, region = tmp_path / "intent", (20_000 * 64, 30_000), 64
    intent = IntentFile(str(path), sizes, region)
    intent.set_ranges([(0, 5000, 3000), (0, 1_200_000, 1), (1, 7, 7)])
    marked = intent.ranges()
    intent.close()
    good = path.read_bytes()
    assert len(good) == 2 * PAGE
    chance = random.Random(4)
    with path.open("r+b", buffering=0) as file:
        for index in range(len(good)):
            file.seek(index)
            file.write(bytes((good[index] ^ 1 << chance.randrange(8),)))
            found = IntentFile(str(path), sizes, region, read_only=True)
            assert not found.found or found.damaged_pages, f"byte {index} was not noticed"
            assert all(found.covers(*one) for one in marked), index
            found.close()
            file.seek(index)
            file.write(good[index : index + 1])


VOLUMES = [BufferVolume("disk0", 3 * MIB + 100, "/somewhere/disk0.raw"), BufferVolume("disk1", 1 * MIB, "/d1")]
LIVE = {
    *range(h.W_STATE, h.W_SYNCS + 1), h.W_BEGUN, *range(h.W_RECORDS, h.W_ERROR_BYTES + 1),
    *range(h.W_OWNER, h.W_FAILURES + 8),
}  # fmt: skip
"""Words that change all the time: memory of running processes, whose errors no file system brings about."""
LIVE_OF_A_VOLUME = {*range(h.V_HIDDEN_BUMP, h.V_COMMIT_TOTAL + 1)}


def live(index: int) -> bool:
    """Whether a byte of the header is in such a word, or in the text of an error."""
    if index < PAGE:
        return index // 8 in LIVE or h.ERROR_TEXT.start <= index < h.ERROR_TEXT.stop
    return (index - PAGE) % h.VOLUME_BYTES // 8 in LIVE_OF_A_VOLUME


def test_every_byte_of_the_header_of_a_disk_buffer(tmp_path: Path) -> None:
    """A process that attaches again notices what is not what it was, but for words that live; it never crashes."""
    settings = BufferSettings(str(tmp_path / "buffer"), 32 * MIB, 4096)
    buffer = DiskBuffer.create(settings, VOLUMES, pair_id="pair-1")
    buffer.start(syncing=False, number=5, sequence=50)
    buffer.close()
    path = tmp_path / "buffer" / "header"
    good = path.read_bytes()
    used = [*range(PAGE), *range(PAGE, PAGE + 2 * h.VOLUME_BYTES)]
    wanted = [(volume.name, volume.size) for volume in VOLUMES]
    chance = random.Random(6)
    missed: list[int] = []
    with path.open("r+b", buffering=0) as file:
        for index in used:
            file.seek(index)
            file.write(bytes((good[index] ^ 1 << chance.randrange(8),)))
            try:
                again = DiskBuffer.attach(
                    str(path.parent), pair_id="pair-1", block_size=4096, volumes=wanted, outgrown=True
                )
            except DiskError:
                pass
            else:
                assert [(volume.name, volume.size, volume.disk_path) for volume in again.volumes] == [
                    (volume.name, volume.size, volume.disk) for volume in VOLUMES
                ]
                assert again.header.stage in Stage
                again.header.get_error()
                again.header.failures()
                assert again.header.checkpoint.number >= 0
                again.close()
                if not live(index):
                    missed.append(index)
            file.seek(index)
            file.write(good[index : index + 1])
    unused = [index for index in missed if any(good[index // 8 * 8 : index // 8 * 8 + 8])]
    assert not unused, f"bytes {unused} were changed, and nobody noticed"
    DiskBuffer.attach(str(path.parent), pair_id="pair-1").close()


def test_words_of_a_disk_buffer_whose_memory_is_damaged(tmp_path: Path) -> None:
    """Nobody can tell what such a word held before, but who reads, or counts what a commit has to move, ends with an
    error of its own at worst, and stays inside of the volume."""
    blocks = 40
    with rig(tmp_path / "rig", (blocks * 4096,)) as pair:
        pair.stream(0, pattern(50_000, 1))
        pair.checkpoint()
        pair.stream(5000, pattern(60_000, 2))
        pair.guest_write(8000, pattern(30_000, 3))
        volume, chance = pair.buffer.volumes[0], random.Random(1)
        bumps = pair.buffer.header.words[volume.base + h.V_HIDDEN_BUMP : volume.base + h.V_COMMIT_TOTAL]
        hidden, active = volume.hidden, volume.active
        for words in (hidden.entries, hidden.owner[:blocks], active.entries, active.owner[:blocks], bumps):
            for index in range(len(words)):
                good = words[index]
                for bit in (*chance.sample(range(64), 4), 20):
                    words[index] = good ^ 1 << bit
                    with contextlib.suppress(OSError):
                        assert len(pair.read(0, blocks * 4096)) == blocks * 4096
                    assert all(0 <= at < at + length <= volume.size for at, length in held_extents(volume))
                words[index] = good
        pair.check()
