"""Disks that are full and disks that fail, for a pair under chaos. Both need root.

A side may live on a memory file system with little to spare: image, metadata, write-intent file and log. ``DiskFull``
fills it to the last page, and whatever then needs a new one is refused (ENOSPC), until the ballast is taken away.

A side's image may be reached through ``deploy.chaos.faultfs``: ``DiskErrors`` lets reads, writes and flushes of the
whole disk or of a part of it fail (EIO), always or now and then, with or without a part of the work done.

One process a pair holds the mounts and ends them when this one does, however that comes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

from common.child import python_command, python_environment
from common.errors import OperationFailed
from deploy.chaos.tally import Tally
from deploy.faults import Fault
from deploy.hosts import Side
from deploy.layout import ROLES, SIDES
from deploy.pair import Pair

SPARE: Final = 4 << 20
"""Bytes of a small file system beside the image: metadata, logs of many cycles, sockets."""
CHUNK: Final = 1 << 20
PAGE: Final = 4096

Choice = Callable[[], Fault]


class Keeper:
    """The process that holds the mounts of a pair."""

    def __init__(self) -> None:
        self.failed = 0
        """Operations that were made to fail so far."""
        self._process = subprocess.Popen(
            python_command("deploy.chaos.faultfs"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=python_environment(), start_new_session=True,
        )  # fmt: skip

    def ask(self, **command: Any) -> None:
        """Give an order and wait until it is carried out. Raises OperationFailed."""
        orders, answers = self._process.stdin, self._process.stdout
        assert orders is not None
        assert answers is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            orders.write(json.dumps(command).encode() + b"\n")
            orders.flush()
            line = answers.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended", "failed": self.failed}
        self.failed = max(self.failed, int(answer["failed"]))  # a file that is uncovered counts no more
        if answer["error"]:
            raise OperationFailed(f"The file system of failing disks does not obey: {answer['error']}.")

    def close(self) -> None:
        """Nothing is mounted any more."""
        pipes: tuple[IO[bytes] | None, ...] = (self._process.stdin, self._process.stdout)
        for pipe in pipes:
            if pipe is not None:
                pipe.close()
        self._process.wait()


def missing(scratch: Path) -> str:
    """Why disks cannot be made to fail here; empty if they can. It is tried, in the directory ``scratch``."""
    if os.geteuid() != 0:
        return "full disks (ENOSPC) and I/O errors (EIO): mounting needs root"
    place = scratch / "probe"
    place.mkdir()
    keeper = Keeper()
    try:
        keeper.ask(cover=str(place), size=PAGE)
        (place / "file").touch()
        keeper.ask(serve=str(place / "file"), seed=0)
        (place / "file").read_bytes()
    except (OperationFailed, OSError) as error:
        return f"full disks (ENOSPC) and I/O errors (EIO): {error}"
    finally:
        keeper.close()
        shutil.rmtree(place)
    return ""


class DiskFull(Fault):
    """The file system of ``directory`` has no free page left."""

    def __init__(self, directory: Path) -> None:
        self._ballast = directory / "ballast"

    def begin(self) -> None:
        with contextlib.suppress(OSError), self._ballast.open("ab", buffering=0) as file:
            for size in (CHUNK, PAGE):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)

    def heal(self) -> None:
        self._ballast.unlink(missing_ok=True)


class DiskErrors(Fault):
    """Operations on the image ``file`` fail as ``trouble`` says (``faultfs.Server.obey``)."""

    def __init__(self, keeper: Keeper, file: Path, trouble: dict[str, Any]) -> None:
        self.keeper, self.file, self.trouble = keeper, file, trouble

    def begin(self) -> None:
        self.keeper.ask(file=str(self.file), trouble=self.trouble)

    def heal(self) -> None:
        self.keeper.ask(file=str(self.file), trouble=None)


def some_trouble(chance: random.Random, size: int) -> dict[str, Any]:
    """Which operations on a disk of ``size`` bytes fail, where and how often."""
    kinds = chance.choice((["read"], ["write"], ["write", "zero"], ["flush"], ["read", "write", "flush", "zero"],
                           ["read", "write", "flush", "zero"]))  # fmt: skip
    first, end = 0, size
    if chance.random() < 0.3:
        first = chance.randrange(0, size, PAGE)
        end = min(size, first + chance.choice((8 * PAGE, size // 8, size // 2)))
    return {
        "kinds": kinds, "errno": errno.EIO, "first": first, "end": end,
        "share": chance.choice((1.0, 1.0, 0.3, 0.05)), "torn": chance.random() < 0.5,
    }  # fmt: skip


def _some_errors(keeper: Keeper, image: Path, size: int, chance: random.Random) -> Fault:
    return DiskErrors(keeper, image, some_trouble(chance, size))


@contextlib.contextmanager
def breakable(pair: Pair, chance: random.Random, tally: Tally) -> Iterator[dict[tuple[str, Side], Choice]]:
    """By kind ("ENOSPC", "EIO") and side, what can happen to the disks of a pair that does not run yet: for each side
    it is drawn what it lives on. Nothing where the tally says that it is not tried. What was in the memory file
    systems is in the directories again at the end."""
    plan = [(SIDES[role], pair.settings(role), *chance.choice(_FOUNDATIONS)) for role in ROLES]
    seed = chance.getrandbits(32)
    faults: dict[tuple[str, Side], Choice] = {}
    if tally.not_tried or not any(small or failing for *_, small, failing in plan):
        yield faults
        return
    keeper = Keeper()
    try:
        with contextlib.ExitStack() as stack:
            for side, settings, small, failing in plan:
                directory, image = Path(settings.directory), Path(settings.volumes[seed % len(settings.volumes)].disk)
                size = image.stat().st_size
                if small:
                    stack.enter_context(_in_memory(keeper, directory, len(settings.volumes) * size + SPARE))
                    faults["ENOSPC", side] = partial(DiskFull, directory)
                if failing:
                    keeper.ask(serve=str(image), seed=seed)
                    faults["EIO", side] = partial(_some_errors, keeper, image, size, chance)
            yield faults
    finally:
        tally.failed_operations += keeper.failed
        keeper.close()


_FOUNDATIONS: Final = ((False, False), (False, False), (True, False), (False, True), (True, True))
"""(on a small file system, behind one that fails), each as likely."""


@contextlib.contextmanager
def _in_memory(keeper: Keeper, directory: Path, size: int) -> Iterator[None]:
    """What is in ``directory`` lives on a file system of ``size`` bytes for the time of the context."""
    below = directory.with_name(f"{directory.name}.below")
    directory.rename(below)
    directory.mkdir(mode=0o700)
    keeper.ask(cover=str(directory), size=size)
    _copy_files(below, directory)
    try:
        yield
    finally:
        _copy_files(directory, below)
        keeper.ask(uncover=str(directory))
        shutil.rmtree(directory)
        below.rename(directory)


def _copy_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if not path.is_file() or path.is_symlink():
            continue
        if path.stat().st_blocks:
            shutil.copy2(path, target)
        else:
            with (target / path.name).open("wb") as file:
                file.truncate(path.stat().st_size)
