"""Conversations that took place: what a client said is recorded on its way, and said again with something wrong."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def recording(path: Path, target: str) -> Iterator[bytearray]:
    """A Unix socket at ``path`` that leads to ``target``, and what was sent to it by the first who connects."""
    heard = bytearray()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as far:
        listener.bind(str(path))
        listener.listen()
        far.connect(target)
        near: list[socket.socket] = []

        def forward() -> None:
            near.append(listener.accept()[0])
            threading.Thread(target=pump, args=(far, near[0], bytearray()), daemon=True).start()
            pump(near[0], far, heard)

        def pump(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    record += data
                    sink.sendall(data)

        thread = threading.Thread(target=forward, daemon=True)
        thread.start()
        yield heard
        for sock in (*near, far):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for sock in near:
            sock.close()


def damaged(chance: random.Random, messages: Sequence[bytes]) -> list[bytes]:
    """``messages`` flipped in a bit, without one, with one twice, out of order, spliced, cut short."""
    result = list(messages)
    for _ in range(chance.choice((1, 1, 2, 4))):
        if not result:
            break
        at, other = chance.randrange(len(result)), chance.randrange(len(result))
        one = result[at]
        match chance.randrange(7):
            case 0 if one:
                place = chance.randrange(len(one))
                result[at] = one[:place] + bytes((one[place] ^ 1 << chance.randrange(8),)) + one[place + 1 :]
            case 1:
                del result[at]
            case 2:
                result[at:at] = [one] * chance.choice((1, 1, 30))
            case 3:
                result[at], result[other] = result[other], one
            case 4:
                result[at] = one[: chance.randrange(len(one) + 1)] + result[other][chance.randrange(len(one) + 1) :]
            case 5:
                result[at] = one[: chance.randrange(len(one) + 1)]
            case _:
                del result[at + 1 :]
    return result
