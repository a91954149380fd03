"""How the command line shows things: the status table, progress, where to connect."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from common.config import format_size
from deploy.pair import Pair

GOOD: Final = frozenset({"protected", "RUNNING", "DONE", "done"})
SIDES: Final = ("primary", "secondary")
BAD: Final = frozenset(
    {
        "dead",
        "unresponsive",
        "primary_lost",
        "secondary_lost",
        "refused",
        "fenced",
        "FAILOVER_FAILED",
        "failover_failed",
    }
)


def status_view(status: dict[str, Any], *, live: bool = False) -> RenderableType:
    """The whole status of a pair, for people. To be printed with ``crop=False``; a ``live`` display cannot go beyond
    the terminal's edge, and shows where it cuts."""
    facts = Table.grid(padding=(0, 2))
    facts.add_row("state", _state(status["state"]), "mode", str(status["mode"]))
    facts.add_row("checkpoint", _or_dash(status["checkpoint"]), "generation", _or_dash(status["generation"]))
    facts.add_row("lag", _lag(status["lag"]), "buffer", _buffer(status["buffer"]))
    if marked := _marked(status):
        facts.add_row("marked", f"{format_size(marked)} differ, for the next resync")
    for name in ("resync", "verify", "commit"):
        if status[name].get("active"):
            facts.add_row(name, _ratio(status[name]))
    if packed := status.get("compression"):
        sizes = f"{format_size(packed['original_bytes'])} as {format_size(packed['wire_bytes'])}"
        facts.add_row("compression", f"{packed['ratio']:.2f} : 1, {sizes}")
    where = _volumes(status)
    if live:
        where.overflow = "ellipsis"
    parts: list[RenderableType] = [facts, Text(), _sides(status), Text(), where]
    for side in ("primary", "secondary"):
        error = status[side].get("error")
        if error:
            told = f"{side}: {error['name']} (case {error['case']}): {error['sentence']}"
            parts += [Text(), Text(told, style="red")]
    return Group(*parts)


def _marked(status: dict[str, Any]) -> int:
    """Bytes that the side that leads knows to differ."""
    lead = "secondary" if status["secondary"].get("role") == "primary" else "primary"
    return sum(volume.get("dirty_bytes") or 0 for volume in status[lead].get("volumes") or ())


def _sides(status: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("started as", "role", "pid", "export pid", "state"):
        table.add_column(column)
    for side in ("primary", "secondary"):
        now = status[side]
        state = _state(now.get("state"))
        if now.get("reason"):
            state.append(f"  {now['reason']}", style="red")
        table.add_row(side, _or_dash(now.get("role")), _or_dash(now.get("pid")), _or_dash(now.get("export_pid")), state)
    return table


def _volumes(status: dict[str, Any]) -> Text:
    """By the roles that the sides have now, not those that they were started in."""
    bold = partial(Text, style="bold")
    rows = [(bold("volume"), bold("size"), bold("where to connect"))]
    for volume in status["volumes"]:
        name, size = str(volume["name"]), format_size(volume["size"]) if volume["size"] else "-"
        for side in SIDES:
            role = status[side].get("role") or side
            rows.append((Text(name), Text(size), Text(f"{role:9}  {volume[f'{side}_uri'] or '-'}")))
            name = size = ""
    return _aligned(rows, right=1)


def _aligned(rows: Sequence[Sequence[Text]], right: int = -1) -> Text:
    """Columns, of which the last is never folded, however narrow the terminal: a URI that was would be broken when it
    is copied. To be printed with ``crop=False``. ``right`` is the column that is justified to the right."""
    widths = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        for number, cell in enumerate(row[:-1]):
            cell.align("right" if number == right else "left", widths[number])
        lines.append(Text("  ").join(row))
    told = Text("\n").join(lines)
    told.no_wrap, told.overflow = True, "ignore"
    return told


def _state(state: object) -> Text:
    text = str(state or "-")
    return Text(text, style="green" if text in GOOD else "bold red" if text in BAD else "yellow")


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _lag(lag: dict[str, Any]) -> str:
    if lag["bytes"] is None:
        return "-"
    seconds = f", {lag['seconds']:.3f} s" if lag["seconds"] is not None else ""
    return f"{format_size(lag['bytes'])}{seconds}"


def _buffer(buffer: dict[str, Any]) -> str:
    if buffer["bytes"] is None:
        return "-"
    capacity = f" of {format_size(buffer['capacity_bytes'])}" if buffer.get("capacity_bytes") else ""
    return f"{format_size(buffer['bytes'])}{capacity}, {buffer['percent']:.1f} %"


def _ratio(progress: dict[str, Any]) -> str:
    parts = [f"{format_size(progress['done_bytes'])} of {format_size(progress['total_bytes'])}"]
    if progress.get("phase"):
        parts.insert(0, progress["phase"])
    if progress.get("rate"):
        parts.append(f"{format_size(progress['rate'])}/s")
    if progress.get("seconds_left") is not None:
        parts.append(f"{progress['seconds_left']:.0f} s left")
    return ", ".join(parts)


def watch_resync(pair: Pair, console: Console) -> None:
    """Show the resync until the pair is protected; silent if it is already."""
    steps = pair.progress()
    first = next(steps)
    if first.state == "protected":
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("synchronising", total=first.total_bytes or None)
        for step in steps:
            bar.update(task, completed=step.done_bytes, total=step.total_bytes or None, description=step.state)


def where_to_connect(status: dict[str, Any], directory: str) -> RenderableType:
    """What to do with a pair that has just come up, as far as its sides are here. To be printed with ``crop=False``."""
    lead, follow = ("secondary", "primary") if status["secondary"].get("role") == "primary" else SIDES
    here = [side for side in SIDES if status[side].get("state") != "elsewhere"]
    rows = []
    for volume in status["volumes"]:
        name = str(volume["name"])
        for side, what, style in ((lead, "write here", "bold green"), (follow, "guest's view", "cyan")):
            if side in here:
                rows.append((Text(name), Text(what), Text(str(volume[f"{side}_uri"]), style=style)))
                name = ""
    commands = [
        (Text(f"tandemdisk {command} --dir {directory}", style="bold"), Text(what))
        for command, what, side in (
            ("checkpoint", "the secondary's guest sees what the primary has now", lead),
            ("status", "what is going on", here[0]),
            ("failover", "when the primary is dead: the secondary takes over", follow),
            ("down", "stop everything", here[0]),
        )
        if side in here
    ]
    return Group(_aligned(rows), Text(), _aligned(commands))
