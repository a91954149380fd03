"""The built-in load generator: `python -m deploy.bench.client STREAMS`, with engines.Stream objects as a JSON list.

One process a connection, all connected before any of them starts; prints one JSON object of figures for each stream.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np

from common.errors import OperationFailed, TandemDiskError
from common.nbd_client import NbdClient
from deploy.bench.engines import PERCENTILES, Figures, Stream
from deploy.bench.workloads import Load

CONNECT_TIMEOUT_S: Final = 30.0
_CONTEXT: Final = multiprocessing.get_context("fork")


def offsets(stream: Stream, connection: int) -> Iterator[int]:
    """Offsets for one connection, without end: sequential, or each block once in random order, then again."""
    load = stream.load
    blocks = stream.size // load.block
    generator = np.random.default_rng([stream.seed, connection])
    while True:
        order = generator.permutation(blocks) if load.access == "random" else np.arange(blocks)
        yield from (order * load.block).tolist()


def drive(client: NbdClient, stream: Stream, connection: int) -> tuple[int, float, list[int]]:
    """Keep ``depth`` requests in flight until time or bytes are up: requests done, seconds, each latency in ns."""
    load = stream.load
    budget = None if stream.io_bytes is None else stream.io_bytes // load.connections // load.block
    generator = np.random.default_rng([stream.seed, connection, 1])
    payload = compressible(load.block, generator) if stream.compressible else generator.bytes(load.block)
    reads = iter(_kinds(load.read_percent, generator))
    where = offsets(stream, connection)
    started: dict[int, int] = {}
    latencies: list[int] = []
    clock = time.perf_counter_ns
    begun = clock()
    end = begun + int(stream.seconds * 1e9)
    submitted = 0
    while True:
        while len(started) < load.depth and clock() < end and (budget is None or submitted < budget):
            now = clock()
            if next(reads):
                started[client.submit_read(next(where), load.block)] = now
            else:
                started[client.submit_write(next(where), payload)] = now
            submitted += 1
        if not started:
            return len(latencies), (clock() - begun) / 1e9, latencies
        for completion in client.collect(1):
            if completion.error is not None:
                raise completion.error
            latencies.append(clock() - started.pop(completion.cookie))


def compressible(length: int, generator: np.random.Generator) -> bytes:
    """A third of each 4 KiB is random, the rest zeroes."""
    payload = np.frombuffer(generator.bytes(length), np.uint8).copy()
    payload[np.arange(length) % 4096 >= 1365] = 0
    return payload.tobytes()


def _kinds(read_percent: int, generator: np.random.Generator) -> Iterator[bool]:
    """True for a read, without end."""
    while True:
        yield from (generator.integers(0, 100, 4096) < read_percent).tolist()


def _connection(stream: Stream, number: int, start: Any, answer: Connection) -> None:
    """The life of one child: connect, wait for the others, drive, tell."""
    try:
        with NbdClient(stream.uri) as client:
            start.wait(CONNECT_TIMEOUT_S)
            answer.send(drive(client, stream, number))
    except Exception as error:
        start.abort()
        answer.send(f"{type(error).__name__}: {error}")
    finally:
        answer.close()


def run(streams: list[Stream]) -> list[Figures]:
    """The figures of each stream. OperationFailed if one connection failed."""
    start = _CONTEXT.Barrier(sum(stream.load.connections for stream in streams))
    answers: list[list[Connection]] = []
    children = []
    for stream in streams:
        answers.append([])
        for number in range(stream.load.connections):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            child = _CONTEXT.Process(target=_connection, args=(stream, number, start, theirs), daemon=True)
            child.start()
            theirs.close()
            children.append(child)
            answers[-1].append(ours)
    figures = [
        _figures(stream, [_told(answer) for answer in told]) for stream, told in zip(streams, answers, strict=True)
    ]
    for child in children:
        child.join()
    return figures


def _told(answer: Connection) -> tuple[int, float, list[int]]:
    try:
        told = answer.recv()
    except EOFError:
        raise OperationFailed("A connection's process died.") from None
    if isinstance(told, str):
        raise OperationFailed(told)
    done: tuple[int, float, list[int]] = told
    return done


def _figures(stream: Stream, told: list[tuple[int, float, list[int]]]) -> Figures:
    requests = sum(count for count, _, _ in told)
    latencies = np.concatenate([np.asarray(each, dtype=np.int64) for _, _, each in told])
    p50, p99, p999 = (np.percentile(latencies, PERCENTILES) / 1000).tolist() if len(latencies) else (0.0, 0.0, 0.0)
    return Figures(requests, requests * stream.load.block, max(seconds for _, seconds, _ in told), p50, p99, p999)


def main() -> int:
    """Exit code 0 with the figures on standard output, 1 with a sentence on standard error."""
    streams = [Stream(**{**raw, "load": Load(**raw["load"])}) for raw in json.loads(sys.argv[1])]
    try:
        print(json.dumps([dataclasses.asdict(figures) for figures in run(streams)]))
    except TandemDiskError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
