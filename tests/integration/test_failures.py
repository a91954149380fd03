"""The seven failure cases of QEMU's docs/block-replication.txt, each caused for real, on pairs of real processes.

What must come of each is in ``common.failures``. Disks fail because a loop device lies over a file that was truncated,
or because a memory file system is full; the tests of ``test_pair_durability`` cause the same by a layer that fails on
command.
"""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from common.child import python_environment
from common.errors import OperationFailed
from common.failures import FAILURE_WORDS, Failure
from common.nbd_client import NbdClient, NbdClientError
from deploy.cli import main
from deploy.pair import Pair, PairOptions
from tests import pairs
from tests.pairs import MIB, QUICK, Load
from tests.tools import Loop, loop_device, mounted_tmpfs, resize_tmpfs

SIZE = 16 * MIB
BUFFER = 2 * SIZE


def make_disk(path: Path, data: bytes = b"") -> Path:
    """A sparse image of SIZE bytes that begins with ``data``."""
    with path.open("wb") as file:
        file.write(data)
        file.truncate(SIZE)
    return path


@contextmanager
def pair_of(directory: Path, primary: Path, secondary: Path) -> Iterator[Pair]:
    """A protected pair of two disks that are equal."""
    options = PairOptions(
        primary_disks=(primary,), secondary_disks=(secondary,), assume_synced=True, buffer_bytes=BUFFER, overrides=QUICK
    )
    with pairs.running(directory, options) as pair:
        yield pair


def error_of(pair: Pair, role: str) -> Any:
    return pair.status()[role]["error"]


def has_failed(pair: Pair, role: str, case: Failure, sentence: str, timeout_s: float = 20.0) -> dict[str, Any]:
    """Wait until ``status`` says so."""

    def told(now: dict[str, Any]) -> bool:
        error = now[role]["error"]
        return error is not None and error["case"] == case and sentence in error["sentence"]

    status = pair.wait_for(told, f"in failure case {case}", timeout_s)
    assert status[role]["error"]["name"] == FAILURE_WORDS[case]
    assert status["counters"][role]["failures"][FAILURE_WORDS[case]] >= 1
    return status


def is_well(pair: Pair, role: str, timeout_s: float = 30.0) -> None:
    pair.wait_for(lambda now: now["state"] == "protected" and now[role]["error"] is None, "well again", timeout_s)


def refused(code: int, call: Any, *args: Any) -> None:
    with pytest.raises(NbdClientError) as caught:
        call(*args)
    assert caught.value.errno == code


# 1


@pytest.mark.root
def test_1_a_primary_disk_that_cannot_be_read(short_dir: Path) -> None:
    data = pairs.random_bytes(1, SIZE)
    with loop_device(make_disk(short_dir / "a.raw", data)) as loop:
        with pair_of(short_dir / "p", loop.device, make_disk(short_dir / "b.raw", data)) as pair:
            loop.truncate(8 * MIB)
            with NbdClient(pairs.primary_uri(pair)) as client:
                refused(errno.EIO, client.read, 12 * MIB, 8192)
                assert client.read(MIB, 8192) == data[MIB : MIB + 8192]
                client.write(2 * MIB, b"elsewhere")
                status = has_failed(pair, "primary", Failure.PRIMARY_DISK, "read of 8192 bytes at 12582912")
                assert status["state"] == "protected"
                loop.heal()
                assert client.read(12 * MIB, 8192) == data[12 * MIB : 12 * MIB + 8192]
                client.flush()
            assert error_of(pair, "primary") is not None, "nobody has looked after it"
            where = ["status", "--dir", str(pair.directory.path)]
            shown = CliRunner().invoke(main, where)
            assert "I/O error on the primary disk (case 1)" in " ".join(shown.output.split())
            cleared = CliRunner().invoke(main, [*where, "--clear-error"])
            assert (cleared.exit_code, "case 1" in cleared.output) == (0, False)
            assert error_of(pair, "primary") is None


