"""The secondary side of a pair: backup job, disk buffer, guest's view, failover.

The interface for programs of your own
--------------------------------------
QEMU's commit that exported the backup job's serialisation explains it by a driver that reads while the job runs:
wait for overlapping requests, begin one, read, end it. The same here, in any process that may open the pair's
directory, while replication goes on:

    from secondary.attach import attach

    def readv(volume, offset, length):
        start, end = offset, offset + length
        volume.wait_for_overlapping_requests(start, end)
        request = volume.cow_request_begin(start, end, shared=True)
        data = volume.read_inside(request, offset, length)
        volume.cow_request_end(request)
        return data

    with attach("/srv/pair") as pair:
        print(pair.checkpoint.number, readv(pair.volumes["disk0"], 0, 4096))

For everyday use a request is a context manager, and on an event loop it is awaited (nothing blocks meanwhile):

    with volume.cow_request_begin(start, end, shared=True) as request: ...
    with await volume.cow_request_begin_async(start, end, shared=True) as request: ...

``begin`` waits by itself, atomically; between processes the separate wait of QEMU's example would leave a gap. Inside
one request every read is of the same checkpoint: a checkpoint waits until the request ends. So keep it short; who holds
one for longer than the pair's ``request_timeout_s`` makes a checkpoint fail, which then names that process. Readers
share (``shared=True``); an exclusive request keeps the backup job out, too. ``volume.read(offset, length)`` is all of
it in one call, and ``pair.snapshot`` a whole image of one checkpoint.

The other side of it is the backup job, which one process runs (``secondary.backup``):

    job.do_cow(offsets, lengths)             old contents of all these ranges go to the hidden disk, if they are new
    job.read_no_serialising(offset, view)    the secondary disk as it is: for whoever holds a request already
    pair.do_checkpoint(number, sequence)     an empty buffer, for all volumes at once, by one store

``deploy/examples/attach.py`` is a program that uses this.
"""

from secondary.attach import PairView
from secondary.backup import BackupJob, PairBackup
from secondary.interface import Serialised
from secondary.requests import CowRequest, RequestTable
from secondary.view import VolumeView

__all__ = ["BackupJob", "CowRequest", "PairBackup", "PairView", "RequestTable", "Serialised", "VolumeView"]
