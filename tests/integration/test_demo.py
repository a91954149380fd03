"""The demo is a test of its own: it compares every byte. Here: it succeeds, quickly, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from common.child import python_environment
from tests.conftest import wait_until


def test_demo(short_dir: Path) -> None:
    command = [sys.executable, "-P", "-m", "deploy", "demo", "--size", "64M"]
    environment = {**python_environment(), "TMPDIR": str(short_dir)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No byte lost, none wrong." in result.stdout
    assert "✗" not in result.stdout
    assert not list(short_dir.iterdir())


def test_a_demo_that_is_stopped_leaves_nothing_either(short_dir: Path) -> None:
    command = [sys.executable, "-P", "-m", "deploy", "demo", "--size", "64M"]
    environment = {**python_environment(), "TMPDIR": str(short_dir)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as demo:
        wait_until(lambda: list(short_dir.glob("*/pair/*")), 30, "a pair in the making")
        demo.send_signal(signal.SIGTERM)
        told, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "Interrupted; everything is stopped." in told
    assert not list(short_dir.iterdir())
