"""The stress test of copy-before-write, bounded (see tests/soak_cow.py), and the proof that it can fail."""

from __future__ import annotations

import pytest

from tests.soak_cow import parse, soak


def test_every_read_is_of_one_checkpoint_whatever_the_primary_writes() -> None:
    """I1, with readers, guest writers, checkpoints, killed readers, and a failover at the end."""
    options = parse(["--operations", "60000", "--seconds", "10", "--seed", "20160727", "--kill-odds", "0.05"])
    result = soak(options)
    assert result.problems == []
    assert result.checkpoints > 10
    assert result.operations > 1000


@pytest.mark.parametrize("variant", ["unserialised", "outside"])
def test_without_the_serialisation_it_fails_within_seconds(variant: str) -> None:
    """A check that cannot fail is no check: no requests at all, and the look-up before the request."""
    options = parse(["--operations", "100000000", "--seconds", "40", "--seed", "1", "--variant", variant])
    result = soak(options)
    assert result.problems, f"not found out in {result.seconds:.0f} s and {result.operations} operations"
    assert all("epochs" in problem for problem in result.problems)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_millions_of_operations() -> None:
    result = soak(parse(["--operations", "3000000", "--kill-odds", "0.01"]))
    assert result.problems == []