@pytest.mark.root
def test_1_a_primary_disk_that_is_full(short_dir: Path) -> None:
    with mounted_tmpfs(short_dir / "small", 4 * MIB) as small:
        primary, secondary = make_disk(small / "a.raw"), make_disk(short_dir / "b.raw")
        with pair_of(short_dir / "p", primary, secondary) as pair:
            with NbdClient(pairs.primary_uri(pair)) as client:
                for offset in range(0, 3 * MIB, MIB):
                    client.write(offset, b"x" * MIB)
                refused(errno.ENOSPC, client.write, 8 * MIB, b"y" * 2 * MIB)
                has_failed(pair, "primary", Failure.PRIMARY_DISK, "No space left")
                assert client.read(0, 3 * MIB) == b"x" * 3 * MIB
                resize_tmpfs(small, 32 * MIB)
                client.write(8 * MIB, b"z" * 2 * MIB)
            pair.wait_protected(30)
            pairs.compare_disks(pair)


# 2


def test_2_a_secondary_that_dies_with_writes_on_their_way(short_dir: Path) -> None:
    options = PairOptions(size=SIZE, buffer_bytes=BUFFER, overrides=QUICK)
    with pairs.running(short_dir / "p", options) as pair:
        with Load(pairs.primary_uri(pair), depth=64) as load:
            load.wait_for(200)
            pairs.kill(pair.status()["secondary"]["pid"])
            has_failed(pair, "primary", Failure.FORWARDING, "not confirmed by the secondary")
            load.wait_for(load.answered + 100)  # clients go on
            pair.wait_for(lambda now: now["secondary"]["pid"] is None, "without its secondary", 20)
            pair.up()
            is_well(pair, "primary")
        assert load.end is None
        pair.wait_for(lambda now: now["lag"]["bytes"] == 0, "without lag", 20)
        assert pairs.contents(pairs.primary_uri(pair)) == load.model(size=SIZE)
        pairs.compare_disks(pair)


# 3


@pytest.mark.root
def test_3_old_contents_that_cannot_be_read(short_dir: Path) -> None:
    """Nothing is overwritten that was not saved: what the guest sees stays the checkpoint."""
    data = pairs.random_bytes(1, SIZE)
    with loop_device(make_disk(short_dir / "b.raw", data)) as loop:
        with pair_of(short_dir / "p", make_disk(short_dir / "a.raw", data), loop.device) as pair:
            loop.truncate(8 * MIB)
            with NbdClient(pairs.primary_uri(pair)) as client:
                client.write(12 * MIB, b"new" * 1000)  # answered: the primary goes on alone
                client.write(MIB, b"new" * 1000)
                has_failed(pair, "secondary", Failure.BACKUP, "old contents of volume disk0 cannot be copied")
                has_failed(pair, "primary", Failure.FORWARDING, "backup job failed")
                assert loop.file.stat().st_size == 8 * MIB, "not written"
                with NbdClient(pairs.guest_uri(pair)) as guest:
                    assert guest.read(MIB, 8192) == data[MIB : MIB + 8192]
                loop.heal()
                is_well(pair, "secondary")
                is_well(pair, "primary")
                client.flush()
            same_on_disk(pair, loop)


def same_on_disk(pair: Pair, loop: Loop) -> None:
    """Not in somebody's cache: what the file below the device holds."""
    loop.forget()
    assert loop.file.read_bytes() == pairs.primary_disk(pair).read_bytes()


# 4


@pytest.mark.root
def test_4_a_secondary_disk_that_is_full(short_dir: Path) -> None:
    with mounted_tmpfs(short_dir / "small", 4 * MIB) as small:
        with pair_of(short_dir / "p", make_disk(short_dir / "a.raw"), make_disk(small / "b.raw")) as pair:
            with NbdClient(pairs.primary_uri(pair)) as client:
                for offset in range(0, 8 * MIB, MIB):
                    client.write(offset, b"x" * MIB)
                has_failed(pair, "secondary", Failure.SECONDARY_DISK, "No space left")
                has_failed(pair, "primary", Failure.FORWARDING, "No space left")
                assert pairs.contents(pairs.guest_uri(pair)) == bytes(SIZE), "still the checkpoint"
                assert client.read(0, 8 * MIB) == b"x" * 8 * MIB
                resize_tmpfs(small, 32 * MIB)
                is_well(pair, "secondary")
                is_well(pair, "primary")
            pairs.compare_disks(pair)


