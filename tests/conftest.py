"""Fixtures for all tests: short directories, waiting with a deadline, and no process of a test that outlives it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from common.disk import FileDisk
from common.errors import ConfigError
from deploy.hosts import require_root, sweep
from deploy.layout import HOSTS_VARIABLE

T = TypeVar("T")

TEST_MARK = "TANDEMDISK_TEST"
"""Environment variable that every process started by a test inherits: how the leak check finds grandchildren too."""


def wait_until(predicate: Callable[[], T], timeout_s: float = 20.0, what: str = "the condition") -> T:
    """The first true value of ``predicate``; AssertionError that names ``what`` when ``timeout_s`` passed before.

    The pause between looks grows from one to fifty milliseconds: quick conditions stay quick on a busy machine.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = 0.001
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {timeout_s:g} s")
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.05)
    return value


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with a path short enough for Unix sockets (107 bytes), which pytest's ``tmp_path`` often is not."""
    directory = Path(tempfile.mkdtemp(prefix="td-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def shm_dir() -> Iterator[Path]:
    """A directory on the memory file system, for disk buffers."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
    directory = Path(tempfile.mkdtemp(prefix="td-", dir=base))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def disk(shm_dir: Path) -> Iterator[FileDisk]:
    """One of 16 MiB, empty."""
    path = shm_dir / "disk.raw"
    path.touch()
    os.truncate(path, 16 << 20)
    disk = FileDisk(str(path))
    yield disk
    disk.close()


@pytest.fixture(autouse=True)
def no_process_survives(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process behind, and end that process.

    Processes are known by a mark in their environment, so daemons that were re-parented are found as well.
    """
    others = set(psutil.pids())
    mark = f"{os.getpid()}:{request.node.nodeid}:{time.monotonic_ns()}"
    before = os.environ.get(TEST_MARK)
    os.environ[TEST_MARK] = mark
    yield
    if before is None:
        del os.environ[TEST_MARK]
    else:
        os.environ[TEST_MARK] = before
    leaked = _survivors(mark, others)
    if not leaked:
        return
    names = [_describe(process) for process in leaked]
    for process in leaked:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(leaked, timeout=10)
    pytest.fail(f"processes survived the test: {names}")


def is_gone(pid: int) -> bool:
    """True if the process does nothing any more; it may still wait for its parent to notice."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def _survivors(mark: str, others: set[int]) -> list[psutil.Process]:
    """Marked processes that are still there after a grace for those on their way out. ``others``: there before."""
    deadline = time.monotonic() + 15.0
    while True:
        found = [process for pid in set(psutil.pids()) - others if (process := _marked(pid, mark)) is not None]
        if not found or time.monotonic() > deadline:
            return found
        psutil.wait_procs(found, timeout=0.1)


def _marked(pid: int, mark: str) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        marked = process.environ().get(TEST_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return None
    return process if marked else None


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:120]}"
    except psutil.Error:
        return str(process.pid)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hosts",
        default="local",
        choices=("local", "netns"),
        help="where the sides of every pair run: on this machine as it is, or in two network namespaces (root)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Every pair that does not name its hosts, in any process, runs where --hosts says. And every process loads
    compiled modules, as one that was installed does: a pair is four of them, and compiling is half of their start."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so does `make test &` of a script, and children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    hosts = config.getoption("--hosts")
    if hosts != "local":
        try:
            require_root()
        except ConfigError as error:
            raise pytest.UsageError(f"--hosts {hosts}: {error.sentence} {error.hint}") from None
        os.environ[HOSTS_VARIABLE] = hosts


def pytest_unconfigure(config: pytest.Config) -> None:
    if os.environ.get(HOSTS_VARIABLE):
        sweep()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(HOSTS_VARIABLE):
        for item in items:
            if item.get_closest_marker("local_hosts") is not None:
                item.add_marker(pytest.mark.skip(reason="says itself where the sides run"))
    try:
        require_root("These tests")
    except ConfigError as error:
        for item in items:
            if item.get_closest_marker("root") is not None:
                item.add_marker(pytest.mark.skip(reason=error.sentence))
