"""What a failover has to have brought: the oracle of the volume under the main load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from deploy.chaos.expectation import BLOCK, Breach, Expectation, none_wrong

if TYPE_CHECKING:
    from deploy.chaos.campaign import PairUnderChaos


def judge_failover(
    subject: PairUnderChaos, target: str, number: int, found: npt.NDArray[np.int64], expectation: Expectation, *,
    probe: int | None,
) -> None:  # fmt: skip
    """What was found after it, against what the target promises. Block 0 holds the probe, if there was one."""
    missing = found < expectation.acknowledged.astype(np.int64)
    if target == "checkpoint":
        subject.tally.rolled_back += int(np.count_nonzero(missing))
        if subject.known is not None and number >= subject.known[0]:
            _, low, high = subject.known
            if number > subject.known[0]:
                high = expectation.snapshot()[1]
            if probe is not None:
                high[0] = probe
            guests = subject.guests(number)
            wrong = [one for one in expectation.out_of_range(found, low, high) if one.block not in guests]
            none_wrong(wrong, f"after a failover to checkpoint {number}")
        return
    if subject.writer.errors == subject.errors or probe is None:
        seen = found.copy()
        if probe is not None:
            seen[0] = expectation.log[-1][0] if expectation.log else 0
            seen[0] = min(int(seen[0]), int(found[1:].max()))
        none_wrong(expectation.not_a_beginning(seen), "after a failover to latest: no beginning of the order")
    if subject.mode == "async":
        left = expectation.missing_bytes(found, expectation.acknowledged)
        subject.tally.lost_async_bytes = max(subject.tally.lost_async_bytes, left)
        subject.tally.left_behind += left > 0
        if subject.owed is not None:
            low, lag = subject.owed
            left = expectation.missing_bytes(found, low)
            subject.tally.bounded += 1
            subject.tally.bounded_by = max(subject.tally.bounded_by, lag)
            if left > lag:
                raise Breach(f"{left} bytes were left behind; only {lag} were not confirmed.", left // BLOCK)
        return
    none_wrong(expectation.wrong(found), "after a failover to latest")
