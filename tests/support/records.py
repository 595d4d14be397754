"""Records that tests of the store begin with."""

from __future__ import annotations

from sqlalchemy import Engine

from tasks.store import devices


def make_device(engine: Engine) -> int:
    """Registers `cpu_0`, and gives its new epoch."""
    facts = {
        "device_id": "cpu_0", "backend": "cpu", "ordinal": 0, "node": None, "name": "CPU", "vendor": None,
        "driver": None, "total_bytes": 1, "free_bytes": 1, "capabilities": {}, "providers": [], "host": "h", "pid": 1,
        "pid_started": 0.0,
    }  # fmt: skip
    with engine.connect() as connection:
        return devices.register(connection, facts, 15)
