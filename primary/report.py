"""What ``status`` shows of an engine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from common.failures import count_status

if TYPE_CHECKING:
    from primary.engine import Engine


def status_of(engine: Engine) -> dict[str, Any]:
    """Of a primary, without its export."""
    session, mirror, checkpoints = engine.session, engine.mirror, engine.checkpoints
    statistics = session.statistics()
    history = session.standing.history
    return {
        "role": "primary",
        "side": engine.settings.side,
        "state": engine.state,
        "reason": engine.reason,
        "mode": engine.settings.mode,
        "checkpoint": checkpoints.number,
        "checkpoint_time": checkpoints.time or None,
        "checkpoint_seconds": checkpoints.seconds,
        "generation": history[-1].number if history else 0,
        "lag": {"bytes": session.lag_bytes(), "seconds": session.lag_s(time.monotonic())},
        "own_bytes": engine.knowledge.own_bytes(),
        "dirty_bytes": [bitmap.dirty_bytes() for bitmap in mirror.bitmaps],
        **engine.alignment.status(),
        "counters": {
            "batches": statistics.batches,
            "payload_bytes": statistics.payload_bytes,
            "replayed": statistics.replayed,
            "sessions": statistics.sessions,
            "cuts": statistics.cuts,
            "stale_messages": statistics.stale_messages,
            "applied": statistics.applied,
            "durable": statistics.durable,
            "sequence": statistics.sequence,
            "disk_errors": mirror.disk_errors,
            "local_flushes": mirror.flusher.count,
            "failures": count_status(engine.failures.counts),
            **engine.alignment.counters(),
            "intent_waits": mirror.guard.waits if mirror.guard is not None else 0,
        },
        "peer": {
            "connected": engine.state in ("protected", "syncing"),
            "address": engine.link.address,
            "trouble": engine.link.trouble,
            "round_trip_seconds": statistics.round_trip_s,
        },
        "compression": engine.link.packer.statistics() if engine.link.packer is not None else None,
        "error": engine.failures.error,
    }
