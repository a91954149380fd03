"""A pair's directory: what ``tandemdisk up --dir DIR`` writes, and where everything in it is.

DIR/primary.toml, DIR/secondary.toml     one configuration a side; each may move to a host of its own
DIR/a/, DIR/b/                           the sides' directories: images (with --size), metadata, sockets, keys, log
DIR/hosts.json                           which hosts the sides run on, unless both run on this machine as it is
DIR/supervisor.{json,control,lock,log}   the launcher's
DIR/unfinished                           only while all this is made or taken away
/dev/shm/tandemdisk-PAIR-b/              the disk buffer of the secondary
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shlex
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from common import limits
from common.config import load_config, make_settings, write_config
from common.errors import ConfigError, DiskError
from common.keys import generate_keys
from common.settings import Compression, Mode, NodeSettings, Role
from deploy.hosts import REPLICATION_PORT, SUDO_OR_LOCAL, NetnsHosts, Side, parse_rate, require_root
from deploy.placement import Placement, names_a_file

SIDES: Final[dict[Role, Side]] = {"primary": "a", "secondary": "b"}
ROLES: Final[tuple[Role, Role]] = ("secondary", "primary")
"""In the order in which they start."""
LOG_TAIL: Final = 12
"""Lines of a log that a failed start shows."""
HOSTS_VARIABLE: Final = "TANDEMDISK_HOSTS"
"""Environment: the hosts of new pairs whose maker does not name any. How all tests run in another topology."""
NETNS: Final = "netns"


@dataclass(frozen=True, slots=True)
class PairOptions:
    """What a new pair shall be. Either ``size`` (equal sparse images are made) or the disks of both sides."""

    size: int | None = None
    primary_disks: tuple[Path, ...] = ()
    secondary_disks: tuple[Path, ...] = ()
    assume_synced: bool = False
    volumes: int | None = None
    """Number of volumes; None: one, or as many as there are disks."""
    mode: Mode | None = None
    checkpoint_interval_s: float | None = None
    block_size: int | None = None
    buffer_bytes: int | None = None
    listen: tuple[str, int] | None = None
    """TCP address of the primary's export, beside its Unix socket."""
    hosts: str | None = None
    """``local``: both sides on this machine; ``netns``: each in a network namespace of its own, with a cable between
    them; ``netns:TAG``: in namespaces that ``tandemdisk hosts up`` made; a path: where that pair file says. None: as
    $TANDEMDISK_HOSTS says, or local.
    """
    rate: str | None = None
    """What the cable carries (``100mbit``); None: no limit."""
    encrypt: bool = True
    """CURVE on a stream between hosts."""
    compression: Compression | None = None
    """Of the stream; None: off."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the configuration file for both sides, tables merged: ``{"replication": {"heartbeat_s":
    0.2}}``.
    """


