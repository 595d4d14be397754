"""Limits on what callers send: how long a number, how deep a JSON value, and which characters a text may have.

    whole_number(text)          digits of a header or query value, or None
    load_json(body)             a JSON value that can be stored, from bytes
    refuse_unstorable(value)    the same check for a value that was decoded elsewhere (a message, a tensor's header)

PostgreSQL cannot hold NUL in text, and UTF-8 cannot encode half of a surrogate pair. Both are refused here, so that no
look-up and no record meets them.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from device_operations.errors import OperationError, failure
from device_operations.wire.json_text import loads

#: Numbers of headers and query values are below this: a signed 64-bit integer.
MAX_INTEGER = 2**63 - 1

#: JSON integers lie in the range of int64 and uint64.
MIN_JSON_INTEGER, MAX_JSON_INTEGER = -(2**63), 2**64 - 1

#: How deep a JSON value may nest: a tensor of 32 dimensions in a step of a job of a bulk submission takes 39.
MAX_DEPTH = 64

#: Digits in an integer of at most `MAX_INTEGER`.
_MAX_DIGITS = 19

_DIGITS = re.compile(r"[0-9]+", re.ASCII)

#: An escape in JSON text that may stand for NUL or for half of a surrogate pair.
_SUSPECT = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")

_SURROGATE = re.compile("[\ud800-\udfff]")


def whole_number(text: str | bytes | None, *, most: int = MAX_INTEGER) -> int | None:
    """The number that ASCII digits spell, 0 to `most`; None for anything else, and for a number above `most`."""
    if text is None:
        return None
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    if not _DIGITS.fullmatch(text):
        return None
    text = text.lstrip("0") or "0"
    if len(text) > _MAX_DIGITS:
        return None
    number = int(text)
    return number if number <= most else None


def is_number_above(text: str, limit: int) -> bool:
    """Whether `text` is digits that spell a number above `limit`, however many digits there are."""
    return bool(_DIGITS.fullmatch(text)) and whole_number(text, most=limit) is None


def is_storable(text: str) -> bool:
    """Whether the text has neither NUL nor a lone surrogate."""
    return "\x00" not in text and (text.isascii() or _SURROGATE.search(text) is None)


def load_json(body: bytes | bytearray | memoryview, what: str = "the body") -> Any:
    """The JSON value in `body`.

    Raises `malformed_request` where it is not JSON or nests deeper than `MAX_DEPTH`, and `validation_failed` where a
    text holds NUL or a lone surrogate.
    """
    return parse_json(body, what)[0]


def parse_json(body: bytes | bytearray | memoryview, what: str = "the body") -> tuple[Any, bool]:
    """The same, and whether the body is strict JSON: NaN and infinities are taken among a tensor's elements."""
    text = bytes(body) if isinstance(body, memoryview) else body
    strict = True
    try:
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            value, strict = loads(text), False
    except ValueError as error:
        raise failure("malformed_request", f"{what} is not JSON: {error}") from error
    if b"\\u" in text and _SUSPECT.search(text) is not None:
        refuse_unstorable(value, what)
    # Counting brackets is far cheaper than a walk, and most bodies hold few.
    elif len(text) > MAX_DEPTH and text.count(b"[") + text.count(b"{") > MAX_DEPTH and is_too_deep(value):
        raise _too_deep(what)
    return value, strict


def refuse_unstorable(value: object, what: str = "the body") -> None:
    """Raises where a decoded JSON value cannot be stored.

    `malformed_request` where it nests deeper than `MAX_DEPTH`; `validation_failed` where a text or a key at any depth
    holds NUL or a lone surrogate, and where an integer lies outside of int64 and uint64.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[object] = []
        for one in level:
            if isinstance(one, str):
                if not is_storable(one):
                    raise _unstorable(what)
            elif isinstance(one, dict):
                below.extend(one.keys())
                below.extend(one.values())
            elif isinstance(one, (list, tuple)):
                below.extend(one)
            elif isinstance(one, int) and not MIN_JSON_INTEGER <= one <= MAX_JSON_INTEGER:
                raise failure("validation_failed", f"{what} holds an integer of more than 64 bits")
        if not below:
            return
        level = below
    raise _too_deep(what)


def is_too_deep(value: object) -> bool:
    """Whether lists and objects nest deeper than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for container in level
            if isinstance(container, (dict, list))
            for child in (container.values() if isinstance(container, dict) else container)
            if type(child) in (dict, list)
        ]
        if not level:
            return False
    return True


def _unstorable(what: str) -> OperationError:
    return failure("validation_failed", f"{what} holds a text with NUL or half of a surrogate pair (UTF-16)")


def _too_deep(what: str) -> OperationError:
    return failure("malformed_request", f"{what} nests deeper than {MAX_DEPTH}")
