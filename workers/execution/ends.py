"""How the ends of jobs are recorded, and announced once they are: see `EndRecorder.record`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog
from sqlalchemy import Engine

from device_operations.errors import failure
from device_operations.jobs import State
from tasks.celery_bridge.outbox import Outbox
from tasks.database import until_reachable
from tasks.jobs import lifecycle, store
from tasks.jobs.lifecycle import Outcome
from tasks.jobs.model import Facts
from tasks.jobs.unflushed import Unflushed
from tasks.kinds import spec_of
from tasks.redis.publish import Publisher
from tasks.statements import Row
from workers.execution.claimed_job import ClaimedJob, named
from workers.execution.scheduler import MessageHandle, Scheduler

log = structlog.get_logger(__name__)

#: Seconds before a job that failed retryably is tried again: doubled with each attempt.
RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """A job and its outcome."""

    job: ClaimedJob
    outcome: Outcome

    def serialised(self) -> FinishedJob:
        """The same with its result made, if the device thread left that to be done; an error there fails the job."""
        if self.outcome.pending is None:
            return self
        try:
            self.outcome.result, self.outcome.pending = self.outcome.pending(), None
        except Exception as error:  # noqa: BLE001 - a full blob store is this job's failure, not the completer's
            known = self.outcome.facts
            facts: Facts = {"session_id": known["session_id"]} if "session_id" in known else {}
            return FinishedJob(self.job, self.job.failed(named(error), **facts))
        return self


class EndRecorder:
    """Records ends on the completer's thread."""

    def __init__(
        self,
        engine: Engine,
        publisher: Publisher,
        scheduler: Scheduler,
        outbox: Outbox,
        unflushed: Unflushed,
        epoch: int,
        is_stopping: Callable[[], bool],
        on_models_changed: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._publisher = publisher
        self._scheduler = scheduler
        self._outbox = outbox
        self._unflushed = unflushed
        self._epoch = epoch
        self._is_stopping = is_stopping
        self._on_models_changed = on_models_changed

    def record(self, finished: list[FinishedJob]) -> None:
        """Puts retried jobs back, records the ends of the others, lets their successors run, and announces the ends."""
        ending = [one for one in finished if not self._retried(one)]
        if not ending:
            return
        try:
            rows = self._write(ending)
            rows += self._recovered(ending, rows)
            if any(spec_of(row["kind"]).changes_models for row in rows):
                self._on_models_changed()
        finally:
            # Even if recording failed, the device is free for the next job.
            self._scheduler.ended({one.job.job_id for one in ending})
        self._announce(rows, self._handles(ending, rows))

    def _retried(self, one: FinishedJob) -> bool:
        """Puts a job that failed retryably back, if it has attempts left; deaths of workers do not use them up."""
        job, error = one.job, one.outcome.error or {}
        used = job.row["attempt"]
        if one.outcome.state != State.FAILED or not error.get("retryable") or used >= job.row["max_attempts"]:
            return False

        def put_back() -> Row | None:
            with self._engine.connect() as connection:
                return store.retry(connection, job.row, self._epoch, error, RETRY_SECONDS * 2 ** (used - 1))

        row = until_reachable(put_back, stop=self._is_stopping)
        if row is None:
            return False
        self._scheduler.put_back([job.job_id])
        if job.entry.handle is not None:
            job.entry.handle.dropped()
        self._outbox.retried(row, error)
        log.info("job retries", job_id=job.job_id, attempt=job.row["attempt"], error=error.get("code"))
        return True

    def _write(self, ending: list[FinishedJob]) -> list[Row]:
        """Writes outcomes together; if the database refuses them, each alone, and a refused one as a failure.

        A job whose outcome cannot be written must not stay recorded as running for ever.
        """
        outcomes = [one.outcome for one in ending]
        claimed = {one.job.job_id: one.job.row for one in ending}
        try:
            return until_reachable(
                lambda: lifecycle.finish(self._engine, outcomes, claimed, self._epoch, self._unflushed),
                stop=self._is_stopping,
            )
        except Exception as error:
            if len(ending) > 1:
                return [row for one in ending for row in self._write([one])]
            job, outcome = ending[0].job, ending[0].outcome
            if outcome.state == State.FAILED and not outcome.facts:
                raise
            log.exception("an outcome could not be recorded", job_id=job.job_id)
            unwritten = failure("internal_error", f"the job's outcome could not be recorded: {type(error).__name__}")
            return self._write([FinishedJob(job, job.failed(unwritten))])

    def _recovered(self, ending: list[FinishedJob], rows: list[Row]) -> list[Row]:
        """The rows of jobs that were not found running and have ended all the same: after a crash of PostgreSQL."""
        found = {row["id"] for row in rows}
        missing = [one for one in ending if one.job.job_id not in found]
        if not missing:
            return []
        outcomes = [one.outcome for one in missing]
        claimed = {one.job.job_id: one.job.row for one in missing}
        return until_reachable(
            lambda: lifecycle.recover(self._engine, outcomes, claimed, self._epoch), stop=self._is_stopping
        )

    def _handles(self, ending: list[FinishedJob], rows: list[Row]) -> dict[str, MessageHandle | None]:
        """The message of each job that ended, those included that waited here and were ended by another's end."""
        handles = {one.job.job_id: one.job.entry.handle for one in ending}
        fallen = [row["id"] for row in rows if row["id"] not in handles]
        if fallen:
            entries = {job_id: self._scheduler.discard(job_id) for job_id in fallen}
            handles |= {job_id: entry.handle if entry is not None else None for job_id, entry in entries.items()}
            self._scheduler.ended(fallen)
        return handles

    def _announce(self, rows: list[Row], handles: dict[str, MessageHandle | None]) -> None:
        """Announces ends to gateways and Celery; messages whose jobs another worker ended are dropped."""
        views = lifecycle.announce(self._publisher, rows)
        self._outbox.ended(rows)
        self._outbox.show(row for row in rows if handles[row["id"]] is None)
        for row, view in zip(rows, views, strict=True):
            handle = handles.pop(row["id"])
            if handle is not None:
                handle.ended(view)
        for handle in handles.values():
            if handle is not None:
                handle.dropped()
