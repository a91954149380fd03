"""The semantics of QEMU's block replication driver, as its unit test goes through them, on a pair of real processes.

The names of the cases are those of ``tests/unit/test-replication.c``; what each is about is told here in our words:

    QEMU                          here
    ----                          ----
    before start                  the process is not there, or (secondary) the first synchronisation is not over
    start                         the pair is protected
    write to the secondary disk   a write through the primary
    the top of the secondary      the guest's export
    stop with failover            ``failover --to checkpoint`` after the primary is gone; the commit is done
    get_error                     ``error`` in status is empty

Two differences. QEMU's primary driver refuses reads, because it only forwards writes; our primary's export is the disk,
so it serves both. And QEMU compares with memcmp(…) <= 0, which lets any smaller byte pass: its expectation that after a
failover the primary's later writes are there (0x22) holds only by that laxity. The guest's view becomes the disk, so
the old contents (0x11) are there; 0x22 is what ``--to latest`` keeps. Here every byte is compared for equality.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.control import ControlClient
from common.errors import NotRunning, OperationFailed
from common.nbd_client import NbdClient, NbdClientError
from deploy.pair import Pair, PairOptions
from tests import pairs
from tests.pairs import MIB

SIZE = 16 * MIB
HALF = SIZE // 2
OPTIONS = PairOptions(size=SIZE, mode="sync", buffer_bytes=2 * SIZE)


def filled(*parts: tuple[int, int]) -> bytes:
    """(byte, length) after one another."""
    return b"".join(bytes([value]) * length for value, length in parts)


ONES = filled((0x11, SIZE))


@pytest.fixture
def pair(short_dir: Path) -> Iterator[Pair]:
    """Protected; both disks hold 0x11, and so does the checkpoint."""
    with pairs.running(short_dir / "p", OPTIONS) as made:
        with NbdClient(pairs.primary_uri(made)) as client:
            pairs.write_all(client, ONES)
        made.checkpoint()
        yield made


def replicate_and_write(pair: Pair) -> None:
    """0x22 into the second half through the primary, then 0x33 into the first half by the guest."""
    with NbdClient(pairs.primary_uri(pair)) as primary, NbdClient(pairs.guest_uri(pair)) as guest:
        for offset in range(HALF, SIZE, MIB):
            primary.write(offset, filled((0x22, MIB)))
        assert pairs.read_all(guest) == ONES, "old contents were backed up to the hidden disk"
        for offset in range(0, HALF, MIB):
            guest.write(offset, filled((0x33, MIB)))
        assert pairs.read_all(guest) == filled((0x33, HALF), (0x11, HALF))


def test_primary_read_and_write_before_start(short_dir: Path) -> None:
    pair = Pair.create(short_dir / "p", OPTIONS)
    with pytest.raises(NotRunning):
        NbdClient(f"nbd+unix:///disk0?socket={pair.settings('primary').export.unix}")
    with pytest.raises(NotRunning):
        pair.checkpoint()
    assert not any(pairs.primary_disk(pair).read_bytes())


def test_primary_start_stop_checkpoint_and_error(short_dir: Path) -> None:
    with pairs.running(short_dir / "p", OPTIONS) as pair:
        twos = filled((0x22, SIZE))
        with NbdClient(pairs.primary_uri(pair)) as client:
            assert pairs.read_all(client) == bytes(SIZE)
            pairs.write_all(client, twos)
            assert pairs.read_all(client) == twos
        before = pair.status()["checkpoint"]
        assert pair.checkpoint().number > before
        assert pair.status()["primary"]["error"] is None
        uri = pairs.primary_uri(pair)
        pair.down()
        with pytest.raises(NotRunning):
            NbdClient(uri)
        assert pairs.primary_disk(pair).read_bytes() == twos
        pairs.compare_disks(pair)


def test_secondary_read_and_write_before_start(short_dir: Path) -> None:
    """No checkpoint yet, so there is nothing to show: EIO, and the disk stays as it was."""
    old = pairs.random_bytes(1, SIZE)
    (short_dir / "a.raw").write_bytes(ONES)
    (short_dir / "b.raw").write_bytes(old)
    disks = ((short_dir / "a.raw",), (short_dir / "b.raw",))
    options = PairOptions(primary_disks=disks[0], secondary_disks=disks[1], buffer_bytes=2 * SIZE)
    pair = Pair.create(short_dir / "p", options)
    with pairs.started(pair, "secondary"):
        status = pair.client("secondary").call("status")
        assert not status["protected"]
        with NbdClient(status["nbd_uri"]) as guest:
            for call in (lambda: guest.read(0, SIZE), lambda: guest.write(0, bytes(MIB)), lambda: guest.zero(0, MIB)):
                with pytest.raises(NbdClientError) as caught:
                    call()
                assert caught.value.errno == errno.EIO
        for target in ("checkpoint", "latest"):
            with pytest.raises(OperationFailed, match="nchronis"):
                pair.failover(target, force=True)
    assert (short_dir / "b.raw").read_bytes() == old


def test_secondary_start(pair: Pair) -> None:
    guest = pairs.guest_uri(pair)
    assert pairs.contents(guest) == ONES
    replicate_and_write(pair)
    assert pairs.secondary_disk(pair).read_bytes() == filled((0x11, HALF), (0x22, HALF)), "guests do not touch the disk"
    pairs.compare_disks(pair)
    assert pairs.contents(pairs.primary_uri(pair)) == filled((0x11, HALF), (0x22, HALF))


def test_secondary_stop(pair: Pair) -> None:
    replicate_and_write(pair)
    pairs.kill_primary(pair)
    pair.failover("checkpoint")
    expected = filled((0x33, HALF), (0x11, HALF))
    assert pairs.contents(pairs.guest_uri(pair)) == expected
    pair.wait_for(lambda now: now["state"] == "done", "done with the commit", 30)
    assert pairs.secondary_disk(pair).read_bytes() == expected
    assert pairs.contents(pairs.guest_uri(pair)) == expected


def test_secondary_stop_keeping_the_latest(pair: Pair) -> None:
    """What QEMU's test seems to expect of its second half."""
    with NbdClient(pairs.primary_uri(pair)) as client:
        for offset in range(HALF, SIZE, MIB):
            client.write(offset, filled((0x22, MIB)))
    pairs.kill_primary(pair)
    assert pair.failover("latest")["state"] == "DONE"
    expected = filled((0x11, HALF), (0x22, HALF))
    assert pairs.contents(pairs.guest_uri(pair)) == expected
    assert pairs.secondary_disk(pair).read_bytes() == expected


