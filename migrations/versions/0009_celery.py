"""What Celery is to be given at a job's end stands in its row, and revoked tasks are remembered."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("celery", postgresql.JSONB(none_as_null=True, astext_type=sa.Text())))
    op.execute("UPDATE jobs SET celery = '{}' WHERE wants_result AND finished_at IS NULL")
    op.drop_column("jobs", "wants_result")
    op.create_index(
        "ix_jobs_celery", "jobs", ["finished_at"],
        postgresql_where=sa.text("celery IS NOT NULL AND finished_at IS NOT NULL"),
    )  # fmt: skip
    op.create_table(
        "revoked_tasks",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column(
            "revoked_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("task_id"),
    )


def downgrade() -> None:
    op.drop_table("revoked_tasks")
    op.drop_index(
        "ix_jobs_celery", table_name="jobs", postgresql_where=sa.text("celery IS NOT NULL AND finished_at IS NOT NULL")
    )
    op.add_column("jobs", sa.Column("wants_result", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.execute("UPDATE jobs SET wants_result = true WHERE celery IS NOT NULL AND finished_at IS NULL")
    op.drop_column("jobs", "celery")
