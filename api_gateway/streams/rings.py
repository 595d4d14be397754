"""The rings that one gateway offers to workers of its machine: a few at once, and none left behind."""

from __future__ import annotations

import secrets
import time

import structlog

from tasks.blobs.ring import Ring, segment_name, sweep

log = structlog.get_logger(__name__)

#: Rings of one gateway at once, and pieces in each: 16 MiB, so that a busy machine need not run both ends at the same
#: moment. Further reads go through blobs.
RINGS = 4
SLOTS = 8

#: Seconds after which a ring's first piece is not awaited any more: longer than a request waits for its job.
FORGOTTEN_SECONDS = 600


class Rings:
    """The rings that this process offers."""

    def __init__(self, database_url: str) -> None:
        self._owner = f"{database_url} gateway"
        self._offered: set[Ring] = set()

    def offer(self) -> Ring | None:
        """A new ring; None where there are enough, or shared memory is not to be had."""
        sweep(self._owner, _epoch(FORGOTTEN_SECONDS))
        if len(self._offered) >= RINGS:
            return None
        try:
            ring = Ring.make(segment_name(self._owner, _epoch(), secrets.randbelow(10_000)), SLOTS, once=True)
        except OSError as error:
            log.warning("no shared memory for a read; it goes through a blob", error=str(error))
            return None
        self._offered.add(ring)
        return ring

    def take_back(self, ring: Ring) -> None:
        """Lets a ring go; a worker that still puts into it stops."""
        self._offered.discard(ring)
        ring.close()


def _epoch(before_seconds: float = 0) -> int:
    """Minutes: a segment's name is to be short."""
    return int(time.time() - before_seconds) // 60
