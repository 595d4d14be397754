"""How often each owner may submit to this gateway: one token bucket an owner, in the process's memory."""

from __future__ import annotations

import math
import time

from device_operations.errors import failure


class Rates:
    """`HTTP__RATE_LIMIT_PER_SECOND` of one gateway process; used on its event loop only.

    A bucket holds one second's submissions, at least one. A bulk submission counts as its jobs: it is taken when the
    bucket is full, or has enough for it, and what it took too much is waited for by the next.
    """

    def __init__(self, per_second: float | None) -> None:
        self._per_second = per_second
        #: Each owner's tokens, and when they were counted; owners come from the API keys, so they are few.
        self._buckets: dict[str, tuple[float, float]] = {}

    def spend(self, owner: str, jobs: int = 1) -> None:
        """Takes tokens for so many jobs. `rate_limited` with the seconds to wait where there are too few."""
        if self._per_second is None:
            return
        now = time.monotonic()
        size = max(1.0, self._per_second)
        tokens, counted_at = self._buckets.get(owner, (size, now))
        tokens = min(size, tokens + (now - counted_at) * self._per_second)
        missing = min(float(jobs), size) - tokens
        if missing > 1e-9:
            self._buckets[owner] = tokens, now
            raise failure(
                "rate_limited",
                f"{owner!r} may submit {self._per_second:g} jobs a second here (HTTP__RATE_LIMIT_PER_SECOND)",
                retry_after_seconds=math.ceil(missing / self._per_second),
            )
        self._buckets[owner] = tokens - jobs, now
