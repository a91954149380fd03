"""The NBD protocol on the wire: every constant and layout that this project uses, in the names of the specification.

Source of all of it: doc/proto.md of NetworkBlockDevice/nbd, section "Values" and the message layouts before it. All
integers are big-endian. The server's halves of the protocol are ``common.nbd_handshake`` (option haggling) and
``common.nbd_transmission`` (requests and replies); the client is ``common.nbd_client``.

A cookie is opaque to a server, so the structs take it as eight bytes and never turn it into a number. The first eight
bytes of a request (magic, flags, type) are one number, so that one comparison recognises the common requests.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import Final

# Handshake
NBDMAGIC: Final = b"NBDMAGIC"
IHAVEOPT: Final = b"IHAVEOPT"
NBD_REP_MAGIC: Final = 0x3E889045565A9

NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_ROTATIONAL: Final = 1 << 4
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11

NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10

NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_FLAG_ERROR: Final = 1 << 31
NBD_REP_ERR_UNSUP: Final = NBD_REP_FLAG_ERROR + 1
NBD_REP_ERR_POLICY: Final = NBD_REP_FLAG_ERROR + 2
NBD_REP_ERR_INVALID: Final = NBD_REP_FLAG_ERROR + 3
NBD_REP_ERR_PLATFORM: Final = NBD_REP_FLAG_ERROR + 4
NBD_REP_ERR_TLS_REQD: Final = NBD_REP_FLAG_ERROR + 5
NBD_REP_ERR_UNKNOWN: Final = NBD_REP_FLAG_ERROR + 6
NBD_REP_ERR_SHUTDOWN: Final = NBD_REP_FLAG_ERROR + 7
NBD_REP_ERR_BLOCK_SIZE_REQD: Final = NBD_REP_FLAG_ERROR + 8
NBD_REP_ERR_TOO_BIG: Final = NBD_REP_FLAG_ERROR + 9

NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

BASE_ALLOCATION: Final = b"base:allocation"
BASE_ALLOCATION_ID: Final = 1
NBD_STATE_HOLE: Final = 1 << 0
NBD_STATE_ZERO: Final = 1 << 1

GREETING: Final = Struct(">8s8sH")
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">8sII")
OPTION_REPLY: Final = Struct(">QIII")
EXPORT_REPLY: Final = Struct(">QH")
EXPORT_REPLY_ZEROES: Final = 124
INFO_EXPORT: Final = Struct(">HQH")
INFO_BLOCK_SIZE: Final = Struct(">HIII")

# Transmission
NBD_REQUEST_MAGIC: Final = 0x25609513
NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_CMD_TRIM: Final = 4
NBD_CMD_CACHE: Final = 5
NBD_CMD_WRITE_ZEROES: Final = 6
NBD_CMD_BLOCK_STATUS: Final = 7

NBD_CMD_FLAG_FUA: Final = 1 << 0
NBD_CMD_FLAG_NO_HOLE: Final = 1 << 1
NBD_CMD_FLAG_DF: Final = 1 << 2
NBD_CMD_FLAG_REQ_ONE: Final = 1 << 3
NBD_CMD_FLAG_FAST_ZERO: Final = 1 << 4

NBD_REPLY_FLAG_DONE: Final = 1 << 0
NBD_REPLY_TYPE_NONE: Final = 0
NBD_REPLY_TYPE_OFFSET_DATA: Final = 1
NBD_REPLY_TYPE_OFFSET_HOLE: Final = 2
NBD_REPLY_TYPE_BLOCK_STATUS: Final = 5
NBD_REPLY_TYPE_FLAG_ERROR: Final = 1 << 15
NBD_REPLY_TYPE_ERROR: Final = NBD_REPLY_TYPE_FLAG_ERROR + 1
NBD_REPLY_TYPE_ERROR_OFFSET: Final = NBD_REPLY_TYPE_FLAG_ERROR + 2

REQUEST: Final = Struct(">Q8sQI")
"""(magic << 32 | flags << 16 | type), cookie, offset, length"""
SIMPLE_REPLY: Final = Struct(">II8s")
CHUNK: Final = Struct(">IHH8sI")
DATA_CHUNK: Final = Struct(">Q8sIQ")
"""(magic << 32 | flags << 16 | type), cookie, length of offset and data, offset: what goes before a read's data."""
SIMPLE_DATA: Final = Struct(">8s8s")
"""``SIMPLE_OK``, cookie: what goes before the data of a read without structured replies."""
ERROR_CHUNK: Final = Struct(">IH")
DESCRIPTOR: Final = Struct(">II")

REQUEST_HEAD: Final = NBD_REQUEST_MAGIC << 32
DATA_CHUNK_HEAD: Final = NBD_STRUCTURED_REPLY_MAGIC << 32 | NBD_REPLY_FLAG_DONE << 16 | NBD_REPLY_TYPE_OFFSET_DATA
SIMPLE_OK: Final = (NBD_SIMPLE_REPLY_MAGIC << 32).to_bytes(8, "big")
"""What stands before the cookie of a successful simple reply."""

assert (GREETING.size, OPTION.size, OPTION_REPLY.size) == (18, 16, 20)
assert (EXPORT_REPLY.size, INFO_EXPORT.size, INFO_BLOCK_SIZE.size) == (10, 12, 14)
assert (REQUEST.size, SIMPLE_REPLY.size, SIMPLE_DATA.size, CHUNK.size, DATA_CHUNK.size) == (28, 16, 16, 20, 28)

# Error values; the only ones that may go out
NBD_EPERM: Final = 1
NBD_EIO: Final = 5
NBD_ENOMEM: Final = 12
NBD_EINVAL: Final = 22
NBD_ENOSPC: Final = 28
NBD_EOVERFLOW: Final = 75
NBD_ENOTSUP: Final = 95
NBD_ESHUTDOWN: Final = 108

_FROM_ERRNO: Final = {
    errno.EPERM: NBD_EPERM,
    errno.EACCES: NBD_EPERM,
    errno.EROFS: NBD_EPERM,
    errno.EIO: NBD_EIO,
    errno.ENOMEM: NBD_ENOMEM,
    errno.EINVAL: NBD_EINVAL,
    errno.ENOSPC: NBD_ENOSPC,
    errno.EDQUOT: NBD_ENOSPC,
    errno.EFBIG: NBD_ENOSPC,
    errno.EOVERFLOW: NBD_EOVERFLOW,
    errno.ENOTSUP: NBD_ENOTSUP,
    errno.ESHUTDOWN: NBD_ESHUTDOWN,
}

ERROR_NAMES: Final = {
    NBD_EPERM: "operation not permitted",
    NBD_EIO: "input/output error",
    NBD_ENOMEM: "cannot allocate memory",
    NBD_EINVAL: "invalid argument",
    NBD_ENOSPC: "no space left on device",
    NBD_EOVERFLOW: "value too large",
    NBD_ENOTSUP: "operation not supported",
    NBD_ESHUTDOWN: "server is being shut down",
}

MAX_STRING: Final = 4096
"""Longest string that the protocol allows, in bytes ("Conventions")."""


def error_value(number: int | None) -> int:
    """The NBD error value for an errno; what has none is an I/O error ("Error values")."""
    return _FROM_ERRNO.get(number or 0, NBD_EIO)
