"""How the memory of devices stands: what is reserved, used and by whom, and what lies on each. Records only."""

from __future__ import annotations

from sqlalchemy import Connection

from tasks.inference.models import LIVE
from tasks.memory.rows import HeldRow, MemoryStanding
from tasks.statements import Row, rows

#: What lies on devices or is about to, with what it holds of their budgets, for whom, and since when. A graph is one
#: thing, however many models share it.
_THINGS = f"""
    SELECT device_id, ARRAY[owner] AS owners, state, size_bytes, 'allocation' AS type, allocation_id AS id,
        created_at AS since
    FROM allocations WHERE state IN ('pending', 'active')
    UNION ALL
    SELECT g.device_id, array_agg(DISTINCT m.owner),
        CASE WHEN bool_or(m.state = 'loaded') THEN 'loaded' ELSE 'lost' END, g.reserved_bytes, 'model',
        g.content_key, g.created_at
    FROM graphs g JOIN models m USING (device_id, content_key) WHERE m.state IN {LIVE}
    GROUP BY g.device_id, g.content_key
    UNION ALL
    SELECT device_id, ARRAY[owner], state, reserved_bytes, 'training_session', session_id, opened_at
    FROM training_sessions WHERE state IN ('initializing', 'ready', 'restored')"""


def standing(connection: Connection, device_id: str | None = None) -> list[MemoryStanding]:
    """Every device's memory (or one's), in one statement, so that the figures fit together.

    `used_bytes` is what allocations, models and training sessions hold; `reserved_bytes` counts what is about to be
    made too, and `awaiting_bytes` what was admitted beyond the budget against memory that is about to be freed. What a
    device cannot measure, or an offline one no longer measures, is None. A graph that models of several owners share
    counts once for each of them in `by_owner`, and once everywhere else.
    """
    found = rows(
        connection,
        f"""
        WITH things AS ({_THINGS}),
        owned AS (SELECT device_id, owner, sum(size_bytes)::bigint AS size_bytes
            FROM things, unnest(owners) AS owner GROUP BY 1, 2),
        owners AS (SELECT device_id, jsonb_object_agg(owner, size_bytes) AS by_owner FROM owned GROUP BY 1),
        sums AS (
            SELECT device_id, count(*) FILTER (WHERE type = 'allocation') AS allocations,
                sum(size_bytes) FILTER (WHERE type = 'allocation')::bigint AS allocated_bytes,
                sum(size_bytes) FILTER (WHERE state = 'active')::bigint AS active_bytes,
                sum(size_bytes) FILTER (WHERE type = 'model')::bigint AS models_bytes,
                sum(size_bytes) FILTER (WHERE state = 'loaded')::bigint AS loaded_bytes,
                sum(size_bytes) FILTER (WHERE type = 'training_session')::bigint AS training_bytes,
                sum(size_bytes) FILTER (WHERE state IN ('ready', 'restored'))::bigint AS trained_bytes
            FROM things GROUP BY device_id)
        SELECT d.device_id, CASE WHEN d.lease_until <= clock_timestamp() THEN 'offline' WHEN d.draining THEN 'draining'
                ELSE 'online' END AS state,
            d.total_bytes, CASE WHEN d.lease_until > clock_timestamp() THEN d.free_bytes END AS free_bytes,
            b.budget_bytes, b.reserved_bytes AS promised_bytes, b.peak_bytes,
            coalesce(s.allocations, 0) AS allocation_count, coalesce(s.allocated_bytes, 0) AS allocated_bytes,
            coalesce(s.active_bytes, 0) AS active_bytes, coalesce(s.models_bytes, 0) AS models_bytes,
            coalesce(s.loaded_bytes, 0) AS loaded_bytes, coalesce(s.training_bytes, 0) AS training_bytes,
            coalesce(s.trained_bytes, 0) AS trained_bytes, coalesce(o.by_owner, '{{}}') AS by_owner
        FROM devices d LEFT JOIN device_budgets b USING (device_id) LEFT JOIN sums s USING (device_id)
            LEFT JOIN owners o USING (device_id)
        WHERE %(id)s::text IS NULL OR d.device_id = %(id)s ORDER BY d.device_id
        """,
        {"id": device_id},
    )
    return [_shown(row) for row in found]


def rooms(connection: Connection, device_id: str, allocation_ids: list[str]) -> dict[str, int]:
    """Bytes of the budget that are left next to each allocation and all that was admitted before it.

    Below 0 where it was admitted against memory that was to be freed and was not. What was admitted later does not
    count: it may wait for memory that is still to be freed.
    """
    found = rows(
        connection,
        f"""
        WITH things AS ({_THINGS}),
        sums AS (
            SELECT id, sum(size_bytes) OVER (ORDER BY since) AS up_to FROM things WHERE device_id = %(device)s)
        SELECT id, (b.budget_bytes - up_to)::bigint AS room FROM sums, device_budgets b
        WHERE b.device_id = %(device)s AND id = ANY(%(ids)s)
        """,
        {"device": device_id, "ids": allocation_ids},
    )
    return {row["id"]: row["room"] for row in found}


def _shown(row: Row) -> MemoryStanding:
    budget, promised = row["budget_bytes"], row["promised_bytes"]
    return {
        "device_id": row["device_id"],
        "state": row["state"],
        "total_bytes": row["total_bytes"],
        "free_bytes": row["free_bytes"],
        "budget_bytes": budget,
        "reserved_bytes": None if promised is None else min(promised, budget),
        "awaiting_bytes": None if promised is None else max(0, promised - budget),
        "used_bytes": row["active_bytes"] + row["loaded_bytes"] + row["trained_bytes"],
        "peak_bytes": None if row["peak_bytes"] is None else min(row["peak_bytes"], budget),
        "allocated_bytes": row["allocated_bytes"],
        "models_bytes": row["models_bytes"],
        "training_bytes": row["training_bytes"],
        "allocation_count": row["allocation_count"],
        "by_owner": row["by_owner"],
    }


def lying_on(connection: Connection, device_id: str, owner: str | None = None) -> list[HeldRow]:
    """What lies on a device or is about to: allocations, models and training sessions, largest first.

    Of models that share a graph the first has its bytes and the others 0. For `owner`, its own come before others',
    and others' models are left out where one that is listed already has the bytes.
    """
    return rows(
        connection,
        f"""
        WITH held AS (
            SELECT m.model_id, m.name, m.owner, m.created_at, m.state, g.reserved_bytes, row_number() OVER (
                PARTITION BY m.content_key
                ORDER BY m.owner <> coalesce(%(owner)s::text, m.owner), m.created_at, m.model_id) AS turn
            FROM models m JOIN graphs g USING (device_id, content_key)
            WHERE m.device_id = %(id)s AND m.state IN {LIVE})
        SELECT 'allocation' AS type, allocation_id AS id, size_bytes, label, owner, created_at AS since, state
        FROM allocations WHERE device_id = %(id)s AND state IN ('pending', 'active')
        UNION ALL
        SELECT 'model', model_id, CASE turn WHEN 1 THEN reserved_bytes ELSE 0 END, name, owner, created_at, state
        FROM held WHERE turn = 1 OR owner = coalesce(%(owner)s::text, owner)
        UNION ALL
        SELECT 'training_session', session_id, reserved_bytes, NULL, owner, opened_at, state FROM training_sessions
        WHERE device_id = %(id)s AND state IN ('initializing', 'ready', 'restored') AND reserved_bytes > 0
        ORDER BY size_bytes DESC, id
        """,
        {"id": device_id, "owner": owner},
    )