class PairDirectory:
    """The paths in DIR, and the settings of the sides that are configured in it."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def config(self, role: Role) -> Path:
        return self.path / f"{role}.toml"

    @property
    def supervisor_control(self) -> str:
        return str(self.path / "supervisor.control")

    @property
    def supervisor_state(self) -> Path:
        return self.path / "supervisor.json"

    @property
    def supervisor_lock(self) -> Path:
        return self.path / "supervisor.lock"

    @property
    def supervisor_log(self) -> Path:
        return self.path / "supervisor.log"

    @property
    def hosts_file(self) -> Path:
        return self.path / "hosts.json"

    def hosts(self) -> NetnsHosts | None:
        """The hosts that the sides run on; None: this machine as it is."""
        try:
            raw = json.loads(self.hosts_file.read_text(encoding="utf-8"))
            return NetnsHosts(raw["tag"], None if raw["rate"] is None else parse_rate(raw["rate"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{self.hosts_file} does not name hosts: {error}.", hint="Correct or delete it."
            ) from None

    @contextlib.contextmanager
    def hosts_held(self) -> Iterator[None]:
        """The hosts are there for the time of the context."""
        hosts = self.hosts()
        with hosts.held() if hosts is not None else contextlib.nullcontext():
            yield

    def prefix(self, role: Role) -> tuple[str, ...]:
        """What has to stand before a command so that it runs on the host of the side that starts as ``role``."""
        hosts = self.hosts()
        return hosts.hosts[SIDES[role]].prefix() if hosts is not None else ()

    @property
    def _unfinished(self) -> Path:
        """There while a pair is being made or taken away, and after a kill in the middle of that."""
        return self.path / "unfinished"

    def holds_a_pair(self) -> bool:
        """True if at least one side is configured here."""
        return not self._unfinished.exists() and any(self.config(role).exists() for role in ROLES)

    def settings(self) -> dict[Role, NodeSettings]:
        """The sides that are configured here, the secondary first. Raises ConfigError naming the problems of both."""
        if not self.holds_a_pair():
            raise ConfigError(
                f"There is no pair in {self.path}.", hint="`tandemdisk up --dir DIR --size 1G` makes one."
            )
        sides: dict[Role, NodeSettings] = {}
        errors: list[ConfigError] = []
        for role in ROLES:
            if self.config(role).exists():
                try:
                    sides[role] = load_config(self.config(role), role)
                except ConfigError as error:
                    errors.append(error)
        if errors:
            problems = tuple(problem for error in errors for problem in (error.problems or (error.sentence,)))
            raise ConfigError(f"The configuration in {self.path} has problems:", problems=problems) from errors[0]
        for role, settings in sides.items():
            self._check_place(role, settings)
        return sides

    def _check_place(self, role: Role, settings: NodeSettings) -> None:
        """ConfigError if the directory was moved or copied: the disks and processes of its configuration are those of
        the place where it was."""
        here, there = self.path / settings.side, Path(settings.directory)
        if here.is_dir() and not (there.exists() and here.samefile(there)):
            old, new = f"{there.parent}/", f"{self.path}/"
            raise ConfigError(
                f"{self.path} was moved or copied: {self.config(role).name} still has side {settings.side} in {there}.",
                hint=f"Move it back, or correct the paths (`sed -i {shlex.quote(f's|{old}|{new}|g')} "
                f"{shlex.quote(new)}*.toml`). Never run a copy beside its original.",
            )

    def create(self, options: PairOptions) -> dict[Role, NodeSettings]:
        """Make directories, images and configurations. On any error nothing stays behind, save what somebody else made
        here meanwhile; after a kill the next call begins anew."""
        placement = placement_of(options)
        if placement is not None:
            hosts = placement.hosts(parse_rate(options.rate) if options.rate else None)
            plan = placement.settings(self.path)
        else:
            hosts = _hosts(options)
            plan = self._plan(options, hosts)
        existed = self.path.exists()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._making(keep_directory=existed):
                return self._make(plan, options, hosts, placement)
        except OSError as error:
            raise DiskError(
                f"Cannot make the pair in {self.path}: {error.strerror}.", hint="Choose another --dir."
            ) from error

    @contextlib.contextmanager
    def _making(self, *, keep_directory: bool) -> Iterator[None]:
        """Nobody else makes a pair here meanwhile, and what is here is none before all of it is: one side alone would
        be taken for a pair whose other side is elsewhere. What a process left that was killed in here is taken away. No
        loss of power brings the mark back, or takes a configuration or a key: the pair may be in use by then."""
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken = self.holds_a_pair()
            except BlockingIOError:
                taken = True
            if taken:
                raise ConfigError(
                    f"Another command is making a pair in {self.path}.", hint="Wait, then give the command again."
                )
            if self._unfinished.exists():
                self.remove(keep_directory=True)
            elif any(self.path.iterdir()):
                raise ConfigError(f"{self.path} is neither empty nor a pair's directory.", hint="Choose another --dir.")
            try:
                self._unfinished.touch(mode=0o600)
                yield
                for path in self.path.rglob("*"):
                    _sync(path)
                self._unfinished.unlink()
            except BaseException:
                self.remove(keep_directory=keep_directory)
                raise
            os.fsync(directory)
        finally:
            os.close(directory)

    def _make(
        self,
        plan: dict[Role, NodeSettings],
        options: PairOptions,
        hosts: NetnsHosts | None,
        placement: Placement | None,
    ) -> dict[Role, NodeSettings]:
        for settings in plan.values():
            (self.path / settings.side).mkdir(mode=0o700)
        if hosts is not None:
            self.hosts_file.write_text(json.dumps({"tag": hosts.tag, "rate": hosts.rate}))
        if placement is not None:
            for path, key in placement.key_files(self.path).items():
                path.write_bytes(key)
                path.chmod(0o600)
        elif hosts is not None and options.encrypt:
            plan = self._with_keys(plan)
        for role, settings in plan.items():
            if options.size is not None:
                for volume in settings.volumes:
                    _make_image(Path(volume.disk), options.size)
            write_config(settings, self.config(role), role)
        return plan

    def _with_keys(self, plan: dict[Role, NodeSettings]) -> dict[Role, NodeSettings]:
        """Keys for both sides, made here; each side's directory gets its secret and the public key of its peer."""
        for side in SIDES.values():
            public, _ = generate_keys(self.path / side, side)
            shutil.copy(public, self.path / ("b" if side == "a" else "a"))
        keyed: dict[Role, NodeSettings] = {}
        for role, settings in plan.items():
            peer = "b" if settings.side == "a" else "a"
            replication = replace(
                settings.replication,
                plaintext=False,
                secret_key=f"{settings.directory}/{settings.side}.key_secret",
                peer_key=f"{settings.directory}/{peer}.key",
            )
            keyed[role] = replace(settings, replication=replication)
        return keyed

    def log_tail(self) -> str:
        """The last lines of both sides' logs, for a start that failed without a sentence of its own."""
        parts: list[str] = []
        for side in SIDES.values():
            path = self.path / side / "log"
            if path.exists():
                parts += [f"--- {path}", *path.read_text(errors="replace").splitlines()[-LOG_TAIL:]]
        return "\n".join(parts)

    def remove(self, *, keep_directory: bool = False) -> None:
        """Delete everything that ``create`` and the processes made here (disks elsewhere are never touched)."""
        with contextlib.suppress(OSError):
            self._unfinished.touch(mode=0o600)
        for side in SIDES.values():
            shutil.rmtree(self.path / side, ignore_errors=True)
        for path in (*self.path.glob("supervisor.*"), *map(self.config, ROLES), self.hosts_file, self._unfinished):
            path.unlink(missing_ok=True)
        if not keep_directory:
            with contextlib.suppress(OSError):  # somebody else's files are in it
                self.path.rmdir()

    def _plan(self, options: PairOptions, hosts: NetnsHosts | None) -> dict[Role, NodeSettings]:
        disks, size = self._disks(options)
        pair_id = secrets.token_hex(8)
        count = len(disks["primary"])
        buffer_bytes = options.buffer_bytes or default_buffer_bytes(size, count)
        plan: dict[Role, NodeSettings] = {}
        for role, side in SIDES.items():
            directory = self.path / side
            peer: Side = "b" if side == "a" else "a"
            raw: dict[str, Any] = {
                "pair_id": pair_id,
                "side": side,
                "directory": str(directory),
                "mode": options.mode or "sync",
                "checkpoint_interval_s": options.checkpoint_interval_s or 0.0,
                "initial_sync": "assume" if options.size is not None or options.assume_synced else "full",
                "volumes": [{"name": f"disk{i}", "disk": str(disk)} for i, disk in enumerate(disks[role])],
                "export": {"unix": f"{directory}/nbd.sock"},
                "replication": self._stream(side, peer, hosts) | {"compression": options.compression or "off"},
                "buffer": {"size_bytes": buffer_bytes, "block_size": options.block_size or limits.DEFAULT_BLOCK},
            }
            if role == "primary" and options.listen is not None:
                raw["export"] |= {"host": options.listen[0], "port": options.listen[1]}
            plan[role] = make_settings(_merged(raw, options.overrides), base=self.path, role=role, source="The pair")
        return plan

    def _stream(self, side: Side, peer: Side, hosts: NetnsHosts | None) -> dict[str, Any]:
        """Where a side listens and what it dials. Between hosts plain text is a matter of ``_with_keys``."""
        if hosts is None:
            listen, connect = (f"ipc://{self.path / one}/replication.sock" for one in (side, peer))
            return {"listen": listen, "connect": connect}
        listen, connect = (f"tcp://{hosts.hosts[one].address}:{REPLICATION_PORT}" for one in (side, peer))
        return {"listen": listen, "connect": connect, "plaintext": True}

    def _disks(self, options: PairOptions) -> tuple[dict[Role, list[Path]], int]:
        """The disks of both sides and the size of one side's; ConfigError for options that contradict each other."""
        given: dict[Role, tuple[Path, ...]] = {
            "primary": options.primary_disks,
            "secondary": options.secondary_disks,
        }
        if options.size is None:
            return _given_disks(given, options.volumes)
        if any(given.values()):
            raise ConfigError("--size makes new disks: it cannot be given together with disks.", hint="Leave one out.")
        if options.size < limits.MIN_BLOCK or options.size % limits.MIN_BLOCK:
            raise ConfigError(f"--size must be a multiple of {limits.MIN_BLOCK} bytes, not {options.size}.")
        count = options.volumes or 1
        images = {role: [self.path / side / f"disk{i}.raw" for i in range(count)] for role, side in SIDES.items()}
        return images, options.size * count

    def grow_images(self, volume: str, size: int) -> None:
        """Make the images of a volume that ``create`` made ``size`` bytes long, where they are shorter. DiskError."""
        for role, settings in self.settings().items():
            for index, named in enumerate(settings.volumes):
                path = self.path / SIDES[role] / f"disk{index}.raw"
                if named.name == volume and Path(named.disk) == path and disk_size(path) < size:
                    try:
                        os.truncate(path, size)
                    except OSError as error:
                        raise DiskError(f"{path} cannot be grown: {error.strerror}.") from error

    def differences(self, options: PairOptions) -> list[str]:
        """Where options given for an existing pair contradict its configuration."""
        found: list[str] = []
        hosts = self.hosts()
        placement = placement_of(options)
        if placement is not None:
            ids = {settings.pair_id for settings in self.settings().values()}
            if ids != {placement.pair.pair_id}:
                found.append(f"{options.hosts} describes the pair {placement.pair.pair_id}, here is {', '.join(ids)}")
        elif options.hosts is not None and (options.hosts == "local") != (hosts is None):
            found.append(f"--hosts {options.hosts} was given, {self.path} says {'local' if hosts is None else NETNS}")
        if options.rate is not None and hosts is None:
            found.append(f"--rate {options.rate} was given, and both sides of {self.path} run on this machine")
        elif options.rate is not None and hosts is not None and options.rate.lower() != (hosts.rate or "unlimited"):
            found.append(f"--rate {options.rate} was given, {self.hosts_file} says {hosts.rate or 'unlimited'}")
        for role, settings in self.settings().items():
            disks = options.primary_disks if role == "primary" else options.secondary_disks
            wanted: list[tuple[str, object, object]] = [
                ("--mode", options.mode, settings.mode),
                ("--checkpoint-interval", options.checkpoint_interval_s, settings.checkpoint_interval_s),
                ("--block-size", options.block_size, settings.buffer.block_size),
                ("--buffer-size", options.buffer_bytes, settings.buffer.size_bytes),
                ("--compression", options.compression, settings.replication.compression),
                ("--volumes", options.volumes, len(settings.volumes)),
                (f"--{role}-disk", [str(d.absolute()) for d in disks] or None, [v.disk for v in settings.volumes]),
            ]
            if options.size is not None:
                wanted.append(("--size", options.size, disk_size(Path(settings.volumes[0].disk))))
            found += [
                f"{name} {want} was given, {self.config(role)} says {have}"
                for name, want, have in wanted
                if want is not None and want != have
            ]
        return list(dict.fromkeys(found))


