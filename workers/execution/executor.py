"""The executor: the one thread that makes device calls. It takes from the scheduler, claims, performs, hands over.

    take ─▶ claim (guarded, under our epoch) ─▶ perform ─▶ completer
            ahead: the next batches of runs, while one is performed

A long job is a generator: between its steps the executor first runs whatever in the scheduler is more urgent. Whatever
a job raises is that job's outcome; only the loss of the device ends the process.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Connection, Engine

from device_operations.errors import OperationError, failure
from device_operations.jobs import State
from tasks.database import until_reachable
from tasks.jobs import claims, lifecycle, store
from tasks.jobs import lost_ends as ends
from tasks.jobs.lifecycle import Outcome, leaves_nothing
from tasks.statements import Relaxed, Row
from workers.execution.claim_ahead import ClaimAhead
from workers.execution.claimed_job import ClaimedJob, Detached, PlaceReleased, Progress, Steps, clear_calls, named
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


#: `jobs.claim` or `claims.claim_ahead`.
Claim = Callable[[Connection, Collection[str], str, int], list[Row]]


@dataclass(slots=True, eq=False)
class _Paused:
    """A long job between two steps."""

    work: ClaimedJob
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
        self._engine = engine
        self._on_unclaimed = on_unclaimed
        self._on_device_lost = on_device_lost
        self.held = HeldJobs()
        self._paused: list[_Paused] = []
        self._inbox: list[Callable[[], None]] = []
        self._stopping = threading.Event()
        self._lost: OperationError | None = None
        self._ahead = ClaimAhead(
            scheduler, self._claim_ahead, lambda works: read_ahead(resident, works), self._may_begin
        )
        self._relaxed = Relaxed(engine)
        self.busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run_until_stopped, name="device", daemon=True)

    def start(self) -> None:
        """Begins to run jobs."""
        self._ahead.start()
        self._thread.start()

    def stop(self, *, cold: bool = False) -> None:
        """Finishes what is running, or with `cold` tells it to end, and returns when the device is idle."""
        self._stopping.set()
        if cold:
            self.held.close()
            for work in self.held.begun():
                work.cancel.trip("cancelled")
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
        work = self.held.get_begun(job_id)
        if work is None:
            return False
        work.cancel.trip(code)
        return True

    def check_deadlines(self) -> None:
        """Stops running jobs whose time is up, and ends claimed ones that have waited past their expiry."""
        now = time.monotonic()
        for work in self.held.begun():
            if work.deadline is not None and now >= work.deadline:
                seconds = work.row["timeout_seconds"]
                work.cancel.trip("timeout", f"The job ran longer than job.timeout_seconds = {seconds:g} s.")
        for work in self.held.withdraw_overdue():
            self._end_unbegun(work, State.EXPIRED, lifecycle.expired(work.row))

    def running(self) -> list[str]:
        """Ids of the jobs that hold the device or are between two steps."""
        return [work.job_id for work in self.held.begun()]

    def entries(self, *, running: bool) -> list[Entry]:
        """Entries of the jobs that run, or of those that are claimed and wait for the device."""
        return [work.entry for work in (self.held.begun() if running else self.held.waiting())]

    def _end_unbegun(self, work: ClaimedJob, state: State, error: dict[str, Any]) -> None:
        self._scheduler.finishing([work.job_id])
        self._completer.finished([work], [work.withdrawn(state, error)])

    # ---- the device's thread

    def _run_until_stopped(self) -> None:
        while True:
            while self._inbox:
                self._guarded(self._inbox.pop(0))
            serving = self._resident.transfers is not None and self._resident.transfers.serve()
            claimed = self._ahead.peek()
            if self._stopping.is_set() and not self._paused and not claimed:
                self._ahead.close()
                return
            if claimed:
                self._perform_next(claimed)
            elif self._paused:
                self._go_on()
            elif self._lease.safe and not self._lease.draining:
                self._use_spare_time()
                self._begin(self._scheduler.take(timeout_seconds=0 if serving else 0.5))
            elif not serving:
                time.sleep(0.05)

    def _may_begin(self) -> bool:
        """Whether this worker may take jobs from its scheduler now."""
        return self._lease.safe and not self._lease.draining and not self._stopping.is_set()

    def _perform_next(self, claimed: list[ClaimedJob]) -> None:
        """Performs what was claimed ahead, unless the scheduler holds something more urgent by now."""
        urgent = max([work.entry.effective for work in claimed])
        if self._scheduler.most_urgent > urgent and self._may_begin():
            sooner = self._scheduler.take(timeout_seconds=0, above=urgent)
            if sooner:
                self._begin(sooner)
                return
        self._perform_claimed(self._ahead.take())

    def _go_on(self) -> None:
        """One step of the most urgent paused job, unless the scheduler holds something more urgent still."""
        paused = max(self._paused, key=lambda one: (one.work.entry.effective, -one.work.entry.seq))
        if self._may_begin():
            urgent = self._scheduler.take(timeout_seconds=0, above=paused.work.entry.effective)
            if urgent:
                self._begin(urgent)
                return
        # Nobody but this job waits: a few of its steps' time now is less than somebody's later.
        self._use_spare_time()
        self._advance(paused)

    def _use_spare_time(self) -> None:
        """Does one of the things that can wait, while no job does."""
        if self._resident.spare and not len(self._scheduler):
            self._guarded(self._resident.spare.popleft())

    def _begin(self, entries: list[Entry]) -> None:
        if not entries:
            return
        head = entries[0]
        if head.batch_delay_seconds and len(entries) < head.batch_limit:
            entries = [*entries, *self._scheduler.mates(head, head.batch_limit - len(entries))]
        works = self._claim(entries)
        if works:
            self._perform_claimed(works)

    def _perform_claimed(self, claimed: list[ClaimedJob]) -> None:
        works = self.held.begin(claimed)
        if not works:
            return
        began = time.perf_counter()
        for work in works:
            if work.row["timeout_seconds"] is not None:
                work.deadline = time.monotonic() + work.row["timeout_seconds"]
            work.started = began
        self._completer.started(works)
        if works[0].kind in BATCHES and not takes_steps(self._resident, works[0]):
            if not self._paused:
                self._ahead.begin(self._resident.device_ms(works[0].request.get("model_id")), works[0].entry.needs)
            outcomes = self._perform_batch(works)
            self._ahead.end()
            self._finish(works, outcomes)
        else:
            for work in works:
                self._perform(work)
        self.busy_seconds += time.perf_counter() - began

    def _claim_ahead(self, entries: list[Entry]) -> list[ClaimedJob]:
        return self._claim(entries, claims.claim_ahead)

    def _claim(self, entries: list[Entry], claim: Claim = store.claim) -> list[ClaimedJob]:
        """The entries that are ours to run; the others go back to the prefetch, which finds out why."""
        by_id = {entry.job_id: entry for entry in entries}
        tries = itertools.count()
        try:
            rows = until_reachable(
                lambda: self._claim_rows(entries, claim, again=next(tries) > 0), stop=self._stopping.is_set
            )
        except Exception as error:  # noqa: BLE001 - a claim that fails for good leaves the jobs to the record
            log.error("claim failed", error=str(error), jobs=len(entries))
            rows = []
        works = [ClaimedJob(by_id.pop(row["id"]), row, row["request"], ahead=row.get("claimed_at")) for row in rows]
        self.held.add(works)
        if by_id:
            self._on_unclaimed(list(by_id.values()))
        works.sort(key=lambda work: work.entry.rank)
        return works

    def _claim_rows(self, entries: list[Entry], claim: Claim, *, again: bool) -> list[Row]:
        """The rows of what could be claimed. The claim of what may be begun again does not wait for the disk.

        What ended already, and may have been lost since, is not claimed. `again` after a broken connection: what it
        claimed before it broke is ours.
        """
        unflushed = self._completer.unflushed
        ids = [entry.job_id for entry in entries if entry.job_id not in unflushed]
        device_id, epoch = self._resident.device_id, self._lease.epoch

        def claim_and_held(connection: Connection) -> list[Row]:
            ahead = claim is claims.claim_ahead
            held = ends.held_by(connection, ids, device_id, epoch, ahead=ahead) if again else []
            return held + claim(connection, ids, device_id, epoch)

        if all(leaves_nothing(entry.kind, entry.needs) for entry in entries):
            return self._relaxed.run(claim_and_held)
        with self._engine.connect() as connection:
            return claim_and_held(connection)

    def _perform_batch(self, works: list[ClaimedJob]) -> list[Outcome]:
        try:
            return BATCHES[works[0].kind](self._resident, works)
        except BaseException as error:  # noqa: BLE001 - nothing a job raises may stop the scheduler
            return [work.failed(self._noted(error)) for work in works]

    def _perform(self, work: ClaimedJob) -> None:
        operation = OPERATIONS.get(work.kind)
        try:
            if operation is None:
                raise failure("validation_failed", f"this worker has no operation for {work.kind}")
            work.cancel.check()
            made = operation(self._resident, work)
        except BaseException as error:  # noqa: BLE001 - nothing a job raises may stop the scheduler
            self._finish([work], [work.failed(self._noted(error))])
            return
        if isinstance(made, Generator):
            paused = _Paused(work, made)
            self._paused.append(paused)
            self._advance(paused)
        else:
            self._made(work, made)

    def _made(self, work: ClaimedJob, made: Outcome | PlaceReleased | Detached) -> None:
        """A job is done with the device: it has its outcome, or gets it on a thread beside."""
        if isinstance(made, PlaceReleased):
            self._scheduler.pass_by(work.job_id, made.resource_id)
            made = made.outcome
        if not isinstance(made, Detached):
            self._finish([work], [made])
            return
        self._scheduler.pass_by(work.job_id, made.resource_id)

        def finish() -> None:
            try:
                outcome = made.finish()
            except BaseException as error:  # noqa: BLE001 - whatever a job raises is its outcome, on any thread
                outcome = work.failed(self._noted(error))
            self._finish([work], [outcome])

        self._resident.background.submit(finish)

    def _advance(self, paused: _Paused) -> None:
        work = paused.work
        began = time.perf_counter()
        try:
            told = self._next(paused)
            if isinstance(told, Progress) and told.told is not None:
                self._completer.progressed(work, told.told, always=told.always)
        except StopIteration as stop:
            self._paused.remove(paused)
            self._made(work, stop.value)
        except BaseException as error:  # noqa: BLE001 - nothing a job raises may stop the scheduler
            self._paused.remove(paused)
            self._close(paused)
            self._finish([work], [work.failed(self._noted(error))])
        self.busy_seconds += time.perf_counter() - began

    @staticmethod
    def _next(paused: _Paused) -> Any:
        """The next step; a job that was told to stop hears of it where it paused, and may say how far it came."""
        try:
            paused.work.cancel.check()
        except OperationError as error:
            return paused.steps.throw(error)
        return next(paused.steps)

    def _close(self, paused: _Paused) -> None:
        """Lets a generator that will not go on run its `finally`."""
        try:
            paused.steps.close()
        except BaseException as error:  # noqa: BLE001 - cleaning up after a job must not stop the scheduler either
            log.warning("a stopped job failed to clean up", job_id=paused.work.job_id, error=str(error))

    def _finish(self, works: list[ClaimedJob], outcomes: list[Outcome]) -> None:
        self.held.discard(works)
        self._scheduler.finishing([work.job_id for work in works])
        self._completer.finished(works, outcomes)
        self._leave_if_lost()

    def _leave_if_lost(self) -> None:
        """Ends the process once its device is lost, after the outcomes of that have gone to the completer."""
        if self._lost is not None:
            self.held.close()
            lost, self._lost = self._lost, None
            self._on_device_lost(lost)

    def _noted(self, error: BaseException) -> OperationError:
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

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BaseException as error:
            log.error("housekeeping failed", error=self._noted(error).message, exc_info=error)
            self._leave_if_lost()
