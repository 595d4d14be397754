"""Text as raw bytes, where tensors of numbers travel as raw bytes: each string as its length and its UTF-8.

The form is the Open Inference Protocol's for BYTES: four bytes of length, little-endian, then the string itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from device_operations.errors import failure

_LENGTH = struct.Struct("<I")


def pack_texts(texts: Iterable[str | bytes]) -> bytes:
    """The strings one after the other, each behind its length."""
    parts: list[bytes] = []
    for text in texts:
        raw = text if isinstance(text, bytes) else str(text).encode()
        parts += (_LENGTH.pack(len(raw)), raw)
    return b"".join(parts)


def unpack_texts(raw: bytes | bytearray | memoryview, count: int, name: str = "tensor") -> list[str]:
    """The `count` strings in `raw`; `input_mismatch` where the lengths do not add up, or it is not UTF-8."""
    view = memoryview(raw)
    texts: list[str] = []
    at = 0
    while at < len(view):
        if at + 4 > len(view):
            raise failure("input_mismatch", f"{name}: the strings are cut off after {len(texts)}")
        (length,) = _LENGTH.unpack_from(view, at)
        at += 4
        if at + length > len(view):
            raise failure(
                "input_mismatch",
                f"{name}: string {len(texts)} is announced with {length} bytes, {len(view) - at} are left",
            )
        try:
            texts.append(str(view[at : at + length], "utf-8"))
        except UnicodeDecodeError as error:
            raise failure("input_mismatch", f"{name}: string {len(texts)} is not UTF-8: {error}") from error
        at += length
    if len(texts) != count:
        raise failure("input_mismatch", f"{name}: the shape holds {count} strings, but {len(texts)} were given")
    return texts
