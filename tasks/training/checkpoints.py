"""Checkpoints as recorded. A row is there only once its file is whole; the bytes are `tasks.blobs.store`' business."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection

from device_operations.wire.json_types import JsonObject
from tasks.database import dumps
from tasks.statements import execute, row, rows
from tasks.training.facts import NewCheckpoint
from tasks.training.rows import CheckpointBeingMade, CheckpointRow

#: Whether a session may be brought back from its checkpoint `c`: one taken in the middle of a job serves only while
#: that job is open, or once it was applied; the log's row says so.
_OF_ITS_LINE = """(c.run_job_id IS NULL OR EXISTS (SELECT 1 FROM training_steps l
    WHERE l.session_id = c.session_id AND l.sequence = c.sequence + 1 AND l.job_id = c.run_job_id))"""


def insert(connection: Connection, checkpoint: NewCheckpoint, epoch: int | None = None) -> bool:
    """Records a whole checkpoint and its blobs, which do not expire. With `epoch`, only while it holds the session."""
    stored = {**checkpoint, "epoch": epoch, "blobs": dumps(checkpoint["blobs"])}
    return bool(
        execute(
            connection,
            """
            WITH held AS (SELECT session_id FROM training_sessions WHERE session_id = %(session_id)s
                AND (%(epoch)s::int IS NULL OR epoch = %(epoch)s)),
            stored AS (
                INSERT INTO blobs (blob_id, sha256, size_bytes, owner)
                SELECT b.blob_id, b.sha256, b.size_bytes, %(owner)s
                FROM jsonb_to_recordset(%(blobs)s::jsonb) AS b (blob_id text, sha256 text, size_bytes bigint), held)
            INSERT INTO checkpoints (checkpoint_id, session_id, owner, name, job_id, step, sequence, run_job_id,
                sha256, size_bytes, blob_id, onnx_blob_id)
            SELECT %(checkpoint_id)s, %(session_id)s, %(owner)s, %(name)s, %(job_id)s, %(step)s, %(sequence)s,
                %(run_job_id)s, %(sha256)s, %(size_bytes)s, %(blob_id)s, %(onnx_blob_id)s FROM held
            """,
            stored,
        )
    )


def get(connection: Connection, checkpoint_id: str) -> CheckpointRow | None:
    """One checkpoint, or None."""
    return row(connection, "SELECT * FROM checkpoints WHERE checkpoint_id = %(id)s", {"id": checkpoint_id})


def being_made(connection: Connection, checkpoint_id: str) -> CheckpointBeingMade | None:
    """The open job that makes a checkpoint, with its request; None where there is none."""
    return row(
        connection,
        "SELECT id, owner, device_id, request FROM jobs WHERE resource_type = 'checkpoint' AND resource_id = %(id)s "
        "AND finished_at IS NULL",
        {"id": checkpoint_id},
    )


def page(connection: Connection, session_id: str | None, owner: str | None, limit: int) -> list[CheckpointRow]:
    """Checkpoints newest first, of one session (the furthest first) or owner where given."""
    # Two that were on their way to the disk together may be recorded in either order.
    order = "created_at DESC" if session_id is None else "sequence DESC, step DESC, created_at DESC"
    return rows(
        connection,
        f"""
        SELECT * FROM checkpoints WHERE (%(session)s::text IS NULL OR session_id = %(session)s)
          AND (%(owner)s::text IS NULL OR owner = %(owner)s)
        ORDER BY {order} LIMIT %(limit)s
        """,
        {"session": session_id, "owner": owner, "limit": limit},
    )


def to_restore(connection: Connection, session_id: str, applied_sequence: int) -> list[CheckpointRow]:
    """The checkpoints that a session may be brought back from, the furthest first: none ahead of what is recorded."""
    return rows(
        connection,
        f"""
        SELECT c.* FROM checkpoints c WHERE session_id = %(id)s AND sequence <= %(applied)s AND {_OF_ITS_LINE}
        ORDER BY sequence DESC, step DESC, created_at DESC
        """,
        {"id": session_id, "applied": applied_sequence},
    )


def shorten_log(connection: Connection, session_id: str) -> None:
    """Lets go of what no replay needs: steps up to the last but one checkpoint, so that one may turn out damaged."""
    execute(
        connection,
        f"""
        UPDATE training_steps SET kept = false, spooled = NULL, blob_ids = '{{}}'
        WHERE session_id = %(id)s AND kept AND applied AND sequence <= (
            SELECT sequence FROM checkpoints c WHERE session_id = %(id)s AND damage IS NULL AND {_OF_ITS_LINE}
            ORDER BY sequence DESC, step DESC OFFSET 1 LIMIT 1)
        """,
        {"id": session_id},
    )


def retire(connection: Connection, session_id: str, keep_last: int, *, automatic_only: bool) -> list[str]:
    """Deletes all but the furthest `keep_last` checkpoints of a session (or of its automatic ones): their ids.

    Two that were on their way to the disk together may be recorded in either order. What a run that was never applied
    has left goes first, however far it came.
    """
    return _delete(
        connection,
        f"""
        SELECT checkpoint_id FROM checkpoints c WHERE session_id = %(id)s AND (job_id IS NULL OR NOT %(automatic)s)
        ORDER BY {_OF_ITS_LINE} DESC, sequence DESC, step DESC, created_at DESC OFFSET %(keep)s
        """,
        {"id": session_id, "automatic": automatic_only, "keep": keep_last},
    )


def delete(connection: Connection, checkpoint_id: str) -> bool:
    """Whether the checkpoint was there; it is gone now, and its files go as soon as nothing uses them."""
    return bool(_delete(connection, "SELECT %(id)s::text AS checkpoint_id", {"id": checkpoint_id}))


def is_needed(connection: Connection, checkpoint_id: str) -> bool:
    """Whether an open session could not come back after a death without this checkpoint: its log begins behind it."""
    found = row(
        connection,
        f"""
        SELECT 1 AS one FROM checkpoints x JOIN training_sessions s USING (session_id),
            LATERAL (SELECT max(sequence) AS cut FROM training_steps l
                WHERE l.session_id = x.session_id AND NOT l.kept) AS log
        WHERE x.checkpoint_id = %(id)s AND s.state IN ('initializing', 'ready', 'restored') AND log.cut IS NOT NULL
          AND NOT EXISTS (SELECT 1 FROM checkpoints c WHERE c.session_id = x.session_id
                AND c.checkpoint_id <> x.checkpoint_id AND c.damage IS NULL AND c.sequence >= log.cut
                AND {_OF_ITS_LINE})
        """,
        {"id": checkpoint_id},
    )
    return found is not None


def mark_damaged(connection: Connection, checkpoint_id: str, damage: JsonObject) -> None:
    """Notes why a checkpoint could not be read."""
    execute(
        connection,
        "UPDATE checkpoints SET damage = %(damage)s::jsonb WHERE checkpoint_id = %(id)s",
        {"id": checkpoint_id, "damage": dumps(damage)},
    )


def _delete(connection: Connection, chosen: str, parameters: Mapping[str, object]) -> list[str]:
    """Deletes the chosen checkpoints; their blobs expire at once, and are swept when nothing open refers to them."""
    found = rows(
        connection,
        f"""
        WITH gone AS (DELETE FROM checkpoints WHERE checkpoint_id IN ({chosen})
            RETURNING checkpoint_id, blob_id, onnx_blob_id),
        let_go AS (UPDATE blobs SET expires_at = clock_timestamp() FROM gone
            WHERE blobs.blob_id IN (gone.blob_id, gone.onnx_blob_id))
        SELECT checkpoint_id FROM gone
        """,
        parameters,
    )
    return [checkpoint["checkpoint_id"] for checkpoint in found]
