"""The outbox: what Celery is given once the job of a direct caller's task has ended.

    end committed, `jobs.celery` set ─▶ callbacks published ─▶ noted ─▶ result stored, chord's part returned ─▶ NULL

The ended row itself is the outbox. The process that ended the job gives it to Celery at once; one that dies before is
followed by the gateway's reaper (`tasks.celery_bridge.store.pending`). What is done at an end is in
`tasks.celery_bridge.results`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import cast

import redis
import structlog
from kombu.exceptions import OperationalError
from sqlalchemy import Engine

from device_operations.jobs import TERMINAL, State
from device_operations.wire.json_types import FreeJson
from tasks.celery_bridge import store
from tasks.celery_bridge.results import CeleryResults
from tasks.celery_bridge.store import PendingRow
from tasks.jobs.model import JobRow
from tasks.redis.messages import reason
from tasks.statements import Relaxed

log = structlog.get_logger(__name__)

#: Seconds between two notes in PostgreSQL of what was given to Celery.
SETTLE_SECONDS = 0.25

#: Seconds since its end for which a chord's part is returned again after a death, and between two such times: longer
#: than Celery's own claim on the chord, which a process that dies while it publishes the body leaves behind.
CHORD_SECONDS = 60.0
CHORD_AGAIN_SECONDS = 3.0

#: Seconds before a job is given again where Redis did not take it, how many wait for that here at most (the reaper
#: finds the others), and seconds between two lines of the log about it.
AGAIN_SECONDS = 1.0
AGAIN_AT_MOST = 10_000
WARN_SECONDS = 5.0

#: What may pass by itself: the job stays in the outbox.
_BROKER_ERRORS = (redis.RedisError, OperationalError, OSError)


@dataclass(frozen=True, slots=True)
class _Ended:
    row: JobRow


class Outbox:
    """A thread that gives ended jobs to Celery, and their states before that. Nothing that is called here waits."""

    def __init__(self, engine: Engine, redis_url: str) -> None:
        self._relaxed = Relaxed(engine)
        self._results = CeleryResults(redis_url)
        self._queue: SimpleQueue[_Ended | Callable[[], object] | None] = SimpleQueue()
        self._held: set[str] = set()
        #: What was given, and what of it may be settled: a while later, when its events have left this process too.
        self._given: list[str] = []
        self._ripe: list[str] = []
        #: What is to be given again, and when.
        self._again: list[tuple[float, JobRow]] = []
        self._warned_at = -math.inf
        self._settled_at = time.monotonic()
        self._thread = threading.Thread(target=self._give_until_stopped, name="outbox", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Gives what was handed over, then ends. What Redis does not take stays in the outbox."""
        self._queue.put(None)
        self._thread.join()
        self._results.close()

    # ---- ends

    def ended(self, rows: Iterable[JobRow]) -> None:
        """Jobs have ended, and their rows say so in PostgreSQL. Most of them owe Celery nothing."""
        for row in rows:
            if row["celery"] is not None and row["id"] not in self._held:
                self._held.add(row["id"])
                self._queue.put(_Ended(row))

    def ended_unseen(self, rows: Iterable[JobRow]) -> list[JobRow]:
        """The same for jobs whose end no worker has reported to Flower: it is reported here. Gives those it had not."""
        ended = [row for row in rows if row["id"] not in self._held]
        self.ended(ended)
        self.show(ended)
        return ended

    def cancelled(self, rows: Iterable[JobRow]) -> None:
        """The same for what `lifecycle.cancel` gave. A worker that meets the message of one of them reports its end."""
        ended = [row for row in rows if row["state"] in TERMINAL]
        self.ended(ended)
        self.show(row for row in ended if row["due_at"] is not None)

    def show(self, rows: Iterable[JobRow]) -> None:
        """Reports ends to Flower. If Redis is away, they are not reported."""
        ended = list(rows)
        if ended:
            self._queue.put(partial(self._results.send_events, ended))

    def ended_before(self, row: JobRow) -> None:
        """A task's message came when its job had ended: its result is stored if the backend has lost it."""
        self._queue.put(partial(self._results.store_if_lost, row))

    def revoked(self, task_ids: Iterable[str]) -> None:
        """Tasks were revoked whose messages have not come: they are `REVOKED` at once, as with Celery's own worker."""
        for task_id in task_ids:
            self._queue.put(partial(self._results.set_revoked, task_id))

    def unknown(self, task_id: str, task: str) -> None:
        """A task that none here is has failed, as it does with Celery's own worker."""
        self._queue.put(partial(self._results.set_unknown, task_id, task))

    # ---- states before the end

    def started(self, row: JobRow) -> None:
        """A job runs: its task is `STARTED`."""
        if _wants_result(row):
            self._queue.put(partial(self._results.set_state, row, "STARTED"))

    def retried(self, row: JobRow, error: FreeJson) -> None:
        """A job failed with `error` and is tried again: its task is `RETRY`."""
        if _wants_result(row):
            self._queue.put(partial(self._results.set_retry, row, error))

    def requeued(self, rows: Iterable[JobRow]) -> None:
        """Jobs whose worker died wait again: their tasks are `PENDING`."""
        for row in filter(_wants_result, rows):
            self._queue.put(partial(self._results.set_state, row, "PENDING"))

    # ---- the thread

    def _give_until_stopped(self) -> None:
        while True:
            waits = self._given or self._ripe or self._again
            try:
                item = self._queue.get(timeout=SETTLE_SECONDS if waits else None)
            except Empty:
                self._settle()
                self._give_again()
                continue
            if item is None:
                self._settle()
                self._settle()
                return
            try:
                if isinstance(item, _Ended):
                    self._give(item.row)
                else:
                    item()
            except _BROKER_ERRORS as error:
                self._put_off(item, error)
            except Exception as error:  # noqa: BLE001 - a caller's message may hold anything, and others wait
                # It would fail again: what Celery can be given of this job it was given.
                job_id = item.row["id"] if isinstance(item, _Ended) else None
                log.error("Celery could not be notified", job_id=job_id, error=reason(error))
                if job_id is not None:
                    self._given.append(job_id)
            if time.monotonic() - self._settled_at > SETTLE_SECONDS:
                self._settle()
                self._give_again()

    def _give(self, row: JobRow) -> None:
        """Gives one ended job to Celery. A caller's signature that cannot be published costs that one alone."""
        owed = row["celery"] or {}
        children: list[object] = owed.get("published", [])
        if row["state"] == State.SUCCEEDED and (owed.get("callbacks") or owed.get("chain")):
            try:
                children = self._results.publish_next(row)
            except _BROKER_ERRORS:
                raise
            except Exception as error:  # noqa: BLE001 - a caller's signatures may be anything
                log.error("a task's callbacks cannot be published", job_id=row["id"], error=reason(error))
            self._note_published(row, children)
        self._results.store(row, children)
        if row["state"] == State.FAILED and owed.get("errbacks"):
            self._note_published(row, children)
        pending = cast(PendingRow, row) if "age_seconds" in row else None
        if owed.get("chord") and pending is not None and pending["age_seconds"] < CHORD_SECONDS:
            later: PendingRow = {**pending, "age_seconds": pending["age_seconds"] + CHORD_AGAIN_SECONDS}
            self._again.append((time.monotonic() + CHORD_AGAIN_SECONDS, later))
        else:
            self._given.append(row["id"])

    def _note_published(self, row: JobRow, children: Sequence[object]) -> None:
        """Takes what was published out of the outbox at once: if Redis is emptied, its mark is gone."""
        try:
            self._relaxed.run(lambda connection: store.note_published(connection, row["id"], children))
        except Exception as error:  # noqa: BLE001 - the mark in Redis says the same
            log.warning("the outbox could not be updated", job_id=row["id"], error=str(error).strip())

    def _settle(self) -> None:
        """Notes what was given. The commit does not wait for the disk: if it is lost, it is all given again."""
        self._settled_at = time.monotonic()
        given, self._ripe, self._given = self._ripe, self._given, []
        if not given:
            return
        try:
            self._relaxed.run(lambda connection: store.settle(connection, given))
        except Exception as error:  # noqa: BLE001 - they stay in the outbox, and are given again
            log.warning("the outbox could not be emptied", jobs=len(given), error=str(error).strip())
        self._held.difference_update(given)

    def _give_again(self) -> None:
        now = time.monotonic()
        due = [row for at, row in self._again if at <= now]
        self._again = [(at, row) for at, row in self._again if at > now]
        for row in due:
            self._queue.put(_Ended(row))

    def _put_off(self, item: _Ended | Callable[[], object], error: Exception) -> None:
        """Redis is away or refuses: the job is given again a little later. If this process ends, the reaper does it."""
        now = time.monotonic()
        if now - self._warned_at > WARN_SECONDS:
            self._warned_at = now
            log.warning("Celery could not be notified; it is tried again", error=str(error))
        if not isinstance(item, _Ended):
            return
        if len(self._again) < AGAIN_AT_MOST:
            self._again.append((now + AGAIN_SECONDS, item.row))
        else:
            self._held.discard(item.row["id"])


def _wants_result(row: JobRow) -> bool:
    return row["celery"] is not None and not row["celery"].get("ignore_result")
