"""What a link carries without us: `python -m deploy.bench.raw receive|send tcp|zeromq|curve HOST PORT [SECONDS]`.

The sender sends as fast as it can for SECONDS; the receiver prints {"bytes", "seconds"} from the first byte to the
last. The yardstick of `tandemdisk bench --hosts`: plain TCP with 1 MiB sends, ZeroMQ with messages as large as our
batches are under load, with and without CURVE.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import zmq

from common.limits import KIB, MIB

PIECE: Final = MIB
MESSAGE: Final = 256 * KIB
QUEUED: Final = 32
PATIENCE_MS: Final = 20_000
_SERVER: Final = (b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7", b"JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6")
_CLIENT: Final = (b"Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID", b"D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs")
"""Public and secret test keys of ZeroMQ RFC 26."""


def receive(kind: str, host: str, port: int) -> tuple[int, float]:
    """Bytes and seconds of one sender."""
    return _receive_tcp(host, port) if kind == "tcp" else _receive_zeromq(kind, host, port)


def _receive_tcp(host: str, port: int) -> tuple[int, float]:
    with socket.create_server((host, port)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
        space = memoryview(bytearray(PIECE))
        total = connection.recv_into(space)
        begun = time.perf_counter()
        first = total
        while count := connection.recv_into(space):
            total += count
        return total - first, time.perf_counter() - begun


def _receive_zeromq(kind: str, host: str, port: int) -> tuple[int, float]:
    with _socket(zmq.PULL, kind) as puller:
        puller.bind(f"tcp://{host}:{port}")
        print("ready", flush=True)
        puller.recv(copy=False)
        begun = time.perf_counter()
        total = 0
        while count := len(puller.recv(copy=False).buffer):
            total += count
        return total, time.perf_counter() - begun


def send(kind: str, host: str, port: int, seconds: float) -> None:
    """Send for ``seconds``."""
    payload = os.urandom(PIECE)
    if kind == "tcp":
        with socket.create_connection((host, port)) as connection:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                connection.sendall(payload)
        return
    with _socket(zmq.PUSH, kind) as pusher:
        pusher.connect(f"tcp://{host}:{port}")
        message = payload[:MESSAGE]
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pusher.send(message, copy=False)
        pusher.send(b"")


@contextmanager
def _socket(kind: int, security: str) -> Iterator[Any]:
    """A socket for the time of the context, which ends when everything is sent."""
    with zmq.Context() as context, context.socket(kind) as made:
        _set_up(made, kind, security)
        yield made


def _set_up(made: Any, kind: int, security: str) -> None:
    made.setsockopt(zmq.SNDHWM, QUEUED)
    made.setsockopt(zmq.RCVHWM, QUEUED)
    made.setsockopt(zmq.LINGER, PATIENCE_MS)
    made.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
    made.setsockopt(zmq.SNDTIMEO, PATIENCE_MS)
    if security == "curve":
        own = _SERVER if kind == zmq.PULL else _CLIENT
        made.curve_publickey, made.curve_secretkey = own
        if kind == zmq.PULL:
            made.curve_server = True
        else:
            made.curve_serverkey = _SERVER[0]


def main() -> None:
    action, kind, host, port = sys.argv[1:5]
    if action == "send":
        send(kind, host, int(port), float(sys.argv[5]))
    else:
        total, seconds = receive(kind, host, int(port))
        print(json.dumps({"bytes": total, "seconds": seconds}))


if __name__ == "__main__":
    main()
