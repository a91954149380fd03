"""The server's half of the NBD transmission phase, sans-I/O (doc/proto.md, "Transmission").

``Transmission.parse`` walks over everything complete in a receive buffer in one loop and sorts it:

    writes, zeroes, trims   -> ``operations`` with their ``cookies``: what becomes one ``WriteBatch``
    reads                   -> ``reads``
    refused requests        -> ``refusals``, replies ready to send
    anything else           -> ``command``; parsing stops there, so that the caller can submit what came before it

Plain reads and writes without flags are told by one comparison and cost one ``unpack_from``, one bounds check and one
append; all else goes through ``_uncommon``, where each request is checked against its part of the specification. What
is handed out has passed all checks: offsets are inside the export, flags are allowed, payloads are complete.

A write that will be refused whatever its payload (read-only, out of bounds, too long) is not collected: its payload is
skipped as it arrives. So a buffer never has to hold more than one valid request.

An empty request is outside the spec ("behavior ... is unspecified although the server SHOULD NOT disconnect"): in
bounds it succeeds and does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from common import batch, limits, nbd
from common.batch import Operation

HEADER: Final = nbd.REQUEST.size
REPLY_HEADER: Final = nbd.DATA_CHUNK.size
"""Bytes before the data of a read reply; a simple reply's 16 fit too."""
MAX_DESCRIPTORS: Final = 1 << 15
"""Extents in one block status reply; the spec's bound is 2**20, a client asks on where the reply ends."""

PLAIN_READ: Final = nbd.REQUEST_HEAD | nbd.NBD_CMD_READ
PLAIN_WRITE: Final = nbd.REQUEST_HEAD | nbd.NBD_CMD_WRITE

_ALLOWED_FLAGS: Final = {
    nbd.NBD_CMD_READ: nbd.NBD_CMD_FLAG_FUA,
    nbd.NBD_CMD_WRITE: nbd.NBD_CMD_FLAG_FUA,
    nbd.NBD_CMD_FLUSH: nbd.NBD_CMD_FLAG_FUA,
    nbd.NBD_CMD_TRIM: nbd.NBD_CMD_FLAG_FUA,
    nbd.NBD_CMD_CACHE: nbd.NBD_CMD_FLAG_FUA,
    nbd.NBD_CMD_WRITE_ZEROES: nbd.NBD_CMD_FLAG_FUA | nbd.NBD_CMD_FLAG_NO_HOLE | nbd.NBD_CMD_FLAG_FAST_ZERO,
    nbd.NBD_CMD_BLOCK_STATUS: nbd.NBD_CMD_FLAG_FUA | nbd.NBD_CMD_FLAG_REQ_ONE,
}
""" "Command flags": FUA must be accepted on every command. DF joins READ where structured replies were negotiated."""

_KINDS: Final = {
    nbd.NBD_CMD_WRITE: batch.WRITE,
    nbd.NBD_CMD_TRIM: batch.DISCARD,
    nbd.NBD_CMD_WRITE_ZEROES: batch.ZERO,
}
_BEYOND_END: Final = {nbd.NBD_CMD_WRITE: nbd.NBD_ENOSPC, nbd.NBD_CMD_WRITE_ZEROES: nbd.NBD_ENOSPC}
""" "Error values": ENOSPC for writing beyond the end, EINVAL for everything else."""

Read = tuple[bytes, int, int]
"""(cookie, offset, length)"""
Command = tuple[int, bytes, int, int, int]
"""(type, cookie, offset, length, flags)"""
_NO_COMMAND: Command | None = None


