"""A virtual machine that boots from a pair and works on while its primary's host dies: QEMU by TCG, no kernel.

    python -m deploy.examples.guest_failover --machine        (root)

Its operating system is the 119 bytes below, in the first sector of the replicated disk. SeaBIOS loads them by
virtio-blk; they write sector after sector through the BIOS, read each back, compare, and say ``.`` on the serial port,
or ``E`` and stop. So every dot is a write of which the guest was told that it is done: after the failover every such
sector must hold its number.

While nobody leads, QEMU holds the machine's request and reconnects (``reconnect-delay``); the guest sees a slow disk.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from common.errors import ConfigError, OperationFailed
from common.nbd_client import NbdClient
from deploy.bench.servers import die_with_parent

QEMU: Final = "qemu-system-x86_64"
SECTOR: Final = 512
RECONNECT_S: Final = 60

_CODE: Final = bytes.fromhex(
    "31c08ed88ec08ed0bc007c"  # ds = es = ss = 0; sp = 0x7c00, where the BIOS has put this
    "fc66bb01000000"  #         ebx = 1, the sector
    "6689d8bf0080b98000"  #     next: 128 times ebx at 0x8000
    "66f3ab66891e6f7c"  #       rep stosd; ebx into the packet
    "b80043b90080e82000"  #     write 0x8000 (ax = 0x4300)
    "b80042b90082e81700"  #     read into 0x8200 (ax = 0x4200)
    "be0080bf0082b98000"  #     compare both
    "66f3a77517b02ee81a00"  #   repe cmpsd; other contents: bad; else say '.'
    "6643ebc6"  #               inc ebx; next
    "890e6b7cbe677cb280"  #     disk: cx into the packet; si = the packet; dl = the first disk
    "cd137201c3"  #             int 0x13 (its extensions); an error: bad
    "b045e80300f4ebfd"  #       bad: say 'E'; hlt
    "baf803eec3"  #             say: al to the first serial port
    "10000100000000000000000000000000"  # the packet: its size, one sector, address, number of the sector
)
BOOT_SECTOR: Final = _CODE.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def require_qemu() -> None:
    """ConfigError unless QEMU's machine is installed."""
    if shutil.which(QEMU) is None:
        raise ConfigError(f"{QEMU} must be installed.", hint="apt-get install qemu-system-x86")


def install(uri: str) -> None:
    """Put the guest's program on the disk that it boots from."""
    with NbdClient(uri) as client:
        client.write(0, BOOT_SECTOR)
        client.flush()


class Machine:
    """Runs from ``export`` of the NBD server at ``address`` for the time of the context."""

    def __init__(self, address: tuple[str, int], export: str, directory: Path) -> None:
        require_qemu()
        self._console = directory / "console"
        server = f"server.type=inet,server.host={address[0]},server.port={address[1]}"
        self._command = [
            QEMU, "-accel", "tcg", "-m", "16", "-nodefaults", "-no-user-config", "-display", "none",
            "-serial", f"file:{self._console}",
            "-blockdev", f"driver=nbd,node-name=disk,{server},export={export},reconnect-delay={RECONNECT_S}",
            "-device", "virtio-blk-pci,drive=disk,bootindex=0",
        ]  # fmt: skip

    def __enter__(self) -> Self:
        self._console.touch()
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.process.kill()  # power off: what it had been told is written has to be there
        self.process.wait()

    @property
    def written(self) -> int:
        """Sectors that the guest has written and read back. OperationFailed if it saw an error or other contents."""
        said = self._console.read_bytes()
        if said.strip(b"."):
            raise OperationFailed(f"The guest said {said.strip(b'.')[:80]!r} after {len(said)} sectors.")
        return len(said)

    def check(self, uri: str) -> int:
        """Compare every sector that it wrote; their number. OperationFailed names the first that differs."""
        count = self.written
        with NbdClient(uri) as client:
            for sector in range(1, count + 1):
                if client.read(sector * SECTOR, SECTOR) != sector.to_bytes(4, "little") * (SECTOR // 4):
                    raise OperationFailed(f"Sector {sector} is not what the guest wrote.")
        return count
