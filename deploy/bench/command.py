"""`tandemdisk bench`: the options, and what becomes of a run's results."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from common.errors import ConfigError, OperationFailed
from common.limits import KIB, MIB
from deploy.interrupts import unwinding

if TYPE_CHECKING:
    from deploy.bench.hosts import Options as HostsOptions

_UNITS = {"": 1, "K": KIB, "M": MIB, "G": KIB * MIB}
_LEAST_SIZE = 64 * MIB
_SIZE = "1G"
_SIZE_ACROSS = "256M"
_SIZE_SHORT = "64M"
_NOT_ACROSS = {
    "peers": "--peer", "only": "--only", "jobs": "--job", "limit": "--limit", "no_probes": "--no-probes",
    "hot_path": "--hot-path", "heart": "--heart", "way_back": "--resync",
}  # fmt: skip
"""Options that mean nothing across hosts, by parameter."""


def parse_size(text: str) -> int:
    """Bytes in ``512M``, ``1G`` or ``1073741824``; click.BadParameter for anything else or below 64 MiB."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not digits.isdecimal() or unit not in _UNITS:
        raise click.BadParameter(f"{text!r} is not a size such as 512M or 1G.")
    size = int(digits) * _UNITS[unit]
    if size < _LEAST_SIZE or size % MIB:
        raise click.BadParameter(f"The size must be a whole number of MiB and at least {_LEAST_SIZE // MIB}M.")
    return size


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


@click.command("bench")
@click.option(
    "--peer",
    "peers",
    metavar="NAMES",
    help="Measure these too: qemu-colo (both its cases), qemu-nbd, nbdkit; with commas.",
)
@click.option("--only", metavar="NAMES", help="Measure these and nothing else, for instance tandemdisk-sync,nbdkit.")
@click.option("--job", "jobs", metavar="NAMES", help="Only these jobs (see --list); default: all.")
@click.option(
    "--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Rounds over all jobs and peers."
)
@click.option("--seconds", type=click.FloatRange(0.2, 600), default=3.0, show_default=True, help="Length of each job.")
@click.option("--size", metavar="SIZE", help="Size of each disk.  [default: 1G; with --hosts 256M]")
@click.option(
    "--engine",
    type=click.Choice(["auto", "fio", "built-in"]),
    default="auto",
    show_default=True,
    help="What makes the load.",
)
@click.option("--no-probes", is_flag=True, help="Leave out checkpoint latency over dirty set and size, and failover.")
@click.option(
    "--limit",
    type=click.FloatRange(1, 600),
    default=45.0,
    show_default=True,
    help="Minutes after which nothing new begins.",
)
@click.option(
    "--directory", type=click.Path(path_type=Path), default=Path("/dev/shm"), show_default=True,
    help="Memory file system for disks and buffers.",
)  # fmt: skip
@click.option(
    "--json",
    "json_path",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Every sample as JSON, on standard output or into a file.",
)
@click.option(
    "--html", "html_path", type=click.Path(path_type=Path), metavar="FILE",
    help="Write the report as one HTML file; with --hosts both reports are written, by default here.",
)
@click.option(
    "--from",
    "from_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measure nothing: report on an earlier run's JSON.",
)
@click.option("--list", "listing", is_flag=True, help="Say which jobs and peers there are.")
@click.option(
    "--hosts", type=click.Choice(["netns"]), help="Instead: across a network, between two network namespaces (root)."
)
@click.option(
    "--rate", "rates", multiple=True, metavar="RATE",
    help="With --hosts: what the cable carries, once or more often; default: 100mbit, 1gbit, unlimited.",
)
@click.option("--no-growth", is_flag=True, help="With --hosts: leave out how cost grows.")
@click.option("--short", is_flag=True, help="With --hosts: two kinds of pair, compression, no growth: seconds.")
@click.option("--markdown", is_flag=True, help="With --hosts: print the tables as Markdown.")
@click.option("--hot-path", is_flag=True, help="Instead: where each microsecond of a request goes, step by step.")
@click.option("--heart", is_flag=True, help="Instead: copy-before-write, reads, checkpoints, failover by themselves.")
@click.option(
    "--resync", "way_back", is_flag=True,
    help="Instead: resyncs beside the raw stream and nbdcopy; what the write-intent bitmap costs.",
)
@click.option(
    "--disk-directory", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="DIR",
    help="With --resync: on a real disk, for what the write-intent bitmap costs; default: the temporary directory.",
)  # fmt: skip
def bench(
    peers: str | None,
    only: str | None,
    jobs: str | None,
    rounds: int,
    seconds: float,
    size: str | None,
    engine: str,
    no_probes: bool,
    limit: float,
    directory: Path,
    json_path: str | None,
    html_path: Path | None,
    from_path: Path | None,
    listing: bool,
    hosts: str | None,
    rates: tuple[str, ...],
    no_growth: bool,
    short: bool,
    markdown: bool,
    hot_path: bool,
    heart: bool,
    way_back: bool,
    disk_directory: Path | None,
) -> None:
    """Measure this machine's pair, beside others if asked, in alternating rounds.

    Everything happens in a directory of its own on a memory file system and is removed at the end.
    """
    from deploy.bench import plots
    from deploy.bench.peers import OURS, expand
    from deploy.bench.runner import Options

    if listing:
        _list()
        return
    if hosts is not None:
        from deploy.bench.hosts_command import across

        _refuse_beside_hosts()
        measured = _across(rates, seconds, rounds, size, directory, growth=not no_growth, short=short)
        with unwinding():
            across(measured, engine, json_path, html_path, from_path, markdown=markdown)
        return
    if rates or no_growth or short or markdown:
        raise ConfigError(
            "--rate, --no-growth, --short and --markdown belong to a run across hosts.",
            hint="Give --hosts netns with them.",
        )
    if way_back:
        _way_back(directory, disk_directory, parse_size(_SIZE if size is None else size), rounds, engine, json_path)
        return
    if disk_directory is not None:
        raise ConfigError("--disk-directory is for --resync.", hint="--directory is where all other disks are.")
    if heart or hot_path:
        _steps(directory, json_path, heart=heart)
        return
    if html_path is not None:
        plots.require_matplotlib()
    if from_path is not None:
        _report_on(from_path, json_path, html_path)
        return
    options = Options(
        peers=expand(_names(only) or [*OURS, *_names(peers)]),
        jobs=_chosen(jobs),
        rounds=rounds,
        seconds=seconds,
        size=parse_size(_SIZE if size is None else size),
        directory=str(directory),
        limit_s=limit * 60,
        probes=not no_probes,
    )
    _measure(options, engine, json_path, html_path)


