"""Who asks: fio with its nbd engine where installed, else the built-in client (slower: it flatters slow servers).

Both take streams of requests, run them at the same time, and give one ``Figures`` each. Latency is from handing a
request over until its reply is complete (fio's ``lat``, submission included).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from common.child import python_environment
from common.errors import OperationFailed, TimedOut
from deploy.bench.servers import die_with_parent
from deploy.bench.workloads import Load

PERCENTILES: Final = (50.0, 99.0, 99.9)
GRACE_S: Final = 60.0
"""How much longer than its own seconds an engine may take: connecting, and the last requests of a slow server."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one stream reached: requests and bytes done, in ``seconds``; percentiles of the latency in microseconds."""

    requests: int
    bytes: int
    seconds: float
    p50_us: float
    p99_us: float
    p999_us: float

    @property
    def iops(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def mib_s(self) -> float:
        return self.bytes / self.seconds / (1 << 20) if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Stream:
    """A load against one export: for ``seconds``, or until ``io_bytes`` are done if given and sooner."""

    load: Load
    uri: str
    size: int
    seconds: float
    io_bytes: int | None = None
    seed: int = 1
    compressible: bool = False
    """Two thirds of each 4 KiB are zeroes, and no buffer is like another; else nothing compresses."""


class Engine(Protocol):
    """Runs streams at the same time and returns their figures in the same order."""

    name: str

    def run(self, streams: Sequence[Stream], directory: Path) -> list[Figures]:
        """``directory`` takes files for the time of the call. OperationFailed if any request failed."""


def run_bounded(command: Sequence[str], seconds: float, directory: Path) -> str:
    """Standard output of ``command``; OperationFailed with its standard error, TimedOut after ``seconds`` + GRACE_S."""
    try:
        done = subprocess.run(
            command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=python_environment(),
            timeout=seconds + GRACE_S, preexec_fn=die_with_parent, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TimedOut(f"{command[0]} did not end within {seconds + GRACE_S:g} s: the server stalls.") from None
    if done.returncode != 0:
        raise OperationFailed(
            f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}"
        )
    return done.stdout


class Fio:
    """fio's nbd engine (libnbd)."""

    def __init__(self) -> None:
        self.name = subprocess.run(
            ["fio", "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    def run(self, streams: Sequence[Stream], directory: Path) -> list[Figures]:
        output = directory / "fio.json"
        command = ["fio", f"--output={output}", "--output-format=json"]
        for number, stream in enumerate(streams):
            command += fio_options(f"stream{number}", stream)
        run_bounded(command, max(stream.seconds for stream in streams), directory)
        return parse_fio(json.loads(output.read_text()))


def fio_options(name: str, stream: Stream) -> list[str]:
    """One job section of fio's command line. The same seed means the same blocks in the same order."""
    load = stream.load
    bound = ["--time_based"] if stream.io_bytes is None else [f"--io_size={stream.io_bytes // load.connections}"]
    return [
        f"--name={name}", "--ioengine=nbd", f"--uri={stream.uri}", "--new_group", "--group_reporting",
        f"--rw={load.fio_access}", f"--rwmixread={load.read_percent}", f"--bs={load.block}", f"--iodepth={load.depth}",
        f"--numjobs={load.connections}", f"--size={stream.size}", f"--runtime={round(stream.seconds * 1000)}ms", *bound,
        *(["--buffer_compress_percentage=67", "--buffer_compress_chunk=4k", "--refill_buffers"]
          if stream.compressible else []),
        "--randrepeat=1", f"--randseed={stream.seed}", "--unified_rw_reporting=1",
        "--lat_percentiles=1", "--clat_percentiles=0", "--percentile_list=50:99:99.9",
    ]  # fmt: skip


def parse_fio(report: dict[str, Any]) -> list[Figures]:
    """The figures of each group in fio's JSON output, in the order of the command line."""
    figures = []
    for job in report["jobs"]:
        if job["error"]:
            raise OperationFailed(f"fio's {job['jobname']} failed with errno {job['error']}.")
        mixed = job["mixed"]
        percentiles = {float(key): value / 1000 for key, value in mixed["lat_ns"].get("percentile", {}).items()}
        p50, p99, p999 = (percentiles.get(percentile, 0.0) for percentile in PERCENTILES)
        figures.append(Figures(mixed["total_ios"], mixed["io_bytes"], mixed["runtime"] / 1000, p50, p99, p999))
    return figures


class BuiltIn:
    """Our own client in child processes, one a connection (client.py)."""

    name = "built-in client"

    def run(self, streams: Sequence[Stream], directory: Path) -> list[Figures]:
        request = json.dumps([dataclasses.asdict(stream) for stream in streams])
        command = [sys.executable, "-P", "-m", "deploy.bench.client", request]
        said = run_bounded(command, max(stream.seconds for stream in streams), directory)
        return [Figures(**figures) for figures in json.loads(said)]


def choose_engine(name: str = "auto") -> Engine:
    """``fio``, ``built-in``, or ``auto``: fio if it is there with its nbd engine. OperationFailed if fio lacks it."""
    if name == "built-in":
        return BuiltIn()
    if shutil.which("fio"):
        listed = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, timeout=10, check=False).stdout
        if "nbd" in listed.split():
            return Fio()
    if name == "fio":
        raise OperationFailed(
            "fio with the nbd engine is not installed.", hint="apt-get install fio, or --engine built-in."
        )
    return BuiltIn()
