"""An engine that is stopped in the middle of what it does now and then."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import pytest

from common import config
from common.disk import DelayDisk, DiskLayer, FileDisk
from common.metadata import Metadata, load, save
from common.port import zmq_context
from common.process import Lifecycle
from common.record import Record, initial_metadata
from common.settings import NodeSettings
from primary.engine import Engine
from tests.pairs import MIB


class Silent:
    """An export without clients."""

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def settings_with_disk(tmp_path: Path) -> NodeSettings:
    """Of a side whose secondary is nobody."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    return config.make_settings(
        {
            "pair_id": "p", "side": "a", "directory": str(tmp_path), "volumes": [{"name": "v", "disk": str(path)}],
            "replication": {"connect": f"ipc://{tmp_path}/nobody"},
        },
        base=tmp_path,
    )  # fmt: skip


def test_a_stop_comes_while_the_write_intent_bitmap_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk was being flushed for it. What was to follow found its thread gone, and the process, which had stopped
    in good order, ended in a traceback."""
    monkeypatch.setattr("primary.knowledge.FORGET_INTERVAL_S", 0.0)
    settings = settings_with_disk(tmp_path)
    path = settings.volumes[0].disk
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


def test_a_flush_fails_while_it_is_noted_that_an_operator_saw_to_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss was forgotten with the other one: bits were cleared, and the next start believed the disk."""
    settings = settings_with_disk(tmp_path)
    saving, gate = threading.Event(), threading.Event()

    def slowly(path: str, metadata: Metadata) -> None:
        if not metadata.lost_writes:
            saving.set()
            assert gate.wait(10)
        save(path, metadata)

    async def live() -> None:
        record = Record(f"{tmp_path}/metadata", initial_metadata(settings, "primary", [MIB]))
        disk = FileDisk(settings.volumes[0].disk)
        loop = asyncio.get_running_loop()
        with zmq_context() as context:
            engine = Engine(settings, record, [("v", disk)], context, Lifecycle("primary"))
            engine.disk_failed("flush", OSError(5, "the first one"))
            monkeypatch.setattr("common.record.save", slowly)
            clearing = loop.create_task(engine.clear_error())
            await loop.run_in_executor(None, saving.wait, 10)
            engine.disk_failed("flush", OSError(5, "the second one"))
            gate.set()
            await clearing
            assert engine.knowledge.lost_writes
            assert engine.failures.error is not None
            assert "second" in engine.failures.error["sentence"]
            engine.discard()
        disk.close()
        record.close()

    asyncio.run(live())
    noted = load(f"{tmp_path}/metadata")
    assert noted is not None
    assert noted.lost_writes


def test_a_flush_fails_while_the_process_stops(tmp_path: Path) -> None:
    """A client asked for it, and the stop waited for no longer. The next start believed the disk."""
    settings = settings_with_disk(tmp_path)
    flushing, gate = threading.Event(), threading.Event()

    class Failing(DiskLayer):
        def flush(self) -> None:
            flushing.set()
            assert gate.wait(10)
            raise OSError(errno.EIO, "lost")

    async def stop() -> None:
        record = Record(f"{tmp_path}/metadata", initial_metadata(settings, "primary", [MIB]))
        record.update()
        disk = Failing(FileDisk(str(settings.volumes[0].disk)))
        with zmq_context() as context:
            engine = Engine(settings, record, [("v", disk)], context, Lifecycle("primary"))
            engine.start(Silent())
            engine.serving = True
            engine.mirror.flush(answers.append)
            await asyncio.to_thread(flushing.wait, 10)
            later = threading.Timer(0.05, gate.set)
            later.start()
            await engine.close()
            record.close()
            later.join()

    answers: list[int] = []
    asyncio.run(stop())
    stored = load(f"{tmp_path}/metadata")
    assert stored is not None
    assert stored.lost_writes
    assert answers == [errno.EIO]
