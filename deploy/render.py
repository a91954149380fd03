"""What a host of a pair needs, as files: configuration, keys, systemd units, firewall, and a script that installs them.

    /etc/tandemdisk/PAIR/ROLE.toml                           configuration, named by what the side starts as: the same
                                                             file whatever it is now; `--dir /etc/tandemdisk/PAIR`
    /etc/tandemdisk/PAIR/NAME.key_secret, OTHER.key          CURVE keys
    /etc/systemd/system/tandemdisk-ROLE@.service
    /etc/systemd/system/tandemdisk-ROLE@PAIR.service.d/disks.conf
    /etc/systemd/system/tandemdisk-firewall@.service
    /etc/nftables.d/tandemdisk-PAIR.nft                      the peer may reach the replication port, nobody else
    /etc/systemd/system/tandemdisk-leads-PAIR{.socket,@.service}, /usr/local/lib/tandemdisk/leads.sh
                                                             with `agent`: the answer to HAProxy's agent check
    install.sh                                               puts them there and starts the side

One unit a host: ``tandemdisk primary`` and ``secondary`` run a side as what its metadata says, so the unit that the
side was first started with stays the right one through every failover.
"""

from __future__ import annotations

import os
import re
import shlex
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
from deploy.pairfile import ETC, STATE, PairFile, PairHost, load_pair_file

SYSTEMD: Final = Path("/etc/systemd/system")
LIBRARY: Final = Path("/usr/local/lib/tandemdisk")
INSTALL: Final = Path("/install.sh")
"""Beside the others, below ``--output``; it does not go to the host's root."""
COMMAND: Final = "/usr/bin/tandemdisk"
"""In the templates."""


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
    host = pair.host(name)
    make_keys(pair, keys)
    rendered = [*_side_files(pair, host, keys, command), *_agent_files(pair, host)]
    yield from rendered
    yield RenderedFile(INSTALL, _install(pair, host, rendered, command), 0o755)


def _side_files(pair: PairFile, host: PairHost, keys: Path, command: str) -> Iterator[RenderedFile]:
    name, peer = host.machine.name, pair.peer(host.machine.name)
    directory, unit = ETC / pair.pair_id, f"tandemdisk-{host.role}@"
    configuration = format_config(host.settings, host.role)
    yield RenderedFile(directory / f"{host.role}.toml", configuration, 0o640, "root:tandemdisk")
    secret, public = f"{name}{SECRET_SUFFIX}", f"{peer.machine.name}{PUBLIC_SUFFIX}"
    yield RenderedFile(directory / secret, (keys / secret).read_text(), 0o600, "tandemdisk:tandemdisk")
    yield RenderedFile(directory / public, (keys / public).read_text())
    yield RenderedFile(SYSTEMD / f"{unit}.service", _template(f"{unit}.service").replace(COMMAND, command))
    yield RenderedFile(SYSTEMD / f"{unit}{pair.pair_id}.service.d" / "disks.conf", _disks(host))
    firewall = "tandemdisk-firewall@.service"
    yield RenderedFile(SYSTEMD / firewall, _template(firewall))
    yield RenderedFile(Path(f"/etc/nftables.d/tandemdisk-{pair.pair_id}.nft"), _firewall(pair, host, peer))


def _agent_files(pair: PairFile, host: PairHost) -> Iterator[RenderedFile]:
    """What answers HAProxy's agent check, if the pair file says where."""
    if host.agent is None:
        return
    unit = f"tandemdisk-leads-{pair.pair_id}"
    for end in (".socket", "@.service"):
        text = _template(f"tandemdisk-leads{end}").replace("PAIR", pair.pair_id).replace("AGENT", host.agent)
        yield RenderedFile(SYSTEMD / f"{unit}{end}", text)
    script = files("deploy").joinpath("examples", "leads.sh").read_text(encoding="utf-8")
    yield RenderedFile(LIBRARY / "leads.sh", script, 0o755)


