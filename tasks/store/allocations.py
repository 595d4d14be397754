"""Allocations: recording, activating, ending, listing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from tasks.database import dumps
from tasks.store.connection import Row, execute, row, rows


def insert(connection: Connection, allocation: dict[str, Any]) -> bool:
    """Records an allocation as `pending`; False when the id is taken."""
    return bool(
        execute(
            connection,
            """
            INSERT INTO allocations (allocation_id, device_id, state, size_bytes, dtype, shape, label, owner, job_id,
                ttl_seconds, expires_at)
            VALUES (%(allocation_id)s, %(device_id)s, 'pending', %(size_bytes)s, %(dtype)s, %(shape)s::jsonb, %(label)s,
                %(owner)s, %(job_id)s, %(ttl_seconds)s,
                clock_timestamp() + make_interval(secs => %(ttl_seconds)s))
            ON CONFLICT DO NOTHING
            """,
            {**allocation, "shape": None if allocation["shape"] is None else dumps(allocation["shape"])},
        )
    )


def get(connection: Connection, allocation_id: str) -> Row | None:
    """One allocation, or None."""
    return row(connection, "SELECT * FROM allocations WHERE allocation_id = %(id)s", {"id": allocation_id})


def get_many(connection: Connection, allocation_ids: Sequence[str]) -> dict[str, Row]:
    """The allocations among `allocation_ids` that exist, by id."""
    found = rows(
        connection, "SELECT * FROM allocations WHERE allocation_id = ANY(%(ids)s)", {"ids": list(allocation_ids)}
    )
    return {entry["allocation_id"]: entry for entry in found}


def activate(connection: Connection, allocation_id: str, epoch: int) -> None:
    """The device holds the allocation's bytes from now on."""
    execute(
        connection,
        "UPDATE allocations SET state = 'active', epoch = %(epoch)s WHERE allocation_id = %(id)s AND state = 'pending'",
        {"id": allocation_id, "epoch": epoch},
    )


def end(
    connection: Connection,
    allocation_id: str,
    state: str,
    *,
    leaving: Sequence[str],
    error: dict[str, Any] | None = None,
) -> Row | None:
    """An allocation becomes `freed` or `failed`; gives its row where it was in one of the states `leaving`."""
    return row(
        connection,
        """
        UPDATE allocations SET state = %(state)s, error = %(error)s::jsonb, ended_at = clock_timestamp()
        WHERE allocation_id = %(id)s AND state = ANY(%(leaving)s) RETURNING *
        """,
        {
            "id": allocation_id,
            "state": state,
            "leaving": list(leaving),
            "error": None if error is None else dumps(error),
        },
    )


def lose(connection: Connection, device_id: str, epoch: int) -> list[Row]:
    """What the device's epochs up to `epoch` held is `lost`."""
    return rows(
        connection,
        """
        UPDATE allocations SET state = 'lost', ended_at = clock_timestamp()
        WHERE device_id = %(id)s AND state = 'active' AND epoch <= %(epoch)s RETURNING allocation_id, size_bytes
        """,
        {"id": device_id, "epoch": epoch},
    )
