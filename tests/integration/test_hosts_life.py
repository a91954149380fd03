"""Hosts made of namespaces come and go: with their maker however it ends, under a pair, by command, at a rate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from deploy import hosts as hosts_module
from deploy import hosts_commands
from deploy.cli import main
from deploy.hosts import NetnsHosts, found, remove_all, sweep
from deploy.pair import Pair, PairOptions
from tests import pairs
from tests.conftest import wait_until
from tests.pairs import MIB, tandemdisk

pytestmark = [pytest.mark.root, pytest.mark.local_hosts]
ROOT = Path(__file__).parents[2]


def tags() -> set[str]:
    return {one.tag for one in found()}


def maker(tag: str, then: str) -> subprocess.Popen[bytes]:
    program = f"import os, signal, sys, time\nfrom deploy import hosts\nmade = hosts.NetnsHosts({tag!r})\n{then}"
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)


def guardian_of(tag: str) -> psutil.Process:
    (one,) = [
        process for process in psutil.process_iter(["cmdline"])
        if {"deploy.guardian", tag} <= set(process.info["cmdline"] or ())
    ]  # fmt: skip
    return one


@pytest.fixture
def kept() -> Iterator[NetnsHosts]:
    """Hosts by `hosts up`, at a rate."""
    made = tandemdisk("hosts", "up", "--tag", f"k{os.getpid()}", "--rate", "200mbit")
    assert made.returncode == 0, made.stderr
    hosts = NetnsHosts(f"k{os.getpid()}")
    yield hosts
    hosts.down()


@pytest.fixture
def no_others(kept: NetnsHosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hosts down` of all, but in a world in which there are no hosts of other tests."""
    for module in (hosts_module, hosts_commands):
        monkeypatch.setattr(module, "found", lambda: [NetnsHosts(kept.tag)] if kept.tag in tags() else [])


def down_all() -> str:
    return CliRunner().invoke(main, ["hosts", "down"]).output


def listed(tag: str) -> dict[str, object]:
    (one,) = [each for each in json.loads(tandemdisk("hosts", "list", "--json").stdout)["hosts"] if each["tag"] == tag]
    assert isinstance(one, dict)
    return one


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_hosts_go_with_their_maker_however_it_ends(number: signal.Signals) -> None:
    """What runs in them as well; nobody has to sweep, and the next maker may have the same name at once."""
    tag = f"gone{int(number)}"  # both may run at once
    then = "made.up(); print(flush=True); time.sleep(60)"
    with maker(tag, then) as one:
        assert one.stdout is not None
        assert one.stdout.readline()
        hosts = NetnsHosts(tag)
        with subprocess.Popen([*hosts.hosts["a"].prefix(), "sleep", "60"]) as inside:
            wait_until(lambda: inside.pid in hosts.hosts["a"].pids(), 10, "a process in them")
            one.send_signal(number)
            one.wait(10)
            with hosts as again:
                assert again.owned, "waits for the guardian instead of taking what is about to go"
                assert again.exists()
                assert inside.wait(10) == -signal.SIGKILL
    assert not hosts.exists()
    assert tag not in tags()


def test_a_maker_that_is_stopped_halfway_leaves_nothing() -> None:
    """`hosts up` hosts stay only once they were made."""
    then = "hosts.NetnsHosts.set_rate = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\nmade.up(keep=True)"
    with maker("half", then) as one:
        assert one.wait(20) == -signal.SIGTERM
    wait_until(lambda: "half" not in tags(), 10, "being removed")
    assert not any(host.exists() for host in NetnsHosts("half").hosts.values())


def test_what_outlives_maker_and_guardian_is_swept() -> None:
    with maker("orphan", "made.up(); print(flush=True); time.sleep(60)") as one:
        assert one.stdout is not None
        assert one.stdout.readline()
        guardian = guardian_of("orphan")
        guardian.kill()
        orphan = NetnsHosts("orphan")
        assert orphan.exists()
        one.kill()

    def swept() -> bool:
        sweep()  # or whoever else makes hosts just now is about to, and then it is not ours to take
        return not orphan.exists()

    guardian.wait(10)
    wait_until(swept, 10, "being swept")
    assert "orphan" not in tags()


