"""``tandemdisk``: the commands of an operator.

Exit codes: 0 ok, 1 the operation failed, 2 bad usage or configuration, and those of ``common.errors`` where a script
would branch. Every error is one sentence and a hint on stderr; with ``--json``, an object ``{"error": {…}}`` on
stdout too.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import getpass
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import click
from rich.console import Console
from rich.live import Live

from common.child import python_command, python_environment, settings_memfd
from common.config import check_block_size, format_size, load_config, parse_size
from common.control import error_to_dict
from common.errors import ConfigError, NeedsForce, OperationFailed, TandemDiskError
from common.keys import generate_keys
from common.settings import NodeSettings, Role
from deploy import __version__
from deploy.bench.command import bench
from deploy.chaos.entry import chaos
from deploy.display import status_view, watch_resync, where_to_connect
from deploy.hosts_commands import LISTEN, RATE, hosts, redirect, wrap
from deploy.interrupts import unwinding
from deploy.launcher import remove_buffer
from deploy.layout import PairOptions, placement_of
from deploy.pair import Pair
from deploy.peer import as_owner
from deploy.presence import at_rest, must_not_run, roles_held
from deploy.render import deployment
from deploy.roles import accept_disks, process_role
from deploy.snapshot import snapshot
from secondary.buffer import DiskBuffer

P = ParamSpec("P")
R = TypeVar("R")

DIFFERENCES: Final = 11
"""Exit code of a verification that found any; ``common.errors`` has the codes below."""

console = Console(markup=False, emoji=False)  # paths may have brackets and colons
stderr = Console(stderr=True, markup=False, emoji=False)


class SizeType(click.ParamType):  # type: ignore[type-arg]  # generic only in later versions of click
    """``4096``, ``4K``, ``256MiB``, ``1G``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return self.check(parse_size(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def check(self, size: int) -> int:
        if size <= 0:
            raise ValueError("a size is more than nothing")
        return size


class BlockSizeType(SizeType):
    """A size that a block can have."""

    def check(self, size: int) -> int:
        return check_block_size(size)


def reporting(command: Callable[P, R]) -> Callable[P, R]:
    """Turn a TandemDiskError into its sentence and its exit code; a path that cannot be used is one, too."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return _without_os_errors(functools.partial(command, *args, **kwargs))
        except TandemDiskError as error:
            if kwargs.get("as_json"):
                with contextlib.suppress(OSError):  # stderr has the sentence, too
                    click.echo(json.dumps({"error": error_to_dict(error)}))
            stderr.print(f"Error: {error.sentence}", style="red", highlight=False, soft_wrap=True)
            if error.hint:
                stderr.print(error.hint, highlight=False, soft_wrap=True)
            sys.exit(error.exit_code)

    return wrapped


def _without_os_errors(command: Callable[[], R]) -> R:
    """The command; an OSError that names a file becomes a ConfigError, one of a full disk an OperationFailed. Any other
    is a mistake of ours, and is shown."""
    try:
        return command()
    except OSError as error:
        if error.filename is None:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _drop_what_cannot_be_written()
            raise OperationFailed(
                f"Cannot write: {error.strerror}.", hint="See where the output goes, and where the pair is."
            ) from None
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        raise ConfigError(
            f"Cannot use {path}: {error.strerror}.",
            hint=f"The command ran as {_user()}: see that this user may, or give another path.",
        ) from error


def _drop_what_cannot_be_written() -> None:
    """Of our output: else the interpreter tries again at its end, and complains."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no name is known for the number
        return f"user {os.geteuid()}"


directory_option = click.option(
    "--dir", "directory", required=True, type=click.Path(file_okay=False, path_type=Path), help="The pair's directory."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
SIZE = SizeType()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tandemdisk")
def main() -> None:
    """Two hosts, one disk: a replicated block device with checkpoints, for any NBD client."""
    _hold_standard_descriptors()


def _hold_standard_descriptors() -> None:
    """Have /dev/null where a standard stream is closed: else the next file or pipe gets its number, and a child of ours
    takes that for its input or output."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


@main.command()
@directory_option
@click.option("--size", type=SIZE, help="Make equal sparse images of this size, one a side.")
@click.option(
    "--primary-disk",
    "primary_disks",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Raw file or block device; once a volume.",
)
@click.option(
    "--secondary-disk",
    "secondary_disks",
    multiple=True,
    type=click.Path(path_type=Path),
    help="The same on the other side.",
)
@click.option("--assume-synced", is_flag=True, help="The disks are equal already: no initial synchronisation.")
@click.option("--volumes", type=click.IntRange(1, 64), help="Number of volumes: one consistency group.  [default: 1]")
@click.option("--mode", type=click.Choice(["sync", "async"]), help="When a write is acknowledged.  [default: sync]")
@click.option(
    "--checkpoint-interval",
    type=click.FloatRange(min=0),
    help="Seconds between checkpoints, 0: on command only.  [default: 0]",
)
@click.option("--block-size", type=BlockSizeType(), help="Granularity of copy-before-write.  [default: 4K]")
@click.option("--buffer-size", type=SIZE, help="Memory of the disk buffer.  [default: by disk size]")
@click.option("--listen", type=LISTEN, help="TCP address of the primary's export, beside its Unix socket.")
@click.option(
    "--hosts",
    "where",
    metavar="local|netns[:TAG]|FILE",
    help="Where the sides run: here, in two network namespaces (root), or on the hosts that a pair file names.",
)
@click.option("--rate", type=RATE, help="What the cable between the namespaces carries.  [default: unlimited]")
@click.option("--plaintext", is_flag=True, help="No CURVE between the namespaces.")
@click.option(
    "--compression",
    type=click.Choice(["off", "zstd"]),
    help="What to do with writes that wait for the link.  [default: off]",
)
@click.option("--detach", is_flag=True, help="Leave the pair running in the background.")
@reporting
def up(
    directory: Path,
    size: int | None,
    primary_disks: tuple[Path, ...],
    secondary_disks: tuple[Path, ...],
    assume_synced: bool,
    volumes: int | None,
    mode: Any,
    checkpoint_interval: float | None,
    block_size: int | None,
    buffer_size: int | None,
    listen: tuple[str, int] | None,
    where: str | None,
    rate: str | None,
    plaintext: bool,
    compression: Any,
    detach: bool,
) -> None:
    """Bring a pair up on this machine, or start again what is dead in it."""
    options = PairOptions(
        size=size,
        primary_disks=primary_disks,
        secondary_disks=secondary_disks,
        assume_synced=assume_synced,
        volumes=volumes,
        mode=mode,
        checkpoint_interval_s=checkpoint_interval,
        block_size=block_size,
        buffer_bytes=buffer_size,
        listen=listen,
        hosts=where,
        rate=rate,
        encrypt=not plaintext,
        compression=compression,
    )
    pair = Pair(directory)
    try:
        with unwinding():
            _bring_up(pair, options, detach=detach)
            if not pair.is_supervising():
                return
            console.print("\nCtrl-C stops the pair.", style="dim")
            code = pair.wait_supervisor()
        console.print("The pair was stopped.")
        sys.exit(0 if code == 0 else 1)
    except KeyboardInterrupt:
        stderr.print("Stopping …")
        if pair.is_supervising():
            _tell_down(pair.down(), directory)
        sys.exit(130 if detach else 0)


def _bring_up(pair: Pair, options: PairOptions, *, detach: bool) -> None:
    told = pair.create_or_resume(options, detach=detach)
    children = told["children"]
    placement = placement_of(options)
    try:
        if placement is not None and placement.elsewhere:
            console.print("\n".join(placement.instructions()), highlight=False, soft_wrap=True)
        elif children.get("primary", {}).get("alive"):
            watch_resync(pair, console)
        elif children.get("primary", {}).get("exit_code") == NeedsForce.exit_code:
            console.print(f"The primary stays down: {children['primary']['reason']}", style="yellow", soft_wrap=True)
        elif "primary" in children:
            console.print("The old primary stays down: the secondary leads since a failover.", style="yellow")
        console.print(where_to_connect(pair.status(), str(pair.directory.path)), crop=False)
    except TandemDiskError:
        if set(told["started"]) == set(children):  # all ours: nobody uses it yet
            pair.down()
        raise


@main.command()
@directory_option
@json_option
@click.option("--watch", is_flag=True, help="Go on showing it, once a second, until Ctrl-C.")
@click.option("--clear-error", is_flag=True, help="First forget the last failure: it was looked after.")
@reporting
def status(directory: Path, as_json: bool, watch: bool, clear_error: bool) -> None:
    """Show what is going on; processes that died with their reason."""
    pair = Pair(directory)
    if clear_error:
        pair.clear_error()
    if not watch:
        now = pair.status()
        if as_json:
            click.echo(json.dumps(now, indent=2))
        else:
            console.print(status_view(now), crop=False)
        return
    tick = threading.Event()
    try:
        if as_json:
            while True:
                click.echo(json.dumps(pair.status()))
                tick.wait(1.0)
        with Live(status_view(pair.status(), live=True), console=console, auto_refresh=False) as live:
            while not tick.wait(1.0):
                live.update(status_view(pair.status(), live=True), refresh=True)
    except KeyboardInterrupt:
        return


@main.command()
@directory_option
@json_option
@reporting
def checkpoint(directory: Path, as_json: bool) -> None:
    """Take a checkpoint; returns when the secondary has it."""
    taken = Pair(directory).checkpoint()
    if as_json:
        click.echo(json.dumps({"checkpoint": taken.number, "seconds": taken.seconds}))
    else:
        console.print(f"Checkpoint {taken.number} in {taken.seconds * 1000:.2f} ms.")


@main.command()
@directory_option
@json_option
@click.option("--repair", is_flag=True, help="Send what differs to the secondary at once.")
@reporting
def verify(directory: Path, as_json: bool, repair: bool) -> None:
    """Compare both disks while guests write; exit code 11 if they differed anywhere.

    What differs is marked, and repaired by the next resync, or now with --repair.
    """
    found = Pair(directory).verify(repair=repair)
    if as_json:
        click.echo(json.dumps(found))
    else:
        for name, offset, length in found["extents"]:
            console.print(f"{name}: {length} bytes at {offset} differ", highlight=False)
        if (more := found["differing"] - len(found["extents"])) > 0:
            console.print(f"… and {more} more extents")
        size, seconds = format_size(found["compared_bytes"]), found["seconds"]
        if found["differing"]:
            what = "repaired" if found["repaired"] else "marked for the next resync"
            console.print(f"{format_size(found['differing_bytes'])} of {size} differed; {what}.", style="yellow")
        else:
            console.print(f"{size} compared in {seconds:.1f} s: both disks are equal.")
    sys.exit(DIFFERENCES if found["differing"] else 0)


@main.command()
@directory_option
@json_option
@click.option("--full", is_flag=True, help="Compare both disks as a whole first, by checksums.")
@reporting
def resync(directory: Path, as_json: bool, full: bool) -> None:
    """Send what a verification marked, or with --full all that differs, while guests write.

    A pair that comes together again resynchronises by itself; this is for one that is protected.
    """
    done = Pair(directory).resync(full=full)
    if as_json:
        click.echo(json.dumps(done))
        return
    asked = f"{format_size(done['asked_bytes'])} compared, " if full else ""
    console.print(f"{asked}{format_size(done['moved_bytes'])} sent in {done['seconds']:.1f} s.")


@main.command()
@directory_option
@json_option
@click.option("--volume", help="Only this one.  [default: all]")
@click.option("--size", type=SIZE, help="The new size.  [default: what both disks have]")
@reporting
def resize(directory: Path, as_json: bool, volume: str | None, size: int | None) -> None:
    """Grow volumes while guests write, after both disks were grown.

    Images that the pair made are grown to --size by this command. Clients that connect from now on see the new size.
    """
    done = Pair(directory).resize(volume, size)
    if as_json:
        click.echo(json.dumps(done))
        return
    for told in done["volumes"]:
        was = "" if told["before"] == told["size"] else f", {told['before']} before"
        console.print(f"{told['name']}: {told['size']} bytes{was}.", highlight=False)


@main.command()
@directory_option
@json_option
@click.option(
    "--to",
    type=click.Choice(["latest", "checkpoint"]),
    default="latest",
    show_default=True,
    help="Keep every write that arrived, or go back to the last checkpoint.",
)
@click.option("--force", is_flag=True, help="Even though the primary is alive, or guest writes get lost.")
@click.option("--primary-dead", is_flag=True, help="You know that the primary's process has ended, or its host.")
@reporting
def failover(directory: Path, as_json: bool, to: str, force: bool, primary_dead: bool) -> None:
    """Make the secondary the primary: its export is writable at once."""
    done = Pair(directory).failover(to, force=force, primary_dead=primary_dead)
    if as_json:
        click.echo(json.dumps(done))
        return
    now = Pair(directory).status()
    console.print(f"Failed over to {to}; the secondary leads, generation {now['generation']}.")
    for volume in now["volumes"]:
        console.print(f"  {volume['name']}  {volume['secondary_uri']}", soft_wrap=True)


@main.command()
@directory_option
@json_option
@click.option("--discard", type=click.Choice(["a", "b"]), help="After a split brain: whose writes are thrown away.")
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@reporting
def rejoin(directory: Path, as_json: bool, discard: Any, dry_run: bool) -> None:
    """Make the side that was left behind the secondary of the one that leads."""
    told = Pair(directory).rejoin(discard=discard, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps(told))
        return
    console.print(f"{told['sentence'][0].upper()}{told['sentence'][1:]}.", soft_wrap=True, highlight=False)
    verb = "would rejoin" if dry_run else "rejoins"
    lost = f"at most {told['blocks']} blocks ({format_size(told['bytes'])}) that it alone wrote are overwritten"
    console.print(f"Side {told['side']} {verb} as secondary; {lost}.", soft_wrap=True, highlight=False)
    for path in told["saved"]:
        console.print(f"Saved them in {path}.", soft_wrap=True)
    _tell_start(told)


def _tell_start(told: dict[str, Any]) -> None:
    """A side that no supervisor runs was stopped, and is started by whoever started it."""
    if told["start"] is not None:
        console.print(f"Now start it: {told['start']}", soft_wrap=True, highlight=False)


@main.command()
@directory_option
@json_option
@reporting
def switchover(directory: Path, as_json: bool) -> None:
    """Swap the roles without losing a write."""
    done = Pair(directory).switchover()
    if as_json:
        click.echo(json.dumps(done))
        return
    number, uri = done["generation"], done["nbd_uri"] or "on the other host"
    console.print(f"Roles are swapped, generation {number}; the new primary is {uri}.", soft_wrap=True)
    _tell_start(done)


@main.command()
@directory_option
@json_option
@click.option("--purge", is_flag=True, help="Free the disk buffer even if it holds the only copy of a checkpoint.")
@reporting
def down(directory: Path, as_json: bool, purge: bool) -> None:
    """Stop the pair in order: a final checkpoint, the primary, the secondary."""
    report = Pair(directory).down(purge=purge)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _tell_down(report, directory)


def _tell_down(report: dict[str, Any], directory: Path) -> None:
    if not report["stopped"] and not report["killed"]:
        console.print("Nothing was running.")
    else:
        console.print(f"Stopped {' and '.join(report['stopped']) or 'nothing by itself'}.")
    if report.get("hosts"):
        console.print(f"Removed the hosts {', '.join(report['hosts'])}, which a killed supervisor had left.")
    if report["killed"]:
        console.print(
            f"Did not end by itself, or not well: {', '.join(report['killed'])}; its log says why.", style="red"
        )
    for buffer in report["buffers"]:
        if buffer["kept"]:
            console.print(f"Kept the disk buffer {buffer['directory']}: {buffer['why']}.", soft_wrap=True)
            console.print(
                f"`tandemdisk up --dir {directory}` goes on from it; `down --purge` frees it.", soft_wrap=True
            )


@main.command("accept-disk")
@click.option("--dir", "directory", type=click.Path(file_okay=False, path_type=Path), help="The pair's directory.")
@click.option("--config", type=click.Path(path_type=Path), help="Or the TOML file of one side.")
@reporting
def accept_disk(directory: Path | None, config: Path | None) -> None:
    """Say that the disk of a primary that refuses to start is the right one.

    It is refused when it is another one than the primary left, or was written to: an empty or old disk would overwrite
    the secondary's. Accepted, the secondary is compared with it as a whole.
    """
    if (directory is None) == (config is None):
        raise ConfigError("Name the side: either --dir or --config.")
    if config is not None:
        settings = load_config(config)
        must_not_run(settings, "primary")
        with roles_held({"primary": settings}), as_owner(settings), at_rest(settings):
            accept_disks(settings)
    elif directory is not None:
        settings = Pair(directory).accept_disks()
    names = ", ".join(volume.disk for volume in settings.volumes)
    console.print(f"Accepted {names} as it is; side {settings.side} starts with it.", soft_wrap=True)


def _process_command(role: Role) -> click.Command:
    @click.command(name=role, help=f"Run a {role} by itself, in the foreground, as its configuration file says.")
    @click.option("--config", required=True, type=click.Path(path_type=Path), help="The side's TOML file.")
    @reporting
    def command(config: Path) -> None:
        settings, process = _side_to_run(config, role)
        Path(settings.directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = settings_memfd(settings)
        os.set_inheritable(fd, True)
        arguments = [*python_command(process), "--settings-fd", str(fd)]
        sys.stdout.flush()
        os.execve(arguments[0], arguments, python_environment())

    return command


def _side_to_run(config: Path, role: Role) -> tuple[NodeSettings, Role]:
    """The settings in ``config``, and the process that the side is started as: what it remembers to be, ``role`` only
    if it never ran. An old primary started as secondary would lead beside the side that took over from it."""
    settings = load_config(config, role)
    process = process_role(settings, role)
    if process != role:
        settings = load_config(config, process)
        stderr.print(
            f"Side {settings.side} was started as {role} and runs as {process}: that is what it is by its metadata.",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if process == "primary" and DiskBuffer.exists(settings.buffer.directory):
        remove_buffer(settings.buffer.directory)  # of the time before its promotion, which is complete
    return settings, process


main.add_command(_process_command("primary"))
main.add_command(_process_command("secondary"))


@main.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Where to write them.  [default: here]",
)
@click.option(
    "--name", default=lambda: os.uname().nodename.split(".")[0], help="Name of the files.  [default: this host's]"
)
@reporting
def keygen(directory: Path, name: str) -> None:
    """Make the keys of one side, for replication between hosts."""
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"--name {name!r} cannot be a file's name.")
    public, secret = generate_keys(directory, name)
    console.print(f"secret  {secret}   stays here: replication.secret_key of this side", soft_wrap=True)
    console.print(f"public  {public}   goes to the peer: replication.peer_key of the other side", soft_wrap=True)


@main.command()
@click.option("--size", type=SIZE, default="256M", show_default=True, help="Size of the disk.")
@reporting
def demo(size: int) -> None:
    """Watch a disk survive its primary: about ten seconds, no root."""
    from deploy.demo import run  # not needed by any other command

    if size < 64 << 20:
        raise ConfigError(f"The demo writes to a disk of at least 64 MiB, not {format_size(size)}.")
    sys.exit(run(console, size))


bench.callback = reporting(bench.callback) if bench.callback is not None else None
main.add_command(bench)
for group in (chaos, hosts, redirect, deployment, snapshot):
    main.add_command(wrap(group, reporting))


if __name__ == "__main__":
    main()
