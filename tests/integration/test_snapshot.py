"""Reading the last checkpoint beside the export: ``tandemdisk snapshot``, the example, a process of one's own."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from common.child import python_environment
from common.nbd_client import NbdClient
from deploy.cli import main
from deploy.pair import Pair, PairOptions
from secondary.attach import attach
from secondary.requests import HOLD
from tests import pairs
from tests.conftest import wait_until
from tests.pairs import MIB, TANDEMDISK, Load, tandemdisk
from tests.tools import mounted_tmpfs

SIZE = 16 * MIB
OPTIONS = PairOptions(size=SIZE, mode="sync", buffer_bytes=2 * SIZE)


@pytest.fixture
def pair(short_dir: Path) -> Iterator[Pair]:
    """Protected; its checkpoint is ``base()``, the secondary disk and the guest's view are something else."""
    with pairs.running(short_dir / "p", OPTIONS) as made:
        with NbdClient(pairs.primary_uri(made)) as client, NbdClient(pairs.guest_uri(made)) as guest:
            pairs.write_all(client, base())
            made.checkpoint()
            client.write(4 * MIB - 700, b"later" * 4000)
            client.zero(MIB, MIB)
            guest.write(5000, b"of the guest")
        yield made


def base() -> bytes:
    """Random bytes with a hole of 8 MiB."""
    return pairs.random_bytes(1, 4 * MIB) + bytes(8 * MIB) + pairs.random_bytes(2, 4 * MIB)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_snapshot_is_the_last_checkpoint_bit_by_bit_and_sparse(pair: Pair, short_dir: Path) -> None:
    (short_dir / "out").mkdir()
    image = short_dir / "out" / "image.raw"
    where = ("snapshot", "--dir", pair.directory.path, "--output", image)
    done = tandemdisk(*where)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Checkpoint {pair.status()['checkpoint']} in ")
    assert image.read_bytes() == base()
    assert image.stat().st_blocks * 512 <= 9 * MIB
    assert names(short_dir / "out") == ["image.raw"]

    again = tandemdisk(*where)
    assert (again.returncode, again.stderr.splitlines()[0]) == (6, f"Error: {image} exists.")
    assert image.read_bytes() == base()
    number = pair.checkpoint().number
    forced = tandemdisk(*where, "--force", "--json", "--volume", "disk0")
    told = json.loads(forced.stdout)
    assert told["checkpoint"] == number
    assert [volume["bytes"] for volume in told["volumes"]] == [SIZE]
    assert image.read_bytes() == pairs.primary_disk(pair).read_bytes()
    assert names(short_dir / "out") == ["image.raw"]


def test_what_a_snapshot_refuses(pair: Pair, short_dir: Path) -> None:
    def refused(code: int, sentence: str, *arguments: str | Path) -> None:
        done = CliRunner().invoke(main, ["snapshot", *map(str, arguments)])
        assert (done.exit_code, sentence in done.stderr) == (code, True), done.stderr

    directory, image = pair.directory.path, short_dir / "image.raw"
    refused(2, "no volume disk7", "--dir", directory, "--output", image, "--volume", "disk7")
    refused(2, "--output", "--dir", directory)
    refused(3, "is no directory", "--dir", directory, "--output", short_dir / "nowhere" / "image.raw")
    refused(3, "no regular file", "--dir", directory, "--output", "/dev/null", "--force")
    refused(7, "no directory of a pair", "--dir", short_dir / "q", "--output", image)
    refused(7, "no disk buffer", "--dir", short_dir, "--output", image)
    pairs.kill_primary(pair)
    pair.failover("latest", force=True)
    refused(1, "in stage DONE", "--dir", directory, "--output", image)
    pair.down(purge=True)
    refused(7, "no disk buffer", "--dir", directory, "--output", image)
    assert not image.exists()


def test_a_target_that_fills_up(pair: Pair, short_dir: Path) -> None:
    with mounted_tmpfs(short_dir / "small", 4 * MIB) as small:
        done = tandemdisk("snapshot", "--dir", pair.directory.path, "--output", small / "image.raw", "--json")
        assert done.returncode == 3
        error = json.loads(done.stdout)["error"]
        assert "cannot be written: No space left on device" in error["sentence"]
        assert "as much room" in error["hint"]
        assert names(small) == []
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        done = tandemdisk("snapshot", "--dir", pair.directory.path, "--output", small / "image.raw", "--json")
        assert done.returncode == 3
        assert "cannot be created: Read-only file system" in json.loads(done.stdout)["error"]["sentence"]


