"""Training steps as recorded: numbered, applied with the end of their job, logged for a replay."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from tasks.database import dumps
from tasks.jobs.model import Ending, JobRow
from tasks.jobs.store.columns import SELECTED_OF_JOBS
from tasks.jobs.store.ending import SET_ENDED
from tasks.records.training import OPEN_SESSION_SQL
from tasks.statements import Prepared, execute, row, rows
from tasks.training.facts import AppliedStep, Standing
from tasks.training.rows import LoggedStep, StepRow

# ---- numbering


def take_number(
    connection: Connection, session_id: str, sequence: int | None, job_id: str, sha256: str, blob_ids: Sequence[str]
) -> int | None:
    """Gives a step its number (the next one where `sequence` is None) and logs it; None where that number is not next.

    None also where the session is not open any more. The order of the session's jobs is locked by the caller.
    """
    found = row(
        connection,
        f"""
        WITH numbered AS (
            UPDATE training_sessions SET submitted_sequence = submitted_sequence + 1
            WHERE session_id = %(id)s AND {OPEN_SESSION_SQL}
              AND submitted_sequence + 1 = coalesce(%(sequence)s::bigint, submitted_sequence + 1)
            RETURNING submitted_sequence)
        INSERT INTO training_steps (session_id, sequence, job_id, payload_sha256, blob_ids)
        SELECT %(id)s, submitted_sequence, %(job)s, %(sha)s, %(blobs)s FROM numbered
        RETURNING sequence
        """,
        {"id": session_id, "sequence": sequence, "job": job_id, "sha": sha256, "blobs": list(blob_ids)},
    )
    return int(found["sequence"]) if found else None


def numbered(connection: Connection, session_id: str, sequence: int) -> StepRow | None:
    """The logged step of that number, or None."""
    return row(
        connection,
        "SELECT * FROM training_steps WHERE session_id = %(id)s AND sequence = %(sequence)s",
        {"id": session_id, "sequence": sequence},
    )


def free_numbers(connection: Connection, session_id: str, sequence: int, job_id: str) -> list[int]:
    """A step ended unapplied: its number and all higher ones are free again. Gives them; nothing where it has none."""
    found = rows(
        connection,
        """
        WITH own AS (SELECT 1 FROM training_steps WHERE session_id = %(id)s AND sequence = %(sequence)s
                AND job_id = %(job)s AND NOT applied),
        freed AS (DELETE FROM training_steps WHERE session_id = %(id)s AND sequence >= %(sequence)s AND NOT applied
                AND EXISTS (SELECT 1 FROM own) RETURNING sequence),
        back AS (UPDATE training_sessions SET submitted_sequence = %(sequence)s - 1
            WHERE session_id = %(id)s AND EXISTS (SELECT 1 FROM own))
        SELECT sequence FROM freed ORDER BY sequence
        """,
        {"id": session_id, "sequence": sequence, "job": job_id},
    )
    return [step["sequence"] for step in found]


# ---- applying

#: History rows as they come from a worker; a step made again after a death writes the same figures again.
_HISTORY = """
    INSERT INTO training_history (session_id, step, loss, gradient_norm, learning_rate, at)
    SELECT %(id)s, h.step, h.loss, h.gradient_norm, h.learning_rate, to_timestamp(h.at)
    FROM jsonb_to_recordset(%(history)s::jsonb)
        AS h (step bigint, loss float8, gradient_norm float8, learning_rate float8, at float8)
    WHERE EXISTS (SELECT 1 FROM moved)
    ON CONFLICT (session_id, step) DO UPDATE SET loss = excluded.loss, gradient_norm = excluded.gradient_norm,
        learning_rate = excluded.learning_rate, at = excluded.at
"""

#: What a session's row says of where it stands.
_STANDING = """
    step = %(step)s, loss = coalesce(%(loss)s, loss), gradient_norm = coalesce(%(gradient_norm)s, gradient_norm),
    learning_rate = coalesce(%(learning_rate)s, learning_rate), samples_seen = %(samples_seen)s,
    steps_per_second = coalesce(%(steps_per_second)s, steps_per_second),
    cpu_fallback_operators = %(cpu_fallback_operators)s, last_used_at = clock_timestamp(),
    lease_expires_at = clock_timestamp() + make_interval(secs => lease_seconds)
