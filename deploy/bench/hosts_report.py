"""The run across hosts as tables for a terminal and as one HTML page: what the link carries, and what of it we use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from rich.console import Console
from rich.table import Table

from common.config import format_size
from deploy.bench import hosts_plots, page
from deploy.bench.hosts import HostsRun, ThroughputSample
from deploy.bench.hosts_plots import AXES, RAW_TITLES, title_of
from deploy.bench.report import duration

WANTED_SHARE: Final = 0.95
"""Of plain TCP, for async replication on a link that limits it."""
NOT_SLOWER: Final = 0.95
"""What compression must reach of the rate without it, whatever is written."""
NO_DRAWINGS: Final = "Tables only: pip install 'tandemdisk[bench]' brings the plots (matplotlib)."

Rows = list[tuple[str, ...]]
Section = tuple[str, list[str], Rows]


def sections(run: HostsRun) -> Iterator[Section]:
    """(title, columns, rows) of every table."""
    rates = list(dict.fromkeys(sample.rate for sample in run.links))
    rows: Rows = [
        (RAW_TITLES[kind], *(f"{run.raw(rate, kind):,.1f}" for rate in rates))
        for kind in dict.fromkeys(sample.kind for sample in run.links)
    ]
    for name in dict.fromkeys(title_of(sample) for sample in run.throughput):
        by_rate = {sample.rate: sample for sample in run.throughput if title_of(sample) == name}
        rows.append((name, *(_throughput(by_rate.get(rate)) for rate in rates)))
    if rows:
        yield "what arrived at the other host, MiB/s (share of plain TCP; CPU s/GiB of both sides)", ["", *rates], rows
    if run.compression:
        title = "wire compression, async, CURVE: written MiB/s (ratio on the wire; CPU s/GiB of both sides)"
        yield title, ["", *rates], _compression_rows(run, rates)
    if run.latency:
        yield "one write of 4 KiB at a time", ["", *rates], _latency_rows(run, rates)
    if run.resyncs:
        rows = [
            (sample.rate, format_size(sample.dirty_bytes), duration(sample.seconds), f"{sample.mib_s:,.1f}",
             f"{sample.share:.0%}")
            for sample in run.resyncs
        ]  # fmt: skip
        yield "resync after a cut (CURVE)", ["link", "dirty", "until protected", "MiB/s", "of plain TCP"], rows
    if run.growth:
        yield (
            "how cost grows (sync, CURVE, unlimited link, random 4 KiB, 32 in flight in all)",
            ["", "", "IOPS", "CPU s/GiB", "checkpoint"],
            [
                (AXES[sample.axis], str(sample.value) if sample.axis == "volumes" else format_size(sample.value),
                 f"{sample.iops:,.0f}" if sample.axis != "dirty" else "",
                 f"{sample.cpu_s_per_gib:.2f}" if sample.cpu_s_per_gib else "", duration(sample.checkpoint_s))
                for sample in run.growth
            ],
        )  # fmt: skip


def _throughput(sample: ThroughputSample | None) -> str:
    if sample is None:
        return "–"
    return f"{sample.mib_s:,.1f} ({sample.share:.0%}; {sample.cpu_s_per_gib:.1f})"


def _compression_rows(run: HostsRun, rates: Sequence[str]) -> Rows:
    rows: Rows = []
    for compressible in (True, False):
        for setting in dict.fromkeys(sample.compression for sample in run.compression):
            found = {sample.rate: sample for sample in run.compression
                     if (sample.compression, sample.compressible) == (setting, compressible)}  # fmt: skip
            name = f"{'compressible' if compressible else 'incompressible'}, {setting}"
            rows.append((name, *(
                f"{s.mib_s:,.1f} ({s.ratio:.1f} : 1; {s.cpu_s_per_gib:.1f})" if (s := found.get(rate)) else "–"
                for rate in rates
            )))  # fmt: skip
    return rows


def _latency_rows(run: HostsRun, rates: Sequence[str]) -> Rows:
    rows: Rows = []
    alone = {sample.curve: sample for sample in run.latency if sample.mode == "alone"}
    for sample in alone.values():
        if sample.curve or len(alone) == 1:
            rows.append(("alone, p50 / p99", *([f"{_us(sample.p50_us)} / {_us(sample.p99_us)}"] * len(rates))))
    paired = [sample for sample in run.latency if sample.mode != "alone"]
    for name in dict.fromkeys(title_of(sample) for sample in paired):
        by_rate = {sample.rate: sample for sample in paired if title_of(sample) == name}
        rows.append((f"{name}, p50 / p99", *(
            f"{_us(found.p50_us)} / {_us(found.p99_us)}" if (found := by_rate.get(rate)) else "–" for rate in rates
        )))  # fmt: skip
        base = alone.get(next(iter(by_rate.values())).curve)
        if base is not None:
            rows.append(("    added to a write alone, p50", *(
                _us(found.p50_us - base.p50_us) if (found := by_rate.get(rate)) else "–" for rate in rates
            )))  # fmt: skip
    return rows


def _us(value: float) -> str:
    return f"-{duration(-value / 1e6)}" if value < 0 else duration(value / 1e6)


def goals(run: HostsRun) -> list[tuple[str, bool]]:
    """(sentence, whether it holds): async on every limited link, compression on every link."""
    met = [
        (
            f"{title_of(sample)} at {sample.rate}: {sample.share:.1%} of plain TCP, wanted at least {WANTED_SHARE:.0%}",
            sample.share >= WANTED_SHARE,
        )
        for sample in run.throughput
        if sample.mode == "async" and sample.rate != "unlimited" and sample.share
    ]
    for zstd in (sample for sample in run.compression if sample.compression != "off"):
        off = next((sample.mib_s for sample in run.compression if sample.compression == "off"
                    and (sample.rate, sample.compressible) == (zstd.rate, zstd.compressible)), 0.0)  # fmt: skip
        if off:
            what = "compressible" if zstd.compressible else "incompressible"
            sentence = f"zstd at {zstd.rate}, {what} contents: {zstd.mib_s / off:.2f} times the rate without"
            met.append((f"{sentence}, wanted at least {NOT_SLOWER:.2f}", zstd.mib_s / off >= NOT_SLOWER))
    return met


def show(run: HostsRun, console: Console) -> None:
    """Everything, as tables."""
    for title, columns, rows in sections(run):
        # A title of the table itself would wrap at the width of its columns.
        console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
        table = Table(header_style="dim", box=None)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 or not column else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for sentence, met in goals(run):
        console.print(f"[{'green' if met else 'red'}]{'met' if met else 'not met'}[/]  {sentence}", highlight=False)
    for failure in run.failures:
        console.print(f"[bold red]![/] {failure}", highlight=False, soft_wrap=True)


def render(run: HostsRun, *, drawings: bool = True) -> str:
    """The HTML page; it refers to nothing outside itself. ``drawings`` need matplotlib; the tables say it all."""
    options = run.options
    parts = [
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'><title>tandemdisk bench --hosts</title>",
        f"<style>{page.CSS}</style></head><body>",
        "<h1>Across a network, and at what speed?</h1>",
        "<p class='quiet'>Two network namespaces, one veth cable limited by tbf; "
        f"disks of {options['size'] >> 20} MiB in memory, loads of {options['seconds']:g} s; "
        f"rates are those of payload at the receiver. The run took {run.seconds / 60:.1f} minutes.</p>",
        *(f"<p class='warning'>{escape(failure)}</p>" for failure in run.failures),
        "<ul>" + "".join(
            f"<li class='{'met' if met else 'missed'}'>{escape(sentence)}</li>" for sentence, met in goals(run)
        ) + "</ul>",
        *(hosts_plots.drawings(run) if drawings else [f"<p class='quiet'>{escape(NO_DRAWINGS)}</p>"]),
        "<h2>Every figure</h2>",
    ]  # fmt: skip
    for title, columns, rows in sections(run):
        parts.append(f"<p><b>{escape(title)}</b></p>")
        parts.append(page.table(columns, [[escape(cell) for cell in row] for row in rows]))
    facts = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in run.environment.items())
    parts.append(f"<h2>Measured on</h2><table class='left'>{facts}</table></body></html>")
    return "\n".join(parts)
