"""The contract between a process and its parent, with real processes: readiness, failure, stopping, no orphans."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.child import Child, exit_reason, python_command, python_environment, settings_memfd
from common.control import ControlClient
from common.errors import ConfigError, OperationFailed
from common.settings import BufferSettings, ExportSettings, NodeSettings, ReplicationSettings, VolumeSettings
from tests.conftest import is_gone, wait_until

TOY = "tests.integration.toy_process"


def settings(directory: Path, mode: str) -> NodeSettings:
    return NodeSettings(
        pair_id=mode,
        side="a",
        directory=str(directory),
        volumes=(VolumeSettings("disk0", "/nowhere"),),
        export=ExportSettings(unix=f"{directory}/nbd.sock"),
        replication=ReplicationSettings(),
        buffer=BufferSettings(f"{directory}/buffer", 1 << 20),
    )


def start(directory: Path, mode: str) -> Child:
    with (directory / "log").open("ab") as log:
        return Child.start(TOY, settings(directory, mode), stderr=log)


def log_of(directory: Path) -> str:
    return (directory / "log").read_text()


def test_ready_then_stopped_by_signal(short_dir: Path) -> None:
    child = start(short_dir, "serve")
    told = child.wait_ready(20)
    assert told == {"ready": True, "pid": child.pid, "parent": os.getpid()}
    assert child.stop(20) == 0
    assert "INFO toy" in log_of(short_dir)
    assert "stopping signal=SIGTERM" in log_of(short_dir)


def test_ready_then_stopped_by_command_on_an_event_loop(short_dir: Path) -> None:
    async def main() -> None:
        child = start(short_dir, "serve")
        await child.wait_ready_async(20)
        await ControlClient(settings(short_dir, "serve").control_path("toy")).call_async("stop")
        assert await child.wait_async() == 0
        assert await child.stop_async() == 0

    asyncio.run(main())


def test_an_error_before_readiness_keeps_its_class_and_code(short_dir: Path) -> None:
    child = start(short_dir, "config-error")
    with pytest.raises(ConfigError) as caught:
        child.wait_ready(20)
    assert (caught.value.sentence, caught.value.hint) == ("The toy is broken.", "Mend it.")
    assert child.poll() == 2


def test_a_bug_before_readiness_leaves_a_traceback(short_dir: Path) -> None:
    child = start(short_dir, "bug")
    with pytest.raises(OperationFailed, match="ZeroDivisionError: a bug"):
        child.wait_ready(20)
    assert child.poll() == 1
    assert "Traceback" in log_of(short_dir)


def test_a_death_without_a_word_is_told(short_dir: Path) -> None:
    child = start(short_dir, "exit")
    with pytest.raises(OperationFailed, match="ended before it was ready: exit code 7"):
        asyncio.run(child.wait_ready_async(20))


def test_a_bug_after_readiness_ends_the_process(short_dir: Path) -> None:
    child = start(short_dir, "late-bug")
    child.wait_ready(20)
    assert child.process.wait(20) == 1
    assert "a late bug" in log_of(short_dir)


def test_a_process_that_hears_nothing_is_killed(short_dir: Path) -> None:
    child = start(short_dir, "hang")
    child.wait_ready(20)
    assert exit_reason(child.stop(0.2)) == "killed by SIGKILL"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_dies_with_its_parent_however_that_dies(short_dir: Path, number: signal.Signals) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.integration.test_process import start\n"
        "child = start(Path(sys.argv[1]), 'serve')\n"
        "print(child.wait_ready()['pid'], flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(short_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=python_environment()) as parent:
        assert parent.stdout is not None
        orphan = int(parent.stdout.readline())
        parent.send_signal(number)
    wait_until(lambda: is_gone(orphan), what="the child's end")
    assert "stopping signal=SIGTERM" in log_of(short_dir)


def test_systemd_is_told_by_the_process_that_it_started(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(short_dir / "notify"))
        notify.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(short_dir / "notify"))
        child = start(short_dir, "serve")  # one of ours: what it says would be taken for its parent's word
        child.wait_ready(20)
        child.stop(20)
        fd = settings_memfd(settings(short_dir, "serve"))
        command = [*python_command(TOY), "--settings-fd", str(fd)]
        with (short_dir / "log").open("ab") as log:
            service = subprocess.Popen(command, pass_fds=(fd,), stderr=log, env=python_environment())
        os.close(fd)
        assert notify.recv(4096).decode().split("\n") == ["READY=1", f"MAINPID={service.pid}"]
        service.terminate()
        assert notify.recv(4096) == b"STOPPING=1"
        assert service.wait(20) == 0


def test_systemd_hears_that_the_loop_turns(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it does not: a process that was stopped says nothing, and systemd would kill it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(short_dir / "notify"))
        notify.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(short_dir / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        fd = settings_memfd(settings(short_dir, "serve"))
        command = [*python_command(TOY), "--settings-fd", str(fd)]
        with (short_dir / "log").open("ab") as log:
            service = subprocess.Popen(command, pass_fds=(fd,), stderr=log, env=python_environment())
        os.close(fd)
        assert notify.recv(4096).startswith(b"READY=1")
        assert [notify.recv(4096) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        service.send_signal(signal.SIGSTOP)
        notify.settimeout(1)
        with pytest.raises(TimeoutError):
            while notify.recv(4096) == b"WATCHDOG=1":
                continue
        notify.settimeout(20)
        service.send_signal(signal.SIGCONT)
        assert notify.recv(4096) == b"WATCHDOG=1"
        service.terminate()
        assert service.wait(20) == 0


def test_a_folder_of_the_user_is_not_imported(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (short_dir / "common").mkdir()
    (short_dir / "common" / "__init__.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(short_dir)
    child = start(short_dir, "serve")
    child.wait_ready(20)
    assert child.stop(20) == 0
