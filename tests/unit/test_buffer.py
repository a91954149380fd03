"""The disk buffer as files: planning, allocation, attaching, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import limits
from common.errors import ConfigError, DiskError, NoSpaceError, NotRunning
from common.settings import BufferSettings
from secondary import header as h
from secondary.attach import attach
from secondary.buffer import BufferVolume, DiskBuffer
from secondary.header import Failure, PairHeader, Stage
from secondary.space import plan_slots
from tests.heart import Rig, pattern, rig

MIB = 1 << 20
VOLUMES = [BufferVolume("disk0", 3 * MIB + 100, "/somewhere/disk0.raw")]


def settings(directory: Path, size: int = 64 * MIB, block: int = 4096) -> BufferSettings:
    return BufferSettings(str(directory / "buffer"), size, block)


def test_each_pool_gets_its_least_and_the_rest_by_size() -> None:
    least = -(-limits.MIN_POOL // 4096)
    big, small = plan_slots(256 * MIB, 4096, [1 << 40, 1 << 30])
    assert small[0] >= least
    assert big[0] > 100 * small[0] / 20
    assert 2 * (big[0] + small[0]) * 4096 <= 256 * MIB
    assert big[0] == big[1]


def test_no_volume_gets_more_slots_than_blocks_and_others_get_what_is_left() -> None:
    first, second = plan_slots(400 * MIB, 4096, [MIB + 1, 1 << 30])
    assert first == (257, 257)
    assert second[0] == 400 * MIB // 4096 // 2 - 257
    assert plan_slots(400 * MIB, 4096, [MIB]) == [(256, 256)]


@pytest.mark.parametrize(
    ("size", "block", "volumes", "words"),
    [
        (1 * MIB, 4096, [1 << 30], "too small for 1 volume"),
        (64 * MIB, 4096, [1 << 30, 1 << 30], "at least 75497472 bytes"),
        (64 * MIB, 5000, [1 << 30], "A block of 5000"),
        (64 * MIB, 256, [1 << 30], "A block of 256"),
        (64 * MIB, 2 * MIB, [1 << 30], "A block of 2097152"),
        (64 * MIB, 4096, [], "at least one volume"),
        (64 * MIB, 4096, [0], "none may be empty"),
        (64 * MIB, MIB, [1 << 30, 1 << 48], "A volume of 281474976710656 bytes is not possible: at most"),
    ],
)
def test_what_cannot_work_is_said(size: int, block: int, volumes: list[int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_slots(size, block, volumes)


def test_too_little_memory_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    volumes = [BufferVolume("disk0", 1 << 47)]
    with pytest.raises(NoSpaceError, match=r"needs \d+ bytes in .*buffer, which has \d+ bytes free"):
        DiskBuffer.create(settings(tmp_path, 1 << 46, MIB), volumes, pair_id="p")
    assert not (tmp_path / "buffer").exists()


def test_a_full_file_system_found_out_late_is_the_same_sentence(tmp_path: Path) -> None:
    """A file size limit stands in for a file system that fills up between the look and the allocation."""
    code = (
        "import resource, signal, sys\n"
        "from common.settings import BufferSettings\n"
        "from secondary.buffer import BufferVolume, DiskBuffer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "DiskBuffer.create(BufferSettings(sys.argv[1], 64 << 20), [BufferVolume('v', 32 << 20)], pair_id='p')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "buffer")], capture_output=True, text=True, check=False
    )
    assert "NoSpaceError: The disk buffer needs" in ran.stderr
    assert not (tmp_path / "buffer").exists()


def test_files_are_private_and_fully_allocated(tmp_path: Path) -> None:
    buffer = DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="p")
    for path in (tmp_path / "buffer").iterdir():
        status = path.stat()
        assert status.st_mode & 0o777 == 0o600
        assert status.st_blocks * 512 >= status.st_size
    buffer.close()


def test_attach_finds_everything_again(tmp_path: Path) -> None:
    buffer = DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="pair-1")
    buffer.start(syncing=True, number=5, sequence=50)
    buffer.header.applied_sequence = 77
    buffer.header.stream_id = 1 << 63
    buffer.header.set_error(Failure.BACKUP, "the disk made a noise")
    other = DiskBuffer.attach(
        str(tmp_path / "buffer"), pair_id="pair-1", block_size=4096, volumes=[("disk0", 3 * MIB + 100)]
    )
    header = other.header
    assert (header.stage, header.epoch, header.syncing) == (Stage.RUNNING, 1, True)
    assert (header.checkpoint.number, header.checkpoint.sequence) == (5, 50)
    assert (header.applied_sequence, header.stream_id) == (77, 1 << 63)
    volume = other.volume("disk0")
    assert (volume.size, volume.blocks, volume.disk_path) == (3 * MIB + 100, 769, "/somewhere/disk0.raw")
    assert volume.length_of(768) == 100
    error = header.get_error()
    assert error is not None
    assert (error.case, error.sentence) == (Failure.BACKUP, "the disk made a noise")
    header.clear_error()
    assert buffer.header.get_error() is None
    with pytest.raises(KeyError):
        other.volume("disk1")
    other.close()
    buffer.close()


def test_attach_refuses_what_does_not_fit(tmp_path: Path) -> None:
    directory = str(tmp_path / "buffer")
    with pytest.raises(DiskError, match="There is no disk buffer"):
        DiskBuffer.attach(directory)
    assert not DiskBuffer.exists(directory)
    DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="pair-1").close()
    assert DiskBuffer.exists(directory)
    with pytest.raises(DiskError, match="belongs to pair pair-1, not to pair-2"):
        DiskBuffer.attach(directory, pair_id="pair-2")
    with pytest.raises(DiskError, match="blocks of 4096 bytes, the configuration says 512"):
        DiskBuffer.attach(directory, block_size=512)
    with pytest.raises(DiskError, match=r"disk0 \(3145828 bytes\), the configuration says disk0 \(5 bytes\)"):
        DiskBuffer.attach(directory, volumes=[("disk0", 5)])
    os.truncate(f"{directory}/hidden.0", 5)
    with pytest.raises(DiskError, match="shorter than the header says"):
        DiskBuffer.attach(directory)
    os.unlink(f"{directory}/active.0")
    os.unlink(f"{directory}/hidden.0")
    with pytest.raises(DiskError, match="is missing"):
        DiskBuffer.attach(directory)


@pytest.mark.parametrize(("word", "words"), [(h.W_MAGIC, "interrupted"), (h.W_VERSION, "layout version 12345")])
def test_attach_refuses_another_layout(tmp_path: Path, word: int, words: str) -> None:
    directory = tmp_path / "buffer"
    DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="pair-1").close()
    with open(directory / "header", "r+b") as file:
        file.seek(word * 8)
        file.write((12345).to_bytes(8, "little"))
    with pytest.raises(DiskError, match=words):
        DiskBuffer.attach(str(directory))
    (directory / "header").write_bytes(b"x")
    with pytest.raises(DiskError, match="is not the header"):
        DiskBuffer.attach(str(directory))


def test_only_one_process_owns_a_buffer_and_a_new_one_replaces_an_orphan(tmp_path: Path) -> None:
    buffer = DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="p")
    with pytest.raises(DiskError, match=f"in use by process {os.getpid()}"):
        DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="p")
    attached = DiskBuffer.attach(str(tmp_path / "buffer"))
    with pytest.raises(DiskError, match="in use"):
        attached.header.own()
    with pytest.raises(DiskError, match="in use"):
        DiskBuffer.remove(str(tmp_path / "buffer"))
    buffer.close()
    attached.header.own()
    attached.close()
    keep = tmp_path / "buffer" / "precious"
    keep.write_text("not ours")
    DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="p").close()
    DiskBuffer.remove(str(tmp_path / "buffer"))
    assert list((tmp_path / "buffer").iterdir()) == [keep]


@pytest.mark.parametrize("first", ["header", "hidden.0", "active.0", "requests.0"])
def test_a_buffer_whose_removal_was_cut_short_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Killed behind the first file, whichever the file system lists first."""
    DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="p").close()
    directory = str(tmp_path / "buffer")
    files = sorted(Path(directory).iterdir(), key=lambda path: path.name != first)
    unlink = Path.unlink

    def killed(path: Path, **options: bool) -> None:
        unlink(path, **options)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda _path: iter(files))
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(SystemExit):
            DiskBuffer.remove(directory)
    assert not DiskBuffer.exists(directory)
    DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="p").close()


