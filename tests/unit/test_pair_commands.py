"""Commands of a pair whose processes die in the middle of them, or come up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from common.disk import FileDisk
from common.errors import DiskError, NotRunning
from common.generation import Generation, History
from common.metadata import load, save
from common.record import initial_metadata
from common.settings import Role
from deploy.cli import main
from deploy.layout import PairOptions
from deploy.pair import Pair


class Dying:
    """The control channel of a side that was well when it was asked where it stands, and is gone since."""

    def call(self, command: str, **_args: object) -> dict[str, Any]:
        if command == "status":
            return {"role": "primary", "state": "protected"}
        raise NotRunning(f"Nobody answers {command}.")


def test_the_secondary_dies_in_the_middle_of_a_switchover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the end of the old primary and the failover: both sides are started again, in the roles that they had."""
    done: list[str] = []
    pair = Pair.create(tmp_path / "p", PairOptions(size=1 << 20))
    monkeypatch.setattr("deploy.pair.lacks_nothing", lambda _follower, _stopped: True)
    monkeypatch.setattr(pair, "client", lambda _role: Dying())

    def stop_one(role: Role) -> None:
        done.append(f"stop {role}")

    def up(*, detach: bool = False) -> dict[str, Any]:
        done.append(f"up {detach=}")
        return {}

    monkeypatch.setattr(pair, "_stop_one", stop_one)
    monkeypatch.setattr(pair, "up", up)
    with pytest.raises(NotRunning, match="Nobody answers failover"):
        pair.switchover()
    assert done == ["stop primary", "up detach=True"]


def left_behind(directory: Path) -> Pair:
    """Side b has taken over from side a, which does not know it; neither runs."""
    pair = Pair.create(directory, PairOptions(size=1 << 20))
    first = (Generation(1, 1, "a"),)
    lives: dict[Role, History] = {"primary": first, "secondary": (*first, Generation(2, 2, "b"))}
    for role, history in lives.items():
        settings = pair.settings(role)
        metadata = replace(initial_metadata(settings, "primary", [1 << 20]), history=history, clean=False, base=1)
        Path(settings.directory).mkdir(exist_ok=True)
        save(f"{settings.directory}/metadata", metadata)
    return pair


def test_a_side_whose_process_is_about_to_start_is_not_changed(tmp_path: Path) -> None:
    """systemd starts a primary again and again that was left behind. One that has its disks, and does not answer yet,
    would write its old metadata over what `rejoin` or `accept-disk` wrote."""
    pair = left_behind(tmp_path / "p")
    settings = pair.settings("primary")
    before = load(f"{settings.directory}/metadata")
    disk = FileDisk(settings.volumes[0].disk)
    with pytest.raises(DiskError, match="in use by another process"):
        pair.rejoin()
    config = str(pair.directory.config("primary"))
    told = CliRunner().invoke(main, ["accept-disk", "--config", config])
    assert told.exit_code == DiskError.exit_code
    assert load(f"{settings.directory}/metadata") == before
    disk.close()
    assert pair.rejoin()["side"] == "a"
    now = load(f"{settings.directory}/metadata")
    assert now is not None
    assert now.role == "secondary"
