"""The export process of the secondary: the guest's view over NBD, from the shared memory of the disk buffer.

    python -m secondary.guest --settings-fd N …      (started by the secondary process, never by hand)

It owns nothing: it maps what the secondary process made, opens the secondary disks beside it, and serialises each of its
operations against the backup job through CowRequests. So it can be killed at any instant, and a failover changes nothing
for its clients but the stage that the next operation finds.
"""

from __future__ import annotations

import os
from typing import Any

from common.control import ControlServer
from common.disk import FileDisk
from common.export import NbdServer
from common.process import Lifecycle, run
from common.settings import NodeSettings
from secondary.buffer import DiskBuffer
from secondary.replica import GuestVolume


async def main(settings: NodeSettings, lifecycle: Lifecycle) -> None:
    """Serve until told to stop."""
    buffer = DiskBuffer.attach(
        settings.buffer.directory, pair_id=settings.pair_id, timeout_s=settings.request_timeout_s
    )
    disks = [FileDisk(volume.disk, exclusive=False) for volume in settings.volumes]
    volumes = [GuestVolume(layers, disk) for layers, disk in zip(buffer.volumes, disks, strict=True)]
    server = NbdServer(volumes, default=settings.volumes[0].name)

    async def status(_args: dict[str, Any]) -> dict[str, Any]:
        statistics = server.statistics()
        return {
            "role": "export",
            "pid": os.getpid(),
            "stage": buffer.header.stage.name,
            "volumes": [{"name": volume.name, "size": volume.size, "uris": server.uris(volume.name)} for volume in volumes],
            "counters": {name: getattr(statistics, name) for name in type(statistics).__slots__},
        }

    async def stop(_args: dict[str, Any]) -> dict[str, Any]:
        lifecycle.stop.set()
        return {}

    control = ControlServer(settings.control_path("export"), {"status": status, "stop": stop})
    await control.start()
    try:
        await server.listen(settings.export)
        lifecycle.ready({"pid": os.getpid(), "uris": {volume.name: server.uris(volume.name) for volume in volumes}})
        await lifecycle.stop.wait()
    finally:
        await server.close()
        await control.close()
        for disk in disks:
            disk.close()
        buffer.close()


if __name__ == "__main__":
    run(main, "export")
