"""`tandemdisk bench --hosts netns`: from options to a report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from common.errors import ConfigError, OperationFailed
from deploy.bench import hosts_report
from deploy.bench.engines import choose_engine
from deploy.bench.hosts import RATES, Bench, HostsRun, Options
from deploy.hosts import parse_rate, require_root

WIDTH: Final = 150
"""Columns of a report into a file or a pipe."""


def across(
    rates: Sequence[str],
    seconds: float,
    rounds: int,
    size: int,
    engine: str,
    directory: Path,
    growth: bool,
    json_path: str | None,
    html_path: Path | None,
    from_path: Path | None,
) -> None:
    """Measure, or take an earlier run's JSON, and report."""
    if from_path is not None:
        run = _earlier(from_path)
    else:
        require_root("A measurement across hosts makes network namespaces: they")
        run = _measured(Options(_checked(rates) or RATES, seconds, rounds, size, growth, str(directory)), engine)
    if json_path == "-":
        print(run.to_json())
    else:
        console = Console()
        hosts_report.show(run, console if console.is_terminal else Console(width=WIDTH))
        if json_path:
            Path(json_path).write_text(run.to_json(), encoding="utf-8")
    if html_path is not None:
        html_path.write_text(hosts_report.render(run), encoding="utf-8")
    if not run.throughput:
        raise OperationFailed("Nothing could be measured:", hint=" ".join(run.failures))


def _checked(rates: Sequence[str]) -> tuple[str, ...]:
    try:
        return tuple(parse_rate(rate) or "unlimited" for rate in rates)
    except ValueError as error:
        raise ConfigError(f"--rate: {error}.") from None


def _measured(options: Options, engine: str) -> HostsRun:
    aside = Console(stderr=True)
    with aside.status("start", spinner="dots") as status:

        def progress(what: str) -> None:
            status.update(what)
            if not aside.is_terminal:
                print(what, file=sys.stderr, flush=True)

        return Bench(options, choose_engine(engine), progress).run()


def _earlier(path: Path) -> HostsRun:
    try:
        return HostsRun.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(f"{path} is not the JSON of an earlier run across hosts: {error}") from None
