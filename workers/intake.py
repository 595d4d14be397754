"""The intake: how jobs come into the lane, from Celery's messages and from the records themselves.

message of a gateway ──────────────▶ entry (its header says all that the lane needs)
message of a direct caller ─▶ plan, record ─▶ entry, or on to the device that holds what it names
a row that waits and is not here ──▶ published again
"""

from __future__ import annotations

import base64
import queue
import threading
from collections.abc import Callable
from typing import Any

import orjson
import redis
import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from device_operations.errors import OperationError, failure
from device_operations.jobs import TASK_PREFIX, TERMINAL, Kind, State
from device_operations.requests.base import JobOptions
from device_operations.requests.kinds import parse
from tasks import lifecycle, submit
from tasks.database import is_disconnect, until_reachable
from tasks.plans import plan
from tasks.plans.base import Context
from tasks.publish import Publisher
from tasks.queues import ANY_QUEUE, NOTED, device_queue, redis_keys
from tasks.store import jobs as store
from tasks.store.connection import Row, transaction
from tasks.store.jobs import Ending, NewJob
from workers.lane import Entry, Lane
from workers.operations import memory
from workers.pool import Handle, Note
from workers.recorder import Recorder
from workers.resident import Resident

log = structlog.get_logger(__name__)

#: Seconds after which a row that waits and is not in the lane is looked for, and how many are published at once.
ORPHAN_AGE_SECONDS = 2.0
ORPHANS_AT_ONCE = 500

#: Seconds between two looks at predecessors that run elsewhere: short at first, longer while nothing happens.
FOREIGN_SECONDS = (0.02, 0.25)


