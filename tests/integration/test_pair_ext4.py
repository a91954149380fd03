"""A file system on a pair whose primary dies by SIGKILL under load: what each failover target promises, bit by bit.

The image is made by mkfs.ext4 from a few thousand files of Python's library and checked by e2fsck and debugfs: nobody
needs root, and none of the judges is ours. The load remembers by itself what it wrote, and what was answered.
"""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.errors import TandemDiskError
from common.nbd_client import NbdClient
from deploy.pair import Pair, PairOptions
from tests import nbd_tools, pairs
from tests.conftest import wait_until
from tests.pairs import MIB, Load

SIZE = 64 * MIB
FILES = 2500
DATA_BYTES = 40 * MIB
OVERWRITTEN = (0, 24 * MIB)
"""Where the load writes: superblock, tables and files, and less than would fill the disk buffer."""


@dataclass(frozen=True)
class FileSystem:
    """An ext4 image, and the SHA-256 of each of its files by name."""

    image: Path
    hashes: dict[str, str]


@pytest.fixture(scope="module")
def filesystem(tmp_path_factory: pytest.TempPathFactory) -> FileSystem:
    nbd_tools.require("mkfs.ext4", "e2fsck", "debugfs")
    directory = tmp_path_factory.mktemp("ext4")
    tree = directory / "tree"
    _copy_library(tree)
    image = directory / "image"
    nbd_tools.run(["mkfs.ext4", "-q", "-F", "-N", "8192", "-d", tree, image, "64M"])
    hashes = _hashes(tree)
    assert len(hashes) > 2000
    return FileSystem(image, hashes)


def _copy_library(tree: Path) -> None:
    """Small files of the standard library, compiled ones too, up to a number and a size."""
    root = Path(sysconfig.get_paths()["stdlib"])
    count = total = 0
    for path in sorted(root.rglob("*.py*")):
        if "site-packages" in path.parts or not path.is_file() or path.stat().st_size > 100_000:
            continue
        total += path.stat().st_size + 2048
        count += 1
        if count > FILES or total > DATA_BYTES:
            return
        target = tree / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _hashes(tree: Path) -> dict[str, str]:
    return {
        str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in tree.rglob("*") if path.is_file() and "lost+found" not in path.parts
    }  # fmt: skip


def check_filesystem(image: Path, expected: FileSystem, directory: Path) -> None:
    """e2fsck finds nothing, and every file that debugfs gets out of it is what went in."""
    nbd_tools.run(["e2fsck", "-f", "-n", image])
    target = directory / "files"
    target.mkdir()
    nbd_tools.run(["debugfs", "-R", f"rdump / {target}", image])
    assert _hashes(target) == expected.hashes
    shutil.rmtree(target)


def pair_with(filesystem: FileSystem, pair: Pair) -> int:
    """Bring the image onto the pair; the number of the checkpoint that has it."""
    pair.up()
    pair.wait_protected()
    nbd_tools.nbdcopy(filesystem.image, pairs.primary_uri(pair))
    return pair.checkpoint().number


class Reader:
    """A client of the guest's export that reads all the time, over one connection, through whatever happens."""

    def __init__(self, uri: str) -> None:
        self.reads = 0
        self.error: TandemDiskError | None = None
        self._client = NbdClient(uri)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reader")

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stopping.set()
        self._thread.join(60)

    def _run(self) -> None:
        with self._client as client:
            try:
                while not self._stopping.is_set():
                    for _ in client.read_many(((offset, 65536) for offset in range(0, 4 * MIB, 65536)), depth=4):
                        self.reads += 1
            except TandemDiskError as error:
                self.error = error


