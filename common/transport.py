"""Which sockets carry the replication stream: the loop's own, or libzmq's where it has to be encrypted.

Both speak ZeroMQ's protocol. ``keys`` decides: CURVE is libzmq's, everything else is faster without its threads.
"""

from __future__ import annotations

from collections.abc import Callable

import zmq

from common.keys import CurveKeys
from common.plain import PlainDialer, PlainListener
from common.port import Dialer, Frame, Listener, Watcher

Context = zmq.Context[zmq.Socket[bytes]]


def dial(
    context: Context,
    address: str,
    keys: CurveKeys | None,
    on_frames: Callable[[list[bytes]], None],
    on_drained: Callable[[], None],
    watcher: Watcher,
) -> Dialer | PlainDialer:
    """The primary's end of the stream, dialing ``address`` from now on."""
    if keys is None:
        return PlainDialer(address, on_frames, on_drained, watcher)
    return Dialer(context, address, keys, on_frames, on_drained, watcher)


def listen(
    context: Context,
    address: str,
    keys: CurveKeys | None,
    on_frames: Callable[[bytes, list[Frame]], None],
    on_drained: Callable[[], None],
    on_disconnected: Callable[[], None],
) -> Listener | PlainListener:
    """The secondary's end, listening on ``address``. Raises AddressInUse, ConfigError."""
    if keys is None:
        return PlainListener(address, on_frames, on_drained, on_disconnected)
    return Listener(context, address, keys, on_frames, on_drained, on_disconnected)
