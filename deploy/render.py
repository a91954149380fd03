"""What a host of a pair needs, as files: configuration, keys, systemd units, firewall.

    /etc/tandemdisk/PAIR.toml                                configuration; the same file whichever role the side has
    /etc/tandemdisk/PAIR/NAME.key_secret, OTHER.key          CURVE keys
    /etc/systemd/system/tandemdisk-{primary,secondary}@.service
    /etc/systemd/system/tandemdisk-{primary,secondary}@PAIR.service.d/disks.conf
    /etc/nftables.d/tandemdisk-PAIR.nft                      the peer may reach the replication port, nobody else

Both roles' units are there on both hosts, because a failover swaps the roles; the one to enable first is named.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

import click

from common.config import format_config
from common.errors import ConfigError
from common.keys import PUBLIC_SUFFIX, SECRET_SUFFIX, generate_keys, peer_problems, secret_problems
from common.settings import Role
from deploy.pairfile import ETC, PairFile, PairHost, load_pair_file

SYSTEMD: Final = Path("/etc/systemd/system")
COMMAND: Final = "/usr/bin/tandemdisk"
"""In the templates."""
ROLES: Final[tuple[Role, Role]] = ("primary", "secondary")


@dataclass(frozen=True, slots=True)
class RenderedFile:
    """One file for the host."""

    path: Path
    text: str
    mode: int = 0o644
    owner: str = "root:root"

    @property
    def secret(self) -> bool:
        return not self.mode & 0o077


def render(pair: PairFile, name: str, keys: Path, command: str = COMMAND) -> Iterator[RenderedFile]:
    """All files of host ``name``. Keys come from the directory ``keys``; those that are missing are made there."""
    host, peer = pair.host(name), pair.peer(name)
    make_keys(pair, keys)
    yield RenderedFile(
        ETC / f"{pair.pair_id}.toml", format_config(host.settings, host.role), 0o640, "root:tandemdisk"
    )
    secret, public = f"{name}{SECRET_SUFFIX}", f"{peer.machine.name}{PUBLIC_SUFFIX}"
    yield RenderedFile(ETC / pair.pair_id / secret, (keys / secret).read_text(), 0o600, "tandemdisk:tandemdisk")
    yield RenderedFile(ETC / pair.pair_id / public, (keys / public).read_text())
    for role in ROLES:
        unit = f"tandemdisk-{role}@"
        template = files("deploy").joinpath("systemd", f"{unit}.service").read_text(encoding="utf-8")
        yield RenderedFile(SYSTEMD / f"{unit}.service", template.replace(COMMAND, command))
        yield RenderedFile(SYSTEMD / f"{unit}{pair.pair_id}.service.d" / "disks.conf", _disks(host))
    yield RenderedFile(Path(f"/etc/nftables.d/tandemdisk-{pair.pair_id}.nft"), _firewall(pair, host, peer))


def make_keys(pair: PairFile, directory: Path) -> None:
    """Keys of both hosts in ``directory``. ConfigError if those that are there cannot be used."""
    for name in pair.hosts:
        secret, public = directory / f"{name}{SECRET_SUFFIX}", directory / f"{name}{PUBLIC_SUFFIX}"
        if not secret.exists() and not public.exists():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            generate_keys(directory, name)
        problems = [*secret_problems(str(secret)), *peer_problems(str(public))]
        if problems:
            raise ConfigError("The keys cannot be used:", problems=tuple(problems), hint="Choose another --keys.")


def _disks(host: PairHost) -> str:
    """A drop-in: the unit may reach these disks and nothing else on the host."""
    lines = ["[Service]"]
    for volume in host.settings.volumes:
        if volume.disk.startswith("/dev/"):
            lines.append(f"DeviceAllow={volume.disk} rw")
        else:
            lines.append(f"ReadWritePaths={volume.disk}")
    return "\n".join(lines) + "\n"


def ports(pair: PairFile, host: PairHost) -> list[tuple[int, str]]:
    """(TCP port, what for) that have to be open on ``host``."""
    found = [(pair.port, "replication, from the peer")]
    if host.settings.export.host is not None:
        found.append((host.settings.export.port, "NBD export, from the clients"))
    return found


def _firewall(pair: PairFile, host: PairHost, peer: PairHost) -> str:
    family = "ip6" if ":" in peer.machine.address else "ip"
    lines = [
        f"# Pair {pair.pair_id}, host {host.machine.name}. `nft -f` this file, or include it from /etc/nftables.conf.",
        f"table inet tandemdisk_{''.join(c if c.isalnum() else '_' for c in pair.pair_id)} {{",
        "    chain input {",
        "        type filter hook input priority -10; policy accept;",
        '        iifname "lo" accept',
        f"        tcp dport {pair.port} {family} saddr {peer.machine.address} accept",
        f"        tcp dport {pair.port} drop",
        "    }",
        "}",
    ]
    if host.settings.export.host is not None:
        export = host.settings.export.port
        lines.insert(1, f"# The NBD export on port {export} knows no passwords: let nobody but its clients reach it.")
    return "\n".join(lines) + "\n"


def write(rendered: RenderedFile, root: Path) -> Path:
    """Write a file below ``root`` with its mode; its path there. Raises ConfigError if that cannot be."""
    path = root / rendered.path.relative_to("/")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, stat.S_IRUSR | stat.S_IWUSR)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(rendered.text)
        path.chmod(rendered.mode)
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error.strerror}.", hint="Choose another --output.") from error
    return path


@click.group("deploy")
def deployment() -> None:
    """What other machines need to run a side of a pair."""


@deployment.command("render")
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--host", "name", required=True, help="One of the two hosts in the pair file CONFIG.")
@click.option("--keys", type=click.Path(file_okay=False, path_type=Path),
              help="Keys of both hosts, made here if they are missing.  [default: keys, beside CONFIG]")  # fmt: skip
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Write them below this directory.")
@click.option("--command", default=COMMAND, show_default=True, help="Where tandemdisk is installed on the host.")
def deploy_render(config: Path, name: str, keys: Path | None, output: Path | None, command: str) -> None:
    """Print all files that a host needs; its secret key is only written, with --output."""
    pair = load_pair_file(config)
    host = pair.host(name)
    for rendered in render(pair, name, keys or config.parent / "keys", command):
        click.echo(f"# === {rendered.path}  {rendered.mode:04o} {rendered.owner}")
        if output is not None:
            click.echo(f"written to {write(rendered, output)}")
        elif rendered.secret:
            click.echo("# (secret: --output DIR writes it)")
        else:
            click.echo(rendered.text)
    for port, purpose in ports(pair, host):
        click.echo(f"# tcp {port}: {purpose}")
    click.echo(f"# then: useradd --system tandemdisk; systemctl enable --now tandemdisk-{host.role}@{pair.pair_id}")
