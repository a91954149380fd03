"""Attaching from another process, and snapshots of one checkpoint while checkpoints go on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import secondary
from common.errors import DiskError, NotRunning, OperationFailed, TimedOut
from secondary import attach as attach_module
from secondary import header as h
from secondary.attach import BUFFER_LINK, attach
from secondary.buffer import DiskBuffer, Layer
from secondary.commit import failover_checkpoint
from secondary.header import Stage
from tests.conftest import wait_until
from tests.heart import Rig, pattern, rig

BLOCK = 4096
SIZES = (5 << 20, (1 << 20) + 700)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path / "rig", SIZES) as made:
        yield made


def test_a_buffer_is_found_by_its_own_its_side_s_and_its_pair_s_directory(pair: Rig, tmp_path: Path) -> None:
    buffer = pair.settings.directory
    side = tmp_path / "pair" / "b"
    side.mkdir(parents=True)
    (side / BUFFER_LINK).symlink_to(buffer)
    for directory in (buffer, str(side), str(tmp_path / "pair")):
        with attach(directory) as view:
            assert list(view.volumes) == ["disk0", "disk1"]
    with pytest.raises(NotRunning, match="no disk buffer in"):
        attach(str(tmp_path))


def test_the_checkpoint_without_the_guest_s_writes_or_with_them(pair: Rig) -> None:
    pair.stream(100, pattern(9000, 1))
    pair.checkpoint()
    checkpoint = bytes(pair.oracle.disk)
    pair.stream(5000, pattern(9000, 2))
    pair.guest_write(7000, pattern(9000, 3))
    with attach(pair.settings.directory) as view, attach(pair.settings.directory, overlay=True) as overlaid:
        volume = view.volumes["disk0"]
        assert volume.read(0, SIZES[0]) == checkpoint
        assert volume.read(4096, 4096) == checkpoint[4096:8192]
        assert overlaid.volumes["disk0"].read(0, 30_000) == pair.oracle.view[:30_000]
        assert view.checkpoint.number == 1
        for offset, length in [(-1, 5), (0, SIZES[0] + 1), (5, -1)]:
            with pytest.raises(ValueError):
                volume.read(offset, length)
        request = volume.cow_request_begin(0, 1, shared=True)
        volume.cow_request_end(request)
        volume.wait_for_overlapping_requests(0, SIZES[0])


def test_another_process_reads_through_the_interface(pair: Rig) -> None:
    pair.stream(0, pattern(50_000, 1))
    code = (
        "import sys\n"
        "from secondary.attach import attach\n"
        "with attach(sys.argv[1]) as pair:\n"
        "    sys.stdout.buffer.write(pair.volumes['disk0'].read(0, 60000))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, pair.settings.directory], capture_output=True, check=True)
    assert ran.stdout == pair.oracle.view[:60_000]


def test_there_is_nothing_to_show_without_a_checkpoint_or_after_promotion(pair: Rig, tmp_path: Path) -> None:
    target = {"disk0": str(tmp_path / "image")}
    with attach(pair.settings.directory) as view:
        pair.pair.begin_sync()
        with pytest.raises(OSError):
            view.volumes["disk0"].read(0, 1)
        with pytest.raises(OperationFailed, match="being synchronised"):
            view.snapshot(target)
        pair.checkpoint()
        failover_checkpoint(pair.pair)
        with pytest.raises(OSError):
            view.volumes["disk0"].read(0, 1)
        with pytest.raises(OperationFailed, match="stage FAILOVER"):
            view.snapshot(target)
    assert not os.path.exists(target["disk0"])


def test_a_snapshot_is_exact_and_sparse(pair: Rig, tmp_path: Path) -> None:
    pair.disks[0].zero(1 << 20, 3 << 20)
    pair.oracle.stream(1 << 20, bytes(3 << 20))
    pair.checkpoint()
    images = [bytes(oracle.disk) for oracle in pair.oracles]
    pair.stream(2 << 20, pattern(100_000, 1))
    pair.stream(5, pattern(100_000, 2), 1)
    pair.guest_write(10, b"not in the checkpoint")
    seen: list[tuple[int, int]] = []
    targets = {"disk0": str(tmp_path / "0.raw"), "disk1": str(tmp_path / "1.raw")}
    with attach(pair.settings.directory) as view:
        checkpoint = view.snapshot(targets, progress=lambda done, total: seen.append((done, total)))
        assert checkpoint.number == 1
        with pytest.raises(DiskError, match="exists"):
            view.snapshot({"disk1": str(tmp_path / "2.raw"), "disk0": targets["disk0"]})
        assert not (tmp_path / "2.raw").exists()
        with pytest.raises(OperationFailed, match="no volume disk7"):
            view.snapshot({"disk7": str(tmp_path / "7.raw")})
        with pytest.raises(DiskError, match="cannot be created"):
            view.snapshot({"disk0": str(tmp_path / "nowhere" / "7.raw")})
    for image, target in zip(images, targets.values(), strict=True):
        assert Path(target).read_bytes() == image
    assert os.stat(targets["disk0"]).st_blocks * 512 <= 2 << 20
    assert seen[-1] == (sum(SIZES), sum(SIZES))


class Busy:
    """A stream with checkpoints, which remembers every checkpoint's images."""

    def __init__(self, pair: Rig, *, step: int) -> None:
        self.pair = pair
        self.images: dict[int, list[bytes]] = {0: [bytes(oracle.view) for oracle in pair.oracles]}
        self._random = random.Random(step)
        self._step = step
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def step(self) -> None:
        """A few writes, then a checkpoint."""
        for _ in range(self._step):
            volume = self._random.randrange(2)
            offset, length = self._random.randrange(SIZES[volume] - 20_000), self._random.randrange(1, 20_000)
            self.pair.stream(offset, pattern(length, self._random.randrange(1 << 30)), volume)
        # Known before it can be seen.
        self.images[self.pair.number + 1] = [bytes(oracle.disk) for oracle in self.pair.oracles]
        self.pair.checkpoint()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.step()

    def __enter__(self) -> Busy:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(30)


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_a_snapshot_is_of_one_checkpoint_of_all_volumes_while_checkpoints_go_on(
    pair: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    monkeypatch.setattr(attach_module, "ROUNDS", rounds)
    monkeypatch.setattr(attach_module, "CHUNK", 64 * 1024)
    with attach(pair.settings.directory) as view, Busy(pair, step=3) as busy:
        for number in range(4):
            targets = {f"disk{index}": str(tmp_path / f"{number}-{index}.raw") for index in range(2)}
            checkpoint = view.snapshot(targets)
            for index, target in enumerate(targets.values()):
                assert Path(target).read_bytes() == busy.images[checkpoint.number][index]


def test_a_snapshot_rolls_forward_over_checkpoints_made_in_the_middle(
    pair: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without threads: a checkpoint at each of the first chunks; nothing is left to chance."""
    monkeypatch.setattr(attach_module, "CHUNK", 256 * 1024)
    busy = Busy(pair, step=2)
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls < 40:
            busy.step()

    with attach(pair.settings.directory) as view:
        targets = {f"disk{index}": str(tmp_path / f"{index}.raw") for index in range(2)}
        checkpoint = view.snapshot(targets, progress=progress)
    assert checkpoint.number == 39
    for index, target in enumerate(targets.values()):
        assert Path(target).read_bytes() == busy.images[39][index]


def test_the_last_round_holds_checkpoints_off_and_a_failover_does_not_mind(
    pair: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach_module, "ROUNDS", 0)
    held_off = 0

    def progress(done: int, total: int) -> None:
        nonlocal held_off
        if total == SIZES[0]:
            pair.stream(done % 1000, pattern(5000, done))
            pair.checkpoint()
            return
        with pytest.raises(BlockingIOError):
            pair.pair.do_checkpoint_nowait(99, 99)
        with pytest.raises(TimedOut, match=str(os.getpid())):
            pair.pair.do_checkpoint(99, 99, timeout_s=0.02)
        held_off += 1

    with attach(pair.settings.directory) as view:
        view.snapshot({"disk0": str(tmp_path / "0.raw")}, progress=progress)
        assert held_off
        assert (tmp_path / "0.raw").read_bytes() == pair.oracle.disk

        def promote(done: int, total: int) -> None:
            failover_checkpoint(pair.pair, timeout_s=0.1)

        with pytest.raises(OperationFailed, match="stage FAILOVER"):
            view.snapshot({"disk0": str(tmp_path / "1.raw")}, progress=promote)
    assert not (tmp_path / "1.raw").exists()


@pytest.mark.parametrize("event", ["sync", "wrap"])
def test_a_snapshot_begins_anew_when_its_ground_is_gone(pair: Rig, tmp_path: Path, event: str) -> None:
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls != 2:
            return
        if event == "sync":
            pair.pair.begin_sync()
            pair.disks[0].write(100, b"by the synchronisation")
            pair.oracle.stream(100, b"by the synchronisation")
        else:
            pair.buffer.header.store_state(Stage.RUNNING, h.LAST_EPOCH - 1, syncing=False)
        pair.checkpoint()

    pair.buffer.header.store_state(Stage.RUNNING, 5, syncing=False)
    with attach(pair.settings.directory) as view:
        view.snapshot({"disk0": str(tmp_path / "0.raw")}, progress=progress)
    assert (tmp_path / "0.raw").read_bytes() == pair.oracle.disk
    assert calls > 6


def test_a_snapshot_does_not_believe_maps_that_are_being_cleared(
    pair: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the last epoch the secondary clears them, and may be killed as it does."""

    class Killed(BaseException):
        pass

    def killed(layer: Layer) -> None:
        if layer is pair.buffer.volumes[-1].active:
            raise Killed
        clear(layer)

    def progress(done: int, total: int) -> None:
        if done == SIZES[0] and pair.buffer.header.epoch != h.LAST_EPOCH:
            pair.stream(0, pattern(BLOCK, 3))
            pair.buffer.header.store_state(Stage.RUNNING, h.LAST_EPOCH - 1, syncing=False)
            with monkeypatch.context() as patch:
                patch.setattr(Layer, "clear", killed)
                with pytest.raises(Killed):
                    pair.checkpoint()

    clear = Layer.clear
    with attach(pair.settings.directory) as view:
        with contextlib.suppress(OperationFailed):
            view.snapshot({"disk0": str(tmp_path / "0.raw")}, progress=progress)
            assert (tmp_path / "0.raw").read_bytes() == Path(pair.paths[0]).read_bytes()
        pair.pair.finish_wrap()
        view.snapshot({"disk0": str(tmp_path / "1.raw")})
        assert (tmp_path / "1.raw").read_bytes() == Path(pair.paths[0]).read_bytes()


def test_a_buffer_that_is_removed_shows_nothing_any_more(pair: Rig, tmp_path: Path) -> None:
    """Its successor's backup job does not know of those who are attached to it: the disk would change under them."""
    directory = pair.settings.directory
    pair.guest_write(0, b"the guest's")
    pair.stream(BLOCK, pattern(BLOCK, 5))
    with attach(directory) as bare, attach(directory, overlay=True) as overlaid:
        views = [view.volumes["disk0"] for view in (bare, overlaid)]
        for view in views:
            view.read(0, 2 * BLOCK)
        pair.buffer.close()
        reading = views[0].cow_request_begin(0, 1, shared=True)
        remover = threading.Thread(target=DiskBuffer.remove, args=(directory,))
        remover.start()
        wait_until(lambda: any(thread.name.startswith("cow wait") for thread in threading.enumerate()), 5)
        assert views[0].read_inside(reading, 0, 1) == pair.oracle.disk[:1]  # it waits for who reads
        reading.end()
        remover.join(10)
        for view in views:
            with pytest.raises(OSError, match="no checkpoint"):
                view.read(0, 2 * BLOCK)
        with pytest.raises(OperationFailed, match="stage NONE"):
            bare.snapshot({"disk0": str(tmp_path / "0.raw")})
    pair.buffer = DiskBuffer.create(pair.settings, pair.volumes, pair_id="rig")


def test_several_reads_in_one_request_are_of_one_checkpoint(pair: Rig) -> None:
    """What QEMU's example does, with a checkpoint that comes in between: it has to wait."""
    pair.stream(0, pattern(20_000, 1))
    pair.checkpoint()
    pair.stream(0, pattern(20_000, 2))
    pair.guest_write(0, b"of the guest")
    before = bytes(pair.oracles[0].disk)
    with attach(pair.settings.directory) as view:
        volume = view.volumes["disk0"]
        volume.wait_for_overlapping_requests(0, 20_000)
        request = volume.cow_request_begin(0, 20_000, shared=True)
        first = volume.read_inside(request, 0, 5000)
        with pytest.raises(TimedOut):
            pair.pair.do_checkpoint(99, 99, timeout_s=0.1)
        assert first + volume.read_inside(request, 5000, 15_000) == pattern(20_000, 1)
        assert volume.read_inside(request, 20_000, 0) == b""
        volume.cow_request_end(request)
        pair.checkpoint()
        assert volume.read(0, 20_000) == before[:20_000]
        with pytest.raises(ValueError, match="no request in flight covers"):
            volume.read_inside(request, 0, 5000)


def test_a_request_that_does_not_cover_a_read(pair: Rig) -> None:
    with attach(pair.settings.directory) as view:
        volume, other = view.volumes.values()
        with volume.cow_request_begin(BLOCK, 2 * BLOCK, shared=True) as request:
            assert volume.read_inside(request, BLOCK, BLOCK) == pair.oracle.view[BLOCK : 2 * BLOCK]
            wrong = ((volume, BLOCK, BLOCK + 1), (volume, 0, 10), (other, BLOCK, 1), (volume, -1, 1))
            for reader, offset, length in wrong:
                with pytest.raises(ValueError):
                    reader.read_inside(request, offset, length)


def test_requests_on_an_event_loop(pair: Rig) -> None:
    """Nothing blocks the loop: it goes on while a begin waits for the backup job."""

    async def scene() -> None:
        with attach(pair.settings.directory) as view:
            volume, job = view.volumes["disk0"], pair.pair.jobs[0]
            with await job.cow_request_begin_async(0, BLOCK):
                waiting = asyncio.create_task(volume.cow_request_begin_async(0, 2 * BLOCK, shared=True))
                others = [asyncio.create_task(volume.wait_for_overlapping_requests_async(0, 1)), waiting]
                await asyncio.sleep(0)
                with await volume.cow_request_begin_async(8 * BLOCK, 9 * BLOCK, shared=True) as elsewhere:
                    assert volume.read_inside(elsewhere, 8 * BLOCK, 1) == pair.oracle.view[8 * BLOCK : 8 * BLOCK + 1]
                assert not any(task.done() for task in others)
            async with asyncio.timeout(10):
                with await waiting as request:
                    assert volume.read_inside(request, 0, 2 * BLOCK) == pair.oracle.view[: 2 * BLOCK]
                await asyncio.gather(*others)

    asyncio.run(scene())


def test_the_interface_can_be_imported_from_the_package() -> None:
    for name in secondary.__all__:
        assert getattr(secondary, name).__doc__
    for function in ("wait_for_overlapping_requests", "cow_request_begin", "cow_request_end"):
        for offered in (secondary.BackupJob, secondary.VolumeView):
            assert getattr(offered, function)
            assert function == "cow_request_end" or asyncio.iscoroutinefunction(getattr(offered, f"{function}_async"))


@pytest.mark.root
def test_another_user_is_told_so(pair: Rig) -> None:
    os.chmod(pair.settings.directory, 0o700)
    side = Path("/tmp") / f"td-{os.getpid()}"
    side.mkdir(mode=0o755)
    (side / BUFFER_LINK).symlink_to(pair.settings.directory)
    try:
        os.seteuid(65534)
        with pytest.raises(DiskError, match="cannot be opened by this user"):
            attach(str(side))
    finally:
        os.seteuid(0)
        (side / BUFFER_LINK).unlink()
        side.rmdir()
