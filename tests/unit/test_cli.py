"""The command line's border: usage, options that contradict each other, directories without a pair. Starts no
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from common import keys
from common.child import python_command, python_environment
from common.config import load_config
from common.control import ControlClient, ControlServer
from common.errors import AddressInUse, ConfigError
from deploy.cli import main
from deploy.launcher import locked, starting
from deploy.layout import PairDirectory, PairOptions, disk_size
from deploy.pair import Pair


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_version_and_help() -> None:
    assert run("--version").output.startswith("tandemdisk, version ")
    commands = ("up", "status", "checkpoint", "failover", "down", "primary", "secondary", "keygen", "demo")
    assert all(f"  {command} " in run("--help").output for command in commands)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--size", "1X"], "is no size"),
        (["--size", "0"], "more than nothing"),
        (["--size", "9999999T"], "more than any disk"),
        (["--size", "1000"], "multiple of 512"),
        (["--size", "1M", "--block-size", "3000"], "power of two"),
        (["--size", "1M", "--mode", "fast"], "fast"),
        (["--size", "1M", "--volumes", "0"], "0"),
        (["--size", "1M", "--checkpoint-interval", "-1"], "-1"),
        (["--size", "1M", "--listen", "nowhere"], "HOST:PORT"),
        (["--size", "1M", "--listen", "127.0.0.1:\u00b2"], "HOST:PORT"),
        (["--size", "1M", "--listen", "127.0.0.1:65536"], "HOST:PORT"),
        (["--size", "1M", "--listen", f"127.0.0.1:{'9' * 5000}"], "HOST:PORT"),
        (["--size", "1M", "--primary-disk", "x"], "together with disks"),
        (["--primary-disk", "x"], "--secondary-disk"),
        ([], "--size, or --primary-disk and --secondary-disk"),
        (["--primary-disk", "a", "--primary-disk", "b", "--secondary-disk", "c"], "one disk a side"),
        (["--size", "1M", "--sise", "1"], "--sise"),
    ],
)
def test_bad_usage_is_exit_code_2_and_touches_nothing(short_dir: Path, options: list[str], sentence: str) -> None:
    result = run("up", "--dir", short_dir / "p", *options)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not (short_dir / "p").exists()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("up --size 1M", 3),
        ("keygen", 2),
        ("deploy render deploy/examples/pair.toml --host east --keys /dev/null/x", 2),
    ],
)
def test_a_path_that_cannot_be_used_is_a_sentence(command: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    directory = [] if "--keys" in command else ["--dir", "/dev/null/x"]
    result = run(*command.split(), *directory)
    assert result.exit_code == code, result.output
    assert "Not a directory" in result.stderr
    assert "Traceback" not in result.output


def test_a_directory_of_somebody_else(short_dir: Path) -> None:
    """Root may read everything, so this is for the others: every command says so in one sentence."""
    (short_dir / "p").mkdir(mode=0o000)
    if os.access(short_dir / "p", os.R_OK):
        pytest.skip("this user may read everything")
    for command in ("up", "up --size 1M", "status", "checkpoint", "verify", "failover", "rejoin", "switchover", "down"):
        result = run(*command.split(), "--dir", short_dir / "p")
        assert result.exit_code == 2, (command, result.output)
        assert "Permission denied" in result.stderr


def test_disks_that_are_missing_or_differ(short_dir: Path) -> None:
    disks = {name: short_dir / name for name in ("a", "b", "none")}
    disks["a"].write_bytes(bytes(1024))
    disks["b"].write_bytes(bytes(2048))
    missing = run("up", "--dir", short_dir / "p", "--primary-disk", disks["none"], "--secondary-disk", short_dir)
    assert missing.exit_code == 3
    assert "No such file" in missing.stderr
    assert "neither a file nor a block device" in missing.stderr
    differ = run("up", "--dir", short_dir / "p", "--primary-disk", disks["a"], "--secondary-disk", disks["b"])
    assert differ.exit_code == 3
    assert "1024 bytes" in differ.stderr
    assert "2048" in differ.stderr
    assert not (short_dir / "p").exists()


def test_a_directory_with_other_things_in_it_is_left_alone(short_dir: Path) -> None:
    (short_dir / "letter.txt").write_text("dear")
    result = run("up", "--dir", short_dir, "--size", "1M")
    assert result.exit_code == 2
    assert "neither empty nor a pair's" in result.stderr
    assert [path.name for path in short_dir.iterdir()] == ["letter.txt"]


def test_two_commands_that_make_a_pair_in_one_directory(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one has looked before the first one began, and must not take that one's images away."""
    options = PairOptions(size=1 << 20)
    mkdir = Path.mkdir
    first: list[PairDirectory] = []

    def made_meanwhile(path: Path, *args: Any, **kwargs: Any) -> None:
        if not first:
            first.append(PairDirectory(short_dir / "p"))
            first[0].create(options)
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", made_meanwhile)
    with pytest.raises(ConfigError, match="Another command is making a pair"):
        PairDirectory(short_dir / "p").create(options)
    for settings in first[0].settings().values():
        assert Path(settings.volumes[0].disk).stat().st_size == 1 << 20


