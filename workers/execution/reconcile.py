"""Compares what the record says runs here with what this worker holds, and gives up what it does not hold.

A job is held from before its claim until its end is recorded (the scheduler's), and while its announced end may be
lost. A row that runs under this epoch and is not held would run for ever: a worker's death is the only other thing that
ends it. It is treated as after one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog
from sqlalchemy import Engine

from tasks.jobs import rescue as rescues
from tasks.jobs.rescue import Rescue
from tasks.statements import Row, transaction

log = structlog.get_logger(__name__)

#: Age of a row, from its start or else its submission (`ends.claimed`), from which it is given up if it is not held.
#: The answer to a claim, after which its jobs are held, does not take as long.
UNHELD_SECONDS = 5.0


class Reconciler:
    """One worker's. `is_held` says whether the worker has a job; `announce` announces what became of those given up."""

    def __init__(
        self,
        engine: Engine,
        device_id: str,
        epoch: int,
        is_held: Callable[[str], bool],
        announce: Callable[[Rescue], None],
    ) -> None:
        self._engine = engine
        self._device_id = device_id
        self._epoch = epoch
        self._is_held = is_held
        self._announce = announce
        self._suspects: frozenset[str] = frozenset()

    def look(self, running: Sequence[Row]) -> None:
        """Takes what `ends.claimed` found, and gives up the jobs that it also found the last time, held by nothing.

        Twice, since a job's end may have been recorded between that statement and the question who holds it.
        """
        unheld = frozenset(
            job["id"] for job in running if job["age_seconds"] > UNHELD_SECONDS and not self._is_held(job["id"])
        )
        lost, self._suspects = unheld & self._suspects, unheld
        if not lost:
            return
        with transaction(self._engine) as connection:
            given_up = rescues.put_back(connection, self._device_id, self._epoch, lost)
        if given_up is None or not (given_up.ended or given_up.requeued):
            return
        log.warning(
            "jobs ran by the record that this worker does not hold", device_id=self._device_id,
            requeued=[row["id"] for row in given_up.requeued], ended=[row["id"] for row in given_up.ended],
        )  # fmt: skip
        self._announce(given_up)