"""


_END_APPLIED = Prepared(
    "end_applied_step",
    f"""
    WITH mine AS (SELECT id FROM jobs WHERE id = %(job)s AND state = 'running' AND epoch = %(epoch)s FOR UPDATE),
    moved AS (
        UPDATE training_sessions SET applied_sequence = %(sequence)s, state = 'ready', {_STANDING}
        WHERE session_id = %(id)s AND applied_sequence = %(sequence)s - 1 AND epoch = %(epoch)s
          AND EXISTS (SELECT 1 FROM mine) AND EXISTS (SELECT 1 FROM training_steps
            WHERE session_id = %(id)s AND sequence = %(sequence)s AND job_id = %(job)s)
        RETURNING session_id),
    logged AS (
        UPDATE training_steps SET applied = true, steps_applied = %(steps_applied)s,
            spooled = %(spooled)s, blob_ids = blob_ids || %(spooled_ids)s
        WHERE session_id = %(id)s AND sequence = %(sequence)s AND EXISTS (SELECT 1 FROM moved)),
    noted AS ({_HISTORY}),
    ended AS (
        UPDATE jobs SET {SET_ENDED} FROM (SELECT %(state)s AS state, %(result)s AS result, %(error)s AS error,
            %(device_ms)s AS device_ms) AS ended
        WHERE jobs.id = %(job)s AND EXISTS (SELECT 1 FROM mine) AND EXISTS (SELECT 1 FROM moved)
        RETURNING {SELECTED_OF_JOBS})
    SELECT (SELECT count(*) FROM mine) AS held, ended.* FROM (SELECT 1) AS one LEFT JOIN ended ON true
    """,
    {
        "job": "text", "epoch": "int", "id": "text", "sequence": "bigint", "step": "bigint", "loss": "float8",
        "gradient_norm": "float8", "learning_rate": "float8", "samples_seen": "bigint", "steps_per_second": "float8",
        "steps_applied": "bigint", "spooled": "jsonb", "spooled_ids": "text[]", "history": "jsonb", "state": "text",
        "result": "jsonb", "error": "jsonb", "device_ms": "float8", "cpu_fallback_operators": "text[]",
    },
)  # fmt: skip


def end_applied(connection: Connection, ending: Ending, epoch: int, applied: AppliedStep) -> tuple[bool, JobRow | None]:
    """Records a step that was applied: its number, the session's standing, the history and its job's end, as one.

    Gives whether the job was running under `epoch`, and its row as it ended. The row is None, and nothing was changed,
    if it was not, or the number is not the next one, or `epoch` no longer holds the session. A step is never claimed
    ahead of its device, so its job is `running`. One statement, since every step costs it, and a prepared one, since
    planning it takes longer than running it.
    """
    (found,) = _END_APPLIED.rows(
        connection,
        {
            **applied,
            "id": applied["session_id"],
            "job": ending.id,
            "epoch": epoch,
            "state": ending.state,
            "result": dumps(ending.result),
            "error": dumps(ending.error),
            "device_ms": ending.device_ms,
            "spooled": dumps(applied["spooled"]) if applied["spooled"] else None,
            "history": dumps(applied["history"]),
        },
    )
    held = bool(found.pop("held"))
    return held, found if found["id"] else None


def advance(connection: Connection, session_id: str, epoch: int, standing: Standing) -> None:
    """Notes how far a long job has come, with the history since the last note; nothing unless `epoch` holds it."""
    execute(
        connection,
        f"""
        WITH moved AS (UPDATE training_sessions SET {_STANDING} WHERE session_id = %(id)s AND epoch = %(epoch)s
            RETURNING session_id)
        {_HISTORY}
        """,
        {**standing, "id": session_id, "epoch": epoch, "history": dumps(standing["history"])},
    )


def log_since(connection: Connection, session_id: str, after: int, until: int) -> list[LoggedStep]:
    """The applied steps with numbers above `after` up to `until`, in order, each with its job's request."""
    return rows(
        connection,
        """
        SELECT s.sequence, s.steps_applied, s.spooled, s.job_id, j.request
        FROM training_steps s LEFT JOIN jobs j ON j.id = s.job_id
        WHERE s.session_id = %(id)s AND s.sequence > %(after)s AND s.sequence <= %(until)s AND s.applied AND s.kept
        ORDER BY s.sequence
        """,
        {"id": session_id, "after": after, "until": until},
    )
