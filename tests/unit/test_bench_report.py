"""From samples to statements: medians, ratios, goals, and the reports of a canned run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from deploy.bench import page, ratios, report
from deploy.bench.command import bench
from deploy.bench.engines import Figures
from deploy.bench.ratios import ASYNC, BEST_COLO, SYNC, Spread
from deploy.bench.results import CheckpointSample, FailoverSample, PeerFacts, Run, Sample
from deploy.bench.servers import Memory
from deploy.bench.workloads import BY_NAME

GIB = 1 << 30
JOB = "write-4k-d32"


def sample(number: int, peer: str, iops: int, *, job: str = JOB, p99_us: float = 100.0, cpu_s: float = 1.0) -> Sample:
    figures = Figures(iops * 2, iops * 2 * 4096, 2.0, 50.0, p99_us, 2 * p99_us)
    return Sample(number, job, peer, figures, None, 0.001, 0.0, {"primary": cpu_s, "secondary": cpu_s})


def make_run() -> Run:
    peers = [(SYNC, True), (ASYNC, True), ("qemu-colo-unix", True), ("qemu-colo-tcp", True), ("qemu-nbd", False)]
    run = Run(
        {"kernel": "Linux 6.1", "processor": "<Fast & Co>", "CPUs": "2", "engine": "fio-3.33"},
        {"size": GIB, "seconds": 2.0, "rounds": 3},
        [PeerFacts(name, name, replicated) for name, replicated in peers],
    )
    for number, (sync, async_, unix, tcp, nbd) in enumerate(
        [(40, 90, 10, 20, 45), (50, 100, 20, 10, 50), (60, 200, 10, 5, 40)], start=1
    ):
        for peer, iops in zip([SYNC, ASYNC, "qemu-colo-unix", "qemu-colo-tcp", "qemu-nbd"],
                              [sync, async_, unix, tcp, nbd], strict=True):  # fmt: skip
            run.samples.append(sample(number, peer, iops * 1000))
    for peer, seconds in ((SYNC, 0.001), (ASYNC, 0.001), ("qemu-colo-unix", 0.02), ("qemu-colo-tcp", 0.04)):
        run.checkpoints += [
            CheckpointSample(peer, GIB, 0, seconds),
            CheckpointSample(peer, GIB, GIB // 4, seconds * 1.5),
            CheckpointSample(peer, GIB // 2, GIB // 4, seconds * 3),
        ]
    run.failovers.append(FailoverSample(SYNC, "latest", GIB // 4, 0, 0.004, 0.005, 0.006))
    run.peers[0].memory = {"primary": Memory(100 << 20, 60 << 20, 0)}
    run.peers[0].commands = ["python -m primary"]
    run.failures.append("nbdkit: it was <not> there.")
    return run


def test_spread_is_median_and_range() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.0, 2.0, 2)
    assert Spread.of([]) is None


def test_ratios_are_of_the_same_round() -> None:
    run = make_run()
    assert ratios.ratio(run, JOB, SYNC, ("qemu-colo-unix",), ratios.iops) == Spread(4.0, 2.5, 6.0, 3)
    run.samples = [each for each in run.samples if (each.peer, each.round) != ("qemu-colo-unix", 3)]
    assert ratios.ratio(run, JOB, SYNC, ("qemu-colo-unix",), ratios.iops) == Spread(3.25, 2.5, 4.0, 2)
    assert ratios.ratio(run, JOB, SYNC, ("nbdkit",), ratios.iops) is None


def test_the_best_case_of_qemu_is_the_better_one_of_each_round() -> None:
    # 40/20, 50/20, 60/10: neither case alone gives these.
    assert ratios.ratio(make_run(), JOB, SYNC, ratios.COLO, ratios.iops) == Spread(2.5, 2.0, 6.0, 3)


def test_the_best_latency_is_the_lowest() -> None:
    run = make_run()
    run.samples = [
        sample(1, SYNC, 1, p99_us=100.0),
        sample(1, "qemu-colo-unix", 1, p99_us=1000.0),
        sample(1, "qemu-colo-tcp", 1, p99_us=500.0),
    ]
    (goal,) = [goal for goal in ratios.goals(run, report.job_title) if goal.subject.startswith("p99") and goal.reached]
    assert goal.reached is not None
    assert goal.reached.median == 0.2
    assert goal.met
    assert {name: spread.median for name, spread in goal.cases.items()} == {
        "qemu-colo-unix": 0.1, "qemu-colo-tcp": 0.2,
    }  # fmt: skip


def test_goals_say_met_and_not_met_and_not_measured() -> None:
    goals = {
        goal.claim: goal for goal in ratios.goals(make_run(), report.job_title) if goal.subject == BY_NAME[JOB].title
    }
    assert goals[f"sync / {BEST_COLO}"].met is False  # 2.5 of 4
    assert goals[f"async / {BEST_COLO}"].met is False  # 5 of 10
    assert goals["async / qemu-nbd"].met is True  # exactly 2 of 2
    unmeasured = next(goal for goal in ratios.goals(make_run(), report.job_title) if "nbdkit" in goal.claim)
    assert unmeasured.met is None
    assert report.verdict(unmeasured) == "not measured"


def test_checkpoint_goals_take_each_dirty_set_and_flatness() -> None:
    goals = {
        goal.subject: goal
        for goal in ratios.goals(make_run(), report.job_title)
        if goal.subject.startswith("checkpoint") and goal.claim.startswith("sync")
    }
    at_quarter = goals["checkpoint with 25 % of the disk dirty"]
    assert at_quarter.reached is not None
    assert at_quarter.reached.median == pytest.approx(0.05)
    assert at_quarter.met
    assert goals["checkpoint flat over dirty sets"].met  # 1.5
    flat = goals["checkpoint flat over disk sizes"].reached
    assert flat is not None
    assert flat.median == pytest.approx(2.0)


def test_cpu_counts_all_processes_and_both_loads() -> None:
    quarter = Figures(65536, GIB // 4, 1.0, 1.0, 1.0, 1.0)
    one = Sample(1, JOB, SYNC, quarter, quarter, None, 0.0, {"primary": 0.3, "secondary": 0.2})
    assert one.cpu_s_per_gib() == pytest.approx(1.0)
    assert one.cpu_s_per_gib("secondary") == pytest.approx(0.4)
    assert one.cpu_s_per_gib("supervisor") == 0


def test_cpu_is_shown_for_each_process_that_used_any() -> None:
    run = make_run()
    run.samples = [sample(1, SYNC, 131072), sample(1, "qemu-nbd", 131072, job="read-4k-d32")]
    run.samples[0].cpu_s.update(secondary=2.0, supervisor=0.0)
    assert report.cpu_columns(run) == ["", "process", "write\n4k-d32", "read\n4k-d32"]
    assert list(report.cpu_rows(run)) == [
        (SYNC, "primary", "1.00", "–"),
        (SYNC, "secondary", "2.00", "–"),
        ("qemu-nbd", "primary", "–", "1.00"),
        ("qemu-nbd", "secondary", "–", "1.00"),
    ]


def test_a_run_survives_its_json() -> None:
    run = make_run()
    assert Run.from_json(run.to_json()) == run


def test_the_table_has_every_peer_and_ratio() -> None:
    console = Console(file=io.StringIO(), width=200)
    report.show(make_run(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in (
        "random write 4 KiB, depth 32", "50,000 (40,000-60,000)", "4.00x (2.50-6.00)", "checkpoint, 25 % dirty",
        "failover to latest", "nbdkit: it was <not> there.", "not met", "5 ms",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_page_is_self_contained_and_escaped() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    text = page.render(make_run())
    assert text.count("<svg") == 4
    assert text.startswith("<!DOCTYPE html>")
    for expected in (
        "&lt;Fast &amp; Co&gt;",
        "it was &lt;not&gt; there",
        "Goals:",
        "python -m primary",
        "5.0x QEMU COLO",
    ):
        assert expected in text, expected
    for forbidden in ("<script", "<link", "src=", "@import", "url(http", "href='http"):
        assert forbidden not in text


def test_the_command_reports_on_an_earlier_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    saved, html = tmp_path / "run.json", tmp_path / "run.html"
    saved.write_text(make_run().to_json())
    done = CliRunner().invoke(bench, ["--from", str(saved), "--html", str(html)])
    assert done.exit_code == 0, done.output
    assert "random write 4 KiB, depth 32" in done.output
    assert "</html>" in html.read_text()


@pytest.mark.parametrize("size", ["1", "63M", "1T", "G", "-1G", "64.5M", ""])
def test_bad_sizes_are_refused(size: str) -> None:
    done = CliRunner().invoke(bench, ["--size", size])
    assert done.exit_code == 2
    assert "size" in done.output
