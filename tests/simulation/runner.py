"""Runs a seed's life, or a story's, in a world of its own, bounded in steps and in processor time; and shrinks what
fails."""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from xxhash import xxh3_64

from tests.simulation.options import Options, draw
from tests.simulation.oracle import Violation
from tests.simulation.simulator import Simulation, Stop
from tests.simulation.world import World

MOST_CPU_S = 30.0
"""Processor time of one life, where a usual one takes 0.05 s: the bound for what turns round within one callback."""


@dataclass
class Result:
    """What became of a seed."""

    seed: int
    options: Options
    failure: BaseException | None = None
    trace: int = 0
    log: list[str] = field(default_factory=list)
    acknowledged: int = 0
    steps: int = 0
    virtual_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    step: int = 0

    @property
    def what(self) -> str:
        """The failure in a word, to compare failures by."""
        if isinstance(self.failure, Violation):
            return self.failure.invariant
        return type(self.failure).__name__ if self.failure is not None else ""

    def describe(self) -> str:
        """For a person: the failure, where it came from and how to see it again."""
        compress = " --compress" * self.options.compress
        lines = [f"seed {self.seed}: {self.what}: {self.failure}", f"  options: {self.options.describe()}",
                 f"  again:   python -m tests.simulation --seed {self.seed}{compress}"]  # fmt: skip
        if self.failure is not None and not isinstance(self.failure, Violation):
            lines += ["".join(traceback.format_exception(self.failure))]
        return "\n".join(lines)


class TurnsRound(BaseException):
    """Something does not come to its end; not an ``Exception``, so that nothing takes it for its own."""


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise ``TurnsRound`` in what runs when it has had ``seconds`` of processor time; again and again, until it
    ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_number: int, _frame: Any) -> None:
        raise TurnsRound(f"more than {seconds:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def run(seed: int, options: Options | None = None, *, keep_log: bool = False,
        life: Callable[[Simulation], Any] | None = None) -> Result:  # fmt: skip
    """Live the life of ``seed``, or what ``life`` makes of it."""
    chance = random.Random(seed)
    drawn = draw(chance, seed)
    options = options or drawn
    result = Result(seed, options)
    digest = xxh3_64()
    with World.open(options, chance) as world:
        simulation = Simulation(world, seed)

        def trace(line: str) -> None:
            text = f"{world.loop.now:.6f} {line}".replace(world.directory, "")
            digest.update(text.encode())
            if keep_log:
                result.log.append(text)

        world.trace = trace
        _run_to_its_end(world, simulation.live() if life is None else life(simulation))
        result.failure = world.violation
        del trace
        result.acknowledged = world.oracle.acknowledged + world.oracle.guest_acknowledged
        result.steps = world.loop.steps
        result.virtual_s = world.loop.now - 1000.0
        result.counts = simulation.counts
        result.step = simulation.step
        result.counts["messages"] = world.network.sent
        result.counts["checkpoints"] = world.oracle.checkpoint_count
        result.counts["guest reads"] = world.oracle.reads
        result.counts["promotions"] = int(world.oracle.promoted)
    gc.collect()  # the mappings of this life hold descriptors, and cycles hold them
    result.trace = digest.intdigest()
    return result


def _run_to_its_end(world: World, life: Any) -> None:
    """Until the life is over, or a check fails; every failure is in ``world.violation`` then."""
    task = world.loop.create_task(life)
    try:
        with bounded(MOST_CPU_S):
            world.loop.run_until_complete(task)
    except Stop:
        pass
    except Violation as violation:
        world.violation = world.violation or violation
        world.trace(f"VIOLATION {violation}")
    except TurnsRound as error:
        world.violation = world.violation or Violation("liveness", f"{error} at step {world.loop.steps}")
    except Exception as error:
        # the loop is stopped as soon as a check has failed, and says that its task is not done
        world.violation = world.violation or error
    if isinstance(world.violation, TurnsRound):
        world.violation = Violation("liveness", f"{world.violation} at step {world.loop.steps}")
    if not task.done():
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        with contextlib.suppress(BaseException):
            life.close()


def shrink(result: Result, *, tries: int = 60) -> Result:
    """The same failure with fewer kinds of trouble and a shorter life, as far as that can be found in ``tries``
    runs."""
    best = result
    for options in _smaller(result):
        if tries == 0:
            break
        tries -= 1
        if len(options.troubles) > len(best.options.troubles) or options.steps > best.options.steps:
            continue
        merged = replace(
            options, troubles=options.troubles & best.options.troubles, steps=min(options.steps, best.options.steps)
        )
        found = run(result.seed, merged)
        if found.failure is not None and found.what == result.what:
            best = found
    return best


def _smaller(result: Result) -> Iterator[Options]:
    options = result.options
    yield replace(options, steps=max(1, result.step + 1))
    for trouble in sorted(options.troubles):
        yield replace(options, troubles=options.troubles - {trouble})
    yield replace(options, small_pool=0)
    yield replace(options, odd_end=False)
    for part in (2, 4, 8):
        yield replace(options, steps=max(1, (result.step + 1) // part))
