"""What `status` says of a pair whose roles are not those that its sides were started in."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from common.settings import BufferSettings, ExportSettings, NodeSettings, ReplicationSettings, VolumeSettings
from deploy.display import status_view, where_to_connect
from deploy.overview import merge


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
