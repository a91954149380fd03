"""What a side alone wrote, saved before it is overwritten: exactly the marked ranges, or nothing."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from common import config
from common.disk import FileDisk
from common.errors import DiskError
from common.intent import INTENT_FILE, IntentFile
from common.metadata import save
from common.record import initial_metadata
from common.settings import NodeSettings
from deploy.diverged import check_room, save_diverged
from tests.pairs import MIB, random_bytes

SIZE = 24 * MIB


@pytest.fixture
def side(tmp_path: Path) -> NodeSettings:
    """A primary that died, having written in its second region of 4 MiB, and marked the third as well."""
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.write(random_bytes(1, MIB))
        file.seek(5 * MIB)
        file.write(random_bytes(2, MIB))
        file.truncate(SIZE)
    settings = config.make_settings(
        {"pair_id": "p", "side": "a", "directory": str(tmp_path), "volumes": [{"name": "v", "disk": str(disk)}]},
        base=tmp_path,
    )
    save(f"{tmp_path}/metadata", replace(initial_metadata(settings, "primary", [SIZE]), clean=False))
    intent = IntentFile(f"{tmp_path}/{INTENT_FILE}", [SIZE])
    intent.set_ranges([(0, 4 * MIB, 8 * MIB)])
    intent.close()
    return settings


def test_what_is_marked_is_saved_and_listed(side: NodeSettings) -> None:
    (path,) = save_diverged(side)
    saved, disk = Path(path).read_bytes(), Path(side.volumes[0].disk).read_bytes()
    assert Path(f"{path}.ranges").read_text() == f"{4 * MIB} {8 * MIB}\n"
    assert saved[4 * MIB : 12 * MIB] == disk[4 * MIB : 12 * MIB]
    assert not any(saved[: 4 * MIB]), "what both sides have is not in it"
    assert len(saved) == SIZE
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(path).st_blocks * 512 < 2 * MIB, "holes stay holes"


def test_a_save_that_fails_leaves_nothing(side: NodeSettings) -> None:
    before = sorted(os.listdir(side.directory))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(DiskError, match="side a alone wrote cannot be saved: File too large") as caught:
            save_diverged(side)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "keep_diverged" in caught.value.hint
    assert sorted(os.listdir(side.directory)) == before


def test_a_save_that_is_interrupted_leaves_nothing(side: NodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C takes away what there is of a copy, which may be large; after a SIGKILL the next save does, of any
    generation."""
    before = sorted(os.listdir(side.directory))
    (Path(side.directory) / "diverged-v-7.raw.new").write_bytes(bytes(MIB))

    def interrupted(_disk: FileDisk, _offset: int, _view: memoryview) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FileDisk, "read_into", interrupted)
        save_diverged(side)
    assert sorted(os.listdir(side.directory)) == before


def test_room_is_counted_in_what_is_allocated(side: NodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(side.directory)

    class Full:
        f_frsize = 4096
        f_bavail = MIB // 4096

    monkeypatch.setattr(os, "statvfs", lambda _path: Full if Full.f_bavail else real)
    check_room(side)
    Full.f_bavail = MIB // 4096 - 1
    with pytest.raises(DiskError, match="no room to save what side a alone wrote: 1048576 bytes at most") as caught:
        check_room(side)
    assert "Nothing was changed" in caught.value.hint
    (Path(side.directory) / "diverged-v-0.raw.new").write_bytes(bytes(MIB))  # of one that was killed
    check_room(side)
