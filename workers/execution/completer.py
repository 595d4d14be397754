"""The completer: the thread that records what became of jobs and announces it, so that the device thread never waits.

    executor ─▶ commands: Finish, ReportProgress, RunStep ─▶ records, in order ─▶ scheduler, gateways, Celery

Consecutive `Finish` commands are recorded in one statement. `started` is not a command: the completer reads it when it
next wakes, since waking it for that alone would take time from the device's run.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import structlog
from sqlalchemy import Engine

from tasks.celery_bridge.outbox import Outbox
from tasks.database import until_reachable
from tasks.inference import models as model_store
from tasks.jobs import lifecycle, store
from tasks.jobs.lifecycle import Outcome
from tasks.jobs.unflushed import ASK_SECONDS, Unflushed
from tasks.redis.publish import Publisher
from tasks.statements import Row
from workers.execution.claimed_job import ClaimedJob, ProgressFacts
from workers.execution.ends import EndRecorder, FinishedJob
from workers.execution.running import RunningJobs
from workers.execution.scheduler import Scheduler
from workers.resident.uses import Uses

log = structlog.get_logger(__name__)

#: Seconds between two writes of one job's progress.
PROGRESS_INTERVAL_SECONDS = 0.2

#: Longest time in seconds from the start of jobs on the device to its announcement, unless they end sooner.
STARTED_SECONDS = 0.05

#: Seconds between two writes of the models' statistics.
USES_INTERVAL_SECONDS = 1.0

#: Longest time in seconds that a worker that stops waits for PostgreSQL to flush ends that were announced before.
CLOSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Finish:
    """Record the outcomes of jobs."""

    jobs: list[FinishedJob]


@dataclass(frozen=True, slots=True)
class ReportProgress:
    """Record a running job's progress."""

    job: ClaimedJob
    facts: ProgressFacts


@dataclass(frozen=True, slots=True)
class RunStep:
    """Run a step after what was handed over before it."""

    step: Callable[[], None]


@dataclass(frozen=True, slots=True)
class ReadStarted:
    """Read the jobs that have started."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Record what is left, then end."""


Command: TypeAlias = Finish | ReportProgress | RunStep | ReadStarted | Stop

_READ_STARTED = ReadStarted()


