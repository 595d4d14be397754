"""The columns of a job, in one list: what an INSERT is given, what a SELECT reads, and what an end is recorded from.

`tasks.records.jobs` makes the table; a test compares the two. `tasks.jobs.model.JobRow` has the selected columns.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Column:
    """A column of `jobs`, its PostgreSQL type, and which statements name it."""

    name: str
    type: str
    #: Whether a job's row in this program has it.
    is_selected: bool = True
    #: The value in an INSERT of a new job, as SQL over its `NewJob`; empty if the column has its default.
    inserted: str = ""
    #: Whether it is kept of an ended job, so that a lost row can be recorded anew.
    is_kept: bool = True
    #: Whether an end changes it.
    is_ended: bool = False


def _given(name: str, type_: str, *, is_selected: bool = True, is_kept: bool = True, inserted: str = "") -> Column:
    """A column whose value is the field of `NewJob` by the same name."""
    return Column(name, type_, is_selected=is_selected, is_kept=is_kept, inserted=inserted or name)


_FINISHED_AT_ONCE = "CASE WHEN state IN ('failed', 'cancelled', 'expired') THEN clock_timestamp() END"
_DUE = "clock_timestamp() + make_interval(secs => delay_seconds)"
_EXPIRES = "clock_timestamp() + make_interval(secs => expires_in_seconds)"

COLUMNS = (
    _given("id", "text"),
    Column("seq", "bigint", is_kept=False),
    _given("kind", "text"),
    Column("state", "text", inserted="state", is_ended=True),
    Column("device_id", "text", inserted="device_id", is_ended=True),
    _given("queue", "text"),
    _given("priority", "smallint"),
    Column("attempt", "int", is_ended=True),
    _given("max_attempts", "int"),
    Column("deaths", "int"),
    _given("request", "jsonb", is_selected=False),
    _given("resource_type", "text"),
    _given("resource_id", "text"),
    _given("needs", "text[]"),
    _given("after", "text[]"),
    _given("blob_ids", "text[]", is_selected=False, is_kept=False),
    _given("owner", "text"),
    _given("labels", "jsonb"),
    Column("submitted_at", "timestamptz"),
    Column("due_at", "timestamptz", inserted=_DUE, is_kept=False),
    Column("started_at", "timestamptz", is_ended=True),
    Column("finished_at", "timestamptz", inserted=_FINISHED_AT_ONCE, is_ended=True),
    Column("expires_at", "timestamptz", inserted=_EXPIRES),
    _given("timeout_seconds", "float8"),
    Column("device_ms", "float8", is_ended=True),
    Column("epoch", "int", is_ended=True),
    Column("cancel_requested", "boolean"),
    Column("progress", "jsonb", is_ended=True),
    Column("result", "jsonb", is_ended=True),
    Column("error", "jsonb", inserted="error", is_ended=True),
    _given("celery", "jsonb", inserted="nullif(celery, 'null')"),
    _given("webhook_url", "text"),
    _given("requires", "text[]", is_selected=False, is_kept=False),
    _given("asked", "jsonb", inserted="nullif(asked, 'null')", is_selected=False, is_kept=False),
    _given("retried_from", "text"),
)

#: What a `JobRow` is read from, as SQL.
SELECTED = ", ".join(column.name for column in COLUMNS if column.is_selected)

#: The columns that an INSERT of new jobs names, and their values in the same order, as SQL.
INSERTED = ", ".join(column.name for column in COLUMNS if column.inserted)
INSERTED_VALUES = ", ".join(column.inserted for column in COLUMNS if column.inserted)

#: The fields of a `NewJob` that make columns, with their types, as SQL. Two times are given as seconds from now.
GIVEN = (
    ", ".join(
        f"{column.name} {column.type}"
        for column in COLUMNS
        if column.inserted and column.inserted not in (_DUE, _EXPIRES, _FINISHED_AT_ONCE)
    )
    + ", delay_seconds float8, expires_in_seconds float8"
)

#: The selected columns whose values an INSERT takes from PostgreSQL, as SQL.
STAMPED = "id, seq, submitted_at, due_at, expires_at, finished_at"

#: What is kept of an ended job, with its types; and what of that an end changes in a row that is still there.
KEPT = {column.name: column.type for column in COLUMNS if column.is_kept}
ENDED = tuple(column.name for column in COLUMNS if column.is_ended)

#: `SELECTED` in a statement that joins something else: `jobs.id, …`.
SELECTED_OF_JOBS = ", ".join(f"jobs.{column.name}" for column in COLUMNS if column.is_selected)
