"""The primary's end of the replication stream, without sockets and clocks.

The shell feeds it frames and the time, and carries out the effects (``primary.effects``) that come back, in order.
In every list the ``Send``s with sequence numbers come first: whoever handles another effect may call ``write`` at once.

    IDLE ──connect──▶ GREETING ──WELCOME, prefix──▶ ESTABLISHED ◀──begin_resync── WELCOMED
      ▲                  │  └─────WELCOME, else──────────────────────────────────────▲
      └──Reconnect── CUT ◀┴── timeout, gap, junk, FAILED, BYE, ``disconnected`` ── any
                      └ REFUSE: REFUSED, tried again slowly

Who has the unacknowledged writes?
* *Attached* (``attached``): every write goes through ``write``. It is in the window until the secondary has it.
* A cut does not detach. The window keeps what is unacknowledged, ``write`` goes on accepting, and the next session on
  the same stream replays what the secondary has not received. Nothing becomes dirty, nothing is resynchronised.
* If the peer stays away for ``peer_timeout_s`` (or is heard but makes no progress for as long after a cut, or cannot
  write its disk, or said BYE) it is *lost*. With ``on_peer_loss = continue`` the session detaches and hands back
  everything it held: the caller marks it dirty and goes on alone. With ``block`` it stays attached, the window fills
  up.
* What was handed back is dirty and will never be replayed: the stream is *broken*, and the next WELCOME leads to a
  resync, never to a replay with a hole in it.
* A WELCOME leads to a replay only if the secondary is at a point of this stream that the window reaches back to
  (``primary.handshake``). Otherwise: ResyncNeeded. What is then still in the window is sent behind the RESYNC.

So a write is at any time in the window, or dirty in the caller's bitmap, or applied by the secondary. Whether what was
applied survives a secondary that loses its memory is the ``Ledger``'s business (primary.window).

``now`` is any monotonic clock in seconds.

Three modules, one object: ``primary.contact`` (is there a secondary?), ``primary.intake`` (what it says) and this one
(what the volume wants of it).
"""

from __future__ import annotations

from typing import Any

from common.errors import OperationFailed
from common.wire import BATCH, FLUSH, RESIZE, RESYNC, SYNCED, VERIFY, Frame, Frames
from primary.contact import State
from primary.effects import Effect, Send, disappointments
from primary.intake import Intake
from primary.window import (
    BODY,
    COST,
    KIND,
    PrimaryStatistics,
    ResizeQuestion,
    batch_entry,
    control_entry,
)