@pytest.mark.slow
def test_secondary_continuous_replication(pair: Pair) -> None:
    """After a failover further commands of the old order change nothing: not a byte, not the stage."""
    replicate_and_write(pair)
    pairs.kill_primary(pair)
    pair.failover("checkpoint")
    pair.wait_for(lambda now: now["state"] == "done", "done with the commit", 30)
    expected = filled((0x33, HALF), (0x11, HALF))
    for target in ("checkpoint", "latest"):
        with pytest.raises(OperationFailed, match="taken over already"):
            pair.failover(target, force=True)
    pair.up()  # the old primary is not started beside the side that leads
    status = pair.status()
    assert (status["state"], status["primary"]["pid"], status["secondary"]["role"]) == ("done", None, "primary")
    with pytest.raises(OperationFailed, match="no checkpoint to take"):
        pair.checkpoint()
    assert pairs.contents(pairs.guest_uri(pair)) == expected
    with NbdClient(pairs.guest_uri(pair)) as client:
        client.write(HALF, filled((0x44, MIB)))
    expected = filled((0x33, HALF), (0x44, MIB), (0x11, HALF - MIB))
    assert pairs.contents(pairs.guest_uri(pair)) == expected
    assert pairs.secondary_disk(pair).read_bytes() == expected
    pair.down()
    pair.up()
    assert pair.status()["secondary"]["role"] == "primary"
    assert pairs.contents(pairs.guest_uri(pair)) == expected


def test_secondary_do_checkpoint(pair: Pair) -> None:
    replicate_and_write(pair)
    pair.checkpoint()
    expected = filled((0x11, HALF), (0x22, HALF))
    assert pairs.contents(pairs.guest_uri(pair)) == expected, "the checkpoint empties active and hidden disk"
    assert pair.status()["buffer"]["bytes"] == 0
    pairs.kill_primary(pair)
    pair.failover("checkpoint")
    pair.wait_for(lambda now: now["state"] == "done", "done with the commit", 30)
    assert pairs.secondary_disk(pair).read_bytes() == expected


def test_secondary_get_error(pair: Pair) -> None:
    replicate_and_write(pair)
    assert pair.status()["secondary"]["error"] is None
    assert ControlClient(pair.settings("secondary").control_path("export")).call("status")["stage"] == "RUNNING"
    pairs.kill_primary(pair)
    pair.failover("checkpoint")
    assert pair.status()["secondary"]["error"] is None
