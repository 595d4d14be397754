"""Blobs as recorded: their size, hash, owner and expiry. The bytes are `tasks.blobs.store`' business."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection

from tasks.blobs.rows import BlobRow
from tasks.statements import execute, row, rows


def insert(connection: Connection, blob: Mapping[str, object], ttl_seconds: float | None) -> None:
    """Records a blob whose bytes are in the store; it expires after `ttl_seconds` (None: never by itself)."""
    execute(
        connection,
        """
        INSERT INTO blobs (blob_id, sha256, size_bytes, owner, expires_at)
        VALUES (%(blob_id)s, %(sha256)s, %(size_bytes)s, %(owner)s,
            clock_timestamp() + make_interval(secs => %(ttl)s))
        """,
        {**blob, "ttl": ttl_seconds},
    )


def get(connection: Connection, blob_id: str) -> BlobRow | None:
    """One blob, or None."""
    return row(connection, "SELECT * FROM blobs WHERE blob_id = %(id)s", {"id": blob_id})


def get_many(connection: Connection, blob_ids: list[str]) -> dict[str, BlobRow]:
    """The blobs among `blob_ids` that exist, by id."""
    found = rows(connection, "SELECT * FROM blobs WHERE blob_id = ANY(%(ids)s)", {"ids": blob_ids})
    return {blob["blob_id"]: blob for blob in found}


#: A blob is in use while an open job, a model that is not gone, an open session, a step that may
#: have to be made again, or a checkpoint refers to it.
_IN_USE = """
    EXISTS (SELECT 1 FROM jobs j WHERE j.finished_at IS NULL
        AND b.blob_id = ANY(j.blob_ids))
    OR EXISTS (SELECT 1 FROM models m WHERE m.state IN ('loading', 'loaded', 'lost') AND b.blob_id = ANY(m.blob_ids))
    OR EXISTS (SELECT 1 FROM inference_sessions s WHERE s.state = 'active' AND b.blob_id = ANY(s.blob_ids))
    OR EXISTS (SELECT 1 FROM training_sessions t WHERE t.state IN ('initializing', 'ready', 'restored')
        AND b.blob_id = ANY(t.blob_ids))
    OR EXISTS (SELECT 1 FROM training_steps l WHERE l.blob_ids <> '{}'::text[] AND l.blob_ids @> ARRAY[b.blob_id])
    OR EXISTS (SELECT 1 FROM checkpoints c WHERE c.blob_id = b.blob_id)
    OR EXISTS (SELECT 1 FROM checkpoints c WHERE c.onnx_blob_id = b.blob_id)
"""


def in_use(connection: Connection, blob_id: str) -> bool:
    """Whether anything open refers to the blob."""
    found = row(connection, f"SELECT 1 AS used FROM blobs b WHERE blob_id = %(id)s AND ({_IN_USE})", {"id": blob_id})
    return found is not None


def delete(connection: Connection, blob_id: str) -> bool:
    """Whether the blob's row was there and nothing open referred to it; it is gone now."""
    return bool(execute(connection, f"DELETE FROM blobs b WHERE blob_id = %(id)s AND NOT ({_IN_USE})", {"id": blob_id}))


def take_expired(connection: Connection, limit: int) -> list[str]:
    """Deletes the rows of expired blobs that nothing open refers to; their bytes are the caller's to delete."""
    found = rows(
        connection,
        f"""
        DELETE FROM blobs WHERE blob_id IN (SELECT blob_id FROM blobs b WHERE expires_at <= clock_timestamp()
            AND NOT ({_IN_USE}) LIMIT %(limit)s) RETURNING blob_id
        """,
        {"limit": limit},
    )
    return [blob["blob_id"] for blob in found]
