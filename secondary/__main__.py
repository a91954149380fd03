"""``python -m secondary``: the secondary process. ``tandemdisk secondary --config FILE`` starts it."""

from __future__ import annotations

from common.process import run
from secondary.node import main

if __name__ == "__main__":
    run(main, "secondary")