def test_a_buffer_of_another_boot_is_none(tmp_path: Path) -> None:
    """Its directory is on a disk: after a loss of power nobody knows what is there of it, and it would be believed."""
    buffer = DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="p")
    assert DiskBuffer.exists(buffer.directory)
    buffer.header.words[h.W_BOOT] ^= 1
    assert not DiskBuffer.exists(buffer.directory)
    with pytest.raises(NotRunning):
        attach(buffer.directory)
    buffer.header.words[h.W_BOOT] = 0  # an older one, or a host that does not tell
    assert DiskBuffer.exists(buffer.directory)
    buffer.close()
    DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="p").close()


def test_names_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    volume = dataclasses.replace(VOLUMES[0], name="n" * 300)
    with pytest.raises(Exception, match="too long"):
        DiskBuffer.create(settings(tmp_path), [volume], pair_id="p")
    assert not (tmp_path / "buffer").exists()


def test_an_error_is_readable_while_its_writer_is_dead_in_the_middle(tmp_path: Path) -> None:
    buffer = DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="p")
    buffer.header.set_error(Failure.FAILOVER, "x" * 10000)
    error = buffer.header.get_error()
    assert error is not None
    assert len(error.sentence) == h.ERROR_TEXT.stop - h.ERROR_TEXT.start
    buffer.header.words[h.W_ERROR_SERIAL] += 1
    error = buffer.header.get_error()
    assert error is not None
    assert error.case is Failure.FAILOVER
    buffer.header.clear_error()
    assert buffer.header.get_error() is None
    buffer.header.set_error(Failure.BACKUP, "the next one")
    error = buffer.header.get_error()
    assert error is not None
    assert (error.case, error.sentence) == (Failure.BACKUP, "the next one")
    buffer.header.set_error(Failure.BACKUP, "/a path/\udcff that is no UTF-8")
    error = buffer.header.get_error()
    assert error is not None
    assert error.sentence == "/a path/? that is no UTF-8"
    buffer.close()


