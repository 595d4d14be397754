"""Which parameters are trained: name patterns, checked so that a pattern which fits nothing is never passed over."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from device_operations.errors import failure


def matching(patterns: Sequence[str], names: Collection[str], what: str) -> set[str]:
    """The names that a pattern covers whole (`*` any characters, `?` one).

    Raises `validation_failed` for a pattern that covers none, with the names there are.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        expression = re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL)
        found = {name for name in names if expression.fullmatch(name)}
        if not found:
            there = ", ".join(list(names)[:50]) or "none"
            raise failure("validation_failed", f"{what} {pattern!r} fits none of the names there are: {there}")
        chosen |= found
    return chosen
