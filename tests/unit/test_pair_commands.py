"""Commands of a pair whose processes die in the middle of them, or come up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from common.disk import FileDisk
from common.errors import DiskError, NotRunning, OperationFailed, PeerRefused
from common.generation import Generation, History, Standing
from common.inquiry import remembered_standing
from common.metadata import load, save
from common.record import initial_metadata
from common.settings import Role
from deploy.cli import main
from deploy.layout import PairOptions
from deploy.pair import Pair
from deploy.roles import give_up


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


FIRST: History = (Generation(1, 1, "a"),)
ALONE: History = (*FIRST, Generation(3, 2, "a"))
"""Of side a, once it has written without the other one."""


def left_behind(directory: Path, history: History = FIRST) -> Pair:
    """Side b has taken over from side a, which does not know it; neither runs."""
    pair = Pair.create(directory, PairOptions(size=1 << 20))
    lives: dict[Role, History] = {"primary": history, "secondary": (*FIRST, Generation(2, 2, "b"))}
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


def roles(pair: Pair) -> list[str]:
    """Of sides a and b, by their metadata."""
    stored = [load(f"{pair.settings(role).directory}/metadata") for role in ("primary", "secondary")]
    return [metadata.role for metadata in stored if metadata is not None]


def test_two_rejoins_at_once_do_not_make_both_sides_followers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One operator discards side a, another one side b: neither would lead, and none could take over."""
    pair = left_behind(tmp_path / "p", ALONE)
    refused: list[OperationFailed] = []

    def in_the_middle(*args: Any, **options: Any) -> None:
        monkeypatch.setattr("deploy.pair.give_up", give_up)
        with pytest.raises(OperationFailed, match="Another command") as caught:
            Pair(tmp_path / "p").rejoin(discard="b")
        refused.append(caught.value)
        give_up(*args, **options)

    monkeypatch.setattr("deploy.pair.give_up", in_the_middle)
    assert pair.rejoin(discard="a")["side"] == "a"
    assert roles(pair) == ["secondary", "primary"]
    assert "try again" in refused[0].hint


def test_what_a_side_writes_alone_until_it_stops_is_not_given_up_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had nothing of its own when it was judged, and acknowledged a write before it stopped: split brain."""
    pair = left_behind(tmp_path / "p")
    path = f"{pair.settings('primary').directory}/metadata"

    def write_and_stop(_role: Role) -> None:
        metadata = load(path)
        assert metadata is not None
        save(path, replace(metadata, history=ALONE))

    monkeypatch.setattr(pair, "_stop_one", write_and_stop)
    with pytest.raises(PeerRefused, match="Split brain") as caught:
        pair.rejoin()
    assert "--discard" in caught.value.hint
    assert roles(pair) == ["primary", "primary"]


def test_rejoins_on_both_hosts_do_not_make_both_sides_followers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other host's command has stopped the side there since it told where it stands."""
    pair = left_behind(tmp_path / "p", ALONE)
    there = remembered_standing(pair.settings("secondary"))
    assert there is not None
    pair.directory.config("secondary").unlink()
    answers: list[Standing] = [there]

    def asked(_sides: object) -> dict[Role, Standing]:
        if not answers:
            raise NotRunning("The other side did not say where it stands.", hint="Its process has to run.")
        return {"secondary": answers.pop()}

    monkeypatch.setattr("deploy.pair.told_by_peer", asked)
    with pytest.raises(NotRunning) as caught:
        pair.rejoin(discard="a")
    assert f"tandemdisk primary --config {pair.directory.config('primary')}" in caught.value.hint
    metadata = load(f"{pair.settings('primary').directory}/metadata")
    assert metadata is not None
    assert (metadata.role, metadata.history) == ("primary", ALONE)
