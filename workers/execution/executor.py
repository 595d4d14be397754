"""The executor: the one thread that makes device calls. `_run_entries` and `_run` are one job's way through it.

    take ─▶ claim (guarded, under our epoch) ─▶ begin ─▶ perform ─▶ settle ─▶ completer
            └ also ahead: the next batches of runs, while another is on the device

A long job is a generator: between its steps the executor first runs more urgent entries of the scheduler. Any exception
of a job is that job's outcome; only the loss of the device ends the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import structlog
from sqlalchemy import Engine

from device_operations.errors import OperationError, failure
from device_operations.jobs import State
from device_operations.wire.json_types import JsonObject
from tasks.jobs import lifecycle
from tasks.jobs.lifecycle import Outcome
from workers.execution.claim_ahead import ClaimAhead
from workers.execution.claimed_job import (
    ClaimedJob,
    Detached,
    Performed,
    PlaceReleased,
    Progress,
    Steps,
    clear_calls,
    named,
)
from workers.execution.claiming import Claimer
from workers.execution.completer import Completer
from workers.execution.held_jobs import HeldJobs
from workers.execution.scheduler import Entry, Scheduler
from workers.lease import Lease
from workers.operations import BATCHES, OPERATIONS
from workers.operations.inference import read_ahead
from workers.operations.pipelines import takes_steps
from workers.resident.residents import Resident

log = structlog.get_logger(__name__)

#: The exit status of a worker whose device was lost: its supervisor starts it again.
DEVICE_LOST_STATUS = 75


@dataclass(frozen=True, slots=True, eq=False)
class _Paused:
    """A long job between two steps."""

    job: ClaimedJob
    steps: Steps


class Executor:
    """Runs jobs on one device until stopped."""

    def __init__(
        self,
        scheduler: Scheduler,
        lease: Lease,
        resident: Resident,
        completer: Completer,
        engine: Engine,
        *,
        on_unclaimed: Callable[[list[Entry]], None],
        on_device_lost: Callable[[OperationError], None],
    ) -> None:
        self._scheduler = scheduler
        self._lease = lease
        self._resident = resident
        self._completer = completer
        self._on_device_lost = on_device_lost
        self.held = HeldJobs()
        self._paused: list[_Paused] = []
        self._inbox: list[Callable[[], None]] = []
        self._stopping = threading.Event()
        self._lost: OperationError | None = None
        self._claimer = Claimer(
            engine, resident.device_id, lease.epoch, self.held, completer.unflushed, on_unclaimed, self._stopping.is_set
        )
        self._ahead = ClaimAhead(
            scheduler,
            lambda entries: self._claimer.claim(entries, ahead=True),
            lambda jobs: read_ahead(resident, jobs),
            self._may_begin,
        )
        self.busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run_until_stopped, name="device", daemon=True)

    def start(self) -> None:
        """Begins to run jobs."""
        self._ahead.start()
        self._thread.start()

    def stop(self, *, cold: bool = False) -> None:
        """Finishes running jobs, or with `cold` cancels them, and returns when the device is idle."""
        self._stopping.set()
        if cold:
            self.held.close()
            for job in self.held.begun():
                job.cancel.trip("cancelled")
        self._scheduler.wake()
        self._thread.join()
        self._resident.background.shutdown()

    def call(self, step: Callable[[], None]) -> None:
        """Runs `step` on the device's thread before the next job."""
        self._inbox.append(step)
        self._scheduler.wake()

    def cancel(self, job_id: str, code: str = "cancelled") -> bool:
        """Stops a running job at its next step or node, and a claimed one at once; False if this worker has neither."""
        waiting = self.held.withdraw(job_id)
        if waiting is not None:
            self._end_unbegun(waiting, State.CANCELLED, lifecycle.CANCELLED)
            return True
        job = self.held.get_begun(job_id)
        if job is None:
            return False
        job.cancel.trip(code)
        return True

    def check_deadlines(self) -> None:
        """Stops running jobs whose time is up, and ends claimed ones that have waited past their expiry."""
        now = time.monotonic()
        for job in self.held.begun():
            if job.deadline is not None and now >= job.deadline:
                seconds = job.row["timeout_seconds"]
                job.cancel.trip("timeout", f"The job ran longer than job.timeout_seconds = {seconds:g} s.")
        for job in self.held.withdraw_overdue():
            self._end_unbegun(job, State.EXPIRED, lifecycle.expired(job.row))

    def running(self) -> list[str]:
        """Ids of the jobs that hold the device or are between two steps."""
        return [job.job_id for job in self.held.begun()]

    def entries(self, *, running: bool) -> list[Entry]:
        """Entries of the jobs that run, or of those that are claimed and wait for the device."""
        return [job.entry for job in (self.held.begun() if running else self.held.waiting())]

    def _end_unbegun(self, job: ClaimedJob, state: State, error: JsonObject) -> None:
        self._scheduler.finishing([job.job_id])
        self._completer.finished([job], [job.withdrawn(state, error)])

    # ---- the device's thread: what to do next

    def _run_until_stopped(self) -> None:
        while True:
            while self._inbox:
                self._run_housekeeping(self._inbox.pop(0))
            serving = self._resident.transfers is not None and self._resident.transfers.serve()
            claimed = self._ahead.peek()
            if self._stopping.is_set() and not self._paused and not claimed:
                self._ahead.close()
                return
            if claimed:
                self._run_claimed_ahead(claimed)
            elif self._paused:
                self._run_next_step()
            elif self._may_begin():
                self._use_spare_time()
                self._run_entries(self._scheduler.take(timeout_seconds=0 if serving else 0.5))
            elif not serving:
                time.sleep(0.05)

    def _may_begin(self) -> bool:
        """Whether this worker may take jobs from its scheduler now."""
        return self._lease.safe and not self._lease.draining and not self._stopping.is_set()

    def _run_claimed_ahead(self, claimed: list[ClaimedJob]) -> None:
        """Runs the next batch that was claimed ahead, unless the scheduler holds a more urgent entry by now."""
        urgency = max([job.entry.effective for job in claimed])
        if self._scheduler.most_urgent > urgency and self._may_begin():
            sooner = self._scheduler.take(timeout_seconds=0, above=urgency)
            if sooner:
                self._run_entries(sooner)
                return
        self._run(self._ahead.take())

    def _run_next_step(self) -> None:
        """One step of the most urgent paused job, unless the scheduler holds a more urgent entry."""
        paused = max(self._paused, key=lambda one: (one.job.entry.effective, -one.job.entry.seq))
        if self._may_begin():
            urgent = self._scheduler.take(timeout_seconds=0, above=paused.job.entry.effective)
            if urgent:
                self._run_entries(urgent)
                return
        # Only this job waits: it delays less now than the same work would delay other jobs later.
        self._use_spare_time()
        self._advance(paused)

    def _use_spare_time(self) -> None:
        """Does one of the deferred steps, if no job waits."""
        if self._resident.spare and not len(self._scheduler):
            self._run_housekeeping(self._resident.spare.popleft())

    # ---- one job's way

    def _run_entries(self, entries: list[Entry]) -> None:
        """Claimer and runs entries that were taken together, with more of their batch if it may be waited for."""
        if not entries:
            return
        head = entries[0]
        if head.batch_delay_seconds and len(entries) < head.batch_limit:
            entries = [*entries, *self._scheduler.mates(head, head.batch_limit - len(entries))]
        claimed = self._claimer.claim(entries)
        if claimed:
            self._run(claimed)

    def _run(self, claimed: list[ClaimedJob]) -> None:
        """Begins, performs and settles claimed jobs: several of one batch together, others one by one."""
        jobs = self._begin(claimed)
        if not jobs:
            return
        began = jobs[0].started
        if jobs[0].kind in BATCHES and not takes_steps(self._resident, jobs[0]):
            self._finish(jobs, self._perform_together(jobs))
        else:
            for job in jobs:
                self._settle(job, self._perform(job))
        self.busy_seconds += time.perf_counter() - began

    def _begin(self, claimed: list[ClaimedJob]) -> list[ClaimedJob]:
        """Those of the jobs that have not been withdrawn, with their deadlines; reported as started."""
        jobs = self.held.begin(claimed)
        if jobs:
            began = time.perf_counter()
            for job in jobs:
                if job.row["timeout_seconds"] is not None:
                    job.deadline = time.monotonic() + job.row["timeout_seconds"]
                job.started = began
            self._completer.started(jobs)
        return jobs

    def _perform_together(self, jobs: list[ClaimedJob]) -> list[Outcome]:
        """Performs jobs of one batch; the next batches are claimed meanwhile."""
        if not self._paused:
            self._ahead.begin(self._resident.device_ms(jobs[0].request.get("model_id")), jobs[0].entry.needs)
        try:
            return BATCHES[jobs[0].kind](self._resident, jobs)
        except BaseException as error:  # noqa: BLE001 - no exception of a job may stop the executor
            return [self._failed(job, error) for job in jobs]
        finally:
            self._ahead.end()

    def _perform(self, job: ClaimedJob) -> Performed | Steps:
        """Performs a job, or prepares one that goes in steps."""
        operation = OPERATIONS.get(job.kind)
        try:
            if operation is None:
                raise failure("validation_failed", f"this worker has no operation for {job.kind}")
            job.cancel.check()
            return operation(self._resident, job)
        except BaseException as error:  # noqa: BLE001 - no exception of a job may stop the executor
            return self._failed(job, error)

    def _settle(self, job: ClaimedJob, performed: Performed | Steps) -> None:
        """Goes on with what performing a job gave: its outcome, an outcome made without the device, or its steps."""
        match performed:
            case Outcome():
                self._finish([job], [performed])
            case PlaceReleased(outcome, resource_id):
                self._scheduler.pass_by(job.job_id, resource_id)
                self._finish([job], [outcome])
            case Detached(finish, resource_id):
                self._scheduler.pass_by(job.job_id, resource_id)
                self._resident.background.submit(self._finish_detached, job, finish)
            case Generator():
                paused = _Paused(job, performed)
                self._paused.append(paused)
                self._advance(paused)

    def _finish_detached(self, job: ClaimedJob, finish: Callable[[], Outcome]) -> None:
        """Makes an outcome on a background thread."""
        try:
            outcome = finish()
        except BaseException as error:  # noqa: BLE001 - any exception of a job is its outcome, on any thread
            outcome = self._failed(job, error)
        self._finish([job], [outcome])

    def _advance(self, paused: _Paused) -> None:
        """One step of a long job; a job that was cancelled is stopped where it paused."""
        job = paused.job
        began = time.perf_counter()
        try:
            progress = self._next(paused)
            if progress.facts is not None:
                self._completer.progressed(job, progress.facts, always=progress.always)
        except StopIteration as stop:
            self._paused.remove(paused)
            self._settle(job, stop.value)
        except BaseException as error:  # noqa: BLE001 - no exception of a job may stop the executor
            self._paused.remove(paused)
            self._close(paused)
            self._settle(job, self._failed(job, error))
        self.busy_seconds += time.perf_counter() - began

    @staticmethod
    def _next(paused: _Paused) -> Progress:
        try:
            paused.job.cancel.check()
        except OperationError as error:
            return paused.steps.throw(error)
        return next(paused.steps)

    def _close(self, paused: _Paused) -> None:
        """Runs the `finally` of a generator that will not go on."""
        try:
            paused.steps.close()
        except BaseException as error:  # noqa: BLE001 - cleaning up after a job must not stop the executor either
            log.warning("a stopped job failed to clean up", job_id=paused.job.job_id, error=str(error))

    def _finish(self, jobs: list[ClaimedJob], outcomes: list[Outcome]) -> None:
        """Hands outcomes to the completer."""
        self.held.discard(jobs)
        self._scheduler.finishing([job.job_id for job in jobs])
        self._completer.finished(jobs, outcomes)
        self._leave_if_lost()

    # ---- failing

    def _failed(self, job: ClaimedJob, error: BaseException) -> Outcome:
        return job.failed(self._classified(error))

    def _classified(self, error: BaseException) -> OperationError:
        """The error with its code; the loss of the device also ends this process once its jobs are recorded."""
        known = named(error, self._resident.device)
        if known.code == "internal_error":
            log.error("operation failed", error=known.message, exc_info=error)
        if known.code == "out_of_memory":
            clear_calls(error, self._resident.device)
        if known.code == "device_lost":
            self._stopping.set()
            self._lost = known
        return known

    def _leave_if_lost(self) -> None:
        """Ends the process if its device is lost, after the outcomes of that have gone to the completer."""
        if self._lost is not None:
            self.held.close()
            lost, self._lost = self._lost, None
            self._on_device_lost(lost)

    def _run_housekeeping(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BaseException as error:
            log.error("housekeeping failed", error=self._classified(error).message, exc_info=error)
            self._leave_if_lost()
