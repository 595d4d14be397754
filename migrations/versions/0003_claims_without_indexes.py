"""No index on jobs names a state any more, so that claiming a job writes to none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_OPEN = "state IN ('scheduled', 'queued', 'reserved', 'running', 'retrying')"


def upgrade() -> None:
    for name in ("ix_jobs_open", "ix_jobs_due", "ix_jobs_expiring"):
        op.drop_index(name, table_name="jobs")
    op.create_check_constraint(
        "ended", "jobs", "(state IN ('succeeded', 'failed', 'cancelled', 'expired')) = (finished_at IS NOT NULL)"
    )
    op.create_index("ix_jobs_open", "jobs", ["device_id", "seq"], postgresql_where=sa.text("finished_at IS NULL"))
    op.create_index(
        "ix_jobs_due", "jobs", ["due_at"], postgresql_where=sa.text("due_at IS NOT NULL AND finished_at IS NULL")
    )
    op.create_index(
        "ix_jobs_expiring", "jobs", ["expires_at"],
        postgresql_where=sa.text("expires_at IS NOT NULL AND finished_at IS NULL"),
    )  # fmt: skip
    op.execute("ALTER TABLE jobs SET (fillfactor = 60)")


def downgrade() -> None:
    op.execute("ALTER TABLE jobs RESET (fillfactor)")
    for name in ("ix_jobs_open", "ix_jobs_due", "ix_jobs_expiring"):
        op.drop_index(name, table_name="jobs")
    op.drop_constraint(op.f("ck_jobs_ended"), "jobs")
    op.create_index("ix_jobs_open", "jobs", ["device_id", "state", "seq"], postgresql_where=sa.text(_OPEN))
    op.create_index("ix_jobs_due", "jobs", ["due_at"], postgresql_where=sa.text("state IN ('scheduled', 'retrying')"))
    op.create_index(
        "ix_jobs_expiring", "jobs", ["expires_at"],
        postgresql_where=sa.text(f"expires_at IS NOT NULL AND {_OPEN}"),
    )  # fmt: skip