class Transmission:
    """The requests of one connection to an export of ``size`` bytes."""

    __slots__ = (
        "_allocation", "_limit", "_read_mask", "_read_only", "_reply_space", "_size", "_skip", "_skip_refusal",
        "_structured", "breach", "command", "cookies", "fua", "mixed", "needed", "operations", "reads", "refusals",
        "span_end", "span_start",
    )  # fmt: skip

    def __init__(self, size: int, *, read_only: bool, structured: bool, allocation: bool, reply_space: int) -> None:
        self._size = size
        self._limit = 0 if read_only else size
        self._read_only = read_only
        self._structured = structured
        self._allocation = allocation
        ignored = nbd.NBD_CMD_FLAG_FUA | (nbd.NBD_CMD_FLAG_DF if structured else 0)
        self._read_mask = ~(ignored << 16)  # a reply is never fragmented, so DF asks for nothing more
        self._reply_space = reply_space
        self._skip = 0
        self._skip_refusal = b""
        self.operations: list[Operation] = []
        self.cookies: list[bytes] = []
        """``cookies[i]`` belongs to ``operations[i]``."""
        self.reads: list[Read] = []
        self.refusals: list[bytes] = []
        self.command: Command | None = None
        """FLUSH, CACHE, BLOCK_STATUS or DISC, checked; parsing stopped behind it."""
        self.breach: str | None = None
        """Why the connection must end, if what follows cannot be a request; all that came before it counts."""
        self.fua = False
        """Any of ``operations`` asks for FUA."""
        self.mixed = False
        """Any of ``operations`` is not a write."""
        self.span_start = 0
        self.span_end = 0
        """[span_start, span_end) of the buffer holds all payloads of ``operations``."""
        self.needed = 0
        """Bytes of the request that ``parse`` stopped at, if it needs more than there were."""

    def parse(self, view: memoryview, start: int, end: int) -> int:
        """Sort the requests in ``view[start:end]``; the position behind the last one that was used.

        The lists hold the requests of this call only. Call again from the returned position if it moved, or when more
        has arrived. All read replies of one call fit into ``reply_space`` bytes, unless there is one read only.
        """
        operations: list[Operation] = []
        cookies: list[bytes] = []
        self.operations, self.cookies = operations, cookies
        reads: list[Read] = []
        self.reads = reads
        self.refusals = []
        self.command = _NO_COMMAND
        self.fua = self.mixed = False
        self.needed = 0
        self.span_start = self.span_end = 0
        if self._skip:
            start = self._skip_payload(start, end)
        unpack_from = nbd.REQUEST.unpack_from
        size, limit, read_mask = self._size, self._limit, self._read_mask
        first = last = 0
        space = self._reply_space
        position = start
        final = end - HEADER
        while position <= final:
            head, cookie, offset, length = unpack_from(view, position)
            if head == PLAIN_WRITE and 0 < length <= limits.MAX_PAYLOAD and offset + length <= limit:
                payload = position + HEADER
                after = payload + length
                if after > end:
                    self.needed = HEADER + length
                    break
                if not last:
                    first = payload
                operations.append((0, offset, length, payload, 0))
                cookies.append(cookie)
                position = last = after
                if len(operations) == limits.MAX_BATCH_EXTENTS:
                    break
            elif head & read_mask == PLAIN_READ and 0 < length <= limits.MAX_PAYLOAD and offset + length <= size:
                space -= REPLY_HEADER + length
                if space < 0 and reads:
                    break
                reads.append((cookie, offset, length))
                position += HEADER
            else:
                after = self._uncommon(position, end, head, cookie, offset, length)
                if after < 0:
                    break
                if self.span_end:
                    if not last:
                        first = self.span_start
                    last = self.span_end
                    self.span_end = 0
                position = after
                if self.command is not None or len(operations) == limits.MAX_BATCH_EXTENTS or self._skip:
                    break
        self.span_start = first
        self.span_end = last
        return position

    def _skip_payload(self, start: int, end: int) -> int:
        """Pass over the payload of a refused write; the refusal goes out when all of it has come."""
        step = min(self._skip, end - start)
        self._skip -= step
        if not self._skip:
            self.refusals.append(self._skip_refusal)
        return start + step

    def _uncommon(self, position: int, end: int, head: int, cookie: bytes, offset: int, length: int) -> int:
        """Any request but a valid read or a plain valid write; the position behind it, or -1 to stop before it."""
        if head >> 32 != nbd.NBD_REQUEST_MAGIC:
            self.breach = f"a request starts with {head >> 32:#010x} instead of {nbd.NBD_REQUEST_MAGIC:#010x}"
            return -1
        flags, kind = head >> 16 & 0xFFFF, head & 0xFFFF
        refusal = self._check(flags, kind, offset, length)
        if refusal is not None:
            return self._refuse(position, end, kind, cookie, length, refusal)
        after = position + HEADER
        if kind == nbd.NBD_CMD_WRITE:
            after += length
            if after > end:
                self.needed = HEADER + length
                return -1
        if kind in _KINDS and length:
            self._operation(position, kind, cookie, offset, length, flags)
        elif kind in (nbd.NBD_CMD_FLUSH, nbd.NBD_CMD_DISC) or length:
            self.command = (kind, cookie, offset, length, flags)
        else:
            self.refusals.append(empty_reply(cookie, kind, self._structured))
        return after

    def _operation(self, position: int, kind: int, cookie: bytes, offset: int, length: int, flags: int) -> None:
        wanted = batch.FUA if flags & nbd.NBD_CMD_FLAG_FUA else 0
        if flags & nbd.NBD_CMD_FLAG_NO_HOLE:
            wanted |= batch.NO_HOLE
        if flags & nbd.NBD_CMD_FLAG_FAST_ZERO:
            wanted |= batch.FAST_ZERO
        payload = 0
        if kind == nbd.NBD_CMD_WRITE:
            payload = self.span_start = position + HEADER
            self.span_end = payload + length
        if wanted & batch.FUA:
            self.fua = True
        if kind != nbd.NBD_CMD_WRITE:
            self.mixed = True
        self.operations.append((_KINDS[kind], offset, length, payload, wanted))
        self.cookies.append(cookie)

    def _check(self, flags: int, kind: int, offset: int, length: int) -> tuple[int, str] | None:
        """Error value and reason if the request must be refused ("Request types", "Error values")."""
        if kind == nbd.NBD_CMD_DISC:
            return None
        allowed = _ALLOWED_FLAGS.get(kind)
        if allowed is None:
            return nbd.NBD_EINVAL, f"unknown command {kind}"
        if kind == nbd.NBD_CMD_READ and self._structured:
            allowed |= nbd.NBD_CMD_FLAG_DF
        if flags & ~allowed:
            return nbd.NBD_EINVAL, f"flags {flags & ~allowed:#x} do not apply to command {kind}"
        if kind == nbd.NBD_CMD_FLUSH:
            return (nbd.NBD_EINVAL, "a flush has neither offset nor length") if offset or length else None
        if kind in _KINDS and self._read_only:
            return nbd.NBD_EPERM, "the export is read-only"
        if offset + length > self._size:
            beyond = f"[{offset}, {offset + length}) reaches beyond the end of the export at {self._size}"
            return _BEYOND_END.get(kind, nbd.NBD_EINVAL), beyond
        if length > limits.MAX_PAYLOAD:
            too_long = f"{length} bytes are more than the maximum payload of {limits.MAX_PAYLOAD}"
            if kind == nbd.NBD_CMD_READ:
                return nbd.NBD_EOVERFLOW if self._structured else nbd.NBD_EINVAL, too_long
            if kind == nbd.NBD_CMD_WRITE:
                return nbd.NBD_EINVAL, too_long
        if kind == nbd.NBD_CMD_BLOCK_STATUS:
            if not self._allocation:
                return nbd.NBD_EINVAL, "no metadata context was selected"
            if not length:
                return nbd.NBD_EINVAL, "the status of no bytes cannot be told"
        return None

    def _refuse(self, position: int, end: int, kind: int, cookie: bytes, length: int, refusal: tuple[int, str]) -> int:
        reply = error_reply(cookie, refusal[0], refusal[1], self._structured)
        position += HEADER
        if kind == nbd.NBD_CMD_WRITE and length:
            self._skip, self._skip_refusal = length, reply
            return self._skip_payload(position, end)
        self.refusals.append(reply)
        return position