class Killed(BaseException):
    """Nothing of the program runs behind it."""


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> bool:
    """Do ``work``; with SIGKILL at its ``number``-th change in the file system. False if it was over before."""
    left = number

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: Any, **kwargs: Any) -> object:
            nonlocal left
            left -= 1
            if left < 0:  # dead: whoever would clean up cannot any more
                raise Killed
            return call(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patched:
        for name in ("mkdir", "unlink", "rmdir", "touch", "write_text"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        patched.setattr(os, "ftruncate", counted(os.ftruncate))
        patched.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            work()
        except Killed:
            return True
    return False


def test_a_pair_that_was_half_made_or_half_taken_away(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`up` was killed at any change of the directory: it is a whole pair or none, and the same command makes one."""
    options, directory = PairOptions(size=1 << 20), PairDirectory(short_dir / "p")
    monkeypatch.setattr(os, "fsync", lambda _fd: None)  # the power stays
    for work in (lambda: directory.create(options), directory.remove):
        for number in range(100):
            shutil.rmtree(directory.path, ignore_errors=True)
            if work == directory.remove:
                directory.create(options)
            killed = killed_at(number, monkeypatch, work)
            if directory.holds_a_pair():
                assert set(directory.settings()) == {"primary", "secondary"}
            else:
                directory.create(options)
            assert all(disk_size(Path(side.volumes[0].disk)) == 1 << 20 for side in directory.settings().values())
            if not killed:
                break
        assert 5 < number < 99


def test_a_new_pair_is_durable_before_it_is_one(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of power seconds later left configurations and keys of no length, and guests had flushed by then."""
    fsync, unlink = os.fsync, Path.unlink
    synced: set[Path] = set()
    made: list[set[Path]] = []

    def sync(fd: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def finish(path: Path, missing_ok: bool = False) -> None:
        made.append(set((short_dir / "p").rglob("*")) - synced - {path})
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", sync)
        patched.setattr(Path, "unlink", finish)
        PairDirectory(short_dir / "p").create(PairOptions(size=1 << 20))
    assert made == [set()]
    assert {"primary.toml", "secondary.toml", "p"} <= {path.name for path in synced}


def test_a_pair_in_the_middle_of_being_made_is_none(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a second `up` one that has but one side looked like one whose other side is elsewhere."""
    directory = PairDirectory(short_dir / "p")
    write = Path.write_text
    seen: list[bool] = []

    def look(path: Path, *args: Any, **kwargs: Any) -> int:
        written = write(path, *args, **kwargs)
        seen.append(PairDirectory(short_dir / "p").holds_a_pair())
        with pytest.raises(ConfigError, match="Another command is making a pair"):
            PairDirectory(short_dir / "p").create(PairOptions(size=1 << 20))
        return written

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", look)
        directory.create(PairOptions(size=1 << 20))
    assert seen == [False, False]
    assert set(directory.settings()) == {"primary", "secondary"}


def test_a_new_pair_that_another_command_started_first(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(short_dir / "p")
    with contextlib.ExitStack() as winner:

        def lost(*, detach: bool) -> None:
            winner.enter_context(locked(pair.directory))
            raise AddressInUse(f"Another supervisor is at work; detach is {detach}.")

        monkeypatch.setattr(pair, "up", lost)
        with pytest.raises(AddressInUse):
            pair.create_or_resume(PairOptions(size=1 << 20))
        assert all(Path(settings.volumes[0].disk).exists() for settings in pair.directory.settings().values())


@pytest.mark.parametrize("copied", [True, False])
def test_a_directory_that_was_moved_or_copied(short_dir: Path, copied: bool) -> None:
    """Its configuration still names the old place: a command there must not be one to the pair that is in that."""
    PairDirectory(short_dir / "p").create(PairOptions(size=1 << 20))
    (shutil.copytree if copied else shutil.move)(short_dir / "p", short_dir / "q")
    for command in ("up", "status", "checkpoint", "failover", "down", "accept-disk"):
        result = run(command, "--dir", short_dir / "q")
        assert result.exit_code == 2, result.output
        assert f"{short_dir / 'q'} was moved or copied" in result.stderr
        assert str(short_dir / "p" / "b") in result.stderr
    assert (short_dir / "p").exists() == copied, "nothing is made there"
    (short_dir / "link").symlink_to(short_dir / "p")
    assert run("status", "--dir", short_dir / "link").exit_code == (0 if copied else 2)
    hint = result.stderr.split("`")[1]
    subprocess.run(hint, shell=True, check=True)
    assert run("status", "--dir", short_dir / "q").exit_code == 0


def test_a_path_too_long_for_sockets(short_dir: Path) -> None:
    result = run("up", "--dir", short_dir / ("x" * 90), "--size", "1M")
    assert result.exit_code == 2
    assert "too long for the sockets" in result.stderr


def test_options_that_contradict_an_existing_pair(short_dir: Path) -> None:
    PairDirectory(short_dir / "p").create(PairOptions(size=1 << 20))
    result = run("up", "--dir", short_dir / "p", "--size", "2M", "--mode", "async", "--block-size", "4K")
    assert result.exit_code == 2
    assert "--size 2097152 was given" in result.stderr
    assert "--mode async was given" in result.stderr
    assert "--block-size" not in result.stderr


def test_a_disk_that_is_too_full_for_the_output(short_dir: Path) -> None:
    PairDirectory(short_dir / "p").create(PairOptions(size=1 << 20))
    for option in ("--json", "--json --clear-error", ""):
        command = [*python_command("deploy"), "status", "--dir", str(short_dir / "p"), *option.split()]
        with open("/dev/full", "wb") as full:
            done = subprocess.run(command, env=python_environment(), stdout=full, stderr=subprocess.PIPE, check=False)
        code, sentence = (7, b"Neither side") if "clear" in option else (1, b"Cannot write: No space left")
        assert done.returncode == code
        assert sentence in done.stderr
        assert b"Traceback" not in done.stderr
        assert b"Exception ignored" not in done.stderr


def test_closed_standard_streams_give_their_numbers_to_nothing_else(short_dir: Path) -> None:
    """A supervisor that got its pipe as descriptor 2 wrote that it was ready into its log."""
    PairDirectory(short_dir / "p").create(PairOptions(size=1 << 20))
    seen = short_dir / "seen"
    program = (
        "import os, sys; from deploy.cli import main; main(sys.argv[2:], standalone_mode=False); "
        "open(sys.argv[1], 'w').write(' '.join(os.readlink(f'/proc/self/fd/{n}') for n in range(3)))"
    )
    command = [sys.executable, "-P", "-c", program, str(seen), "down", "--dir", str(short_dir / "p")]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    subprocess.run([*shell, *command], env=python_environment(), check=True)
    assert seen.read_text() == "/dev/null /dev/null /dev/null"


@pytest.mark.parametrize("command", ["status", "checkpoint", "failover"])
def test_no_pair_here(short_dir: Path, command: str) -> None:
    result = run(command, "--dir", short_dir, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["exit_code"] == 2
    assert "There is no pair in" in result.stderr
    assert "tandemdisk up" in result.stderr


def test_down_is_idempotent(short_dir: Path) -> None:
    PairDirectory(short_dir / "p").create(PairOptions(size=1 << 20))
    for _ in range(2):
        result = run("down", "--dir", short_dir / "p")
        assert result.exit_code == 0
        assert "Nothing was running" in result.output


def test_down_stops_a_supervisor_that_is_just_being_started(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = PairDirectory(short_dir / "p")
    directory.create(PairOptions(size=1 << 20))
    report = {"stopped": ["primary"], "killed": [], "buffers": [], "hosts": []}
    asked = threading.Event()
    call = ControlClient.call

    def noted(client: ControlClient, command: str, **args: object) -> dict[str, Any]:
        try:
            return call(client, command, **args)
        finally:
            asked.set()

    async def stop(_args: dict[str, Any]) -> dict[str, Any]:
        return report

    async def scene() -> dict[str, Any]:
        with starting(directory):
            down = asyncio.create_task(asyncio.to_thread(Pair(directory.path).down))
            await asyncio.to_thread(asked.wait, 20)
            server = ControlServer(directory.supervisor_control, {"stop": stop})
            await server.start()
        told = await down
        await server.close()
        return told

    monkeypatch.setattr(ControlClient, "call", noted)
    monkeypatch.setattr(Pair, "_wait_gone", lambda pair: None)  # this supervisor stays
    assert asyncio.run(scene()) == report


def test_status_of_a_pair_that_was_never_started(short_dir: Path) -> None:
    PairDirectory(short_dir / "p").create(PairOptions(size=1 << 20, volumes=2))
    status = json.loads(run("status", "--dir", short_dir / "p", "--json").stdout)
    assert status["state"] == "stopped"
    assert status["primary"]["pid"] is None
    assert [volume["name"] for volume in status["volumes"]] == ["disk0", "disk1"]
    assert "stopped" in run("status", "--dir", short_dir / "p").output


def test_commands_without_processes_say_so(short_dir: Path) -> None:
    PairDirectory(short_dir / "p").create(PairOptions(size=1 << 20))
    for command in ("checkpoint", "failover"):
        result = run(command, "--dir", short_dir / "p")
        assert result.exit_code == 7
        assert "Nobody answers" in result.stderr


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_process_refuses_a_bad_configuration(short_dir: Path, role: str) -> None:
    path = short_dir / "side.toml"
    path.write_text('pair_id = "p"\nsid = "a"\n')
    result = run(role, "--config", path)
    assert result.exit_code == 2
    assert "`sid` is not known; did you mean `side`?" in result.stderr
    assert "`directory` is missing" in result.stderr


@pytest.mark.parametrize(
    ("address", "sentence"),
    [("nowhere", "HOST:PORT"), ("127.0.0.1:99999", "HOST:PORT"), ("127.0.0.1:\u00b2", "HOST:PORT"),
     (f"{'x' * 64}:0", "no name of a host")],
)  # fmt: skip
def test_a_redirect_to_no_address(short_dir: Path, address: str, sentence: str) -> None:
    PairDirectory(short_dir / "p").create(PairOptions(size=1 << 20))
    result = run("redirect", "--dir", short_dir / "p", "--listen", address)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_what_create_writes(short_dir: Path) -> None:
    options = PairOptions(
        size=1 << 20,
        volumes=2,
        mode="async",
        checkpoint_interval_s=0.5,
        block_size=65536,
        buffer_bytes=1 << 26,
        listen=("127.0.0.1", 0),
        overrides={"replication": {"heartbeat_s": 0.25}, "on_peer_loss": "block"},
    )
    made = PairDirectory(short_dir / "p")
    plan = made.create(options)
    assert (short_dir / "p").stat().st_mode & 0o777 == 0o700
    assert made.settings() == plan
    for role, side in (("primary", "a"), ("secondary", "b")):
        settings = load_config(short_dir / "p" / f"{role}.toml")
        assert settings.side == side
        assert settings.mode == "async"
        assert settings.initial_sync == "assume"
        assert settings.on_peer_loss == "block"
        assert settings.replication.heartbeat_s == 0.25
        assert settings.buffer.block_size == 65536
        assert all(Path(volume.disk).stat().st_size == 1 << 20 for volume in settings.volumes)
    assert plan["primary"].replication.connect == plan["secondary"].replication.listen
    assert plan["primary"].export.host == "127.0.0.1"
    assert plan["secondary"].export.host is None
    made.remove()
    assert not (short_dir / "p").exists()


@pytest.mark.parametrize("name", ["[red]", "a[/b]", ":x:", "[old]"])
def test_a_path_is_told_as_it_is(short_dir: Path, name: str) -> None:
    """No part of it is a style or a picture."""
    told = run("keygen", "--dir", short_dir / name, "--name", "k")
    assert str(short_dir / name / "k.key_secret") in told.stdout
    told = run("status", "--dir", short_dir / name)
    assert f"There is no pair in {short_dir / name}." in told.stderr


def test_keygen(short_dir: Path) -> None:
    result = run("keygen", "--dir", short_dir, "--name", "east")
    assert result.exit_code == 0
    assert "replication.peer_key" in result.output
    assert len(keys.load_keys(str(short_dir / "east.key_secret"), str(short_dir / "east.key")).secret) == 40
    again = run("keygen", "--dir", short_dir, "--name", "east")
    assert again.exit_code == 2
    assert "never overwritten" in again.stderr
    assert run("keygen", "--dir", short_dir, "--name", "../x").exit_code == 2
