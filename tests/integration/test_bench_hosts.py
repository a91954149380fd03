"""The benchmark across hosts by its command: short, at a rate at which the link alone decides what is fast."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from common.child import python_command, python_environment
from deploy.bench import hosts_report
from deploy.bench.hosts import HostsRun

pytestmark = [pytest.mark.root, pytest.mark.local_hosts]
ATTEMPTS = 3
"""The machine does other work, too; it has to reach every goal in one run."""
RAW_MIB_S = 100e6 / 8 / (1 << 20)


def measure(home: Path, shm: Path) -> subprocess.CompletedProcess[str]:
    command = [*python_command("deploy"), "bench", "--hosts", "netns", "--short", "--rate", "100mbit",
               "--directory", str(shm)]  # fmt: skip
    return subprocess.run(
        command, cwd=home, env=python_environment(), capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_bare_command_prints_its_tables_writes_its_reports_and_reaches_every_goal(
    tmp_path: Path, shm_dir: Path
) -> None:
    for _ in range(ATTEMPTS):
        done = measure(tmp_path, shm_dir)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == "Written: tandemdisk-hosts.json, tandemdisk-hosts.html"
        run = HostsRun.from_json((tmp_path / "tandemdisk-hosts.json").read_text())
        goals = hosts_report.goals(run)
        if all(met for _, met in goals):
            break
    assert not run.failures
    assert len(goals) == 3, "async beside plain TCP; compression of both kinds of contents"
    assert all(met for _, met in goals), goals
    for sentence, _ in goals:
        assert f"met  {sentence}" in done.stdout

    assert {sample.kind for sample in run.links} == {"tcp", "zeromq", "curve"}
    measured = [*(s.mib_s for s in run.links), *(s.mib_s for s in run.throughput), run.resyncs[0].mib_s]
    assert all(RAW_MIB_S / 2 < mib_s < RAW_MIB_S * 1.1 for mib_s in measured), "no more than the cable carries"
    assert run.resyncs[0].dirty_bytes > 0
    (best,) = [s for s in run.compression if (s.compression, s.compressible) == ("zstd", True)]
    assert best.ratio > 1.5
    assert best.mib_s > RAW_MIB_S * 1.2, "more than the cable carries"
    assert {sample.mode for sample in run.latency} == {"async", "sync", "alone"}
    assert json.loads(run.to_json())["options"]["rates"] == ["100mbit"]
    page = (tmp_path / "tandemdisk-hosts.html").read_text()
    assert "</html>" in page
    if find_spec("matplotlib") is not None:
        assert page.count("<svg") == 4, "throughput, compression, latency, resync"

    assert list(shm_dir.iterdir()) == []
