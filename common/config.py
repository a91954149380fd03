"""Configuration: one TOML file a side, validated as a whole, every error named at once.

The file's tables and keys are the fields of ``common.settings`` by the same names (units included), so there is one
vocabulary. Sizes may be written ``4096``, ``"4K"`` or ``"256MiB"`` (powers of 1024), durations are seconds, relative
paths start at the file's directory. An unknown key is refused, with the nearest known one.

The same file serves whichever role its side has. The processes never import this module: they get the
``NodeSettings`` that it makes.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from common import keys, limits
from common.control import MAX_SOCKET_PATH
from common.errors import ConfigError
from common.settings import (
    BufferSettings,
    Compression,
    ExportSettings,
    Mode,
    NodeSettings,
    ReplicationSettings,
    Role,
    VolumeSettings,
)

SHARED_MEMORY: Final = "/dev/shm"
DEFAULT_BUFFER: Final = 256 * limits.MIB
LONGEST_CONTROL_NAME: Final = "/secondary.control"
MAX_FILE: Final = limits.MIB
"""Bytes of a configuration; MAX_VOLUMES of them are about 10 KiB."""
MAX_SECONDS: Final = 1e8
"""Three years: longer than anything is waited for, and within what every timer takes."""
MAX_PROBLEMS: Final = 100
_SHOWN: Final = 100
"""Characters of a wrong value that a sentence shows."""
_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(?:ib)?|b)?", re.IGNORECASE)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_TCP: Final = re.compile(r"tcp://(\[[0-9A-Fa-f:.%]+\]|[^\[\]:/]+):(\d{1,5})")


def _shown(value: object) -> str:
    """``value`` as a sentence shows it: it may be a megabyte long, or a number of as many digits."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"a number of {value.bit_length()} bits"
    text = repr(value) if not isinstance(value, str) else repr(value[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def parse_size(value: object) -> int:
    """Bytes of ``4096``, ``"4K"``, ``"1.5G"``, ``"256MiB"``. Raises ValueError that says what is accepted."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value >= 1 << 63:
            raise ValueError("that is more than any disk has")
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{_shown(value)} is no size; write bytes or something like "4K", "256MiB", "1G"')
    size = float(match[1]) * _UNITS[(match[2] or "").lower()]
    if size >= 1 << 63:
        raise ValueError(f"{_shown(value)} is more than any disk has")
    if size != int(size):
        raise ValueError(f"{_shown(value)} is not a whole number of bytes")
    return int(size)


def format_size(size: float) -> str:
    """``1.5 GiB`` for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size == int(size) else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def check_block_size(size: int) -> int:
    """``size`` if blocks can have it. Raises ValueError otherwise."""
    if not limits.MIN_BLOCK <= size <= limits.MAX_BLOCK or size & (size - 1):
        raise ValueError(
            f"a block is a power of two from {limits.MIN_BLOCK} to {format_size(limits.MAX_BLOCK)}, not {size} bytes"
        )
    return size


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{_shown(name)} is no name; use up to 63 letters, digits, '.', '_', '-', not starting with a sign"
        )
    return name


def _check_path(path: str) -> str:
    if "\0" in path:
        raise ValueError(f"{_shown(path)} holds a NUL character, which no path does")
    return path


def _check_directory(path: str) -> str:
    return _check_socket(path, LONGEST_CONTROL_NAME)


def _check_socket(path: str, suffix: str = "") -> str:
    excess = len(os.fsencode(path + suffix)) - MAX_SOCKET_PATH
    if excess > 0:
        raise ValueError(f"{_shown(path)} is {excess} bytes too long for the sockets in it; use a shorter path")
    return path


def _check_address(address: str) -> str:
    if address.startswith("ipc://"):
        _check_socket(address.removeprefix("ipc://"))
        return address
    match = _TCP.fullmatch(address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ValueError(f'{_shown(address)} is no address; write "tcp://HOST:PORT" or "ipc:///PATH"')
    return address


def is_local(address: str) -> bool:
    """True if what is sent to this ZeroMQ address stays on this machine (ipc, or TCP over loopback)."""
    match = _TCP.fullmatch(address)
    if match is None:
        return address.startswith("ipc://")
    host = match[1].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name or "*": it may be any interface
        return False


Size = Annotated[int, BeforeValidator(parse_size)]
BlockSize = Annotated[Size, AfterValidator(check_block_size)]
Name = Annotated[str, AfterValidator(_check_name)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(_check_path)]
SocketPath = Annotated[PathText, AfterValidator(_check_socket)]
Directory = Annotated[PathText, AfterValidator(_check_directory)]
Address = Annotated[str, AfterValidator(_check_address)]
Duration = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]
MaybeDuration = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Volume(_Table):
    name: Name
    disk: PathText
    read_only: bool = False


class _Export(_Table):
    unix: SocketPath | None = None
    host: Annotated[str, Field(min_length=1)] | None = None
    port: Annotated[int, Field(ge=0, le=65535)] = 10809
    group_access: bool = False


class _Replication(_Table):
    listen: Address | None = None
    connect: Address | None = None
    window_bytes: Annotated[Size, Field(ge=limits.MAX_BATCH_PAYLOAD)] = limits.DEFAULT_WINDOW
    heartbeat_s: Duration = 1.0
    peer_timeout_s: Duration = 5.0
    secret_key: PathText | None = None
    peer_key: PathText | None = None
    plaintext: bool = False
    compression: Compression = "off"

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems: list[str] = []
        if self.peer_timeout_s <= self.heartbeat_s:
            problems.append(
                f"peer_timeout_s ({self.peer_timeout_s:g}) must be longer than heartbeat_s ({self.heartbeat_s:g})"
            )
        if (self.secret_key is None) != (self.peer_key is None):
            problems.append("secret_key and peer_key go together: our own secret key and the public key of the peer")
        far = [address for address in (self.listen, self.connect) if address is not None and not is_local(address)]
        if self.secret_key is None and far and not self.plaintext:
            problems.append(
                f"{' and '.join(far)} leaves this machine, so the stream must be encrypted: make keys on each side "
                "with `tandemdisk keygen`, exchange the public ones, and set secret_key and peer_key"
            )
        if self.secret_key is not None and self.plaintext:
            problems.append("plaintext and secret_key contradict each other: leave one out")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class _Buffer(_Table):
    directory: PathText | None = None
    size_bytes: Annotated[Size, Field(gt=0)] = DEFAULT_BUFFER
    block_size: BlockSize = limits.DEFAULT_BLOCK
    spill_bytes: Annotated[Size, Field(ge=0)] = limits.DEFAULT_SPILL
    spill_directory: PathText | None = None


class _Node(_Table):
    pair_id: Name
    side: Literal["a", "b"]
    directory: Directory
    mode: Mode = "sync"
    checkpoint_interval_s: MaybeDuration = 0.0
    initial_sync: Literal["full", "assume"] = "full"
    on_peer_loss: Literal["continue", "block"] = "continue"
    on_congestion: Literal["block", "pull-ahead"] = "block"
    max_lag_seconds: MaybeDuration = 0.0
    resync_rate: Annotated[Size, Field(ge=0)] = 0
    resync_floor: Annotated[Size, Field(ge=0)] = 0
    resync_deadline_s: MaybeDuration = 0.0
    keep_diverged: bool = False
    write_intent: bool = True
    busy_poll_us: Annotated[int, Field(ge=0, le=limits.MAX_BUSY_POLL_US)] = limits.DEFAULT_BUSY_POLL_US
    request_timeout_s: Duration = 10.0
    volumes: Annotated[
        list[_Volume],
        Field(min_length=1, max_length=limits.MAX_VOLUMES),
        AfterValidator(lambda volumes: _check_volumes(volumes)),
    ]
    export: _Export = _Export()
    replication: _Replication = _Replication()
    buffer: _Buffer = _Buffer()

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems: list[str] = []
        floor, ceiling = self.resync_floor, self.resync_rate
        if 0 < ceiling < floor:
            problems.append(f"`resync_floor` ({floor}) must not be above `resync_rate` ({ceiling}), the ceiling")
        if self.on_congestion == "pull-ahead" and self.on_peer_loss == "block":
            problems.append(
                'on_congestion = "pull-ahead" lets the primary go on alone, which on_peer_loss = "block" forbids: '
                "change one of them"
            )
        if self.max_lag_seconds and self.on_peer_loss == "block":
            problems.append(
                "`max_lag_seconds` gives a slow secondary up to go on alone, which on_peer_loss = \"block\" forbids: "
                "writes wait for it anyway, so leave it out"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _check_volumes(volumes: list[_Volume]) -> list[_Volume]:
    problems: list[str] = []
    for what, values in (("name", [v.name for v in volumes]), ("disk", [v.disk for v in volumes])):
        problems += [
            f"the {what} {_shown(value)} is used twice" for value in dict.fromkeys(values) if values.count(value) > 1
        ]
    if problems:
        raise ValueError("\n".join(problems))
    return volumes


_TABLES: Final[dict[str, type[_Table]]] = {
    "": _Node, "volumes": _Volume, "export": _Export, "replication": _Replication, "buffer": _Buffer,
}  # fmt: skip


def read_toml(path: Path, *, hint: str) -> dict[str, Any]:
    """What a TOML file holds. ConfigError, with ``hint`` if it cannot be read, whatever else the file is."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE + 1)
        if len(text) > MAX_FILE:
            raise ConfigError(f"{path} has more than {format_size(MAX_FILE)}: it is no configuration.")
        return tomllib.loads(text.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.", hint=hint) from error
    except RecursionError:
        raise ConfigError(f"{path} is no configuration: it is nested too deeply.") from None
    except ValueError as error:  # of TOML, of UTF-8, or of a number with thousands of digits
        sentence = str(error)
        raise ConfigError(
            f"{path} is not TOML: {sentence[:_SHOWN]}{'…' if len(sentence) > _SHOWN else ''}.",
            hint="Correct that place.",
        ) from error


def load_config(path: Path, role: Role | None = None) -> NodeSettings:
    """The settings in the file at ``path``; with ``role``, also checked for what a side needs to start in that role.

    Raises ConfigError whose ``problems`` name everything that is wrong.
    """
    raw = read_toml(path, hint="`tandemdisk up` writes configurations.")
    return make_settings(raw, base=path.resolve().parent, role=role, source=str(path))


def make_settings(
    raw: Mapping[str, Any], *, base: Path, role: Role | None = None, source: str = "The configuration"
) -> NodeSettings:
    """Settings out of a file's contents; relative paths start at ``base``, ``source`` names the origin in errors."""
    absolute = _with_absolute_paths(raw, base)
    problems: list[str] = []
    node: _Node | None = None
    try:
        node = _Node.model_validate(absolute)
    except ValidationError as error:
        for detail in error.errors():
            problems += _sentences(detail)
    problems += _role_problems(absolute, role)
    problems += _key_problems(absolute)
    if node is None or problems:
        more = len(problems) - MAX_PROBLEMS
        if more > 0:
            problems[MAX_PROBLEMS:] = [f"… and {more} more"]
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{source} has {count}:", problems=tuple(problems))
    return _settings(node)


def _settings(node: _Node) -> NodeSettings:
    export = node.export.model_dump()
    if export["unix"] is None and export["host"] is None:
        export["unix"] = f"{node.directory}/nbd.sock"
    buffer = node.buffer.model_dump()
    if buffer["directory"] is None:
        buffer["directory"] = default_buffer_directory(node.pair_id, node.side)
    plain = node.model_dump(exclude={"export", "buffer", "replication", "volumes"})
    return NodeSettings(
        **plain,
        volumes=tuple(VolumeSettings(**volume.model_dump()) for volume in node.volumes),
        export=ExportSettings(**export),
        replication=ReplicationSettings(**node.replication.model_dump()),
        buffer=BufferSettings(**buffer),
    )


def default_buffer_directory(pair_id: str, side: str) -> str:
    """Where a side keeps its disk buffer unless the configuration says otherwise."""
    return f"{SHARED_MEMORY}/tandemdisk-{pair_id}-{side}"


def _with_absolute_paths(raw: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """A copy of ``raw`` in which every relative path starts at ``base``; anything of a wrong type is left for the
    validator.
    """

    def absolute(table: Any, *names: str) -> Any:
        if not isinstance(table, dict):
            return table
        return {k: str(base / v) if k in names and isinstance(v, str) and v else v for k, v in table.items()}

    result: dict[str, Any] = absolute(dict(raw), "directory")
    volumes = result.get("volumes")
    if isinstance(volumes, list):
        result["volumes"] = [absolute(volume, "disk") for volume in volumes]
    paths = {"export": ("unix",), "replication": ("secret_key", "peer_key"), "buffer": ("directory", "spill_directory")}
    for name in paths.keys() & result.keys():
        result[name] = absolute(result[name], *paths[name])
    return result


def _role_problems(raw: Mapping[str, Any], role: Role | None) -> list[str]:
    replication = raw.get("replication")
    replication = replication if isinstance(replication, dict) else {}
    if role == "primary" and "connect" not in replication:
        return ["`replication.connect` is missing: the address at which the secondary listens"]
    if role == "secondary" and "listen" not in replication:
        return ["`replication.listen` is missing: the address at which this secondary listens"]
    return []


def _key_problems(raw: Mapping[str, Any]) -> list[str]:
    replication = raw.get("replication")
    if not isinstance(replication, dict):
        return []
    problems: list[str] = []
    if isinstance(path := replication.get("secret_key"), str) and path:
        problems += [f"`replication.secret_key`: {problem}" for problem in keys.secret_problems(path)]
    if isinstance(path := replication.get("peer_key"), str) and path:
        problems += [f"`replication.peer_key`: {problem}" for problem in keys.peer_problems(path)]
    return problems


def _sentences(detail: ErrorDetails) -> list[str]:
    """What a person reads for one error of pydantic's."""
    location = _location(detail["loc"])
    kind = detail["type"]
    given = detail["input"]
    if kind == "missing":
        return [f"`{location}` is missing"]
    if kind == "extra_forbidden":
        return [_unknown_key(detail["loc"], location)]
    if kind == "literal_error":
        return [f"`{location}` must be {detail['ctx']['expected']}, not {_shown(given)}"]
    if kind == "value_error":
        where = f"`{location}`: " if location else ""
        return [f"{where}{line}" for line in str(detail["ctx"]["error"]).splitlines()]
    return [f"`{location}`: {detail['msg'][0].lower()}{detail['msg'][1:]}, not {_shown(given)}"]


def _location(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        name = part if isinstance(part, int) or len(part) <= _SHOWN else f"{part[:_SHOWN]}…"
        text += f"[{name}]" if isinstance(name, int) else f".{name}" if text else name
    return text


def _unknown_key(loc: tuple[int | str, ...], location: str) -> str:
    key = str(loc[-1])
    table = str(loc[0]) if len(loc) > 1 else ""
    known = _TABLES[table].model_fields
    near = difflib.get_close_matches(key[:_SHOWN], known, n=1, cutoff=0.5)
    if near:
        return f"`{location}` is not known; did you mean `{near[0]}`?"
    homes = [name or "the top of the file" for name, model in _TABLES.items() if key in model.model_fields]
    if homes:
        return f"`{location}` is not known there; `{key}` belongs into {' or '.join(homes)}"
    return f"`{location}` is not known; known: {', '.join(known)}"


def write_config(settings: NodeSettings, path: Path, role: Role) -> None:
    """Write ``settings`` as a TOML file that ``load_config`` reads back to the same settings."""
    path.write_text(format_config(settings, role), encoding="utf-8")


def format_config(settings: NodeSettings, role: Role) -> str:
    """The TOML text of ``settings`` for a side that starts as ``role``."""
    lines = [
        f"# Side {settings.side} of a TandemDisk pair, which starts as the {role}.",
        f"# By itself, on any host: tandemdisk {role} --config THIS_FILE",
        "",
    ]
    tables = ("export", "replication", "buffer")
    lines += [
        _line(name, getattr(settings, name)) for name in _Node.model_fields if name != "volumes" and name not in tables
    ]
    for volume in settings.volumes:
        lines += ["", "[[volumes]]", _line("name", volume.name), _line("disk", volume.disk)]
        lines += [_line("read_only", True)] if volume.read_only else []
    for table in tables:
        values = getattr(settings, table)
        lines += ["", f"[{table}]"]
        names = [name for name in _TABLES[table].model_fields if getattr(values, name) is not None]
        if table == "export" and values.host is None:
            names.remove("port")
        if table == "export" and not values.group_access:
            names.remove("group_access")
        if table == "replication" and not values.plaintext:
            names.remove("plaintext")
        lines += [_line(name, getattr(values, name)) for name in names]
    return "\n".join(lines) + "\n"


def _line(name: str, value: str | float) -> str:
    if isinstance(value, str):
        # A JSON string is a TOML basic string, save for DEL, which TOML wants escaped.
        return f"{name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return f"{name} = {str(value).lower()}"
    return f"{name} = {value!r}"
