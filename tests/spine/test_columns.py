"""Rows as the program types them, against the tables; and a job's columns against everything made from them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from sqlalchemy import Table
from sqlalchemy.dialects import postgresql

from device_operations.jobs import Job
from tasks.blobs.rows import BlobRow
from tasks.devices.rows import RegisteredDevice
from tasks.inference.rows import GraphRow, ModelRow, SessionRow
from tasks.jobs.model import ClaimedRow, Ending, JobRow, JobView, NewJob
from tasks.jobs.store.columns import COLUMNS
from tasks.memory.rows import AllocationRow
from tasks.records import (
    allocations,
    blobs,
    checkpoints,
    devices,
    graphs,
    inference_sessions,
    models,
    training_sessions,
    training_steps,
)
from tasks.records.jobs import jobs
from tasks.training.rows import CheckpointRow, StepRow, TrainingSessionRow

#: Columns that only webhooks read and write.
WEBHOOK = {"webhook_attempt", "webhook_due_at"}

#: PostgreSQL's names for one type.
SAME = {"bigint": "bigint", "smallint": "smallint", "int": "integer", "float8": "float", "text": "text", "text[]": "text[]",
        "jsonb": "jsonb", "boolean": "boolean", "timestamptz": "timestamp with time zone"}  # fmt: skip


def test_the_list_has_the_columns_of_the_table():
    assert {column.name for column in COLUMNS} == set(jobs.columns.keys()) - WEBHOOK


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_a_column_has_the_type_of_the_table(column):
    recorded = jobs.columns[column.name].type.compile(dialect=postgresql.dialect()).lower()
    assert recorded == SAME[column.type]


def test_a_row_has_the_selected_columns_in_their_order():
    selected = [column.name for column in COLUMNS if column.is_selected]
    assert selected == list(JobRow.__annotations__)
    assert set(ClaimedRow.__annotations__) == {*selected, "request", "claimed_at"}


def test_a_new_job_gives_the_inserted_columns():
    own = {"own_after", "queue_limit"}
    given = {field.name for field in fields(NewJob)} - own - {"delay_seconds", "expires_in_seconds"}
    inserted = {column.name for column in COLUMNS if column.inserted}
    assert inserted == given | {"due_at", "expires_at", "finished_at"}


def test_an_ending_gives_columns_that_an_end_changes():
    assert {field.name for field in fields(Ending)} - {"id"} <= {column.name for column in COLUMNS if column.is_ended}


def test_a_view_has_the_fields_of_a_job():
    assert set(JobView.__annotations__) == set(Job.model_fields) | {"deaths"}


#: What statements add to the columns of a table.
ADDED = {RegisteredDevice: {"alive"}, SessionRow: {"running"}}


@pytest.mark.parametrize(
    ("row", "table"),
    [
        (JobRow, jobs), (AllocationRow, allocations), (BlobRow, blobs), (RegisteredDevice, devices),
        (ModelRow, models), (GraphRow, graphs), (SessionRow, inference_sessions),
        (TrainingSessionRow, training_sessions), (StepRow, training_steps), (CheckpointRow, checkpoints),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_row_may_be_null_where_its_column_may(row: Any, table: Table):
    types = {name: str(given.__forward_arg__) for name, given in row.__annotations__.items()}
    own = {name: given for name, given in types.items() if name not in ADDED.get(row, ())}
    unread = {column.name for column in COLUMNS if not column.is_selected} | WEBHOOK if row is JobRow else set()
    assert {name: given.endswith("| None") for name, given in own.items()} == {
        name: bool(column.nullable) for name, column in table.columns.items() if name not in unread
    }
