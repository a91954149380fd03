"""A file whose reads, writes and flushes fail on command: a FUSE file system of one file, in front of that file.

    server = Server(path); server.mount()      what is at ``path`` is now reached through this process
    server.obey({"kinds": ["write"], "errno": 5, "first": 0, "end": 4096, "share": 1.0, "torn": True})
    server.obey(None)                          whole again

The mount point is the file itself: it is opened first, then covered, so its path, its size and what other programs see
do not change. The kernel asks through one descriptor (protocol: Linux' include/uapi/linux/fuse.h, named alike here);
nothing is cached (FOPEN_DIRECT_IO), so whoever reads or writes hears of a fault at once. When the descriptor closes,
as it does when this process dies, every request ends with ENOTCONN: nobody hangs.

As a program (``python -m deploy.chaos.faultfs``) it takes its orders from standard input, and unmounts everything when
that ends: whoever gave them may be killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import select
import struct
from enum import IntEnum
from typing import Any, Final

from common.disk import fallocate

FUSE_DEVICE: Final = "/dev/fuse"
FUSE_BIG_WRITES, FUSE_MAX_PAGES, FOPEN_DIRECT_IO = 1 << 5, 1 << 22, 1


class Op(IntEnum):
    """Opcodes: those that a file of its own needs."""

    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    INIT = 26
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    LSEEK = 46


_SILENT: Final = frozenset({Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT, Op.DESTROY})

IN_HEADER: Final = struct.Struct("=IIQQIIII")
OUT_HEADER: Final = struct.Struct("=IiQ")
INIT_IN: Final = struct.Struct("=IIII")
INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI28x")
ATTR: Final = struct.Struct("=QQQQQQIIIIIIIIII")
ATTR_OUT: Final = struct.Struct("=QII")
OPEN_OUT: Final = struct.Struct("=QIi")
IO_IN: Final = struct.Struct("=QQIIQII")
WRITE_OUT: Final = struct.Struct("=II")
FALLOCATE_IN: Final = struct.Struct("=QQQII")
LSEEK_IN: Final = struct.Struct("=QQII")
STATFS_OUT: Final = struct.Struct("=QQQQQIIII24x")
assert (IN_HEADER.size, OUT_HEADER.size, INIT_OUT.size, ATTR.size, IO_IN.size) == (40, 16, 64, 88, 40)

MINOR: Final = 31
MAX_WRITE: Final = 1 << 20
MNT_DETACH: Final = 2
MS_NOSUID, MS_NODEV = 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str, options: str) -> None:
    """mount(2). Raises OSError."""
    arguments = (source.encode(), os.fsencode(target), kind.encode(), MS_NOSUID | MS_NODEV, options.encode())
    if _libc.mount(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def unmount(target: str) -> None:
    """Out of sight at once, gone when nobody uses it any more; nothing happens if nothing is mounted there."""
    _libc.umount2(os.fsencode(target), MNT_DETACH)


class Server:
    """One file. ``serve`` whenever ``fileno`` is readable; one thread."""

    def __init__(self, path: str, seed: int = 0) -> None:
        self.path = path
        self.failed = 0
        """Operations that were made to fail."""
        self._chance = random.Random(seed)
        self._trouble: dict[str, Any] | None = None
        self._buffer = bytearray(MAX_WRITE + 4096)
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._fuse = -1

    def mount(self) -> None:
        """Cover the file. Raises OSError."""
        self._fuse = os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        options = f"fd={self._fuse},rootmode=100000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
        mount("tandemdisk", self.path, "fuse.tandemdisk", options)

    def close(self) -> None:
        """Uncover it; who still asks is told ENOTCONN."""
        unmount(self.path)
        for fd in (self._fuse, self._file):
            if fd >= 0:
                os.close(fd)
        self._fuse = self._file = -1

    def fileno(self) -> int:
        return self._fuse

    def obey(self, trouble: dict[str, Any] | None) -> None:
        """``kinds`` ("read", "write", "flush", "zero") that touch bytes ``first`` up to ``end`` fail with ``errno``, in
        a ``share`` of the cases; a ``torn`` write has done a part of its work. None: nothing fails."""
        self._trouble = trouble

    def serve(self) -> None:
        """Answer one request, if there is one."""
        try:
            length = os.readv(self._fuse, [self._buffer])
        except OSError:  # it was withdrawn meanwhile
            return
        _, opcode, unique, *_ = IN_HEADER.unpack_from(self._buffer)
        if opcode in _SILENT:
            return
        code, answer = 0, b""
        try:
            answer = self._answer(opcode, memoryview(self._buffer)[IN_HEADER.size : length])
        except OSError as error:
            code = error.errno or errno.EIO
        with contextlib.suppress(OSError):  # whoever asked was killed
            os.writev(self._fuse, [OUT_HEADER.pack(OUT_HEADER.size + len(answer), -code, unique), answer])

    def _answer(self, opcode: int, body: memoryview) -> bytes:
        match opcode:
            case Op.READ:
                _, offset, size, *_ = IO_IN.unpack_from(body)
                self._maybe_fail("read", offset, size)
                return os.pread(self._file, size, offset)
            case Op.WRITE:
                _, offset, size, *_ = IO_IN.unpack_from(body)
                data = body[IO_IN.size : IO_IN.size + size]
                self._maybe_fail("write", offset, size, data)
                return WRITE_OUT.pack(os.pwrite(self._file, data, offset), 0)
            case Op.FSYNC:
                self._maybe_fail("flush", 0, 1 << 63)
                os.fdatasync(self._file)
                return b""
            case Op.FALLOCATE:
                _, offset, size, mode, _ = FALLOCATE_IN.unpack_from(body)
                self._maybe_fail("zero", offset, size)
                fallocate(self._file, mode, offset, size)
                return b""
            case Op.LSEEK:
                _, offset, whence, _ = LSEEK_IN.unpack_from(body)
                return os.lseek(self._file, offset, whence).to_bytes(8, "little")
            case Op.OPEN:
                return OPEN_OUT.pack(0, FOPEN_DIRECT_IO, 0)
            case Op.GETATTR | Op.SETATTR:  # nobody sets anything but times here, and these are the file's own
                return self._attributes()
            case Op.STATFS:
                return self._file_system()
            case Op.RELEASE:
                return b""
            case Op.INIT:
                readahead, flags = INIT_IN.unpack_from(body)[2:]
                flags &= FUSE_BIG_WRITES | FUSE_MAX_PAGES
                return INIT_OUT.pack(7, MINOR, readahead, flags, 64, 48, MAX_WRITE, 1, MAX_WRITE // 4096, 0, 0)
        raise OSError(errno.ENOSYS, "not needed for a disk")

    def _file_system(self) -> bytes:
        told = os.fstatvfs(self._file)
        return STATFS_OUT.pack(
            told.f_blocks, told.f_bfree, told.f_bavail, told.f_files, told.f_ffree,
            told.f_bsize, told.f_namemax, told.f_frsize, 0,
        )  # fmt: skip

    def _attributes(self) -> bytes:
        s = os.fstat(self._file)
        times = [divmod(ns, 1_000_000_000) for ns in (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)]
        return ATTR_OUT.pack(0, 0, 0) + ATTR.pack(
            s.st_ino, s.st_size, s.st_blocks, *(time[0] for time in times), *(time[1] for time in times),
            s.st_mode, s.st_nlink, s.st_uid, s.st_gid, 0, s.st_blksize, 0,
        )  # fmt: skip

    def _maybe_fail(self, kind: str, offset: int, length: int, data: memoryview | None = None) -> None:
        trouble = self._trouble
        if trouble is None or kind not in trouble["kinds"]:
            return
        if offset >= trouble["end"] or offset + length <= trouble["first"] or self._chance.random() > trouble["share"]:
            return
        self.failed += 1
        if data is not None and trouble["torn"]:
            os.pwrite(self._file, data[: self._chance.randrange(len(data) // 512 + 1) * 512], offset)
        raise OSError(trouble["errno"], os.strerror(trouble["errno"]))


def keep(commands: int, answers: int) -> None:
    """Mount and serve as JSON lines on ``commands`` say, an answer each, until they end; then nothing stays mounted.

    {"cover": DIRECTORY, "size": BYTES}     an empty tmpfs over it
    {"uncover": DIRECTORY}                  neither that nor a file in it any more
    {"serve": FILE, "seed": N}              a Server over it
    {"file": FILE, "trouble": …}            what it shall ``obey``
    """
    directories: list[str] = []
    servers: dict[str, Server] = {}
    poll = select.poll()
    poll.register(commands, select.POLLIN)

    def obey(command: dict[str, Any]) -> None:
        if "cover" in command:
            mount("tmpfs", command["cover"], "tmpfs", f"size={command['size']},mode=700")
            directories.append(command["cover"])
        elif "uncover" in command:
            for path in [path for path in servers if os.path.dirname(path) == command["uncover"]]:
                poll.unregister(servers[path].fileno())
                servers.pop(path).close()
            unmount(command["uncover"])
        elif "serve" in command:
            server = Server(command["serve"], command["seed"])
            server.mount()
            servers[server.path] = server
            poll.register(server.fileno(), select.POLLIN)
        else:
            servers[command["file"]].obey(command["trouble"])

    try:
        with open(commands, "rb", buffering=0, closefd=False) as lines:
            while True:
                ready = {fd for fd, _ in poll.poll()}
                for server in servers.values():
                    if server.fileno() in ready:
                        server.serve()
                if commands not in ready:
                    continue
                line = lines.readline()
                if not line:
                    return
                error = ""
                try:
                    obey(json.loads(line))
                except OSError as failure:
                    error = str(failure)
                answer = {"error": error, "failed": sum(server.failed for server in servers.values())}
                os.write(answers, json.dumps(answer).encode() + b"\n")
    finally:
        for server in servers.values():
            server.close()
        for directory in directories:
            unmount(directory)


if __name__ == "__main__":
    keep(0, 1)
