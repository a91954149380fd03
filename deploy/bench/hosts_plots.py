"""The drawings of a run across hosts: SVG text for the HTML page. Ours are blue, the link by itself grey."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from common.limits import MIB
from deploy.bench import plots
from deploy.bench.hosts import GrowthSample, HostsRun, LatencySample, ThroughputSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RAW_TITLES: Final = {"tcp": "plain TCP", "zeromq": "plain ZeroMQ", "curve": "ZeroMQ with CURVE"}
AXES: Final = {"volumes": "volumes", "size": "disk size", "dirty": "dirty set"}
_GREY: Final = "#b4bac4"
_COLOURS: Final = {"tcp": "#6b7280", "zeromq": _GREY, "curve": _GREY, "async": "#6fa8f5", "sync": "#1f5fbf",
                   "alone": _GREY, "off": _GREY, "zstd": "#1f5fbf"}  # fmt: skip
_BAR_HEIGHT: Final = 0.2
"""Inches, with what is between two of them."""

Bar = tuple[str, float, str]
"""Name, length, colour."""


def title_of(sample: ThroughputSample | LatencySample) -> str:
    """``async, CURVE, 4 volumes``."""
    volumes = getattr(sample, "volumes", 1)
    parts = [sample.mode, "CURVE" if sample.curve else "plain", *([f"{volumes} volumes"] if volumes > 1 else [])]
    return ", ".join(parts)


def drawings(run: HostsRun) -> Iterator[str]:
    """HTML: a heading and a drawing of everything that was measured."""
    for heading, explanation, samples, draw in (
        ("Throughput", "What arrived at the other host, beside what the cable carries without us.", run.links, _links),
        ("Compression", "Of what was written; incompressible contents must not be slower.", run.compression,
         _compression),
        ("Latency", "One write of 4 KiB at a time.", run.latency, _latencies),
        ("Resync", "After a cut, until the pair is protected again.", run.resyncs, _resyncs),
        ("Growth", "Checkpoint and throughput above, CPU of both sides below.", run.growth, _growth),
    ):  # fmt: skip
        if samples:
            yield f"<h2>{heading}</h2><p class='quiet'>{explanation}</p>{draw(run)}"


def _links(run: HostsRun) -> str:
    """The link itself, then every kind of pair."""

    def bars(rate: str) -> list[Bar]:
        raw = [(RAW_TITLES[s.kind], s.mib_s, _COLOURS[s.kind]) for s in run.links if s.rate == rate]
        return raw + [(title_of(s), s.mib_s, _COLOURS[s.mode]) for s in run.throughput if s.rate == rate]

    return _panels([sample.rate for sample in run.links], bars, "MiB/s")


def _compression(run: HostsRun) -> str:
    def bars(rate: str) -> list[Bar]:
        chosen = [sample for sample in run.compression if sample.rate == rate]
        return [
            (f"{'compressible' if s.compressible else 'incompressible'}, {s.compression}", s.mib_s,
             _COLOURS[s.compression])
            for s in sorted(chosen, key=lambda s: (not s.compressible, s.compression))
        ]  # fmt: skip

    return _panels([sample.rate for sample in run.compression], bars, "MiB/s written")


def _latencies(run: HostsRun) -> str:
    """``none`` is the link of a primary that is alone: it stands beside every other."""

    def bars(rate: str) -> list[Bar]:
        return [(title_of(s), s.p50_us, _COLOURS[s.mode]) for s in run.latency if s.rate in (rate, "none")]

    return _panels([sample.rate for sample in run.latency if sample.rate != "none"], bars, "µs, median")


def _resyncs(run: HostsRun) -> str:
    def bars(rate: str) -> list[Bar]:
        raw = run.raw(rate, "tcp")
        ours = [("resync", sample.mib_s, _COLOURS["sync"]) for sample in run.resyncs if sample.rate == rate]
        return [(RAW_TITLES["tcp"], raw, _COLOURS["tcp"]), *ours] if raw else ours

    return _panels([sample.rate for sample in run.resyncs], bars, "MiB/s")


def _panels(rates: Sequence[str], bars: Callable[[str], list[Bar]], unit: str) -> str:
    """One panel a rate; where all have the same bars, their names stand at the left once."""
    shown = {rate: bars(rate) for rate in dict.fromkeys(rates)}
    alike = len({tuple(name for name, _, _ in each) for each in shown.values()}) == 1
    height = 0.7 + _BAR_HEIGHT * max(1, *map(len, shown.values()))
    with plots.drawing(height, 1, max(1, len(shown))) as (every, svg):
        for axes, (rate, each) in zip(every, shown.items(), strict=False):
            _horizontal(axes, each, unit, names=not alike or axes is every[0])
            axes.set_title(rate, loc="left")
        return svg()


def _horizontal(axes: Axes, bars: Sequence[Bar], unit: str, *, names: bool) -> None:
    for place, (_, value, colour) in enumerate(reversed(bars)):
        axes.barh(place, value, 0.75, color=colour)
        axes.text(value, place, f" {plots.short(value)}", va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in reversed(bars)] if names else [""] * len(bars),
                    fontsize=7)  # fmt: skip
    axes.margins(x=0.15)
    axes.set_xlabel(unit)


def _growth(run: HostsRun) -> str:
    """A column an axis: checkpoint and IOPS over it, CPU below. No CPU is taken over the dirty set."""
    with plots.drawing(4.6, 2, len(AXES)) as (every, svg):
        for number, axis in enumerate(AXES):
            samples = [sample for sample in run.growth if sample.axis == axis]
            above, below = every[number], every[number + len(AXES)]
            _line(above, samples, [sample.checkpoint_s * 1000 for sample in samples], "checkpoint, ms")
            if axis == "dirty":
                above.set_xlabel(_label(axis))
                below.set_visible(False)
                continue
            right = above.twinx()
            _line(right, samples, [sample.iops for sample in samples], "IOPS (orange)", "s--", "#d9691a")
            _line(below, samples, [sample.cpu_s_per_gib for sample in samples], "CPU s / GiB")
            below.set_xlabel(_label(axis))
        return svg()


def _label(axis: str) -> str:
    return AXES[axis] + ("" if axis == "volumes" else ", MiB")


def _line(
    axes: Axes, samples: Sequence[GrowthSample], values: Sequence[float], label: str, mark: str = "o-",
    colour: str = "#1f5fbf",
) -> None:  # fmt: skip
    at = [sample.value / (1 if sample.axis == "volumes" else MIB) for sample in samples]
    axes.plot(at, values, mark, color=colour, ms=4)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(label)
