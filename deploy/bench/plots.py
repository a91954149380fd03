"""The report's drawings: matplotlib figures as SVG text that can stand inside an HTML page.

One colour a peer in every drawing: ours blue, QEMU's pair orange, the unreplicated servers grey. A bar is a median over
the rounds, its whisker the smallest and largest round.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from common.errors import ConfigError
from common.limits import MIB
from deploy.bench import ratios
from deploy.bench.ratios import Metric, Spread
from deploy.bench.results import Run
from deploy.bench.workloads import BY_NAME

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Final = {
    "tandemdisk-sync": "#1f5fbf",
    "tandemdisk-async": "#6fa8f5",
    "qemu-colo-unix": "#d9691a",
    "qemu-colo-tcp": "#f2b27a",
    "qemu-nbd": "#6b7280",
    "nbdkit": "#b4bac4",
}
_COLUMNS: Final = 3
_WIDTH: Final = 10.5
_GRID: Final = "#e3e5e8"
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text: a third of the size, and the page's reader can search it
    "svg.hashsalt": "tandemdisk",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
}


def require_matplotlib() -> None:
    """ConfigError that says what to install, before a long run instead of after it."""
    try:
        import matplotlib.figure  # noqa: F401 - only whether it is there
    except ImportError:
        raise ConfigError("The HTML report needs matplotlib.", hint="pip install 'tandemdisk[bench]'.") from None


@contextlib.contextmanager
def drawing(height: float, rows: int, columns: int) -> Iterator[tuple[list[Axes], Callable[[], str]]]:
    """Axes to draw on, row by row, and what then makes the SVG text."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield list(figure.subplots(rows, columns, squeeze=False).flat), lambda: _svg(figure)


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = out.getvalue()
    return text[text.index("<svg") :]


def short(value: float) -> str:
    """Three significant digits with k or M: 84,512 → 84.5k."""
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def _panels(run: Run, jobs: Sequence[str], row_height: float, draw: Callable[[Axes, str, list[str]], None]) -> str:
    """One panel a job; ``draw`` gets the job and the peers that were measured in it."""
    rows = -(-len(jobs) // _COLUMNS)
    with drawing(row_height * rows, rows, _COLUMNS) as (every, svg):
        for axes in every[len(jobs) :]:
            axes.set_visible(False)
        for axes, job in zip(every, jobs, strict=False):
            measured = {sample.peer for sample in run.samples if sample.job == job}
            draw(axes, job, [facts.name for facts in run.peers if facts.name in measured])
            axes.set_title(_wrapped(BY_NAME[job].title), loc="left")
        return svg()


def _wrapped(title: str) -> str:
    words, lines = title.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 36:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _bars(run: Run, jobs: Sequence[str], metric: Metric, unit: str) -> str:
    def draw(axes: Axes, job: str, names: list[str]) -> None:
        for place, name in enumerate(names):
            spread = ratios.spread(run, job, name, metric)
            assert spread is not None
            error = [[spread.median - spread.low], [spread.high - spread.median]]
            whisker = {"lw": 1, "capsize": 2, "ecolor": "#333"}
            axes.bar(place, spread.median, 0.78, color=COLOURS[name], yerr=error, error_kw=whisker)
            axes.text(place, spread.high, short(spread.median), ha="center", va="bottom", fontsize=8)
        axes.set_xticks([])
        axes.set_xlim(-0.7, max(len(names), 4) - 0.3)
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: short(value) if value else "0")
        axes.grid(axis="y", lw=0.5, color=_GRID)
        axes.set_ylabel(unit)

    return _panels(run, jobs, 2.15, draw)


def throughput(run: Run, jobs: Sequence[str]) -> str:
    """Requests per second: one panel a job, one bar a peer."""
    return _bars(run, jobs, ratios.iops, "IOPS")


def cpu(run: Run, jobs: Sequence[str]) -> str:
    """CPU seconds of all server processes for each GiB moved."""
    return _bars(run, jobs, ratios.cpu_s_per_gib, "CPU s / GiB")


def latency(run: Run, jobs: Sequence[str]) -> str:
    """p50, p99 and p99.9 of every peer, as a line with three marks, on a common logarithmic scale."""

    def draw(axes: Axes, job: str, names: list[str]) -> None:
        for place, name in enumerate(reversed(names)):
            found = [ratios.spread(run, job, name, at) for at in (ratios.p50_us, ratios.p99_us, ratios.p999_us)]
            values = [spread.median for spread in found if spread is not None and spread.median > 0]
            axes.plot(values, [place] * len(values), "-", color=COLOURS[name], lw=2)
            for value, mark in zip(values, "o|x", strict=False):
                axes.plot(value, place, mark, color=COLOURS[name], ms=7, mew=1.8)
        axes.set_xscale("log")
        axes.set_xlim(10, 1e6)
        axes.set_xticks([10, 100, 1e3, 1e4, 1e5, 1e6], ["10 µs", "", "1 ms", "", "100 ms", ""])
        axes.minorticks_off()
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_yticks([])
        axes.grid(axis="x", lw=0.5, color=_GRID)

    return _panels(run, jobs, 0.6 + 0.22 * len(run.peers), draw)


def checkpoints(run: Run) -> str:
    """Checkpoint latency over the dirty set (left) and over the disk size (right), medians with their range."""
    own = int(run.options["size"])
    with drawing(2.8, 1, 2) as ((left, right), svg):
        for facts in run.peers:
            if facts.replicated:
                over_dirty = ratios.checkpoint_curve(run, facts.name, sizes=False)
                over_size = ratios.checkpoint_curve(run, facts.name, sizes=True)
                _curve(left, facts.name, {dirty * 100 / own: spread for dirty, spread in over_dirty.items()})
                _curve(right, facts.name, {size / MIB: spread for size, spread in over_size.items()})
        left.set_title("over the dirty set", loc="left")
        left.set_xlabel("% of the disk written since the last checkpoint")
        right.set_title("over the disk size, same dirty set", loc="left")
        right.set_xlabel("MiB")
        low, high = left.get_ylim()
        for axes in (left, right):
            axes.set_ylim(max(low, 0), high * 1.05)
            axes.set_ylabel("ms")
            axes.grid(lw=0.5, color=_GRID)
            axes.set_yscale("symlog", linthresh=1)
            axes.set_ylim(bottom=0)
            axes.set_yticks([0, 0.5, 1, 10, 100], ["0", "0.5", "1", "10", "100"])
            axes.minorticks_off()
        return svg()


def _curve(axes: Axes, name: str, points: Mapping[float, Spread]) -> None:
    at = list(points)
    axes.plot(at, [point.median * 1000 for point in points.values()], "o-", color=COLOURS[name], ms=4)
    low, high = (
        [value * 1000 for value in edge] for edge in zip(*((p.low, p.high) for p in points.values()), strict=True)
    )
    axes.fill_between(at, low, high, color=COLOURS[name], alpha=0.18, lw=0)
