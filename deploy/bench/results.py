"""What a run found, as plain records: the JSON output is exactly these, and the reports are made from nothing else."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Final

from deploy.bench.engines import Figures
from deploy.bench.servers import Memory

FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One job on one peer in one round."""

    round: int
    job: str
    peer: str
    figures: Figures
    beside: Figures | None
    """The load that ran at the same time, if the job has one."""
    checkpoint_s: float | None
    """The checkpoint before the job."""
    settle_s: float
    """From the last reply until the secondary had applied everything (nothing to wait for in synchronous peers)."""
    cpu_s: dict[str, float]
    """CPU seconds of each server process, from the start of the job until it settled."""

    def cpu_s_per_gib(self, process: str | None = None) -> float:
        """CPU seconds of a process, or of all together, for each GiB that clients moved."""
        moved = self.figures.bytes + (self.beside.bytes if self.beside else 0)
        spent = sum(self.cpu_s.values()) if process is None else self.cpu_s.get(process, 0.0)
        return spent / (moved / (1 << 30)) if moved else 0.0


@dataclass(frozen=True, slots=True)
class CheckpointSample:
    """One timed checkpoint: command sent until answer received, with ``dirty_bytes`` written since the one before."""

    peer: str
    size: int
    dirty_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class FailoverSample:
    """One failover after the primary was killed; seconds since the command was given."""

    peer: str
    target: str
    size: int
    dirty_bytes: int
    command_s: float
    """Until the command was answered."""
    write_s: float
    """Until the guest's export had answered a write."""
    committed_s: float
    """Until the buffer's contents were in the secondary disk."""


@dataclass(slots=True)
class PeerFacts:
    """What is known about a peer beside its samples."""

    name: str
    title: str
    replicated: bool
    commands: list[str] = field(default_factory=list)
    memory: dict[str, Memory] = field(default_factory=dict)
    """Peaks over the run, by process."""
    bounds: str = ""
    """What bounds that memory, in words."""


@dataclass(slots=True)
class Run:
    """A whole run."""

    environment: dict[str, str]
    options: dict[str, Any]
    peers: list[PeerFacts] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    checkpoints: list[CheckpointSample] = field(default_factory=list)
    failovers: list[FailoverSample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Sentences: what went wrong, what was left out because the time was up, and that the machine was busy."""
    seconds: float = 0.0

    def title(self, peer: str) -> str:
        return next((facts.title for facts in self.peers if facts.name == peer), peer)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Run:
        """What ``to_json`` wrote (of the same FORMAT)."""
        raw = json.loads(text)
        assert raw.pop("format") == FORMAT
        raw["peers"] = [
            PeerFacts(**{**peer, "memory": {name: Memory(**held) for name, held in peer["memory"].items()}})
            for peer in raw["peers"]
        ]
        raw["samples"] = [
            Sample(**{
                **sample,
                "figures": Figures(**sample["figures"]),
                "beside": Figures(**sample["beside"]) if sample["beside"] else None,
            })
            for sample in raw["samples"]
        ]  # fmt: skip
        raw["checkpoints"] = [CheckpointSample(**sample) for sample in raw["checkpoints"]]
        raw["failovers"] = [FailoverSample(**sample) for sample in raw["failovers"]]
        return cls(**raw)
