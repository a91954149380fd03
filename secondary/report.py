"""What ``status`` shows of a secondary process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from common.errors import TandemDiskError
from common.failures import count_status, error_status
from secondary.header import Stage

if TYPE_CHECKING:
    from secondary.node import SecondaryNode


async def status_of(node: SecondaryNode) -> dict[str, Any]:
    """Of a secondary, or of a promoted side with what its engine adds."""
    header, volumes = node.buffer.header, node.buffer.volumes
    block, epoch = header.block_size, header.epoch
    if header.stage is Stage.DONE:
        epoch += 1  # what a commit left in the pools counts no more
    hidden = sum(volume.hidden.used(epoch) for volume in volumes) * block
    active = sum(volume.active.used(epoch) for volume in volumes) * block
    capacity = sum(volume.hidden.slots + volume.active.slots for volume in volumes) * block
    jobs = node.backup.jobs
    spilled = sum(job.spilled_blocks for job in jobs) * block if header.stage is not Stage.DONE else 0
    spills = [job.spill for job in jobs if job.spill is not None]
    statistics = node.session.statistics()
    position = node.session.position
    done, total = node.promotion.commit.statistics if node.promotion.commit is not None else (0, 0)
    exporter = node.exporter
    history = node.record.value.history
    told = {
        "role": "primary" if node.promoted else "secondary",
        "side": node.settings.side,
        "pid": os.getpid(),
        "export_pid": exporter.pid,
        "export_restarts": exporter.restarts,
        "state": header.stage.name,
        "protected": not header.syncing,
        "resyncing": position.syncing,
        "nbd_uri": exporter.uri(node.settings.volumes[0].name),
        "checkpoint": header.checkpoint.number,
        "checkpoint_time": header.checkpoint.wall_ns / 1e9 or None,
        "generation": history[-1].number if history else 0,
        "buffer": {
            "bytes": hidden + active,
            "percent": 100.0 * (hidden + active - spilled) / capacity,
            "capacity_bytes": capacity,
            "hidden_bytes": hidden,
            "active_bytes": active,
            "block_size": block,
            "directory": node.buffer.directory,
            "spilled_bytes": spilled,
            "spill_capacity_bytes": sum(spill.slots for spill in spills) * block,
            "spill_trouble": next((spill.trouble for spill in spills if spill.trouble), None),
        },
        "commit": {
            "active": node.promotion.committing,
            "done_bytes": done * block,
            "total_bytes": total * block,
        },
        "peer": {"connected": node.session.connected, "since": node.connected_at or None,
                 "refused": node.link.last_refusal or None},
        "counters": {
            "batches": statistics.batches,
            "payload_bytes": statistics.payload_bytes,
            "written_bytes": node.applier.bytes_written,
            "sessions": statistics.sessions,
            "stale_messages": statistics.stale_messages,
            "duplicates": statistics.duplicates,
            "checkpoints": node.applier.checkpoints,
            "waits": node.applier.waits,
            "applied": statistics.applied,
            "durable": position.durable,
            "failures": count_status(header.failures()),
        },
        "volumes": [
            {
                "name": volume.name,
                "size": volume.size,
                "nbd_uri": exporter.uri(volume.name),
                "hidden_bytes": volume.hidden.used(epoch) * block,
                "active_bytes": volume.active.used(epoch) * block,
            }
            for volume in volumes
        ],
        "error": _error(node),
    }  # fmt: skip
    return told | await _of_engine(node, told)


def _error(node: SecondaryNode) -> dict[str, Any] | None:
    record = node.buffer.header.get_error()
    if record is None:
        return None
    return error_status(record.case, record.sentence, record.wall_ns / 1e9)


async def _of_engine(node: SecondaryNode, told: dict[str, Any]) -> dict[str, Any]:
    """What a promoted side's engine adds and knows better."""
    if node.promotion.leading is None:
        return {}
    try:
        engine = (await node.exporter.call("status")).get("engine")
    except TandemDiskError:
        return {}
    if engine is None:
        return {}
    volumes = [
        volume | {"dirty_bytes": dirty}
        for volume, dirty in zip(told["volumes"], engine["dirty_bytes"], strict=True)
    ]
    same = ("mode", "reason", "checkpoint", "generation", "lag", "resync", "verify", "checkpoint_seconds",
            "compression", "own_bytes")
    # until it had a secondary of its own, how the failover ended says more than that it has none
    alone = engine["state"] == "alone" and not engine["counters"]["sessions"]
    return {
        **{key: engine[key] for key in same},
        "peer": engine["peer"] | {"refused": told["peer"]["refused"]},
        "engine": engine["state"],
        "state": told["state"] if alone else engine["state"],
        "checkpoint_time": engine["checkpoint_time"] or told["checkpoint_time"],
        "volumes": volumes,
        "counters": told["counters"] | engine["counters"] | {
            "failures": told["counters"]["failures"] | engine["counters"]["failures"]
        },
        "error": engine["error"] or told["error"],
    }