def test_failover_to_the_checkpoint(filesystem: FileSystem, short_dir: Path, tmp_path: Path) -> None:
    options = PairOptions(size=SIZE, mode="sync", buffer_bytes=2 * SIZE)
    with Pair.create(short_dir / "p", options) as pair:
        number = pair_with(filesystem, pair)
        guest = pairs.guest_uri(pair)
        with NbdClient(guest) as client, Reader(guest) as reader:
            with Load(pairs.primary_uri(pair), span=OVERWRITTEN) as load:
                load.wait_for(1500)
                pairs.kill_primary(pair)
                load.join()
            assert load.end is not None
            assert pair.status()["secondary"]["checkpoint"] == number
            done = pair.failover("checkpoint")
            assert (done["to"], done["checkpoint"], done["generation"]) == ("checkpoint", number, 2)
            # the commit may still run: what clients see is the checkpoint from the first instant on
            assert pairs.read_all(client) == filesystem.image.read_bytes()
            pair.wait_for(lambda now: now["state"] == "done", "done with the commit", 30)
            nbd_tools.nbdcopy(guest, tmp_path / "image")
            assert (tmp_path / "image").read_bytes() == filesystem.image.read_bytes()
            check_filesystem(tmp_path / "image", filesystem, tmp_path)
            assert pairs.secondary_disk(pair).read_bytes() == filesystem.image.read_bytes()
            reads = reader.reads
            client.write(5, b"the same connection")
            client.flush()
            assert client.read(5, 19) == b"the same connection"
            wait_until(lambda: reader.reads > reads or reader.error, what="another read")
            assert reader.error is None
        assert pair.status()["buffer"]["bytes"] == 0
        assert pair.status()["secondary"]["role"] == "primary"


def test_a_guest_that_writes_during_the_commit_wins(filesystem: FileSystem, short_dir: Path) -> None:
    """Writes before the failover (active disk), during and after the commit; all of them stay, over the checkpoint."""
    with Pair.create(short_dir / "p", PairOptions(size=SIZE, buffer_bytes=2 * SIZE)) as pair:
        pair_with(filesystem, pair)
        with NbdClient(pairs.primary_uri(pair)) as client:
            pairs.write_all(client, pairs.random_bytes(4, OVERWRITTEN[1]))
        base = filesystem.image.read_bytes()
        with Load(pairs.guest_uri(pair), span=(0, 32 * MIB), depth=8) as load:
            load.wait_for(100)
            pairs.kill_primary(pair)
            pair.failover("checkpoint")
            answered = load.answered
            load.wait_for(answered + 200)
            pair.wait_for(lambda now: now["state"] == "done", "done with the commit", 30)
            load.wait_for(load.answered + 50)
        assert load.end is None
        expected = load.model(base)
        assert pairs.contents(pairs.guest_uri(pair)) == expected
        assert pairs.secondary_disk(pair).read_bytes() == expected


@pytest.mark.slow
def test_failover_to_the_latest(filesystem: FileSystem, short_dir: Path, tmp_path: Path) -> None:
    """Every write that was answered is there, in their order, and nothing behind a write that is not there."""
    options = PairOptions(size=SIZE, mode="sync", buffer_bytes=2 * SIZE)
    with Pair.create(short_dir / "p", options) as pair:
        pair_with(filesystem, pair)
        guest = pairs.guest_uri(pair)
        with NbdClient(guest) as client, Reader(guest) as reader:
            with Load(pairs.primary_uri(pair), span=OVERWRITTEN) as load:
                load.wait_for(1500)
                pairs.kill_primary(pair)
                load.join()
            pair.failover("latest")
            client.write(SIZE - 100, b"writable at once")
            assert client.read(SIZE - 100, 16) == b"writable at once"
            found = bytearray(pairs.read_all(client))
            found[SIZE - 100 : SIZE - 84] = filesystem.image.read_bytes()[SIZE - 100 : SIZE - 84]
            kept = load.check(bytes(found), filesystem.image.read_bytes())
            assert load.answered <= kept <= len(load.writes)
            assert reader.error is None
        assert pair.status()["state"] == "done"
        assert pair.status()["buffer"]["bytes"] == 0
        # a whole disk once more, by another client
        nbd_tools.nbdcopy(filesystem.image, guest)
        nbd_tools.nbdcopy(guest, tmp_path / "image")
        check_filesystem(tmp_path / "image", filesystem, tmp_path)
