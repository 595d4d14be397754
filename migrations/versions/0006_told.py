"""What a caller asked and what a job requires of its predecessors; an open job has an epoch only while claimed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("requires", sa.ARRAY(sa.Text()), nullable=True))
    op.add_column("jobs", sa.Column("asked", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True))
    op.add_column("jobs", sa.Column("retried_from", sa.Text(), nullable=True))
    op.create_index(
        "ix_jobs_requires", "jobs", ["requires"], postgresql_using="gin",
        postgresql_where=sa.text("requires IS NOT NULL AND finished_at IS NULL"),
    )  # fmt: skip
    # Attempts were counted with the deaths among them, and jobs that wait kept the epoch of their last attempt.
    op.execute("UPDATE jobs SET attempt = greatest(attempt - deaths, 0) WHERE finished_at IS NULL AND deaths > 0")
    op.execute("UPDATE jobs SET epoch = NULL WHERE finished_at IS NULL AND state <> 'running' AND epoch IS NOT NULL")


def downgrade() -> None:
    op.execute("UPDATE jobs SET state = 'running', attempt = attempt + 1, started_at = clock_timestamp() "
               "WHERE state = 'reserved' AND epoch IS NOT NULL")  # fmt: skip
    op.drop_index("ix_jobs_requires", table_name="jobs")
    op.drop_column("jobs", "retried_from")
    op.drop_column("jobs", "asked")
    op.drop_column("jobs", "requires")
