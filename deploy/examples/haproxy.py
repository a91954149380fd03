"""HAProxy in front of a pair on this machine, by the configuration that lies beside this file.

    with Haproxy(pair, directory) as way:         clients go to way.uri()

Of ``haproxy.cfg`` only the addresses are others: the sides' exports are Unix sockets here, and the agents that say who
leads (``leads.sh``, which systemd's socket activation runs on a host of its own) are served by this process.
`python -m deploy.examples.guest_failover --haproxy` puts a guest behind it.
"""

from __future__ import annotations

import re
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from common.errors import ConfigError, OperationFailed, TimedOut
from deploy.bench.servers import die_with_parent
from deploy.layout import SIDES
from deploy.pair import Pair

AGENT_TIMEOUT_S: Final = 5.0
START_TIMEOUT_S: Final = 20.0
GREETING: Final = b"NBDMAGIC"


def wait_for(condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes]) -> None:
    """Until ``condition`` holds. OperationFailed if ``process`` ends before, TimedOut after ``START_TIMEOUT_S``."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        if process.poll() is not None:
            raise OperationFailed(f"{process.args!r} ended with {process.returncode} before {what}.")
        if time.monotonic() > deadline:
            raise TimedOut(f"There was no {what} within {START_TIMEOUT_S:g} s.")
        time.sleep(0.02)


def require_haproxy() -> None:
    """ConfigError unless HAProxy is installed."""
    if shutil.which("haproxy") is None:
        raise ConfigError("haproxy must be installed.", hint="apt-get install haproxy")


class _Agents(socketserver.ThreadingTCPServer):
    """What systemd does with ``tandemdisk-leads.socket``: the script's output answers each connection."""

    daemon_threads = True

    def __init__(self, directory: str) -> None:
        self.command = ["sh", str(files("deploy.examples").joinpath("leads.sh")), directory]
        super().__init__(("127.0.0.1", 0), _Agent)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def server_close(self) -> None:
        self.shutdown()
        self._thread.join()
        super().server_close()


class _Agent(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Agents)
        subprocess.run(
            self.server.command, stdin=subprocess.DEVNULL, stdout=self.request.fileno(), stderr=subprocess.DEVNULL,
            timeout=AGENT_TIMEOUT_S, check=False, preexec_fn=die_with_parent,
        )  # fmt: skip


class Haproxy:
    """See the module. ``directory`` takes the configuration."""

    def __init__(self, pair: Pair, directory: Path) -> None:
        require_haproxy()
        self._pair = pair
        self._path = directory / "haproxy.cfg"
        self._stack = ExitStack()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address: tuple[str, int] = ("127.0.0.1", free.getsockname()[1])

    def uri(self, volume: str = "disk0") -> str:
        """What a client is given."""
        return f"nbd://{self.address[0]}:{self.address[1]}/{volume}"

    def __enter__(self) -> Self:
        try:
            self._path.write_text(self._configuration(), encoding="utf-8")
            command = ["haproxy", "-db", "-f", str(self._path)]
            checked = subprocess.run([*command, "-c"], capture_output=True, text=True, timeout=20, check=False)
            if checked.returncode != 0:
                raise OperationFailed(f"HAProxy does not take {self._path}: {checked.stderr.strip()[-500:]}")
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent
            )
            self._stack.callback(process.wait)
            self._stack.callback(process.terminate)
            wait_for(self._leads, "a server behind HAProxy", process)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _leads(self) -> bool:
        """True if an NBD server greets whoever comes."""
        try:
            with socket.create_connection(self.address, AGENT_TIMEOUT_S) as client:
                client.settimeout(AGENT_TIMEOUT_S)
                return client.recv(len(GREETING)) == GREETING
        except OSError:
            return False

    def _configuration(self) -> str:
        """The file beside this one, with our addresses."""
        text = files("deploy.examples").joinpath("haproxy.cfg").read_text(encoding="utf-8")
        text = re.sub(r"^    bind .*$", f"    bind {self.address[0]}:{self.address[1]}", text, flags=re.M)
        for name, role in zip(("east", "west"), SIDES, strict=True):
            settings = self._pair.settings(role)
            agents = _Agents(settings.directory)
            self._stack.callback(agents.server_close)
            agent = f"agent-addr 127.0.0.1 agent-port {agents.server_address[1]}"
            text = re.sub(
                rf"^    server {name} .*$",
                f"    server {name} unix@{settings.export.unix} check disabled {agent}",
                text,
                flags=re.M,
            )
        return text