class Intake:
    """Brings jobs into one device's lane. `receive` is called by Celery's consumer; the rest has threads of its own."""

    def __init__(
        self,
        lane: Lane,
        recorder: Recorder,
        resident: Resident,
        context: Context,
        engine: Engine,
        publisher: Publisher,
        client: redis.Redis,
        is_draining: Callable[[], bool],
    ) -> None:
        self._lane = lane
        self._recorder = recorder
        self._resident = resident
        self._context = context
        self._engine = engine
        self._publisher = publisher
        self._redis = client
        self._is_draining = is_draining
        self._direct: queue.SimpleQueue[Handle | None] = queue.SimpleQueue()
        self._delivered: dict[int, int] = {}
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

    def receive_recorded(self, payload: dict[str, Any]) -> None:
        """A recorded job's message as it came from Redis, on Celery's own thread: nothing here waits."""
        try:
            note = Note(payload["headers"])
            _, kwargs, _ = orjson.loads(base64.b64decode(payload["body"]))
            entry = self._entry(note.job_id, note.kind, kwargs["request"], payload["headers"][NOTED], note)
        except Exception as error:  # noqa: BLE001 - a message that cannot be read is no reason to stop reading
            log.warning(
                "unreadable message; its job is taken from the record", error=f"{type(error).__name__}: {error}"
            )
            return
        self._delivered[entry.priority] = max(entry.seq, self._delivered.get(entry.priority, 0))
        note.received()
        self._admit(entry)

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
        if kind == Kind.INFERENCE_RUN and not request.get("session_id") and not request.get("into"):
            model = self._resident.models.get(request.get("model_id", ""))
            batch = model.batch_of(request["inputs"], request.get("outputs")) if model else None
            if batch is not None:
                entry.batch_key, entry.batch_limit = batch
                entry.batch_delay_seconds = model.max_delay_ms / 1000 if model else 0.0
        elif kind == Kind.MEMORY_DEALLOCATE or (
            kind == Kind.MEMORY_ALLOCATE and request["size_bytes"] <= memory.SMALL_BYTES
        ):
            entry.batch_key, entry.batch_limit = kind, memory.BATCH_LIMIT
        return entry

    def _admit(self, entry: Entry) -> None:
        if not self._lane.admit(entry):
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
            except Exception:
                # Not acknowledged: the next worker is given it again.
                log.exception("a direct message could not be recorded", job_id=handle.job_id)

    def _take_direct(self, handle: Handle) -> None:
        kind = Kind(handle.task_name.removeprefix(TASK_PREFIX))
        with self._engine.connect() as connection:
            known = store.get(connection, handle.job_id)
        if known is not None:
            self._meet_again(known, handle)
            return
        try:
            rows, request = self._plan_direct(kind, handle)
        except OperationError as error:
            self._refuse(kind, handle, error)
            return
        row = rows[0]
        if row["device_id"] != self._resident.device_id:
            self._publisher.jobs([(row, request)])
            handle.dropped()
        elif row["state"] == State.QUEUED:
            noted = {"seq": row["seq"], "priority": row["priority"], "after": row["after"], "needs": row["needs"]}
            self._admit(self._entry(row["id"], row["kind"], request, noted, handle))
        elif row["state"] in TERMINAL:
            lifecycle.announce(self._publisher, [row])
            self._recorder.tell_celery(row, handle)
        else:
            handle.dropped()

    def _plan_direct(self, kind: Kind, handle: Handle) -> tuple[list[Row], dict[str, Any]]:
        args, kwargs = handle.payload()
        if args or set(kwargs) - {"request", "job"} or not isinstance(kwargs.get("request"), dict):
            given = [*(["positional arguments"] if args else []), *sorted(map(str, kwargs))]
            raise failure(
                "validation_failed",
                f"a task takes kwargs={{'request': {{…}}}} and maybe 'job', both objects; given: {given or 'none'}",
            )
        body = dict(kwargs["request"])
        options = kwargs.get("job", body.pop("job", None)) or {}
        if not isinstance(options, dict):
            raise failure("validation_failed", "job is not an object")
        if handle.priority is not None and "priority" not in options:
            options = {**options, "priority": handle.priority}
        request = parse(kind, {**body, "job": options})
        # Whoever reaches Redis is fully trusted (documented so): a direct caller may act for any owner.
        owner = JobOptions.model_validate(options).owner or self._context.owner
        context = Context(
            self._context.engine, self._context.settings, self._context.directory, self._context.blobs, owner,
            admin=True, device_id=self._resident.device_id, wants_result=not handle.ignore_result,
        )  # fmt: skip
        made = plan(context, kind, request, handle.job_id)
        return self._record(made), made.job.request

    def _record(self, made: submit.Plan) -> list[Row]:
        with transaction(self._engine) as connection:
            rows = submit.record(connection, [made])
            if rows[0]["id"] != made.job.id:
                # Over HTTP the caller is given the earlier job; a task has an id and a result of its own.
                raise failure("allocation_exists", f"job {rows[0]['id']} does this already; wait for that one")
            return rows

    def _refuse(self, kind: Kind, handle: Handle, error: OperationError) -> None:
        """A direct caller's request that does not fit is a failed job, not a lost one."""
        refused = NewJob(
            id=handle.job_id, kind=kind.value, device_id=self._resident.device_id,
            queue=device_queue(self._resident.device_id), request={}, owner=self._context.owner,
            state=State.FAILED.value, error=error.as_job_error(), wants_result=not handle.ignore_result,
        )  # fmt: skip
        with self._engine.connect() as connection:
            rows = store.insert(connection, [refused])
        for row in rows:
            lifecycle.announce(self._publisher, [row])
            self._recorder.tell_celery(row, handle)

    def _meet_again(self, row: Row, handle: Handle) -> None:
        """A message whose job is recorded: the record's request counts, whatever the message says."""
        if row["state"] in TERMINAL:
            self._recorder.tell_celery(row, handle)
        elif (
            row["device_id"] == self._resident.device_id
            and row["state"] in (State.QUEUED, State.RESERVED)
            and not store.is_claimed(row)
        ):
            with self._engine.connect() as connection:
                request = store.request_of(connection, row["id"]) or {}
            noted = {"seq": row["seq"], "priority": row["priority"], "after": row["after"], "needs": row["needs"]}
            self._admit(self._entry(row["id"], row["kind"], request, noted, handle))
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
            ended = lifecycle.end(self._engine, endings, sorted(_WAITING)) if endings else []
            lifecycle.announce(self._publisher, ended)
            by_id = {row["id"]: row for row in [*rows.values(), *ended]}
            self._lane.put_back([entry.job_id for entry in entries])
            self._lane.ended([row["id"] for row in by_id.values() if row["state"] in TERMINAL])
            for entry in entries:
                found = by_id.get(entry.job_id)
                if found is not None and found["state"] in TERMINAL:
                    self._recorder.tell_celery(found, entry.handle)
                elif entry.handle is not None:
                    entry.handle.dropped()

        self._recorder.call(find_out)

    # ---- the records themselves

    def sweep(self) -> None:
        """Once a second: notes what is held here, and publishes again what waits and never arrived."""
        held = self._lane.select(lambda entry: not entry.reserved)
        orphans: list[Row] = []
        with self._engine.connect() as connection:
            if held:
                store.mark_reserved(connection, [entry.job_id for entry in held])
                for entry in held:
                    entry.reserved = True
            waiting = store.waiting(connection, self._resident.device_id, ORPHAN_AGE_SECONDS, ORPHANS_AT_ONCE)
        missing = [row for row in waiting if row["id"] not in self._lane]
        if missing:
            in_redis = sum(self._redis.llen(key) for key in redis_keys(device_queue(self._resident.device_id)))
            orphans = [row for row in missing if in_redis == 0 or row["seq"] < self._delivered.get(row["priority"], 0)]
        if orphans:
            log.info("published again", jobs=len(orphans))
            self._publisher.jobs([(row, row["request"]) for row in orphans])

    def _watch_elsewhere(self) -> None:
        """Looks at predecessors that are not here, while entries wait for any."""
        wait_seconds = FOREIGN_SECONDS[0]
        while not self._stopping.wait(wait_seconds):
            foreign = self._lane.foreign()
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
            self._lane.ended(ended)
            wait_seconds = FOREIGN_SECONDS[0] if ended else min(FOREIGN_SECONDS[1], wait_seconds * 1.5)

    def _take_any(self) -> None:
        """While the lane is empty, moves one message at a time from the queue for any device into this device's own.

        Each move is one atomic command, so no message is lost between the two queues.
        """
        sources = redis_keys(ANY_QUEUE)
        targets = redis_keys(device_queue(self._resident.device_id))
        while not self._stopping.is_set():
            if len(self._lane) or self._is_draining():
                self._stopping.wait(0.05)
                continue
            try:
                moved = None
                for source, target in zip(sources, targets, strict=True):
                    moved = self._redis.lmove(source, target, "RIGHT", "LEFT")
                    if moved is not None:
                        break
                if moved is None:
                    # Celery's callers who name no priority use the plain key, which is the first.
                    moved = self._redis.blmove(sources[0], targets[0], 1, "RIGHT", "LEFT")
                if moved is not None:
                    # Until Celery's consumer has handed it over, this worker must not look idle to itself.
                    self._stopping.wait(0.01)
            except redis.RedisError as error:
                log.warning("the queue for any device cannot be read", error=str(error))
                self._stopping.wait(1.0)


_WAITING = frozenset({State.SCHEDULED, State.QUEUED, State.RESERVED, State.RETRYING})
