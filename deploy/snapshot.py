"""``tandemdisk snapshot``: an image of the last checkpoint, taken while replication goes on.

It attaches to the disk buffer like any program may (``secondary.attach``) and asks no process of the pair for
anything, so it works while the export is down, and with a secondary that was killed, as long as its buffer is there.

An image is written under another name beside its target and gets its own when it is complete: whoever finds the file
finds all of it. With several volumes all images are of the same checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from common.config import format_size
from common.errors import ConfigError, DiskError, NeedsForce, NotRunning
from deploy.interrupts import unwinding
from secondary.attach import PairView, attach

SHOW_S: Final = 0.1
"""At most this often the progress is told to the terminal."""


def choose_targets(volumes: Mapping[str, Any], output: Path, chosen: tuple[str, ...]) -> dict[str, Path]:
    """Which volume goes where: into FILE, or each into DIR/NAME.raw. ConfigError if that is not clear."""
    for name in chosen:
        if name not in volumes:
            raise ConfigError(f"There is no volume {name}.", hint=f"Volumes: {', '.join(volumes)}.")
    names = list(dict.fromkeys(chosen)) or list(volumes)
    if output.is_dir():
        return {name: output / f"{name}.raw" for name in names}
    if len(names) > 1:
        raise ConfigError(
            f"{len(names)} volumes do not go into one file.",
            hint=f"Name one of {', '.join(volumes)} with --volume, or a directory with --output.",
        )
    return {names[0]: output}


def check_targets(targets: Mapping[str, Path], *, force: bool) -> None:
    """NeedsForce for a target that exists (unless ``force``), DiskError for one that cannot be made."""
    for path in targets.values():
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise DiskError(f"{path.parent} is no directory.", hint="Make it first.") from None
            continue
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}.") from error
        if not stat.S_ISREG(mode):
            raise DiskError(f"{path} is no regular file.", hint="Name a new file.")
        if not force:
            raise NeedsForce(f"{path} exists.", hint="Name a new file, or use --force to replace it.")


def take(pair: PairView, targets: Mapping[str, Path], *, force: bool, console: Console) -> dict[str, Any]:
    """Write the images; what ``--json`` prints. Raises what ``PairView.snapshot`` does."""
    partial = {name: path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial") for name, path in targets.items()}
    started = time.perf_counter()
    try:
        with unwinding(), _shown(console) as show:
            checkpoint = pair.snapshot({name: str(path) for name, path in partial.items()}, show)
        allocated = {name: path.stat().st_blocks * 512 for name, path in partial.items()}
        for name, path in targets.items():
            _give_name(partial[name], path, force=force)
    finally:
        for path in partial.values():
            with contextlib.suppress(OSError):  # on a file system without writes there is none, and the error says why
                path.unlink()
    return {
        "checkpoint": checkpoint.number,
        "checkpoint_time": checkpoint.wall_ns / 1e9 or None,
        "seconds": time.perf_counter() - started,
        "volumes": [
            {"name": name, "file": str(path), "bytes": pair.volumes[name].size, "allocated_bytes": allocated[name]}
            for name, path in targets.items()
        ],
    }


def _give_name(partial: Path, path: Path, *, force: bool) -> None:
    try:
        if force:
            partial.replace(path)
        else:
            _rename_new(partial, path)
    except FileExistsError:
        raise NeedsForce(f"{path} was made by somebody else meanwhile.", hint="Use --force to replace it.") from None
    except OSError as error:
        raise DiskError(f"{path} cannot be made: {error.strerror}.") from error


def _rename_new(partial: Path, path: Path) -> None:
    """Rename, but never over a file; FileExistsError instead."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(str(path)) from None
        partial.rename(path)


@contextlib.contextmanager
def _shown(console: Console) -> Iterator[Any]:
    """A progress bar, as a function of (done, total) bytes."""
    columns = (TextColumn("snapshot"), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("snapshot", total=None)
        shown = 0.0

        def show(done: int, total: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= SHOW_S or done == total:
                shown = now
                progress.update(task, completed=done, total=total)

        yield show


@click.command("snapshot")
@click.option(
    "--dir", "directory", required=True, type=click.Path(file_okay=False, path_type=Path),
    help="The pair's directory, or the secondary's own.",
)  # fmt: skip
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), metavar="FILE",
    help="The image to write; a directory gets NAME.raw for each volume.",
)  # fmt: skip
@click.option("--volume", "volumes", multiple=True, metavar="NAME", help="Only this volume.  [default: all]")
@click.option("--force", is_flag=True, help="Replace a file that exists, once the new image is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def snapshot(directory: Path, output: Path, volumes: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Write a sparse image of the last checkpoint while replication goes on."""
    if not directory.is_dir():
        raise NotRunning(f"{directory} is no directory of a pair.", hint="Give the --dir of `tandemdisk up`.")
    with attach(str(directory)) as pair:
        targets = choose_targets(pair.volumes, output, volumes)
        check_targets(targets, force=force)
        done = take(pair, targets, force=force, console=Console(stderr=True))
    if as_json:
        click.echo(json.dumps(done))
        return
    console = Console(markup=False, emoji=False)
    console.print(f"Checkpoint {done['checkpoint']} in {done['seconds']:.2f} s.")
    for volume in done["volumes"]:
        sizes = f"{format_size(volume['bytes'])}, {format_size(volume['allocated_bytes'])} allocated"
        console.print(f"  {volume['name']}  {volume['file']}  {sizes}", soft_wrap=True, highlight=False)
