"""One open-file-description (OFD) lock at a time: what a request locks with, and the two calls there are.

OFD locks (fcntl_locking(2)) belong to the open file description, not to the process: threads that use one each exclude
each other as processes do, and what a killed process held is free at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import Final

from common.disk import FLOCK

SETLK: Final = fcntl.F_OFD_SETLK
RDLCK: Final = fcntl.F_RDLCK
WRLCK: Final = fcntl.F_WRLCK
UNLOCK_ALL: Final = FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0)


class Description:
    """One open file description.

    What one request at a time locks with. ``fd`` is -1 once a fork made it the parent's.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def unlock(self) -> None:
        """Give back everything locked with it."""
        if self.fd >= 0:
            fcntl.fcntl(self.fd, SETLK, UNLOCK_ALL)

    def close(self) -> None:
        """The same, and it cannot be used any more."""
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):
            os.close(fd)
