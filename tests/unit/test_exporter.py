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
from common.errors import TimedOut
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
