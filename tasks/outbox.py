"""The outbox: what Celery is given once the job of a direct caller's task has ended.

    end committed, `jobs.celery` set ─▶ callbacks published, once ─▶ result stored ─▶ chord's part returned ─▶ NULL

The ended row itself is the outbox. The process that ended the job gives it to Celery at once; one that dies before is
followed by the gateway's reaper (`tasks.store.celery.pending`). Results and chords bear being given twice. Messages do
not: they are published in one transaction with a mark in Redis that says that they were, so that none is published
twice. All of it is made by Celery's own canvas and result backend.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Any

import orjson
import redis
import structlog
from celery import Celery, group, signature
from celery.app.task import Context
from celery.exceptions import NotRegistered
from celery.result import result_from_tuple
from kombu.exceptions import OperationalError
from kombu.transport import redis as kombu_redis
from kombu.utils.json import dumps
from sqlalchemy import Engine

from device_operations.errors import from_job_error
from device_operations.jobs import TASK_PREFIX, TERMINAL, State
from tasks.app import result_options
from tasks.messages import reason
from tasks.publish import connect
from tasks.queues import ANY_QUEUE, is_device_queue, redis_key
from tasks.store import celery as store
from tasks.store.connection import Relaxed, Row

log = structlog.get_logger(__name__)

#: Seconds for which Redis remembers that messages were published. The outbox is emptied within seconds.
MARK_SECONDS = 86_400

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

#: What may pass by itself: the job stays in the outbox, and the reaper comes back to it.
_BROKER_ERRORS = (redis.RedisError, OperationalError, OSError)


class _Channel(kombu_redis.Channel):
    """Collects messages where `_once` asks for it; they are sent as its transaction ends."""

    def _put(self, queue: str, message: dict[str, Any], **options: Any) -> None:
        priority = self._get_message_priority(message, reverse=False)
        # Devices' queues have a list for each priority, others those few that Celery's own workers read by default.
        key = redis_key(queue, 9 - priority) if is_device_queue(queue) else self._q_for_pri(queue, priority)
        collected = _collected.get()
        if collected is None:
            with self.conn_or_acquire() as client:
                client.lpush(key, dumps(message))
        else:
            collected.append((key, dumps(message)))


class Transport(kombu_redis.Transport):
    """The transport that the outbox publishes through."""

    Channel = _Channel


_collected: ContextVar[list[tuple[str, str]] | None] = ContextVar("collected", default=None)


#: The headers and the parts of a message's body of which Celery's result, callbacks and chords are made.
_OWED_HEADERS = ("root_id", "parent_id", "group", "group_index", "stamped_headers", "stamps")
_OWED_PARTS = frozenset({"callbacks", "errbacks", "chain", "chord"})


def owed(headers: dict[str, Any], embedded: dict[str, Any]) -> dict[str, Any] | None:
    """What Celery is to be given once a direct caller's task has ended, which its job keeps; None if nothing.

    `headers` and `embedded`, the third part of the body, are of a checked message (`tasks.messages`).
    """
    kept = {name: headers[name] for name in _OWED_HEADERS if headers.get(name) is not None}
    kept |= {name: embedded[name] for name in sorted(_OWED_PARTS) if embedded.get(name)}
    if headers.get("ignore_result"):
        return {**kept, "ignore_result": True} if kept.keys() & _OWED_PARTS else None
    return kept


@dataclass(frozen=True, slots=True)
class _Ended:
    row: Row


class Outbox:
    """A thread that gives ended jobs to Celery, and their states before that. Nothing that is called here waits."""

    def __init__(self, engine: Engine, redis_url: str) -> None:
        self._relaxed = Relaxed(engine)
        self._app = _publisher_app(redis_url)
        self._redis = connect(redis_url)
        self._queue: SimpleQueue[_Ended | Callable[[], object] | None] = SimpleQueue()
        self._held: set[str] = set()
        #: What was given, and what of it may be settled: a while later, when its events have left this process too.
        self._given: list[str] = []
        self._ripe: list[str] = []
        #: What is to be given again, and when.
        self._again: list[tuple[float, Row]] = []
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
        self._app.close()

    def ended(self, rows: Iterable[Row]) -> None:
        """Jobs have ended, and their rows say so in PostgreSQL. Most of them owe Celery nothing."""
        for row in rows:
            if row["celery"] is not None and row["id"] not in self._held:
                self._held.add(row["id"])
                self._queue.put(_Ended(row))

    def ended_unseen(self, rows: Iterable[Row]) -> list[Row]:
        """The same for jobs whose end no worker has reported to Flower, which is told too. Gives those it had not."""
        ended = [row for row in rows if row["id"] not in self._held]
        self.ended(ended)
        self.show(ended)
        return ended

    def cancelled(self, rows: Iterable[Row]) -> None:
        """The same for what `lifecycle.cancel` gave. A worker that meets the message of one of them reports its end."""
        ended = [row for row in rows if row["state"] in TERMINAL]
        self.ended(ended)
        self.show(row for row in ended if row["due_at"] is not None)

    def show(self, rows: Iterable[Row]) -> None:
        """Reports ends to Flower and whatever else reads Celery's events. If Redis is away, nobody hears of them."""
        ended = list(rows)
        if ended:
            self._queue.put(lambda: self._send_events(ended))

    def started(self, row: Row) -> None:
        """A job runs: its task is `STARTED`."""
        self._set_state(row, lambda backend, about: backend.store_result(row["id"], None, "STARTED", request=about))

    def retried(self, row: Row, error: dict[str, Any]) -> None:
        """A job failed with `error` and is tried again: its task is `RETRY`."""
        raised = from_job_error(error)
        self._set_state(row, lambda backend, about: backend.mark_as_retry(row["id"], raised, request=about))

    def requeued(self, rows: Iterable[Row]) -> None:
        """Jobs whose worker died wait again: their tasks are `PENDING`."""
        for row in rows:
            self._set_state(row, lambda backend, about: backend.store_result(about.id, None, "PENDING", request=about))

    def ended_before(self, row: Row) -> None:
        """A task's message came when its job had ended: its result is stored if the backend has lost it."""

        def store_again() -> None:
            backend = self._app.backend
            if backend.get_state(row["id"]) == "PENDING":
                self._store(row, self._about(row | {"celery": {}}), children=[])

        self._queue.put(store_again)

    def revoked(self, task_ids: Iterable[str]) -> None:
        """Tasks were revoked whose messages have not come: they are `REVOKED` at once, as with Celery's own worker."""

        def mark(task_id: str) -> None:
            if self._app.backend.get_state(task_id) == "PENDING":
                self._app.backend.mark_as_revoked(task_id, reason=State.CANCELLED.value)

        for task_id in task_ids:
            self._queue.put(partial(mark, task_id))

    def unknown(self, task_id: str, task: str) -> None:
        """A task that none here is has failed, as it does with Celery's own worker."""
        self._queue.put(lambda: self._app.backend.mark_as_failure(task_id, NotRegistered(task)))

    def _set_state(self, row: Row, step: Callable[[Any, Context], object]) -> None:
        if row["celery"] is not None and not row["celery"].get("ignore_result"):
            self._queue.put(lambda: step(self._app.backend, self._about(row)))

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
                log.error("Celery could not be told", job_id=job_id, error=reason(error))
                if job_id is not None:
                    self._given.append(job_id)
            if time.monotonic() - self._settled_at > SETTLE_SECONDS:
                self._settle()
                self._give_again()

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
            log.warning("Celery could not be told; it is tried again", error=str(error))
        if not isinstance(item, _Ended):
            return
        if len(self._again) < AGAIN_AT_MOST:
            self._again.append((now + AGAIN_SECONDS, item.row))
        else:
            self._held.discard(item.row["id"])

    # ---- one job

    def _give(self, row: Row) -> None:
        """Gives one ended job to Celery. A caller's signature that cannot be published costs that one alone."""
        about = self._about(row)
        children: list[Any] = (row["celery"] or {}).get("published", [])
        if row["state"] == State.SUCCEEDED and (about.callbacks or about.chain):
            try:
                with self._once(row["id"]) as sent:
                    sent.children = [made.as_tuple() for made in self._publish_next(row, about)]
                children = sent.children
            except _BROKER_ERRORS:
                raise
            except Exception as error:  # noqa: BLE001 - a caller's signatures may be anything
                log.error("a task's callbacks cannot be published", job_id=row["id"], error=reason(error))
            self._note_published(row, children)
        self._store(row, about, children)
        if row["state"] == State.FAILED and about.errbacks:
            self._note_published(row, children)
        if about.chord is not None and row.get("age_seconds", CHORD_SECONDS) < CHORD_SECONDS:
            later = row | {"age_seconds": row["age_seconds"] + CHORD_AGAIN_SECONDS}
            self._again.append((time.monotonic() + CHORD_AGAIN_SECONDS, later))
        else:
            self._given.append(row["id"])

    def _store(self, row: Row, about: Context, children: Sequence[Any]) -> None:
        """Stores the result, returns the chord's part, and publishes what is linked to an error."""
        backend, stores = self._app.backend, not about.ignore_result
        about._children = [result_from_tuple(child, app=self._app) for child in children]
        # What decides is `store_result`; Celery would leave a chord's part out as well.
        about.ignore_result = False
        if about.chord is not None:
            about.chord = self._chord_body(about)
        if row["state"] == State.SUCCEEDED:
            backend.mark_as_done(row["id"], row["result"], request=about, store_result=stores)
        elif row["state"] == State.FAILED:
            with self._once(f"{row['id']}.failed"):
                raised = from_job_error(row["error"])
                backend.mark_as_failure(row["id"], raised, request=about, store_result=stores)
        else:
            backend.mark_as_revoked(row["id"], reason=row["state"], request=about, store_result=stores)

    def _send_events(self, rows: Sequence[Row]) -> None:
        for device_id, together in groupby(rows, key=lambda row: row["device_id"]):
            # Flower keeps tasks by the worker that it heard of them from.
            with self._app.events.default_dispatcher(
                hostname=f"{device_id or 'gateway'}@{socket.gethostname()}"
            ) as dispatcher:
                for row in together:
                    dispatcher.send(**_event(row))

    def _about(self, row: Row) -> Context:
        """The request as Celery's backend and canvas ask for it."""
        given = row["celery"] or {}
        return Context(
            {
                "id": row["id"], "task": TASK_PREFIX + row["kind"], "args": [], "kwargs": {}, "retries": 0,
                "delivery_info": {}, "root_id": row["id"], "callbacks": None, "errbacks": None, "chain": None,
                "chord": None, "group": None, "group_index": None, "ignore_result": False,
                **{name: value for name, value in given.items() if name != "published"},
            }
        )  # fmt: skip

    def _note_published(self, row: Row, children: Sequence[Any]) -> None:
        """Takes what was published out of the outbox at once: if Redis is emptied, its mark is gone."""
        try:
            self._relaxed.run(lambda connection: store.note_published(connection, row["id"], children))
        except Exception as error:  # noqa: BLE001 - the mark in Redis says the same
            log.warning("the outbox could not be updated", job_id=row["id"], error=str(error).strip())

    def _publish_next(self, row: Row, about: Context) -> Iterator[Any]:
        """Publishes a task's callbacks and the next of its chain, as Celery's worker does; gives their results."""
        related = {"parent_id": row["id"], "root_id": about.root_id}
        callbacks = [signature(callback, app=self._app) for callback in about.callbacks or ()]
        groups = [callback for callback in callbacks if isinstance(callback, group)]
        others = [callback for callback in callbacks if not isinstance(callback, group)]
        for callback in groups if len(callbacks) > 1 else callbacks:
            yield callback.apply_async((row["result"],), **related)
        if len(callbacks) > 1 and others:
            yield group(others, app=self._app).apply_async((row["result"],), **related)
        if about.chain:
            *rest, following = about.chain
            yield signature(following, app=self._app).apply_async((row["result"],), chain=rest, **related)

    def _chord_body(self, about: Context) -> Any:
        """The chord's body, whose message is published once whoever returns the last part, and however often."""
        body = signature(about.chord, app=self._app)
        publish = body.delay

        def publish_once(*results: Any) -> None:
            with self._once(f"{about.group}.chord"):
                publish(*results)

        body.delay = publish_once
        return body

    @contextmanager
    def _once(self, mark: str) -> Iterator[_Sent]:
        """Publishes what is sent in the block, unless that was done under the same mark before, by any process."""
        sent = _Sent()
        messages: list[tuple[str, str]] = []
        token = _collected.set(messages)
        try:
            yield sent
        finally:
            _collected.reset(token)
        if not messages:
            return
        key = f"device-operations.sent.{mark}"

        def publish(pipe: Any) -> bytes | None:
            before: bytes | None = pipe.get(key)
            pipe.multi()
            if before is None:
                for queue, message in messages:
                    pipe.lpush(queue, message)
                pipe.set(key, orjson.dumps(sent.children), ex=MARK_SECONDS)
            return before

        before: Any = self._redis.transaction(publish, key, value_from_callable=True)  # type: ignore[arg-type]
        if before is not None:
            sent.children = orjson.loads(before)


