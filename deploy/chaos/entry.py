"""``tandemdisk chaos``: options, and what becomes of a run."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from deploy.chaos.campaign import campaign
from deploy.chaos.disks import missing
from deploy.chaos.kinds import KINDS
from deploy.chaos.tally import Tally
from deploy.hosts import SUDO_OR_LOCAL, require_root
from deploy.interrupts import unwinding

LOST: Final = 12
"""Exit code of a run in which acknowledged writes were lost, or a generation had two writers."""
REPORT_S: Final = 60.0


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0.01), default=1.0, show_default=True, help="How long.")
@click.option("--cycles", type=click.IntRange(1), help="End after so many cycles, if that is sooner.")
@click.option("--kills", type=click.IntRange(1), help="End after so many SIGKILLs, if that is sooner.")
@click.option("--failovers", type=click.IntRange(1), help="The same of failovers; with --kills, after both.")
@click.option(
    "--fault",
    "kinds",
    type=click.Choice(sorted(KINDS)),
    multiple=True,
    metavar="KIND",
    help="Draw only this (and others so given), where it can be.",
)
@click.option("--seed", type=click.IntRange(0), help="All choices follow from it.  [default: a random one]")
@click.option("--mode", type=click.Choice(["sync", "async"]), default="sync", show_default=True)
@click.option("--hosts", type=click.Choice(["local", "netns"]), default="local", show_default=True)
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures there, as JSON.")
@click.option("--dir", "directory", type=click.Path(path_type=Path, file_okay=False), help="Where pairs live.")
def chaos(
    minutes: float, cycles: int | None, kills: int | None, failovers: int | None,
    kinds: tuple[str, ...], seed: int | None, mode: Any, hosts: str, report: Path | None, directory: Path | None,
) -> None:  # fmt: skip
    """Break a pair of real processes under verified load, heal it, compare every byte.

    Exit code 12 if anything that was acknowledged is lost, 1 if the pair failed otherwise; the directory with its logs
    is kept then.
    """
    if hosts != "local":
        require_root(hint=SUDO_OR_LOCAL)
    console = Console(markup=False, emoji=False)
    seed = secrets.randbits(31) if seed is None else seed
    home = Path(tempfile.mkdtemp(prefix="tdc-")) if directory is None else directory
    home.mkdir(parents=True, exist_ok=True)
    console.print(f"seed {seed}, in {home}", highlight=False, soft_wrap=True)
    tally = Tally(seed, mode, hosts)
    tally.not_tried = missing(home)
    end = time.monotonic() + 60 * minutes
    told = time.monotonic()

    def proceed() -> bool:
        nonlocal told
        if time.monotonic() - told > REPORT_S:
            told = time.monotonic()
            console.print(tally.line(), highlight=False, soft_wrap=True)
        if time.monotonic() >= end or (cycles is not None and tally.cycles >= cycles):
            return False
        counted = [(tally.kill_cycles, kills), (len(tally.failovers), failovers)]
        return all(wanted is None for _, wanted in counted) or any(have < wanted for have, wanted in counted if wanted)

    try:
        with unwinding():
            campaign(home, seed, mode, hosts, tally, proceed, kinds)
    except KeyboardInterrupt:
        console.print("Interrupted.")
    console.print(tally.table())
    if not tally.failure and (tally.kill_cycles < (kills or 0) or len(tally.failovers) < (failovers or 0)):
        console.print("The time was over before all SIGKILLs and failovers that were asked for.", style="yellow")
    if report is not None:
        report.write_text(json.dumps(tally.report(), indent=2) + "\n")
    if tally.failure or tally.two_writers:
        console.print(f"Seed {seed}; kept in {home}: {tally.failure}", style="red", soft_wrap=True)
        sys.exit(LOST if tally.lost or tally.two_writers else 1)
    if directory is None:
        shutil.rmtree(home, ignore_errors=True)
