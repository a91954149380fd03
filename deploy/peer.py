"""What a command does where only one side of the pair is configured, because the other is on another machine.

What the other side remembers is asked of its process (``common.inquiry``). Nothing is started or stopped there, save
that a side which follows takes over at the end of a switchover. And here a side may be run by a user of its own, as
systemd does it: what root's command writes into its directory has to stay that user's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Final

from common.errors import OperationFailed, PeerRefused, TandemDiskError
from common.generation import History, Standing
from common.inquiry import ask
from common.metadata import Metadata
from common.settings import NodeSettings, Role
from deploy.layout import PairDirectory
from deploy.pairfile import ETC
from deploy.presence import at_rest
from deploy.roles import give_up

TAKE_OVER_TIMEOUT_S: Final = 60.0


def other(role: Role) -> Role:
    """What the peer of a side that is configured as ``role`` is configured as."""
    return "secondary" if role == "primary" else "primary"


def told_by_peer(sides: Mapping[Role, NodeSettings]) -> dict[Role, Standing]:
    """Where the side stands that is not configured here, by its own word; empty if both are. NotRunning if it does not
    answer."""
    if len(sides) != 1:
        return {}
    ((role, settings),) = sides.items()
    return {other(role): ask(settings)}


def check_switchover(directory: PairDirectory, role: Role, settings: NodeSettings) -> None:
    """Before anything is stopped: that the side on the other machine can be told to take over from this one, which is
    configured as ``role``. OperationFailed that names the steps if not."""
    if settings.replication.secret_key is None:
        raise OperationFailed(
            "Without keys the other side cannot be told from here to take over: whoever reaches its port could.",
            hint="In steps, nothing is lost either: here `tandemdisk down`, there `tandemdisk failover`, then here "
            f"`tandemdisk rejoin` and `{start_command(directory, role)}`. (`tandemdisk keygen` makes keys.)",
        )
    standing = ask(settings)
    if standing.role != "secondary":
        raise PeerRefused(f"Side {standing.side} does not follow: it calls itself primary.")


def let_peer_lead(settings: NodeSettings, ended: Metadata) -> Standing:
    """The side on the other machine takes over from this one, which ``ended`` in good order; where it stands then.
    PeerRefused if it will not: then nobody leads. NotRunning if it does not say: then it may."""
    standing = ask(settings, ended.history, TAKE_OVER_TIMEOUT_S)
    if standing.role != "primary" or ended.history[-1] not in standing.history:
        raise PeerRefused(f"Side {standing.side} did not take over.")
    return standing


def follow(settings: NodeSettings, winner: History) -> None:
    """The second half of a switchover here: the side that ended in good order is secondary from now on. DiskError if
    somebody has started it meanwhile."""
    try:
        with as_owner(settings), at_rest(settings):
            give_up(settings, winner, in_line=True)
    except TandemDiskError as error:
        error.hint = f"The other side leads now. Stop side {settings.side}; `tandemdisk rejoin` lets it follow."
        raise


def start_command(directory: PairDirectory, role: Role) -> str:
    """What starts the side that is configured as ``role`` while no supervisor does."""
    if is_run_by_systemd(directory):
        return f"systemctl start tandemdisk-{role}@{directory.path.name}"
    if directory.supervisor_lock.exists():  # one has looked after it before
        return f"tandemdisk up --dir {directory.path}"
    return f"tandemdisk {role} --config {directory.config(role)}"


def is_run_by_systemd(directory: PairDirectory) -> bool:
    """The files of ``tandemdisk deploy render`` are in it."""
    return directory.path.parent == ETC


@contextlib.contextmanager
def as_owner(settings: NodeSettings) -> Iterator[None]:
    """What root does in the context, the user does to whom the side's directory belongs."""
    owner = os.stat(settings.directory)
    if os.geteuid() != 0 or owner.st_uid == 0:
        yield
        return
    before = os.getgroups()
    groups = {owner.st_gid, *(os.stat(volume.disk).st_gid for volume in settings.volumes)}  # SupplementaryGroups=disk
    try:
        os.setgroups(sorted(groups))
        os.setegid(owner.st_gid)
        os.seteuid(owner.st_uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)
