"""How often a random test tries. `TEST_REPETITIONS=10` makes that ten times as often: `make soak` sets it."""

from __future__ import annotations

import os

FACTOR = int(os.environ.get("TEST_REPETITIONS", "1"))


def repetitions(usual: int) -> int:
    """The number of examples, sequences, kills or the like; `usual` is what an ordinary run takes."""
    return usual * FACTOR