def placement_of(options: PairOptions) -> Placement | None:
    """The pair file that ``options`` name, if they do. ConfigError for options that it contradicts, and if no host in
    it is here."""
    if options.hosts is None or not names_a_file(options.hosts):
        return None
    if left := [name for name, value in _said_by_a_file(options).items() if value]:
        raise ConfigError(f"{options.hosts} says what the pair is.", hint=f"Leave {', '.join(left)} out.")
    placement = Placement.load(Path(options.hosts))
    if not placement.here:
        raise ConfigError(
            f"No host in {options.hosts} is this machine: nothing can be started here.",
            hint="\n".join(placement.instructions()),
        )
    return placement


def _said_by_a_file(options: PairOptions) -> dict[str, object]:
    return {
        "--size": options.size, "--primary-disk": options.primary_disks, "--secondary-disk": options.secondary_disks,
        "--volumes": options.volumes, "--assume-synced": options.assume_synced, "--mode": options.mode,
        "--checkpoint-interval": options.checkpoint_interval_s, "--block-size": options.block_size,
        "--buffer-size": options.buffer_bytes, "--listen": options.listen, "--compression": options.compression,
    }  # fmt: skip


def _hosts(options: PairOptions) -> NetnsHosts | None:
    """The hosts that ``options`` ask for, not made yet. ConfigError for a word that names none."""
    word = options.hosts or os.environ.get(HOSTS_VARIABLE) or "local"
    kind, _, tag = word.partition(":")
    if word == "local":
        if options.rate is not None:
            raise ConfigError("--rate limits the cable between two hosts.", hint="Give --hosts netns with it.")
        return None
    if kind != NETNS:
        raise ConfigError(f"--hosts {word!r} names no hosts.", hint="Use local, netns, netns:TAG, or a pair file.")
    require_root(hint=SUDO_OR_LOCAL)
    try:
        rate = parse_rate(options.rate) if options.rate else None
    except ValueError as error:
        raise ConfigError(f"--rate: {error}.") from None
    hosts = NetnsHosts(tag or None, rate)
    if options.rate is not None and tag and hosts.exists():
        raise ConfigError(
            f"The hosts {tag} are there, and --rate is for hosts that are made.",
            hint=f"`tandemdisk hosts rate {tag} {options.rate}` changes what their cable carries.",
        )
    return hosts


