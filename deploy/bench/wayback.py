"""What the way back costs, in one run on one machine: resyncs beside the raw stream and a copy of the same disk by
nbdcopy, and the write-intent bitmap on random writes, on beside off, in alternating rounds.

    raw stream          half of the disk written through an async pair, 1 MiB each, until the secondary has applied it
    resync, dirty bits  the same bytes, written while the secondary was dead: from its first piece to the end
    resync, checksums   the whole of equal disks compared on command, nothing sent
    nbdcopy             the whole disk from the primary's export into a file; of both, the half that is a hole is not
                        counted
    write-intent        random writes of 4 KiB on two pairs; the first round meets regions whose bits are not set yet
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from common.errors import TimedOut
from common.limits import KIB, MIB
from common.nbd_client import NbdClient
from deploy.bench.scratch import scratch_directory
from deploy.layout import PairOptions
from deploy.pair import Pair

PATIENCE_S: Final = 60.0
ROUNDS: Final = 7
WRITES: Final = 20_000
"""Of 4 KiB in a round."""
DEPTH: Final = 32
OPTIONS: Final[dict[str, Any]] = {"replication": {"heartbeat_s": 0.2, "peer_timeout_s": 2.0}}

Rates = dict[str, float]
"""Name -> MiB/s, or requests a second."""


def measure(parent: Path, size: int, progress: Callable[[str], None]) -> dict[str, Rates]:
    """{"MiB/s": …, "writes/s": …}; disks of ``size`` bytes live under ``parent``."""
    with scratch_directory(parent) as directory:
        progress("resync")
        rates = _resyncs(directory, size)
        progress("write-intent bitmap")
        return {"MiB/s": rates, "writes/s": _intents(directory, size)}


def show(console: Console, parent: Path, size: int, json_path: str | None) -> None:
    """Measure and print, as a table or as JSON."""
    found = measure(parent, size, lambda what: console.print(what, style="dim") if json_path is None else None)
    if json_path == "-":
        print(json.dumps(found))
        return
    if json_path is not None:
        Path(json_path).write_text(json.dumps(found) + "\n", encoding="utf-8")
    for unit, rates in found.items():
        table = Table("", unit, box=None, header_style="bold")
        for name, rate in rates.items():
            table.add_row(name, f"{rate:,.0f}")
        console.print(table)


# Resync


def _resyncs(directory: Path, size: int) -> Rates:
    half = size // 2
    rates: Rates = {}
    with Pair.create(directory / "p", PairOptions(size=size, mode="async", overrides=OPTIONS)) as pair:
        pair.up()
        pair.wait_protected()
        uri = str(pair.status()["primary"]["nbd_uri"])
        noise = memoryview(os.urandom(MIB))
        _write(uri, half, noise)  # the disk has its blocks: all that is measured overwrites
        started = time.perf_counter()
        _write(uri, half, noise)
        pair.checkpoint()
        rates["raw stream"] = half / MIB / (time.perf_counter() - started)
        rates["resync, dirty bits"] = _after_a_death(pair, uri, half, noise)
        told = pair.resync(full=True)
        rates["resync, checksums"] = half / MIB / told["seconds"]
        if shutil.which("nbdcopy") is not None:
            parts = urlsplit(uri)
            source = f"{parts.scheme}://{parts.path}?{parts.query}"
            started = time.perf_counter()
            subprocess.run(["nbdcopy", source, str(directory / "copy.raw")], check=True)
            rates["nbdcopy"] = half / MIB / (time.perf_counter() - started)
    return rates


def _write(uri: str, length: int, noise: memoryview) -> None:
    with NbdClient(uri) as client:
        client.write_many(((offset, noise) for offset in range(0, length, MIB)), depth=8)


def _after_a_death(pair: Pair, uri: str, length: int, noise: memoryview) -> float:
    """MiB/s of a resync of ``length`` bytes, from the first that moved to the end."""
    os.kill(pair.status()["secondary"]["pid"], signal.SIGKILL)
    client = pair.client("primary")
    _until(lambda: client.call("status")["state"] == "alone")
    _write(uri, length, noise)
    starter = threading.Thread(target=pair.up)  # a resync may be over before it returns
    starter.start()
    seen: list[tuple[float, int]] = []

    def over() -> bool:
        status = client.call("status")
        seen.append((time.perf_counter(), int(status["counters"]["resync_moved_bytes"])))
        return status["state"] == "protected" and seen[-1][1] > 0

    _until(over)
    starter.join()
    begun = max((when for when, moved in seen if moved == 0), default=seen[0][0])
    return seen[-1][1] / MIB / (seen[-1][0] - begun)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimedOut(f"The pair did not get there within {PATIENCE_S:g} s.")
        time.sleep(0.002)


# The write-intent bitmap


def _intents(directory: Path, size: int) -> Rates:
    """Writes a second of two pairs in turns: the first round of each, and the median of the others."""
    chance = random.Random(1)
    noise = os.urandom(4 * KIB)
    names = {"with write-intent bitmap": True, "without": False}
    found: dict[str, list[float]] = {name: [] for name in names}
    pairs = {
        name: Pair.create(directory / f"w{number}", PairOptions(size=size, overrides={"write_intent": kept}))
        for number, (name, kept) in enumerate(names.items())
    }
    try:
        uris = {}
        for name, pair in pairs.items():
            pair.up()
            pair.wait_protected()
            uris[name] = str(pair.status()["primary"]["nbd_uri"])
        for _ in range(ROUNDS):
            offsets = [chance.randrange(size // len(noise)) * len(noise) for _ in range(WRITES)]
            for name in sorted(names, key=lambda _: chance.random()):
                found[name].append(_random_writes(uris[name], ((offset, noise) for offset in offsets)))
    finally:
        for pair in pairs.values():
            pair.down(purge=True)
    first = {f"{name}, first round": rates[0] for name, rates in found.items()}
    return first | {f"{name}, median of the others": statistics.median(rates[1:]) for name, rates in found.items()}


def _random_writes(uri: str, writes: Iterator[tuple[int, bytes]]) -> float:
    with NbdClient(uri) as client:
        started = time.perf_counter()
        count = client.write_many(writes, depth=DEPTH)
        return count / (time.perf_counter() - started)
