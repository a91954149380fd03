"""The export process as the secondary process sees it: started again, however it ends, and told to whoever has to
know."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
from typing import Any, cast

import pytest

from common.child import Child
from common.errors import TandemDiskError, TimedOut
from common.settings import NodeSettings
from secondary.exporter import Exporter


class FakeChild:
    """A process that ends, or becomes ready, when the test says so."""

    def __init__(self, *, ready: bool) -> None:
        self.ready = ready
        self.ended = asyncio.Event()
        self.stops = 0

    async def wait_ready_async(self) -> dict[str, Any]:
        if not self.ready:
            raise TimedOut("The secondary.guest process was not ready within 60 s.")
        return {"uris": {"disk0": [f"nbd+unix:///{id(self)}"]}}

    async def wait_async(self) -> int:
        await self.ended.wait()
        return -9

    async def stop_async(self) -> int:
        self.stops += 1
        self.ended.set()
        return 0


@pytest.mark.parametrize("trouble", ["no process", "never ready"])
def test_one_that_does_not_start_has_a_successor(monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    """Whoever has to know of it is told of the one that serves, or a promoted side would never lead."""

    async def scenario() -> None:
        first, late, last = FakeChild(ready=True), FakeChild(ready=False), FakeChild(ready=True)
        starts: list[Any] = [first, OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), last]
        if trouble == "never ready":
            starts[1] = late

        def start(_module: str, _settings: NodeSettings) -> Any:
            result = starts.pop(0)
            if isinstance(result, OSError):
                raise result
            return result

        monkeypatch.setattr("secondary.exporter.Child.start", start)
        monkeypatch.setattr("secondary.exporter.PAUSES_S", (0.0,))
        made = Exporter(cast(NodeSettings, None))
        await made.start()
        told = asyncio.Event()
        keeping = asyncio.create_task(made.keep(told.set))
        first.ended.set()
        await asyncio.wait((asyncio.ensure_future(told.wait()), keeping), return_when=asyncio.FIRST_COMPLETED)
        assert not keeping.done() or keeping.exception() is None
        assert made.uri("disk0") == f"nbd+unix:///{id(last)}"
        assert (late.stops, last.stops) == (int(trouble == "never ready"), 0)
        keeping.cancel()
        await asyncio.wait((keeping,))

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_one_that_is_stopped_while_it_starts_is_waited_for_no_longer_than_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The secondary is told to stop right after its export process died. The number of the ready descriptor goes to the
    next one that is opened, which is what tells of the process' end."""

    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    child = Child("guest", subprocess.Popen(["sleep", "60"]), read_fd)
    monkeypatch.setattr("secondary.exporter.Child.start", lambda _module, _settings: child)

    async def scenario() -> None:
        made = Exporter(cast(NodeSettings, None))
        starting = asyncio.create_task(made.start())
        await asyncio.sleep(0)
        starting.cancel()
        try:
            async with asyncio.timeout(5):
                await made.stop()
        finally:
            child.process.kill()
            os.close(write_fd)
        assert child.process.returncode == -signal.SIGTERM
        await asyncio.wait((starting,))
        assert starting.cancelled()

    asyncio.run(scenario())


@pytest.mark.parametrize("line", [b'{"error": "No disk.", "hint": "", "exit_code": 5}\n', b""], ids=["told", "silent"])
def test_the_loop_turns_while_one_that_cannot_start_ends(monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    """A tenth of a second, or for as long as its disk holds it: the primary would take the secondary for dead."""
    monkeypatch.setattr("common.child.STOP_TIMEOUT_S", 2.0)
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.write(write_fd, line)
    os.close(write_fd)
    child = Child("guest", subprocess.Popen(["sleep", "60"]), read_fd)

    async def scenario() -> None:
        asyncio.get_running_loop().call_later(0.01, child.process.terminate)
        with pytest.raises(TandemDiskError, match="No disk." if line else "killed by SIGTERM"):
            await child.wait_ready_async()
        assert child.process.returncode == -signal.SIGTERM

    try:
        asyncio.run(scenario())
    finally:
        child.process.kill()
        child.process.wait()
