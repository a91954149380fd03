"""Configuration: round trip, and every mistake named at once with the place and what to do."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from common import config, keys
from common.errors import ConfigError
from common.settings import NodeSettings, Role

BASE = Path("/srv/pair")


def raw(**changes: Any) -> dict[str, Any]:
    """A valid configuration, changed."""
    return {
        "pair_id": "p1",
        "side": "a",
        "directory": "a",
        "volumes": [{"name": "disk", "disk": "disk.raw"}],
        "replication": {"connect": "ipc:///srv/pair/r.sock", "listen": "tcp://127.0.0.1:7000"},
        **changes,
    }


def settings(**changes: Any) -> NodeSettings:
    return config.make_settings(raw(**changes), base=BASE)


def problems(role: Role | None = None, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.make_settings(raw(**changes), base=BASE, role=role)
    assert caught.value.exit_code == 2
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return list(caught.value.problems)


def test_defaults_and_relative_paths() -> None:
    made = settings()
    assert made.directory == "/srv/pair/a"
    assert made.volumes[0].disk == "/srv/pair/disk.raw"
    assert made.export.unix == "/srv/pair/a/nbd.sock"
    assert made.buffer.directory == "/dev/shm/tandemdisk-p1-a"
    assert made.mode == "sync"
    assert made.initial_sync == "full"


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_written_file_reads_back_to_the_same_settings(tmp_path: Path, role: Role) -> None:
    made = settings(
        mode="async",
        checkpoint_interval_s=1.5,
        volumes=[
            {"name": "one", "disk": '/d/"quoted"\\ \x7f é.raw'},
            {"name": "two", "disk": "/dev/x", "read_only": True}],
        export={"unix": "nbd.sock", "host": "127.0.0.1", "port": 10810},
        buffer={"size_bytes": "1G", "block_size": "64K", "directory": "/dev/shm/x"},
        on_peer_loss="block",
    )
    path = tmp_path / "side.toml"
    config.write_config(made, path, role)
    assert config.load_config(path, role) == made


def test_settings_survive_json() -> None:
    made = settings(volumes=[{"name": "one", "disk": "/1"}, {"name": "two", "disk": "/2"}])
    assert NodeSettings.from_json(made.to_json()) == made


def test_every_problem_is_named_at_once() -> None:
    found = problems(
        pair_id="no spaces",
        side="c",
        mode="fast",
        checkpoint_intervall_s=3,
        request_timeout_s=-1,
        volumes=[{"name": "x", "disk": "/x"}, {"name": "x", "disk": "/x"}],
        export={"prot": 1},
        buffer={"block_size": 3000, "size_bytes": "lots"},
        replication={"heartbeat_s": 9, "secret_key": "k"},
    )
    text = "\n".join(found)
    for expected in (
        "`pair_id`: 'no spaces' is no name",
        "`side` must be 'a' or 'b', not 'c'",
        "`mode` must be 'sync' or 'async', not 'fast'",
        "`checkpoint_intervall_s` is not known; did you mean `checkpoint_interval_s`?",
        "`request_timeout_s`: input should be greater than 0, not -1",
        "`volumes`: the name 'x' is used twice",
        "`volumes`: the disk '/x' is used twice",
        "`export.prot` is not known; did you mean `port`?",
        "`buffer.block_size`: a block is a power of two from 512 to 1 MiB, not 3000 bytes",
        "`buffer.size_bytes`: 'lots' is no size",
        "`replication`: peer_timeout_s (5) must be longer than heartbeat_s (9)",
        "`replication`: secret_key and peer_key go together",
        "`replication.secret_key`: /srv/pair/k cannot be read (No such file or directory)",
    ):
        assert expected in text
    assert len(found) == 13


def test_a_resync_has_floor_ceiling_and_deadline() -> None:
    made = settings(resync_floor="2M", resync_rate="8M", resync_deadline_s=60.0)
    assert (made.resync_floor, made.resync_rate, made.resync_deadline_s) == (2 << 20, 8 << 20, 60.0)
    assert problems(resync_floor="2M", resync_rate="1M") == [
        "`resync_floor` (2097152) must not be above `resync_rate` (1048576), the ceiling"
    ]


def test_a_primary_that_may_not_go_on_alone_cannot_pull_ahead() -> None:
    found = problems(on_congestion="pull-ahead", on_peer_loss="block", resync_floor="2M", resync_rate="1M")
    assert len(found) == 2
    assert 'on_peer_loss = "block" forbids' in found[1]
    assert settings(on_congestion="pull-ahead").on_congestion == "pull-ahead"


def test_a_primary_that_may_not_go_on_alone_gives_no_slow_secondary_up() -> None:
    """It cut every new connection at once, because what it had to send again was too old already."""
    (problem,) = problems(max_lag_seconds=2.0, on_peer_loss="block")
    assert 'on_peer_loss = "block" forbids' in problem
    assert settings(max_lag_seconds=2.0).max_lag_seconds == 2.0


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        config.make_settings({}, base=BASE)
    assert set(caught.value.problems) == {f"`{k}` is missing" for k in ("pair_id", "side", "directory", "volumes")}


def test_a_key_in_the_wrong_table_is_sent_home() -> None:
    assert problems(window_bytes=1 << 27) == [
        "`window_bytes` is not known there; `window_bytes` belongs into replication"
    ]


@pytest.mark.parametrize("address", ["tcp://192.0.2.1:7000", "tcp://*:7000", "tcp://host.example:7000", "tcp://[::]:1"])
def test_an_address_off_loopback_needs_keys(address: str) -> None:
    (problem,) = problems(replication={"listen": address})
    assert address in problem
    assert "`tandemdisk keygen`" in problem


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:7000", "tcp://localhost:1", "tcp://[::1]:7000", "ipc:///run/x"])
def test_local_addresses_need_none(address: str) -> None:
    assert settings(replication={"listen": address}).replication.listen == address


def test_an_address_off_loopback_with_keys(tmp_path: Path) -> None:
    _, secret = keys.generate_keys(tmp_path, "a")
    public, _ = keys.generate_keys(tmp_path, "b")
    made = settings(replication={"listen": "tcp://*:7000", "secret_key": str(secret), "peer_key": str(public)})
    assert made.replication.secret_key == str(secret)


@pytest.mark.parametrize("address", ["127.0.0.1:7000", "tcp://127.0.0.1", "tcp://h:0", "tcp://h:70000", "udp://h:1"])
def test_bad_addresses(address: str) -> None:
    (problem,) = problems(replication={"connect": address})
    assert 'write "tcp://HOST:PORT" or "ipc:///PATH"' in problem


def test_compression_is_off_or_zstd() -> None:
    assert settings().replication.compression == "off"
    assert settings(replication={"connect": "ipc:///r", "compression": "zstd"}).replication.compression == "zstd"
    (problem,) = problems(replication={"connect": "ipc:///r", "compression": "gzip"})
    assert problem == "`replication.compression` must be 'off' or 'zstd', not 'gzip'"


def test_roles_need_their_address() -> None:
    assert "replication.connect" in problems("primary", replication={"listen": "ipc:///x"})[0]
    assert "replication.listen" in problems("secondary", replication={"connect": "ipc:///x"})[0]


def test_paths_too_long_for_sockets() -> None:
    assert any("too long for the sockets" in problem for problem in problems(directory="/" + "d" * 100))


def test_file_problems(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        config.load_config(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("mode = fast\n")
    with pytest.raises(ConfigError, match=r"bad.toml is not TOML: .*line 1"):
        config.load_config(bad)


@pytest.mark.parametrize(
    ("text", "size"),
    [(512, 512), ("4096", 4096), ("4K", 4096), ("4k", 4096), ("1G", 1 << 30), ("256MiB", 1 << 28), ("1.5 KiB", 1536)],
)
def test_sizes(text: object, size: int) -> None:
    assert config.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4X", "-1", "1.3", "K", "4KB", True, None, 1.5, "1e3"])
def test_no_sizes(text: object) -> None:
    with pytest.raises(ValueError, match=r"size|whole"):
        config.parse_size(text)


@examples(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists) | st.just({"x": 1})))
def test_junk_is_always_a_config_error(junk: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config.make_settings(junk, base=BASE)


# Files of any kind

GOOD = config.format_config(
    settings(
        mode="async",
        volumes=[{"name": "one", "disk": "/1"}, {"name": "two", "disk": "/2", "read_only": True}],
        export={"unix": "nbd.sock", "host": "127.0.0.1", "port": 10810},
        buffer={"size_bytes": "1G", "block_size": "64K", "directory": "/dev/shm/x", "spill_directory": "/x"},
    ),
    "primary",
)
VALUES = (
    "-1", "0", "1e400", "-0.0", "nan", "-inf", "true", "[]", "{}", "[[[]]]", '"1e3"', "9223372036854775808",
    "-9223372036854775809", "1" + "0" * 400, "1979-05-27", "00:32:00", "0x" + "f" * 9000, "9" * 9000, '""',
    '"\\u0000"', '"a\\u0000b"', '"../../x"', '"ipc://"', '"tcp://:1"', '"tcp://[::1"', '"' + "x" * 100_000 + '"',
    '"' + "9" * 5000 + 'G"', "'''\n'''", "[" * 5000 + "]" * 5000, "[" + "1," * 3000 + "]",
)  # fmt: skip
FILES = {
    "nothing": b"", "nested arrays": b"x = " + b"[" * 100_000, "nested tables": b"x = " + b"{a=" * 20_000,
    "a long key": b"k" * 500_000 + b" = 1\n", "a path of keys": b".".join([b"a"] * 900) + b" = 1\n",
    "many keys": GOOD.encode() + b"".join(b"k%d = 1\n" % n for n in range(1000)),
    "many volumes": GOOD.encode() + b"".join(b'[[volumes]]\nname="v%d"\ndisk="/d"\n' % n for n in range(1000)),
    "two of everything": GOOD.encode() * 2, "no UTF-8": b"\xff\xfe" + GOOD.encode("utf-16"), "a mark": b"\xef\xbb\xbf",
    "too large": GOOD.encode() + b"#" * (2 << 20), "a surrogate": b'side = "\\ud800"', "zeroes": bytes(100_000),
}  # fmt: skip


def load_or_refuse(path: Path, data: bytes) -> NodeSettings | None:
    """Settings that are worth writing down, or one exit code and sentences that a person can read."""
    path.write_bytes(data)
    started = time.process_time()
    made, refusal = None, None
    try:
        made = config.load_config(path, "primary")
    except ConfigError as error:
        refusal = error
    assert time.process_time() - started < 20
    if refusal is not None:
        assert refusal.exit_code == 2
        assert len(str(refusal)) < 40_000
        assert max(map(len, str(refusal).splitlines())) < 2000
    if made is not None:
        config.write_config(made, path, "primary")
        assert config.load_config(path, "primary") == made
    return made


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_configuration(tmp_path: Path, name: str) -> None:
    assert load_or_refuse(tmp_path / "c.toml", FILES[name]) is None


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_any_value_for_any_key(tmp_path: Path, value: str) -> None:
    lines = GOOD.splitlines()
    keys = [number for number, line in enumerate(lines) if " = " in line]
    taken = 0
    for number in keys:
        name = lines[number].partition(" = ")[0]
        changed = [*lines[:number], f"{name} = {value}", *lines[number + 1 :]]
        taken += load_or_refuse(tmp_path / "c.toml", "\n".join(changed).encode()) is not None
    assert taken < len(keys) / 2


PARTS = (b"[", b"]", b"{", b"}", b'"', b"'", b'"""', b"=", b".", b",", b"\\u", b"\0", b"\xff", b"\r", b"nan", b"1e999",
         b"0x", b"\n[[volumes]]\n", b"\n[export]\n", b"\n[volumes]\n", b"# ")  # fmt: skip


