"""A stack for benchmarks: own servers in a scratch folder, gateway and workers as a user runs them, one thread each."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from device_operations.stack.servers import Servers, running
from tests.support.databases import Databases
from tests.support.folders import reachable_folder
from tests.support.stack import RunningStack

#: One for each server: it makes the template of all databases there.
_databases: dict[str, Databases] = {}


@contextmanager
def servers() -> Iterator[Servers]:
    """PostgreSQL and Valkey of the run's own, which keep what they say they keep, as a user's do."""
    with reachable_folder() as folder, running(folder, durable=True) as started:
        yield started


@contextmanager
def stack(started: Servers, devices: str = "cpu:1", **settings: object) -> Iterator[RunningStack]:
    """Gateway and workers on a fresh database of `started`."""
    with tempfile.TemporaryDirectory() as folder:
        databases = _databases.setdefault(started.database_url, Databases(started))
        with databases.migrated() as url:
            made = RunningStack(
                Path(folder) / "stack", url, databases.redis_url(), devices, 1, {"LOG_LEVEL": "warning", **settings}
            )
            try:
                made.start()
                made.wait_ready()
                yield made
            finally:
                made.close()
