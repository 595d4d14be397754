"""Prefetch: how jobs come into the scheduler, from Celery's messages and from the records themselves.

message of a gateway ──────────────▶ entry (its header says all that the scheduler needs)
message of a direct caller ─▶ plan, record ─▶ entry, or on to the device that holds what it names
a row that waits and is not here ──▶ published again
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import redis
import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, OperationalError

from device_operations.errors import OperationError, failure
from device_operations.jobs import CLAIMABLE, TASK_PREFIX, TERMINAL, Kind, State
from device_operations.requests.base import JobOptions
from device_operations.requests.kinds import parse
from tasks.app import PREFETCH
from tasks.celery_bridge.outbox import Outbox
from tasks.celery_bridge.previous import filled
from tasks.database import is_disconnect, until_reachable
from tasks.jobs import lifecycle, store, submit
from tasks.jobs.store import Ending, NewJob
from tasks.planning.context import Context
from tasks.planning.planner import plan
from tasks.redis.key_types import with_types
from tasks.redis.messages import RecordedMessage, reason, unstorable
from tasks.redis.publish import Publisher
from tasks.redis.queues import ANY_QUEUE, NOTED, device_queue, redis_keys
from tasks.statements import Row, transaction
from workers.celery_bridge.pool import Handle, Note
from workers.celery_bridge.revoked import Revoked
from workers.execution.completer import Completer
from workers.execution.scheduler import Entry, Scheduler
from workers.operations import SPECS
from workers.resident.residents import Resident

log = structlog.get_logger(__name__)

#: Seconds after which a row that waits and is not in the scheduler is looked for, and how many are published at once.
ORPHAN_AGE_SECONDS = 2.0
ORPHANS_AT_ONCE = 500

#: How often such a row is published in a row before it is taken from the record: its message may be unreadable.
REPUBLISHED_TIMES = 3

#: Seconds between two looks at predecessors that run elsewhere: short at first, longer while nothing happens.
FOREIGN_SECONDS = (0.02, 0.25)


class Prefetch:
    """Brings jobs into one device's scheduler. Celery's consumer calls `receive`; the rest has threads of its own."""

    def __init__(
        self,
        scheduler: Scheduler,
        completer: Completer,
        resident: Resident,
        context: Context,
        engine: Engine,
        publisher: Publisher,
        client: redis.Redis,
        revoked: Revoked,
        outbox: Outbox,
        is_draining: Callable[[], bool],
    ) -> None:
        self._scheduler = scheduler
        self._completer = completer
        self._resident = resident
        self._context = context
        self._engine = engine
        self._publisher = publisher
        self._redis = client
        self._revoked = revoked
        self._outbox = outbox
        self._is_draining = is_draining
        self._direct: queue.SimpleQueue[Handle | None] = queue.SimpleQueue()
        self._delivered: dict[int, int] = {}
        self._published_again: dict[str, int] = {}
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._record_direct, name="direct", daemon=True),
            threading.Thread(target=self._watch_elsewhere, name="elsewhere", daemon=True),
            threading.Thread(target=self._take_any, name="any", daemon=True),
        ]

    def start(self) -> None:
        """Begins to record direct messages, to watch predecessors elsewhere, and to take work for any device."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Takes nothing more in."""
        self._stopping.set()
        self._direct.put(None)

    # ---- messages

    def receive(self, handle: Handle) -> None:
        """A direct caller's message, on Celery's own thread: nothing here waits."""
        self._direct.put(handle)

    def receive_recorded(self, message: RecordedMessage) -> None:
        """A recorded job's message, on Celery's own thread: nothing here waits."""
        note = Note(message.headers)
        entry = self._entry(note.job_id, note.kind, message.request, message.headers[NOTED], note)
        self._delivered[entry.priority] = max(entry.seq, self._delivered.get(entry.priority, 0))
        note.received()
        self._admit(entry)

    def report_unknown(self, job_id: str, task: str) -> None:
        """A direct caller's task that none here is: Celery is given its failure, unless the id is a job's."""

        def report() -> None:
            with self._engine.connect() as connection:
                known = store.get(connection, job_id)
            if known is None:
                self._completer.report_unknown(job_id, task)

        self._completer.note(report)

    def _entry(
        self, job_id: str, kind: str, request: dict[str, Any], noted: dict[str, Any], handle: Handle | Note | None
    ) -> Entry:
        entry = Entry(
            job_id=job_id,
            kind=kind,
            priority=noted["priority"],
            seq=noted["seq"],
            needs=tuple(noted["needs"]),
            after=set(noted["after"]),
            handle=handle,
        )
        try:
            self._join(entry, request)
        except Exception as error:  # noqa: BLE001 - a request that fits no batch goes alone, and fails alone
            log.info("the job runs alone", job_id=job_id, reason=type(error).__name__)
            entry.batch_key, entry.batch_limit, entry.batch_delay_seconds = None, 1, 0.0
        return entry

    def _join(self, entry: Entry, request: dict[str, Any]) -> None:
        """Notes with which others the entry may run."""
        spec = SPECS.get(entry.kind)
        if spec is not None and spec.join is not None:
            spec.join(self._resident, entry, request)

    def _admit(self, entry: Entry) -> None:
        if not self._scheduler.admit(entry):
            if entry.handle is not None:
                entry.handle.dropped()
            return
        # What waits for a job that is not here would hold its message's slot while that job's message needs one.
        if entry.after and entry.handle is not None:
            entry.handle.park()

    # ---- direct callers

    def _record_direct(self) -> None:
        while True:
            handle = self._direct.get()
            if handle is None or self._stopping.is_set():
                return
            try:
                until_reachable(lambda handle=handle: self._take_direct(handle), stop=self._stopping.is_set)  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001 - one message's failure is not the next one's
                if _may_pass(error):
                    # Not acknowledged: the next worker is given it again.
                    log.error("a direct message could not be recorded", job_id=handle.job_id, error=reason(error))
                else:
                    log.error("a direct message cannot be recorded", job_id=handle.job_id, error=reason(error))
                    handle.dropped()

    def _take_direct(self, handle: Handle) -> None:
        kind = Kind(handle.task_name.removeprefix(TASK_PREFIX))
        with self._engine.connect() as connection:
            known = store.get(connection, handle.job_id)
        if known is not None:
            self._meet_again(known, handle)
            return
        if self._is_over(kind, handle):
            return
        try:
            rows, request = self._plan_direct(kind, handle)
        except OperationError as error:
            self._refuse(kind, handle, error)
            return
        except Exception as error:
            if _may_pass(error):
                raise
            log.error("a direct caller's request cannot be recorded", job_id=handle.job_id, error=reason(error))
            unrecorded = failure("internal_error", f"the request cannot be recorded: {type(error).__name__}")
            self._refuse(kind, handle, unrecorded)
            return
        row = rows[0]
        if row["id"] in self._revoked:
            # Revoked since it was asked for above, when no job was there to be cancelled.
            self._revoked.cancel([row["id"]])
        if row["device_id"] != self._resident.device_id and row["state"] == State.QUEUED:
            self._publisher.jobs([(row, request)])
            handle.dropped()
        elif row["state"] == State.QUEUED:
            self._admit(self._entry(row["id"], row["kind"], request, row, handle))
        elif row["state"] in TERMINAL:
            lifecycle.announce(self._publisher, [row])
            self._completer.tell_celery(row, handle)
        else:
            handle.dropped()

    def _plan_direct(self, kind: Kind, handle: Handle) -> tuple[list[Row], dict[str, Any]]:
        args, kwargs = handle.payload()
        why = unstorable([args, kwargs])
        if why is not None:
            raise failure("validation_failed", f"the arguments cannot be stored: {why}")
        if set(kwargs) - {"request", "job"} or not isinstance(kwargs.get("request"), dict):
            given = [*(["positional arguments"] if args else []), *sorted(name[:50] for name in kwargs)[:10]]
            raise failure(
                "validation_failed",
                f"a task takes kwargs={{'request': {{…}}}} and maybe 'job', both objects; given: {given or 'none'}",
            )
        body = filled(kwargs["request"], args)
        options = kwargs.get("job", body.pop("job", None)) or {}
        if not isinstance(options, dict):
            raise failure("validation_failed", "job is not an object")
        options = {**_options(handle), **options}
        request = parse(kind, {**body, "job": options})
        # Whoever reaches Redis is fully trusted (documented so): a direct caller may act for any owner.
        owner = JobOptions.model_validate(options).owner or self._context.owner
        context = Context(
            self._context.engine, self._context.settings, self._context.directory, self._context.blobs, owner,
            admin=True, device_id=self._resident.device_id, celery=handle.owed(),
        )  # fmt: skip
        made = plan(context, kind, request, handle.job_id)
        made = replace(made, job=_at_its_time(made.job, handle))
        return self._record(made), made.job.request

    def _record(self, made: submit.Plan) -> list[Row]:
        with transaction(self._engine) as connection:
            rows = submit.record(connection, [made])
            if rows[0]["id"] != made.job.id:
                # Over HTTP the caller is given the earlier job; a task has an id and a result of its own.
                raise failure("allocation_exists", f"job {rows[0]['id']} does this already; wait for that one")
            return rows

    def _is_over(self, kind: Kind, handle: Handle) -> bool:
        """Whether a direct caller's task was revoked, or expired, before it came; then that is what is recorded."""
        expires_in = _seconds_until(handle.header("expires"))
        if handle.job_id in self._revoked or self._revoked.is_stamped(handle.header("stamps")):
            self._record_ended(kind, handle, State.CANCELLED, lifecycle.CANCELLED)
        elif expires_in is not None and expires_in <= 0:
            self._record_ended(kind, handle, State.EXPIRED, lifecycle.expired_on_receipt(-expires_in), expires_in)
        else:
            return False
        return True

    def _refuse(self, kind: Kind, handle: Handle, error: OperationError) -> None:
        """A direct caller's request that does not fit is a failed job, not a lost one."""
        self._record_ended(kind, handle, State.FAILED, error.as_job_error())

    def _record_ended(
        self,
        kind: Kind,
        handle: Handle,
        state: State,
        error: dict[str, Any],
        expires_in_seconds: float | None = None,
    ) -> None:
        ended = NewJob(
            id=handle.job_id, kind=kind.value, device_id=self._resident.device_id,
            queue=device_queue(self._resident.device_id), request={}, owner=self._context.owner,
            state=state.value, error=error, celery=handle.owed(), expires_in_seconds=expires_in_seconds,
        )  # fmt: skip
        with self._engine.connect() as connection:
            rows = store.insert(connection, [ended])
        for row in rows:
            lifecycle.announce(self._publisher, [row])
            self._completer.tell_celery(row, handle)
        if not rows:
            handle.dropped()

    def _meet_again(self, row: Row, handle: Handle) -> None:
        """A message whose job is recorded: the record's request counts, whatever the message says."""
        if row["state"] in TERMINAL:
            self._completer.tell_celery_again(row, handle)
        elif (
            row["device_id"] == self._resident.device_id
            and row["state"] in (State.QUEUED, State.RESERVED)
            and not store.is_claimed(row)
        ):
            with self._engine.connect() as connection:
                request = store.request_of(connection, row["id"]) or {}
            self._admit(self._entry(row["id"], row["kind"], request, row, handle))
        else:
            handle.dropped()

    def unclaimed(self, entries: list[Entry]) -> None:
        """Entries whose claim gave nothing: ended, asked to be cancelled, expired, or somebody else's."""

        def find_out() -> None:
            with self._engine.connect() as connection:
                ids = [entry.job_id for entry in entries]
                rows = store.get_many(connection, ids)
                overdue = store.expired_among(connection, ids)
                failed = store.failed_before(connection, ids)
            endings = []
            for row in rows.values():
                if row["state"] in TERMINAL or store.is_claimed(row):
                    continue
                if row["cancel_requested"]:
                    endings.append(Ending(row["id"], State.CANCELLED.value, error=lifecycle.CANCELLED))
                elif row["id"] in overdue:
                    endings.append(Ending(row["id"], State.EXPIRED.value, error=lifecycle.expired(row)))
                elif row["id"] in failed:
                    error = lifecycle.predecessor_failed(failed[row["id"]])
                    endings.append(Ending(row["id"], State.CANCELLED.value, error=error))
            ended = lifecycle.end(self._engine, endings, sorted(CLAIMABLE)) if endings else []
            lifecycle.announce(self._publisher, ended)
            here = {entry.job_id for entry in entries}
            self._outbox.ended_unseen(row for row in ended if row["id"] not in here)
            by_id = {row["id"]: row for row in [*rows.values(), *ended]}
            self._scheduler.put_back([entry.job_id for entry in entries])
            self._scheduler.ended([row["id"] for row in by_id.values() if row["state"] in TERMINAL])
            for entry in entries:
                found = by_id.get(entry.job_id)
                if found is not None and found["state"] in TERMINAL:
                    self._completer.tell_celery(found, entry.handle)
                elif entry.handle is not None:
                    entry.handle.dropped()

        def find_out_in_time() -> None:
            try:
                until_reachable(find_out, stop=self._stopping.is_set)
            except Exception:
                # The record still says what they wait for, and they are published again.
                self._scheduler.put_back([entry.job_id for entry in entries])
                raise

        self._completer.call(find_out_in_time)

    # ---- the records themselves

    def sweep(self) -> None:
        """Once a second: notes what is held here, and publishes again what waits and never arrived."""
        held = self._scheduler.select(lambda entry: not entry.reserved)
        orphans: list[Row] = []
        with self._engine.connect() as connection:
            if held:
                store.mark_reserved(connection, [entry.job_id for entry in held])
                for entry in held:
                    entry.reserved = True
            waiting = store.waiting(connection, self._resident.device_id, ORPHAN_AGE_SECONDS, ORPHANS_AT_ONCE)
        unflushed = self._completer.unflushed
        missing = [row for row in waiting if row["id"] not in self._scheduler and row["id"] not in unflushed]
        if missing:
            in_redis = sum(self._redis.llen(key) for key in redis_keys(device_queue(self._resident.device_id)))
            orphans = [row for row in missing if in_redis == 0 or row["seq"] < self._delivered.get(row["priority"], 0)]
        self._bring_in(orphans)

    def _bring_in(self, orphans: list[Row]) -> None:
        """Publishes orphans again; those whose messages never arrive come from the record itself."""
        times = {row["id"]: self._published_again.get(row["id"], 0) + 1 for row in orphans}
        by_message = [row for row in orphans if times[row["id"]] <= REPUBLISHED_TIMES]
        if by_message:
            log.info("published again", jobs=len(by_message))
            self._publisher.jobs([(row, row["request"]) for row in by_message])
        by_record = [row for row in orphans if times[row["id"]] > REPUBLISHED_TIMES]
        if by_record and self._scheduler.eligible < PREFETCH:
            log.warning("taken from the record: their messages do not arrive", jobs=len(by_record))
            for row in by_record:
                self._admit(self._entry(row["id"], row["kind"], row["request"], row, None))
        self._published_again = times

    def _watch_elsewhere(self) -> None:
        """Looks at predecessors that are not here, while entries wait for any."""
        wait_seconds = FOREIGN_SECONDS[0]
        while not self._stopping.wait(wait_seconds):
            foreign = self._scheduler.foreign()
            if not foreign:
                wait_seconds = FOREIGN_SECONDS[0]
                continue
            try:
                with self._engine.connect() as connection:
                    states = store.states(connection, foreign)
            except DBAPIError as error:
                if not is_disconnect(error):
                    log.error("looking at predecessors failed", error=str(error))
                wait_seconds = FOREIGN_SECONDS[1]
                continue
            # A job that is no longer kept has ended long ago.
            ended = [job_id for job_id in foreign if states.get(job_id, State.SUCCEEDED) in TERMINAL]
            self._scheduler.ended(ended)
            wait_seconds = FOREIGN_SECONDS[0] if ended else min(FOREIGN_SECONDS[1], wait_seconds * 1.5)

    def _take_any(self) -> None:
        """While the scheduler is empty, moves messages one by one from the queue for any device into this device's own.

        Each move is one atomic command, so no message is lost between the two queues.
        """
        sources = redis_keys(ANY_QUEUE)
        targets = redis_keys(device_queue(self._resident.device_id))

        def move() -> Any:
            for source, target in zip(sources, targets, strict=True):
                moved = self._redis.lmove(source, target, "RIGHT", "LEFT")
                if moved is not None:
                    return moved
            # Celery's callers who name no priority use the plain key, which is the first.
            return self._redis.blmove(sources[0], targets[0], 1, "RIGHT", "LEFT")

        while not self._stopping.is_set():
            if len(self._scheduler) or self._is_draining():
                self._stopping.wait(0.05)
                continue
            try:
                moved = with_types(self._redis, dict.fromkeys([*sources, *targets], "list"), move)
                if moved is not None:
                    # Until Celery's consumer has handed it over, this worker must not look idle to itself.
                    self._stopping.wait(0.01)
            except redis.RedisError as error:
                log.warning("the queue for any device cannot be read", error=str(error))
                self._stopping.wait(1.0)


