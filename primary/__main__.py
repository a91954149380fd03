"""``python -m primary``: the primary process. ``tandemdisk primary --config FILE`` starts it."""

from __future__ import annotations

from common.process import run
from primary.node import main

if __name__ == "__main__":
    run(main, "primary")
