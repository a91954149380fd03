"""Verification of running pairs: nothing is found where nothing is, one flipped byte is found, named and repaired."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.nbd_client import NbdClient
from common.settings import Mode
from deploy.bench import workloads
from deploy.bench.engines import Fio, Stream, choose_engine, fio_options
from deploy.bench.servers import die_with_parent
from deploy.layout import PairOptions
from deploy.pair import Pair
from tests.pairs import (
    MIB,
    Load,
    compare_disks,
    primary_uri,
    random_bytes,
    running,
    secondary_disk,
    tandemdisk,
    write_all,
)

BLOCK = 4096


def flip(path: Path, offset: int) -> None:
    """Change one byte behind everybody's back."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 0xFF]), offset)
    finally:
        os.close(fd)


def filled(pair: Pair, size: int = 8 * MIB, seed: int = 7) -> None:
    with NbdClient(primary_uri(pair)) as client:
        write_all(client, random_bytes(seed, size))
        client.flush()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_difference_behind_a_hole_is_found(shm_dir: Path, mode: Mode) -> None:
    """Its piece begins with a hole: the verification asked about that hole for ever (chaos, seeds 112 and 122)."""
    with running(shm_dir / "p", PairOptions(size=16 * MIB, mode=mode)) as pair:
        with NbdClient(primary_uri(pair)) as client:
            client.write(2 * BLOCK, random_bytes(1, BLOCK))
            client.flush()
        pair.checkpoint()
        flip(secondary_disk(pair), 2 * BLOCK + 5)
        found = pair.client("primary", 20).call("verify", repair=True)
        assert found["extents"] == [["disk0", 2 * BLOCK, BLOCK]]
        pair.checkpoint()
        compare_disks(pair)


def test_no_difference_is_found_under_load(shm_dir: Path) -> None:
    with running(shm_dir / "p", PairOptions(size=64 * MIB)) as pair:
        filled(pair)
        with Load(primary_uri(pair), seed=3) as load:
            load.wait_for(50)
            for _ in range(3):
                found = pair.verify()
                assert found["differing"] == 0, found
                assert found["compared_bytes"] == 64 * MIB
            assert not load.end
        assert not load.errors


FIO_SPAN = 32 * MIB
"""What fio reads and writes, from offset 0 on."""
HUNG_S = 60


@contextlib.contextmanager
def fio_at_work(uri: str, directory: Path, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """fio reads and writes at random as long as the context lasts (and no longer than ``seconds``); at its end fio
    has to say that it did, and that nothing failed."""
    if shutil.which("fio") is None or not isinstance(choose_engine(), Fio):
        pytest.skip("fio with its nbd engine is not installed")
    load = workloads.Load("random", 50, BLOCK, 16)
    output = directory / "fio.json"
    command = ["fio", f"--output={output}", "--output-format=json"]
    command += fio_options("load", Stream(load, uri, FIO_SPAN, seconds))
    with subprocess.Popen(command, cwd=directory, preexec_fn=die_with_parent, stdout=subprocess.DEVNULL) as fio:
        try:
            yield fio
            assert fio.poll() is None, "fio ended before it was told to"
        finally:
            fio.send_signal(signal.SIGINT)
            fio.wait(HUNG_S)
    text = output.read_text()
    (job,) = json.loads(text[text.index("{") :])["jobs"]  # it says first that it was interrupted
    assert job["error"] == 0, job
    assert job["mixed"]["total_ios"] > 0


@pytest.mark.parametrize(
    "seconds", [4, pytest.param(60, marks=[pytest.mark.soak, pytest.mark.timeout(60 + 3 * HUNG_S)])]
)
def test_under_fio_no_difference_is_found_and_then_the_one_that_there_is(shm_dir: Path, seconds: int) -> None:
    """Pass after pass beside fio's random reads and writes: no false positive. Then a byte flips, and is found."""
    aside = 40 * MIB
    with running(shm_dir / "p", PairOptions(size=64 * MIB)) as pair:
        filled(pair)
        with NbdClient(primary_uri(pair)) as client:
            client.write(aside, random_bytes(8, MIB))
        with fio_at_work(primary_uri(pair), shm_dir, seconds + HUNG_S):
            until, passes = time.monotonic() + seconds, 0
            while passes < 5 or time.monotonic() < until:
                sent = pair.status()["counters"]["primary"]["sequence"]
                found = pair.verify()
                assert found["differing"] == 0, f"false positive in pass {passes}: {found}"
                assert found["compared_bytes"] == 64 * MIB
                assert pair.status()["counters"]["primary"]["sequence"] > sent, "fio wrote meanwhile"
                passes += 1
            flip(secondary_disk(pair), aside + 5 * BLOCK + 17)
            found = pair.verify()
            assert found["extents"] == [["disk0", aside + 5 * BLOCK, BLOCK]]
            assert pair.verify(repair=True)["repaired"]
            assert pair.verify()["differing"] == 0
        counters = pair.status()["counters"]["primary"]
        assert counters["repaired_bytes"] == BLOCK
        pair.checkpoint()
        compare_disks(pair)


def test_a_flipped_byte_is_found_named_and_repaired_by_verify_or_a_full_resync(shm_dir: Path) -> None:
    with running(shm_dir / "p", PairOptions(size=64 * MIB)) as pair:
        filled(pair)
        flip(secondary_disk(pair), 3 * MIB + 5000)
        flip(secondary_disk(pair), 40 * MIB)  # in a hole
        with Load(primary_uri(pair), seed=4, span=(16 * MIB, 32 * MIB)) as load:
            load.wait_for(20)
            named = tandemdisk("verify", "--dir", pair.directory.path, "--json")
            assert named.returncode == 11, named.stderr
            found = json.loads(named.stdout)
            assert found["extents"] == [["disk0", 3 * MIB + BLOCK, BLOCK], ["disk0", 40 * MIB, BLOCK]]
            assert not found["repaired"]
            assert pair.status()["primary"]["volumes"][0]["dirty_bytes"] == 2 * BLOCK
            again = tandemdisk("verify", "--dir", pair.directory.path, "--repair")
            assert again.returncode == 11
            assert "repaired" in again.stdout
            clean = tandemdisk("verify", "--dir", pair.directory.path)
            assert clean.returncode == 0, clean.stdout
            flip(secondary_disk(pair), 5 * MIB)
            sent = tandemdisk("resync", "--full", "--dir", pair.directory.path, "--json")
            assert sent.returncode == 0, sent.stderr
            told = json.loads(sent.stdout)
            assert told["asked_bytes"] >= 64 * MIB
            assert BLOCK <= told["moved_bytes"] <= 64 * 1024, "one question's worth"
        pair.checkpoint()
        compare_disks(pair)
        counters = pair.status()["counters"]["primary"]
        assert counters["repaired_bytes"] == BLOCK, "the hole travels as one"
