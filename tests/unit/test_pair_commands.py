"""Commands of a pair whose processes die in the middle of them, or come up."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
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
from common.process import Lifecycle
from common.record import initial_metadata
from common.settings import Role
from deploy import launcher
from deploy.cli import main
from deploy.layout import PairOptions
from deploy.pair import Pair
from deploy.presence import wait_for_orphans
from deploy.roles import give_up


class Side:
    """The control channel of a side that was well when it was asked where it stands. ``end``: how a failover ends."""

    def __init__(self, end: BaseException | None = None) -> None:
        self._end = end

    def call(self, command: str, **_args: object) -> dict[str, Any]:
        if command == "status":
            return {"role": "primary", "state": "protected"}
        if self._end is not None:
            raise self._end
        return {"to": "latest"}


class Supervisor:
    """In the place of the commands to one; ``runs``: it is there."""

    def __init__(self, pair: Pair, monkeypatch: pytest.MonkeyPatch, end: BaseException | None) -> None:
        self.done: list[str] = []
        self.runs = True
        monkeypatch.setattr(pair, "client", lambda _role: Side(end))
        monkeypatch.setattr(pair, "_stop_one", lambda role: self.done.append(f"stop {role}"))
        monkeypatch.setattr(pair, "_start_all", self._start_all)
        monkeypatch.setattr("deploy.pair.lacks_nothing", lambda _follower, _stopped: True)

    def _start_all(self, leader: Role) -> bool:
        self.done += [f"start, {leader} leads"] * self.runs
        return self.runs


@pytest.mark.parametrize("end", [NotRunning("Nobody answers failover."), KeyboardInterrupt()])
def test_a_switchover_ends_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException) -> None:
    """Between the end of the old primary and the failover the secondary dies, or the operator presses Ctrl-C: both
    sides are started again, in the roles that they had."""
    pair = Pair.create(tmp_path / "p", PairOptions(size=1 << 20))
    supervisor = Supervisor(pair, monkeypatch, end)
    with pytest.raises(type(end)):
        pair.switchover()
    assert supervisor.done == ["stop primary", "start, primary leads"]


def test_a_switchover_that_fails_starts_no_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`down` was given meanwhile, or the sides run by themselves: what was stopped is named, nothing else is done."""
    pair = Pair.create(tmp_path / "p", PairOptions(size=1 << 20))
    supervisor = Supervisor(pair, monkeypatch, NotRunning("Nobody answers failover."))
    supervisor.runs = False
    with pytest.raises(NotRunning, match="Nobody answers failover") as caught:
        pair.switchover()
    assert f"Side a is stopped: `tandemdisk primary --config {pair.directory.config('primary')}`" in caught.value.hint
    assert not pair.directory.supervisor_log.exists()


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


def test_a_side_that_was_started_during_a_switchover_keeps_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`up` was given between the end of the old primary and the failover: its process writes over what is written."""
    pair = left_behind(tmp_path / "p")
    Supervisor(pair, monkeypatch, None)
    monkeypatch.setattr(pair, "leader", lambda: "primary")
    path = f"{pair.settings('primary').directory}/metadata"
    before = load(path)
    disk = FileDisk(pair.settings("primary").volumes[0].disk)
    with pytest.raises(DiskError, match="in use by another process") as caught:
        pair.switchover()
    disk.close()
    assert "tandemdisk rejoin" in caught.value.hint
    assert load(path) == before
    pair.switchover()
    assert roles(pair) == ["secondary", "primary"]


@pytest.mark.root
def test_a_switchover_leaves_the_metadata_to_their_owner(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's command in a pair of another user, whose processes have to read them at the next start."""
    pair = left_behind(short_dir / "p")
    for path in (short_dir / "p").rglob("*"):
        os.chown(path, 65534, 65534)
    short_dir.chmod(0o755)
    (short_dir / "p").chmod(0o755)
    Supervisor(pair, monkeypatch, None)
    monkeypatch.setattr(pair, "leader", lambda: "primary")
    pair.switchover()
    assert os.stat(f"{pair.settings('primary').directory}/metadata").st_uid == 65534


@pytest.mark.parametrize("ours", [True, False])
def test_only_our_own_orphans_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    """After a restart of the machine the number of a child is that of another pair's primary, or of its supervisor:
    `up` and `down` waited a minute for the end of that."""
    pair = Pair.create(tmp_path / "p", PairOptions(size=1 << 20))
    gone = 1 << 22  # no process has that number
    parent = gone if ours else os.getpid()
    waits = ["-c", "import sys; sys.stdin.read()"]
    waited: list[int] = []
    monkeypatch.setattr("psutil.wait_procs", lambda procs, timeout: waited.extend(p.pid for p in procs if timeout))
    with (
        subprocess.Popen([sys.executable, *waits, "primary", "--parent", str(parent)], stdin=subprocess.PIPE) as child,
        subprocess.Popen([sys.executable, *waits, "deploy.launcher", "--dir", "/q"], stdin=subprocess.PIPE) as launcher,
    ):
        for supervisor in (gone, launcher.pid):
            children = {"primary": {"alive": True, "pid": child.pid}, "secondary": {"alive": True, "pid": gone}}
            pair.directory.supervisor_state.write_text(json.dumps({"pid": supervisor, "children": children}))
            wait_for_orphans(pair.directory)
    assert waited == [child.pid] * ours


def test_a_side_that_rejoins_while_its_process_comes_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`up` beside `rejoin` or `switchover`: it was to be the primary, and is refused as one. The start goes on, and
    with it the supervisor, which would take the other side along."""
    pair = left_behind(tmp_path / "p")
    monkeypatch.setattr(launcher.Supervisor, "_left_behind", lambda _self: None)  # it was not when that was looked at
    started: list[tuple[Role, Role]] = []

    async def start_one(self: launcher.Supervisor, role: Role) -> None:
        started.append((role, self._processes[role]))
        if started[-1] == ("primary", "primary"):
            pair.rejoin()
            raise OperationFailed("Side a is the secondary.")

    monkeypatch.setattr(launcher.Supervisor, "_start_one", start_one)

    async def start() -> dict[str, Any]:
        return await launcher.Supervisor(pair.directory, Lifecycle("supervisor")).start()

    assert asyncio.run(start())["started"] == ["secondary", "primary"]
    assert started == [("secondary", "primary"), ("primary", "primary"), ("primary", "secondary")]


@pytest.mark.parametrize("file", ["metadata", "intent"])
def test_a_side_whose_memory_is_damaged_keeps_nobody_from_taking_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """The primary's disk died, and what it remembered with it: `status` says so, `failover` reaches the other side."""
    pair = left_behind(tmp_path / "p")
    led, follows = pair.settings("primary"), pair.settings("secondary")
    save(f"{follows.directory}/metadata", initial_metadata(follows, "secondary", [1 << 20]))
    damaged = Path(led.directory) / file
    damaged.unlink(missing_ok=True)
    damaged.mkdir()
    told = pair.status()
    assert told["state"] == "stopped"
    assert told["secondary"]["reason"] == "not started"
    if file == "metadata":
        assert f"{damaged} cannot be read" in told["primary"]["reason"]
        with pytest.raises(DiskError, match=f"tandemdisk secondary --config {pair.directory.config('secondary')}"):
            launcher.Supervisor(pair.directory, Lifecycle("supervisor"))._left_behind()
    asked: list[Role] = []

    def client(role: Role) -> Side:
        asked.append(role)
        return Side()

    monkeypatch.setattr(pair, "client", client)
    assert pair.failover()["to"] == "latest"
    assert asked == ["secondary"]
    with pytest.raises(DiskError):
        pair.rejoin()
