"""An engine that is stopped in the middle of what it does now and then."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from common import config
from common.disk import DelayDisk, FileDisk
from common.port import zmq_context
from common.process import Lifecycle
from common.record import Record, initial_metadata
from primary.engine import Engine
from tests.pairs import MIB


class Silent:
    """An export without clients."""

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def test_a_stop_comes_while_the_write_intent_bitmap_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk was being flushed for it. What was to follow found its thread gone, and the process, which had stopped
    in good order, ended in a traceback."""
    monkeypatch.setattr("primary.knowledge.FORGET_INTERVAL_S", 0.0)
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    settings = config.make_settings(
        {
            "pair_id": "p", "side": "a", "directory": str(tmp_path), "volumes": [{"name": "v", "disk": str(path)}],
            "replication": {"connect": f"ipc://{tmp_path}/nobody"},
        },
        base=tmp_path,
    )  # fmt: skip
    flushing, gate = threading.Event(), threading.Event()

    class Slow(DelayDisk):
        def flush(self) -> None:
            flushing.set()
            super().flush()

    async def stop() -> None:
        lifecycle = Lifecycle("primary")
        record = Record(f"{tmp_path}/metadata", initial_metadata(settings, "primary", [MIB]))
        disk = Slow(FileDisk(str(path)), kinds=frozenset({"flush"}), gate=gate)
        with zmq_context() as context:
            engine = Engine(settings, record, [("v", disk)], context, lifecycle)
            engine.start(Silent())
            engine.state, engine.serving = "protected", True
            await asyncio.get_running_loop().run_in_executor(None, flushing.wait, 10)
            closing = asyncio.create_task(engine.close())
            for _ in range(50):  # as far as it gets
                await asyncio.sleep(0)
            gate.set()
            await closing
            (forgetting,) = (task for task in asyncio.all_tasks() if task.get_name() == "intents")
            await asyncio.wait({forgetting}, timeout=0.05)
            assert not forgetting.done(), "it waits for its turn, which does not come"
        record.close()
        assert lifecycle.failure is None

    asyncio.run(stop())
