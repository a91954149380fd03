"""The simulation's oracle, where lives alone would hardly ever try it."""

from __future__ import annotations

import random

import pytest

from tests.simulation.disk import SECTOR, Faults, Platter
from tests.simulation.oracle import Oracle, Violation


def test_the_secondary_may_still_be_behind_a_primary_that_lost_all_it_wrote() -> None:
    """Simulation seed 123006379: both processes of the primary began with the same disk, and what the first one had
    sent was applied when the second one had come."""
    oracle = Oracle([16 * SECTOR], sync=True)
    primary, secondary = (Platter(name, 16 * SECTOR, random.Random(1), Faults()) for name in "ab")
    first, second = oracle.new_version(), oracle.new_version()
    oracle.submitted([(0, 2, first)], False, None)
    oracle.submitted([(1, 4, second)], False, None)
    oracle.primary_started([primary], power_lost=True)
    oracle.check_secondary([secondary], exact=True)
    for sector, version in ((0, first), (1, first), (1, second), (2, second), (3, second)):
        secondary.put(sector * SECTOR, version.to_bytes(8, "little") * (SECTOR // 8))
        if (sector, version) in ((1, first), (3, second)):
            oracle.check_secondary([secondary], exact=True)
    later = oracle.new_version()
    oracle.submitted([(8, 9, later)], False, None)
    secondary.put(8 * SECTOR, later.to_bytes(8, "little") * (SECTOR // 8))
    with pytest.raises(Violation, match="I2"):  # of both streams at once it is nothing
        oracle.check_secondary([secondary], exact=True)


def test_what_volumes_kept_for_an_engine_is_in_order_of_the_volumes() -> None:
    """Simulation seed 210006919: a client that has both requests under way is promised no order of them."""
    size = 16 * SECTOR
    oracle = Oracle([size, size], sync=True)
    secondary = [Platter(name, size, random.Random(1), Faults()) for name in "ab"]
    one, other = oracle.new_version(), oracle.new_version()
    oracle.submitted([(20, 21, one)], False, None)
    oracle.submitted([(3, 4, other)], False, None)
    oracle.handed_over()
    for platter, sector, version in ((secondary[0], 3, other), (secondary[1], 4, one)):
        platter.put(sector * SECTOR, version.to_bytes(8, "little") * (SECTOR // 8))
        oracle.check_secondary(secondary, exact=True)
