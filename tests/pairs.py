"""What the acceptance tests of running pairs share: starting them, loading them, and records of what was written.

Real processes only. The oracle of a load is the plainest there is: the list of its writes in the order in which they
were sent.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.child import Child, python_environment, settings_memfd
from common.errors import TandemDiskError
from common.nbd_client import NbdClient, NbdClientError
from common.settings import Role
from deploy.faults import Fault
from deploy.pair import Pair, PairOptions
from primary.questions import QUESTION_BYTES
from tests.conftest import wait_until

MIB = 1 << 20
QUICK: Mapping[str, Any] = {"replication": {"heartbeat_s": 0.2, "peer_timeout_s": 2.0}}
"""For tests that wait until a side is given up: two seconds instead of five."""
PIECE = 1 * MIB
SLACK = 2 * MIB
"""What resyncs may move beyond what was dirty: two of their pieces (1 MiB), what they had on its way when something
ended them, moved again. (It may be 8 MiB of them where nothing but the link holds a resync up: tests that interrupt
one give it a ceiling.)"""
SAMPLED = 256 * QUESTION_BYTES
"""What may be asked about beside what is marked, once a process of either side was killed."""
BLOCK = 4096


@contextlib.contextmanager
def running(directory: Path, options: PairOptions) -> Iterator[Pair]:
    """A protected pair in ``directory``; stopped on leaving, its memory given back."""
    with Pair.create(directory, options) as pair:
        pair.up()
        pair.wait_protected()
        yield pair


def primary_uri(pair: Pair, volume: int = 0) -> str:
    """The primary's export of a volume."""
    return str(pair.status()["volumes"][volume]["primary_uri"])


def guest_uri(pair: Pair, volume: int = 0) -> str:
    """The secondary's export of a volume."""
    return str(pair.status()["volumes"][volume]["secondary_uri"])


def primary_disk(pair: Pair, volume: int = 0) -> Path:
    return Path(pair.settings("primary").volumes[volume].disk)


def secondary_disk(pair: Pair, volume: int = 0) -> Path:
    return Path(pair.settings("secondary").volumes[volume].disk)


