"""What of a model's inputs and outputs callers cannot give or get, and why."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("models", sa.Column("not_offered", JSONB()))


def downgrade() -> None:
    op.drop_column("models", "not_offered")
