"""One address for a pair's clients: connections go to whichever side leads, before and after a failover.

    client ──NBD, reconnecting──▶ tandemdisk redirect ──▶ the primary's export
                                                     └──▶ after the failover: the promoted side's

A client must never be led to the guest's view of a side that was not promoted: what it wrote there would be gone at the
next checkpoint. So *reachable* is no reason to choose a side, only its own word is: the primary's while it is alive and
not fenced, the secondary's once it says that its role is primary. Between the death and the failover nobody is led
anywhere: connections close at once, and a client that retries gets through when somebody leads.

When the leader changes, connections to the former one are broken, because a host that vanished does not close them.
``deploy/examples/haproxy.cfg`` does the same with HAProxy and a health check that asks the same question.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Final, Self

from common.errors import TandemDiskError
from deploy.pair import Pair
from deploy.proxy import Proxy, Target, target_of

LOOK_EVERY_S: Final = 0.2
UNABLE: Final = frozenset({"fenced", "refused", "unresponsive"})
"""States of a primary that must not get clients."""


def leader(status: dict[str, Any]) -> str | None:
    """The URI of the export that clients belong to, by a pair's ``status``; None while there is none."""
    primary, secondary = status["primary"], status["secondary"]
    if secondary.get("role") == "primary":
        uri = secondary.get("nbd_uri")
    elif primary.get("pid") is not None and primary.get("state") not in UNABLE:
        uri = primary.get("nbd_uri")
    else:
        uri = None
    return str(uri) if uri is not None else None


class Redirector:
    """Serves ``listen`` for the clients of ``pair``, as a context."""

    def __init__(self, pair: Pair, listen: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self._pair = pair
        self._proxy = Proxy(self._target, listen)
        self._leads: str | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="redirect", daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        return self._proxy.address

    def uri(self, volume: str = "disk0") -> str:
        """What a client is given."""
        return f"nbd://{self.address[0]}:{self.address[1]}/{volume}"

    def __enter__(self) -> Self:
        self._leads = self._look()
        self._proxy.__enter__()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join()
        self._proxy.__exit__(kind, error, tb)

    def _look(self) -> str | None:
        try:
            return leader(self._pair.status())
        except TandemDiskError:
            return None

    def _target(self) -> Target | None:
        return target_of(self._leads) if self._leads is not None else None

    def _watch(self) -> None:
        while not self._ending.wait(LOOK_EVERY_S):
            now = self._look()
            if now != self._leads:
                self._leads = now
                self._proxy.reset()
