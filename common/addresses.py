"""Where processes listen: ZeroMQ's addresses taken apart, and Unix sockets bound without pushing anybody aside."""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from common.errors import AddressInUse, ConfigError

Endpoint = tuple[socket.AddressFamily, object]


def endpoints(address: str, *, passive: bool = False) -> list[Endpoint]:
    """The socket addresses that ``ipc://PATH`` or ``tcp://HOST:PORT`` stands for; blocks while a name is looked up.

    ``*`` as the host to listen on is every interface, as the port (``passive`` only) any free one. ConfigError if it is
    no address, OSError if the name cannot be found.
    """
    scheme, _, rest = address.partition("://")
    if scheme == "ipc" and rest:
        return [(socket.AF_UNIX, "\0" + rest[1:] if rest[0] == "@" else rest)]
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not (port.isdecimal() or (passive and port == "*")):
        raise ConfigError(f"{address!r} is no address.", hint='Write "tcp://HOST:PORT" or "ipc:///PATH".')
    host = host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(
            None if host == "*" else host, 0 if port == "*" else int(port), type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE if passive else 0,
        )
    except UnicodeError:  # an empty label, or one of more than 63 characters
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from None
    return [(family, where) for family, _, _, _, where in found]


def remove_stale(path: str, hint: str) -> None:
    """Remove a socket file that nobody listens on: a crash's left-over. Nothing happens if there is none.

    Raises AddressInUse (with ``hint``) if somebody listens there, or if it is no socket.
    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise AddressInUse(f"{path} exists and is not a socket.", hint=hint)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # its backlog is full, so somebody has it
    raise AddressInUse(f"Another process listens on {path}.", hint=hint)


class UnixPath:
    """The path of a bound Unix socket: ``remove`` deletes the file unless somebody else has put another one there."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._inode = os.stat(path).st_ino

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)


def bind_unix(listener: socket.socket, path: str, hint: str) -> UnixPath:
    """Bind ``path`` with mode 0600, in the place of a stale socket file. AddressInUse as ``remove_stale``, OSError."""
    remove_stale(path, hint)
    os.fchmod(listener.fileno(), 0o600)  # Linux gives the file its socket's mode: it is never open to all
    listener.bind(path)
    return UnixPath(path)
