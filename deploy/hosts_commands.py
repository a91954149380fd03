"""``tandemdisk hosts …`` and ``tandemdisk redirect``: hosts made of network namespaces, and the way to who leads."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from common.errors import ConfigError, NotRunning
from deploy.faults import Cut, Fault, OneWayCut
from deploy.hosts import NetnsHosts, found, parse_rate, remove_all, require_root

MAX_PORT: Final = 65535
_PORT: Final = re.compile(r"[0-9]{1,5}")


class RateType(click.ParamType):  # type: ignore[type-arg]  # generic only in later versions of click
    """``100mbit``, ``1gbit``, ``unlimited``."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return parse_rate(str(value)) or "unlimited"
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ListenType(click.ParamType):  # type: ignore[type-arg]  # as above
    """``HOST:PORT``, ``[::1]:PORT``."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        host, colon, port = str(value).rpartition(":")
        if not colon or not host or not _PORT.fullmatch(port) or int(port) > MAX_PORT:
            self.fail(f"{value!r} is no address; write HOST:PORT", param, ctx)
        return host.strip("[]"), int(port)


RATE: Final = RateType()
LISTEN: Final = ListenType()


@click.group("hosts")
def hosts() -> None:
    """Two hosts made of network namespaces, with a cable that can be slow, cut or out (root)."""


def _existing(tag: str) -> NetnsHosts:
    require_root()
    one = NetnsHosts(tag)
    if not one.exists():
        raise NotRunning(f"There are no hosts {tag}.", hint="`tandemdisk hosts list` shows those that there are.")
    return one


@hosts.command("up")
@click.option("--tag", help="What to call them.  [default: random]")
@click.option("--rate", type=RATE, default="unlimited", show_default=True, help="What the cable carries.")
def hosts_up(tag: str | None, rate: str) -> None:
    """Make two hosts that stay until `hosts down`."""
    made = NetnsHosts(tag, parse_rate(rate))
    if not made.up(keep=True):
        raise ConfigError(f"Hosts {made.tag} are there already.", hint="Choose another --tag.")
    for side, host in made.hosts.items():
        click.echo(f"{side}  {host.name}  {host.address}   run there: {' '.join(host.prefix())} COMMAND")
    click.echo(f"A pair on them: tandemdisk up --dir DIR --size 1G --hosts netns:{made.tag}")


@hosts.command("down")
@click.argument("tags", nargs=-1)
def hosts_down(tags: tuple[str, ...]) -> None:
    """Remove hosts by TAG with everything that runs in them; without one, all that nobody holds."""
    removed = remove_all(tags)
    click.echo(f"Removed {', '.join(removed)}." if removed else "There was nothing to remove.")
    if not tags and (left := [one.tag for one in found()]):
        click.echo(f"In use: {', '.join(left)}. Named, they are removed with everything that runs in them.")


@hosts.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def hosts_list(as_json: bool) -> None:
    """Show the hosts that there are."""
    require_root()
    described = [one.describe() for one in found()]
    if as_json:
        click.echo(json.dumps({"hosts": described}))
        return
    for one in described:
        use = "in use" if one["in_use"] else "kept" if one["kept"] else "left behind"
        names = "  ".join(f"{host['namespace']} ({host['processes']} processes)" for host in one["hosts"].values())
        click.echo(f"{one['tag']}  {use}  {one['rate'] or 'unlimited'}  {names}")


@hosts.command("rate")
@click.argument("tag")
@click.argument("rate", type=RATE)
def hosts_rate(tag: str, rate: str) -> None:
    """Change what the cable of TAG carries."""
    _existing(tag).set_rate(parse_rate(rate))


def _cut(tag: str, to: str | None) -> Fault:
    one = _existing(tag)
    if to is None:
        return Cut(one)
    return OneWayCut(one, "a" if to == "a" else "b")


@hosts.command("cut")
@click.argument("tag")
@click.option("--to", type=click.Choice(["a", "b"]), help="Only what is sent to this side.")
def hosts_cut(tag: str, to: str | None) -> None:
    """Let what is sent over the cable of TAG vanish."""
    _cut(tag, to).begin()


@hosts.command("heal")
@click.argument("tag")
def hosts_heal(tag: str) -> None:
    """Undo `cut`."""
    _cut(tag, None).heal()


@click.command("redirect")
@click.option("--dir", "directory", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="The pair's directory.")  # fmt: skip
@click.option("--listen", type=LISTEN, default="127.0.0.1:10809", show_default=True, help="For the clients.")
def redirect(directory: Path, listen: tuple[str, int]) -> None:
    """Lead NBD clients to whichever side leads, before and after a failover; until Ctrl-C."""
    from deploy.pair import Pair
    from deploy.redirect import Redirector

    pair = Pair(directory)
    names = [volume["name"] for volume in pair.status()["volumes"]]
    with Redirector(pair, listen) as redirector:
        for name in names:
            click.echo(redirector.uri(name))
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


def wrap(command: click.Command, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> click.Command:
    """``command``, or all commands of a group, with their callbacks wrapped."""
    if isinstance(command, click.Group):
        for below in command.commands.values():
            wrap(below, wrapper)
    elif command.callback is not None:
        command.callback = wrapper(command.callback)
    return command
