"""Recording new jobs, under a limit on how many wait for a device where one is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TypedDict

from sqlalchemy import Connection

from tasks.database import dumps
from tasks.jobs.model import JobRow, NewJob
from tasks.jobs.store.columns import GIVEN, INSERTED, INSERTED_VALUES, STAMPED
from tasks.statements import Prepared, row


def insert(connection: Connection, jobs: Sequence[NewJob]) -> list[JobRow]:
    """Records jobs in their order. Ids that exist are left as they are and not returned.

    Only what the database adds comes back from it: reading thirty columns takes both sides as long as writing them.
    """
    return _inserted(jobs, _INSERT.rows(connection, {"jobs": dumps(list(jobs))}))


def insert_where(
    connection: Connection, jobs: Sequence[NewJob], room: Mapping[str, int], before: str = ""
) -> list[JobRow]:
    """The same, if no device of `room` has more jobs waiting than it says; else nothing is recorded.

    Statements `before` run first in the same transaction.
    """
    parameters = {"jobs": dumps(list(jobs)), "devices": list(room), "rooms": list(room.values())}
    return _inserted(jobs, _INSERT_WHERE.rows(connection, parameters, before=before))


def insert_up_to(
    connection: Connection, jobs: Sequence[NewJob], highest: int, locks: Sequence[int], slots: int
) -> list[JobRow]:
    """The same, if no job has a number above `highest` yet; else nothing is recorded.

    That is asked once the transaction has this connection's one of the `slots` of each of `locks`, in their order.
    """
    parameters: dict[str, object] = {"jobs": dumps(jobs), "highest": highest, "slots": slots}
    for number, lock in enumerate(locks):
        parameters[f"lock_{number}"] = lock
    return _inserted(jobs, _insert_up_to(len(locks)).rows(connection, parameters))


class Stamped(TypedDict):
    """What PostgreSQL adds to a new job: `STAMPED`."""

    id: str
    seq: int
    submitted_at: datetime
    due_at: datetime | None
    expires_at: datetime | None
    finished_at: datetime | None


def _inserted(jobs: Sequence[NewJob], stamped: list[Stamped]) -> list[JobRow]:
    by_id = {job.id: job for job in jobs}
    return [_row(by_id[one["id"]], one) for one in stamped]


_INSERT_JOBS = f"""
        INSERT INTO jobs ({INSERTED}) SELECT {INSERTED_VALUES}
        FROM jsonb_to_recordset(%(jobs)s::jsonb) AS new ({GIVEN})
    """

_STAMPED = f"""
        ON CONFLICT (id) DO NOTHING RETURNING {STAMPED}
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


def _row(job: NewJob, stamped: Stamped) -> JobRow:
    """The row of a job that was just recorded."""
    return {
        "id": job.id, "seq": stamped["seq"], "kind": job.kind, "state": job.state, "device_id": job.device_id,
        "queue": job.queue, "priority": job.priority, "attempt": 0, "max_attempts": job.max_attempts, "deaths": 0,
        "resource_type": job.resource_type, "resource_id": job.resource_id, "needs": list(job.needs),
        "after": list(job.after), "owner": job.owner, "labels": job.labels, "submitted_at": stamped["submitted_at"],
        "due_at": stamped["due_at"], "started_at": None, "finished_at": stamped["finished_at"],
        "expires_at": stamped["expires_at"], "timeout_seconds": job.timeout_seconds, "device_ms": None, "epoch": None,
        "cancel_requested": False, "progress": None, "result": None, "error": job.error, "celery": job.celery,
        "webhook_url": job.webhook_url, "retried_from": job.retried_from,
    }  # fmt: skip


def last_number(connection: Connection) -> int:
    """The highest `seq` that any job was given, recorded already or not."""
    found = row(connection, f"SELECT {_LAST_NUMBER} AS number")
    assert found is not None
    number: int = found["number"]
    return number
