"""In place of ``os``, in the modules of the product that have small files: what fails there, and what a loss of power
leaves of the write-intent file.

The files are real ones, in the simulation's directory. ``IntentOs`` remembers for each page of a write-intent file what
it held when the file was synced last, and all that was written over it since; and of each directory what was created,
replaced and removed in it since it was synced. When the power goes, each page is one of those, or torn between two of
them, and of what happened in a directory a part is left, the first of it first.

``CountedOs`` is for files whose contents need not outlive anything: their calls are counted, and may fail.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import DiskError
from common.intent import INTENT_FILE, PAGE, IntentFile
from tests.simulation.clock import PROCESS
from tests.simulation.disk import SECTOR

if TYPE_CHECKING:
    from tests.simulation.host import Host
    from tests.simulation.world import World

_unlink = os.unlink
"""The real one: ``os.unlink`` is exchanged for everybody."""
Pages = dict[int, list[bytes]]
"""Number of a page -> what it held at the last sync, and what each write since put there, but the last."""
Entry = tuple[str, bytes | None, Pages]
"""What a name stood for before: (path, contents, their pages). No contents: nothing."""


class CountedOs:
    """Counts ``calls`` for ``World.countdown``, as the device "``side`` ``device``"."""

    def __init__(self, world: World, device: str, calls: tuple[str, ...], code: int = errno.EIO) -> None:
        self._world = world
        self._device = device
        self._code = code
        for name in calls:
            setattr(self, name, self._counted(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _counted(self, name: str) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **options: Any) -> Any:
            self.strike(name, target)
            return self._do(name, target, *args, **options)

        return call

    def _do(self, name: str, *args: Any, **options: Any) -> Any:
        return getattr(os, name)(*args, **options)

    def strike(self, name: str, target: int | str) -> None:
        """OSError if this call, on a path or a descriptor, is the one that has to fail."""
        if not self._world.countdown.armed or (PROCESS.get() is None and self._device == "memory"):
            return  # the supervisor looks whether there is a buffer
        path = target if isinstance(target, str) else os.readlink(f"/proc/self/fd/{target}")
        host = self._world.host_of(path)
        if host is not None and self._world.countdown.strikes(f"{host.side} {self._device}", name):
            raise OSError(self._code, os.strerror(self._code))


SPILL_FAULTS = {"preadv": "read", "pwrite": "write", "posix_fallocate": "write"}
"""Calls, and which of ``disk.Faults`` they meet."""


class SpillOs(CountedOs):
    """A spill file is beside the secondary disk: it fails when that does, by a chance of its own."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "spill file", ("open", "posix_fallocate", "preadv", "pwrite", "ftruncate"))
        self._chance = random.Random(str(world.chance.getstate()[1][:8]))

    def strike(self, name: str, target: int | str) -> None:
        super().strike(name, target)
        kind = SPILL_FAULTS.get(name, "")
        if not any(getattr(host.faults, kind, 0.0) for host in self._world.hosts.values()):
            return
        host = self._world.host_of(os.readlink(f"/proc/self/fd/{target}"))
        if host is not None and self._chance.random() < getattr(host.faults, kind):
            host.faults.struck[f"failed: spill {kind}"] += 1
            raise OSError(host.faults.code, os.strerror(host.faults.code))


