"""The run across hosts as the two tables of README.md: `tandemdisk bench --hosts netns --markdown`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

from common.config import format_size
from deploy.bench.hosts import CompressionSample, HostsRun, LatencySample, ThroughputSample
from deploy.bench.report import duration

S = TypeVar("S")

_UNITS: Final = {"k": "kbit/s", "m": "Mbit/s", "g": "Gbit/s"}
_NAMES: Final = {"volumes": "{} volumes", "size": "a disk of {}", "dirty": "a dirty set of {}"}
_NUMBERS: Final = {1: "one", 2: "two", 4: "four", 8: "eight"}
_NONE: Final = "–"


def tables(run: HostsRun) -> str:
    """Markdown: what arrived over each link, then how cost grows."""
    rates = list(dict.fromkeys(sample.rate for sample in run.links))
    rows = [*_links(run, rates), *_throughput(run, rates), *_compression(run, rates), *_resync(run, rates)]
    parts = [_table(["", *map(_rate_title, rates)], [*rows, *_latency(run, rates)])]
    if run.growth:
        parts.append(_table(["", "4 KiB writes a second", "CPU seconds a GiB", "checkpoint"], _growth(run)))
    return "\n\n".join(parts)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, *rows]
    first, *others = ("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)
    return "\n".join([first, "|" + "---|" * len(columns), *others])


def _rate_title(rate: str) -> str:
    """``100mbit`` → ``100 Mbit/s``."""
    return f"{rate[:-4]} {_UNITS[rate[-4]]}" if rate.endswith("bit") else rate


def _links(run: HostsRun, rates: Sequence[str]) -> Iterator[list[str]]:
    yield ["plain TCP", *(_mib(run.raw(rate, "tcp")) for rate in rates)]
    yield ["plain ZeroMQ; with CURVE", *(_pair(run.raw(rate, "zeromq"), run.raw(rate, "curve")) for rate in rates)]


def _throughput(run: HostsRun, rates: Sequence[str]) -> Iterator[list[str]]:
    def cell(found: ThroughputSample) -> str:
        return _of_link(found.mib_s, found.share)

    def kind(sample: ThroughputSample) -> tuple[str, bool, int]:
        return sample.mode, sample.curve, sample.volumes

    for mode, curve, volumes in sorted(dict.fromkeys(map(kind, run.throughput))):
        chosen = {s.rate: s for s in run.throughput if kind(s) == (mode, curve, volumes)}
        words = [mode, *(["CURVE"] if curve else []), *([f"{_number(volumes)} volumes"] if volumes > 1 else [])]
        yield [", ".join(words), *_cells(chosen.get, rates, cell)]


def _compression(run: HostsRun, rates: Sequence[str]) -> Iterator[list[str]]:
    found: dict[tuple[str, str, bool], CompressionSample] = {
        (sample.rate, sample.compression, sample.compressible): sample for sample in run.compression
    }
    if not found:
        return
    for compressible, words in (
        (True, "async, CURVE, contents that compress to a third: off; `zstd`"),
        (False, "the same, contents that do not compress: off; `zstd`"),
    ):
        each = ([found.get((rate, setting, compressible)) for setting in ("off", "zstd")] for rate in rates)
        yield [words, *(_pair(*(sample.mib_s if sample else 0.0 for sample in both)) for both in each)]


def _resync(run: HostsRun, rates: Sequence[str]) -> Iterator[list[str]]:
    if run.resyncs:
        found = {sample.rate: sample for sample in run.resyncs}
        yield ["resync after a cut, CURVE", *_cells(found.get, rates, lambda s: _of_link(s.mib_s, s.share))]


def _latency(run: HostsRun, rates: Sequence[str]) -> Iterator[list[str]]:
    """What each mode adds to the write of a primary that is alone."""
    alone = {sample.curve: sample.p50_us for sample in run.latency if sample.mode == "alone"}
    for curve, base in sorted(alone.items()):
        for mode in ("sync", "async"):
            found = {s.rate: s for s in run.latency if (s.mode, s.curve) == (mode, curve)}

            def added(sample: LatencySample, base: float = base) -> str:
                return f"{round(sample.p50_us - base)} µs"

            if found:
                what = f"a write of 4 KiB{', CURVE' if curve else ''}"
                words = f"{what}: added by {mode} (p50; alone {base:.0f} µs)"
                yield [words, *_cells(found.get, rates, added)]


def _growth(run: HostsRun) -> Iterator[list[str]]:
    for sample in run.growth:
        value = _number(sample.value) if sample.axis == "volumes" else format_size(sample.value)
        name = "one volume" if (sample.axis, sample.value) == ("volumes", 1) else _NAMES[sample.axis].format(value)
        # the load over the dirty set is sequential, and another one than that of the other rows
        load = (_NONE, _NONE) if sample.axis == "dirty" else (f"{sample.iops:,.0f}", f"{sample.cpu_s_per_gib:.1f}")
        yield [name, *load, duration(sample.checkpoint_s)]


def _cells(found: Callable[[str], S | None], rates: Sequence[str], cell: Callable[[S], str]) -> list[str]:
    return [_NONE if (sample := found(rate)) is None else cell(sample) for rate in rates]


def _pair(one: float, other: float) -> str:
    return f"{_mib(one)}; {_mib(other)}"


def _of_link(mib_s: float, share: float) -> str:
    return f"{_mib(mib_s)} ({share * 100:.0f} %)"


def _number(value: int) -> str:
    return _NUMBERS.get(value, str(value))


def _mib(value: float) -> str:
    """A tenth counts on a limited link only."""
    if not value:
        return _NONE
    return f"{value:,.0f}" if value >= 250 else f"{value:.1f}"