class PrimarySession(Intake):
    """See the module.

    ``instance`` is a random u32 that names this process; ``stream`` a random u64 that names a numbering which continues
    at ``next_sequence`` (a process that was stopped cleanly may go on with its stream; any other draws a new one).
    ``bases``: streams of earlier processes -> the sequence from which on this side's bitmaps know every write.
    ``checkpoint``: number of the last checkpoint of this pair. ``broken``: why the stream cannot be continued, if so.
    """

    # ------------------------------------------------------------------------------------------------------ the volume

    @property
    def window_open(self) -> bool:
        """False: stop reading from clients until a ``WindowOpen`` effect."""
        return not self._window.full

    @property
    def checkpoint_number(self) -> int:
        """Number of the last checkpoint that was sent; 0: none."""
        return self._window.checkpoint

    @property
    def applied(self) -> int:
        """Up to here the secondary has said that it has everything."""
        return self._window.applied

    @property
    def recorded(self) -> int:
        """Up to here the secondary's metadata says, durably, that it has everything."""
        return self._window.recorded

    def pending_extents(self) -> list[Frame]:
        """Packed extents of every batch in the window: with bitmaps and ledger, all that the secondary may lack."""
        window = self._window
        entries = (*window.flushing, *window.in_flight, *window.waiting)
        return [entry[BODY] for entry in entries if entry[KIND] == BATCH]

    def lag_bytes(self) -> int:
        """Bytes that the secondary has not confirmed (payload, extents and headers)."""
        return self._window.used

    def write(self, extents: Frame, payload: Frame, blocks: int, flags: int, pin: Any, now: float) -> list[Frames]:
        """Replicate a batch; returns the messages to send now (none if it has to wait for window, credit or peer).

        ``extents``: packed ``wire.EXTENT``s with positions relative to ``payload`` (bytes that stay as they are until
        the batch comes back). ``blocks``: at least the number of blocks of ``peer.block_size`` that the extents touch.
        ``pin``: anything but None; it comes back exactly once, in Acknowledged, FlushFailed, Lost or Refused. None if
        nobody waits.
        """
        assert self.attached, "a detached session replicates nothing: mark the batch dirty"
        self._batches += 1
        self._payload_bytes += len(payload)
        entry = batch_entry(extents, payload, blocks, flags, pin, now)
        window = self._window
        if self.state is State.ESTABLISHED and blocks <= window.credit and not window.waiting:
            window.used += entry[COST]
            if window.used >= window.limit:
                window.full = True
            return [window.send(self._session, entry)]
        window.wait(entry)
        return self._pump(now)

    def flush(self, pin: Any, now: float) -> list[Frames]:
        """Make everything written so far durable on the secondary; ``pin`` comes back when it is."""
        return self.write(b"", b"", 0, FLUSH, pin, now)

    def checkpoint(self, token: Any, now: float) -> list[Frames]:
        """Put a checkpoint barrier behind everything written so far; ``token`` comes back in CheckpointDone or -Failed.

        OperationFailed if there is no secondary to take it, or it is being synchronised.
        """
        if not self.attached:
            raise OperationFailed("There is no checkpoint to take: the secondary is not connected.")
        if self.syncing or self.state is State.WELCOMED:
            raise OperationFailed("No checkpoint can be taken while the secondary is being synchronised.")
        return self._barrier(token, now)

    def verify(self, questions: bytes, token: Any, now: float) -> list[Frames]:
        """Ask whether the secondary disk holds what packed ``wire.QUESTION``s say; ``token`` comes back in Verified.

        The hashes must be those of the primary disk's contents after all that was written so far, and nothing else.
        """
        assert self.attached
        self._window.wait(control_entry(VERIFY, (questions, token), now))
        return self._pump(now)

    # ------------------------------------------------------------------------------------------------------- the sizes

    def resize(self, sizes: tuple[int, ...], token: Any, now: float, *, exact: bool) -> list[Frames]:
        """Ask the secondary to grow the volumes to ``sizes``, or with ``exact`` False to as many of them as it has;
        ``token`` comes back in Resized.

        Nothing may be sent beyond the old sizes before ``grown``. OperationFailed as in ``checkpoint``.
        """
        if not self.attached or self.syncing or self.state is State.WELCOMED:
            raise OperationFailed("Nothing can be resized while the secondary is not connected and in line.")
        self._window.wait(control_entry(RESIZE, ResizeQuestion(sizes, token, exact=exact), now))
        return self._pump(now)

    def grown(self, sizes: tuple[int, ...]) -> None:
        """This side has ``sizes``, durably."""
        assert all(size >= before for size, before in zip(sizes, self._sizes, strict=True))
        self._sizes = sizes

    # ------------------------------------------------------------------------------------------------------ the resync

    def begin_resync(self, *, full: bool, keep_checkpoint: bool, now: float) -> list[Effect]:
        """Answer to ResyncNeeded. From here on writes go in-stream; the caller sends what differs by ``write`` with
        RESYNC_DATA and ends with ``finish_resync``. ``keep_checkpoint`` needs room in the pool for all that differs."""
        assert self.state is State.WELCOMED
        assert self.peer is not None
        same_stream = self.peer.stream == self.stream
        dropped = self._window.rebase(self.peer.received if same_stream else 0, self.peer.syncing)
        effects = disappointments(dropped, "the secondary has to be synchronised first")
        self._window.sync_open = True
        self._broken = ""
        self.attached = self.syncing = True
        self.state = State.ESTABLISHED
        keep = keep_checkpoint and self.peer.standing.consistent
        self._window.waiting.appendleft(control_entry(RESYNC, [self.stream, full, keep], now))
        return [*map(Send, self._pump(now)), *effects]

    @property
    def in_resync(self) -> bool:
        """Between RESYNC and SYNCED in the stream: what waits to be sent may lie there still when ``syncing`` does
        not."""
        return self._window.sync_open

    def give_up_checkpoint(self, now: float) -> list[Frames]:
        """The pool is too small for this resync: tell the secondary to drop its checkpoint and stop copying."""
        assert self._window.sync_open
        self._starved = False
        self._window.waiting.appendleft(control_entry(RESYNC, [self.stream, False, False], now))
        return self._pump(now)

    def finish_resync(self, token: Any, now: float) -> list[Frames]:
        """All that differed has been given to ``write``: the secondary is complete at this point, and takes a
        checkpoint there (``token`` comes back in CheckpointDone)."""
        assert self.syncing
        self.syncing = False
        self._window.wait(control_entry(SYNCED, self.standing.history, now))
        return self._barrier(token, now)

    def statistics(self) -> PrimaryStatistics:
        """A frozen record for status and metrics."""
        window = self._window
        return PrimaryStatistics(
            self._batches, self._payload_bytes, self._replayed, self._sessions, self._cuts, self._stale, window.used,
            len(window.waiting), len(window.in_flight), window.credit, window.applied, window.durable,
            window.next_sequence - 1, self._round_trip_s,
        )
