"""Runs a seed's life, or a story's, in a world of its own, bounded in steps and in processor time; and shrinks what
fails."""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import threading
import time
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
    again: str = ""
    """Arguments of the command that shows it again, where it is not the life of a seed."""

    @property
    def what(self) -> str:
        """The failure in a word, to compare failures by."""
        if isinstance(self.failure, Violation):
            return self.failure.invariant
        return type(self.failure).__name__ if self.failure is not None else ""

    def command(self) -> str:
        """One line that replays it, whatever its options are."""
        if self.again:
            return f"python -m tests.simulation {self.again}"
        settings = self.options.settings(draw(random.Random(self.seed), self.seed))
        return f"python -m tests.simulation --seed {self.seed}" + "".join(f" --set {setting}" for setting in settings)

    def describe(self) -> str:
        """For a person: the failure, where it came from and how to see it again."""
        lines = [f"seed {self.seed}: {self.what}: {self.failure}", f"  options: {self.options.describe()}",
                 f"  again:   {self.command()}"]  # fmt: skip
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
        life: Callable[[Simulation], Any] | None = None, again: str = "") -> Result:  # fmt: skip
    """Live the life of ``seed``, or what ``life`` makes of it; ``again``: see ``Result``."""
    chance = random.Random(seed)
    drawn = draw(chance, seed)
    options = options or drawn
    result = Result(seed, options, again=again)
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
        result.counts = simulation.counts + world.happened()
        result.step = simulation.step
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


def shrink(result: Result, *, tries: int = 150, seconds: float = 60.0) -> Result:
    """The same failure with fewer kinds of trouble, commands and policies, a smaller pair and a shorter life: until
    nothing more can be left out, or ``tries`` runs or ``seconds`` are over."""
    best = result
    end = time.perf_counter() + seconds
    again = True
    while again:
        again = False
        for smaller in _smaller(best.options, best.step):
            options = smaller(best.options)
            if options == best.options:
                continue
            if not tries or time.perf_counter() > end:
                return best
            tries -= 1
            found = run(result.seed, options)
            if found.failure is not None and found.what == result.what:
                best, again = found, True
    return best


def _smaller(options: Options, step: int) -> Iterator[Callable[[Options], Options]]:
    """What may be left out of ``options``, each by itself; the failure was at ``step``."""
    for steps in (step + 1, (step + 1) // 2, (step + 1) * 3 // 4, step):
        yield lambda now, steps=steps: replace(now, steps=max(1, min(now.steps, steps)))  # type: ignore[misc]
    yield lambda now: replace(now, commands=frozenset())
    yield lambda now: replace(now, troubles=frozenset())
    yield lambda now: replace(now, policies=frozenset(), paths=frozenset())
    for name in sorted(options.commands):
        yield lambda now, name=name: replace(now, commands=now.commands - {name})  # type: ignore[misc]
    for name in sorted(options.troubles):
        yield lambda now, name=name: replace(now, troubles=now.troubles - {name})  # type: ignore[misc]
    for name in sorted(options.policies | options.paths):
        yield lambda now, name=name: replace(now, policies=now.policies - {name}, paths=now.paths - {name})  # type: ignore[misc]
    yield lambda now: replace(now, blocks=now.blocks[:1])
    yield lambda now: replace(now, blocks=tuple(min(count, 6) for count in now.blocks))
    calm: dict[str, Any] = {"guest": False, "failover": "", "large": False, "small_pool": 0, "odd_end": False,
                            "assume": False, "interval_s": 0.0, "window_bytes": 1 << 20, "loss": "continue",
                            "dense": False}  # fmt: skip
    for name, value in calm.items():
        yield lambda now, name=name, value=value: replace(now, **{name: value})  # type: ignore[misc]
