"""The secondary side of a pair: backup job, disk buffer, guest's view, failover.

The interface for programs of your own is ``secondary.attach``: a read-only view of the last checkpoint of a live pair,
from any process that may open its directory, serialised against the backup job by

    wait_for_overlapping_requests(start, end)        cow_request_begin(start, end) -> CowRequest
    cow_request_end(request)

(``secondary.requests``; awaitable forms end in ``_async``). The backup job itself is ``secondary.backup``: ``do_cow``,
``do_checkpoint``, ``read_no_serialising``.
"""
