"""`tandemdisk bench --hosts netns`: from options to a report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from rich.console import Console

from common.errors import ConfigError, OperationFailed
from deploy.bench import hosts_markdown, hosts_report
from deploy.bench.engines import choose_engine
from deploy.bench.hosts import Bench, HostsRun, Options
from deploy.hosts import parse_rate, require_root

WIDTH: Final = 150
"""Columns of a report into a file or a pipe."""
JSON: Final = "tandemdisk-hosts.json"
HTML: Final = Path("tandemdisk-hosts.html")
"""Where the reports of a measurement go unless other paths are given: a run takes minutes, and its figures are kept."""


def across(
    options: Options,
    engine: str,
    json_path: str | None,
    html_path: Path | None,
    from_path: Path | None,
    *,
    markdown: bool = False,
) -> None:
    """Measure, or take an earlier run's JSON, and report: tables, and files whose paths are said.

    A measurement always leaves both files; a report on an earlier run writes what is asked for.
    """
    if from_path is not None:
        run = _earlier(from_path)
    else:
        require_root("A measurement across hosts makes network namespaces: they", hint="Give the command with sudo.")
        json_path, html_path = json_path or JSON, html_path or HTML
        require_writable(*([] if json_path == "-" else [Path(json_path)]), html_path)
        run = _measured(options, engine)
    if json_path == "-":
        print(run.to_json())
    elif markdown:
        print(hosts_markdown.tables(run))
    else:
        console = Console()
        hosts_report.show(run, console if console.is_terminal else Console(width=WIDTH))
    _write(run, None if json_path == "-" else json_path, html_path)
    if not run.throughput:
        raise OperationFailed("Nothing could be measured:", hint=" ".join(run.failures))


def checked(rates: Sequence[str]) -> tuple[str, ...]:
    """``rates`` as the report names them. ConfigError for one that is none."""
    try:
        return tuple(dict.fromkeys(parse_rate(rate) or "unlimited" for rate in rates))
    except ValueError as error:
        raise ConfigError(f"--rate: {error}.") from None


def require_writable(*paths: Path) -> None:
    """OSError that names the file, before a long run instead of after it."""
    for path in paths:
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()


def _write(run: HostsRun, json_path: str | None, html_path: Path | None) -> None:
    """The files; what was written is said on stderr, so that stdout is the tables and nothing else."""
    written = []
    if json_path is not None:
        Path(json_path).write_text(run.to_json(), encoding="utf-8")
        written.append(str(json_path))
    if html_path is not None:
        drawings = find_spec("matplotlib") is not None
        html_path.write_text(hosts_report.render(run, drawings=drawings), encoding="utf-8")
        written.append(str(html_path))
        if not drawings:
            print(f"{html_path}: {hosts_report.NO_DRAWINGS}", file=sys.stderr)
    if written:
        print(f"Written: {', '.join(written)}", file=sys.stderr)


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