@pytest.mark.usefixtures("no_others")
def test_kept_hosts_stay_while_somebody_works_in_them(kept: NetnsHosts) -> None:
    assert kept.exists()
    assert kept.tag not in sweep()
    assert not NetnsHosts(kept.tag).up(), "somebody's on purpose"
    assert listed(kept.tag) | {"hosts": 0} == {
        "tag": kept.tag, "kept": True, "in_use": False, "rate": "200mbit", "hosts": 0
    }  # fmt: skip
    with subprocess.Popen([*kept.hosts["b"].prefix(), "sleep", "60"]) as inside:
        wait_until(lambda: inside.pid in kept.hosts["b"].pids(), 10, "a process in them")
        assert f"In use: {kept.tag}." in down_all()
        assert remove_all([kept.tag]) == [kept.tag], "but not when they are named"
        assert inside.wait(10) == -signal.SIGKILL
    assert down_all() == "There was nothing to remove.\n"


@pytest.mark.usefixtures("no_others")
def test_kept_hosts_that_nobody_uses_are_removed(kept: NetnsHosts) -> None:
    assert down_all() == f"Removed {kept.tag}.\n"
    assert not kept.exists()


def test_the_rate_that_is_listed_is_the_one_that_holds(kept: NetnsHosts, short_dir: Path) -> None:
    assert tandemdisk("hosts", "rate", kept.tag, "50mbit").returncode == 0
    assert listed(kept.tag)["rate"] == "50mbit"
    assert "rate 50Mbit" in kept.hosts["a"].run("tc", "qdisc", "show", "dev", "link0")
    refused = tandemdisk("up", "--dir", short_dir / "p", "--size", "1M", "--hosts", f"netns:{kept.tag}",
                         "--rate", "1gbit")  # fmt: skip
    assert refused.returncode == 2
    assert f"hosts rate {kept.tag} 1gbit" in refused.stderr
    assert not (short_dir / "p").exists()
    assert listed(kept.tag)["rate"] == "50mbit"


@pytest.mark.usefixtures("no_others")
def test_nobody_removes_kept_hosts_under_a_pair(kept: NetnsHosts, short_dir: Path) -> None:
    options = PairOptions(size=4 * MIB, hosts=f"netns:{kept.tag}")
    with pairs.running(short_dir / "p", options) as pair:
        assert listed(kept.tag)["in_use"]
        status = pair.status()
        for role in ("primary", "secondary"):  # as far as processes go, nobody is there then
            pairs.kill(status[role]["pid"])
        wait_until(lambda: not any(host.pids() for host in kept.hosts.values()), 10, "empty hosts")
        assert f"In use: {kept.tag}." in down_all()
        pair.up()
        pair.wait_protected(30)
    assert kept.exists(), "they stay when the pair goes"
    assert not listed(kept.tag)["in_use"]


@pytest.mark.parametrize("guarded", [True, False])
def test_a_killed_supervisor_leaves_no_hosts(short_dir: Path, guarded: bool) -> None:
    """At once; or by `down`, if its guardian was killed as well."""
    directory = short_dir / "p"
    up = tandemdisk("up", "--dir", directory, "--size", "4M", "--hosts", "netns", "--detach")
    assert up.returncode == 0, up.stderr
    pair = Pair(directory)
    hosts = pair.directory.hosts()
    assert hosts is not None
    # As long as something runs in them, no other maker sweeps what is left: it is for `down` to remove.
    with subprocess.Popen([*hosts.hosts["b"].prefix(), "sleep", "60"]) as inside:
        wait_until(lambda: inside.pid in hosts.hosts["b"].pids(), 10, "a process in them")
        if not guarded:
            guardian_of(hosts.tag).kill()
        os.kill(json.loads(pair.directory.supervisor_state.read_text())["pid"], signal.SIGKILL)
        if guarded:
            wait_until(lambda: hosts.tag not in tags(), 10, "being removed")
        down = tandemdisk("down", "--dir", directory)
        assert down.returncode == 0, down.stderr
        assert (hosts.tag in down.stdout) == (not guarded)
        assert hosts.tag not in tags()
        assert inside.wait(10) == -signal.SIGKILL
