"""`tandemdisk bench --hot-path`: where each microsecond of a replicated 4 KiB write goes, as Markdown tables.

Three looks at the same path, on the machine that it runs on:

    steps         what each step costs alone (steps.py), for batches as they really occur at depth 1 and depth 32
    processes     CPU time and wake-ups a request, thread by thread, of a pair under load
    round trips   what one message and its answer take between two processes, over what could carry them

At depth 32 the processes' CPU time decides, at depth 1 the wake-ups: a request passes through several threads, one
after the other, and each hand-over costs more than the work.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import zmq
from rich.console import Console

from common.limits import MIB
from deploy.bench import scratch, steps
from deploy.bench.engines import Stream, choose_engine
from deploy.bench.peers import TandemDisk
from deploy.bench.steps import Step
from deploy.bench.workloads import Load

DEPTHS: Final = (1, 32)
SIZE: Final = 256 * MIB
LOAD_S: Final = 2.0
ROUND_TRIPS: Final = 3000
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ThreadUse:
    """What one thread has used: seconds of CPU, and how often it went to sleep and was woken."""

    user_s: float
    system_s: float
    wake_ups: int

    def since(self, before: ThreadUse) -> ThreadUse:
        return ThreadUse(self.user_s - before.user_s, self.system_s - before.system_s, self.wake_ups - before.wake_ups)


def thread_uses(pid: int) -> dict[str, ThreadUse]:
    """Each thread of ``pid`` by its name and number: the main one is called ``main``."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            fields = (task / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            status = (task / "status").read_text(encoding="utf-8")
            name = "main" if int(task.name) == pid else (task / "comm").read_text(encoding="utf-8").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        switches = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("voluntary"))
        key = name if name == "main" else f"{name} {task.name}"
        found[key] = ThreadUse(int(fields[11]) / _TICKS, int(fields[12]) / _TICKS, switches)
    return found


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pair under random writes at one depth."""

    mode: str
    depth: int
    iops: float
    requests: int
    batches: int
    uses: dict[tuple[str, str], ThreadUse]
    """By process and thread; threads that did nothing are left out."""


def load_pair(directory: Path, progress: Callable[[str], None]) -> list[Loaded]:
    """Both modes at both depths, first touches as after a checkpoint."""
    found = []
    engine = choose_engine()
    for mode in ("sync", "async"):
        peer = TandemDisk(mode)
        progress(f"{peer.title}: start")
        try:
            peer.start(directory / mode, SIZE)
            for depth in DEPTHS:
                progress(f"{peer.title}: random write 4 KiB, depth {depth}")
                peer.checkpoint()
                pids = peer.pids()
                before = {name: thread_uses(pid) for name, pid in pids.items()}
                batches = peer.batches()
                (figures,) = engine.run([Stream(Load("random", 0, 4096, depth), peer.uri, SIZE, LOAD_S)], directory)
                peer.settle()
                uses = dict(_differences(before, pids))
                batches = peer.batches() - batches
                found.append(Loaded(mode, depth, figures.iops, figures.requests, batches, uses))
        finally:
            peer.stop()
    return found


def _differences(
    before: dict[str, dict[str, ThreadUse]], pids: dict[str, int]
) -> Iterator[tuple[tuple[str, str], ThreadUse]]:
    nothing = ThreadUse(0.0, 0.0, 0)
    for process, pid in pids.items():
        for thread, use in thread_uses(pid).items():
            done = use.since(before[process].get(thread, nothing))
            if done.user_s + done.system_s > 0.01 or done.wake_ups > 20:
                yield (process, thread.rpartition(" ")[0] or thread), done


# Round trips


def _wait(poll: select.epoll, busy: bool) -> None:
    """Until there is something to receive: asleep, or looking again and again as ``common.polling`` does."""
    if busy:
        while not poll.poll(0):
            os.sched_yield()
    else:
        poll.poll()


def _echo_socket(end: tuple[socket.socket, bool]) -> None:
    server, busy = end
    server.setblocking(False)
    poll = select.epoll()
    poll.register(server, select.EPOLLIN)
    while True:
        _wait(poll, busy)
        if not server.recv(65536):
            return
        server.send(bytes(64))


def _echo_zmq(address: str) -> None:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(address)
    poll = select.epoll()
    poll.register(router.FD, select.EPOLLIN)
    while True:
        poll.poll()
        while router.poll(0):
            frames = router.recv_multipart(copy=False)
            router.send_multipart([frames[0].bytes, bytes(64)])


def _median_us(exchange: Callable[[], object]) -> float:
    for _ in range(ROUND_TRIPS // 10):
        exchange()
    return sorted(_taken(exchange) for _ in range(ROUND_TRIPS))[ROUND_TRIPS // 2] / 1000


def _taken(exchange: Callable[[], object]) -> int:
    begun = time.perf_counter_ns()
    exchange()
    return time.perf_counter_ns() - begun


def _in_child(work: Callable[[Any], None], argument: Any) -> Any:
    child = multiprocessing.get_context("fork").Process(target=work, args=(argument,), daemon=True)
    child.start()
    return child


def socket_round_trip_us(*, busy: bool) -> float:
    """4 KiB to another process and 64 bytes back over a Unix socket, both ends asleep in epoll or polling."""
    client, server = socket.socketpair()
    child = _in_child(_echo_socket, (server, busy))
    poll = select.epoll()
    poll.register(client, select.EPOLLIN)
    payload = bytes(4096)

    def exchange() -> None:
        client.send(payload)
        _wait(poll, busy)
        client.recv(65536)

    try:
        return _median_us(exchange)
    finally:
        poll.close()
        client.close()
        server.close()
        os.kill(child.pid, signal.SIGKILL)
        child.join()


def zmq_round_trip_us(directory: Path) -> float:
    """The same over ZeroMQ's ipc, whose I/O thread at each end is one more hand-over each way."""
    address = f"ipc://{directory}/rt.sock"
    child = _in_child(_echo_zmq, address)
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(address)
    poll = select.epoll()
    poll.register(dealer.FD, select.EPOLLIN)
    header, payload = bytes(60), bytes(4096)

    def exchange() -> None:
        dealer.send(header, zmq.SNDMORE)
        dealer.send(payload)
        while not dealer.poll(0):
            poll.poll()
        dealer.recv_multipart()

    try:
        return _median_us(exchange)
    finally:
        poll.close()
        context.destroy(0)
        os.kill(child.pid, signal.SIGKILL)
        child.join()


