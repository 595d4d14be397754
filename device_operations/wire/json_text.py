"""JSON as callers send it: strict, but for NaN, Infinity and -Infinity among a tensor's elements.

strict parser ─ accepts ───────────────────────────────────▶ value       what nearly every body takes
              └ refuses ─ no such word in it ──────────────▶ ValueError
                        └ numbers in their place: strict? ─▶ parsed again, each word as a `NonFinite`
"""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

Text = bytes | bytearray | memoryview | str

#: The three numbers that JSON has no form for, by the words that stand for them, bare or as strings.
NON_FINITE: dict[str, float] = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}

#: A string as a whole, closed or not, so that no word inside one is taken; or one of the words. It never goes back.
_STRING_OR_WORD = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|Infinity\b|NaN\b', re.DOTALL)

_QUOTE = ord('"')

#: Whole numbers with fewer digits fit in 64 bits.
_LONG_DIGITS = 18


class NonFinite(str):
    """One of the words of `NON_FINITE` that stood bare, where JSON has no value: a number, and never a text."""

    __slots__ = ()


_BARE = {word: NonFinite(word) for word in NON_FINITE}


def loads(text: Text, *, anywhere: bool = False) -> Any:
    """The value of a JSON text. Below a key `data`, or `anywhere`, NaN and infinities are taken, as `NonFinite`.

    Raises ValueError for all else that is not JSON. Costs nothing beyond the strict parser for what that accepts.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        plain = text.encode() if isinstance(text, str) else bytes(text)
        if b"NaN" not in plain and b"Infinity" not in plain:
            raise
    # With a 0 in place of each word, padded so that an error's position is right, the rest must be strict JSON.
    orjson.loads(_STRING_OR_WORD.sub(_in_place, plain))
    try:
        value = json.loads(plain.decode(), parse_constant=_BARE.__getitem__, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not anywhere:
        _check_places(value)
    return value


def _in_place(found: re.Match[bytes]) -> bytes:
    token = found[0]
    return token if token[0] == _QUOTE else b"0".ljust(len(token))


def _whole(digits: str) -> int | float:
    """A whole number as the strict parser reads it: what 64 bits do not hold becomes a float."""
    if len(digits) < _LONG_DIGITS:
        return int(digits)
    value = float(digits)
    exact = int(digits) if abs(value) <= 2.0**64 else 0
    return exact if exact and -(2**63) <= exact < 2**64 else value


def _check_places(value: object) -> None:
    """Raises ValueError where a `NonFinite` stands anywhere but below `data`."""
    below = [value]
    while below:
        inner = below.pop()
        if isinstance(inner, NonFinite):
            raise ValueError(f"{inner} is a number of a tensor's data only")
        if isinstance(inner, dict):
            below += [entry for key, entry in inner.items() if key != "data"]
        elif isinstance(inner, list):
            below += inner
