"""Jobs: recording, claiming, ending, cancelling, listing. Every UPDATE of a state is guarded by its transition.

Open jobs are found by `finished_at IS NULL`, which a constraint ties to the states: no index names a state, so a claim
touches none (PostgreSQL's heap-only update). Which states an UPDATE may leave, and for which, stands in
`device_operations.jobs.TRANSITIONS`, and only there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection

from device_operations.jobs import (
    CLAIM,
    CLAIMABLE,
    CLAIMED,
    FALL_DUE,
    FINISH,
    OPEN,
    RECEIVE,
    REQUEUE,
    RETRY,
    WITHDRAW,
    State,
    Transition,
)
from tasks.database import dumps
from tasks.jobs.states import listed
from tasks.statements import Prepared, Row, execute, row, rows

#: The columns that a caller's view of a job is made of, and what decides its further way.
COLUMNS = """id, seq, kind, state, device_id, queue, priority, attempt, max_attempts, deaths, resource_type,
    resource_id, needs, after, owner, labels, submitted_at, due_at, started_at, finished_at, expires_at,
    timeout_seconds, device_ms, epoch, cancel_requested, progress, result, error, celery, webhook_url,
    retried_from"""


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to be recorded. `delay_seconds` and `expires_in_seconds` count from the database's clock."""

    id: str
    kind: str
    device_id: str | None
    queue: str
    request: dict[str, Any]
    owner: str
    priority: int = 5
    state: str = State.QUEUED.value
    max_attempts: int = 1
    resource_type: str | None = None
    resource_id: str | None = None
    needs: Sequence[str] = ()
    after: Sequence[str] = ()
    #: Those of `after` that must be jobs of the same owner; an admin may name anybody's.
    own_after: Sequence[str] = ()
    blob_ids: Sequence[str] = ()
    labels: dict[str, str] = field(default_factory=dict)
    delay_seconds: float | None = None
    expires_in_seconds: float | None = None
    timeout_seconds: float | None = None
    #: What Celery is to be given at the end: see `tasks.celery_bridge.outbox`.
    celery: dict[str, Any] | None = None
    webhook_url: str | None = None
    error: dict[str, Any] | None = None
    #: The predecessors that have to succeed; None for a job that runs however they end.
    requires: Sequence[str] | None = None
    #: What the caller gave, as far as `request` does not say it.
    asked: dict[str, Any] | None = None
    retried_from: str | None = None
    #: Jobs that may wait for the device, this one included; None where it is recorded however many do.
    queue_limit: int | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended: `state` is terminal, `result` or `error` says what came of it."""

    id: str
    state: str
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    device_ms: float | None = None
    #: When the device began with the job, where no statement has recorded that yet: it was claimed ahead.
    started_at: datetime | None = None


def insert(connection: Connection, jobs: Sequence[NewJob]) -> list[Row]:
    """Records jobs in their order. Ids that exist are left as they are and not returned.

    Only what the database adds comes back from it: reading thirty columns takes both sides as long as writing them.
    """
    return _inserted(jobs, _INSERT.rows(connection, {"jobs": dumps(list(jobs))}))


def insert_where(
    connection: Connection, jobs: Sequence[NewJob], room: Mapping[str, int], before: str = ""
) -> list[Row]:
    """The same, if no device of `room` has more jobs waiting than it says; else nothing is recorded.

    Statements `before` run first in the same transaction.
    """
    told = {"jobs": dumps(list(jobs)), "devices": list(room), "rooms": list(room.values())}
    return _inserted(jobs, _INSERT_WHERE.rows(connection, told, before=before))


def insert_up_to(
    connection: Connection, jobs: Sequence[NewJob], highest: int, locks: Sequence[int], slots: int
) -> list[Row]:
    """The same, if no job has a number above `highest` yet; else nothing is recorded.

    That is asked once the transaction has this connection's one of the `slots` of each of `locks`, in their order.
    """
    told: dict[str, Any] = {"jobs": dumps(jobs), "highest": highest, "slots": slots}
    for number, lock in enumerate(locks):
        told[f"lock_{number}"] = lock
    return _inserted(jobs, _insert_up_to(len(locks)).rows(connection, told))


def _inserted(jobs: Sequence[NewJob], stamped: list[Row]) -> list[Row]:
    by_id = {job.id: job for job in jobs}
    return [_row(by_id[one["id"]]) | one for one in stamped]


_INSERT_JOBS = """
        INSERT INTO jobs (id, kind, state, device_id, queue, priority, max_attempts, request, resource_type,
            resource_id, needs, after, blob_ids, owner, labels, due_at, expires_at, timeout_seconds, celery,
            webhook_url, error, requires, asked, retried_from, finished_at)
        SELECT id, kind, state, device_id, queue, priority, max_attempts, request, resource_type, resource_id,
            needs, after, blob_ids, owner, labels,
            clock_timestamp() + make_interval(secs => delay_seconds),
            clock_timestamp() + make_interval(secs => expires_in_seconds), timeout_seconds, nullif(celery, 'null'),
            webhook_url, error, requires, nullif(asked, 'null'), retried_from,
            CASE WHEN state IN ('failed', 'cancelled', 'expired') THEN clock_timestamp() END
        FROM jsonb_to_recordset(%(jobs)s::jsonb) AS new (id text, kind text, state text, device_id text, queue text,
            priority smallint, max_attempts int, request jsonb, resource_type text, resource_id text, needs text[],
            after text[], blob_ids text[], owner text, labels jsonb, delay_seconds float8, expires_in_seconds float8,
            timeout_seconds float8, celery jsonb, webhook_url text, error jsonb, requires text[], asked jsonb,
            retried_from text)
    """

_STAMPED = """
        ON CONFLICT (id) DO NOTHING
        RETURNING id, seq, submitted_at, due_at, expires_at, finished_at