def test_an_interrupted_snapshot_leaves_nothing(pair: Pair, short_dir: Path) -> None:
    """It is stopped where it waits for a request of ours."""
    (short_dir / "out").mkdir()
    arguments = ("snapshot", "--dir", str(pair.directory.path), "--output", str(short_dir / "out"))
    with attach(str(pair.directory.path)) as view:
        with view.volumes["disk0"].cow_request_begin(SIZE - 1, SIZE):
            process = subprocess.Popen([*TANDEMDISK, *arguments], env=python_environment(), stderr=subprocess.PIPE)
            wait_until(lambda: names(short_dir / "out"), what="a partial image")
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=20)
    assert process.returncode == 1
    assert names(short_dir / "out") == []


def test_it_needs_no_process_of_the_pair(pair: Pair, short_dir: Path) -> None:
    """The buffer outlives a secondary that was killed, and with it the checkpoint."""
    status = pair.status()
    pairs.kill(status["secondary"]["pid"])
    pair.wait_for(lambda now: now["secondary"]["pid"] is None, "without its secondary", 20)
    image = short_dir / "image.raw"
    done = tandemdisk("snapshot", "--dir", pair.settings("secondary").directory, "--output", image)
    assert done.returncode == 0, done.stderr
    assert image.read_bytes() == base()


class Checkpoints:
    """Checkpoints all the time, each with what is known of it: how many writes it holds at least and at most."""

    def __init__(self, pair: Pair, loads: list[Load]) -> None:
        self.known: dict[int, list[tuple[int, int]]] = {}
        self._pair = pair
        self._loads = loads
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def take(self) -> int:
        least = [load.answered for load in self._loads]
        number = self._pair.checkpoint().number
        self.known[number] = list(zip(least, (len(load.writes) for load in self._loads), strict=True))
        return number

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            self.take()

    def __enter__(self) -> Checkpoints:
        self.take()
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._thread.join()


def test_images_of_one_checkpoint_under_load(short_dir: Path) -> None:
    """Both volumes are written, checkpoints come faster than a snapshot is done: each is one of them, exactly."""
    size = 6 * MIB
    options = PairOptions(size=size, volumes=2, buffer_bytes=4 * size)
    out = short_dir / "out"
    out.mkdir()
    with pairs.running(short_dir / "p", options) as pair:
        with Load(pairs.primary_uri(pair, 0), seed=1) as one, Load(pairs.primary_uri(pair, 1), seed=2) as other:
            loads = [one, other]
            one.wait_for(300)
            with Checkpoints(pair, loads) as checkpoints:
                images: list[tuple[int, list[bytes]]] = []
                for _ in range(2):
                    done = tandemdisk("snapshot", "--dir", pair.directory.path, "--output", out, "--json", "--force")
                    assert done.returncode == 0, done.stderr
                    told = json.loads(done.stdout)
                    files = [Path(volume["file"]).read_bytes() for volume in told["volumes"]]
                    images.append((told["checkpoint"], files))
        assert (one.end, other.end) == (None, None)
        assert len(checkpoints.known) > 2
        for number, files in images:
            for load, image, (least, most) in zip(loads, files, checkpoints.known[number], strict=True):
                known = copy.copy(load)
                known.answered, known.writes = least, load.writes[:most]
                known.check(image)


def test_a_checkpoint_waits_for_a_snapshot_without_standing_in_the_way(pair: Pair) -> None:
    """While the end of a snapshot holds it off, the secondary answers, and so does the guest's export."""
    done: list[int] = []
    with attach(str(pair.directory.path)) as view:
        table = next(iter(view.volumes.values())).requests
        before = pair.status()
        hold = table.wait_byte(HOLD, shared=True)
        thread = threading.Thread(target=lambda: done.append(pair.checkpoint().number))
        thread.start()
        during = pair.wait_for(lambda now: waits(now) > waits(before), "at work in the thread")
        assert during["checkpoint"] == before["checkpoint"]
        with NbdClient(pairs.guest_uri(pair)) as guest:
            assert guest.read(4 * MIB - 700, 700) == base()[4 * MIB - 700 : 4 * MIB]
        assert not done
        table.release(hold)
        thread.join(20)
    assert done == [before["checkpoint"] + 1]


def waits(status: dict[str, Any]) -> int:
    return int(status["counters"]["secondary"]["waits"])


def test_the_example_runs(pair: Pair) -> None:
    example = Path(__file__).parents[2] / "deploy" / "examples" / "attach.py"
    command = [sys.executable, "-P", str(example), str(pair.directory.path)]
    process = subprocess.Popen(
        [*command, "--follow", "1"], env=python_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    first = [process.stdout.readline() for _ in range(2)]
    assert first[0] == f"checkpoint {pair.status()['checkpoint']}\n"
    assert f"{base()[:8].hex()} … {base()[-8:].hex()}" in first[1]
    number = pair.checkpoint().number
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert out == f"checkpoint {number}  disk0: 3 MiB\n"
    nowhere = subprocess.run(
        [*command[:-1], os.devnull], env=python_environment(), capture_output=True, text=True, check=False
    )
    assert (nowhere.returncode, nowhere.stderr) == (7, "There is no disk buffer in /dev/null. Is the secondary up?\n")
