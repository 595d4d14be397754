"""Alembic's environment: one connection, one transaction, and a lock so that two upgrades do not run at once."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, pool, text

from tasks.database import dialect_url
from tasks.records import metadata

#: The advisory lock that an upgrade holds; any fixed number does.
UPGRADE_LOCK = 7_235_001

engine = create_engine(dialect_url(context.config.attributes["url"]), poolclass=pool.NullPool)
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=metadata, compare_type=True, compare_server_default=False)
    with context.begin_transaction():
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": UPGRADE_LOCK})
        context.run_migrations()
