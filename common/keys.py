"""CURVE keys of the replication stream: each side has a secret of its own and the public key of its peer.

``tandemdisk keygen`` writes two files in ZeroMQ's certificate format (ZPL, which ``zmq.auth`` and other bindings read
too): ``NAME.key`` holds the public key and goes to the peer, ``NAME.key_secret`` holds both and stays, mode 0600. A
side accepts exactly one peer: the one whose public key its configuration names.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from common.errors import ConfigError
from common.settings import ReplicationSettings

PUBLIC_SUFFIX: Final = ".key"
SECRET_SUFFIX: Final = ".key_secret"
KEY_LENGTH: Final = 40
"""Characters of a Z85-encoded CURVE key (ZeroMQ RFC 32)."""

_Z85: Final = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"

_PUBLIC_NOTE: Final = (
    "The public key of one side of a TandemDisk pair: give it to the other side (replication.peer_key)."
)
_SECRET_NOTE: Final = "The secret key of one side of a TandemDisk pair: keep it there (replication.secret_key)."


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """What a socket needs: our own pair of keys and the one public key that the other end must have (Z85)."""

    public: bytes
    secret: bytes = field(repr=False)
    peer_public: bytes


def generate_keys(directory: Path, name: str, *, keep: bool = False) -> tuple[Path, Path]:
    """Write a new pair of keys; the paths of the public and of the secret file. Raises ConfigError rather than
    overwrite one, unless it shall ``keep`` those that are there. To a secret key that a kill left alone its public key
    is written.
    """
    import zmq  # here, so that reading a configuration does not load ZeroMQ

    public_path = directory / f"{name}{PUBLIC_SUFFIX}"
    secret_path = directory / f"{name}{SECRET_SUFFIX}"
    made: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _alone(directory):
            if secret_path.exists() and not public_path.exists() and not secret_problems(str(secret_path)):
                public = zmq.curve_public(_read(str(secret_path))["secret-key"])
            elif taken := tuple(f"{path} exists" for path in (public_path, secret_path) if path.exists()):
                if keep:
                    return public_path, secret_path
                raise ConfigError("Keys are never overwritten:", problems=taken, hint="Choose another --name or --dir.")
            else:
                public, secret = zmq.curve_keypair()
                _write(secret_path, 0o600, _SECRET_NOTE, {"public-key": public, "secret-key": secret}, made)
            _write(public_path, 0o644, _PUBLIC_NOTE, {"public-key": public}, made)
    except OSError as error:
        for path in made:  # half of a pair of keys
            path.unlink(missing_ok=True)
        raise ConfigError(
            f"Cannot write keys into {directory}: {error.strerror}.", hint="Choose another --dir."
        ) from error
    return public_path, secret_path


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Nobody else makes keys in the directory meanwhile."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _write(path: Path, mode: int, note: str, keys: dict[str, bytes], made: list[Path]) -> None:
    """All of the file or nothing."""
    lines = [f"# {note}", "metadata", "curve", *(f'    {name} = "{value.decode()}"' for name, value in keys.items())]
    temporary = path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)
    made += [temporary, path]
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(fd, "w", encoding="ascii") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(fd)
    temporary.replace(path)


def load_keys(secret_path: str, peer_path: str) -> CurveKeys:
    """Our keys and our peer's public one. Raises ConfigError that names everything wrong with the two files."""
    import zmq  # here, so that reading a configuration does not load ZeroMQ

    problems = [*secret_problems(secret_path), *peer_problems(peer_path)]
    if not problems:
        own = _read(secret_path)
        if zmq.curve_public(own["secret-key"]) != own["public-key"]:  # a listener never shows it: a dialer is refused
            problems.append(f"{secret_path} holds a public-key that does not belong to its secret-key")
    if problems:
        raise ConfigError("The keys cannot be used:", problems=tuple(problems), hint="`tandemdisk keygen` makes keys.")
    peer = _read(peer_path)
    return CurveKeys(public=own["public-key"], secret=own["secret-key"], peer_public=peer["public-key"])


def stream_keys(replication: ReplicationSettings) -> CurveKeys | None:
    """The keys of the replication stream; None for plain text."""
    if replication.secret_key is None or replication.peer_key is None:
        return None
    return load_keys(replication.secret_key, replication.peer_key)


def secret_problems(path: str) -> list[str]:
    """What is wrong with the secret certificate at ``path``, as sentences without a full stop."""
    problems = _missing(path, ("public-key", "secret-key"))
    if not problems and stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        problems.append(f"{path} can be read by other users (chmod 600 it)")
    return problems


def peer_problems(path: str) -> list[str]:
    """What is wrong with the peer's public certificate at ``path``."""
    return _missing(path, ("public-key",))


MAX_FILE: Final = 64 * 1024
"""Bytes of a certificate that are looked at; it has a few hundred."""


def _missing(path: str, names: tuple[str, ...]) -> list[str]:
    try:
        keys = _read(path)
    except (OSError, ValueError) as error:  # ValueError: no ASCII in the file, or a NUL character in its name
        return [f"{path} cannot be read ({getattr(error, 'strerror', None) or 'it is not text'})"]
    return [f"{path} holds no valid {name}" for name in names if not _is_key(keys.get(name, b""))]


def _is_key(value: bytes) -> bool:
    """Z85 (ZeroMQ RFC 32): five characters stand for four bytes."""
    digits = [_Z85.find(character) for character in value]
    values = [
        sum(digit * 85 ** (4 - place) for place, digit in enumerate(digits[at : at + 5])) for at in range(0, 40, 5)
    ]
    return len(value) == KEY_LENGTH and min(digits) >= 0 and max(values) < 1 << 32


def _read(path: str) -> dict[str, bytes]:
    """``name = "value"`` lines of a ZPL file (ZeroMQ RFC 4); sections do not matter for these two names."""
    keys: dict[str, bytes] = {}
    with open(path, "rb") as file:
        text = file.read(MAX_FILE).decode("ascii")
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.lstrip().startswith("#"):
            keys[name.strip()] = value.strip().strip("\"'").encode()
    return keys
