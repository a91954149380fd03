"""What cannot be is refused with one sentence and its exit code, by the command as an operator runs it.

Nothing is touched by it: the same bytes and times of the disks, no directory, disk buffer or process left; and where
a pair runs, it goes on as before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from common import wire
from common.child import python_environment
from common.config import write_config
from common.disk import FileDisk
from common.generation import Standing
from common.keys import generate_keys
from common.nbd_client import NbdClient, NbdClientError
from common.settings import NodeSettings, Role
from deploy.pair import Pair, PairOptions
from tests import pairs
from tests.pairs import MIB, tandemdisk

SIZE = 4 * MIB
OPTIONS = PairOptions(size=SIZE, overrides={"replication": {"heartbeat_s": 0.1, "peer_timeout_s": 1.0}})


@pytest.fixture(scope="module")
def standing_pair() -> Iterator[Pair]:
    """A protected pair that nothing in these tests may disturb."""
    with tempfile.TemporaryDirectory(prefix="td-", dir="/tmp") as directory:
        with pairs.running(Path(directory) / "p", PairOptions(size=SIZE)) as made:
            before = made.status()
            yield made
            after = made.status()
            assert after["state"] == "protected"
            for key in ("checkpoint", "generation"):
                assert after[key] == before[key]
            for role in ("primary", "secondary"):
                assert after[role]["pid"] == before[role]["pid"]
            assert after["counters"]["primary"]["cuts"] == 0


@pytest.fixture
def disks(short_dir: Path) -> tuple[Path, Path]:
    """Two disks of one size with different contents."""
    found = (short_dir / "a.raw", short_dir / "b.raw")
    for seed, path in enumerate(found):
        path.write_bytes(pairs.random_bytes(seed, SIZE))
    return found


@contextlib.contextmanager
def untouched(*paths: Path) -> Iterator[None]:
    """AssertionError if any of the files is another one afterwards."""

    def look() -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for path in paths:
            if path.exists():
                now = path.stat()
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found.append((now.st_size, now.st_mtime_ns, now.st_blocks, now.st_mode, digest))
            else:
                found.append(())
        return found

    before = look()
    yield
    assert look() == before, "a disk was touched"


def refused(*arguments: str | Path, code: int, says: tuple[str, ...]) -> str:
    """Run the command; it ends with ``code``, and its stderr, one error, has all of ``says``."""
    done = tandemdisk(*arguments)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    for part in says:
        assert part in done.stderr, f"{part!r} is not in {done.stderr!r}"
    assert "Traceback" not in done.stderr
    return done.stderr


def edit(pair: Pair, role: Role, **changes: Any) -> NodeSettings:
    """Change settings in the configuration file of one side."""
    settings = dataclasses.replace(pair.settings(role), **changes)
    write_config(settings, pair.directory.config(role), role)
    return settings


def replication(pair: Pair, role: Role, **changes: Any) -> None:
    edit(pair, role, replication=dataclasses.replace(pair.settings(role).replication, **changes))


def assert_nothing_left(pair: Pair) -> None:
    """No process answers, no memory is held."""
    status = pair.status()
    assert (status["primary"]["pid"], status["secondary"]["pid"], status["supervisor"]["pid"]) == (None, None, None)
    for role in ("primary", "secondary"):
        directory = pair.settings(role).buffer.directory
        assert not os.path.exists(directory), os.listdir(directory)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


# Disks


def up(short_dir: Path, primary: Path, secondary: Path) -> tuple[str | Path, ...]:
    return ("up", "--dir", short_dir / "p", "--primary-disk", primary, "--secondary-disk", secondary, "--detach")


def test_sizes_that_differ(short_dir: Path, disks: tuple[Path, Path]) -> None:
    with disks[1].open("ab") as file:
        file.write(b"!")
    with untouched(*disks):
        refused(*up(short_dir, *disks), code=3, says=(f"{disks[0]} has {SIZE} bytes", f"{disks[1]} has {SIZE + 1}"))
    assert not (short_dir / "p").exists()


def test_sizes_that_differ_between_two_hosts(short_dir: Path) -> None:
    """Neither side can see the other's disk: the handshake finds out."""
    pair = Pair.create(short_dir / "p", OPTIONS)
    os.truncate(pairs.secondary_disk(pair), SIZE + 512)
    with untouched(pairs.primary_disk(pair), pairs.secondary_disk(pair)):
        refused(
            "up", "--dir", short_dir / "p", "--detach",
            code=5, says=(f"disk0 has {SIZE} bytes on the primary and {SIZE + 512} bytes on the secondary",),
        )  # fmt: skip
    assert_nothing_left(pair)


