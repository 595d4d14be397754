"""The order of jobs on one resource, and the answers that were promised for idempotency keys."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import Connection

from tasks.jobs.model import KeyAnswer
from tasks.statements import Prepared, execute, row


def lock_order(connection: Connection, resource_ids: Collection[str]) -> dict[str, str | None]:
    """Locks the resources in order of id, and gives the last job of each."""
    found = _LOCK.rows(connection, {"ids": sorted(set(resource_ids))})
    return {entry["resource_id"]: entry["last_job_id"] for entry in found}


_LOCK = Prepared(
    "lock_order",
    """
        INSERT INTO resource_order (resource_id) SELECT resource_id FROM unnest(%(ids)s) AS resource_id
        ORDER BY resource_id
        ON CONFLICT (resource_id) DO UPDATE SET last_job_id = resource_order.last_job_id
        RETURNING resource_id, last_job_id
    """,
    {"ids": "text[]"},
)


def set_order(connection: Connection, last: dict[str, str]) -> None:
    """Notes the last job of each resource."""
    _SET.rows(connection, {"ids": list(last), "jobs": list(last.values())})


_SET = Prepared(
    "set_order",
    """
        UPDATE resource_order SET last_job_id = new.last_job_id
        FROM unnest(%(ids)s, %(jobs)s) AS new (resource_id, last_job_id)
        WHERE resource_order.resource_id = new.resource_id
        RETURNING resource_order.resource_id
    """,
    {"ids": "text[]", "jobs": "text[]"},
)


def remember_key(
    connection: Connection, owner: str, route: str, key: str, body_sha256: str, job_ids: Sequence[str]
) -> KeyAnswer | None:
    """Keeps the answer for an idempotency key; gives the earlier answer where there is one."""
    parameters = {"owner": owner, "route": route, "key": key, "sha": body_sha256, "ids": list(job_ids)}
    inserted = execute(
        connection,
        """
        INSERT INTO idempotency (owner, route, key, body_sha256, job_ids)
        VALUES (%(owner)s, %(route)s, %(key)s, %(sha)s, %(ids)s) ON CONFLICT DO NOTHING
        """,
        parameters,
    )
    return None if inserted else recall_key(connection, owner, route, key)


def amend_key(connection: Connection, owner: str, route: str, key: str, job_ids: Sequence[str]) -> None:
    """Changes the jobs of a key that was just remembered: earlier jobs already did what was asked."""
    execute(
        connection,
        "UPDATE idempotency SET job_ids = %(ids)s WHERE owner = %(owner)s AND route = %(route)s AND key = %(key)s",
        {"owner": owner, "route": route, "key": key, "ids": list(job_ids)},
    )


def recall_key(connection: Connection, owner: str, route: str, key: str) -> KeyAnswer | None:
    """What was answered for an idempotency key: `body_sha256`, and the ids of the jobs (or of the session) in order."""
    return row(
        connection,
        "SELECT body_sha256, job_ids FROM idempotency WHERE owner = %(owner)s AND route = %(route)s AND key = %(key)s",
        {"owner": owner, "route": route, "key": key},
    )
