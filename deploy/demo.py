"""``tandemdisk demo``: a disk survives the death of its primary, as a timeline, with every byte compared.

Real processes, real sockets, real signals; nothing is simulated and nothing needs root. A model of the disk, an array
in this process, says at every step what a reader must see. The first byte that differs ends the demo with exit code
1.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import shutil
import signal
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from common import limits
from common.config import SHARED_MEMORY, format_size
from common.errors import NbdError, OperationFailed, TimedOut
from common.nbd_client import NbdClient
from deploy.interrupts import unwinding
from deploy.layout import PairOptions
from deploy.pair import Pair

Bytes = npt.NDArray[np.uint8]

ARCHIVE_BYTES: Final = 24 * limits.MIB
CHUNK: Final = limits.MIB
BLOCK: Final = 4 * limits.KIB
OVERWRITES: Final = 1500
"""Small writes after the checkpoint. With those under load they stay below the pressure mark of the small buffer."""
LOAD_AT: Final = 32 * limits.MIB
LOAD_WRITES: Final = 1500
DEPTH: Final = 32
BUFFER_BYTES: Final = 56 * limits.MIB
"""Fits into the 64 MiB of shared memory that containers have."""


class Mismatch(OperationFailed):
    """A reader saw something else than it must: the demo failed."""


class Timeline:
    """Steps, each with the time at which it began and how long it took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[list[str]]:
        """One step; what the body appends to the list is shown under its title."""
        notes: list[str] = []
        begin = time.perf_counter()
        with self._console.status(title):
            try:
                yield notes
            except BaseException:
                self._line("✗", "bold red", begin, title, notes)
                raise
        self._line("✓", "green", begin, title, notes)

    def _line(self, sign: str, style: str, begin: float, title: str, notes: list[str]) -> None:
        now = time.perf_counter()
        head = Text.assemble(
            (f"{begin - self._start:7.2f} s ", "dim"),
            (f"{sign} ", style),
            (title, "bold"),
            (f"  {_took(now - begin)}", "cyan"),
        )
        self._console.print(head, soft_wrap=True)
        for note in notes:
            self._console.print(Text(f"            {note}"), soft_wrap=True)


