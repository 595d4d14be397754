"""Direct callers: services that send a task with Celery instead of HTTP. Their messages are planned on receipt.

    message ─▶ known? its record counts ─▶ revoked or expired? ─▶ plan, record ─▶ admit here, or publish to its device

A request that does not fit becomes a failed job, so that its caller is given the reason. Everything runs on one thread
of its own, except `receive`, which Celery's consumer calls.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from device_operations.errors import OperationError, failure
from device_operations.jobs import TASK_PREFIX, TERMINAL, Kind, State
from device_operations.requests.base import JobOptions
from device_operations.requests.kinds import parse
from device_operations.wire.json_types import JsonObject
from tasks.celery_bridge.previous import filled
from tasks.database import is_disconnect, until_reachable
from tasks.jobs import lifecycle, store, submit
from tasks.jobs.model import StoredRequest
from tasks.jobs.store import NewJob
from tasks.planning.context import Context
from tasks.planning.planner import plan
from tasks.redis.messages import reason, unstorable
from tasks.redis.publish import Publisher
from tasks.redis.queues import device_queue
from tasks.statements import Row, transaction
from workers.celery_bridge.pool import Handle
from workers.celery_bridge.replies import CeleryReplies
from workers.celery_bridge.revoked import Revoked
from workers.execution.scheduler import MessageHandle

log = structlog.get_logger(__name__)

#: Admits a recorded job to the scheduler: its row, its request, and the message that it came with.
Admit = Callable[[Row, StoredRequest, MessageHandle | None], None]


class DirectCallers:
    """Plans and records the messages of one device's direct callers."""

    def __init__(
        self,
        device_id: str,
        context: Context,
        engine: Engine,
        publisher: Publisher,
        revoked: Revoked,
        replies: CeleryReplies,
        admit: Admit,
    ) -> None:
        self._device_id = device_id
        self._context = context
        self._engine = engine
        self._publisher = publisher
        self._revoked = revoked
        self._replies = replies
        self._admit = admit
        self._queue: queue.SimpleQueue[Handle | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._record_until_stopped, name="direct", daemon=True)

    def start(self) -> None:
        """Begins to record messages."""
        self._thread.start()

    def stop(self) -> None:
        """Records no further message; those left are not acknowledged, and the next worker receives them."""
        self._stopping.set()
        self._queue.put(None)

    def receive(self, handle: Handle) -> None:
        """A message, on Celery's own thread: nothing here waits."""
        self._queue.put(handle)

    def _record_until_stopped(self) -> None:
        while True:
            handle = self._queue.get()
            if handle is None or self._stopping.is_set():
                return
            try:
                until_reachable(lambda handle=handle: self._take(handle), stop=self._stopping.is_set)  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001 - one message's failure does not affect the next one
                if _is_passing(error):
                    # Not acknowledged: the next worker receives it again.
                    log.error("a direct message could not be recorded", job_id=handle.job_id, error=reason(error))
                else:
                    log.error("a direct message cannot be recorded", job_id=handle.job_id, error=reason(error))
                    handle.dropped()

    def _take(self, handle: Handle) -> None:
        kind = Kind(handle.task_name.removeprefix(TASK_PREFIX))
        with self._engine.connect() as connection:
            known = store.get(connection, handle.job_id)
        if known is not None:
            self._resume(known, handle)
        elif not self._is_over(kind, handle):
            self._record_new(kind, handle)

    def _resume(self, row: Row, handle: Handle) -> None:
        """A message whose job is recorded: the record's request counts, not the message's."""
        if row["state"] in TERMINAL:
            self._replies.ended_before(row, handle)
        elif (
            row["device_id"] == self._device_id
            and row["state"] in (State.QUEUED, State.RESERVED)
            and not store.is_claimed(row)
        ):
            with self._engine.connect() as connection:
                request = store.request_of(connection, row["id"]) or {}
            self._admit(row, request, handle)
        else:
            handle.dropped()

    def _is_over(self, kind: Kind, handle: Handle) -> bool:
        """Whether the task was revoked, or expired, before its message came; then its job is recorded as ended."""
        expires_in = _seconds_until(handle.header("expires"))
        if handle.job_id in self._revoked or self._revoked.is_stamped(handle.header("stamps")):
            self._record_ended(kind, handle, State.CANCELLED, lifecycle.CANCELLED)
        elif expires_in is not None and expires_in <= 0:
            self._record_ended(kind, handle, State.EXPIRED, lifecycle.expired_on_receipt(-expires_in), expires_in)
        else:
            return False
        return True

    def _record_new(self, kind: Kind, handle: Handle) -> None:
        try:
            row, request = self._plan(kind, handle)
        except OperationError as error:
            self._refuse(kind, handle, error)
            return
        except Exception as error:
            if _is_passing(error):
                raise
            log.error("a direct caller's request cannot be recorded", job_id=handle.job_id, error=reason(error))
            unrecorded = failure("internal_error", f"the request cannot be recorded: {type(error).__name__}")
            self._refuse(kind, handle, unrecorded)
            return
        if row["id"] in self._revoked:
            # Revoked after `_is_over` looked, when no job was there to be cancelled.
            self._revoked.cancel([row["id"]])
        if row["device_id"] != self._device_id and row["state"] == State.QUEUED:
            self._publisher.jobs([(row, request)])
            handle.dropped()
        elif row["state"] == State.QUEUED:
            self._admit(row, request, handle)
        elif row["state"] in TERMINAL:
            lifecycle.announce(self._publisher, [row])
            self._replies.ended(row, handle)
        else:
            handle.dropped()

    def _plan(self, kind: Kind, handle: Handle) -> tuple[Row, StoredRequest]:
        """The recorded job's row and request. Raises the error with which the request is refused."""
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
        # A client that reaches Redis is fully trusted (documented so): a direct caller may act for any owner.
        owner = JobOptions.model_validate(options).owner or self._context.owner
        context = Context(
            self._context.engine, self._context.settings, self._context.directory, self._context.blobs, owner,
            admin=True, device_id=self._device_id, celery=handle.owed(),
        )  # fmt: skip
        made = plan(context, kind, request, handle.job_id)
        made = replace(made, job=_at_its_time(made.job, handle))
        return self._record(made), made.job.request

    def _record(self, made: submit.Plan) -> Row:
        with transaction(self._engine) as connection:
            row = submit.record(connection, [made])[0]
            if row["id"] != made.job.id:
                # Over HTTP the caller is given the earlier job; a task has an id and a result of its own.
                raise failure("allocation_exists", f"job {row['id']} does this already; wait for that one")
            return row

    def _refuse(self, kind: Kind, handle: Handle, error: OperationError) -> None:
        """A request that does not fit is a failed job, not a lost one."""
        self._record_ended(kind, handle, State.FAILED, error.as_job_error())

    def _record_ended(
        self, kind: Kind, handle: Handle, state: State, error: JsonObject, expires_in_seconds: float | None = None
    ) -> None:
        ended = NewJob(
            id=handle.job_id, kind=kind.value, device_id=self._device_id, queue=device_queue(self._device_id),
            request={}, owner=self._context.owner, state=state.value, error=error, celery=handle.owed(),
            expires_in_seconds=expires_in_seconds,
        )  # fmt: skip
        with self._engine.connect() as connection:
            rows = store.insert(connection, [ended])
        for row in rows:
            lifecycle.announce(self._publisher, [row])
            self._replies.ended(row, handle)
        if not rows:
            handle.dropped()


def _options(handle: Handle) -> JsonObject:
    """The options of a job that a Celery message says in its own way."""
    options: JsonObject = {}
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


def _is_passing(error: Exception) -> bool:
    """Whether what failed at the database may succeed later: it was away, busy, or ended the statement."""
    code = getattr(getattr(error, "orig", None), "pgcode", None) or ""
    return is_disconnect(error) or (isinstance(error, OperationalError) and code[:2] in ("40", "55", "57", "58"))
