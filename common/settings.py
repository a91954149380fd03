"""What a process of a pair needs to know to run: plain values, already validated.

``common.config`` (pydantic) makes these from a TOML file or from command-line options. They travel to the processes as
JSON, so that a process on the data path never imports the validator.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from common import limits

Mode = Literal["sync", "async"]
Role = Literal["primary", "secondary"]
Compression = Literal["off", "zstd"]


@dataclass(frozen=True, slots=True)
class VolumeSettings:
    """One disk of the pair on this side; ``name`` is its NBD export name and the same on both sides."""

    name: str
    disk: str
    read_only: bool = False
    """Clients of this side's export of it get EPERM for whatever would change it; replication goes on."""


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """Where this side's NBD export listens; at least one of the two."""

    unix: str | None = None
    host: str | None = None
    port: int = 10809
    group_access: bool = False
    """The Unix socket is open to the group of the process, too (0660), and not to its owner alone."""


@dataclass(frozen=True, slots=True)
class ReplicationSettings:
    """The stream. Addresses are ZeroMQ's: ``ipc://PATH`` or ``tcp://HOST:PORT``; keys are paths of CURVE
    certificates."""

    listen: str | None = None
    """Where this side listens while it is the secondary."""
    connect: str | None = None
    """Where the peer listens while it is the secondary."""
    window_bytes: int = limits.DEFAULT_WINDOW
    heartbeat_s: float = 1.0
    peer_timeout_s: float = 5.0
    secret_key: str | None = None
    peer_key: str | None = None
    plaintext: bool = False
    """The stream may leave this machine without CURVE: for a network that is trusted, or that encrypts by itself."""
    compression: Compression = "off"
    """``zstd``: while this side is the primary it compresses what the link, and not a processor, holds up."""


@dataclass(frozen=True, slots=True)
class BufferSettings:
    """The disk buffer of a secondary: a directory of its own on a memory file system, and its size over all volumes."""

    directory: str
    size_bytes: int
    block_size: int = limits.DEFAULT_BLOCK
    spill_bytes: int = limits.DEFAULT_SPILL
    """What a resync that is larger than the buffer may put into files, so that the last checkpoint stays; 0: nothing,
    then such a resync gives the checkpoint up."""
    spill_directory: str | None = None
    """Where those files are; None: beside each disk (for a block device: in the side's directory)."""


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """One side of a pair. The same file serves whichever role the side has."""

    pair_id: str
    side: str
    """Name of this side, ``a`` or ``b``."""
    directory: str
    """Holds metadata, control sockets, logs."""
    volumes: tuple[VolumeSettings, ...]
    export: ExportSettings
    replication: ReplicationSettings
    buffer: BufferSettings
    mode: Mode = "sync"
    checkpoint_interval_s: float = 0.0
    initial_sync: Literal["full", "assume"] = "full"
    on_peer_loss: Literal["continue", "block"] = "continue"
    on_congestion: Literal["block", "pull-ahead"] = "block"
    """When the window is full: make writers wait, or go on alone and resynchronise later."""
    max_lag_seconds: float = 0.0
    """Treat a secondary that is further behind than this as lost; 0: never."""
    resync_rate: int = 0
    """Ceiling: bytes a second that a resync or a verification takes at most; 0: as many as guests leave."""
    resync_floor: int = 0
    """Bytes a second that a resync takes whatever guests do; 0: it gives way to them altogether."""
    resync_deadline_s: float = 0.0
    """Seconds in which a resync has to be done; it takes from guests what that needs. 0: none."""
    keep_diverged: bool = False
    """Before a former primary rejoins, save the blocks that it alone wrote to a file in its directory."""
    write_intent: bool = True
    """Keep the write-intent bitmap: after a crash of the primary regions are compared, not the whole disk."""
    busy_poll_us: int = limits.DEFAULT_BUSY_POLL_US
    """How long a process that was busy a moment ago looks for its next event before it sleeps; 0: not at all."""
    request_timeout_s: float = 10.0
    """How long anybody waits for a CowRequest before that is an error which names the holder."""

    def to_json(self) -> str:
        """The settings as one JSON object; ``from_json`` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> NodeSettings:
        """The settings that ``to_json`` wrote (by our own launcher: not validated again)."""
        raw = json.loads(text)
        raw["volumes"] = tuple(VolumeSettings(**v) for v in raw["volumes"])
        raw["export"] = ExportSettings(**raw["export"])
        raw["replication"] = ReplicationSettings(**raw["replication"])
        raw["buffer"] = BufferSettings(**raw["buffer"])
        return cls(**raw)

    def control_path(self, process: str) -> str:
        """Path of the control socket of ``process`` (``primary``, ``secondary`` or ``export``) of this side."""
        return f"{self.directory}/{process}.control"
