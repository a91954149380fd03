"""What processes log, where that cannot be written."""

from __future__ import annotations

import errno
import io
import logging

import pytest

from common.process import set_up_logging


class Full(io.StringIO):
    """A log on a disk that has no room left."""

    def write(self, _text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_of_the_log_costs_its_lines_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chaos, seed 8001: where there was room again, each line that had been lost left a traceback of forty more."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr("threading.excepthook", None)  # put back by what set it
    try:
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", Full())
            set_up_logging("test")
        logging.getLogger("test").error("a flush failed")
        assert capsys.readouterr().err == ""
        logging.getLogger("test").error("%d", "no number")
        assert "TypeError" in capsys.readouterr().err, "a mistake in a call is told"
    finally:
        logging.captureWarnings(False)
        root.handlers[:], root.level = before, level
