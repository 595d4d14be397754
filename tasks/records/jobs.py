"""Jobs, the order of jobs on one resource, and the answers promised for idempotency keys."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    Identity,
    Index,
    Integer,
    SmallInteger,
    Table,
    Text,
    text,
)

from device_operations.jobs import TERMINAL
from tasks.records.base import Json, Texts, Time, metadata
from tasks.records.states import listed

#: The states that have ended, as SQL.
ENDED_SQL = f"state IN {listed(TERMINAL)}"

jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    # Order of submission: ids of direct callers do not sort by time.
    Column("seq", BigInteger, Identity(always=True), nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("device_id", Text),
    Column("queue", Text, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("max_attempts", Integer, nullable=False, server_default=text("1")),
    # Workers that died during this job. The third makes it `poison`.
    Column("deaths", Integer, nullable=False, server_default=text("0")),
    Column("request", Json, nullable=False),
    Column("resource_type", Text),
    Column("resource_id", Text),
    # Ids of the allocations, models and sessions that the job uses.
    Column("needs", Texts, nullable=False, server_default=text("'{}'")),
    # Jobs that must have ended before this one may start.
    Column("after", Texts, nullable=False, server_default=text("'{}'")),
    # Those of them that its caller named, where all have to succeed (`after_success`); null for nearly all jobs.
    Column("requires", Texts),
    # Which fields of the request its caller gave, and the options as they were given.
    Column("asked", Json),
    # The job of which this one is another try that its caller asked for.
    Column("retried_from", Text),
    # Blobs that may not expire while the job is open.
    Column("blob_ids", Texts, nullable=False, server_default=text("'{}'")),
    Column("owner", Text, nullable=False),
    Column("labels", Json, nullable=False, server_default=text("'{}'")),
    Column("submitted_at", Time, nullable=False, server_default=text("clock_timestamp()")),
    # When a scheduled or retrying job becomes `queued`.
    Column("due_at", Time),
    Column("started_at", Time),
    Column("finished_at", Time),
    Column("expires_at", Time),
    Column("timeout_seconds", Float),
    Column("device_ms", Float),
    # The epoch of the device under which the job is claimed, or ended; null while no worker has a claim on it.
    Column("epoch", Integer),
    Column("cancel_requested", Boolean, nullable=False, server_default=text("false")),
    Column("progress", Json),
    Column("result", Json),
    Column("error", Json),
    # What Celery is given at the end of a direct caller's job (`tasks.celery_bridge.outbox`); null otherwise.
    Column("celery", Json),
    Column("webhook_url", Text),
    # Deliveries tried so far; null once delivered or given up.
    Column("webhook_attempt", Integer),
    Column("webhook_due_at", Time),
    CheckConstraint(f"({ENDED_SQL}) = (finished_at IS NOT NULL)", name="ended"),
    # Room on each page for the row that a claim writes next to the old one.
    postgresql_with={"fillfactor": 60},
)

# None of them names a state or anything else that a claim changes, so that claiming a job writes to no index.
Index("ix_jobs_open", jobs.c.device_id, jobs.c.seq, postgresql_where=text("finished_at IS NULL"))
Index("ix_jobs_due", jobs.c.due_at, postgresql_where=text("due_at IS NOT NULL AND finished_at IS NULL"))
Index("ix_jobs_expiring", jobs.c.expires_at, postgresql_where=text("expires_at IS NOT NULL AND finished_at IS NULL"))
Index(
    "ix_jobs_requires",
    jobs.c.requires,
    postgresql_using="gin",
    postgresql_where=text("requires IS NOT NULL AND finished_at IS NULL"),
)
Index("ix_jobs_webhook", jobs.c.webhook_due_at, postgresql_where=text("webhook_due_at IS NOT NULL"))
Index("ix_jobs_celery", jobs.c.finished_at, postgresql_where=text("celery IS NOT NULL AND finished_at IS NOT NULL"))
Index("ix_jobs_finished_at", jobs.c.finished_at, postgresql_where=text("finished_at IS NOT NULL"))

#: The last job of each exclusive resource (allocation, inference session, training session).
resource_order = Table(
    "resource_order",
    metadata,
    Column("resource_id", Text, primary_key=True),
    Column("last_job_id", Text),
)

#: What was answered for an `Idempotency-Key`, as long as its jobs (or the inference session) are kept: their ids.
idempotency = Table(
    "idempotency",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("route", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("body_sha256", Text, nullable=False),
    Column("job_ids", Texts, nullable=False),
    Column("created_at", Time, nullable=False, server_default=text("now()")),
)

#: Celery's tasks that were revoked, whether their messages had come or not: one that comes later does not run.
revoked_tasks = Table(
    "revoked_tasks",
    metadata,
    Column("task_id", Text, primary_key=True),
    Column("revoked_at", Time, nullable=False, server_default=text("clock_timestamp()")),
)
