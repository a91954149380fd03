"""Commands of a pair whose processes die in the middle of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import NotRunning
from common.settings import Role
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
