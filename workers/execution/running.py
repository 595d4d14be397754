"""The jobs that the device has begun, as the completer sees them: recorded as running, and announced to followers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from tasks.celery_bridge.outbox import Outbox
from tasks.database import until_reachable
from tasks.jobs import claims, store
from tasks.jobs.unflushed import Unflushed
from tasks.redis.publish import Publisher
from workers.execution.claimed_job import ClaimedJob

#: Seconds after which a job that was claimed ahead and has begun on the device is recorded as running.
MARK_SECONDS = 0.1

#: Seconds for which a job counts as followed; its follower repeats the request before that.
FOLLOWED_SECONDS = 60.0


class RunningJobs:
    """Running jobs by id. Only `begun` and `is_followed` are for other threads than the completer's."""

    def __init__(
        self, publisher: Publisher, outbox: Outbox, unflushed: Unflushed, epoch: int, is_stopping: Callable[[], bool]
    ) -> None:
        self._publisher = publisher
        self._outbox = outbox
        self._unflushed = unflushed
        self._epoch = epoch
        self._is_stopping = is_stopping
        #: Jobs that the device has begun and that `take_begun` has not read, each group with its monotonic time.
        self.begun: deque[tuple[float, list[ClaimedJob]]] = deque()
        self._running: dict[str, ClaimedJob] = {}
        #: The running jobs that the record still shows as `reserved`, with the time at which they are to be marked.
        self._unmarked: dict[str, float] = {}
        self._followed: dict[str, float] = {}

    @property
    def has_unmarked(self) -> bool:
        """Whether the record may still show a running job as `reserved`."""
        return bool(self._unmarked)

    def next_mark_at(self) -> float:
        """When the next unmarked job is to be marked, by the monotonic clock; there must be one."""
        return min(self._unmarked.values())

    def is_followed(self, jobs: Iterable[ClaimedJob]) -> bool:
        """Whether a client follows any of the jobs."""
        return any(job.job_id in self._followed for job in jobs)

    def take_begun(self) -> None:
        """Reads the oldest group of jobs that the device has begun, and reports them to Celery and to followers."""
        at, jobs = self.begun.popleft()
        for job in jobs:
            if job.entry.handle is not None:
                job.entry.handle.started(at)
            self._running[job.job_id] = job
            if job.ahead is not None or job.row["celery"] is not None:
                self._unmarked[job.job_id] = at + MARK_SECONDS
        if self._followed:
            self._announce(jobs)

    def discard(self, job_id: str) -> None:
        """The job has its outcome."""
        self._running.pop(job_id, None)
        self._unmarked.pop(job_id, None)

    def mark_overdue(self) -> None:
        """Records as running the jobs that were claimed ahead and have run for MARK_SECONDS.

        Celery is given the start of a direct caller's job after the same time, however the job was claimed.
        """
        now = time.monotonic()
        due = [job_id for job_id, at in self._unmarked.items() if at <= now]
        if not due:
            return
        for job_id in due:
            del self._unmarked[job_id]
        jobs = [self._running[job_id] for job_id in due]
        started = {job.job_id: job.row["started_at"] for job in jobs if job.ahead is not None}
        if started:
            until_reachable(
                lambda: self._unflushed.relaxed.run(
                    lambda connection: claims.mark_begun(connection, started, self._epoch)
                ),
                stop=self._is_stopping,
            )
        for job in jobs:
            self._outbox.started(job.row)

    def follow(self, job_id: str) -> None:
        """A client follows the job for the next FOLLOWED_SECONDS."""
        now = time.monotonic()
        self._followed = {known: until for known, until in self._followed.items() if until > now}
        self._followed[job_id] = now + FOLLOWED_SECONDS
        if job_id in self._running:
            self._announce([self._running[job_id]])

    def _announce(self, jobs: list[ClaimedJob]) -> None:
        """Announces that jobs run, if a client follows them; most jobs have no follower."""
        followed = [job for job in jobs if job.job_id in self._followed]
        if followed:
            self._publisher.progress((job.job_id, {"event": "state", "data": store.view(job.row)}) for job in followed)
