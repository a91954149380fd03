"""Real things that fail for real: a memory file system that fills up, a block device with a hole in it. Need root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def require(*commands: str) -> None:
    """Skip the test unless this is root and the commands are there; says what is missing."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for command in commands:
        if shutil.which(command) is None:
            pytest.skip(f"needs {command}")


def run(*arguments: str | Path) -> str:
    """What a command prints; skips the test with its complaint if the system does not let us."""
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs {arguments[0]} to work here: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def mounted_tmpfs(directory: Path, size: int) -> Iterator[Path]:
    """A tmpfs that holds ``size`` bytes, mounted on ``directory``, which is made."""
    require("mount", "umount")
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", directory)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def resize_tmpfs(directory: Path, size: int) -> None:
    """The tmpfs mounted on ``directory`` holds so much now."""
    run("mount", "-o", f"remount,size={size}", directory)


class Loop:
    """A loop device over ``file``; what lies behind the end of the file gives I/O errors."""

    def __init__(self, file: Path, device: Path) -> None:
        self.file = file
        self.device = device
        self._kept = b""
        self._size = file.stat().st_size

    def truncate(self, size: int) -> None:
        """From byte ``size`` on the device cannot be read any more."""
        with self.file.open("rb") as file:
            file.seek(size)
            self._kept = file.read()
        os.truncate(self.file, size)
        self.forget()

    def heal(self) -> None:
        """The device is whole again, with the contents that it had."""
        with self.file.open("r+b") as file:
            file.seek(self._size - len(self._kept))
            file.write(self._kept)
            file.truncate(self._size)
        self._kept = b""
        self.forget()

    def forget(self) -> None:
        """Nothing of it in the page cache: the next read asks the device."""
        run("blockdev", "--flushbufs", self.device)


@contextlib.contextmanager
def loop_device(file: Path) -> Iterator[Loop]:
    """A loop device over ``file``."""
    require("losetup", "blockdev")
    device = Path(run("losetup", "--find", "--show", file))
    try:
        yield Loop(file, device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
