"""What a volume offers to whoever shares it with the backup job: wait, begin, end.

These are the three functions that QEMU's backup job exports (include/block/block_backup.h), as methods of the job and
of every view of its volume. They are thin: ``secondary.requests`` says how they work, the package's docstring how they
are used.
"""

from __future__ import annotations

from secondary.requests import CowRequest, RequestTable


class Serialised:
    """Something with requests in flight. Offsets are bytes, ranges are half open, and rounded out to blocks."""

    requests: RequestTable

    def wait_for_overlapping_requests(self, start: int, end: int) -> None:
        """Return when no request in flight overlaps [start, end). TimedOut names the process that holds one.

        A hint only, between processes: what must hold afterwards is ``cow_request_begin``'s, which waits by itself.
        """
        self.requests.wait_for_overlapping_requests(start, end)

    def cow_request_begin(self, start: int, end: int, *, shared: bool = False) -> CowRequest:
        """Register [start, end) as in flight once nothing overlaps it (``shared`` ones don't exclude each other).

        Use it in a ``with`` block, or end it with ``cow_request_end``. TimedOut names the process in the way.
        """
        return self.requests.cow_request_begin(start, end, shared=shared)

    def cow_request_end(self, request: CowRequest) -> None:
        """The range is free again; harmless if it was ended already."""
        request.end()

    async def wait_for_overlapping_requests_async(self, start: int, end: int) -> None:
        """``wait_for_overlapping_requests`` for an event loop, which goes on meanwhile."""
        await self.requests.wait_for_overlapping_requests_async(start, end)

    async def cow_request_begin_async(self, start: int, end: int, *, shared: bool = False) -> CowRequest:
        """``cow_request_begin`` for an event loop. A task that is cancelled meanwhile leaves nothing in flight."""
        return await self.requests.cow_request_begin_async(start, end, shared=shared)