def compare_disks(pair: Pair) -> None:
    """AssertionError unless both disks of every volume are equal, byte by byte, by the word of cmp(1)."""
    for volume in range(len(pair.settings("primary").volumes)):
        one, other = primary_disk(pair, volume), secondary_disk(pair, volume)
        done = subprocess.run(["cmp", one, other], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def contents(uri: str) -> bytes:
    """All of an export, read through our own client."""
    with NbdClient(uri) as client:
        return read_all(client)


def read_all(client: NbdClient) -> bytes:
    """All of the export, over a connection that exists."""
    size = client.size
    found = bytearray(size)
    for offset, data in client.read_many(((o, min(PIECE, size - o)) for o in range(0, size, PIECE)), depth=8):
        found[offset : offset + len(data)] = data
    return bytes(found)


def write_all(client: NbdClient, data: bytes) -> None:
    """Write ``data`` from offset 0 on."""
    view = memoryview(data)
    client.write_many(((offset, view[offset : offset + PIECE]) for offset in range(0, len(data), PIECE)), depth=8)


def random_bytes(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def kill_primary(pair: Pair) -> None:
    """SIGKILL, and wait until its end is seen."""
    kill(pair.status()["primary"]["pid"])
    pair.wait_for(lambda now: now["primary"]["pid"] is None, "without its primary", 20)


class Moves:
    """What the resyncs of one side come to from now on; ``check`` bounds it. A process that was started meanwhile
    counts from zero."""

    def __init__(self, pair: Pair, leads: Role = "primary") -> None:
        self._pair = pair
        self._leads = leads
        self._process, self._before = self._look()

    def _look(self) -> tuple[Any, dict[str, int]]:
        status = self._pair.status()
        side = status[self._leads]
        return (side["pid"], side.get("export_pid")), status["counters"][self._leads]

    def since(self) -> dict[str, int]:
        """By how much each counter of resyncs has grown."""
        process, now = self._look()
        before = self._before if process == self._process else {}
        return {name: now[name] - before.get(name, 0) for name in now if "resync" in name}

    def check(self, dirty_bytes: int, *, asked_bytes: int | None = 0, slack: int = SLACK) -> dict[str, int]:
        """AssertionError if more than ``dirty_bytes`` plus the slack was moved, more than ``asked_bytes`` (None: any
        number) plus the slack asked about, or everything compared. The counters."""
        found = self.since()
        assert found["resync_moved_bytes"] <= dirty_bytes + slack, (found, dirty_bytes)
        if asked_bytes is not None:
            assert found["resync_asked_bytes"] <= asked_bytes + slack, (found, asked_bytes)
            assert found["full_resyncs"] == 0, found
            assert found.get("resyncs_in_distrust", 0) == 0, found
        return found


class Load:
    """A thread that writes at random over one connection until it is stopped or cut off, and remembers every write.

    Offsets and lengths are any number of bytes, requests overlap, ``depth`` of them are in flight. ``writes`` is in the
    order in which they were sent; the first ``answered`` of them were acknowledged to the client.
    """

    def __init__(self, uri: str, *, seed: int = 1, depth: int = 32, span: tuple[int, int] | None = None) -> None:
        self.writes: list[tuple[int, bytes]] = []
        self.answered = 0
        self.errors: list[NbdClientError] = []
        self.end: TandemDiskError | None = None
        """What cut it off."""
        self._chance = random.Random(seed)
        self._depth = depth
        self._stopping = threading.Event()
        self._client = NbdClient(uri)
        self._first = 0
        self._span = span or (0, self._client.size)
        self._thread = threading.Thread(target=self._run, name="load")

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Wait for the answers that are due, and end."""
        self._stopping.set()
        self.join()

    def join(self) -> None:
        """Until it ended by itself: the server is gone."""
        self._thread.join(60)
        assert not self._thread.is_alive(), "the load hangs"

    def wait_for(self, count: int) -> None:
        """Until ``count`` writes were answered."""
        wait_until(lambda: self.answered >= count or self.end, 30, f"{count} writes answered")
        assert self.answered >= count, self.end

    def check(self, found: bytes, before: bytes | None = None, *, torn: bool = False) -> int:
        """How many of the writes ``found`` holds: a beginning of their order, with all that were answered.

        ``before``: contents before the first write (zeroes). With ``torn`` the write after that may be there in part:
        SIGKILL ends a pwrite(2) between two pages. AssertionError if there is no such number.
        """
        model = self._answered_model(found, before)
        is_there = np.frombuffer(found, np.uint8)
        wrong = int(np.count_nonzero(model != is_there))
        best = (wrong, self.answered)
        for number in range(self.answered, len(self.writes) + 1):
            best = min(best, (wrong, number))
            if wrong == 0:
                return number
            if number < len(self.writes):
                offset, data = self.writes[number]
                part, new = slice(offset, offset + len(data)), np.frombuffer(data, np.uint8)
                before_it = model[part] != is_there[part]
                if torn and np.count_nonzero(before_it) == wrong and not np.any(before_it & (new != is_there[part])):
                    return number
                model[part] = new
                wrong += int(np.count_nonzero(new != is_there[part])) - int(np.count_nonzero(before_it))
        raise AssertionError(
            f"no prefix of {len(self.writes)} writes, {self.answered} of them answered, makes what was found: after "
            f"{best[1]} of them {best[0]} bytes differ"
        )

    def check_answered(self, found: bytes, before: bytes | None = None) -> None:
        """AssertionError unless ``found`` holds what was answered, save where a write in flight at the end may be.

        This is all that NBD promises for requests in flight: they may be there in any order, and in part.
        """
        is_there = np.frombuffer(found, np.uint8)
        wrong = self._answered_model(found, before) != is_there
        for offset, data in self.writes[self.answered :]:
            part = slice(offset, offset + len(data))
            wrong[part] &= np.frombuffer(data, np.uint8) != is_there[part]
        different = np.flatnonzero(wrong)
        assert not len(different), f"{len(different)} bytes differ from {different[0]} to {different[-1]}"

    def _answered_model(self, found: bytes, before: bytes | None) -> npt.NDArray[np.uint8]:
        model = np.frombuffer(before if before is not None else bytes(len(found)), np.uint8).copy()
        for offset, data in self.writes[: self.answered]:
            model[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        return model

    def dirty_bytes(self, first: int = 0, last: int | None = None, unit: int = BLOCK) -> int:
        """Bytes of the blocks of ``unit`` that the writes from number ``first`` on touch, up to ``last``."""
        touched: set[int] = set()
        for offset, data in self.writes[first:last]:
            touched.update(range(offset // unit, (offset + len(data) - 1) // unit + 1))
        return len(touched) * unit

    def model(self, before: bytes | None = None, size: int = 0) -> bytes:
        """What the disk holds after all writes; for a load that was stopped and got every answer."""
        assert self.answered == len(self.writes)
        assert not self.errors
        result = bytearray(before if before is not None else bytes(size))
        for offset, data in self.writes:
            result[offset : offset + len(data)] = data
        return bytes(result)

    def _run(self) -> None:
        with self._client as client:
            try:
                while not self._stopping.is_set():
                    self._submit(client)
                    if client.in_flight >= self._depth:
                        self._note(client, self._depth // 2)
                self._note(client, client.in_flight)
            except TandemDiskError as error:
                self.end = error

    def _submit(self, client: NbdClient) -> None:
        first, last = self._span
        offset = self._chance.randrange(first, last)
        data = self._chance.randbytes(min(self._chance.choice((1, 512, 700, 4096, 4096, 4096, 20000)), last - offset))
        self.writes.append((offset, data))
        cookie = client.submit_write(offset, data)
        self._first = self._first or cookie

    def _note(self, client: NbdClient, minimum: int) -> None:
        for completion in client.collect(minimum):
            if completion.error:
                self.errors.append(completion.error)
            self.answered = max(self.answered, completion.cookie - self._first + 1)


def through_a_fault(pair: Pair, fault: Fault, model: bytes, *, span: tuple[int, int], seed: int = 1) -> bytes:
    """Load on whoever leads; he goes on alone while ``fault`` lasts. Afterwards both disks hold ``model`` and what was
    written, which is returned, and no more was moved than was written meanwhile."""
    leads = pair.leader()
    uri, view = (primary_uri(pair), guest_uri(pair)) if leads == "primary" else (guest_uri(pair), primary_uri(pair))
    moves = Moves(pair, leads)
    with Load(uri, seed=seed, span=span) as load:
        load.wait_for(200)
        first = load.answered  # in sync mode the follower has these
        with fault:
            pair.wait_for(lambda now: now[leads].get("engine", now[leads]["state"]) == "alone", "alone", 30)
            load.wait_for(load.answered + 200)
        pair.wait_protected(30)
        last = len(load.writes)
        load.wait_for(load.answered + 200)
        load.stop()
        assert load.end is None
    model = load.model(model)
    pair.checkpoint()
    assert contents(uri) == model
    assert contents(view) == model
    compare_disks(pair)
    found = moves.check(load.dirty_bytes(first, last))
    assert found["resync_moved_bytes"], "it was alone"
    return model


TANDEMDISK = (sys.executable, "-P", "-m", "deploy")
"""The command of this very copy, with ``python_environment()``."""


def tandemdisk(*arguments: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """The command, as a process of its own."""
    return subprocess.run(
        [*TANDEMDISK, *map(str, arguments)],
        env=python_environment(), capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


@contextlib.contextmanager
def started(pair: Pair, *roles: Role) -> Iterator[dict[Role, Child]]:
    """Sides of a pair as processes by themselves whose disks fail when ``Faults`` says so; no supervisor.

    A test may take a child out of the mapping after it has ended, and put another one in.
    """
    children: dict[Role, Child] = {}
    with pair.directory.hosts_held():
        try:
            for role in roles:
                children[role] = start_side(pair, role)
            yield children
        finally:
            with contextlib.suppress(TandemDiskError):
                pair.down(purge=True)
            for child in children.values():
                child.stop(10)


def start_side(pair: Pair, role: Role) -> Child:
    """Start one side as in ``started``; it is ready on return. Raises what it reported."""
    settings = pair.settings(role)
    Path(settings.directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = settings_memfd(settings)
    try:
        with open(f"{settings.directory}/log", "ab") as log:
            child = Child.launch(
                "tests.faulty_process", [role, "--settings-fd", str(fd)], pass_fds=(fd,), stderr=log,
                prefix=pair.directory.prefix(role),
            )  # fmt: skip
    finally:
        os.close(fd)
    try:
        child.wait_ready()
    except BaseException:
        child.stop(10)
        raise
    return child