def _refuse_beside_hosts() -> None:
    """ConfigError that names the options that were given and that a run across hosts would ignore."""
    if given := [option for name, option in _NOT_ACROSS.items() if _was_given(name)]:
        raise ConfigError(f"A run across hosts has no {', '.join(given)}.", hint="Leave --hosts or the others out.")


def _across(
    rates: tuple[str, ...], seconds: float, rounds: int, size: str | None, directory: Path, *, growth: bool, short: bool
) -> HostsOptions:
    """What to measure across hosts; what was said stands, whatever ``short`` would choose."""
    from deploy.bench import hosts
    from deploy.bench.hosts_command import checked

    bytes_each = parse_size(size if size is not None else _SIZE_SHORT if short else _SIZE_ACROSS)
    options = hosts.Options(checked(rates) or hosts.RATES, seconds, rounds, bytes_each, growth, str(directory))
    if not short:
        return options
    return hosts.short(
        options, seconds=seconds if _was_given("seconds") else None, rounds=rounds if _was_given("rounds") else None
    )


def _was_given(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def _chosen(names: str | None) -> tuple[str, ...]:
    """The jobs of ``--job``, or all, in their own order; ConfigError names those that do not exist."""
    from deploy.bench.workloads import JOBS

    known = [job.name for job in JOBS]
    chosen = _names(names) or known
    if unknown := [name for name in chosen if name not in known]:
        raise ConfigError("Unknown jobs:", problems=tuple(unknown), hint="tandemdisk bench --list names them.")
    return tuple(name for name in known if name in chosen)


def _way_back(
    directory: Path, disk_directory: Path | None, size: int, rounds: int, engine: str, json_path: str | None
) -> None:
    from rich.console import Console

    from deploy.bench import wayback

    options = wayback.Options(directory, size, rounds=rounds, engine=engine)
    if disk_directory is not None:
        options = replace(options, disk_directory=disk_directory)
    with unwinding():
        wayback.show(Console(), options, json_path)


def _steps(directory: Path, json_path: str | None, *, heart: bool) -> None:
    """``--heart``, or else ``--hot-path``: measurements of their own, each with its own tables."""
    from rich.console import Console

    from deploy.bench.heart import show_heart
    from deploy.bench.hotpath import show_hot_path

    with unwinding():
        if heart:
            show_heart(json_path)
        else:
            show_hot_path(Console(), directory)


def _measure(options: object, engine: str, json_path: str | None, html_path: Path | None) -> None:
    from rich.console import Console

    from deploy.bench.engines import choose_engine
    from deploy.bench.runner import Options, Runner

    assert isinstance(options, Options)
    aside = Console(stderr=True)
    with unwinding(), aside.status("start", spinner="dots") as status:

        def progress(what: str) -> None:
            status.update(what)
            if not aside.is_terminal:
                print(what, file=sys.stderr, flush=True)

        run = Runner(options, choose_engine(engine), progress).run()
    _write(run.to_json(), run, json_path, html_path)
    if not run.samples:
        raise OperationFailed("Nothing could be measured:", hint=" ".join(run.failures))


def _report_on(path: Path, json_path: str | None, html_path: Path | None) -> None:
    from deploy.bench.results import Run

    try:
        text = path.read_text(encoding="utf-8")
        run = Run.from_json(text)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(f"{path} is not the JSON of an earlier run: {error}") from None
    _write(text, run, json_path, html_path)


def _write(text: str, run: object, json_path: str | None, html_path: Path | None) -> None:
    from rich.console import Console

    from deploy.bench import page, report
    from deploy.bench.results import Run

    assert isinstance(run, Run)
    if json_path == "-":
        print(text)
    else:
        console = Console()
        # Into a file or a pipe, lines may be as long as they are.
        report.show(run, console if console.is_terminal else Console(width=report.ROOM_FOR_RANGES))
        if json_path:
            Path(json_path).write_text(text, encoding="utf-8")
    if html_path is not None:
        html_path.write_text(page.render(run), encoding="utf-8")


def _list() -> None:
    from deploy.bench.peers import GROUPS, PEERS, make_peer
    from deploy.bench.workloads import JOBS

    click.echo("Jobs:")
    for job in JOBS:
        click.echo(f"  {job.name:18} {job.title}")
    click.echo("Peers:")
    for name in PEERS:
        click.echo(f"  {name:18} {make_peer(name).title}")
    for name, members in GROUPS.items():
        click.echo(f"  {name:18} {' and '.join(members)}")