def mutated(chance: random.Random, data: bytes) -> bytes:
    """Flips, cuts, copies of parts, repeated sections, syntax where none was."""
    result = data
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, length = chance.randrange(len(result) + 1), chance.randrange(60)
        match chance.randrange(6):
            case 0 if at < len(result):
                result = result[:at] + bytes((result[at] ^ 1 << chance.randrange(8),)) + result[at + 1 :]
            case 1:
                result = result[:at] + result[at + length :]
            case 2:
                start = chance.randrange(len(result) + 1)
                result = result[:at] + result[start : start + length] + result[at:]
            case 3:
                result = result[:at] + chance.choice(PARTS) + result[at:]
            case 4:
                result = result[:at]
            case _:
                result += b"\n" + result[at:]
    return result


MUTANTS = [pytest.param(150, id="short"), pytest.param(20_000, id="long", marks=pytest.mark.soak)]


@pytest.mark.parametrize("rounds", MUTANTS)
def test_mutants_load_or_are_refused(tmp_path: Path, rounds: int) -> None:
    for seed in range(rounds):
        load_or_refuse(tmp_path / "c.toml", mutated(random.Random(seed), GOOD.encode()))


@pytest.mark.parametrize("content", [b"\xff" * 100, b"x" * (1 << 20), b'public-key = "' + b"x" * 50_000 + b'"', b"="])
def test_keys_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    replication = {"connect": "ipc:///r", "secret_key": f"{tmp_path}/key", "peer_key": f"{tmp_path}/key"}
    assert all("key" in problem for problem in problems(replication=replication))
    assert problems(replication=replication | {"peer_key": "a\0b"})


def test_a_configuration_is_read_no_further_than_one_can_be_long() -> None:
    with pytest.raises(ConfigError, match="no configuration"):
        config.load_config(Path("/dev/zero"))