@pytest.mark.parametrize("side", [0, 1])
def test_a_missing_disk(short_dir: Path, disks: tuple[Path, Path], side: int) -> None:
    disks[side].unlink()
    with untouched(*disks):
        refused(*up(short_dir, *disks), code=3, says=(str(disks[side]), "No such file"))
    assert not (short_dir / "p").exists()


@pytest.mark.parametrize("side", [0, 1])
def test_a_disk_that_goes_missing_later(short_dir: Path, side: int) -> None:
    pair = Pair.create(short_dir / "p", OPTIONS)
    disks = (pairs.primary_disk(pair), pairs.secondary_disk(pair))
    disks[side].unlink()
    with untouched(*disks):
        refused("up", "--dir", short_dir / "p", "--detach", code=3, says=(f"{disks[side]} does not exist",))
    assert_nothing_left(pair)


@pytest.mark.parametrize("side", [0, 1])
def test_a_read_only_disk(short_dir: Path, disks: tuple[Path, Path], side: int) -> None:
    disks[side].chmod(0o444)
    with untouched(*disks):
        refused(*up(short_dir, *disks), code=3, says=(f"{disks[side]} cannot be opened", "permissions"))
    assert not (short_dir / "p").exists()


@pytest.mark.parametrize("side", [0, 1])
def test_a_busy_disk(short_dir: Path, disks: tuple[Path, Path], side: int) -> None:
    """Another process has it; the other disk of the pair is let go of again."""
    holder = FileDisk(str(disks[side]))
    with untouched(*disks):
        refused(*up(short_dir, *disks), code=3, says=(f"{disks[side]} is in use by another process",))
    assert not (short_dir / "p").exists()
    holder.close()
    for disk in disks:
        FileDisk(str(disk)).close()


def test_the_disk_of_another_pair(standing_pair: Pair, short_dir: Path, disks: tuple[Path, Path]) -> None:
    busy = pairs.secondary_disk(standing_pair)
    with untouched(disks[0], busy):
        refused(*up(short_dir, disks[0], busy), code=3, says=(f"{busy} is in use by another process",))
    assert not (short_dir / "p").exists()


# Configuration


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("speed = 11\n", ("`speed` is not known",)),
        ("checkpoint_intervall_s = 1\n", ("did you mean `checkpoint_interval_s`?",)),
        ("mode = \n", ("is not TOML", "line 1")),
        ("mode = 'fast'\nside = 'c'\n", ("problems", "`mode`", "`side`")),
    ],
)
def test_a_wrong_configuration(short_dir: Path, added: str, says: tuple[str, ...]) -> None:
    pair = Pair.create(short_dir / "p", OPTIONS)
    config = pair.directory.config("primary")
    names = {line.split(" ")[0] for line in added.splitlines()}
    kept = [line for line in config.read_text().splitlines() if line.split(" ")[0] not in names]
    good = config.read_text()
    config.write_text(added + "\n".join(kept))
    with untouched(short_dir / "p" / "a" / "disk0.raw", short_dir / "p" / "b" / "disk0.raw"):
        for command in (("up", "--dir", short_dir / "p", "--detach"), ("primary", "--config", config)):
            refused(*command, code=2, says=says)
    config.write_text(good)
    assert_nothing_left(pair)


