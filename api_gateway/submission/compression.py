"""Bodies that come compressed: decompressed to no more than a body may have, however large they would grow."""

from __future__ import annotations

import zlib

from device_operations.errors import OperationError, failure

#: What `Content-Encoding` may name.
ENCODINGS = ("gzip", "deflate")

#: Bytes given to the decompressor at once: what it leaves of them is copied.
_PIECE_BYTES = 65_536

#: A gzip body may be several streams one after the other, as tools that compress in blocks write it. Of ordinary blocks
#: (64 KiB) so many hold more than any body may; of empty ones they would only take time.
_STREAMS = 10_000

_GZIP, _ZLIB, _BARE = 31, 15, -15


def decompressed(body: bytes | bytearray | memoryview, encoding: str, limit: int) -> bytes:
    """The body as it was before it was compressed.

    Raises `payload_too_large` beyond `limit` bytes, `malformed_request` where it is not `encoding` or is cut off.
    """
    view = memoryview(body)
    parts: list[bytes] = []
    at = size = 0
    for _ in range(_STREAMS):
        unpacker = zlib.decompressobj(_form(view[at : at + 2], encoding))
        while not unpacker.eof:
            piece = view[at : at + _PIECE_BYTES]
            if not piece:
                raise failure("malformed_request", f"the {encoding} body is cut off")
            try:
                # One byte more than may come: what is left over then needs no second look.
                part = unpacker.decompress(piece, limit - size + 1)
            except zlib.error as error:
                raise failure("malformed_request", f"the body is not {encoding}: {error}") from error
            at += len(piece)
            size += len(part)
            if size > limit:
                raise too_large(limit)
            parts.append(part)
        at -= len(unpacker.unused_data)
        if encoding == "gzip":
            at = _past_padding(view, at)
        if at == len(view):
            return parts[0] if len(parts) == 1 else b"".join(parts)
        if encoding != "gzip":
            raise failure("malformed_request", f"{len(view) - at} bytes follow the {encoding} body")
    raise failure("malformed_request", f"the gzip body is more than {_STREAMS} streams")


def too_large(limit: int) -> OperationError:
    """What a body over the limit is refused with."""
    return failure("payload_too_large", f"the body may have {limit} bytes (HTTP__MAX_BODY_BYTES)")


def _form(head: memoryview, encoding: str) -> int:
    """How zlib is to read what begins so: `deflate` is zlib's own form, and some clients leave its frame out."""
    if encoding == "gzip":
        return _GZIP
    framed = len(head) == 2 and head[0] & 0x0F == 8 and (head[0] << 8 | head[1]) % 31 == 0
    return _ZLIB if framed else _BARE


def _past_padding(view: memoryview, at: int) -> int:
    """Where the zeros end that may fill up the last block."""
    rest = bytes(view[at : at + _PIECE_BYTES])
    while rest and not rest.strip(b"\0"):
        at += len(rest)
        rest = bytes(view[at : at + _PIECE_BYTES])
    return at + len(rest) - len(rest.lstrip(b"\0"))
