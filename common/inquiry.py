"""A command on one host asks the side on the other where it stands: ASK and TOLD, outside any session.

Who leads, and who has to rejoin, follows from what both sides remember (common.generation). A command reads that from
the metadata of a side that is here. For a side on another machine its process answers, at the address where it listens
anyway: a secondary for its primary, a side that leads to turn a stale primary away. It tells what its metadata file
says and not what it knows by itself, because only what is durable decides. Asking changes nothing.

With ``ended``, the history in which the side that led has stopped in good order, the question is also an order: lead
from there. Only a side with keys takes it, for then nobody but its peer can have sent it.

A process that knows no ASK (the message is younger than the protocol's version) answers nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any, Final

from common import wire
from common.errors import NotRunning, PeerRefused, TandemDiskError, WireError
from common.generation import History, Standing
from common.intent import INTENT_FILE, marked_bytes
from common.keys import stream_keys
from common.metadata import Metadata, load
from common.port import zmq_context
from common.record import random_number
from common.settings import NodeSettings
from common.transport import dial
from common.wire import Frames

ANSWER_TIMEOUT_S: Final = 10.0
ASK_AGAIN_S: Final = 0.5
TELL_EVERY_S: Final = 0.05
"""Who asks more often is not answered: to know what to tell, files are read."""

log = logging.getLogger("inquiry")


def own_bytes(settings: NodeSettings, metadata: Metadata) -> int:
    """Bytes of the regions in which a primary may have written what the other side lacks: an upper bound."""
    sizes = [size for _, size in metadata.volumes]
    if metadata.role != "primary" or metadata.clean:
        return 0
    return marked_bytes(f"{settings.directory}/{INTENT_FILE}", sizes)


def remembered_standing(settings: NodeSettings) -> Standing | None:
    """What a side's files say of it, whether its processes run or not; None if it never ran. DiskError."""
    metadata = load(f"{settings.directory}/metadata")
    if metadata is None:
        return None
    size = own_bytes(settings, metadata)
    return metadata.standing(-(-size // settings.buffer.block_size), size)


class Informant:
    """Answers for the side of ``settings``."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._told_at = 0.0

    def tell(self, session: int, *, always: bool = False) -> Frames | None:
        """TOLD to whoever asked in ``session``; None: not now."""
        now = time.monotonic()
        if not always and now - self._told_at < TELL_EVERY_S:
            return None
        self._told_at = now
        try:
            standing = remembered_standing(self._settings)
        except TandemDiskError as error:
            log.error("cannot tell where this side stands: %s", error)
            return None
        return wire.encode(wire.Told(session, 0, standing)) if standing is not None else None


def ask(settings: NodeSettings, ended: History = (), timeout_s: float = ANSWER_TIMEOUT_S) -> Standing:
    """Where the peer of the side of ``settings`` stands; with ``ended``, once it leads. Blocks.

    PeerRefused with the sentence of a side that will not lead, NotRunning if nobody answers: then it may lead.
    """
    return asyncio.run(_Inquiry(settings, ended).answer(timeout_s))


class _Inquiry:
    """One question: repeated, for the process there may be on its way up, until it is answered."""

    def __init__(self, settings: NodeSettings, ended: History) -> None:
        self._settings = settings
        self._session = random_number(64)
        self._ask = wire.encode(wire.Ask(self._session, 0, ended))
        self._trouble = "nobody is there"
        self._up = asyncio.Event()
        self._answer: wire.Told | wire.Refuse | None = None
        self._answered = asyncio.Event()

    async def answer(self, timeout_s: float) -> Standing:
        replication = self._settings.replication
        if replication.connect is None:
            raise NotRunning(
                f"Side {self._settings.side} has no address of its peer to ask.", hint="Set replication.connect."
            )
        with zmq_context() as context:
            dialer = dial(
                context, replication.connect, stream_keys(replication), self._received, lambda: None, self
            )
            try:
                async with asyncio.timeout(timeout_s):
                    while not self._answered.is_set():
                        await self._up.wait()
                        dialer.send(self._ask)
                        with suppress(TimeoutError):
                            async with asyncio.timeout(ASK_AGAIN_S):
                                await self._answered.wait()
            except TimeoutError:
                raise NotRunning(
                    f"The other side, at {replication.connect}, did not say where it stands: {self._trouble}.",
                    hint="Its process has to run, whichever role it has. (A side that has to rejoin need not: give the "
                    "command on its host.)",
                ) from None
            finally:
                dialer.close()
        if isinstance(self._answer, wire.Refuse):
            raise PeerRefused(self._answer.sentence)
        assert self._answer is not None
        return self._answer.standing

    def _received(self, frames: list[Any]) -> None:
        try:
            message = wire.decode(frames)
        except WireError:
            return
        if isinstance(message, wire.Told | wire.Refuse) and message.session == self._session:
            self._answer = message
            self._answered.set()

    # Watcher

    def connection_up(self) -> None:
        self._trouble = "its process is there and does not answer; an older TandemDisk would not"
        self._up.set()

    def connection_down(self, reason: str) -> None:
        self._trouble = reason
        self._up.clear()
