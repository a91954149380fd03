"""Every error this project raises on purpose, as one tree.

    TandemDiskError                 exit code   what a script would do about it
    ├── OperationFailed                 1       read the sentence
    ├── ConfigError                     2       correct the file or the option
    ├── DiskError                       3       look at the disk (missing, busy, read-only, other size, I/O error)
    ├── NoSpaceError                    4       free memory in the buffer's directory, or ask for a smaller buffer
    ├── PeerRefused                     5       the two sides do not belong together (pair, version, keys, generation)
    ├── NeedsForce                      6       safe only if the operator says so
    ├── NotRunning                      7       start it first
    ├── AddressInUse                    8       another process has the address
    ├── TimedOut                        9       somebody did not answer in time
    └── ProtocolError                  10       a peer or client sent bytes that the protocol forbids
        ├── NbdError
        └── WireError

An exception keeps its fields and composes one sentence out of them; ``hint`` says what to do next.  Errors that an
NBD client must see travel as plain ``OSError`` with the errno that fits: the export turns them into NBD error values.
"""

from __future__ import annotations


class TandemDiskError(Exception):
    """Base of all. ``str(error)`` is the sentence, ``error.hint`` what to do, ``error.exit_code`` the process' exit
    code."""

    exit_code = 1

    def __init__(self, sentence: str, *, hint: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.sentence} {self.hint}" if self.hint else self.sentence


class OperationFailed(TandemDiskError):
    """The operation was possible in principle and failed."""

    exit_code = 1


class ConfigError(TandemDiskError):
    """Bad usage or a bad configuration; ``problems`` names every one of them."""

    exit_code = 2

    def __init__(self, sentence: str, *, problems: tuple[str, ...] = (), hint: str = "") -> None:
        super().__init__("\n  ".join((sentence, *problems)), hint=hint)
        self.problems = problems


class DiskError(TandemDiskError):
    """A disk cannot be used: missing, busy, read-only, of another size, or it gave an I/O error."""

    exit_code = 3


class NoSpaceError(TandemDiskError):
    """The disk buffer cannot be allocated, or is full."""

    exit_code = 4


class PeerRefused(TandemDiskError):
    """The two sides do not belong together, or one of them said no."""

    exit_code = 5


class NeedsForce(TandemDiskError):
    """Refused because it could lose data; the operator may insist."""

    exit_code = 6


class NotRunning(TandemDiskError):
    """There is no process to talk to."""

    exit_code = 7


class AddressInUse(TandemDiskError):
    """A socket address is taken by another process."""

    exit_code = 8


class TimedOut(TandemDiskError):
    """Somebody did not answer, or did not let go of something, in time."""

    exit_code = 9


class ProtocolError(TandemDiskError):
    """The other end of a connection sent bytes that its protocol forbids; that connection ends, nothing else
    changes."""

    exit_code = 10


class NbdError(ProtocolError):
    """An NBD client or server broke doc/proto.md."""


class WireError(ProtocolError):
    """A message of the replication stream cannot be what the peer meant to send."""


BY_EXIT_CODE: dict[int, type[TandemDiskError]] = {
    cls.exit_code: cls
    for cls in (
        OperationFailed, ConfigError, DiskError, NoSpaceError, PeerRefused,
        NeedsForce, NotRunning, AddressInUse, TimedOut, ProtocolError,
    )
}
