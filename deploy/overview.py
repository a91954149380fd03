"""The status of a pair, out of what its processes say and what the supervisor knows of the dead ones.

    {"state":      the primary's own word while it leads ("protected", "syncing", "alone" …); after a failover the stage
                   of the promoted side ("failover", "failover_failed", "done") until it has a secondary of its own;
                   else see ``merged_state``
     "mode": "sync" | "async", "checkpoint": number or None, "generation": number or None,
     "primary":    {"role", "pid", "state", "nbd_uri", "error", …}    "dead" and "stopped" come with "reason", pid None
     "secondary":  {"role", "pid", "export_pid", "state", "nbd_uri", "error", …}
     "lag":        {"bytes", "seconds"}                    None while nobody knows
     "buffer":     {"bytes", "percent", "capacity_bytes", "active_bytes", "hidden_bytes"}
     "resync":     {"active", "done_bytes", "total_bytes", "rate"}, "commit": {"active", "done_bytes", "total_bytes"}
     "compression": {"original_bytes", "wire_bytes", "ratio", "compressed_batches"}    None: it is off
     "counters":   {"primary": {…}, "secondary": {…}}
     "volumes":    [{"name", "size", "primary_uri", "secondary_uri"}]
     "supervisor": {"pid": number or None}}

``error`` of a side is described in ``common.failures``.
"""

from __future__ import annotations

from typing import Any

from common.settings import NodeSettings


def merge(
    primary: dict[str, Any], secondary: dict[str, Any], supervisor: dict[str, Any], settings: NodeSettings
) -> dict[str, Any]:
    """The status of the pair out of its sides' own; ``settings`` of either side fill in what nobody alive can tell."""

    lead, follow = _by_authority(primary, secondary)

    def known(key: str) -> Any:
        values = (side.get(key) for side in _by_authority(primary, secondary))
        return next((value for value in values if value is not None), None)

    return {
        "state": merged_state(primary, secondary),
        "mode": known("mode") or settings.mode,
        "checkpoint": known("checkpoint"),
        "generation": known("generation"),
        "primary": primary,
        "secondary": secondary,
        "lag": lead.get("lag") or {"bytes": None, "seconds": None},
        "buffer": follow.get("buffer")
        or lead.get("buffer")
        or dict.fromkeys(("bytes", "percent", "capacity_bytes", "active_bytes", "hidden_bytes")),
        "resync": lead.get("resync") or {"active": False, "done_bytes": 0, "total_bytes": 0, "rate": 0},
        "verify": lead.get("verify") or {"active": False},
        "commit": lead.get("commit") or follow.get("commit") or {"active": False, "done_bytes": 0, "total_bytes": 0},
        "compression": lead.get("compression"),
        "counters": {"primary": primary.get("counters") or {}, "secondary": secondary.get("counters") or {}},
        "volumes": _volumes(primary, secondary, settings),
        "supervisor": {"pid": supervisor.get("pid")},
    }


def _by_authority(primary: dict[str, Any], secondary: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides, the one whose word counts first: after a failover that is the promoted one."""
    return (secondary, primary) if secondary.get("role") == "primary" else (primary, secondary)


def merged_state(primary: dict[str, Any], secondary: dict[str, Any]) -> str:
    """The leading side's own word, or "primary_lost", "secondary_lost", "stopped" when processes are dead."""
    lead, follow = _by_authority(primary, secondary)
    alive = [side.get("pid") is not None for side in (lead, follow)]
    elsewhere = [side.get("state") == "elsewhere" for side in (lead, follow)]
    if alive[0] and lead is secondary:
        return str(lead["state"]).lower()
    if not any(alive):
        return "stopped"
    if not alive[0] and not elsewhere[0]:
        return "primary_lost"
    if not alive[1] and not elsewhere[1]:
        return "secondary_lost"
    return str(follow["state"] if elsewhere[0] else lead["state"]).lower()


def _volumes(primary: dict[str, Any], secondary: dict[str, Any], settings: NodeSettings) -> list[dict[str, Any]]:
    told = {
        side: {v["name"]: v for v in status.get("volumes") or ()} for side, status in (("p", primary), ("s", secondary))
    }
    volumes: list[dict[str, Any]] = []
    for volume in settings.volumes:
        here, there = told["p"].get(volume.name, {}), told["s"].get(volume.name, {})
        volumes.append(
            {
                "name": volume.name,
                "size": here.get("size") or there.get("size"),
                "primary_uri": here.get("nbd_uri"),
                "secondary_uri": there.get("nbd_uri"),
            }
        )
    return volumes
