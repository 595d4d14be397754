"""Allocations: recording, activating, ending, listing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import Connection

from device_operations.wire.json_types import JsonObject
from tasks.database import dumps
from tasks.memory.rows import AllocationBeingFreed, AllocationRow, FreedAllocation, LostAllocation
from tasks.statements import execute, row, rows

#: The states in which an allocation counts against its device's budget, as SQL.
_LIVE = "state IN ('pending', 'active')"


def insert(connection: Connection, allocations: Sequence[JsonObject]) -> dict[str, str]:
    """Records allocations as `pending`; gives `{allocation_id: job_id}` of those recorded.

    An id whose allocation has ended is used anew by the same owner; any other id that is taken is left as it is.
    """
    found = rows(
        connection,
        """
        INSERT INTO allocations AS old (allocation_id, device_id, state, size_bytes, dtype, shape, label, owner, job_id,
            request_sha256, ttl_seconds, expires_at)
        SELECT DISTINCT ON (allocation_id) allocation_id, device_id, 'pending', size_bytes, dtype, shape, label, owner,
            job_id, request_sha256, ttl_seconds, clock_timestamp() + make_interval(secs => ttl_seconds)
        FROM (SELECT *, row_number() OVER () AS place FROM jsonb_to_recordset(%(allocations)s::jsonb)
            AS new (allocation_id text, device_id text, size_bytes bigint, dtype text, shape jsonb, label text,
                owner text, job_id text, request_sha256 text, ttl_seconds float8)) AS ordered
        ORDER BY allocation_id, place
        ON CONFLICT (allocation_id) DO UPDATE SET device_id = excluded.device_id, epoch = NULL, state = 'pending',
            size_bytes = excluded.size_bytes, dtype = excluded.dtype, shape = excluded.shape, label = excluded.label,
            job_id = excluded.job_id, request_sha256 = excluded.request_sha256, freeing_job_id = NULL, sha256 = NULL,
            error = NULL, created_at = clock_timestamp(), ttl_seconds = excluded.ttl_seconds,
            expires_at = excluded.expires_at, ended_at = NULL
        WHERE old.state NOT IN ('pending', 'active') AND old.owner = excluded.owner
        RETURNING allocation_id, job_id
        """,
        {"allocations": dumps(list(allocations))},
    )
    return {entry["allocation_id"]: entry["job_id"] for entry in found}


def get(connection: Connection, allocation_id: str) -> AllocationRow | None:
    """One allocation, or None."""
    return row(connection, "SELECT * FROM allocations WHERE allocation_id = %(id)s", {"id": allocation_id})


def get_many(connection: Connection, allocation_ids: Collection[str]) -> dict[str, AllocationRow]:
    """The allocations among `allocation_ids` that exist, by id."""
    found = rows(
        connection, "SELECT * FROM allocations WHERE allocation_id = ANY(%(ids)s)", {"ids": list(allocation_ids)}
    )
    return {entry["allocation_id"]: entry for entry in found}


def names_another(connection: Connection, ids: Collection[str]) -> set[str]:
    """Those of `ids` that are the id of a model or a session.

    Jobs wait for, and fall with, what they name by id: an allocation of the same id would be taken for it.
    """
    found = rows(
        connection,
        """
        SELECT model_id AS id FROM models WHERE model_id = ANY(%(ids)s)
        UNION ALL SELECT session_id FROM inference_sessions WHERE session_id = ANY(%(ids)s)
        UNION ALL SELECT session_id FROM training_sessions WHERE session_id = ANY(%(ids)s)
        """,
        {"ids": list(ids)},
    )
    return {entry["id"] for entry in found}


def page(
    connection: Connection, *, filters: Mapping[str, object], before: tuple[str, str] | None, limit: int
) -> list[AllocationRow]:
    """Allocations newest first, at most `limit`, after the place `before` (creation time and id) in that order."""
    conditions = [f"{name} = %({name})s" for name in filters]
    parameters: dict[str, object] = {**filters, "limit": limit}
    if before is not None:
        conditions.append("(created_at, allocation_id) < (%(before_at)s::timestamptz, %(before_id)s)")
        parameters |= {"before_at": before[0], "before_id": before[1]}
    where = "WHERE " + " AND ".join(conditions) if conditions else ""
    return rows(
        connection,
        f"SELECT * FROM allocations {where} ORDER BY created_at DESC, allocation_id DESC LIMIT %(limit)s",
        parameters,
    )


def activate(connection: Connection, allocation_ids: Collection[str], epoch: int) -> None:
    """The device holds these allocations' bytes from now on."""
    execute(
        connection,
        """
        UPDATE allocations SET state = 'active', epoch = %(epoch)s
        WHERE allocation_id = ANY(%(ids)s) AND state = 'pending'
        """,
        {"ids": list(allocation_ids), "epoch": epoch},
    )


def end(
    connection: Connection, ended: Collection[tuple[str, str]], state: str, error: JsonObject | None = None
) -> list[FreedAllocation]:
    """Live allocations become `freed` or `failed`; gives the rows of those that were live.

    `ended` are pairs of allocation and job: one is `failed` only by the job that was to make it.
    """
    return rows(
        connection,
        f"""
        UPDATE allocations SET state = %(state)s, error = %(error)s::jsonb, ended_at = clock_timestamp(),
            freeing_job_id = NULL, sha256 = NULL
        FROM unnest(%(ids)s::text[], %(jobs)s::text[]) AS gone (id, job)
        WHERE allocation_id = gone.id AND {_LIVE} AND (%(state)s <> 'failed' OR job_id = gone.job)
        RETURNING allocation_id, device_id, size_bytes
        """,
        {
            "ids": [allocation_id for allocation_id, _ in ended],
            "jobs": [job_id for _, job_id in ended],
            "state": state,
            "error": None if error is None else dumps(error),
        },
    )