"""

#: The last `seq` that was given, of whatever transaction; 0 before the first.
_LAST_NUMBER = "coalesce(pg_sequence_last_value('jobs_seq_seq'::regclass), 0)"

_INSERT = Prepared("insert_jobs", _INSERT_JOBS + _STAMPED, {"jobs": "jsonb"})

_INSERT_WHERE = Prepared(
    "insert_jobs_where",
    _INSERT_JOBS
    + """
        WHERE NOT EXISTS (SELECT 1 FROM unnest(%(devices)s, %(rooms)s) AS queue (device_id, room) WHERE room < (
            SELECT count(*) FROM (SELECT 1 FROM jobs AS waiting WHERE waiting.device_id = queue.device_id
                AND waiting.finished_at IS NULL AND waiting.state <> 'running' LIMIT queue.room + 1) AS counted))
    """
    + _STAMPED,
    {"jobs": "jsonb", "devices": "text[]", "rooms": "bigint[]"},
)


@lru_cache
def _insert_up_to(locks: int) -> Prepared:
    """The statement that takes so many locks first."""
    taken = " ".join(
        f"WHEN pg_advisory_xact_lock(%(lock_{number})s, mod(pg_backend_pid(), %(slots)s)) IS NULL THEN NULL"
        for number in range(locks)
    )
    # CASE goes by its order, and the sequence is read as it stands then, not as it stood when the statement began. As
    # the argument of the function it is asked once, and costs less than in a WHERE, which would be a step of the plan.
    asked = f"CASE {taken} WHEN {_LAST_NUMBER} <= %(highest)s THEN %(jobs)s END"
    return Prepared(
        f"insert_jobs_up_to_{locks}",
        _INSERT_JOBS.replace("%(jobs)s::jsonb", asked) + _STAMPED,
        {"jobs": "jsonb", "highest": "bigint", "slots": "int", **{f"lock_{number}": "int" for number in range(locks)}},
    )


#: What a job that was just recorded has in the columns that nobody gives.
_AT_FIRST: Row = {
    "attempt": 0, "deaths": 0, "started_at": None, "device_ms": None, "epoch": None, "cancel_requested": False,
    "progress": None, "result": None,
}  # fmt: skip


def _row(job: NewJob) -> Row:
    return {
        **_AT_FIRST, "id": job.id, "kind": job.kind, "state": job.state, "device_id": job.device_id,
        "queue": job.queue, "priority": job.priority, "max_attempts": job.max_attempts,
        "resource_type": job.resource_type, "resource_id": job.resource_id, "needs": list(job.needs),
        "after": list(job.after), "owner": job.owner, "labels": job.labels, "timeout_seconds": job.timeout_seconds,
        "error": job.error, "celery": job.celery, "webhook_url": job.webhook_url,
        "retried_from": job.retried_from,
    }  # fmt: skip


def get(connection: Connection, job_id: str) -> Row | None:
    """One job, or None."""
    return row(connection, f"SELECT {COLUMNS} FROM jobs WHERE id = %(id)s", {"id": job_id})


def get_many(connection: Connection, job_ids: Collection[str]) -> dict[str, Row]:
    """The jobs among `job_ids` that exist, by id."""
    found = rows(connection, f"SELECT {COLUMNS} FROM jobs WHERE id = ANY(%(ids)s)", {"ids": list(job_ids)})
    return {job["id"]: job for job in found}


def request_of(connection: Connection, job_id: str) -> dict[str, Any] | None:
    """The request that a job was recorded with."""
    found = row(connection, "SELECT request FROM jobs WHERE id = %(id)s", {"id": job_id})
    return found["request"] if found else None


def asked_of(connection: Connection, job_id: str) -> Row | None:
    """A job with its request as it was recorded, and what its caller gave of it: see `tasks.jobs.options`."""
    return row(connection, f"SELECT request, asked, {COLUMNS} FROM jobs WHERE id = %(id)s", {"id": job_id})


def states(connection: Connection, job_ids: Collection[str]) -> dict[str, str]:
    """The state of each of `job_ids` that exists."""
    return {job_id: job["state"] for job_id, job in predecessors(connection, job_ids).items()}


def predecessors(connection: Connection, job_ids: Collection[str]) -> dict[str, Row]:
    """State and owner of each of `job_ids` that exists, by id: what a job that waits for them must know."""
    return {job["id"]: job for job in _PREDECESSORS.rows(connection, {"ids": list(job_ids)})}


_PREDECESSORS = Prepared(
    "predecessors_of_jobs", "SELECT id, state, owner FROM jobs WHERE id = ANY(%(ids)s)", {"ids": "text[]"}
)


def is_claimed(job: Row) -> bool:
    """Whether a worker has claimed the job and not ended it."""
    return job["epoch"] is not None and job["finished_at"] is None


#: States of jobs that have their place in a device's queue; a scheduled job has none until it is due.
_IN_QUEUE = tuple(CLAIMABLE - {State.SCHEDULED})


def queue_position(connection: Connection, job: Row) -> int | None:
    """How many jobs in the queue of the same device go before `job`; None once it runs, and above 1,000.

    By priority and order of submission alone: predecessors are not looked at.
    """
    if job["state"] not in CLAIMABLE or job["device_id"] is None:
        return None
    found = row(
        connection,
        """
        SELECT count(*) AS ahead FROM (
            SELECT 1 FROM jobs WHERE device_id = %(device_id)s AND finished_at IS NULL AND state = ANY(%(states)s)
              AND (priority > %(priority)s OR (priority = %(priority)s AND seq < %(seq)s)) LIMIT 1001) AS counted
        """,
        {**job, "states": list(_IN_QUEUE)},
    )
    assert found is not None
    return found["ahead"] if found["ahead"] <= 1000 else None


def page(
    connection: Connection, *, filters: dict[str, Any], label: tuple[str, str] | None, before: int | None, limit: int
) -> list[Row]:
    """Jobs newest first, at most `limit`, submitted before the sequence number `before`."""
    conditions = [f"{name} = %({name})s" for name in filters]
    parameters: dict[str, Any] = {**filters, "limit": limit}
    if label is not None:
        conditions.append("labels ->> %(label_name)s = %(label_value)s")
        parameters |= {"label_name": label[0], "label_value": label[1]}
    if before is not None:
        conditions.append("seq < %(before)s")
        parameters["before"] = before
    where = "WHERE " + " AND ".join(conditions) if conditions else ""
    return rows(connection, f"SELECT {COLUMNS} FROM jobs {where} ORDER BY seq DESC LIMIT %(limit)s", parameters)


#: Which jobs among `ids` may be claimed. An open job has an epoch exactly while a worker holds a claim on it, so that
#: what was claimed ahead of its device, and is still `reserved`, is not claimed twice.
_MAY_BE_CLAIMED = """id = ANY(%(ids)s) AND state = ANY(%(leaving)s) AND epoch IS NULL AND NOT cancel_requested
      AND (expires_at IS NULL OR expires_at > clock_timestamp())
      AND EXISTS (SELECT 1 FROM devices WHERE device_id = %(device_id)s AND epoch = %(epoch)s)"""

#: Jobs that require no other to succeed (nearly all), and jobs for which all that they require have succeeded. Two
#: statements, since the second condition would make each claim a quarter more expensive.
REQUIRES_NONE = "requires IS NULL"
REQUIRES_WHAT_SUCCEEDED = """requires IS NOT NULL AND NOT EXISTS (
      SELECT 1 FROM jobs AS before WHERE before.id = ANY(jobs.requires) AND before.state <> 'succeeded')"""

#: The jobs that a worker has claimed under its epoch: those that its device has begun, and those claimed ahead of it.
CLAIMED_UNDER = f"jobs.state IN {listed(CLAIMED)} AND jobs.epoch = %(epoch)s"

#: The jobs that their worker may end.
FINISH_GUARD = f"jobs.state IN {listed(FINISH.leaving)} AND jobs.epoch = %(epoch)s"


class Claims:
    """A way to claim jobs: its transition, what else it sets, and what it returns besides the request and `COLUMNS`."""

    def __init__(self, name: str, transition: Transition, sets: str, returns: str = "") -> None:
        types = {"ids": "text[]", "epoch": "int", "device_id": "text", "leaving": "text[]"}
        (state,) = transition.entering
        self._leaving = sorted(transition.leaving)
        statement = f"""
            UPDATE jobs SET state = '{state}', {sets}, epoch = %(epoch)s, device_id = %(device_id)s, due_at = NULL
            WHERE {_MAY_BE_CLAIMED} AND {{}} RETURNING request, {returns} {COLUMNS}
        """
        self._usual = Prepared(name, statement.format(REQUIRES_NONE), types)
        self._requiring = Prepared(f"{name}_requiring", statement.format(REQUIRES_WHAT_SUCCEEDED), types)

    def claim(self, connection: Connection, job_ids: Collection[str], device_id: str, epoch: int) -> list[Row]:
        """The rows of what could be claimed."""
        parameters = {"epoch": epoch, "device_id": device_id, "leaving": self._leaving}
        claimed = self._usual.rows(connection, {**parameters, "ids": list(job_ids)})
        if len(claimed) < len(job_ids):
            left = sorted(set(job_ids) - {row["id"] for row in claimed})
            claimed += self._requiring.rows(connection, {**parameters, "ids": left})
        return claimed


_CLAIM = Claims("claim_jobs", CLAIM, "attempt = attempt + 1, started_at = clock_timestamp()")


def claim(connection: Connection, job_ids: Collection[str], device_id: str, epoch: int) -> list[Row]:
    """Claims jobs for one attempt under `epoch`, with their requests. Jobs that were not claimed are not returned.

    A job is not claimed if another claim holds it, if it was asked to be cancelled, has expired, or requires a job that
    has not succeeded (`after_success`), or if the epoch no longer stands. The statement does not look at `after`: the
    worker's scheduler claims only jobs whose predecessors have ended.
    """
    return _CLAIM.claim(connection, job_ids, device_id, epoch)


def end_running(
    connection: Connection, endings: Sequence[Ending], epoch: int, claimed: Mapping[str, Row] | None = None
) -> list[Row]:
    """Ends jobs claimed under `epoch`. Jobs that are not returned had been ended, or put back, by another process.

    `claimed` are the rows as they were claimed: with them, only the columns that an end changes are read.
    """
    told = dumps(list(endings))
    # `dumps` replaces NUL, which PostgreSQL refuses: such a result or error is read back as it was recorded.
    if claimed is None or "\\ufffd" in told or not all(ending.id in claimed for ending in endings):
        return _end(connection, endings, FINISH_GUARD, {"epoch": epoch})
    ids = [ending.id for ending in endings]
    end = _END_RUNNING if all(ending.started_at is None for ending in endings) else _END_AHEAD
    stamped = end.rows(connection, {"endings": told, "ids": ids, "epoch": epoch})
    by_id = {ending.id: ending for ending in endings}
    return [
        {**claimed[one["id"]], **one, "result": by_id[one["id"]].result, "error": by_id[one["id"]].error}
        for one in stamped
    ]


def end_open(
    connection: Connection, endings: Sequence[Ending], leaving: Collection[str] = WITHDRAW.leaving
) -> list[Row]:
    """Ends jobs from any of the states `leaving`, claimed or not. No job succeeds in this way."""
    states = {"leaving": sorted(WITHDRAW.leaving & set(leaving)), "entering": sorted(WITHDRAW.entering)}
    return _end(connection, endings, "jobs.state = ANY(%(leaving)s) AND ended.state = ANY(%(entering)s)", states)


#: How a job's row ends, from a row `ended` that says how.
SET_ENDED = """state = ended.state, result = nullif(ended.result, 'null'), error = nullif(ended.error, 'null'),
            device_ms = coalesce(ended.device_ms, jobs.device_ms), finished_at = clock_timestamp(),
            webhook_attempt = CASE WHEN webhook_url IS NOT NULL THEN 0 END,
            webhook_due_at = CASE WHEN webhook_url IS NOT NULL THEN clock_timestamp() END"""

_ENDINGS = """jsonb_to_recordset(%(endings)s::jsonb)
            AS ended (id text, state text, result jsonb, error jsonb, device_ms float8)"""


def _end_claimed(name: str, sets: str, endings: str) -> Prepared:
    return Prepared(
        name,
        f"""
        UPDATE jobs SET {sets} FROM {endings}
        WHERE jobs.id = ANY(%(ids)s) AND jobs.id = ended.id AND {FINISH_GUARD}
        RETURNING jobs.id, jobs.state, jobs.device_ms, jobs.finished_at, jobs.cancel_requested, jobs.progress
        """,
        {"endings": "jsonb", "ids": "text[]", "epoch": "int"},
    )


_END_RUNNING = _end_claimed("end_running_jobs", SET_ENDED, _ENDINGS)

#: The same for jobs that were claimed ahead of the device: when it began with them may not be recorded yet.
_SET_ENDED_AHEAD = f"""{SET_ENDED}, started_at = coalesce(jobs.started_at, ended.started_at),
            attempt = jobs.attempt + (jobs.state = '{State.RESERVED}' AND ended.started_at IS NOT NULL)::int"""

_ENDINGS_AHEAD = """jsonb_to_recordset(%(endings)s::jsonb)
            AS ended (id text, state text, result jsonb, error jsonb, device_ms float8, started_at timestamptz)"""

_END_AHEAD = _end_claimed("end_jobs_claimed_ahead", _SET_ENDED_AHEAD, _ENDINGS_AHEAD)


def _end(connection: Connection, endings: Sequence[Ending], guard: str, parameters: dict[str, Any]) -> list[Row]:
    columns = ", ".join("jobs." + name.strip() for name in COLUMNS.split(","))
    return rows(
        connection,
        f"""
        UPDATE jobs SET {_SET_ENDED_AHEAD} FROM {_ENDINGS_AHEAD} WHERE jobs.id = ended.id AND {guard}
        RETURNING {columns}
        """,
        {"endings": dumps(list(endings)), **parameters},
    )


def retry(connection: Connection, claimed: Row, epoch: int, error: dict[str, Any], delay_seconds: float) -> Row | None:
    """Puts a job back for another attempt after `delay_seconds`; its last error stays readable meanwhile.

    `claimed` is its row as the worker has it, whose attempts count.
    """
    return row(
        connection,
        f"""
        UPDATE jobs SET state = '{State.RETRYING}', error = %(error)s::jsonb, attempt = %(attempt)s, epoch = NULL,
            started_at = NULL, due_at = clock_timestamp() + make_interval(secs => %(delay)s)
        WHERE id = %(id)s AND state IN {listed(RETRY.leaving)} AND epoch = %(epoch)s RETURNING {COLUMNS}
        """,
        {**claimed, "epoch": epoch, "error": dumps(error), "delay": delay_seconds},
    )


def mark_reserved(connection: Connection, job_ids: Collection[str]) -> None:
    """Notes in bulk that a worker holds these jobs in its scheduler."""
    execute(
        connection,
        f"UPDATE jobs SET state = '{State.RESERVED}' WHERE id = ANY(%(ids)s) AND state IN {listed(RECEIVE.leaving)}",
        {"ids": list(job_ids)},
    )


def request_cancel(connection: Connection, job_ids: Collection[str]) -> list[Row]:
    """Notes that callers want jobs cancelled; gives those that have not ended."""
    return rows(
        connection,
        f"""
        UPDATE jobs SET cancel_requested = true WHERE id = ANY(%(ids)s) AND state IN {listed(OPEN)} RETURNING {COLUMNS}
        """,
        {"ids": list(job_ids)},
    )


def waiting(connection: Connection, device_id: str, older_than_seconds: float, limit: int) -> list[Row]:
    """Jobs of the device that wait for a worker, oldest first: each row is its own outbox."""
    return rows(
        connection,
        f"""
        SELECT request, {COLUMNS} FROM jobs
        WHERE device_id = %(device_id)s AND finished_at IS NULL AND state IN ('queued', 'reserved') AND epoch IS NULL
          AND submitted_at < clock_timestamp() - make_interval(secs => %(age)s)
        ORDER BY seq LIMIT %(limit)s
        """,
        {"device_id": device_id, "age": older_than_seconds, "limit": limit},
    )


def make_due(connection: Connection, limit: int) -> list[Row]:
    """Scheduled and retrying jobs whose time has come become `queued`, with their requests for publishing."""
    return rows(
        connection,
        f"""
        UPDATE jobs SET state = '{State.QUEUED}', due_at = NULL WHERE id IN (
            SELECT id FROM jobs WHERE due_at <= clock_timestamp() AND finished_at IS NULL
              AND state IN {listed(FALL_DUE.leaving)} ORDER BY due_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
          AND state IN {listed(FALL_DUE.leaving)}
        RETURNING request, {COLUMNS}
        """,
        {"limit": limit},
    )


def expired(connection: Connection, limit: int) -> list[Row]:
    """Jobs that waited past their expiry and that no worker has claimed: a worker ends those that it has itself."""
    return rows(
        connection,
        f"SELECT {COLUMNS} FROM jobs WHERE expires_at <= clock_timestamp() AND finished_at IS NULL "
        f"AND state IN {listed(CLAIMABLE)} AND epoch IS NULL LIMIT %(limit)s",
        {"limit": limit},
    )


def expired_among(connection: Connection, job_ids: Collection[str]) -> set[str]:
    """Those of `job_ids` whose expiry is past, by the database's clock."""
    found = rows(
        connection,
        "SELECT id FROM jobs WHERE id = ANY(%(ids)s) AND expires_at <= clock_timestamp()",
        {"ids": list(job_ids)},
    )
    return {job["id"] for job in found}


def claimed_under(connection: Connection, device_id: str, epoch: int) -> list[Row]:
    """Jobs that a device's epochs up to `epoch` have claimed and not ended, locked."""
    return rows(
        connection,
        f"""
        SELECT {COLUMNS} FROM jobs
        WHERE device_id = %(device_id)s AND finished_at IS NULL AND state IN {listed(CLAIMED)}
          AND epoch <= %(epoch)s
        ORDER BY seq FOR UPDATE
        """,
        {"device_id": device_id, "epoch": epoch},
    )


def requeue(connection: Connection, job_ids: Collection[str], *, died: bool) -> list[Row]:
    """Claimed jobs become `queued` again, with their requests; `died` counts a worker's death against each.

    What its worker did not live to end was no attempt.
    """
    return rows(
        connection,
        f"""
        UPDATE jobs SET state = '{State.QUEUED}', deaths = deaths + %(died)s,
            attempt = attempt - (state = '{State.RUNNING}')::int,
            started_at = NULL, epoch = NULL, progress = NULL
        WHERE id = ANY(%(ids)s) AND state IN {listed(REQUEUE.leaving)} RETURNING request, {COLUMNS}
        """,
        {"ids": list(job_ids), "died": int(died)},
    )


def open_needing(connection: Connection, resource_ids: Collection[str]) -> list[Row]:
    """Jobs that no worker has claimed and that need any of the resources."""
    return rows(
        connection,
        f"""
        SELECT {COLUMNS} FROM jobs
        WHERE finished_at IS NULL AND state IN {listed(CLAIMABLE)} AND epoch IS NULL AND needs && %(ids)s::text[]
        ORDER BY seq
        """,
        {"ids": list(resource_ids)},
    )


def open_requiring(connection: Connection, job_ids: Collection[str]) -> list[Row]:
    """Jobs that no worker has claimed and that require any of `job_ids` to succeed; `requires` names what they do."""
    return rows(
        connection,
        f"""
        SELECT {COLUMNS}, requires FROM jobs
        WHERE finished_at IS NULL AND requires IS NOT NULL AND requires && %(ids)s::text[] AND epoch IS NULL
        ORDER BY seq
        """,
        {"ids": list(job_ids)},
    )


def failed_before(connection: Connection, job_ids: Collection[str]) -> dict[str, Row]:
    """For those of `job_ids` that require a job which did not succeed, one such job: id, kind, state and error."""
    found = rows(
        connection,
        """
        SELECT jobs.id AS after_id, before.id, before.kind, before.state, before.error
        FROM jobs JOIN jobs AS before ON before.id = ANY(jobs.requires)
        WHERE jobs.id = ANY(%(ids)s) AND before.finished_at IS NOT NULL AND before.state <> 'succeeded'
        """,
        {"ids": list(job_ids)},
    )
    return {row.pop("after_id"): row for row in found}


def open_ids_needing(connection: Connection, resource_id: str) -> list[str]:
    """Open jobs, running ones too, that need the resource."""
    found = rows(
        connection,
        "SELECT id FROM jobs WHERE finished_at IS NULL AND %(id)s = ANY(needs) ORDER BY seq",
        {"id": resource_id},
    )
    return [job["id"] for job in found]


def open_ids_of(connection: Connection, resource_id: str) -> list[str]:
    """Those of them whose own resource it is: they make it, or take it away."""
    found = rows(
        connection,
        "SELECT id FROM jobs WHERE finished_at IS NULL AND %(id)s = ANY(needs) AND resource_id = %(id)s ORDER BY seq",
        {"id": resource_id},
    )
    return [job["id"] for job in found]


def request_cancel_of(connection: Connection, job_ids: Collection[str], *, but_not_of: str) -> list[str]:
    """Notes for jobs among `job_ids` that they are to be cancelled, but for those whose own resource `but_not_of` is.

    Gives those that are open.
    """
    found = rows(
        connection,
        "UPDATE jobs SET cancel_requested = true WHERE id = ANY(%(ids)s) AND resource_id IS DISTINCT FROM %(resource)s "
        f"AND state IN {listed(OPEN)} RETURNING id",
        {"ids": list(job_ids), "resource": but_not_of},
    )
    return [job["id"] for job in found]


def to_be_cancelled(connection: Connection, resource_id: str) -> list[Row]:
    """Open jobs that need the resource and were asked to be cancelled: id and device."""
    return rows(
        connection,
        "SELECT id, device_id FROM jobs WHERE finished_at IS NULL AND %(id)s = ANY(needs) AND cancel_requested "
        "AND device_id IS NOT NULL ORDER BY seq",
        {"id": resource_id},
    )


def set_progress(connection: Connection, job_id: str, epoch: int, progress: dict[str, Any]) -> None:
    """Notes how far a running job is."""
    execute(
        connection,
        f"UPDATE jobs SET progress = %(progress)s::jsonb WHERE id = %(id)s AND {CLAIMED_UNDER}",
        {"id": job_id, "epoch": epoch, "progress": dumps(progress)},
    )


def counts(connection: Connection) -> dict[str, dict[str, int]]:
    """For each device, how many jobs are waiting and running: `{device_id: {"queued": n, "running": n}}`."""
    found = rows(
        connection,
        """
        SELECT coalesce(device_id, '') AS device_id, count(*) FILTER (WHERE state <> 'running') AS queued,
            count(*) FILTER (WHERE state = 'running') AS running
        FROM jobs WHERE finished_at IS NULL GROUP BY 1
        """,
    )
    return {entry["device_id"]: {"queued": entry["queued"], "running": entry["running"]} for entry in found}


def waiting_counts(connection: Connection, limits: Mapping[str, int]) -> dict[str, int]:
    """How many jobs wait for each device of `limits`, counted up to its limit."""
    found = rows(
        connection,
        """
        SELECT queue.device_id, (SELECT count(*) FROM (SELECT 1 FROM jobs WHERE jobs.device_id = queue.device_id
            AND finished_at IS NULL AND state <> 'running' LIMIT queue.room) AS counted) AS waiting
        FROM unnest(%(devices)s::text[], %(limits)s::bigint[]) AS queue (device_id, room)
        """,
        {"devices": list(limits), "limits": list(limits.values())},
    )
    return {entry["device_id"]: entry["waiting"] for entry in found}


def open_counts(connection: Connection, limits: Mapping[str, int], *, before: str = "") -> dict[str, int]:
    """How many jobs wait for each device of `limits` or run there, counted up to its limit; after statements `before`.

    Those run in the same transaction, and what they waited for is seen.
    """
    found = rows(
        connection,
        before
        + """
        SELECT queue.device_id, (SELECT count(*) FROM (SELECT 1 FROM jobs WHERE jobs.device_id = queue.device_id
            AND finished_at IS NULL LIMIT queue.room) AS counted) AS open
        FROM unnest(%(devices)s::text[], %(limits)s::bigint[]) AS queue (device_id, room)
        """,
        {"devices": list(limits), "limits": list(limits.values())},
    )
    return {entry["device_id"]: entry["open"] for entry in found}


def last_number(connection: Connection) -> int:
    """The highest `seq` that any job was given, recorded already or not."""
    found = row(connection, f"SELECT {_LAST_NUMBER} AS number")
    assert found is not None
    number: int = found["number"]
    return number


def totals(connection: Connection) -> list[Row]:
    """How many jobs are in each state, by kind, among those still kept."""
    return rows(connection, "SELECT kind, state, count(*) AS jobs FROM jobs GROUP BY kind, state")


def forget(connection: Connection, older_than_days: float, limit: int) -> int:
    """Deletes jobs that ended longer ago than the retention, with the idempotency keys that promise them.

    Training steps that may have to be made again keep their jobs.
    """
    gone = rows(
        connection,
        """
        DELETE FROM jobs WHERE id IN (SELECT id FROM jobs
            WHERE finished_at < clock_timestamp() - make_interval(secs => %(seconds)s)
              AND NOT EXISTS (SELECT 1 FROM training_steps s WHERE s.job_id = jobs.id AND s.kept) LIMIT %(limit)s)
        RETURNING id
        """,
        {"seconds": older_than_days * 86400, "limit": limit},
    )
    if gone:
        ids = [job["id"] for job in gone]
        execute(connection, "DELETE FROM idempotency WHERE job_ids && %(ids)s::text[]", {"ids": ids})
        execute(connection, "DELETE FROM resource_order WHERE last_job_id = ANY(%(ids)s)", {"ids": ids})
    return len(gone)


def _milliseconds(start: datetime | None, end: datetime | None) -> float | None:
    return None if start is None or end is None else round((end - start).total_seconds() * 1000, 3)


def timings(job: Row) -> dict[str, float | None]:
    """Milliseconds from submission to start, on the device, and from submission to the end."""
    return {
        "queued_ms": _milliseconds(job["submitted_at"], job["started_at"]),
        "device_ms": job["device_ms"],
        "total_ms": _milliseconds(job["submitted_at"], job["finished_at"]),
    }


def view(job: Row, queue_position: int | None = None) -> dict[str, Any]:
    """The job as every caller sees it: the fields of `device_operations.jobs.Job`. Times are aware datetimes."""
    resource = {"type": job["resource_type"], "id": job["resource_id"]} if job["resource_id"] else None
    return {
        "job_id": job["id"],
        "kind": job["kind"],
        "state": job["state"],
        "celery_state": State(job["state"]).celery,
        "device_id": job["device_id"],
        "queue": job["queue"],
        "priority": job["priority"],
        "attempt": job["attempt"],
        "max_attempts": job["max_attempts"],
        "queue_position": queue_position,
        "progress": job["progress"],
        "resource": resource,
        "submitted_at": job["submitted_at"],
        "started_at": job["started_at"],
        "finished_at": job["finished_at"],
        "expires_at": job["expires_at"],
        "timings": timings(job),
        "result": job["result"],
        "error": job["error"],
        "owner": job["owner"],
        "labels": job["labels"],
        "deaths": job["deaths"],
        "retried_from": job["retried_from"],
    }
