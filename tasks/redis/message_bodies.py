"""The bytes of messages and of their bodies, decoded and read as JSON, with a bound on their size."""

from __future__ import annotations

import base64
import bz2
import json
import lzma
import zlib
from collections.abc import Callable

import orjson

from device_operations.wire.json_types import FreeJson
from tasks.redis.message_fields import Unreadable
from tasks.redis.queues import MESSAGE_BYTES


def parsed(raw: bytes, limit_bytes: int = MESSAGE_BYTES) -> object:
    if len(raw) > limit_bytes:
        raise Unreadable(f"it has {len(raw)} bytes, and {limit_bytes} are allowed; send big payloads as blobs")
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise Unreadable("it is no JSON") from None


def body_of(envelope: FreeJson) -> tuple[object, str | bytes]:
    """The body, read as JSON, and its text, which is UTF-8."""
    if envelope.get("content-type") != "application/json":
        raise Unreadable("its content type is not application/json")
    charset = envelope.get("content-encoding", "utf-8")
    if type(charset) is not str or charset.lower() not in ("utf-8", "utf8", "us-ascii"):
        raise Unreadable("its content encoding is not utf-8")
    body = envelope.get("body")
    if type(body) is not str:
        raise Unreadable("the body is no text")
    text = _unpacked(envelope, body)
    try:
        return orjson.loads(text), text
    except orjson.JSONDecodeError:
        pass
    try:
        # Python's own JSON, which Celery writes, has NaN and infinities: they are read as the words that tensors take.
        return json.loads(text_of(text), parse_constant=str), text
    except (ValueError, RecursionError):
        raise Unreadable("the body is no JSON") from None


def text_of(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode()


def _unpacked(envelope: FreeJson, body: str) -> str | bytes:
    properties, headers = envelope.get("properties"), envelope.get("headers")
    encoding = properties.get("body_encoding") if type(properties) is dict else None
    compression = headers.get("compression") if type(headers) is dict else None
    if encoding is None or (type(encoding) is str and encoding.lower() == "utf-8"):
        if compression is not None:
            raise Unreadable("the body is compressed and no base64")
        return body
    if encoding != "base64":
        raise Unreadable("the body's encoding is neither base64 nor utf-8")
    try:
        data = base64.b64decode(body, validate=True)
    except ValueError:
        raise Unreadable("the body is no base64") from None
    return data if compression is None else _decompressed(data, compression)


def _decompressed(data: bytes, compression: object) -> bytes:
    opener = _OPENERS.get(compression) if type(compression) is str else None
    if opener is None:
        raise Unreadable("the body's compression is not known")
    try:
        text: bytes = opener(data)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        raise Unreadable("the body cannot be decompressed") from None
    if len(text) > MESSAGE_BYTES:
        raise Unreadable(f"decompressed, the body has more than {MESSAGE_BYTES} bytes")
    return text


#: By kombu's names; each gives one byte more than is allowed at most.
_OPENERS: dict[str, Callable[[bytes], bytes]] = {
    "application/x-gzip": lambda data: zlib.decompressobj().decompress(data, MESSAGE_BYTES + 1),
    "application/x-bz2": lambda data: bz2.BZ2Decompressor().decompress(data, MESSAGE_BYTES + 1),
    "application/x-lzma": lambda data: lzma.LZMADecompressor(memlimit=256 << 20).decompress(data, MESSAGE_BYTES + 1),
}
