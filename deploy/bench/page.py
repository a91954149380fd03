"""The run as one self-contained HTML file, read in a minute: headline, drawings, goals, then every figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from deploy.bench import plots, ratios, report
from deploy.bench.ratios import ASYNC, COLO, SYNC
from deploy.bench.results import Run
from deploy.bench.workloads import BY_NAME

_HEADLINES: Final = ("write-4k-d1", "write-4k-d32", "write-1m-d8", "read-4k-d32")

CSS: Final = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1f24; background: #fff; max-width: 1080px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; } p { margin: .3rem 0 .6rem; }
.quiet { color: #5d6470; font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.tile { border: 1px solid #dfe2e6; border-radius: 6px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.45rem; } .tile small { color: #5d6470; display: block; }
.legend span { display: inline-block; margin-right: 1.1rem; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px; }
table { border-collapse: collapse; font-size: .84rem; margin: .3rem 0 1rem; width: 100%; }
th { text-align: right; font-weight: 500; color: #5d6470; border-bottom: 1px solid #c9cdd3; padding: .2rem .5rem; }
td { text-align: right; padding: .18rem .5rem; border-bottom: 1px solid #eef0f2; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .left td, .left th, .text { text-align: left; padding-left: 0; }
.met { color: #17703a; font-weight: 600; } .missed { color: #b3261e; font-weight: 600; } .open { color: #5d6470; }
.warning { border-left: 4px solid #b3261e; padding: .2rem .8rem; background: #fdf1f0; }
svg { width: 100%; height: auto; } code { font-size: .8rem; word-break: break-all; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""


def render(run: Run) -> str:
    """The page as text; it refers to nothing outside itself."""
    parts = [
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'><title>tandemdisk bench</title>",
        f"<style>{CSS}</style></head><body>",
        *_head(run),
        *_tiles(run),
        *_legend(run),
        *_drawings(run),
        *_figures(run),
        *_surroundings(run),
        "</body></html>",
    ]
    return "\n".join(parts)


def _head(run: Run) -> Iterable[str]:
    options, around = run.options, run.environment
    sentences = (
        f"Disks of {int(options['size']) >> 20} MiB in memory, prefilled with incompressible data.",
        f"Rounds: {options['rounds']}, each job {options['seconds']:g} s on all peers in turn.",
        f"{around.get('CPUs', '?')} CPUs ({around.get('processor', '?')}), {around.get('kernel', '')},",
        f"load from {around.get('engine', '')}; the run took {run.seconds / 60:.0f} minutes.",
        "Figures are medians; ratios are taken between neighbours in the same round.",
    )
    yield "<h1>Replicated, and at what speed?</h1>"
    yield f"<p class='quiet'>{escape(' '.join(sentences))}</p>"
    for failure in run.failures:
        yield f"<p class='warning'>{escape(failure)}</p>"


def _tiles(run: Run) -> Iterable[str]:
    yield "<div class='tiles'>"
    for job in _HEADLINES:
        done = ratios.spread(run, job, ASYNC, ratios.iops) or ratios.spread(run, job, SYNC, ratios.iops)
        if done is None:
            continue
        lines = [
            f"{mode} {done_by.median:,.0f} IOPS" + _against(run, job, peer)
            for mode, peer in (("sync", SYNC), ("async", ASYNC))
            if (done_by := ratios.spread(run, job, peer, ratios.iops))
        ]
        small = "".join(f"<small>{line}</small>" for line in lines)
        yield f"<div class='tile'>{escape(BY_NAME[job].title)}<b>{plots.short(done.median)} IOPS</b>{small}</div>"
    ours = ratios.checkpoint_curve(run, SYNC, sizes=False)
    if ours:
        middle = list(ours)[len(ours) // 2]
        others = [
            curve[middle].median
            for name in COLO
            if middle in (curve := ratios.checkpoint_curve(run, name, sizes=False))
        ]
        small = f"<small>QEMU COLO {report.duration(min(others))}</small>" if others else ""
        dirty = middle * 100 // int(run.options["size"])
        yield f"<div class='tile'>checkpoint, {dirty} % dirty<b>{report.duration(ours[middle].median)}</b>{small}</div>"
    yield "</div>"


def _against(run: Run, job: str, peer: str) -> str:
    shown = []
    for label, others in (("QEMU COLO", COLO), ("qemu-nbd", ("qemu-nbd",)), ("nbdkit", ("nbdkit",))):
        found = ratios.ratio(run, job, peer, others, ratios.iops)
        if found:
            shown.append(f"{found.median:.1f}x {label}")
    return f": {', '.join(shown)}" if shown else ""


def _legend(run: Run) -> Iterable[str]:
    entries = (
        f"<span><i style='background:{plots.COLOURS[facts.name]}'></i>{escape(facts.title)}</span>"
        for facts in run.peers
    )
    yield f"<p class='legend'>{''.join(entries)}</p>"


def _drawings(run: Run) -> Iterable[str]:
    jobs = report.jobs_of(run)
    if jobs:
        yield _heading("Throughput", "Requests per second; whiskers: slowest and fastest round.")
        yield plots.throughput(run, jobs)
        yield from _goals(run)
        yield _heading("Latency", "From request to reply: ● half of the requests, | 99 %, × 99.9 % are faster.")
        yield plots.latency(run, jobs)
        yield _heading("CPU", "Seconds of all server processes together for each GiB moved; lower is better.")
        yield plots.cpu(run, jobs)
    if run.checkpoints:
        yield _heading("Checkpoint latency", "From the command to its answer, every write applied before.")
        yield plots.checkpoints(run)


def _heading(title: str, explanation: str) -> str:
    return f"<h2>{title}</h2><p class='quiet'>{explanation}</p>"


def _goals(run: Run) -> Iterable[str]:
    found = [goal for goal in ratios.goals(run, report.job_title) if goal.reached is not None]
    if not found:
        return
    met = sum(1 for goal in found if goal.met)
    yield f"<h2>Goals: {met} of {len(found)} met</h2>"
    rows = []
    for goal in found:
        *cells, result = map(escape, report.goal_row(goal))
        rows.append([*cells, f"<span class='{'met' if goal.met else 'missed'}'>{result}</span>"])
    yield table(report.GOAL_COLUMNS, rows)


def _figures(run: Run) -> Iterable[str]:
    yield "<h2>Every figure</h2>"
    for job in report.jobs_of(run):
        yield f"<p><b>{escape(report.job_title(job))}</b></p>"
        yield table(report.job_columns(run), [[escape(cell) for cell in row] for row in report.job_rows(run, job)])
    rows = [[escape(cell) for cell in row] for row in report.operation_rows(run)]
    if rows:
        yield "<p><b>Single operations</b></p>"
        yield table(["", "", "median", "range"], rows)
    yield "<p><b>Memory, MiB</b> (the most that a process ever held; shared: what of it is in memory files)</p>"
    yield table(
        ["", "process", "peak", "private", "shared"],
        [[escape(cell) for cell in row] for row in report.memory_rows(run)],
    )
    yield "<p><b>CPU seconds a GiB, of each process</b></p>"
    yield table(report.cpu_columns(run), [[escape(cell) for cell in row] for row in report.cpu_rows(run)])
    for facts in run.peers:
        if facts.bounds:
            yield f"<p class='quiet'>{escape(facts.title)}: {escape(facts.bounds)}</p>"


def _surroundings(run: Run) -> Iterable[str]:
    yield "<h2>Measured on</h2><table class='left'>"
    for name, value in run.environment.items():
        yield f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
    yield "</table>"
    for facts in run.peers:
        if facts.commands:
            lines = "<br>".join(f"<code>{escape(command)}</code>" for command in facts.commands)
            yield f"<details><summary>{escape(facts.title)}: command lines</summary>{lines}</details>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """``rows`` are HTML already."""
    # Columns without a heading hold words.
    kinds = ["<td>" if column else "<td class='text'>" for column in columns]
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'{kind}{cell}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
