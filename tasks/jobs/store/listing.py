"""Reading jobs: by id, by page, and how many there are."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sqlalchemy import Connection

from device_operations.jobs import CLAIMABLE, State
from device_operations.wire.json_types import FreeJson
from tasks.jobs.model import AskedRow, JobRow, KindCount, Predecessor
from tasks.jobs.store.columns import SELECTED
from tasks.statements import Prepared, execute, row, rows


def get(connection: Connection, job_id: str) -> JobRow | None:
    """One job, or None."""
    return row(connection, f"SELECT {SELECTED} FROM jobs WHERE id = %(id)s", {"id": job_id})


def get_many(connection: Connection, job_ids: Collection[str]) -> dict[str, JobRow]:
    """The jobs among `job_ids` that exist, by id."""
    found = rows(connection, f"SELECT {SELECTED} FROM jobs WHERE id = ANY(%(ids)s)", {"ids": list(job_ids)})
    return {job["id"]: job for job in found}


def request_of(connection: Connection, job_id: str) -> FreeJson | None:
    """The request that a job was recorded with."""
    found = row(connection, "SELECT request FROM jobs WHERE id = %(id)s", {"id": job_id})
    return found["request"] if found else None


def asked_of(connection: Connection, job_id: str) -> AskedRow | None:
    """A job with its request as it was recorded, and what its caller gave of it: see `tasks.jobs.options`."""
    return row(connection, f"SELECT request, asked, {SELECTED} FROM jobs WHERE id = %(id)s", {"id": job_id})


def states(connection: Connection, job_ids: Collection[str]) -> dict[str, str]:
    """The state of each of `job_ids` that exists."""
    return {job_id: job["state"] for job_id, job in predecessors(connection, job_ids).items()}


def predecessors(connection: Connection, job_ids: Collection[str]) -> dict[str, Predecessor]:
    """State and owner of each of `job_ids` that exists, by id: what a job that waits for them must know."""
    return {job["id"]: job for job in _PREDECESSORS.rows(connection, {"ids": list(job_ids)})}


_PREDECESSORS = Prepared(
    "predecessors_of_jobs", "SELECT id, state, owner FROM jobs WHERE id = ANY(%(ids)s)", {"ids": "text[]"}
)


#: States of jobs that have their place in a device's queue; a scheduled job has none until it is due.
_IN_QUEUE = tuple(CLAIMABLE - {State.SCHEDULED})


def queue_position(connection: Connection, job: JobRow) -> int | None:
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
    connection: Connection,
    *,
    filters: Mapping[str, object],
    label: tuple[str, str] | None,
    before: int | None,
    limit: int,
) -> list[JobRow]:
    """Jobs newest first, at most `limit`, submitted before the sequence number `before`."""
    conditions = [f"{name} = %({name})s" for name in filters]
    parameters: dict[str, object] = {**filters, "limit": limit}
    if label is not None:
        conditions.append("labels ->> %(label_name)s = %(label_value)s")
        parameters |= {"label_name": label[0], "label_value": label[1]}
    if before is not None:
        conditions.append("seq < %(before)s")
        parameters["before"] = before
    where = "WHERE " + " AND ".join(conditions) if conditions else ""
    return rows(connection, f"SELECT {SELECTED} FROM jobs {where} ORDER BY seq DESC LIMIT %(limit)s", parameters)


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


def totals(connection: Connection) -> list[KindCount]:
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
