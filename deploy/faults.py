"""Faults as values: each is made whole, begun, and healed.

    with OneWayCut(hosts, to="b"):
        …                       what is sent to b vanishes
                                healed

    Cut, OneWayCut    packets vanish (nftables drops what arrives): connections stall, nobody is told
    Unplugged         the end of the cable is out: the side itself sees that its link is down
    SlowLink          the cable carries less (tbf)
    Flapping          cut and whole in turn, until it is healed
    HostGone          power failure: every process of a host is killed and its link is down
    Killed, Paused    SIGKILL; SIGSTOP until healed

``begin`` and ``heal`` may be given twice. Faults of the cable need ``deploy.hosts.NetnsHosts``, so root; without it
``deploy.proxy`` cuts, delays and slows one TCP connection's way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Final, Self

from common.errors import OperationFailed
from deploy.hosts import INTERFACE, SIDES, NetnsHosts, Side

_TABLE: Final = "inet tandemdisk_cut"
_RULES: Final = f"""
table {_TABLE} {{
    chain input {{
        type filter hook input priority -300; policy accept;
        iifname "{INTERFACE}" drop
    }}
}}
"""


class Fault(ABC):
    """Something that breaks and can be healed. As a context manager it lasts as long as the context."""

    @abstractmethod
    def begin(self) -> None:
        """Break it."""

    @abstractmethod
    def heal(self) -> None:
        """Make it whole, as far as that is possible."""

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.heal()


def _block(hosts: NetnsHosts, side: Side) -> None:
    hosts.hosts[side].run("nft", "-f", "-", text=_RULES)


def _unblock(hosts: NetnsHosts, side: Side) -> None:
    hosts.hosts[side].run("nft", "delete", "table", *_TABLE.split(), check=False)


class OneWayCut(Fault):
    """What is sent to one side vanishes; what it sends arrives."""

    def __init__(self, hosts: NetnsHosts, to: Side) -> None:
        self.hosts, self.to = hosts, to

    def begin(self) -> None:
        _block(self.hosts, self.to)

    def heal(self) -> None:
        _unblock(self.hosts, self.to)


class Cut(Fault):
    """Nothing arrives at either side."""

    def __init__(self, hosts: NetnsHosts) -> None:
        self.hosts = hosts

    def begin(self) -> None:
        for side in SIDES:
            _block(self.hosts, side)

    def heal(self) -> None:
        for side in SIDES:
            _unblock(self.hosts, side)


class Unplugged(Fault):
    """One end of the cable is out."""

    def __init__(self, hosts: NetnsHosts, side: Side) -> None:
        self.hosts, self.side = hosts, side

    def begin(self) -> None:
        self.hosts.set_plugged(self.side, False)

    def heal(self) -> None:
        self.hosts.set_plugged(self.side, True)


class SlowLink(Fault):
    """The cable carries ``rate`` (such as ``1mbit``) a direction; healed, what it carried before."""

    def __init__(self, hosts: NetnsHosts, rate: str) -> None:
        self.hosts, self.rate = hosts, rate
        self._before: tuple[str | None] | None = None

    def begin(self) -> None:
        self._before = self._before or (self.hosts.current_rate(),)
        self.hosts.set_rate(self.rate)

    def heal(self) -> None:
        if self._before is not None:
            self.hosts.set_rate(*self._before)
            self._before = None


class Flapping(Fault):
    """Cut for ``down_s``, whole for ``up_s``, again and again. ``flaps`` counts the cuts that were healed."""

    def __init__(self, hosts: NetnsHosts, down_s: float, up_s: float) -> None:
        self.flaps = 0
        self._cut = Cut(hosts)
        self._down_s, self._up_s = down_s, up_s
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: OperationFailed | None = None

    def begin(self) -> None:
        if self._thread is None:
            self._ending.clear()
            self._thread = threading.Thread(target=self._flap, name="flapping")
            self._thread.start()

    def _flap(self) -> None:
        try:
            while not self._ending.is_set():
                with self._cut:
                    self._ending.wait(self._down_s)
                self.flaps += 1
                self._ending.wait(self._up_s)
        except OperationFailed as error:
            self._error = error

    def heal(self) -> None:
        if self._thread is not None:
            self._ending.set()
            self._thread.join()
            self._thread = None
        self._cut.heal()
        if self._error is not None:
            raise self._error


class HostGone(Fault):
    """A host loses its power. Healing gives it its link back; whoever wants its processes has to start them again."""

    def __init__(self, hosts: NetnsHosts, side: Side) -> None:
        self.hosts, self.side = hosts, side

    def begin(self) -> None:
        # The cable first: a host that dies does not get to say goodbye (the kernel would close its connections).
        self.hosts.set_plugged(self.side, False)
        self.hosts.hosts[self.side].kill_processes()

    def heal(self) -> None:
        self.hosts.set_plugged(self.side, True)


class Killed(Fault):
    """SIGKILL. There is nothing to heal: start it again."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def begin(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def heal(self) -> None:
        return None


class Paused(Fault):
    """SIGSTOP, and SIGCONT to heal it: a process that hangs, a machine that swaps, a virtual machine that migrates."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def begin(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def heal(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
