"""The demo is a test of its own: it compares every byte. Here: it succeeds, quickly, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common.child import python_environment


def test_demo(short_dir: Path) -> None:
    command = [sys.executable, "-P", "-m", "deploy", "demo", "--size", "64M"]
    environment = {**python_environment(), "TMPDIR": str(short_dir)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No byte lost, none wrong." in result.stdout
    assert "✗" not in result.stdout
    assert not list(short_dir.iterdir())
