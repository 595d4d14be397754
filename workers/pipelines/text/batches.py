"""Which texts run together: of like length, so that little is padding, and no more than memory takes."""

from __future__ import annotations

from collections.abc import Sequence

#: Tokens of one batch at most, padding included.
MOST_BATCH_TOKENS = 16_384


def by_length(lengths: Sequence[int], most_rows: int, *, pads: bool) -> list[list[int]]:
    """The indexes of `lengths` in batches, the longest first: what takes most memory fails first.

    At most `most_rows` in each, and `MOST_BATCH_TOKENS` tokens unless one row has more. Without `pads`, rows of one
    length only.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        current = batches[-1] if batches else []
        full = len(current) == most_rows or (len(current) + 1) * width > MOST_BATCH_TOKENS
        if not current or full or (not pads and lengths[index] != width):
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches
