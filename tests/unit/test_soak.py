"""The soak command: every part runs, whatever fails, and the summary and the exit code say so."""

from __future__ import annotations

import sys

import pytest

from tests import soak


def test_a_part_that_fails_is_told_and_the_rest_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {"one": (sys.executable, "-c", "raise SystemExit(3)"), "two": (sys.executable, "-c", "")}
    monkeypatch.setattr(soak, "parts", lambda _options: commands)
    assert soak.main([]) == 1
    summary = capsys.readouterr().out.partition("summary")[2].splitlines()[1:]
    assert [line.split()[:2] for line in summary] == [["one", "FAILED"], ["two", "ok"]]
    assert soak.main(["--only", "two"]) == 0
    with pytest.raises(SystemExit):
        soak.main(["--only", "three"])


def test_every_part_has_its_length() -> None:
    arguments = ["--operations", "7", "--simulation-minutes", "8", "--chaos-minutes", "9", "--kills", "10"]
    commands = {name: " ".join(command) for name, command in soak.parts(soak.parse(arguments)).items()}
    assert "--operations 7" in commands["cow"]
    assert "--minutes 8" in commands["simulation"]
    assert "--minutes 9.0 --kills 10 --failovers 200" in commands["chaos"]
    assert "--mode async --minutes 3.0" in commands["chaos-async"]
