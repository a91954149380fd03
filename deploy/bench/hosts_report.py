"""The run across hosts as tables for a terminal and as one HTML page: what the link carries, and what of it we use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

from common.config import format_size
from deploy.bench import page, plots
from deploy.bench.hosts import HostsRun, LatencySample, ThroughputSample
from deploy.bench.report import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WANTED_SHARE: Final = 0.95
"""Of plain TCP, for async replication on a link that limits it."""
NOT_SLOWER: Final = 0.95
"""What compression must reach of the rate without it, whatever is written."""
RAW_TITLES: Final = {"tcp": "plain TCP", "zeromq": "plain ZeroMQ", "curve": "ZeroMQ with CURVE"}
_COLOURS: Final = {"tcp": "#6b7280", "zeromq": "#b4bac4", "async": "#6fa8f5", "sync": "#1f5fbf", "alone": "#b4bac4"}
_AXES: Final = {"volumes": "volumes", "size": "disk size", "dirty": "dirty set"}

Rows = list[tuple[str, ...]]
Section = tuple[str, list[str], Rows]


def title_of(sample: ThroughputSample | LatencySample) -> str:
    """``async, CURVE, 4 volumes``."""
    volumes = getattr(sample, "volumes", 1)
    parts = [sample.mode, "CURVE" if sample.curve else "plain", *([f"{volumes} volumes"] if volumes > 1 else [])]
    return ", ".join(parts)


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
                (_AXES[sample.axis], str(sample.value) if sample.axis == "volumes" else format_size(sample.value),
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
        table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 or not column else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for sentence, met in goals(run):
        console.print(f"[{'green' if met else 'red'}]{'met' if met else 'not met'}[/]  {sentence}", highlight=False)
    for failure in run.failures:
        console.print(f"[bold red]![/] {failure}", highlight=False, soft_wrap=True)


def render(run: HostsRun) -> str:
    """The HTML page; it refers to nothing outside itself."""
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
        "<h2>Throughput</h2>" + _bars(run) if run.links else "",
        "<ul>" + "".join(
            f"<li class='{'met' if met else 'missed'}'>{escape(sentence)}</li>" for sentence, met in goals(run)
        ) + "</ul>",
        "<h2>Latency</h2>" + _latencies(run) if run.latency else "",
        "<h2>Growth</h2>" + _growth(run) if run.growth else "",
        "<h2>Every figure</h2>",
    ]  # fmt: skip
    for title, columns, rows in sections(run):
        parts.append(f"<p><b>{escape(title)}</b></p>")
        parts.append(page.table(columns, [[escape(cell) for cell in row] for row in rows]))
    facts = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in run.environment.items())
    parts.append(f"<h2>Measured on</h2><table class='left'>{facts}</table></body></html>")
    return "\n".join(parts)


def _bars(run: HostsRun) -> str:
    """One panel a rate; bars: the link itself, then every kind of pair."""
    rates = list(dict.fromkeys(sample.rate for sample in run.links))
    with plots.drawing(2.6, 1, len(rates)) as (every, svg):
        for axes, rate in zip(every, rates, strict=True):
            bars = [(RAW_TITLES[s.kind], s.mib_s, _COLOURS.get(s.kind, "#b4bac4")) for s in run.links if s.rate == rate]
            bars += [(title_of(s), s.mib_s, _COLOURS[s.mode]) for s in run.throughput if s.rate == rate]
            _horizontal(axes, bars, "MiB/s", axes is every[0])
            axes.set_title(rate, loc="left")
        return svg()


def _latencies(run: HostsRun) -> str:
    rates = [rate for rate in dict.fromkeys(sample.rate for sample in run.latency) if rate != "none"]
    with plots.drawing(2.2, 1, len(rates)) as (every, svg):
        for axes, rate in zip(every, rates, strict=True):
            chosen = [s for s in run.latency if s.rate in (rate, "none")]
            bars = [(title_of(s), s.p50_us, _COLOURS[s.mode]) for s in chosen]
            _horizontal(axes, bars, "µs, median", axes is every[0])
            axes.set_title(rate, loc="left")
        return svg()


def _horizontal(axes: Axes, bars: Sequence[tuple[str, float, str]], unit: str, names: bool) -> None:
    """``names``: at the left; panels beside this one have the same bars."""
    for place, (_, value, colour) in enumerate(reversed(bars)):
        axes.barh(place, value, 0.75, color=colour)
        axes.text(value, place, f" {plots.short(value)}", va="center", fontsize=7)
    if names:
        axes.set_yticks(range(len(bars)), [name for name, _, _ in reversed(bars)], fontsize=7)
    else:
        axes.set_yticks([])
    axes.margins(x=0.15)
    axes.set_xlabel(unit)


def _growth(run: HostsRun) -> str:
    with plots.drawing(2.6, 1, 3) as (every, svg):
        for axes, axis in zip(every, _AXES, strict=True):
            samples = [sample for sample in run.growth if sample.axis == axis]
            at = [sample.value / (1 if axis == "volumes" else 1 << 20) for sample in samples]
            axes.plot(at, [sample.checkpoint_s * 1000 for sample in samples], "o-", color="#1f5fbf", ms=4)
            axes.set_ylim(bottom=0)
            axes.set_xlabel(_AXES[axis] + ("" if axis == "volumes" else ", MiB"))
            axes.set_ylabel("checkpoint, ms")
            if axis != "dirty":
                right = axes.twinx()
                right.plot(at, [sample.iops for sample in samples], "s--", color="#d9691a", ms=4)
                right.set_ylim(bottom=0)
                right.set_ylabel("IOPS (orange)")
        return svg()