def _event(row: Row) -> dict[str, Any]:
    """Celery's event of a job that ended without a worker's report, or whose worker died with it."""
    about = {"uuid": row["id"], "name": TASK_PREFIX + row["kind"]}
    if row["state"] == State.SUCCEEDED:
        return {"type": "task-succeeded", **about, "result": "{}", "runtime": (row["device_ms"] or 0.0) / 1000}
    if row["state"] == State.FAILED:
        exception = repr(from_job_error(row["error"]))
        return {"type": "task-failed", **about, "exception": exception, "traceback": "", "retry": False}
    expired = row["state"] == State.EXPIRED
    return {"type": "task-revoked", **about, "terminated": False, "signum": None, "expired": expired}


@dataclass(slots=True)
class _Sent:
    """The results, as Celery writes them in tuples, of what was published under a mark."""

    children: list[Any]

    def __init__(self) -> None:
        self.children = []


def _publisher_app(url: str) -> Celery:
    """An application without tasks of its own: what is linked to a task is somebody else's to run."""
    app = Celery("device_operations.outbox", broker=url, backend=url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        broker_transport="tasks.outbox:Transport",
        broker_transport_options={"socket_timeout": 10, "socket_connect_timeout": 5, "socket_keepalive": True},
        # Celery's own default queue for tasks that name none; ours go to whichever device is free.
        task_routes={f"{TASK_PREFIX}*": {"queue": ANY_QUEUE}},
        **result_options(),
    )
    return app