def _took(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


@dataclass(slots=True)
class Model:
    """What the disk must hold: every write is made here and on the disk."""

    contents: Bytes
    unanswered: dict[int, tuple[int, Bytes]] = field(default_factory=dict)
    """Writes whose answer never came, by cookie: old or new contents are both right for them."""

    def check(self, found: Bytes, what: str) -> str:
        """Compare every byte; a note about it. Raises Mismatch naming the first one that differs."""
        expected = self.contents
        for offset, data in self.unanswered.values():
            part = slice(offset, offset + len(data))
            if np.array_equal(found[part], data):  # it had arrived: fine, too
                expected[part] = data
        different = np.flatnonzero(found != expected)
        if len(different):
            first = int(different[0])
            raise Mismatch(
                f"{what}: {len(different)} bytes differ, the first at offset {first} "
                f"({found[first]:#04x} instead of {expected[first]:#04x})."
            )
        return f"all {len(expected):,} bytes compared: equal"


def run(console: Console, size: int) -> int:
    """The demo on a disk of ``size`` bytes; the process' exit code. Raises Mismatch, or what a step raised."""
    console.print(Panel("TandemDisk: a disk that lives on when its primary dies", expand=False, style="bold"))
    directory = Path(tempfile.mkdtemp(prefix="tandemdisk-demo-"))
    began = time.perf_counter()
    try:
        with unwinding(), Pair.create(directory / "pair", _options(size, directory)) as pair:
            _story(pair, Timeline(console), size)
    except KeyboardInterrupt:
        console.print("Interrupted; everything is stopped.")
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    console.print(
        Panel(
            f"No byte lost, none wrong. {time.perf_counter() - began:.1f} s in all.", expand=False, style="bold green"
        )
    )
    return 0


def _options(size: int, directory: Path) -> PairOptions:
    """A pair whose buffer goes into the temporary directory where shared memory is too small for it."""
    overrides: dict[str, Any] = {}
    free = os.statvfs(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None
    if free is None or free.f_bavail * free.f_frsize < BUFFER_BYTES + 4 * limits.MIB:
        overrides["buffer"] = {"directory": str(directory / "buffer")}
    return PairOptions(size=size, mode="sync", buffer_bytes=BUFFER_BYTES, overrides=overrides)


def _story(pair: Pair, timeline: Timeline, size: int) -> None:
    chance = random.Random(20160727)  # the date of the patch that brought block replication into QEMU
    model = Model(np.zeros(size, np.uint8))

    with timeline.step("Bring up a pair: primary, secondary, the secondary's guest export") as notes:
        pair.up()
        pair.wait_protected()
        status = pair.status()
        pids = (status["primary"]["pid"], status["secondary"]["pid"], status["secondary"]["export_pid"])
        notes.append(f"processes {', '.join(map(str, pids))}; disk of {format_size(size)}, mode {status['mode']}")
    primary_uri, guest_uri = status["primary"]["nbd_uri"], status["secondary"]["nbd_uri"]

    archive, hashes = _archive()
    with timeline.step("Write real data to the primary over NBD") as notes, NbdClient(primary_uri) as client:
        begin = time.perf_counter()
        client.write_many(_chunks(archive), depth=DEPTH)
        client.flush()
        rate = len(archive) / (time.perf_counter() - begin)
        model.contents[: len(archive)] = np.frombuffer(archive, np.uint8)
        notes.append(
            f"{len(hashes)} files of Python's library, {format_size(len(archive))}, {format_size(rate)}/s to both sides"
        )

    with timeline.step("Checkpoint") as notes:
        taken = pair.checkpoint()
        notes.append(f"number {taken.number}, {_took(taken.seconds)} from command to switch of epochs")
    at_checkpoint = Model(model.contents.copy())

    with timeline.step("Write on: overwrite at random") as notes, NbdClient(primary_uri) as client:
        begin = time.perf_counter()
        client.write_many(_overwrites(model, chance, len(archive)), depth=DEPTH)
        rate = OVERWRITES / (time.perf_counter() - begin)
        notes.append(
            f"{OVERWRITES} writes of {format_size(BLOCK)}, {rate:,.0f}/s, each on both sides before its answer"
        )

    with timeline.step("The primary has the new contents") as notes:
        notes.append(model.check(_read_all(primary_uri, size), "the primary"))

    with timeline.step("The secondary's guest still sees the checkpoint") as notes:
        found = _read_all(guest_uri, size)
        notes.append(at_checkpoint.check(found, "the guest's view"))
        notes.append(_check_files(found, hashes))

    with timeline.step("kill -9 the primary, under load") as notes:
        answered = _write_and_kill(model, chance, primary_uri, status["primary"]["pid"])
        pair.wait_for(lambda now: now["primary"]["pid"] is None, "without its primary", 10)
        notes.append(f"{answered} writes were answered, {len(model.unanswered)} in flight")

    with timeline.step("Fail over: the secondary's export becomes the disk") as notes:
        pair.failover("latest")
        now = pair.status()
        notes.append(f"role {now['secondary']['role']}, generation {now['generation']}")

    with timeline.step("Every write that was answered is there") as notes:
        notes.append(model.check(_read_all(guest_uri, size), "the promoted secondary"))

    with timeline.step("Write on: the disk lives") as notes, NbdClient(guest_uri) as client:
        model.unanswered.clear()
        client.write_many(_overwrites(model, chance, size), depth=DEPTH)
        client.flush()
        notes.append(f"{OVERWRITES} writes, then {model.check(_read_all(guest_uri, size), 'the promoted secondary')}")

    with timeline.step("Stop everything"):
        pair.down(purge=True)


def _archive() -> tuple[bytes, dict[str, str]]:
    """A tar of this Python's library, up to ``ARCHIVE_BYTES``, and the SHA-256 of each file in it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    hashes: dict[str, str] = {}
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(root.rglob("*.py")):
            if "site-packages" in path.parts or not path.is_file():
                continue
            data = path.read_bytes()
            if target.tell() + len(data) + 8 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE > ARCHIVE_BYTES:
                break
            name = str(path.relative_to(root))
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
            hashes[name] = hashlib.sha256(data).hexdigest()
    return target.getvalue(), hashes


def _check_files(found: Bytes, hashes: dict[str, str]) -> str:
    """Unpack the archive from the disk and compare each file."""
    with tarfile.open(fileobj=io.BytesIO(found[:ARCHIVE_BYTES].tobytes())) as tar:
        seen = {}
        for entry in tar:
            file = tar.extractfile(entry)
            seen[entry.name] = hashlib.sha256(file.read()).hexdigest() if file is not None else ""
    if seen != hashes:
        raise Mismatch(f"{sum(seen.get(name) != value for name, value in hashes.items())} files differ.")
    return f"all {len(hashes)} files unpacked and hashed: equal"


def _chunks(data: bytes) -> Iterator[tuple[int, memoryview]]:
    view = memoryview(data)
    for offset in range(0, len(data), CHUNK):
        yield offset, view[offset : offset + CHUNK]


def _overwrites(model: Model, chance: random.Random, below: int) -> Iterator[tuple[int, bytes]]:
    """Random blocks below ``below``, some of them across a block's border, in the model as well.

    Ranges of writes in flight must not overlap, or nobody could say which comes last: each goes to a range of its own.
    """
    for slot in chance.sample(range(below // (2 * BLOCK)), min(OVERWRITES, below // (2 * BLOCK))):
        offset = slot * 2 * BLOCK + chance.choice((0, 0, 0, 512, 1000))
        data = chance.randbytes(BLOCK)
        model.contents[offset : offset + BLOCK] = np.frombuffer(data, np.uint8)
        yield offset, data


def _read_all(uri: str, size: int) -> Bytes:
    found = np.empty(size, np.uint8)
    with NbdClient(uri) as client:
        reads = ((offset, min(CHUNK, size - offset)) for offset in range(0, size, CHUNK))
        for offset, data in client.read_many(reads, depth=4):
            found[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
    return found


def _write_and_kill(model: Model, chance: random.Random, uri: str, pid: int) -> int:
    """Write until the primary, killed in the midst of it, answers no more; the number of writes that were answered."""
    answered = 0
    killed = False
    client = NbdClient(uri)
    try:
        for number in range(2 * LOAD_WRITES):
            offset = LOAD_AT + number % LOAD_WRITES * BLOCK
            data = np.frombuffer(chance.randbytes(BLOCK), np.uint8)
            model.unanswered[client.submit_write(offset, data.data)] = (offset, data)
            if client.in_flight < DEPTH:
                continue
            for done in client.collect(1):
                if done.error is not None:
                    raise done.error
                offset, data = model.unanswered.pop(done.cookie)
                model.contents[offset : offset + BLOCK] = data
                answered += 1
            if answered >= LOAD_WRITES // 2 and not killed:
                os.kill(pid, signal.SIGKILL)
                killed = True
    except (NbdError, TimedOut, OSError):
        if not killed:
            raise
    finally:
        client.close()
    return answered
