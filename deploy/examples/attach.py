"""Read the last checkpoint of a live pair from a process of your own: without NBD, while replication goes on.

    python attach.py DIR [--follow N]          (where tandemdisk is installed)

Prints the checkpoint and a digest of each volume as of it. With ``--follow`` it goes on until it has seen N more
checkpoints, and says for each in how many MiB of each volume it differs from the one before.

It shows two of the forms in which ``secondary`` serialises a reader against the backup job: a request in a ``with``
block, and one on an event loop. (The third is ``volume.read``, which does it all in one call.)
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys

from common.errors import TandemDiskError
from secondary import PairView, VolumeView
from secondary.attach import attach

MIB = 1 << 20


def both_ends(volume: VolumeView) -> tuple[bytes, bytes]:
    """A request of our own: both reads are of the same checkpoint, whatever is written between them."""
    some = min(8, volume.size)
    with volume.cow_request_begin(0, volume.size, shared=True) as request:
        return volume.read_inside(request, 0, some), volume.read_inside(request, volume.size - some, some)


async def digests(volume: VolumeView) -> list[bytes]:
    """A digest of each MiB; the loop is free while a request has to wait, and while the disk is read."""
    found = []
    for offset in range(0, volume.size, MIB):
        end = min(offset + MIB, volume.size)
        with await volume.cow_request_begin_async(offset, end, shared=True) as request:
            contents = await asyncio.to_thread(volume.read_inside, request, offset, end - offset)
        found.append(hashlib.sha256(contents).digest())
    return found


async def of_one_checkpoint(pair: PairView) -> tuple[int, dict[str, list[bytes]]]:
    """The digests of all volumes as of one checkpoint: again if another one came while they were made."""
    while True:
        epoch, number = pair.header.epoch, pair.checkpoint.number
        found = {name: await digests(volume) for name, volume in pair.volumes.items()}
        if pair.header.epoch == epoch:
            return number, found


async def another_checkpoint(pair: PairView, number: int) -> None:
    """It is a store in shared memory, which wakes nobody: look now and then."""
    while pair.checkpoint.number == number:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def follow(pair: PairView, count: int) -> None:
    number, before = await of_one_checkpoint(pair)
    print(f"checkpoint {number}", flush=True)
    for name, volume in pair.volumes.items():
        first, last = both_ends(volume)
        digest = hashlib.sha256(b"".join(before[name])).hexdigest()
        print(f"  {name}  {digest[:16]}  {first.hex()} … {last.hex()}", flush=True)
    for _ in range(count):
        await another_checkpoint(pair, number)
        number, now = await of_one_checkpoint(pair)
        changed = {
            name: sum(old != new for old, new in zip(before[name], now[name], strict=True)) for name in pair.volumes
        }
        print(f"checkpoint {number}  " + ", ".join(f"{name}: {mib} MiB" for name, mib in changed.items()), flush=True)
        before = now


def main() -> int:
    parser = argparse.ArgumentParser(description="Read the last checkpoint of a live pair")
    parser.add_argument("directory", help="the --dir of `tandemdisk up`, or the secondary's own directory")
    parser.add_argument("--follow", type=int, default=0, metavar="N", help="wait for N more checkpoints")
    options = parser.parse_args()
    try:
        with attach(options.directory) as pair:
            asyncio.run(follow(pair, options.follow))
    except TandemDiskError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"There is no checkpoint to read: {error.strerror}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