@pytest.mark.root
def test_4_a_secondary_disk_that_forgets_what_it_took(short_dir: Path) -> None:
    """A device takes writes into the kernel's cache, and fails when they shall be durable: then the cache says what the
    disk does not hold, and only writing it again helps."""
    with mounted_tmpfs(short_dir / "small", 4 * MIB) as small:
        with loop_device(make_disk(small / "b.raw")) as loop:
            with pair_of(short_dir / "p", make_disk(short_dir / "a.raw"), loop.device) as pair:
                with NbdClient(pairs.primary_uri(pair)) as client:
                    for offset in range(0, 8 * MIB, MIB):
                        client.write(offset, b"x" * MIB)
                    with pytest.raises(NbdClientError):
                        client.flush()
                    has_failed(pair, "secondary", Failure.SECONDARY_DISK, "flush")
                    resize_tmpfs(small, 32 * MIB)
                    is_well(pair, "secondary")
                    is_well(pair, "primary")
                    client.flush()
                same_on_disk(pair, loop)


# 5


def test_5_an_active_disk_that_is_full(short_dir: Path) -> None:
    """To the guest it is a full disk; what it was told is written stays written."""
    size = 24 * MIB
    with pairs.running(short_dir / "p", PairOptions(size=size, buffer_bytes=37 * MIB)) as pair:
        with NbdClient(pairs.guest_uri(pair)) as guest:
            written = 0
            with pytest.raises(NbdClientError) as caught:
                for offset in range(0, size, MIB):
                    guest.write(offset, b"g" * MIB)
                    written = offset + MIB
            assert caught.value.errno == errno.ENOSPC
            assert 18 * MIB <= written < size
            status = has_failed(pair, "secondary", Failure.ACTIVE_DISK, "active disk is full")
            assert status["state"] == "protected"
            guest.write(5000, b"what is held already can be written again")
            assert guest.read(written - MIB, MIB) == b"g" * MIB
            with NbdClient(pairs.primary_uri(pair)) as client:
                client.write(0, b"p" * MIB)
            pair.checkpoint()
            is_well(pair, "secondary")
            assert guest.read(0, 2 * MIB) == b"p" * MIB + bytes(MIB)
            guest.write(size - MIB, b"h" * MIB)


# 6

STUCK = """
import os, signal, sys
from secondary.attach import attach
with attach(sys.argv[1]) as pair:
    with pair.volumes["disk0"].cow_request_begin(int(sys.argv[2]), int(sys.argv[2]) + 1, shared=True):
        print("begun", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
"""