def _options(handle: Handle) -> dict[str, Any]:
    """The options of a job that a Celery message says in its own way."""
    options: dict[str, Any] = {}
    if handle.priority is not None:
        options["priority"] = handle.priority
    limits = [limit for limit in handle.header("timelimit") or () if limit]
    if limits:
        options["timeout_seconds"] = min(limits)
    return options


def _at_its_time(job: NewJob, handle: Handle) -> NewJob:
    """The job, not before the message's ETA and not after its expiry, where it has such."""
    delay, expires_in = _seconds_until(handle.header("eta")), _seconds_until(handle.header("expires"))
    if delay is not None and delay > 0:
        job = replace(job, state=State.SCHEDULED.value, delay_seconds=delay)
    return job if expires_in is None else replace(job, expires_in_seconds=expires_in)


def _seconds_until(time: str | None) -> float | None:
    """Seconds from now until a time as Celery writes it, negative if it is past. One without a zone is in UTC."""
    if time is None:
        return None
    at = datetime.fromisoformat(time)
    return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()


def _may_pass(error: Exception) -> bool:
    """Whether what failed at the database may succeed later: it was away, busy, or ended the statement."""
    code = getattr(getattr(error, "orig", None), "pgcode", None) or ""
    return is_disconnect(error) or (isinstance(error, OperationalError) and code[:2] in ("40", "55", "57", "58"))
