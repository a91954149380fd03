"""What `status` says of a pair whose roles are not those that its sides were started in."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from common.settings import BufferSettings, ExportSettings, NodeSettings, ReplicationSettings, VolumeSettings
from deploy import cli
from deploy.display import status_view, where_to_connect
from deploy.overview import merge
from deploy.pair import Pair


def side(role: str, state: str, uri: str, pid: int | None = 7) -> dict[str, Any]:
    volumes = [{"name": "disk0", "size": 1 << 20, "nbd_uri": uri}] if pid else []
    return {"role": role, "pid": pid, "state": state, "nbd_uri": uri, "error": None, "volumes": volumes}


def pair(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    settings = NodeSettings(
        pair_id="p", side="a", directory="/d", volumes=(VolumeSettings("disk0", "/d/disk"),),
        export=ExportSettings(unix="/d/nbd.sock"), replication=ReplicationSettings(), buffer=BufferSettings("/d/b", 1),
    )  # fmt: skip
    return merge(a, b, {"pid": 1}, settings)


def shown(what: Any) -> list[str]:
    out = StringIO()
    Console(file=out, width=100).print(what)
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("a", "b", "state"),
    [
        (side("primary", "protected", "A"), side("secondary", "RUNNING", "B"), "protected"),
        (side("primary", "dead", "A", None), side("primary", "FAILOVER", "B"), "failover"),
        (side("primary", "dead", "A", None), side("primary", "DONE", "B"), "done"),
        (side("secondary", "RUNNING", "A"), side("primary", "protected", "B"), "protected"),
        (side("secondary", "dead", "A", None), side("primary", "reconnecting", "B"), "reconnecting"),
        (side("secondary", "dead", "A", None), side("primary", "alone", "B"), "alone"),
        (side("secondary", "RUNNING", "A"), side("primary", "dead", "B", None), "primary_lost"),
    ],
)
def test_the_state_is_that_of_the_side_that_leads(a: dict[str, Any], b: dict[str, Any], state: str) -> None:
    assert pair(a, b)["state"] == state


def test_one_writes_where_the_primary_is_whatever_it_was_started_as() -> None:
    swapped = pair(side("secondary", "RUNNING", "nbd+unix:A"), side("primary", "protected", "nbd+unix:B"))
    assert "disk0 write here nbd+unix:B" in shown(where_to_connect(swapped, "/d"))
    assert "guest's view nbd+unix:A" in shown(where_to_connect(swapped, "/d"))
    lines = shown(status_view(swapped))
    assert "disk0 1 MiB secondary nbd+unix:A" in lines
    assert "primary nbd+unix:B" in lines
    straight = pair(side("primary", "protected", "nbd+unix:A"), side("secondary", "RUNNING", "nbd+unix:B"))
    assert "disk0 write here nbd+unix:A" in shown(where_to_connect(straight, "/d"))


def test_what_a_verification_marked_is_said() -> None:
    lead = side("primary", "protected", "nbd+unix:A")
    follow = side("secondary", "RUNNING", "nbd+unix:B")
    assert not any("marked" in line for line in shown(status_view(pair(lead, follow))))
    lead["volumes"][0]["dirty_bytes"] = 8192
    assert "marked 8 KiB differ, for the next resync" in shown(status_view(pair(lead, follow)))


def test_a_uri_and_a_command_are_in_one_line_however_narrow_the_terminal() -> None:
    long = "nbd+unix:///disk0?socket=/" + "a-directory-of-some-length/" * 6 + "nbd.sock"
    status = pair(side("primary", "protected", long), side("secondary", "RUNNING", "B" + long))
    for view in (status_view(status), where_to_connect(status, "/" + "d" * 100)):
        out = StringIO()
        Console(file=out, width=40).print(view, crop=False)
        lines = [line.split() for line in out.getvalue().splitlines()]
        assert [line[-1] for line in lines if line and "socket=" in line[-1]] == [long, "B" + long]
    assert "--dir /" + "d" * 100 + " " in out.getvalue()


@pytest.mark.parametrize("command", ["status", "up"])
def test_the_commands_print_uris_whole(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = "nbd+unix:///disk0?socket=/" + "a-directory-of-some-length/" * 6 + "nbd.sock"
    status = pair(side("primary", "protected", long), side("secondary", "RUNNING", "B" + long))
    monkeypatch.setattr(Pair, "status", lambda self: status)
    monkeypatch.setattr(Pair, "create_or_resume", lambda self, options, detach: {"children": {}, "started": []})
    out = StringIO()
    monkeypatch.setattr(cli, "console", Console(file=out, width=40))
    result = CliRunner().invoke(cli.main, [command, "--dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert {long, "B" + long} <= set(out.getvalue().split())
