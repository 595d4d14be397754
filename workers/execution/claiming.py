"""How the worker claims the jobs that its scheduler gives it: guarded in the database, under its own epoch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import structlog
from sqlalchemy import Connection, Engine

from tasks.database import until_reachable
from tasks.jobs import claims, store
from tasks.jobs import lost_ends as ends
from tasks.jobs.lifecycle import leaves_nothing
from tasks.jobs.unflushed import Unflushed
from tasks.statements import Relaxed, Row
from workers.execution.claimed_job import ClaimedJob
from workers.execution.held_jobs import HeldJobs
from workers.execution.scheduler import Entry

log = structlog.get_logger(__name__)


class Claimer:
    """Claimer of one epoch. What it claims is held from then on; what it cannot claim goes to `on_unclaimed`."""

    def __init__(
        self,
        engine: Engine,
        device_id: str,
        epoch: int,
        held: HeldJobs,
        unflushed: Unflushed,
        on_unclaimed: Callable[[list[Entry]], None],
        is_stopping: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._relaxed = Relaxed(engine)
        self._device_id = device_id
        self._epoch = epoch
        self._held = held
        self._unflushed = unflushed
        self._on_unclaimed = on_unclaimed
        self._is_stopping = is_stopping

    def claim(self, entries: list[Entry], *, ahead: bool = False) -> list[ClaimedJob]:
        """The jobs that are ours to run, in the scheduler's order. `ahead` of the device: it begins with them later."""
        by_id = {entry.job_id: entry for entry in entries}
        tries = itertools.count()
        try:
            rows = until_reachable(
                lambda: self._claim_rows(entries, ahead=ahead, again=next(tries) > 0), stop=self._is_stopping
            )
        except Exception as error:  # noqa: BLE001 - a claim that fails for good leaves the jobs to the record
            log.error("claim failed", error=str(error), jobs=len(entries))
            rows = []
        jobs = [ClaimedJob(by_id.pop(row["id"]), row, row["request"], ahead=row.get("claimed_at")) for row in rows]
        self._held.add(jobs)
        if by_id:
            self._on_unclaimed(list(by_id.values()))
        jobs.sort(key=lambda job: job.entry.rank)
        return jobs

    def _claim_rows(self, entries: list[Entry], *, ahead: bool, again: bool) -> list[Row]:
        """The rows of what could be claimed. The claim of jobs that may be repeated does not wait for the disk.

        A job that has ended, although PostgreSQL may have lost that end since, is not claimed. `again` after a broken
        connection: what was claimed before it broke is ours.
        """
        unflushed = self._unflushed
        ids = [entry.job_id for entry in entries if entry.job_id not in unflushed]
        claim: Callable[[Connection, Collection[str], str, int], list[Row]]
        claim = claims.claim_ahead if ahead else store.claim

        def claim_and_held(connection: Connection) -> list[Row]:
            held = ends.held_by(connection, ids, self._device_id, self._epoch, ahead=ahead) if again else []
            return held + claim(connection, ids, self._device_id, self._epoch)

        if all(leaves_nothing(entry.kind, entry.needs) for entry in entries):
            return self._relaxed.run(claim_and_held)
        with self._engine.connect() as connection:
            return claim_and_held(connection)