@contextmanager
def stuck_reader(pair: Pair, offset: int) -> Iterator[subprocess.Popen[str]]:
    """A process that was stopped in the middle of a request on the block at ``offset``."""
    command = [sys.executable, "-P", "-c", STUCK, str(pair.directory.path), str(offset)]
    process = subprocess.Popen(command, env=python_environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_6_a_checkpoint_that_a_stopped_reader_prevents(short_dir: Path) -> None:
    """It fails with a sentence that names the reader. The one before stays, replication and guests go on."""
    options = PairOptions(size=SIZE, buffer_bytes=BUFFER, overrides={"request_timeout_s": 0.5, **QUICK})
    with pairs.running(short_dir / "p", options) as pair:
        before = pair.status()
        with NbdClient(pairs.primary_uri(pair)) as client, NbdClient(pairs.guest_uri(pair)) as guest:
            client.write(0, b"first")
            with stuck_reader(pair, 8 * MIB) as reader:
                with pytest.raises(OperationFailed, match=rf"held by process {reader.pid} \(.*kill -CONT"):
                    pair.checkpoint()
                status = has_failed(pair, "secondary", Failure.EMPTYING, f"process {reader.pid}")
                assert (status["state"], status["checkpoint"]) == ("protected", before["checkpoint"])
                client.write(MIB, b"second")
                assert pairs.secondary_disk(pair).read_bytes()[MIB : MIB + 6] == b"second"
                assert guest.read(0, 5) == bytes(5), "still the checkpoint before"
                guest.write(2 * MIB, b"of the guest")
                with pytest.raises(OperationFailed, match=str(reader.pid)):
                    pair.checkpoint()
                assert guest.read(2 * MIB, 12) == b"of the guest"
                reader.send_signal(signal.SIGCONT)
                reader.wait(20)
            number = pair.checkpoint().number
            after = pair.status()
            assert number > before["checkpoint"]
            assert (after["state"], after["secondary"]["error"], after["checkpoint"]) == ("protected", None, number)
            assert after["counters"]["primary"]["cuts"] == before["counters"]["primary"]["cuts"]
            assert guest.read(0, 5) + guest.read(MIB, 6) + guest.read(2 * MIB, 12) == b"firstsecond" + bytes(12)
        pairs.compare_disks(pair)


def test_6_a_stopped_reader_keeps_back_only_its_own_blocks(short_dir: Path) -> None:
    """Copy-before-write of what it holds has to wait, and is given up in the end; all the rest is replicated."""
    options = PairOptions(size=SIZE, buffer_bytes=BUFFER, overrides={"request_timeout_s": 0.5, **QUICK})
    with pairs.running(short_dir / "p", options) as pair:
        with NbdClient(pairs.primary_uri(pair)) as client, stuck_reader(pair, 8 * MIB) as reader:
            for offset in range(0, 8 * MIB, MIB):
                client.write(offset, b"x" * MIB)
            assert pair.status()["state"] == "protected"
            assert pairs.secondary_disk(pair).read_bytes()[: 8 * MIB] == b"x" * 8 * MIB
            client.write(8 * MIB, b"y")  # answered alone
            has_failed(pair, "secondary", Failure.BACKUP, f"process {reader.pid}")
            reader.kill()
            is_well(pair, "secondary")
            is_well(pair, "primary")
        pairs.compare_disks(pair)


# 7


@pytest.mark.root
def test_7_a_commit_that_finds_the_secondary_disk_full(short_dir: Path) -> None:
    with mounted_tmpfs(short_dir / "small", 4 * MIB) as small:
        data = pairs.random_bytes(1, 2 * MIB)
        primary, secondary = make_disk(short_dir / "a.raw", data), make_disk(small / "b.raw", data)
        with pair_of(short_dir / "p", primary, secondary) as pair:
            view = bytearray(data + bytes(SIZE - len(data)))
            with NbdClient(pairs.primary_uri(pair)) as client:
                client.write(MIB, b"after the checkpoint" * 1000)
            with NbdClient(pairs.guest_uri(pair)) as guest:
                for offset in range(4 * MIB, 12 * MIB, MIB):
                    guest.write(offset, b"g" * MIB)
                    view[offset : offset + MIB] = b"g" * MIB
                pairs.kill_primary(pair)
                pair.failover("checkpoint")
                status = has_failed(pair, "secondary", Failure.FAILOVER, "No space left")
                assert status["state"] == "failover_failed"
                assert pairs.read_all(guest) == view
                for offset in (700, 11 * MIB + 77):
                    guest.write(offset, b"after the failure" * 500)
                    view[offset : offset + 8500] = b"after the failure" * 500
                assert pairs.read_all(guest) == view
                with pytest.raises(OperationFailed, match="latest"):
                    pair.failover("latest", force=True)
                resize_tmpfs(small, 32 * MIB)
                pair.failover("checkpoint")
                pair.wait_for(lambda now: now["state"] == "done", "done with the commit", 30)
                assert error_of(pair, "secondary") is None
                assert pairs.read_all(guest) == view
            assert secondary.read_bytes() == view