def test_every_error_at_once(short_dir: Path) -> None:
    """Of both sides."""
    pair = Pair.create(short_dir / "p", OPTIONS)
    for role in ("primary", "secondary"):
        config = pair.directory.config(role)
        config.write_text(config.read_text().replace("heartbeat_s = 0.1", f"heartbeat_s = 0.1\nbeat_{role} = 1"))
    says = ("replication.beat_primary", "replication.beat_secondary")
    refused("up", "--dir", short_dir / "p", "--detach", code=2, says=says)


@pytest.mark.local_hosts
def test_a_stream_that_leaves_the_machine_without_keys(short_dir: Path) -> None:
    pair = Pair.create(short_dir / "p", OPTIONS)
    replication(pair, "secondary", listen=f"tcp://0.0.0.0:{free_port()}")
    config = pair.directory.config("secondary")
    refused("secondary", "--config", config, code=2, says=("must be encrypted", "tandemdisk keygen"))


def test_bad_usage(short_dir: Path, standing_pair: Pair) -> None:
    directory = standing_pair.directory.path
    assert "--frob" in refused("up", "--frob", code=2, says=())
    refused("up", "--dir", short_dir / "p", "--size", "some", code=2, says=("'some' is no size",))
    refused("up", "--dir", short_dir / "p", "--size", "4M", "--block-size", "5000", code=2, says=("power of two",))
    refused("up", "--dir", directory, "--mode", "async", "--detach", code=2, says=("--mode async was given",))
    refused("status", "--dir", short_dir / "p", code=2, says=("There is no pair in",))
    assert not (short_dir / "p").exists()


def test_disks_are_accepted_of_no_side_that_runs(standing_pair: Pair) -> None:
    """However it is named: its process goes by the intent file and the metadata that it knows of."""
    directory = standing_pair.directory.path
    with untouched(directory / "a" / "metadata", directory / "a" / "intent"):
        for side in (("--dir", directory), ("--config", standing_pair.directory.config("primary"))):
            refused("accept-disk", *side, code=1, says=("Side a runs",))


def test_commands_to_a_pair_that_does_not_run(short_dir: Path) -> None:
    pair = Pair.create(short_dir / "p", OPTIONS)
    for command in ("checkpoint", "failover"):
        refused(command, "--dir", short_dir / "p", code=7, says=("Error: ",))
    assert_nothing_left(pair)


# Memory


@pytest.fixture
def small_memory(short_dir: Path) -> Iterator[Path]:
    """A memory file system of 2 MiB, as a full /dev/shm is."""
    mounted = short_dir / "memory"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def test_full_shared_memory(short_dir: Path, small_memory: Path) -> None:
    buffer = {"buffer": {"directory": str(small_memory / "buffer")}}
    pair = Pair.create(short_dir / "p", dataclasses.replace(OPTIONS, overrides=buffer))
    elsewhere = dataclasses.replace(pair.settings("primary").buffer, directory=str(small_memory / "a"))
    edit(pair, "primary", buffer=elsewhere)
    with untouched(pairs.primary_disk(pair), pairs.secondary_disk(pair)):
        refused("up", "--dir", short_dir / "p", "--detach", code=4, says=(str(small_memory),))
    assert not list(small_memory.iterdir())
    assert os.statvfs(small_memory).f_bfree == os.statvfs(small_memory).f_blocks


def test_more_memory_than_there_is(short_dir: Path) -> None:
    command = ("up", "--dir", short_dir / "p", "--size", "8T", "--buffer-size", "4T", "--detach")
    refused(*command, code=4, says=("/dev/shm",))
    assert not (short_dir / "p").exists()


# Addresses


