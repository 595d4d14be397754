"""Prefetch: brings jobs into the scheduler before the device needs them, from messages and from the records.

    message of a gateway ──────────▶ entry (its header has all that the scheduler needs)
    message of a direct caller ────▶ `workers.celery_bridge.direct`, which plans and records it ─▶ entry
    an orphan: a row that waits without being here ─▶ published again, later taken from the record

It also gives back what could not be claimed, watches predecessors on other devices, and takes work for any device while
the scheduler is empty.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import redis
import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from device_operations.jobs import CLAIMABLE, TERMINAL, State
from tasks.app import PREFETCH
from tasks.celery_bridge.outbox import Outbox
from tasks.database import is_disconnect, until_reachable
from tasks.jobs import lifecycle, store
from tasks.jobs.model import StoredRequest
from tasks.jobs.store import Ending
from tasks.planning.context import Context
from tasks.redis.key_types import with_types
from tasks.redis.messages import RecordedMessage
from tasks.redis.publish import Publisher
from tasks.redis.queues import ANY_QUEUE, NOTED, device_queue, redis_keys
from tasks.statements import Row
from workers.celery_bridge.direct import DirectCallers
from workers.celery_bridge.pool import Handle, Note
from workers.celery_bridge.replies import CeleryReplies
from workers.celery_bridge.revoked import Revoked
from workers.execution.completer import Completer
from workers.execution.scheduler import Entry, MessageHandle, Scheduler
from workers.operations import SPECS
from workers.resident.residents import Resident

log = structlog.get_logger(__name__)

#: Age in seconds of a row from which it counts as an orphan if it is not in the scheduler, and how many are published
#: at once.
ORPHAN_AGE_SECONDS = 2.0
ORPHANS_AT_ONCE = 500

#: How often an orphan is published before it is taken from the record: its message may be unreadable.
REPUBLISHED_TIMES = 3

#: Seconds between two looks at predecessors on other devices: short at first, longer while none ends.
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
        self._engine = engine
        self._publisher = publisher
        self._redis = client
        self._outbox = outbox
        self._is_draining = is_draining
        self._replies = CeleryReplies(outbox)
        self._direct = DirectCallers(
            resident.device_id, context, engine, publisher, revoked, self._replies, self._admit_row
        )
        self._delivered: dict[int, int] = {}
        self._published_again: dict[str, int] = {}
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch_predecessors, name="predecessors", daemon=True),
            threading.Thread(target=self._take_any, name="any", daemon=True),
        ]

    def start(self) -> None:
        """Begins to record direct messages, to watch predecessors on other devices, and to take work for any device."""
        self._direct.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Takes nothing more in."""
        self._stopping.set()
        self._direct.stop()

    # ---- messages

    def receive(self, handle: Handle) -> None:
        """A direct caller's message, on Celery's own thread: nothing here waits."""
        self._direct.receive(handle)

    def receive_recorded(self, message: RecordedMessage) -> None:
        """A recorded job's message, on Celery's own thread: nothing here waits."""
        note = Note(message.headers)
        entry = self._entry(note.job_id, note.kind, message.request, message.headers[NOTED], note)
        self._delivered[entry.priority] = max(entry.seq, self._delivered.get(entry.priority, 0))
        note.received()
        self._admit(entry)

    def report_unknown(self, job_id: str, task: str) -> None:
        """A direct caller's task whose name no kind has: Celery is given its failure, unless the id is a job's."""

        def report() -> None:
            with self._engine.connect() as connection:
                known = store.get(connection, job_id)
            if known is None:
                self._replies.unknown(job_id, task)

        self._completer.note(report)

    def _admit_row(self, row: Row, request: StoredRequest, handle: MessageHandle | None) -> None:
        """A recorded job, with its message if it came with one."""
        self._admit(self._entry(row["id"], row["kind"], request, row, handle))

    def _entry(self, job_id: str, kind: str, request: StoredRequest, noted: Row, handle: MessageHandle | None) -> Entry:
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

    def _join(self, entry: Entry, request: StoredRequest) -> None:
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

    # ---- jobs that could not be claimed

    def unclaimed(self, entries: list[Entry]) -> None:
        """Entries whose claim gave nothing: ended, asked to be cancelled, expired, or claimed by another worker."""

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
                    self._replies.ended(found, entry.handle)
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
                self._admit_row(row, row["request"], None)
        self._published_again = times

    def _watch_predecessors(self) -> None:
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

        def move() -> object:
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