@pytest.mark.parametrize("sequence", [1, (1 << 31), (1 << 32) - 1, 1 << 32, (1 << 32) + 1, 7 << 32])
def test_a_batch_that_was_begun_is_known_by_any_number(tmp_path: Path, sequence: int) -> None:
    buffer = DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="p")
    header = buffer.header
    header.applied_sequence = sequence - 1
    assert (header.torn, header.copied_ahead) == (False, 0)
    header.begin_batch(sequence, 5)
    header.begin_batch(sequence, 0)  # again: they are copied by now
    assert (header.torn, header.copied_ahead) == (True, 5)
    header.applied_sequence = sequence
    assert (header.torn, header.copied_ahead) == (False, 0)
    header.begin_batch(sequence + 1, 0)
    assert (header.torn, header.copied_ahead) == (True, 0)
    header.forget_batch()
    assert not header.torn
    buffer.close()


def test_a_crash_between_pointer_and_map_leaks_a_slot_and_nothing_else(tmp_path: Path) -> None:
    with rig(tmp_path / "rig") as made:
        layer = made.buffer.volumes[0].hidden
        made.stream(0, pattern(4096, 9))
        layer.store_used(1, 5)  # as if killed after the pointer, before owner and map
        made.reopen()
        made.stream(4096, pattern(4096, 10))
        blocks, slots = made.buffer.volumes[0].hidden.held(1)
        assert (blocks.tolist(), slots.tolist()) == ([0, 1], [0, 5])
        made.check()


def test_a_crash_in_the_middle_of_a_wrap_around_is_put_right_by_the_next_start(tmp_path: Path) -> None:
    made = Rig(tmp_path)
    made.stream(0, pattern(8192, 3))
    made.checkpoint()
    header = made.buffer.header
    header.record_checkpoint(h.LAST_EPOCH, 9, 90)
    header.store_state(Stage.RUNNING, h.LAST_EPOCH, syncing=False)  # the checkpoint's store; then the process dies
    made.check()
    with pytest.raises(OSError):
        made.guest.write(0, b"x")
    made.reopen()
    assert (made.buffer.header.epoch, made.buffer.header.checkpoint.number) == (1, 9)
    made.check()
    made.stream(4096, pattern(100, 4))
    made.guest_write(5000, b"guest")
    made.check()
    made.close()


def test_a_header_never_shows_a_checkpoint_that_is_not_current(tmp_path: Path) -> None:
    buffer = DiskBuffer.create(settings(tmp_path), VOLUMES, pair_id="p")
    buffer.start(syncing=False, number=1)
    header = PairHeader(str(tmp_path / "buffer" / "header"))
    header.record_checkpoint(2, 2, 20)
    assert header.checkpoint.number == 1
    header.store_state(Stage.RUNNING, 2, syncing=False)
    assert (header.checkpoint.number, header.checkpoint.sequence) == (2, 20)
    header.close()
    buffer.close()


def test_a_header_that_cannot_be_opened_is_not_taken_for_none(tmp_path: Path) -> None:
    """A new buffer would take the place of what a commit has yet to move."""
    (tmp_path / "header").symlink_to("header")  # ELOOP, which root gets, too
    for look in (DiskBuffer.exists, DiskBuffer.attach, DiskBuffer.remove):
        with pytest.raises(DiskError, match="cannot be opened"):
            look(str(tmp_path))
