"""The report on a run across hosts: of figures that were written by hand, so that every cell and verdict is known."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from deploy.bench import hosts as bench
from deploy.bench import hosts_command, hosts_markdown, hosts_report
from deploy.bench.hosts import (
    CompressionSample,
    GrowthSample,
    HostsRun,
    LatencySample,
    LinkSample,
    ResyncSample,
    ThroughputSample,
)
from deploy.cli import main

MIB = 1 << 20
RATES = ("100mbit", "unlimited")
DRAWINGS = 5
"""Throughput, compression, latency, resync, growth."""


def make_run() -> HostsRun:
    """Async misses its share over plain TCP with four volumes only; zstd is too slow for incompressible contents on the
    unlimited link only.
    """
    run = HostsRun({"kernel": "Linux <6.1>"}, {"size": 256 * MIB, "seconds": 3.0}, seconds=120.0)
    for rate, tcp in zip(RATES, (10.0, 1000.0), strict=True):
        parts = (("tcp", 1.0), ("zeromq", 0.9), ("curve", 0.5))
        run.links += [LinkSample(rate, kind, tcp * part) for kind, part in parts]
    for mode, curve, volumes, mib_s in (("async", True, 1, 9.5), ("async", True, 4, 9.4), ("sync", True, 1, 5.0)):
        run.throughput.append(ThroughputSample("100mbit", mode, curve, volumes, mib_s, mib_s / 10, 2.5))
    run.throughput.append(ThroughputSample("unlimited", "async", True, 1, 300.0, 0.3, 2.0))
    for rate, compressible, off, zstd in (
        ("100mbit", True, 10.0, 28.0), ("100mbit", False, 10.0, 9.5), ("unlimited", True, 300.0, 310.0),
        ("unlimited", False, 300.0, 270.0),
    ):  # fmt: skip
        run.compression += [
            CompressionSample(rate, "off", compressible, off, 2.0, 1.0),
            CompressionSample(rate, "zstd", compressible, zstd, 3.0, 2.9 if compressible else 1.0),
        ]
    run.latency = [
        LatencySample("100mbit", "async", True, 30.0, 60.0),
        LatencySample("unlimited", "async", True, 20.0, 50.0),
        LatencySample("100mbit", "sync", True, 425.0, 5000.0),
        LatencySample("none", "alone", True, 25.0, 40.0),
    ]
    run.resyncs = [ResyncSample("100mbit", 48 * MIB, 4.2, 9.9, 0.99)]
    run.growth = [
        GrowthSample("volumes", 1, 40_000.0, 10.7, 0.0006), GrowthSample("volumes", 8, 25_000.0, 17.1, 0.0027),
        GrowthSample("size", 64 * MIB, 39_000.0, 11.0, 0.0007), GrowthSample("dirty", 26 * MIB, 900.0, 0.0, 0.0009),
    ]  # fmt: skip
    run.failures.append("sync, 4 volume(s): it was <not> there.")
    return run


def shown(run: HostsRun, width: int = 150) -> str:
    console = Console(file=io.StringIO(), width=width)
    hosts_report.show(run, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def rows(run: HostsRun, title: str) -> dict[str, list[str]]:
    """Of the table whose title begins so, by their first cell."""
    (found,) = [rows for name, _, rows in hosts_report.sections(run) if name.startswith(title)]
    return {name: cells for name, *cells in found}


def test_a_run_survives_its_json() -> None:
    run = make_run()
    assert HostsRun.from_json(run.to_json()) == run


def test_goals_hold_from_their_number_on() -> None:
    goals = dict(hosts_report.goals(make_run()))
    assert len(goals) == 6
    met = {sentence.partition(",")[0] if "zstd" in sentence else sentence for sentence, held in goals.items() if held}
    assert "async, CURVE at 100mbit: 95.0% of plain TCP, wanted at least 95%" in met
    assert goals["async, CURVE, 4 volumes at 100mbit: 94.0% of plain TCP, wanted at least 95%"] is False
    zstd = {sentence.partition(":")[0]: held for sentence, held in goals.items() if sentence.startswith("zstd")}
    assert zstd == {
        "zstd at 100mbit, compressible contents": True, "zstd at 100mbit, incompressible contents": True,
        "zstd at unlimited, compressible contents": True, "zstd at unlimited, incompressible contents": False,
    }  # fmt: skip
    assert not any("sync, CURVE at" in sentence and "async" not in sentence for sentence in goals), "no goal of sync"
    assert not any("async" in sentence and "unlimited" in sentence for sentence in goals), "the processors decide there"


def test_compression_stands_beside_the_rate_without_it() -> None:
    assert rows(make_run(), "wire compression") == {
        "compressible, off": ["10.0 (1.0 : 1; 2.0)", "300.0 (1.0 : 1; 2.0)"],
        "compressible, zstd": ["28.0 (2.9 : 1; 3.0)", "310.0 (2.9 : 1; 3.0)"],
        "incompressible, off": ["10.0 (1.0 : 1; 2.0)", "300.0 (1.0 : 1; 2.0)"],
        "incompressible, zstd": ["9.5 (1.0 : 1; 3.0)", "270.0 (1.0 : 1; 3.0)"],
    }


def test_what_was_not_measured_is_a_dash() -> None:
    run = make_run()
    assert rows(run, "what arrived")["async, CURVE, 4 volumes"] == ["9.4 (94%; 2.5)", "–"]
    run.compression = [s for s in run.compression if (s.rate, s.compression) != ("unlimited", "zstd")]
    assert rows(run, "wire compression")["compressible, zstd"] == ["28.0 (2.9 : 1; 3.0)", "–"]
    assert len(hosts_report.goals(run)) == 4, "nothing to compare with"


def test_latency_is_what_replication_adds() -> None:
    (table,) = [table for title, _, table in hosts_report.sections(make_run()) if title.startswith("one write")]
    added = [cells for name, *cells in table if name.strip().startswith("added")]
    assert added == [["5 µs", "-5 µs"], ["400 µs", "–"]]


@pytest.mark.parametrize("width", [40, 150])
def test_the_tables_have_every_figure_and_whole_titles(width: int) -> None:
    text = shown(make_run(), width)
    titles = [title for title, _, _ in hosts_report.sections(make_run())]
    assert len(titles) == 5
    for expected in (*titles, "it was <not> there."):
        assert expected in text, expected
    for title in titles:
        assert title in text.splitlines(), "on a line of its own, however narrow the table is"
    if width == 150:
        for expected in ("9.5 (95%; 2.5)", "28.0 (2.9 : 1; 3.0)", "425 µs / 5 ms", "48 MiB", "17.10", "2.7 ms"):
            assert expected in text, expected
        assert text.count("not met  ") == 2


def test_the_page_is_self_contained_and_escaped() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    text = hosts_report.render(make_run())
    assert text.startswith("<!DOCTYPE html>")
    assert text.count("<svg") == DRAWINGS
    for expected in (
        "Linux &lt;6.1&gt;", "it was &lt;not&gt; there", "class='missed'>async, CURVE, 4 volumes",
        ">compressible, zstd<", ">resync<", ">CPU s / GiB<", ">dirty set, MiB<", ">added to a write",
    ):  # fmt: skip
        assert expected in text.replace("    added", "added"), expected
    for forbidden in ("<script", "<link", "src=", "@import", "url(http", "href='http"):
        assert forbidden not in text


def test_what_was_left_out_is_not_drawn() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run = make_run()
    run.growth, run.compression = [], []
    text = hosts_report.render(run)
    assert text.count("<svg") == DRAWINGS - 2
    assert "Growth" not in text


def test_markdown_is_the_tables_of_the_readme() -> None:
    assert hosts_markdown.tables(make_run()).splitlines() == [
        "| | 100 Mbit/s | unlimited |",
        "|---|---|---|",
        "| plain TCP | 10.0 | 1,000 |",
        "| plain ZeroMQ; with CURVE | 9.0; 5.0 | 900; 500 |",
        "| async, CURVE | 9.5 (95 %) | 300 (30 %) |",
        "| async, CURVE, four volumes | 9.4 (94 %) | – |",
        "| sync, CURVE | 5.0 (50 %) | – |",
        "| async, CURVE, contents that compress to a third: off; `zstd` | 10.0; 28.0 | 300; 310 |",
        "| the same, contents that do not compress: off; `zstd` | 10.0; 9.5 | 300; 270 |",
        "| resync after a cut, CURVE | 9.9 (99 %) | – |",
        "| a write of 4 KiB, CURVE: added by sync (p50; alone 25 µs) | 400 µs | – |",
        "| a write of 4 KiB, CURVE: added by async (p50; alone 25 µs) | 5 µs | -5 µs |",
        "",
        "| | 4 KiB writes a second | CPU seconds a GiB | checkpoint |",
        "|---|---|---|---|",
        "| one volume | 40,000 | 10.7 | 600 µs |",
        "| eight volumes | 25,000 | 17.1 | 2.7 ms |",
        "| a disk of 64 MiB | 39,000 | 11.0 | 700 µs |",
        "| a dirty set of 26 MiB | – | – | 900 µs |",
    ]


# The command


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["bench", "--hosts", "netns", *map(str, arguments)])


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bench.Options]:
    """The command finds make_run() instead of measuring, in an empty directory, and no matplotlib; what it would have
    measured.
    """
    asked: list[bench.Options] = []

    def found(options: bench.Options, _engine: str) -> HostsRun:
        asked.append(options)
        return make_run()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hosts_command, "_measured", found)
    monkeypatch.setattr(hosts_command, "require_root", lambda *_, **__: None)
    monkeypatch.setattr(hosts_command, "find_spec", lambda _name: None)
    return asked


def test_the_bare_command_writes_both_reports_here(measured: list[bench.Options], tmp_path: Path) -> None:
    done = invoke()
    assert done.exit_code == 0, done.output
    assert "what arrived at the other host" in done.stdout
    how, written = done.stderr.splitlines()
    assert "pip install 'tandemdisk[bench]'" in how
    assert written == "Written: tandemdisk-hosts.json, tandemdisk-hosts.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tandemdisk-hosts.html", "tandemdisk-hosts.json"]
    assert HostsRun.from_json((tmp_path / "tandemdisk-hosts.json").read_text()) == make_run()
    text = (tmp_path / "tandemdisk-hosts.html").read_text()
    assert "<svg" not in text
    assert "tandemdisk[bench]" in text, "what is missing, and how to get it"
    assert "9.5 (95%; 2.5)" in text
    (options,) = measured
    assert options == bench.Options(size=256 * MIB), "everything that there is"
    assert ("sync", True, 4) in options.pairs


def test_a_short_run_takes_less_of_all_but_what_was_said(measured: list[bench.Options]) -> None:
    assert invoke("--short", "--rate", "100mbit", "--rounds", "2").exit_code == 0
    (options,) = measured
    assert (options.rates, options.rounds, options.seconds, options.size) == (("100mbit",), 2, 0.5, 64 * MIB)
    assert not options.growth
    assert options.compression
    assert options.load_bytes


def test_json_on_standard_output_is_nothing_but_json(measured: list[bench.Options], tmp_path: Path) -> None:
    done = invoke("--json")
    assert HostsRun.from_json(done.stdout) == make_run()
    assert [path.name for path in tmp_path.iterdir()] == ["tandemdisk-hosts.html"]


def test_reports_are_tried_before_anything_is_measured(measured: list[bench.Options], tmp_path: Path) -> None:
    done = invoke("--html", tmp_path / "nowhere" / "run.html")
    assert done.exit_code == 2
    assert "nowhere" in done.stderr
    assert not measured
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_run_is_reported_on_without_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "run.json"
    saved.write_text(make_run().to_json())
    done = invoke("--from", saved, "--markdown")
    assert done.exit_code == 0, done.output
    assert done.stdout == hosts_markdown.tables(make_run()) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"], "only what is asked for"
    saved.write_text("{}")
    assert invoke("--from", saved).exit_code == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [("--peer", "nbdkit"), ("--only", "nbdkit"), ("--job", "write-4k-d1"), ("--limit", 5), ("--no-probes", None),
     ("--hot-path", None), ("--heart", None), ("--resync", None)],
)  # fmt: skip
def test_options_that_mean_nothing_here_are_refused(
    measured: list[bench.Options], option: str, value: object | None
) -> None:
    done = invoke(option, *([] if value is None else [value]))
    assert done.exit_code == 2
    assert f"has no {option}." in done.stderr
    assert not measured


@pytest.mark.parametrize("option", ["--rate=1gbit", "--no-growth", "--short", "--markdown"])
def test_options_of_hosts_are_refused_without_them(option: str) -> None:
    done = CliRunner().invoke(main, ["bench", option])
    assert done.exit_code == 2
    assert "--hosts netns" in done.stderr
