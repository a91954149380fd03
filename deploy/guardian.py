"""The process that removes namespaces when their maker did not: `python -m deploy.guardian TAG LEASE`.

Standard input is a pipe of which only the maker has the other end. However the maker ends, by returning, by SIGTERM, by
SIGKILL, the pipe ends with it. LEASE is the descriptor of the maker's lock on the record, which both share: until the
guardian has ended as well, nobody takes the hosts for free. A maker that removed them itself, or made them to stay, has
said so in the record, and there is nothing to do.

It does not end by the signals of a terminal or of a tidy shutdown: it ends with its maker, within moments.
"""

from __future__ import annotations

import os
import signal
import sys

from deploy.hosts import NetnsHosts


def main() -> None:
    """The process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    tag, lease = sys.argv[1:]
    os.read(sys.stdin.fileno(), 1)  # nobody writes: this returns when the maker has ended
    NetnsHosts(tag).down_if_left(int(lease))


if __name__ == "__main__":
    main()
