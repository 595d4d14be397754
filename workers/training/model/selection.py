"""Which parameters are trained: name patterns, checked so that a pattern which fits nothing is never passed over."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from device_operations.errors import failure

#: What a pattern of `trainable` is called in messages.
PATTERN = "the trainable pattern"


def matching(patterns: Sequence[str], names: Collection[str], what: str) -> set[str]:
    """The names that a pattern covers whole (`*` any characters, `?` one).

    Raises `validation_failed` for a pattern that covers none, with the names there are.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = fitting(pattern, names)
        if not found:
            there = ", ".join(list(names)[:50]) or "none"
            raise failure("validation_failed", f"{what} {pattern!r} fits none of the names there are: {there}")
        chosen |= found
    return chosen


def fitting(pattern: str, names: Collection[str]) -> set[str]:
    """The names that one pattern covers whole."""
    expression = re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL)
    return {name for name in names if expression.fullmatch(name)}
