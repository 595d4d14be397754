"""Records that tests of the store begin with."""

from __future__ import annotations

from contextlib import closing

import psycopg2
from sqlalchemy import Engine

from tasks.devices import store as devices


def make_device(engine: Engine) -> int:
    """Registers `cpu_0`, and gives its new epoch."""
    facts = {
        "device_id": "cpu_0", "backend": "cpu", "ordinal": 0, "node": None, "name": "CPU", "vendor": None,
        "driver": None, "total_bytes": 1, "free_bytes": 1, "capabilities": {}, "providers": [], "host": "h", "pid": 1,
        "pid_started": 0.0,
    }  # fmt: skip
    with engine.connect() as connection:
        return devices.register(connection, facts, 15)


def claim_of(database_url: str, job_id: str) -> tuple[str, int | None]:
    """A job's recorded state, and the epoch under which a worker has claimed it."""
    with closing(psycopg2.connect(database_url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT state, epoch FROM jobs WHERE id = %s", [job_id])
        (found,) = cursor.fetchall()
    return found