def _template(name: str) -> str:
    return files("deploy").joinpath("systemd", name).read_text(encoding="utf-8")


def _install(pair: PairFile, host: PairHost, rendered: list[RenderedFile], command: str) -> str:
    """The script that puts the other files where they belong, and starts the side."""
    lines: list[str] = []
    for one in rendered:
        user, _, group = one.owner.partition(":")
        lines.append(f"put {one.mode:04o} {user} {group} {shlex.quote(str(one.path))}")
    agent = f"systemctl enable --now tandemdisk-leads-{pair.pair_id}.socket"
    values = {
        "HOST": host.machine.name,
        "PAIR": pair.pair_id,
        "ROLE": host.role,
        "COMMAND": shlex.quote(command),
        "DISKS": " ".join(shlex.quote(volume.disk) for volume in host.settings.volumes),
        "FILES": "\n".join(lines),
        "AGENT": agent if host.agent is not None else "",
    }
    return re.sub(rf"\b({'|'.join(values)})\b", lambda found: values[found[1]], _template("install.sh"))


def make_keys(pair: PairFile, directory: Path) -> None:
    """Keys of both hosts in ``directory``. ConfigError if those that are there cannot be used."""
    for name in pair.hosts:
        secret, public = directory / f"{name}{SECRET_SUFFIX}", directory / f"{name}{PUBLIC_SUFFIX}"
        if not public.exists():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            generate_keys(directory, name, keep=True)
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
    for directory in (host.settings.buffer.directory, host.settings.buffer.spill_directory):
        if directory is not None and not directory.startswith(("/dev/", f"{STATE}/")):
            lines.append(f"ReadWritePaths=-{directory}")
    return "\n".join(lines) + "\n"


def ports(pair: PairFile, host: PairHost) -> list[tuple[int, str]]:
    """(TCP port, what for) that have to be open on ``host``."""
    found = [(pair.port, "replication, from the peer")]
    if host.settings.export.host is not None:
        found.append((host.settings.export.port, "NBD export, from the clients"))
    if host.agent is not None:
        found.append((int(host.agent.rpartition(":")[2]), "whether this host leads, from HAProxy"))
    return found


def _firewall(pair: PairFile, host: PairHost, peer: PairHost) -> str:
    family = "ip6" if ":" in peer.machine.address else "ip"
    table = f"table inet tandemdisk_{''.join(c if c.isalnum() else '_' for c in pair.pair_id)}"
    lines = [
        f"# Pair {pair.pair_id}, host {host.machine.name}. `nft -f` this file, again and again:",
        f"{table}",
        f"delete {table}",
        f"{table} {{",
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
    for line in next_steps(pair, host, keys or config.parent / "keys", output):
        click.echo(f"# {line}")


def next_steps(pair: PairFile, host: PairHost, keys: Path, output: Path | None) -> Iterator[str]:
    """What an operator does with the files, and afterwards on that host."""
    name, directory, peer = host.machine.name, ETC / pair.pair_id, pair.peer(host.machine.name).machine.name
    unit = f"tandemdisk-{host.role}@{pair.pair_id}"
    where = output or "DIR"
    if output is None:
        yield "then: give --output DIR, which writes them, the secret key too"
    yield f"then: copy {where} to {name} and run `sh {where}/install.sh` there, as root"
    yield f"      render {peer} from the same {keys}, which holds the keys of both"
    yield f"      programs of the group tandemdisk open the export at {host.settings.export.unix}:"
    yield "      usermod --append --groups tandemdisk libvirt-qemu"
    yield f"on {name}, as root, as long as the pair lives:"
    yield f"      tandemdisk status --dir {directory}      (checkpoint, verify, resize, switchover … the same way)"
    yield f"      tandemdisk failover --dir {directory}    when {peer} led and is dead (--primary-dead: you know it)"
    yield f"      tandemdisk rejoin --dir {directory}      when {peer} has taken over; --dry-run says what it costs"
    yield f"      systemctl start {unit}       whichever role {name} has by then"
