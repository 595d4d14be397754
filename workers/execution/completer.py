"""The completer: the thread that writes what came of jobs, and tells everyone, so that the device thread never waits.

executor ─▶ started, progressed, finished ─▶ one statement for all that waited ─▶ scheduler, gateways, Celery
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from sqlalchemy import Engine

from device_operations.errors import failure
from device_operations.jobs import State
from tasks.celery_bridge.outbox import Outbox
from tasks.database import until_reachable
from tasks.inference import models as model_store
from tasks.jobs import claims, lifecycle, store
from tasks.jobs.lifecycle import Outcome
from tasks.jobs.model import Facts
from tasks.jobs.unflushed import ASK_SECONDS, Unflushed
from tasks.kinds import spec_of
from tasks.redis.publish import Publisher
from tasks.statements import Row
from workers.celery_bridge.events import Dispatcher
from workers.celery_bridge.pool import Handle, Note
from workers.execution.claimed_job import ClaimedJob, named
from workers.execution.scheduler import Scheduler
from workers.resident.uses import Uses

log = structlog.get_logger(__name__)

#: Seconds between two writes of one job's progress.
PROGRESS_INTERVAL_SECONDS = 0.2

#: Seconds after which a job that was claimed ahead, and that the device has begun, is recorded as running.
MARK_SECONDS = 0.1

#: Seconds after which it is told at the latest that the device began with jobs, unless it ends them sooner.
STARTED_SECONDS = 0.05

#: Seconds for which a job counts as followed; whoever follows it says so again before that.
FOLLOWED_SECONDS = 60.0

#: Seconds for which a worker that stops waits for PostgreSQL where an announced end may be lost.
CLOSE_SECONDS = 5.0

#: Seconds before a job that failed retryably is tried again: doubled with each attempt.
RETRY_SECONDS = 1.0


#: What wakes the completer and says nothing.
_LOOK = object()


@dataclass(slots=True)
class _Finished:
    work: ClaimedJob
    outcome: Outcome


class Completer:
    """Records in order what the executor hands over. `stop` returns when everything handed over is recorded."""

    def __init__(
        self, engine: Engine, publisher: Publisher, scheduler: Scheduler, device_id: str, epoch: int, outbox: Outbox
    ) -> None:
        self._engine = engine
        self._publisher = publisher
        self._scheduler = scheduler
        self._device_id = device_id
        self._epoch = epoch
        self._outbox = outbox
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        #: Jobs that the device began with, each time with when that was, and that nobody was told of yet.
        self._begun: deque[tuple[float, list[ClaimedJob]]] = deque()
        #: When this thread looks at what there is, if nothing is handed over before.
        self._looks_at = 0.0
        self._told_at: dict[str, float] = {}
        self._running: dict[str, ClaimedJob] = {}
        #: The running jobs that the record still shows as `reserved`, with the time until which it may.
        self._unmarked: dict[str, float] = {}
        self._followed: dict[str, float] = {}
        #: The ends that were announced before PostgreSQL had them on its disk.
        self.unflushed = Unflushed(engine)
        self._uses = Uses()
        self._uses_written_at = time.monotonic()
        self._stopping = threading.Event()
        #: Called once the end of a load or unload is recorded, before anybody hears of it.
        self.on_models_changed: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._record_until_stopped, name="completer", daemon=True)

    def start(self) -> None:
        """Begins to record."""
        self._thread.start()

    def stop(self) -> None:
        """Records what is left, then ends."""
        self._stopping.set()
        self._queue.put(None)
        self._thread.join()

    def started(self, works: list[ClaimedJob]) -> None:
        """The device has begun with jobs. Waking the completer for that alone would take from the device's own run."""
        now = time.monotonic()
        self._begun.append((now, works))
        if self._looks_at > now + STARTED_SECONDS or any(work.job_id in self._followed for work in works):
            self._queue.put(_LOOK)

    def progressed(self, work: ClaimedJob, told: dict[str, Any], *, always: bool = False) -> None:
        """A running job got further; written a few times a second at most, unless `always`."""
        now = time.monotonic()
        if always or now - self._told_at.get(work.job_id, 0.0) >= PROGRESS_INTERVAL_SECONDS:
            self._told_at[work.job_id] = now
            self._queue.put((work, told))

    def finished(self, works: list[ClaimedJob], outcomes: list[Outcome]) -> None:
        """Jobs have their outcomes."""
        self._queue.put([_Finished(work, outcome) for work, outcome in zip(works, outcomes, strict=True)])

    def note(self, write: Callable[[], None]) -> None:
        """Runs `write` on the completer's thread, again while the database is away; its failure costs no job."""

        def step() -> None:
            try:
                until_reachable(write, stop=self._stopping.is_set)
            except Exception:
                log.exception("a note was not written")

        self._queue.put(step)

    def announce(self, rows: list[Row]) -> None:
        """Tells everybody of jobs that ended without having run here."""
        self._scheduler.ended(row["id"] for row in rows)
        lifecycle.announce(self._publisher, rows)
        self._outbox.ended_unseen(rows)

    def call(self, step: Callable[[], None]) -> None:
        """Runs `step` on the completer's thread, after what was handed over before."""
        self._queue.put(step)

    def _record_until_stopped(self) -> None:
        wait_seconds = 1.0
        while True:
            items = self._waiting(wait_seconds)
            busy = bool(items or self._begun)
            self._record(items)
            if self._unmarked:
                self._guarded(self._mark_running)
            self.unflushed.look()
            if any(item is None for item in items):
                self._write_uses()
                self.unflushed.close(CLOSE_SECONDS)
                return
            now = time.monotonic()
            if now - self._uses_written_at > 1.0:
                self._write_uses()
            # While jobs come, they find this thread about to look, and need not wake it.
            wait_seconds = STARTED_SECONDS if busy else ASK_SECONDS if self.unflushed else 1.0
            if self._unmarked:
                wait_seconds = min(wait_seconds, max(0.001, min(self._unmarked.values()) - now))

    def _waiting(self, seconds: float) -> list[Any]:
        """What was handed over, all of it; nothing after so many seconds, or where the device has begun with jobs."""
        items = []
        # In this order: either who begins sees when this thread looks, or this thread sees what was begun.
        self._looks_at = time.monotonic() + seconds
        if self._begun:
            seconds = 0.0
        with suppress(queue.Empty):
            items.append(self._queue.get(timeout=seconds))
            while True:
                items.append(self._queue.get_nowait())
        return items

    def _record(self, items: list[Any]) -> None:
        """Takes the items in order; outcomes that stand together are written together. One that fails, fails alone."""
        while self._begun:
            self._guarded(partial(self._tell_started, *self._begun.popleft()))
        finished: list[_Finished] = []
        for item in items:
            if isinstance(item, list):
                finished += item
                continue
            if item is None or item is _LOOK:
                continue
            if callable(item):
                self._end(finished)
                finished = []
                self._guarded(item)
            else:
                self._guarded(partial(self._tell_progress, *item))
        self._end(finished)

    def _end(self, finished: list[_Finished]) -> None:
        """Records outcomes. Where that fails for good, this worker holds the jobs no longer: see `reconcile`."""
        if finished and not self._guarded(partial(self._finish, finished)):
            self._scheduler.put_back([one.work.job_id for one in finished])

    @staticmethod
    def _guarded(step: Callable[[], None]) -> bool:
        """Runs one step; False where it raised, which must not cost those after it."""
        try:
            step()
        except Exception:
            log.exception("recording failed")
            return False
        return True

    def _tell_started(self, at: float, works: list[ClaimedJob]) -> None:
        for work in works:
            if work.entry.handle is not None:
                work.entry.handle.started(at)
            self._running[work.job_id] = work
            if work.ahead is not None or work.row["celery"] is not None:
                self._unmarked[work.job_id] = at + MARK_SECONDS
        if self._followed:
            self._tell_followers(works)

    def _mark_running(self) -> None:
        """Records that the device has begun with jobs that were claimed ahead of it and have not ended soon after.

        Celery is told so of a direct caller's job that has not, however it was claimed.
        """
        now = time.monotonic()
        due = [job_id for job_id, at in self._unmarked.items() if at <= now]
        if not due:
            return
        for job_id in due:
            del self._unmarked[job_id]
        works = [self._running[job_id] for job_id in due]
        started = {work.job_id: work.row["started_at"] for work in works if work.ahead is not None}
        if started:
            until_reachable(
                lambda: self.unflushed.relaxed.run(
                    lambda connection: claims.mark_begun(connection, started, self._epoch)
                ),
                stop=self._stopping.is_set,
            )
        for work in works:
            self._outbox.started(work.row)

    def follow(self, job_id: str) -> None:
        """Somebody follows the job for the next minute: from now on its states and progress are announced."""

        def note() -> None:
            now = time.monotonic()
            self._followed = {known: until for known, until in self._followed.items() if until > now}
            self._followed[job_id] = now + FOLLOWED_SECONDS
            if job_id in self._running:
                self._tell_followers([self._running[job_id]])

        self.call(note)

    def _tell_followers(self, works: list[ClaimedJob]) -> None:
        """Announces that jobs run, if anybody follows them: most jobs nobody does."""
        followed = [work for work in works if work.job_id in self._followed]
        if followed:
            told = ((work.job_id, {"event": "state", "data": store.view(work.row)}) for work in followed)
            self._publisher.progress(told)

    def _tell_progress(self, work: ClaimedJob, told: dict[str, Any]) -> None:
        def write() -> None:
            with self._engine.connect() as connection:
                store.set_progress(connection, work.job_id, self._epoch, told)

        until_reachable(write, stop=self._stopping.is_set)
        if work.job_id in self._followed:
            self._publisher.progress([(work.job_id, {"event": "progress", "data": {"job_id": work.job_id, **told}})])

    def _finish(self, finished: list[_Finished]) -> None:
        ending = []
        for one in finished:
            self._told_at.pop(one.work.job_id, None)
            self._running.pop(one.work.job_id, None)
            self._unmarked.pop(one.work.job_id, None)
            self._tell_result(one)
            self._uses.add(one.work, one.outcome)
            if not self._retried(one):
                ending.append(one)
        if not ending:
            return
        try:
            rows = self._write(ending)
            rows += self._recovered(ending, rows)
            if any(spec_of(row["kind"]).changes_models for row in rows):
                self.on_models_changed()
        finally:
            # Whatever became of the record, the device is free for the next job.
            self._scheduler.ended({one.work.job_id for one in ending})
        handles = {one.work.job_id: one.work.entry.handle for one in ending}
        fallen = [row["id"] for row in rows if row["id"] not in handles]
        if fallen:
            # They fell with what ended, while they waited here.
            entries = {job_id: self._scheduler.discard(job_id) for job_id in fallen}
            handles |= {job_id: entry.handle if entry is not None else None for job_id, entry in entries.items()}
            self._scheduler.ended(fallen)
        views = lifecycle.announce(self._publisher, rows)
        self._outbox.ended(rows)
        self._outbox.show(row for row in rows if handles[row["id"]] is None)
        for row, view in zip(rows, views, strict=True):
            ended = handles.pop(row["id"])
            if ended is not None:
                ended.ended(view)
        for handle in handles.values():
            if handle is not None:
                handle.dropped()

    def _write(self, ending: list[_Finished]) -> list[Row]:
        """Writes outcomes together; if the database will not have them, each alone, and what it refuses as failed.

        A job whose outcome cannot be written must not stand as running for ever.
        """
        outcomes = [one.outcome for one in ending]
        claimed = {one.work.job_id: one.work.row for one in ending}
        try:
            return until_reachable(
                lambda: lifecycle.finish(self._engine, outcomes, claimed, self._epoch, self.unflushed),
                stop=self._stopping.is_set,
            )
        except Exception as error:
            if len(ending) > 1:
                return [row for one in ending for row in self._write([one])]
            if ending[0].outcome.state == State.FAILED and not ending[0].outcome.facts:
                raise
            log.exception("an outcome could not be recorded", job_id=ending[0].work.job_id)
            unwritten = failure("internal_error", f"the job's outcome could not be recorded: {type(error).__name__}")
            return self._write([_Finished(ending[0].work, ending[0].work.failed(unwritten))])

    def _recovered(self, ending: list[_Finished], rows: list[Row]) -> list[Row]:
        """The rows of those that were not found running, where they ended all the same: after a crash of PostgreSQL."""
        found = {row["id"] for row in rows}
        missing = [one for one in ending if one.work.job_id not in found]
        if not missing:
            return []
        outcomes = [one.outcome for one in missing]
        claimed = {one.work.job_id: one.work.row for one in missing}
        return until_reachable(
            lambda: lifecycle.recover(self._engine, outcomes, claimed, self._epoch), stop=self._stopping.is_set
        )

    def tell_celery(self, row: Row, handle: Handle | Note | None) -> None:
        """Celery's events of a job that ended and did not run here; and its result, where its caller is owed one."""
        self._outbox.ended([row])
        if handle is not None:
            handle.ended(store.view(row))

    def tell_celery_again(self, row: Row, handle: Handle) -> None:
        """The same for a message that came after its job's end."""
        if row["celery"] is not None:
            self._outbox.ended([row])
        elif not handle.header("ignore_result"):
            self._outbox.ended_before(row)
        handle.ended(store.view(row))

    def report_unknown(self, task_id: str, task: str) -> None:
        """Gives Celery the failure of a task that no worker has, as Celery's own worker does."""
        self._outbox.unknown(task_id, task)
        Dispatcher.note("task-failed", task_id, retry=False, exception=f"NotRegistered({task!r})", traceback="")

    def _retried(self, one: _Finished) -> bool:
        """Puts a job that failed retryably back, if it has attempts left; deaths of workers do not use them up."""
        work, outcome = one.work, one.outcome
        used = work.row["attempt"]
        if (
            outcome.state != State.FAILED
            or not (outcome.error or {}).get("retryable")
            or used >= work.row["max_attempts"]
        ):
            return False

        def put_back() -> Row | None:
            with self._engine.connect() as connection:
                return store.retry(
                    connection, work.row, self._epoch, outcome.error or {}, RETRY_SECONDS * 2 ** (used - 1)
                )

        row = until_reachable(put_back, stop=self._stopping.is_set)
        if row is None:
            return False
        self._scheduler.put_back([work.job_id])
        if work.entry.handle is not None:
            work.entry.handle.dropped()
        self._outbox.retried(row, outcome.error or {})
        log.info(
            "job retries", job_id=work.job_id, attempt=work.row["attempt"], error=(outcome.error or {}).get("code")
        )
        return True

    def _tell_result(self, one: _Finished) -> None:
        """Serialises a result that the device's thread left to do; what fails there fails the job."""
        if one.outcome.pending is None:
            return
        try:
            one.outcome.result, one.outcome.pending = one.outcome.pending(), None
        except Exception as error:  # noqa: BLE001 - a blob store that is full is this job's failure, not the completer's
            found = one.outcome.facts
            facts: Facts = {"session_id": found["session_id"]} if "session_id" in found else {}
            one.outcome = one.work.failed(named(error), **facts)

    def _write_uses(self) -> None:
        """Writes how often each model ran: once a second, not once a run."""
        self._uses_written_at = time.monotonic()
        uses = self._uses.take()
        if not uses:
            return
        try:
            with self._engine.connect() as connection:
                model_store.add_runs(connection, uses)
        except Exception as error:  # noqa: BLE001 - statistics may be lost with the database, jobs may not
            log.warning("statistics not written", error=str(error))