# Tables


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns padded; all but the first two aligned to the right."""
    widths = [max(len(row[number]) for row in [columns, *rows]) for number in range(len(columns))]
    rules = [f"{'-' * (width - 1)}{'-' if number < 2 else ':'}" for number, width in enumerate(widths)]

    def line(cells: list[str]) -> str:
        padded = (
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )  # fmt: skip
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(columns), line(rules), *map(line, rows)])


def steps_table(measured: list[list[Step]], counts: list[int]) -> str:
    """Microseconds a request of each step, one column for each batch size."""
    rows = []
    for process in dict.fromkeys(step.process for step in measured[0]):
        columns = [[step for step in found if step.process == process] for found in measured]
        for same in zip(*columns, strict=True):
            what = same[0].what.replace(", 1 p", ", p")
            shares = [f"{step.us / count:.2f}" for step, count in zip(same, counts, strict=True)]
            rows.append([process, f"{what} ({same[0].nature})", *shares])
        sums = [sum(step.us for step in found) / count for found, count in zip(columns, counts, strict=True)]
        rows.append([process, "**all of these**", *(f"**{total:.1f}**" for total in sums)])
    return markdown(["process", "step", *(f"batch of {count}" for count in counts)], rows)


def processes_table(loaded: list[Loaded]) -> str:
    """CPU microseconds and wake-ups a request of each thread, one pair of columns for each load."""
    keys = list(dict.fromkeys(key for load in loaded for key in load.uses))
    rows = []
    for process, thread in keys:
        cells = []
        for load in loaded:
            use = load.uses.get((process, thread))
            if use is None:
                cells.append("")
                continue
            user, system, wakes = (
                value / load.requests for value in (use.user_s * 1e6, use.system_s * 1e6, use.wake_ups)
            )
            cells.append(f"{user:.1f} + {system:.1f}, {wakes:.2f}")
        rows.append([process, thread, *cells])
    cpu = [1e6 * sum(use.user_s + use.system_s for use in load.uses.values()) / load.requests for load in loaded]
    rows.append(["**all**", "", *(f"**{each:.1f}**" for each in cpu)])
    rows.append(["IOPS", "", *(f"{load.iops:,.0f}" for load in loaded)])
    rows.append(["requests a batch", "", *(f"{load.requests / max(1, load.batches):.1f}" for load in loaded)])
    return markdown(["process", "thread", *(f"{load.mode}, depth {load.depth}" for load in loaded)], rows)


def show_hot_path(console: Console, parent: Path) -> None:
    """Measure and print. Needs 1.5 GiB in ``parent``, a memory file system."""
    with scratch.scratch_directory(parent) as directory:
        scratch.require_space(directory, TandemDisk.footprint(SIZE) + 4 * steps.SIZE)
        loaded = load_pair(directory, lambda what: console.print(what, style="dim"))
        deep = [load for load in loaded if load.depth > 1]
        batch = max(1, round(sum(load.requests for load in deep) / max(1, sum(load.batches for load in deep))))
        console.print("steps, each alone", style="dim")
        counts = [1, batch]
        measured = steps.measure(directory, counts)
        awake, asleep = socket_round_trip_us(busy=True), socket_round_trip_us(busy=False)
        over_zmq = zmq_round_trip_us(directory)
    sections = (
        "Microseconds a request of 4 KiB, each step measured alone:",
        steps_table(measured, counts),
        "Microseconds a request under load, user + system time, and how often the thread was woken for it:",
        processes_table(loaded),
        f"4 KiB to another process and an answer back: {awake:.0f} µs over a Unix socket if both ends poll, "
        f"{asleep:.0f} µs if they sleep, {over_zmq:.0f} µs over libzmq (ipc).",
    )
    for section in sections:
        console.print(f"\n{section}", soft_wrap=True, markup=False, highlight=False)
