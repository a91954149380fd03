"""One of the two simulated machines."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.settings import BufferSettings, ExportSettings, NodeSettings, ReplicationSettings, VolumeSettings
from tests.simulation.disk import Faults, MetadataFile, Platter
from tests.simulation.processes import Running

if TYPE_CHECKING:
    from tests.simulation.world import World

SIDES = ("a", "b")
OTHER = {"a": "b", "b": "a"}
HEARTBEAT_S, PEER_TIMEOUT_S = 0.5, 2.5
RESYNC_RATE = 128 << 10
"""Bytes a second: of these disks a second or two."""


class Host:
    """One machine: disks, metadata, memory (the directory of the disk buffer), processes."""

    def __init__(self, world: World, side: str) -> None:
        options = world.options
        self.side = side
        self.chance = random.Random(world.chance.getrandbits(64))
        self.faults = Faults(killer=world.kill, troubled=side == "a" and "disk_primary" in options.troubles)  # type: ignore[arg-type]
        self.directory = f"{world.directory}/{side}"
        Path(self.directory).mkdir()
        for index in range(len(world.sizes)):
            Path(f"{self.directory}/disk{index}.raw").touch()  # looked at, never read
        self.platters = [
            Platter(f"{self.directory}/disk{index}.raw", room, self.chance, self.faults, size)
            for index, (size, room) in enumerate(zip(world.sizes, world.rooms, strict=True))
        ]
        for index, platter in enumerate(self.platters):
            platter.changed = world.disk_changed
            platter.forgot = functools.partial(world.disk_forgot, side)
            platter.lost = functools.partial(world.disk_lost, side, index)
            platter.between = world.between
            platter.countdown = world.countdown
            platter.device = f"{side} {Path(platter.name).stem}"
        self.metadata = MetadataFile(self.chance, self.faults, countdown=world.countdown, name=f"{side} metadata")
        self.rate = self.offset = 0.0
        self._policies = policies = options.policies
        self._whims = random.Random(str(self.chance.getstate()[1][:8]))
        self.settings = NodeSettings(
            pair_id="simulated",
            side=side,
            directory=self.directory,
            volumes=tuple(VolumeSettings(f"v{index}", platter.name) for index, platter in enumerate(self.platters)),
            export=ExportSettings(unix=f"{self.directory}/nbd.sock"),
            replication=ReplicationSettings(
                listen=f"sim://{side}",
                connect=f"sim://{OTHER[side]}",
                window_bytes=options.window_bytes,
                heartbeat_s=HEARTBEAT_S,
                peer_timeout_s=PEER_TIMEOUT_S,
                compression="zstd" if "compress" in policies else "off",
            ),
            buffer=BufferSettings(
                f"{self.directory}/memory",
                world.buffer_bytes,
                options.block_size,
                spill_bytes=int(options.spill * sum(world.sizes)),
            ),
            mode="sync" if options.sync else "async",
            checkpoint_interval_s=options.interval_s,
            initial_sync="assume" if options.assume else "full",
            on_peer_loss=options.loss,  # type: ignore[arg-type]
            on_congestion="pull-ahead" if "pull_ahead" in policies else "block",
            max_lag_seconds=3.0 if "lag" in policies else 0.0,
            resync_rate=RESYNC_RATE if "ceiling" in policies else 0,
            resync_floor=RESYNC_RATE // 4 if "floor" in policies else 0,
            resync_deadline_s=2.0 if "deadline" in policies else 0.0,
            write_intent="no_intents" not in policies,
        )
        self.processes: dict[str, Running] = {}
        self.off = False

    def edit(self) -> None:
        """Somebody may have changed the configuration while nobody ran."""
        if "changing_intents" in self._policies:
            self.settings = replace(self.settings, write_intent=self._whims.random() < 0.6)

    def process(self, role: str) -> Running | None:
        """The process of that role, if it is alive."""
        found = self.processes.get(role)
        return found if found is not None and found.alive else None