class IntentOs(CountedOs):
    """See the module. Its chance is its own: what a life draws does not depend on how many pages there are."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "intents", ("open", "pread", "pwrite", "fsync", "fdatasync", "replace"))
        self._chances = {host.side: random.Random(str(host.chance.getstate()[1][:8])) for host in world.hosts.values()}
        self._open: dict[int, Pages] = {}
        self._directories: dict[int, str] = {}
        self._named: dict[str, Pages] = {}
        self._happened: dict[str, list[Entry]] = {host.directory: [] for host in world.hosts.values()}
        self.lost = 0
        """Pages, and changes of a directory, that were not left when the power went."""

    # Calls

    def _do(self, name: str, *args: Any, **options: Any) -> Any:
        own = {"open": self._opened, "pwrite": self._write, "fsync": self._sync, "fdatasync": self._sync,
               "replace": self._replaced}  # fmt: skip
        return own.get(name, getattr(os, name))(*args, **options)

    def _opened(self, path: str, flags: int, mode: int = 0o777) -> int:
        before = self._entry(path)
        descriptor = os.open(path, flags, mode)
        if flags & os.O_DIRECTORY:
            self._directories[descriptor] = path
        else:
            if before[1] is None:
                self._note(before)
            self._open[descriptor] = self._named.setdefault(path, {})
        return descriptor

    def _write(self, descriptor: int, data: bytes, offset: int) -> int:
        pages = self._open[descriptor]
        for at in range(offset, offset + len(data), PAGE):
            pages.setdefault(at // PAGE, []).append(os.pread(descriptor, PAGE, at // PAGE * PAGE))
        return os.pwrite(descriptor, data, offset)

    def _sync(self, descriptor: int) -> None:
        if descriptor in self._directories:
            self.directory_synced(self._directories[descriptor])
        else:
            self._open[descriptor].clear()

    def _replaced(self, source: str, target: str) -> None:
        before = self._entry(target)
        os.replace(source, target)
        self._note(before)
        self._named[target] = self._named.pop(source)

    def unlink(self, path: Any, **options: Any) -> None:
        before = self._entry(os.fspath(path)) if not options else None
        _unlink(path, **options)
        if before is not None:
            self._note(before)
            self._named.pop(before[0], None)

    def close(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        self._directories.pop(descriptor, None)
        os.close(descriptor)

    # Names

    def _entry(self, path: str) -> Entry:
        contents = Path(path).read_bytes() if os.path.basename(path) == INTENT_FILE and os.path.exists(path) else None
        return path, contents, self._named.get(path, {})

    def _note(self, entry: Entry) -> None:
        directory, name = os.path.split(entry[0])
        if name == INTENT_FILE and directory in self._happened:
            self._happened[directory].append(entry)

    def directory_synced(self, directory: str) -> None:
        """By this module's product, or when metadata were saved."""
        if directory in self._happened:
            self._happened[directory].clear()

    # The power goes

    def lose_power(self, host: Host) -> None:
        """Nobody has a file of that host open any more."""
        chance, happened = self._chances[host.side], self._happened[host.directory]
        for path, contents, pages in reversed(happened[chance.randint(0, len(happened)) :]):
            self.lost += 1
            Path(path).unlink(missing_ok=True)
            self._named.pop(path, None)
            if contents is not None:
                Path(path).write_bytes(contents)
                self._named[path] = pages
        happened.clear()
        for path, pages in self._named.items():
            if path.startswith(host.directory) and os.path.exists(path):
                self._lose_pages(path, pages, chance)
                pages.clear()

    def _lose_pages(self, path: str, pages: Pages, chance: random.Random) -> None:
        with open(path, "r+b") as file:
            for number, before in pages.items():
                file.seek(number * PAGE)
                held = [image.ljust(PAGE, b"\0") for image in (*before, file.read(PAGE))]
                one, other = (chance.choice((held[0], held[-1], chance.choice(held))) for _ in range(2))
                at = chance.choice((0, 0, chance.randrange(0, PAGE, SECTOR)))
                left = other[:at] + one[at:]
                self.lost += left != held[-1]
                file.seek(number * PAGE)
                file.write(left)


def fail_intents(world: World) -> Callable[..., None]:
    """``IntentFile._write_pages`` for lives in which it may fail."""
    write = IntentFile._write_pages

    def troubled(file: IntentFile, pages: Any) -> None:
        host = world.host_of(file.path)
        assert host is not None
        if host.faults.intents and host.chance.random() < host.faults.intents:
            host.faults.struck["failed: intents"] += 1
            path = world._short(file.path)
            raise DiskError(f"The write-intent file {path} cannot be written: Input/output error.")
        write(file, pages)

    return troubled
