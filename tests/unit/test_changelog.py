"""Each bug that the simulation or chaos found is named with what keeps it from coming back, and that exists."""

from __future__ import annotations

import re
from pathlib import Path

import tests.simulation.commands
import tests.simulation.guests
import tests.simulation.regressions_disks
import tests.simulation.regressions_roles  # noqa: F401 - and these
from tests.simulation.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]


def entries(finder: str) -> list[str]:
    """Of the chapter of what ``finder`` found, one a bug."""
    chapter = (ROOT / "CHANGELOG.md").read_text().split(f"### Found by {finder} ")[1].split("\n#")[0]
    found = re.findall(r"^\* (.*?)(?=^\* |^\n|\Z)", chapter, re.MULTILINE | re.DOTALL)
    return [" ".join(entry.split()) for entry in found]


def guards() -> set[str]:
    """Names of stories, tests and files of tests."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    tests = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    return {*SCENARIOS, *tests, *(file.name for file in files)}


def test_each_bug_that_the_simulation_found_names_its_guard() -> None:
    known, found = guards(), entries("the simulation")
    assert len(found) > 40
    for entry in found:
        named = re.findall(r"`(\w+(?:\.py)?)`", entry)
        assert known & set(named), f"no story or test of its own: {entry}"
        assert not [name for name in named if name.startswith("test_") and name not in known], entry


def test_each_bug_that_chaos_found_names_its_seed_and_its_guard() -> None:
    known, found = guards(), entries("chaos")
    assert found
    for entry in found:
        assert re.search(r"`tandemdisk chaos [^`]*--seed \d+", entry), f"no seed: {entry}"
        named = [name for name in re.findall(r"`(\w+)`", entry) if name.startswith("test_")]
        assert named, f"no test of its own: {entry}"
        assert set(named) <= known, entry