class Completer:
    """Records in order what the executor hands over. `stop` returns when everything handed over is recorded.

    `on_models_changed` is called when the end of a load or unload is recorded, before it is announced.
    """

    def __init__(
        self,
        engine: Engine,
        publisher: Publisher,
        scheduler: Scheduler,
        device_id: str,
        epoch: int,
        outbox: Outbox,
        on_models_changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._publisher = publisher
        self._scheduler = scheduler
        self._device_id = device_id
        self._epoch = epoch
        self._outbox = outbox
        self._queue: queue.SimpleQueue[Command] = queue.SimpleQueue()
        #: When this thread wakes if no command comes before, by the monotonic clock.
        self._looks_at = 0.0
        self._reported_at: dict[str, float] = {}
        #: The ends that were announced before PostgreSQL had flushed them to its disk.
        self.unflushed = Unflushed(engine)
        self._uses = Uses()
        self._uses_written_at = time.monotonic()
        self._stopping = threading.Event()
        self._running = RunningJobs(publisher, outbox, self.unflushed, epoch, self._stopping.is_set)
        self._ends = EndRecorder(
            engine, publisher, scheduler, outbox, self.unflushed, epoch, self._stopping.is_set,
            on_models_changed,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._record_until_stopped, name="completer", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Records what is left, then ends."""
        self._stopping.set()
        self._queue.put(Stop())
        self._thread.join()

    def started(self, jobs: list[ClaimedJob]) -> None:
        """The device has begun jobs. Wakes the thread only if it sleeps for long or a client follows one of them."""
        now = time.monotonic()
        self._running.begun.append((now, jobs))
        if self._looks_at > now + STARTED_SECONDS or self._running.is_followed(jobs):
            self._queue.put(_READ_STARTED)

    def progressed(self, job: ClaimedJob, facts: ProgressFacts, *, always: bool = False) -> None:
        """A running job made progress; written at most once in PROGRESS_INTERVAL_SECONDS.

        `always`, and the last of counted steps, are written at once: the job's record keeps them when it has ended.
        """
        now = time.monotonic()
        is_last = "done" in facts and facts["done"] == facts.get("total")
        if always or is_last or now - self._reported_at.get(job.job_id, 0.0) >= PROGRESS_INTERVAL_SECONDS:
            self._reported_at[job.job_id] = now
            self._queue.put(ReportProgress(job, facts))

    def finished(self, jobs: list[ClaimedJob], outcomes: list[Outcome]) -> None:
        """Jobs have their outcomes."""
        self._queue.put(Finish([FinishedJob(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True)]))

    def call(self, step: Callable[[], None]) -> None:
        """Runs `step` on the completer's thread, after what was handed over before."""
        self._queue.put(RunStep(step))

    def note(self, write: Callable[[], None]) -> None:
        """Runs `write` on the completer's thread, again while the database is away; its failure fails no job."""

        def step() -> None:
            try:
                until_reachable(write, stop=self._stopping.is_set)
            except Exception:
                log.exception("a note was not written")

        self.call(step)

    def follow(self, job_id: str) -> None:
        """A client follows the job for the next minute: its states and progress are announced."""
        self.call(lambda: self._running.follow(job_id))

    def announce(self, rows: list[Row]) -> None:
        """Announces jobs that ended without having run here."""
        self._scheduler.ended(row["id"] for row in rows)
        lifecycle.announce(self._publisher, rows)
        self._outbox.ended_unseen(rows)

    # ---- the completer's thread

    def _record_until_stopped(self) -> None:
        wait_seconds = 1.0
        while True:
            commands = self._receive(wait_seconds)
            busy = bool(commands or self._running.begun)
            self._record(commands)
            if self._running.has_unmarked:
                _guarded(self._running.mark_overdue)
            self.unflushed.look()
            if any(isinstance(command, Stop) for command in commands):
                self._write_uses()
                self.unflushed.close(CLOSE_SECONDS)
                return
            now = time.monotonic()
            if now - self._uses_written_at > USES_INTERVAL_SECONDS:
                self._write_uses()
            # While jobs come, this thread wakes soon by itself, and nothing needs to wake it.
            wait_seconds = STARTED_SECONDS if busy else ASK_SECONDS if self.unflushed else 1.0
            if self._running.has_unmarked:
                wait_seconds = min(wait_seconds, max(0.001, self._running.next_mark_at() - now))

    def _receive(self, seconds: float) -> list[Command]:
        """All commands that wait; none after so many seconds, or at once if jobs have started."""
        commands: list[Command] = []
        # In this order: either `started` sees when this thread wakes, or this thread sees what has started.
        self._looks_at = time.monotonic() + seconds
        if self._running.begun:
            seconds = 0.0
        with suppress(queue.Empty):
            commands.append(self._queue.get(timeout=seconds))
            while True:
                commands.append(self._queue.get_nowait())
        return commands

    def _record(self, commands: list[Command]) -> None:
        """Carries out commands in order; outcomes between two calls are recorded together. Each failure stands alone.

        Progress does not split outcomes: it belongs to jobs that are still running.
        """
        while self._running.begun:
            _guarded(self._running.take_begun)
        finished: list[FinishedJob] = []
        for command in commands:
            match command:
                case Finish(jobs):
                    finished += jobs
                case ReportProgress(job, facts):
                    _guarded(partial(self._write_progress, job, facts))
                case RunStep(step):
                    self._end(finished)
                    finished = []
                    _guarded(step)
                case ReadStarted() | Stop():
                    pass
        self._end(finished)

    def _end(self, finished: list[FinishedJob]) -> None:
        """Records outcomes. If that fails for good, this worker gives the jobs up: see `reconcile`."""
        if finished and not _guarded(lambda: self._finish(finished)):
            self._scheduler.put_back([one.job.job_id for one in finished])

    def _finish(self, finished: list[FinishedJob]) -> None:
        for one in finished:
            self._reported_at.pop(one.job.job_id, None)
            self._running.discard(one.job.job_id)
        serialised = [one.serialised() for one in finished]
        for one in serialised:
            self._uses.add(one.job, one.outcome)
        self._ends.record(serialised)

    def _write_progress(self, job: ClaimedJob, facts: ProgressFacts) -> None:
        def write() -> None:
            with self._engine.connect() as connection:
                store.set_progress(connection, job.job_id, self._epoch, facts)

        until_reachable(write, stop=self._stopping.is_set)
        if self._running.is_followed([job]):
            self._publisher.progress([(job.job_id, {"event": "progress", "data": {"job_id": job.job_id, **facts}})])

    def _write_uses(self) -> None:
        """Writes how often each model ran: once in USES_INTERVAL_SECONDS, not once a run."""
        self._uses_written_at = time.monotonic()
        uses = self._uses.take()
        if not uses:
            return
        try:
            with self._engine.connect() as connection:
                model_store.add_runs(connection, uses)
        except Exception as error:  # noqa: BLE001 - statistics may be lost with the database, jobs may not
            log.warning("statistics not written", error=str(error))


def _guarded(step: Callable[[], None]) -> bool:
    """Runs one step; False if it raised, which must not affect the steps after it."""
    try:
        step()
    except Exception:
        log.exception("recording failed")
        return False
    return True