@pytest.mark.local_hosts
def test_an_nbd_port_in_use(short_dir: Path, disks: tuple[Path, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, untouched(*disks):
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused(*up(short_dir, *disks), "--assume-synced", "--listen", address, code=8, says=(address.split(":")[1],))
    assert not (short_dir / "p").exists()


@pytest.mark.local_hosts
def test_a_replication_port_in_use(short_dir: Path) -> None:
    pair = Pair.create(short_dir / "p", OPTIONS)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        replication(pair, "secondary", listen=address)
        replication(pair, "primary", connect=address)
        with untouched(pairs.primary_disk(pair), pairs.secondary_disk(pair)):
            refused("up", "--dir", short_dir / "p", "--detach", code=8, says=(address, "in use"))
    assert_nothing_left(pair)


def test_a_socket_that_somebody_listens_on(short_dir: Path) -> None:
    pair = Pair.create(short_dir / "p", OPTIONS)
    path = pair.settings("primary").export.unix
    assert path is not None
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(path)
        taken.listen()
        refused("up", "--dir", short_dir / "p", "--detach", code=8, says=(path,))
    assert_nothing_left(pair)


# Peers


@pytest.fixture
def pair_with_keys(short_dir: Path) -> Pair:
    """A pair over TCP, encrypted; not started."""
    addresses = {"primary": f"tcp://127.0.0.1:{free_port()}", "secondary": f"tcp://127.0.0.1:{free_port()}"}
    pair = Pair.create(short_dir / "p", OPTIONS)
    files = {name: generate_keys(short_dir, name) for name in ("a", "b", "stranger")}
    for role, other, own, peer in (("primary", "secondary", "a", "b"), ("secondary", "primary", "b", "a")):
        keys = {"secret_key": str(files[own][1]), "peer_key": str(files[peer][0])}
        keys |= {"listen": addresses[role], "connect": addresses[other]}
        replication(pair, role, **keys)  # type: ignore[arg-type]  # mypy widens the literals
    return pair


@pytest.mark.local_hosts
def test_keys_that_match(pair_with_keys: Pair) -> None:
    with pair_with_keys as pair:
        pair.up()
        pair.wait_protected()
        with NbdClient(pairs.primary_uri(pair)) as client:
            client.write(0, b"secret")
        pairs.compare_disks(pair)


@pytest.mark.local_hosts
@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_keys_that_do_not_match(pair_with_keys: Pair, short_dir: Path, role: Role) -> None:
    """One side has a stranger's public key in place of its peer's."""
    pair = pair_with_keys
    replication(pair, role, peer_key=str(short_dir / "stranger.key"))
    with untouched(pairs.primary_disk(pair), pairs.secondary_disk(pair)):
        refused("up", "--dir", pair.directory.path, "--detach", code=5, says=("keys do not match", "tandemdisk keygen"))
    assert_nothing_left(pair)


def test_a_peer_of_another_pair(short_dir: Path) -> None:
    pair = Pair.create(short_dir / "p", OPTIONS)
    mine = pair.settings("primary").pair_id
    edit(pair, "secondary", pair_id="another")
    with untouched(pairs.primary_disk(pair), pairs.secondary_disk(pair)):
        says = (f"the primary belongs to pair '{mine}'", "the secondary to pair 'another'")
        refused("up", "--dir", short_dir / "p", "--detach", code=5, says=says)
    assert_nothing_left(pair)


@contextlib.contextmanager
def zmq_socket(kind: int) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(kind) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVTIMEO, 10_000)
        yield sock


@pytest.mark.local_hosts
def test_a_primary_of_another_protocol_version(standing_pair: Pair) -> None:
    """The secondary says why, in what stays the same in every version, and goes on with its own primary."""
    settings = standing_pair.settings("secondary")
    hello = wire.Hello(
        7 << 32 | 1, 0, wire.PROTOCOL_VERSION + 1, 1, 1, (("disk0", SIZE),),
        Standing(settings.pair_id, "a", "primary", (), True),
    )  # fmt: skip
    with zmq_socket(zmq.DEALER) as sock:
        assert settings.replication.listen is not None
        sock.connect(settings.replication.listen)
        sock.send_multipart([bytes(frame) for frame in wire.encode(hello)])
        answer = wire.decode(sock.recv_multipart())
        assert isinstance(answer, wire.Refuse)
        assert answer.code == "version"
        assert "protocol version 2" in answer.sentence
        for junk in ([b""], [b"junk"], [b"\x93\x01\x02", b"x" * 100_000], [os.urandom(300) for _ in range(5)]):
            sock.send_multipart(junk)
        sock.send_multipart([bytes(frame) for frame in wire.encode(hello)])
        assert isinstance(wire.decode(sock.recv_multipart()), wire.Refuse)
    assert standing_pair.status()["state"] == "protected"


@pytest.mark.local_hosts
def test_a_secondary_of_another_protocol_version(short_dir: Path) -> None:
    """It refuses as ours would; the primary hands the sentence on and ends."""
    pair = Pair.create(short_dir / "p", OPTIONS)
    address = pair.settings("primary").replication.connect
    assert address is not None
    with zmq_socket(zmq.ROUTER) as sock, untouched(pairs.primary_disk(pair)):
        sock.bind(address)
        command = [*pairs.TANDEMDISK, "primary", "--config", str(pair.directory.config("primary"))]
        with subprocess.Popen(command, env=python_environment(), stderr=subprocess.PIPE, text=True) as primary:
            peer, *frames = sock.recv_multipart()
            hello = wire.decode(frames)
            assert isinstance(hello, wire.Hello)
            sentence = "the primary speaks protocol version 1, the secondary version 2"
            refusal = wire.encode(wire.Refuse(hello.session, 0, "version", sentence))
            sock.send_multipart([peer, *(bytes(frame) for frame in refusal)])
            assert primary.wait(20) == 5
            assert primary.stderr is not None
            assert sentence in primary.stderr.read()


# Failover


def test_failover_while_the_primary_is_alive(short_dir: Path) -> None:
    with pairs.running(short_dir / "p", PairOptions(size=SIZE)) as pair:
        with NbdClient(pairs.primary_uri(pair)) as client:
            client.write(0, b"kept")
            for target in ("latest", "checkpoint"):
                command = ("failover", "--dir", short_dir / "p", "--to", target)
                refused(*command, code=6, says=("The primary is alive and connected", "--force"))
            status = pair.status()
            assert (status["state"], status["generation"], status["secondary"]["state"]) == ("protected", 1, "RUNNING")
            client.write(4, b"on")
            pairs.compare_disks(pair)
            done = tandemdisk("failover", "--dir", short_dir / "p", "--force", "--json")
            assert done.returncode == 0, done.stderr
            # the former primary tells nobody any more that a write was done
            with pytest.raises(NbdClientError) as caught:
                client.write(8, b"lost")
            assert caught.value.errno == errno.EIO
        assert pairs.contents(pairs.guest_uri(pair))[:12] == b"kepton" + bytes(6)
        pair.wait_for(lambda now: now["primary"]["state"] == "fenced", "fenced", 20)


def test_latest_with_guest_writes(short_dir: Path) -> None:
    with pairs.running(short_dir / "p", PairOptions(size=SIZE)) as pair:
        with NbdClient(pairs.primary_uri(pair)) as client:
            client.write(0, b"from the primary")
        with NbdClient(pairs.guest_uri(pair)) as guest:
            guest.write(8192, b"from the guest")
            pairs.kill_primary(pair)
            refused(
                "failover", "--dir", short_dir / "p",
                code=6, says=("writes of this side's guest", "--to checkpoint", "--force"),
            )  # fmt: skip
            assert pair.status()["secondary"]["state"] == "RUNNING"
            assert guest.read(0, 16) == bytes(16)
            assert guest.read(8192, 14) == b"from the guest"
            done = tandemdisk("failover", "--dir", short_dir / "p", "--to", "checkpoint", "--json")
            assert done.returncode == 0, done.stderr
            assert guest.read(0, 16) == bytes(16)
            assert guest.read(8192, 14) == b"from the guest"


def test_latest_with_guest_writes_by_force(short_dir: Path) -> None:
    with pairs.running(short_dir / "p", PairOptions(size=SIZE)) as pair:
        with NbdClient(pairs.primary_uri(pair)) as client:
            client.write(0, b"from the primary")
        with NbdClient(pairs.guest_uri(pair)) as guest:
            guest.write(8192, b"from the guest")
            pairs.kill_primary(pair)
            done = tandemdisk("failover", "--dir", short_dir / "p", "--force", "--json")
            assert done.returncode == 0, done.stderr
            assert guest.read(0, 16) == b"from the primary"
            assert guest.read(8192, 14) == bytes(14)
