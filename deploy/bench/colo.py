"""QEMU's COLO block replication without guests: two `qemu-system-x86_64` that have nothing but disks and a QMP socket.

What COLO sets up around a guest, set up by hand (QEMU's docs/block-replication.txt names the same steps):

    fio ──NBD, Unix socket──▶ top (quorum) ┬▶ primary disk
        primary's QEMU                     └▶ replication mode=primary ──NBD, TCP or Unix──▶ colo1 = secondary disk
        secondary's QEMU         childs1 (replication mode=secondary: active.qcow2 → hidden.qcow2 → colo1)

The secondary's QEMU has one NBD server: the primary's stream (`colo1`) and the guest's view (`childs1`) share it.
A checkpoint is `xen-colo-do-checkpoint` on the secondary, which empties active.qcow2 and hidden.qcow2. A failover is
`xen-set-replication` with `failover`; QEMU then commits the guest's view into the secondary disk in the background.
"""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from common.errors import OperationFailed, TimedOut
from deploy.bench import servers
from deploy.bench.peers import Failover, Peer

Between = Literal["tcp", "unix"]
QEMU: Final = "qemu-system-x86_64"
COMMAND_TIMEOUT_S: Final = 60.0
COMMIT_TIMEOUT_S: Final = 60.0


class Qmp:
    """A client of QEMU's machine protocol over a Unix socket: one JSON object a line, one command at a time.

    Making one raises FileNotFoundError or ConnectionRefusedError while QEMU does not listen yet.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(COMMAND_TIMEOUT_S)
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")
        self._line()
        self.run("qmp_capabilities")

    def _line(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except TimeoutError:
            raise TimedOut(f"QEMU did not answer within {COMMAND_TIMEOUT_S:g} s.") from None
        if not line:
            raise OperationFailed("QEMU closed its QMP socket.")
        message: dict[str, Any] = json.loads(line)
        return message

    def run(self, command: str, **arguments: Any) -> Any:
        """What ``command`` returns; underscores in argument names stand for dashes. OperationFailed if QEMU refuses."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        while True:
            message = self._line()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise OperationFailed(f"QEMU refused {command}: {message['error'].get('desc')}")

    def monitor(self, line: str) -> None:
        """A command of the human monitor, for what QMP lacks; OperationFailed with whatever it prints but 'OK'."""
        said = str(self.run("human-monitor-command", command_line=line)).strip()
        if said not in ("", "OK"):
            raise OperationFailed(f"QEMU refused {line!r}: {said}")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class QemuColo(Peer):
    """Both QEMUs, their disks prefilled and alike, replication running."""

    replicated = True

    def __init__(self, between: Between) -> None:
        over = "TCP" if between == "tcp" else "a Unix socket"
        super().__init__(f"qemu-colo-{between}", f"QEMU COLO, {over} between")
        self._between = between
        self._qmp: dict[str, Qmp] = {}

    @staticmethod
    def footprint(size: int) -> int:
        return 4 * size

    def start(self, directory: Path, size: int) -> None:
        super().start(directory, size)
        primary_disk, secondary_disk = self.disks(2)
        for name in ("active", "hidden"):
            image = directory / f"{name}.qcow2"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(size)], check=True, timeout=60)
        self._start_secondary(secondary_disk)
        self._start_primary(primary_disk)
        if self._between == "tcp":
            self.guest_uri = f"nbd://127.0.0.1:{self._port}/childs1"
        else:
            self.guest_uri = f"nbd+unix:///childs1?socket={directory}/between.sock"
        self.uri = f"nbd+unix:///top?socket={directory}/nbd.sock"

    def _qemu(self, name: str, *drives: str) -> Qmp:
        path = self.directory / f"{name}.qmp"
        bare = [QEMU, "-M", "none", "-nodefaults", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off"]
        command = [*bare, *(word for drive in drives for word in ("-drive", drive))]
        self.servers.start(name, command, ready=lambda: self._connect(name, path))
        return self._qmp[name]

    def _connect(self, name: str, path: Path) -> bool:
        """Whether QEMU listens; its monitor takes one client, so the first connection is the one that is kept."""
        try:
            self._qmp[name] = Qmp(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def _start_secondary(self, disk: Path) -> None:
        qmp = self._qemu(
            "secondary",
            f"if=none,driver=raw,file.filename={disk},id=colo1",
            "if=none,id=childs1,driver=replication,mode=secondary,top-id=childs1,"
            f"file.driver=qcow2,file.file.filename={self.directory}/active.qcow2,"
            f"file.backing.driver=qcow2,file.backing.file.filename={self.directory}/hidden.qcow2,"
            "file.backing.backing=colo1",
        )
        if self._between == "tcp":
            self._port = free_port()
            address = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(self._port)}}
        else:
            address = {"type": "unix", "data": {"path": f"{self.directory}/between.sock"}}
        qmp.run("nbd-server-start", addr=address)
        qmp.run("nbd-server-add", device="colo1", writable=True)
        qmp.run("nbd-server-add", device="childs1", writable=True)
        qmp.run("xen-set-replication", enable=True, primary=False)

    def _start_primary(self, disk: Path) -> None:
        qmp = self._qemu(
            "primary",
            "if=none,id=top,driver=quorum,read-pattern=fifo,vote-threshold=1,"
            f"children.0.driver=raw,children.0.file.filename={disk}",
        )
        if self._between == "tcp":
            server = f"file.host=127.0.0.1,file.port={self._port}"
        else:
            server = f"file.server.type=unix,file.server.path={self.directory}/between.sock"
        qmp.monitor(
            "drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,"
            f"{server},file.export=colo1,node-name=nbd_client1"
        )
        qmp.run("x-blockdev-change", parent="top", node="nbd_client1")
        qmp.run("xen-set-replication", enable=True, primary=True)
        address = {"type": "unix", "data": {"path": f"{self.directory}/nbd.sock"}}
        qmp.run("nbd-server-start", addr=address)
        qmp.run("nbd-server-add", device="top", writable=True)

    def checkpoint(self) -> None:
        self._qmp["secondary"].run("xen-colo-do-checkpoint")

    def kill_primary(self) -> None:
        self.servers.kill("primary")

    def failover(self, target: Failover) -> None:
        """Only to the checkpoint: QEMU has no other. Its commit starts here; ``wait_committed`` waits for its end."""
        assert target == "checkpoint"
        self._qmp["secondary"].run("xen-set-replication", enable=False, primary=False, failover=True)

    def wait_committed(self) -> None:
        """No query shows the commit, an internal job; but while it runs, hidden.qcow2 is in the guest's chain."""
        qmp = self._qmp["secondary"]

        def committed() -> bool:
            files = [node.get("file", "") for node in qmp.run("query-named-block-nodes", flat=True)]
            return not any(file.endswith("hidden.qcow2") for file in files)

        servers.wait_until(committed, COMMIT_TIMEOUT_S, "QEMU's commit of the buffer")

    def stop(self) -> None:
        for qmp in self._qmp.values():
            qmp.close()
        self._qmp.clear()
        super().stop()