def error_reply(cookie: bytes, error: int, message: str, structured: bool) -> bytes:
    """A failed request's reply; ``error`` is an NBD error value. ``message`` travels in a structured reply only."""
    if not structured:
        return nbd.SIMPLE_REPLY.pack(nbd.NBD_SIMPLE_REPLY_MAGIC, error, cookie)
    text = message.encode()[: nbd.MAX_STRING]
    body = nbd.ERROR_CHUNK.pack(error, len(text)) + text
    done = nbd.NBD_REPLY_FLAG_DONE
    return nbd.CHUNK.pack(nbd.NBD_STRUCTURED_REPLY_MAGIC, done, nbd.NBD_REPLY_TYPE_ERROR, cookie, len(body)) + body


def errno_reply(cookie: bytes, number: int | None, structured: bool, fast_zero: bool = False) -> bytes:
    """The reply for a volume's errno. ENOTSUP may only answer a fast zero, EOVERFLOW only what ``_check`` refuses."""
    error = nbd.error_value(number)
    if error == nbd.NBD_EOVERFLOW or (error == nbd.NBD_ENOTSUP and not fast_zero):
        error = nbd.NBD_EINVAL
    return error_reply(cookie, error, nbd.ERROR_NAMES[error], structured)


def empty_reply(cookie: bytes, kind: int, structured: bool) -> bytes:
    """Success without data: for a read in structured mode a chunk of type NONE, else a simple reply."""
    if structured and kind == nbd.NBD_CMD_READ:
        done = nbd.NBD_REPLY_FLAG_DONE
        return nbd.CHUNK.pack(nbd.NBD_STRUCTURED_REPLY_MAGIC, done, nbd.NBD_REPLY_TYPE_NONE, cookie, 0)
    return nbd.SIMPLE_OK + cookie


