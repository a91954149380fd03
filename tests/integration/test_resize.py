"""Volumes that grow while guests write: sizes, bytes, what is refused, and every way to die in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import OperationFailed, PeerRefused, TandemDiskError
from common.metadata import load, save
from common.nbd_client import NbdClient, NbdClientError
from common.settings import Role
from deploy.layout import PairOptions
from deploy.pair import Pair
from secondary.attach import attach
from tests.conftest import wait_until
from tests.nbd_tools import nbdinfo
from tests.pairs import (
    MIB,
    QUICK,
    Load,
    compare_disks,
    contents,
    guest_uri,
    kill,
    kill_primary,
    primary_disk,
    primary_uri,
    random_bytes,
    running,
    secondary_disk,
    tandemdisk,
)
from tests.tools import loop_device, run

OLD = 48 * MIB
NEW = 64 * MIB


def put(uri: str, offset: int, data: bytes) -> None:
    with NbdClient(uri) as client:
        client.write(offset, data)
        client.flush()


def sizes(pair: Pair) -> tuple[int, int]:
    """Of both exports, as a client that connects now is told."""
    found = []
    for uri in (primary_uri(pair), guest_uri(pair)):
        with NbdClient(uri) as client:
            found.append(client.size)
        if shutil.which("nbdinfo"):
            assert nbdinfo(uri)["export-size"] == found[-1]
    return found[0], found[1]


def compared(pair: Pair) -> None:
    """What was added is in line, and both disks are equal."""
    pair.wait_protected()
    pair.wait_for(lambda now: not now["resync"]["active"], "compared where it has grown", 30)
    pair.checkpoint()
    compare_disks(pair)


@contextlib.contextmanager
def held(pair: Pair) -> Iterator[None]:
    """A reader holds a block: the secondary cannot grow as long as that lasts."""
    with attach(str(pair.directory.path)) as reader:
        request = reader.volumes["disk0"].cow_request_begin(0, 4096, shared=True)
        yield
        request.end()


@contextlib.contextmanager
def resizing(pair: Pair, **args: Any) -> Iterator[list[Any]]:
    """The command in a thread; on leaving its result, or error, is the one element of the list."""
    told: list[Any] = []

    def run() -> None:
        try:
            told.append(pair.resize(**args))
        except TandemDiskError as error:
            told.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield told
    thread.join(60)
    assert told, "the command hangs"


def ended(pair: Pair, role: Role) -> None:
    pair.wait_for(lambda now: now[role]["pid"] is None, f"without its {role}", 20)


def asked(pair: Pair) -> None:
    """Until the secondary is at work on the resize."""
    def busy() -> bool:
        counters = pair.status()["counters"]
        return bool(counters["primary"]["sequence"] > counters["secondary"]["applied"])

    wait_until(busy, 20, "RESIZE on its way")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["checkpoint", pytest.param("latest", marks=pytest.mark.soak)])
def test_grows_under_load_and_fails_over_with_every_byte(short_dir: Path, target: str) -> None:
    with running(short_dir / "p", PairOptions(size=OLD, overrides=QUICK)) as pair:
        with (
            NbdClient(primary_uri(pair)) as early,
            attach(str(pair.directory.path)) as reader,
            Load(primary_uri(pair), seed=4) as load,
        ):
            load.wait_for(200)
            told = tandemdisk("resize", "--dir", pair.directory.path, "--size", str(NEW), "--json")
            assert told.returncode == 0, told.stderr
            assert json.loads(told.stdout)["volumes"] == [{"name": "disk0", "size": NEW, "before": OLD}]
            assert sizes(pair) == (NEW, NEW)
            put(primary_uri(pair), NEW - MIB, random_bytes(1, MIB))
            put(primary_uri(pair), OLD - 700, random_bytes(2, 1400))
            load.wait_for(load.answered + 200)
            with pytest.raises(NbdClientError):
                early.write(OLD, b"beyond what it was told")
            assert early.size == OLD
            view = reader.volumes["disk0"]
            assert (view.size, len(view.read(OLD - MIB, MIB))) == (OLD, MIB)
        model = bytearray(load.model(size=OLD) + bytes(NEW - OLD))
        model[NEW - MIB :] = random_bytes(1, MIB)
        compared(pair)
        found = contents(primary_uri(pair))
        assert found[OLD:] == random_bytes(2, 1400)[700:] + model[OLD + 700 :]
        if target == "checkpoint":
            put(primary_uri(pair), OLD + MIB, random_bytes(3, MIB))  # not in the checkpoint
        kill_primary(pair)
        pair.failover(target)
        assert contents(guest_uri(pair)) == found
        put(guest_uri(pair), NEW - 2 * MIB, random_bytes(5, MIB))
        pair.rejoin()
        compared(pair)
        assert sizes(pair) == (NEW, NEW)
        pair.resize(size=NEW + 4096)  # the promoted side leads now
        assert sizes(pair) == (NEW + 4096, NEW + 4096)
        put(guest_uri(pair), NEW, b"z" * 4096)
        compared(pair)
        pair.down()
        pair.up()
        compared(pair)
        assert sizes(pair) == (NEW + 4096, NEW + 4096)


def test_the_checkpoint_before_it_stays(short_dir: Path) -> None:
    """Without a later one: its bytes in the old range; what was added is what the disk held when it was."""
    with running(short_dir / "p", PairOptions(size=OLD, overrides=QUICK)) as pair:
        put(primary_uri(pair), 0, random_bytes(1, 2 * MIB))
        put(primary_uri(pair), OLD - 5000, random_bytes(2, 5000))
        pair.checkpoint()
        exact = contents(guest_uri(pair))
        pair.resize(size=NEW)
        assert contents(guest_uri(pair)) == exact + bytes(NEW - OLD)
        put(primary_uri(pair), 0, random_bytes(3, MIB))
        put(primary_uri(pair), OLD - 5000, random_bytes(4, MIB))
        kill_primary(pair)
        pair.failover("checkpoint")
        assert contents(guest_uri(pair)) == exact + bytes(NEW - OLD)


def test_what_differs_in_the_added_range_is_sent_and_holes_stay_holes(short_dir: Path) -> None:
    disks = [short_dir / "one.raw", short_dir / "other.raw"]
    for disk in disks:
        disk.write_bytes(b"")
        os.truncate(disk, 24 * MIB + 512)
    options = PairOptions(primary_disks=(disks[0],), secondary_disks=(disks[1],), assume_synced=True, overrides=QUICK)
    with running(short_dir / "p", options) as pair:
        put(primary_uri(pair), 0, random_bytes(1, MIB))
        put(primary_uri(pair), 24 * MIB, b"x" * 512)
        for number, disk in enumerate(disks):
            with disk.open("r+b") as file:
                for offset in (24 * MIB + 512, (30 + number) * MIB):
                    file.seek(offset)
                    file.write(random_bytes(10 + number, MIB))
                file.truncate((200 + number) * MIB + 77)
        told = pair.resize()
        assert told["volumes"] == [{"name": "disk0", "size": 200 * MIB, "before": 24 * MIB + 512}]
        pair.wait_for(lambda now: not now["resync"]["active"], "compared where it has grown", 30)
        pair.checkpoint()
        first, second = (disk.read_bytes()[: 200 * MIB] for disk in disks)
        assert first == second
        assert first[24 * MIB + 512 :][:MIB] == random_bytes(10, MIB), "the primary's is what counts"
        assert os.stat(disks[1]).st_blocks * 512 < 8 * MIB
        assert pair.status()["counters"]["primary"]["resync_moved_bytes"] <= 4 * MIB
        assert pair.verify()["differing"] == 0


def test_what_cannot_be_is_refused_and_changes_nothing(short_dir: Path) -> None:
    with running(short_dir / "p", PairOptions(size=OLD, overrides=QUICK)) as pair:
        told = tandemdisk("resize", "--dir", pair.directory.path, "--size", str(OLD - 4096))
        assert told.returncode == 1
        assert f"Volume disk0 has {OLD} bytes: it cannot shrink to {OLD - 4096}." in told.stderr
        with pytest.raises(OperationFailed, match=f"nothing to grow to: side a's disk of volume disk0 has {OLD} bytes"):
            pair.resize()
        os.truncate(primary_disk(pair), NEW)
        with pytest.raises(OperationFailed, match=f"Side b's disk of volume disk0 has {OLD} bytes, and {NEW} are"):
            pair.resize()
        client = pair.client("primary")
        with pytest.raises(OperationFailed, match=f"Side b's disk of volume disk0 has {OLD} bytes"):
            client.call("resize", size=NEW)
        with pytest.raises(OperationFailed, match=f"Side a's disk of volume disk0 has {NEW} bytes, and {2 * NEW} are"):
            client.call("resize", size=2 * NEW)
        with pytest.raises(OperationFailed, match="no volume disk7"):
            pair.resize("disk7", NEW)
        assert sizes(pair) == (OLD, OLD)
        assert pair.resize("disk0", OLD)["volumes"][0]["size"] == OLD
        os.truncate(secondary_disk(pair), NEW + 5)
        assert pair.resize()["volumes"][0]["size"] == NEW
        kill(pair.status()["secondary"]["pid"])
        wait_until(lambda: client.call("status")["state"] != "protected", 20, "noticing it")
        with pytest.raises(OperationFailed, match=r"only while the pair is protected; this side is (reconnect|alone)"):
            client.call("resize", size=2 * NEW)


def test_the_primary_dies_when_the_secondary_has_grown(short_dir: Path) -> None:
    with running(short_dir / "p", PairOptions(size=OLD, overrides=QUICK)) as pair:
        put(primary_uri(pair), 0, random_bytes(1, MIB))
        with held(pair), resizing(pair, size=NEW) as told:
            asked(pair)
            kill_primary(pair)
        assert isinstance(told[0], TandemDiskError)
        pair.wait_for(lambda now: now["secondary"]["volumes"][0]["size"] == NEW, "grown on one side")
        os.truncate(primary_disk(pair), OLD)
        with pytest.raises(PeerRefused, match=f"disk0 has {OLD} bytes on the primary and {NEW} bytes on"):
            pair.up()
        os.truncate(primary_disk(pair), NEW)
        pair.up()
        compared(pair)
        pair.wait_for(lambda now: now["primary"]["volumes"][0]["size"] == NEW, "grown on both sides")
        assert sizes(pair) == (NEW, NEW)
        put(primary_uri(pair), NEW - MIB, random_bytes(2, MIB))
        compared(pair)


@pytest.mark.soak
def test_the_primary_dies_and_the_larger_side_takes_over(short_dir: Path) -> None:
    with running(short_dir / "p", PairOptions(size=OLD, overrides=QUICK)) as pair:
        put(primary_uri(pair), 0, random_bytes(1, MIB))
        with held(pair), resizing(pair, size=NEW):
            asked(pair)
            kill_primary(pair)
        pair.wait_for(lambda now: now["secondary"]["volumes"][0]["size"] == NEW, "grown on one side")
        pair.failover("latest")
        put(guest_uri(pair), NEW - MIB, random_bytes(2, MIB))
        os.truncate(primary_disk(pair), OLD)
        pair.rejoin()
        told = pair.wait_for(lambda now: now["secondary"]["state"] == "refused", "refused", 20)
        assert f"disk0 has {NEW} bytes on the primary and {OLD} bytes on the secondary" in told["secondary"]["reason"]
        assert f"Side a's disk of volume disk0 has {OLD} bytes" in told["secondary"]["reason"]
        os.truncate(primary_disk(pair), NEW)
        pair.client("secondary").call("redial")
        compared(pair)
        assert sizes(pair) == (NEW, NEW)


@pytest.mark.soak
def test_a_verification_goes_on_over_what_it_began_with(short_dir: Path) -> None:
    with running(short_dir / "p", PairOptions(size=OLD, overrides={**QUICK, "resync_rate": 16 * MIB})) as pair:
        put(primary_uri(pair), 0, random_bytes(1, 24 * MIB))
        found: list[Any] = []
        verifying = threading.Thread(target=lambda: found.append(pair.verify()))
        verifying.start()
        pair.wait_for(lambda now: now["verify"]["active"], "verifying")
        pair.resize(size=NEW)
        put(primary_uri(pair), NEW - MIB, random_bytes(2, MIB))
        verifying.join(60)
        assert (found[0]["differing"], pair.verify()["differing"]) == (0, 0)
        compared(pair)


@pytest.mark.soak
def test_the_secondary_dies_in_the_middle(short_dir: Path) -> None:
    with running(short_dir / "p", PairOptions(size=OLD, overrides=QUICK)) as pair:
        put(primary_uri(pair), 0, random_bytes(1, MIB))
        with resizing(pair, size=NEW) as told:
            with held(pair):
                asked(pair)
                kill(pair.status()["secondary"]["pid"])
                pair.wait_for(lambda now: now["secondary"]["pid"] is None, "without its secondary", 20)
            pair.up()
        pair.wait_protected()
        if isinstance(told[0], TandemDiskError):  # it was away for too long
            assert sizes(pair) == (OLD, OLD)
            pair.resize(size=NEW)
        assert sizes(pair) == (NEW, NEW)
        put(primary_uri(pair), NEW - MIB, random_bytes(2, MIB))
        compared(pair)


def test_the_secondary_died_between_its_metadata_and_its_memory(short_dir: Path) -> None:
    with running(short_dir / "p", PairOptions(size=OLD, overrides=QUICK)) as pair:
        put(primary_uri(pair), 0, random_bytes(1, MIB))
        pair.checkpoint()
        put(primary_uri(pair), OLD - MIB, random_bytes(2, MIB))
        kill(pair.status()["secondary"]["pid"])
        pair.wait_for(lambda now: now["secondary"]["pid"] is None, "without its secondary", 20)
        for disk in (primary_disk(pair), secondary_disk(pair)):
            os.truncate(disk, NEW)
        path = f"{pair.settings('secondary').directory}/metadata"
        stored = load(path)
        assert stored is not None
        save(path, replace(stored, volumes=(("disk0", NEW),)))
        pair.up()
        compared(pair)
        wait_until(lambda: sizes(pair) == (NEW, NEW), 20, "the primary following")
        compared(pair)


def test_block_devices_grow_and_the_other_volume_stays(short_dir: Path) -> None:
    """Of two volumes one is on devices whose new ends differ, as LVM hands them out."""
    for name in ("one", "other", "plain", "simple"):
        with (short_dir / name).open("wb") as file:
            file.truncate(24 * MIB)
    with loop_device(short_dir / "one") as one, loop_device(short_dir / "other") as other:
        options = PairOptions(
            primary_disks=(one.device, short_dir / "plain"), secondary_disks=(other.device, short_dir / "simple"),
            assume_synced=True, overrides=QUICK,
        )  # fmt: skip
        with running(short_dir / "p", options) as pair:
            for number, loop in enumerate((one, other)):
                with loop.file.open("r+b") as file:
                    file.seek(25 * MIB)
                    file.write(random_bytes(number, MIB))
                    file.truncate((30 + number) * MIB)
                run("losetup", "--set-capacity", loop.device)
            told = pair.resize("disk0")
            assert [volume["size"] for volume in told["volumes"]] == [30 * MIB, 24 * MIB]
            put(primary_uri(pair), 30 * MIB - 4096, b"x" * 4096)
            pair.wait_for(lambda now: not now["resync"]["active"], "compared where it has grown", 30)
            pair.checkpoint()
            kill_primary(pair)
            pair.failover("checkpoint")
            expected = bytes(25 * MIB) + random_bytes(0, MIB) + bytes(4 * MIB - 4096) + b"x" * 4096
            assert contents(guest_uri(pair)) == expected
            assert len(contents(guest_uri(pair, 1))) == 24 * MIB


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_any_moment_of_a_resize_end_with_one_size_and_equal_disks(short_dir: Path, seed: int) -> None:
    """A guest writes meanwhile; either side is killed from before the command until after its answer."""
    chance = random.Random(seed)
    size = OLD
    with running(short_dir / "p", PairOptions(size=OLD, overrides=QUICK)) as pair:
        for turn in range(6):
            size += chance.choice((4096, 512 * 1024, 5 * MIB))
            victim: Role = chance.choice(("primary", "secondary"))
            pid = pair.status()[victim]["pid"]
            with Load(primary_uri(pair), seed=turn) as load:
                load.wait_for(50)
                with resizing(pair, size=size):
                    threading.Event().wait(chance.uniform(0, 0.03))
                    kill(pid)
                ended(pair, victim)
                pair.up()
            compared(pair)
            if sizes(pair) != (size, size):
                pair.resize(size=size)
            put(primary_uri(pair), size - 4096, chance.randbytes(4096))
            compared(pair)
            assert sizes(pair) == (size, size)