def default_buffer_bytes(side_bytes: int, volumes: int) -> int:
    """A quarter of the disks, at least what the pools need, at most 1 GiB: memory is taken up front."""
    least = max(64 * limits.MIB, 3 * limits.MIN_POOL * volumes)
    return max(least, min(side_bytes // 4, 1024 * limits.MIB))


def _given_disks(given: dict[Role, tuple[Path, ...]], volumes: int | None) -> tuple[dict[Role, list[Path]], int]:
    missing = [f"--{role}-disk" for role in SIDES if not given[role]]
    if missing:
        text = "--size, or " if len(missing) == 2 else ""
        raise ConfigError(f"A new pair needs {text}{' and '.join(missing)}.", hint="See tandemdisk up --help.")
    counts = {role: len(disks) for role, disks in given.items()}
    if len(set(counts.values()) | ({volumes} if volumes is not None else set())) != 1:
        wanted = f", --volumes {volumes}" if volumes is not None else ""
        raise ConfigError(
            f"Each volume has one disk a side: {counts['primary']} primary, {counts['secondary']} secondary{wanted}.",
            hint="Give --primary-disk and --secondary-disk once for each volume.",
        )
    absolute = {role: [disk.absolute() for disk in disks] for role, disks in given.items()}
    total = 0
    problems: list[str] = []
    for primary, secondary in zip(absolute["primary"], absolute["secondary"], strict=True):
        sizes: list[int] = []
        for disk in (primary, secondary):
            try:
                sizes.append(disk_size(disk))
            except DiskError as error:
                problems.append(error.sentence)
        if len(sizes) == 2 and sizes[0] != sizes[1]:
            problems.append(f"{primary} has {sizes[0]} bytes, {secondary} has {sizes[1]}: they must be equal.")
        total += sum(sizes[:1])
    if problems:
        raise DiskError(" ".join(problems), hint="Correct the disks; nothing was touched.")
    return absolute, total


def disk_size(path: Path) -> int:
    """Bytes of a raw file or block device. Raises DiskError when it is neither, or not there."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.stat().st_size
        if stat.S_ISBLK(mode):
            with path.open("rb") as device:
                return device.seek(0, os.SEEK_END)
    except OSError as error:
        raise DiskError(f"Disk {path}: {error.strerror}.") from error
    raise DiskError(f"Disk {path} is neither a file nor a block device.")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_image(path: Path, size: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _merged(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(raw)
    for key, value in overrides.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return result
