"""Configuration: round trip, and every mistake named at once with the place and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
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


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists) | st.just({"x": 1})))
def test_junk_is_always_a_config_error(junk: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config.make_settings(junk, base=BASE)