def batch_replies(
    cookies: Sequence[bytes], operations: Sequence[Operation], errors: Mapping[int, int] | None, structured: bool
) -> bytes:
    """The replies to all operations of a batch; ``errors`` maps the index of a failed one to its errno.

    Success is a simple reply also in structured mode ("MAY use either"): 16 bytes, and one ``join`` makes all of them.
    """
    if not errors:
        return nbd.SIMPLE_OK + nbd.SIMPLE_OK.join(cookies)
    replies = []
    for index, cookie in enumerate(cookies):
        number = errors.get(index, 0)
        if number:
            fast_zero = bool(operations[index][4] & batch.FAST_ZERO)
            replies.append(errno_reply(cookie, number, structured, fast_zero))
        else:
            replies.append(nbd.SIMPLE_OK + cookie)
    return b"".join(replies)


def block_status_reply(cookie: bytes, length: int, one: bool, extents: Sequence[tuple[int, int]]) -> bytes:
    """One chunk for ``base:allocation``: neighbours of equal status joined, nothing beyond the requested ``length``.

    ``extents`` are (length, flags) from the requested offset on and cover at least one byte.
    """
    merged: list[list[int]] = []
    left = length
    for extent_length, flags in extents:
        taken = min(extent_length, left)
        if not taken:
            continue
        if merged and merged[-1][1] == flags:
            merged[-1][0] += taken
        elif len(merged) == (1 if one else MAX_DESCRIPTORS):
            break
        else:
            merged.append([taken, flags])
        left -= taken
    assert merged, "a volume tells the status of at least one byte"
    body = nbd.BASE_ALLOCATION_ID.to_bytes(4, "big") + b"".join(nbd.DESCRIPTOR.pack(*extent) for extent in merged)
    done, kind = nbd.NBD_REPLY_FLAG_DONE, nbd.NBD_REPLY_TYPE_BLOCK_STATUS
    return nbd.CHUNK.pack(nbd.NBD_STRUCTURED_REPLY_MAGIC, done, kind, cookie, len(body)) + body