def lose(connection: Connection, device_id: str, epoch: int) -> list[LostAllocation]:
    """What the device's epochs up to `epoch` held is `lost`."""
    return rows(
        connection,
        """
        UPDATE allocations SET state = 'lost', ended_at = clock_timestamp(), sha256 = NULL
        WHERE device_id = %(id)s AND state = 'active' AND epoch <= %(epoch)s RETURNING allocation_id, size_bytes
        """,
        {"id": device_id, "epoch": epoch},
    )


def set_freeing(connection: Connection, freeing: dict[str, str]) -> dict[str, str]:
    """Notes the job that frees each allocation; gives `{allocation_id: job_id}` of those that no earlier one frees."""
    found = rows(
        connection,
        f"""
        UPDATE allocations SET freeing_job_id = new.job_id
        FROM unnest(%(ids)s::text[], %(jobs)s::text[]) AS new (id, job_id)
        WHERE allocation_id = new.id AND {_LIVE} AND freeing_job_id IS NULL
        RETURNING allocation_id, freeing_job_id
        """,
        {"ids": list(freeing), "jobs": list(freeing.values())},
    )
    return {entry["allocation_id"]: entry["freeing_job_id"] for entry in found}


def clear_freeing(connection: Connection, job_ids: Collection[str]) -> None:
    """Deallocations ended without freeing anything."""
    execute(
        connection,
        "UPDATE allocations SET freeing_job_id = NULL WHERE freeing_job_id = ANY(%(ids)s)",
        {"ids": list(job_ids)},
    )


def being_freed(connection: Connection, device_id: str) -> list[AllocationBeingFreed]:
    """Live allocations of the device whose deallocation waits its turn or runs: id, size and that job's id."""
    return rows(
        connection,
        f"""
        SELECT a.allocation_id, a.size_bytes, a.freeing_job_id FROM allocations a JOIN jobs j ON j.id = a.freeing_job_id
        WHERE a.device_id = %(id)s AND a.{_LIVE} AND j.state IN ('queued', 'reserved', 'running')
        """,
        {"id": device_id},
    )


def set_sha256(connection: Connection, hashes: dict[str, tuple[str | None, str]]) -> None:
    """Notes the hash of all bytes of each allocation, and the job that found it out; None: it is not known.

    Where a later job names the allocation already, that one may change it: then nothing is noted.
    """
    execute(
        connection,
        f"""
        UPDATE allocations SET sha256 = CASE WHEN o.last_job_id = new.job_id THEN new.sha256 END
        FROM unnest(%(ids)s::text[], %(hashes)s::text[], %(jobs)s::text[]) AS new (id, sha256, job_id)
            LEFT JOIN resource_order o ON o.resource_id = new.id
        WHERE allocation_id = new.id AND {_LIVE}
          AND (allocations.sha256 IS NOT NULL OR new.sha256 IS NOT NULL)
        """,
        {
            "ids": list(hashes),
            "hashes": [sha256 for sha256, _ in hashes.values()],
            "jobs": [job_id for _, job_id in hashes.values()],
        },
    )


def forget_sha256(connection: Connection, allocation_ids: Collection[str]) -> None:
    """These allocations' bytes are about to change."""
    execute(
        connection,
        "UPDATE allocations SET sha256 = NULL WHERE allocation_id = ANY(%(ids)s) AND sha256 IS NOT NULL",
        {"ids": list(allocation_ids)},
    )


def renew(connection: Connection, allocation_id: str, ttl_seconds: float) -> AllocationRow | None:
    """Gives a live allocation that is not being freed a new time to live, counted from now."""
    return row(
        connection,
        f"""
        UPDATE allocations SET ttl_seconds = %(ttl)s, expires_at = clock_timestamp() + make_interval(secs => %(ttl)s)
        WHERE allocation_id = %(id)s AND {_LIVE} AND freeing_job_id IS NULL RETURNING *
        """,
        {"id": allocation_id, "ttl": ttl_seconds},
    )


def expired(connection: Connection, limit: int) -> list[AllocationRow]:
    """Live allocations on living devices whose time is up and that nothing frees yet."""
    return rows(
        connection,
        f"""
        SELECT a.* FROM allocations a JOIN devices d USING (device_id)
        WHERE a.{_LIVE} AND a.expires_at <= clock_timestamp() AND a.freeing_job_id IS NULL
          AND d.lease_until > clock_timestamp()
        ORDER BY a.expires_at LIMIT %(limit)s
        """,
        {"limit": limit},
    )


def forget(connection: Connection, older_than_days: float, limit: int) -> None:
    """Deletes allocations that ended longer ago than the retention."""
    execute(
        connection,
        f"""
        DELETE FROM allocations WHERE allocation_id IN (SELECT allocation_id FROM allocations
            WHERE ended_at < clock_timestamp() - make_interval(secs => %(seconds)s) LIMIT %(limit)s)
        AND NOT {_LIVE}
        """,
        {"seconds": older_than_days * 86400, "limit": limit},
    )
