"""The server's half of NBD option haggling, sans-I/O (doc/proto.md, "Fixed newstyle negotiation" and "Option types").

    GREETED ── client flags ──▶ HAGGLING ── GO or EXPORT_NAME ──▶ TRANSMISSION   (``agreement`` says on what)
                                   │  ▲
                                   └──┘ every other option            HAGGLING ── ABORT ──▶ ENDED

``receive`` takes what has arrived and says how much of it it used; what is left is the beginning of a message, or, in
TRANSMISSION, the client's first requests. ``take_output`` is what to send. A client that breaks a MUST gets an
NbdError: the connection ends. An option that is known but wrong gets an error reply and haggling goes on, as the spec
wants it.

This server is in NOTLS mode: STARTTLS is an option that it does not support.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from common import limits, nbd
from common.errors import NbdError

MAX_OPTION: Final = 64 * limits.KIB
"""Longest option data that is looked at: room for a name and a few thousand queries. Longer ones are skipped."""
MAX_OUTPUT: Final = 256 * limits.KIB
"""Replies that may wait to be taken before ``receive`` stops: a client cannot ask for more than it takes."""
MAX_STEPS: Final = 64
"""Options that one ``receive`` answers: a client that haggles without end gives others their turn."""
MAX_QUERIES: Final = 1024
"""Metadata contexts that one option may ask for; there is one."""


class Exported(Protocol):
    """What the handshake must know of a volume."""

    name: str
    read_only: bool
    multi_conn: bool
    preferred_block: int

    @property
    def size(self) -> int: ...


class State(enum.Enum):
    """Where a handshake stands."""

    GREETED = enum.auto()
    HAGGLING = enum.auto()
    TRANSMISSION = enum.auto()
    ENDED = enum.auto()


@dataclass(frozen=True, slots=True)
class Agreement:
    """What client and server agreed on for the transmission phase."""

    name: str
    structured: bool
    allocation: bool
    """The client selected ``base:allocation`` for this export, so it may send NBD_CMD_BLOCK_STATUS."""


class _Refusal(Exception):
    """An option is answered with this error reply; haggling goes on."""

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(message)
        self.reply = reply
        self.message = message


def transmission_flags(export: Exported, structured: bool) -> int:
    """Flags that are true of ``export`` ("Transmission flags"); a read-only export offers no writing command."""
    flags = nbd.NBD_FLAG_HAS_FLAGS | nbd.NBD_FLAG_SEND_FLUSH | nbd.NBD_FLAG_SEND_FUA | nbd.NBD_FLAG_SEND_CACHE
    if structured:
        flags |= nbd.NBD_FLAG_SEND_DF
    if export.multi_conn:
        flags |= nbd.NBD_FLAG_CAN_MULTI_CONN
    if export.read_only:
        flags |= nbd.NBD_FLAG_READ_ONLY
    else:
        flags |= nbd.NBD_FLAG_SEND_TRIM | nbd.NBD_FLAG_SEND_WRITE_ZEROES | nbd.NBD_FLAG_SEND_FAST_ZERO
    return flags


def preferred_block(export: Exported) -> int:
    """The preferred block size as the spec bounds it: a power of two, at least 512, at most the maximum payload."""
    wanted = max(512, min(export.preferred_block, limits.MAX_PAYLOAD))
    return 1 << (wanted.bit_length() - 1)


class ServerHandshake:
    """One connection's handshake over ``exports``; the empty name means ``exports[default]``."""

    def __init__(self, exports: Mapping[str, Exported], default: str) -> None:
        self._exports = exports
        self._default = default
        self._output = bytearray(
            nbd.GREETING.pack(nbd.NBDMAGIC, nbd.IHAVEOPT, nbd.NBD_FLAG_FIXED_NEWSTYLE | nbd.NBD_FLAG_NO_ZEROES)
        )
        self._no_zeroes = False
        self._structured = False
        self._context_of: str | None = None
        self._skip = 0
        self.state = State.GREETED
        self.agreement: Agreement | None = None

    def take_output(self) -> bytes:
        """What is to be sent now; each byte is handed out once."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def receive(self, data: memoryview) -> int:
        """Work on the complete messages at the start of ``data``; the number of bytes used.

        Call it again with the rest and what comes after it, while it uses any. Raises NbdError if the client breaks the
        protocol; what ``take_output`` has then is still worth sending.
        """
        used = steps = 0
        while self.state in (State.GREETED, State.HAGGLING) and len(self._output) < MAX_OUTPUT and steps < MAX_STEPS:
            steps += 1
            step = self._step(data[used:])
            if not step:
                break
            used += step
        return used

    def _step(self, data: memoryview) -> int:
        if self._skip:
            step = min(self._skip, len(data))
            self._skip -= step
            return step
        if self.state is State.GREETED:
            if len(data) < nbd.CLIENT_FLAGS.size:
                return 0
            self._client_flags(int.from_bytes(data[: nbd.CLIENT_FLAGS.size], "big"))
            return nbd.CLIENT_FLAGS.size
        if len(data) < nbd.OPTION.size:
            return 0
        magic: bytes
        option: int
        length: int
        magic, option, length = nbd.OPTION.unpack_from(data)
        if magic != nbd.IHAVEOPT:
            raise NbdError(f"The client sent {magic!r} where an option starts with {nbd.IHAVEOPT!r}.")
        if length > MAX_OPTION:
            self._too_long(option, length)
            return nbd.OPTION.size
        if len(data) < nbd.OPTION.size + length:
            return 0
        self._option(option, bytes(data[nbd.OPTION.size : nbd.OPTION.size + length]))
        return nbd.OPTION.size + length

    def _client_flags(self, flags: int) -> None:
        """ "Client flags": unknown ones end the connection. A client without fixed newstyle is served all the same."""
        unknown = flags & ~(nbd.NBD_FLAG_C_FIXED_NEWSTYLE | nbd.NBD_FLAG_C_NO_ZEROES)
        if unknown:
            raise NbdError(f"The client set unknown client flags {unknown:#x}.")
        self._no_zeroes = bool(flags & nbd.NBD_FLAG_C_NO_ZEROES)
        self.state = State.HAGGLING

    def _too_long(self, option: int, length: int) -> None:
        """Data that nobody wants to hold is skipped as it comes, whatever its length; the reply does not wait."""
        if option == nbd.NBD_OPT_EXPORT_NAME:
            raise NbdError(f"The client asks for an export with a name of {length} bytes.")
        self._skip = length
        if option == nbd.NBD_OPT_SET_META_CONTEXT:
            self._context_of = None
        if option == nbd.NBD_OPT_ABORT:
            self._option(option, b"")
        elif option in _HANDLERS:
            self._reply(option, nbd.NBD_REP_ERR_TOO_BIG, b"the option's data is too long")
        else:
            self._reply(option, nbd.NBD_REP_ERR_UNSUP)

    def _option(self, option: int, data: bytes) -> None:
        handler = _HANDLERS.get(option)
        if handler is None:
            self._reply(option, nbd.NBD_REP_ERR_UNSUP)
            return
        try:
            handler(self, option, data)
        except _Refusal as refusal:
            self._reply(option, refusal.reply, refusal.message.encode())

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._output += nbd.OPTION_REPLY.pack(nbd.NBD_REP_MAGIC, option, kind, len(data)) + data

    # Options

    def _export_name(self, _option: int, data: bytes) -> None:
        """ "NBD_OPT_EXPORT_NAME": no error can be told, so an unknown name ends the session."""
        try:
            export = self._find(data)
        except _Refusal as refusal:
            raise NbdError(f"The client asks for the export {data[:80]!r}: {refusal.message}.") from None
        self._output += nbd.EXPORT_REPLY.pack(export.size, transmission_flags(export, self._structured))
        if not self._no_zeroes:
            self._output += bytes(nbd.EXPORT_REPLY_ZEROES)
        self._enter(export)

    def _abort(self, option: int, _data: bytes) -> None:
        self._reply(option, nbd.NBD_REP_ACK)
        self.state = State.ENDED

    def _list(self, option: int, data: bytes) -> None:
        _must_be_empty(data)
        for name in self._exports:
            encoded = name.encode()
            self._reply(option, nbd.NBD_REP_SERVER, len(encoded).to_bytes(4, "big") + encoded)
        self._reply(option, nbd.NBD_REP_ACK)

    def _info(self, option: int, data: bytes) -> None:
        """ "NBD_OPT_INFO and NBD_OPT_GO"."""
        name, rest = _counted_string(data)
        if len(rest) < 2 or len(rest) != 2 + 2 * int.from_bytes(rest[:2], "big"):
            raise _Refusal(nbd.NBD_REP_ERR_INVALID, "the list of information requests has another length than it says")
        asked = set(struct.unpack(f">{len(rest) // 2}H", rest)[1:])
        export = self._find(name)
        flags = transmission_flags(export, self._structured)
        self._reply(option, nbd.NBD_REP_INFO, nbd.INFO_EXPORT.pack(nbd.NBD_INFO_EXPORT, export.size, flags))
        if nbd.NBD_INFO_NAME in asked:
            self._reply(option, nbd.NBD_REP_INFO, nbd.NBD_INFO_NAME.to_bytes(2, "big") + export.name.encode())
        if nbd.NBD_INFO_BLOCK_SIZE in asked:
            sizes = nbd.INFO_BLOCK_SIZE.pack(nbd.NBD_INFO_BLOCK_SIZE, 1, preferred_block(export), limits.MAX_PAYLOAD)
            self._reply(option, nbd.NBD_REP_INFO, sizes)
        self._reply(option, nbd.NBD_REP_ACK)
        if option == nbd.NBD_OPT_GO:
            self._enter(export)

    def _structured_reply(self, option: int, data: bytes) -> None:
        _must_be_empty(data)
        self._structured = True
        self._reply(option, nbd.NBD_REP_ACK)

    def _meta_context(self, option: int, data: bytes) -> None:
        """ "NBD_OPT_LIST_META_CONTEXT" and "NBD_OPT_SET_META_CONTEXT": one context exists, ``base:allocation``.

        To set replaces what was set before, "including when this command fails".
        """
        setting = option == nbd.NBD_OPT_SET_META_CONTEXT
        if setting:
            self._context_of = None
        if not self._structured:
            raise _Refusal(nbd.NBD_REP_ERR_INVALID, "structured replies must be negotiated first")
        name, rest = _counted_string(data)
        if len(rest) < 4:
            raise _Refusal(nbd.NBD_REP_ERR_INVALID, "the number of queries is missing")
        count, rest = int.from_bytes(rest[:4], "big"), rest[4:]
        if 4 * count > len(rest):
            raise _Refusal(nbd.NBD_REP_ERR_INVALID, "there are fewer queries than it says")
        if count > MAX_QUERIES:
            raise _Refusal(nbd.NBD_REP_ERR_TOO_BIG, f"there are more than {MAX_QUERIES} queries")
        queries = set()
        for _ in range(count):
            query, rest = _counted_string(rest)
            queries.add(query)
        if rest:
            raise _Refusal(nbd.NBD_REP_ERR_INVALID, "there is data behind the last query")
        export = self._find(name)
        if setting:
            matches = nbd.BASE_ALLOCATION in queries
            self._context_of = export.name if matches else None
        else:
            matches = not count or nbd.BASE_ALLOCATION in queries or b"base:" in queries
        if matches:
            context = nbd.BASE_ALLOCATION_ID if setting else 0
            self._reply(option, nbd.NBD_REP_META_CONTEXT, context.to_bytes(4, "big") + nbd.BASE_ALLOCATION)
        self._reply(option, nbd.NBD_REP_ACK)

    def _find(self, name: bytes) -> Exported:
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise _Refusal(nbd.NBD_REP_ERR_INVALID, "the name of an export must be UTF-8") from None
        if len(name) > nbd.MAX_STRING or "\0" in text:
            raise _Refusal(nbd.NBD_REP_ERR_INVALID, "the name of an export is too long or holds a NUL character")
        export = self._exports.get(text or self._default)
        if export is None:
            raise _Refusal(nbd.NBD_REP_ERR_UNKNOWN, f"there is no export {text!r} here")
        return export

    def _enter(self, export: Exported) -> None:
        self.agreement = Agreement(export.name, self._structured, self._context_of == export.name)
        self.state = State.TRANSMISSION


def _must_be_empty(data: bytes) -> None:
    if data:
        raise _Refusal(nbd.NBD_REP_ERR_INVALID, "this option takes no data")


def _counted_string(data: bytes) -> tuple[bytes, bytes]:
    """The string behind a 32-bit length at the start of ``data``, and what follows it."""
    length = int.from_bytes(data[:4], "big")
    if len(data) < 4 or length > len(data) - 4:
        raise _Refusal(nbd.NBD_REP_ERR_INVALID, "a string reaches beyond the end of the option")
    return data[4 : 4 + length], data[4 + length :]


_HANDLERS: Final = {
    nbd.NBD_OPT_EXPORT_NAME: ServerHandshake._export_name,
    nbd.NBD_OPT_ABORT: ServerHandshake._abort,
    nbd.NBD_OPT_LIST: ServerHandshake._list,
    nbd.NBD_OPT_INFO: ServerHandshake._info,
    nbd.NBD_OPT_GO: ServerHandshake._info,
    nbd.NBD_OPT_STRUCTURED_REPLY: ServerHandshake._structured_reply,
    nbd.NBD_OPT_LIST_META_CONTEXT: ServerHandshake._meta_context,
    nbd.NBD_OPT_SET_META_CONTEXT: ServerHandshake._meta_context,
}
