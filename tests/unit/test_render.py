"""Pair files, what is rendered from them, who leads, and what commands that need root say without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from common.config import load_config
from common.errors import ConfigError
from deploy import hosts
from deploy.bench import hosts_command, peers, runner, workloads
from deploy.cli import main
from deploy.hosts import NetnsHosts, parse_rate, rate_bits
from deploy.layout import PairDirectory, PairOptions
from deploy.pairfile import load_pair_file
from deploy.redirect import leader
from deploy.render import render, write

EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "pair.toml"


def test_the_example_renders_for_both_hosts(tmp_path: Path) -> None:
    pair = load_pair_file(EXAMPLE)
    assert pair.host("east").role == "primary"
    assert pair.host("west").side == "b"
    for name in pair.hosts:
        root = tmp_path / name
        for rendered in render(pair, name, tmp_path / "keys", "/opt/td/bin/tandemdisk"):
            path = write(rendered, root)
            assert path.stat().st_mode & 0o777 == rendered.mode
        role = pair.host(name).role
        unit = (root / f"etc/systemd/system/tandemdisk-{role}@.service").read_text()
        assert f"ExecStart=/opt/td/bin/tandemdisk {role} --config /etc/tandemdisk/%i/{role}.toml" in unit
        for line in ("Type=notify", "WatchdogSec=", "NoNewPrivileges=yes", "ProtectSystem=strict"):
            assert line in unit
        dropin = (root / f"etc/systemd/system/tandemdisk-{role}@mail.service.d/disks.conf").read_text()
        assert "rw" in dropin
        assert "ReadWritePaths=/var/lib/images/spool.raw" in dropin
        socket = (root / "etc/systemd/system/tandemdisk-leads-mail.socket").read_text()
        assert f"ListenStream={pair.host(name).machine.address}:10811" in socket
        firewall = (root / "etc/nftables.d/tandemdisk-mail.nft").read_text()
        assert f"saddr {pair.peer(name).machine.address} accept" in firewall
    secrets = {name: (tmp_path / name / f"etc/tandemdisk/mail/{name}.key_secret").read_text() for name in pair.hosts}
    assert secrets["east"] != secrets["west"]
    assert not (tmp_path / "east/etc/tandemdisk/mail/west.key_secret").exists()
    public = (tmp_path / "east/etc/tandemdisk/mail/west.key").read_text().split('"')[1]
    assert public in secrets["west"]


def test_a_rendered_configuration_is_what_the_process_reads(tmp_path: Path) -> None:
    pair = load_pair_file(EXAMPLE)
    (config, *_) = render(pair, "east", tmp_path / "keys")
    here = tmp_path / "keys"
    path = tmp_path / "primary.toml"
    path.write_text(config.text.replace("/etc/tandemdisk/mail/", f"{here}/"))
    settings = load_config(path, "primary")
    assert settings.replication.connect == "tcp://10.0.0.2:10810"
    assert settings.replication.listen == "tcp://10.0.0.1:10810"
    assert not settings.replication.plaintext
    assert settings.buffer.size_bytes == 1 << 30


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    pair = load_pair_file(EXAMPLE)
    true = shutil.which("true") or "/bin/true"
    programs = re.compile(r"/usr/sbin/nft|/usr/local/lib/\S*/leads.sh")
    units = [
        write(replace(rendered, text=programs.sub(true, rendered.text)), tmp_path)
        for name in pair.hosts
        for rendered in render(pair, name, tmp_path / "keys", true)
        if rendered.path.suffix in (".service", ".socket")
    ]
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, units)], capture_output=True, text=True, timeout=60, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if "tandemdisk" in line]
    assert not complaints


def test_the_command_keeps_the_secret_to_itself(tmp_path: Path) -> None:
    config = tmp_path / "pair.toml"
    shutil.copy(EXAMPLE, config)
    result = CliRunner().invoke(main, ["deploy", "render", str(config), "--host", "west"])
    assert result.exit_code == 0, result.output
    assert "secret-key" not in result.output
    assert "tcp 10810: replication" in result.output
    assert "systemctl enable --now tandemdisk-secondary@mail" in result.output
    assert "tandemdisk rejoin --dir /etc/tandemdisk/mail" in result.output
    unknown = CliRunner().invoke(main, ["deploy", "render", str(config), "--host", "north"])
    assert unknown.exit_code == 2
    assert "east and west" in unknown.output


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("[hosts.west]", "[other.west]", "two tables"),
        ('starts_as = "secondary"', 'starts_as = "primary"', "starts_as"),
        ('address = "10.0.0.1"', 'adress = "10.0.0.1"', "adress` is not known"),
        ('west = "/dev/vg1/mail"', 'north = "/dev/vg1/mail"', "one disk for each"),
        ('pair_id = "mail"', 'directory = "/x"', "follows from the host"),
        ("[buffer]", "[replication]\nport = 0\n[buffer]", "no port"),
        ('size_bytes = "1G"', 'size = "1G"', "size"),
        ('mode = "sync"', 'mode = "fast"', "fast"),
        ('export = "10.0.0.1:10809"', 'export = "10.0.0.1"', "port"),
        ('export = "10.0.0.1:10809"', f'export = "10.0.0.1:{"9" * 5000}"', "port"),
        ('agent = "10.0.0.1:10811"', 'agent = "10811"', "HOST:PORT"),
        ('agent = "10.0.0.1:10811"', 'agent = "10.0.0.1:99999"', "HOST:PORT"),
    ],
)
def test_a_wrong_pair_file_is_told_apart(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    text = EXAMPLE.read_text()
    assert old in text
    path = tmp_path / "pair.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_pair_file(path)
    assert sentence in str(caught.value)


def test_rates() -> None:
    assert parse_rate("1Gbit") == "1gbit"
    assert parse_rate("unlimited") is None
    assert rate_bits("2.5mbit") == 2_500_000
    with pytest.raises(ValueError, match="100mbit"):
        parse_rate("fast")


def side(role: str, state: str, uri: str | None, pid: int | None = 1) -> dict[str, Any]:
    return {"role": role, "state": state, "nbd_uri": uri, "pid": pid}


@pytest.mark.parametrize(
    ("primary", "secondary", "expected"),
    [
        (side("primary", "protected", "p"), side("secondary", "RUNNING", "s"), "p"),
        (side("primary", "alone", "p"), side("secondary", "dead", None, None), "p"),
        (side("primary", "dead", None, None), side("secondary", "RUNNING", "s"), None),
        (side("primary", "dead", None, None), side("primary", "DONE", "s"), "s"),
        (side("primary", "alone", "p"), side("primary", "FAILOVER", "s"), "s"),
        (side("primary", "fenced", "p"), side("secondary", "dead", None, None), None),
    ],
)
def test_who_leads(primary: dict[str, Any], secondary: dict[str, Any], expected: str | None) -> None:
    assert leader({"primary": primary, "secondary": secondary}) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["up", "--size", "1M", "--hosts", "netns"],
        ["hosts", "up"],
        ["hosts", "down"],
        ["hosts", "list"],
        ["hosts", "cut", "x"],
        ["hosts", "heal", "x"],
        ["hosts", "rate", "x", "1gbit"],
        ["chaos", "--hosts", "netns"],
        ["bench", "--hosts", "netns"],
    ],
)
def test_without_root_each_command_says_so(short_dir: Path, arguments: list[str]) -> None:
    directory = ["--dir", str(short_dir / "p")] if arguments[0] == "up" else []
    root = os.geteuid() == 0
    assert all((hosts_command, peers, runner, workloads)), "imported before: root's Python may be root's alone to read"
    short_dir.chmod(0o777)
    if root:
        os.seteuid(65534)
    try:
        result = CliRunner().invoke(main, [*arguments, *directory])
    finally:
        if root:
            os.seteuid(0)
    assert result.exit_code == 2
    assert "need root" in result.stderr
    assert "sudo" in result.stderr
    assert ("leave --hosts out" in result.stderr) == (arguments[0] in ("up", "chaos")), "where that says something"
    assert not result.stdout
    assert not (short_dir / "p").exists()


def test_root_without_its_capabilities_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container: what is missing, and the word that gives it, instead of what a network tool says."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(hosts, "_effective_capabilities", lambda: 0xA80425FB)  # docker's default set
    with pytest.raises(ConfigError, match="need CAP_NET_ADMIN and CAP_SYS_ADMIN") as raised:
        hosts.require_root()
    assert "--privileged" in (raised.value.hint or "")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (PairOptions(size=1 << 20, hosts="elsewhere"), "names no hosts"),
        (PairOptions(size=1 << 20, hosts="local", rate="1gbit"), "--hosts netns"),
    ],
)
def test_hosts_that_cannot_be(short_dir: Path, options: PairOptions, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        PairDirectory(short_dir / "p").create(options)
    assert not (short_dir / "p").exists()
    with pytest.raises(ConfigError, match="letters and digits"):
        NetnsHosts("no good")
