"""One device's memory without processes: real records, plans, operations and effects, on the test's own thread.

What Celery, Redis and HTTP add is tested elsewhere; here thousands of jobs run in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from device_operations.errors import OperationError
from device_operations.jobs import TERMINAL, Kind
from device_operations.requests.kinds import parse
from device_operations.settings import Settings
from tasks.blobs import records as blob_store
from tasks.blobs.store import BlobStore
from tasks.database import open_engine
from tasks.devices import store as device_store
from tasks.devices.directory import Directory
from tasks.jobs import lifecycle, submit
from tasks.jobs import rescue as rescues
from tasks.jobs import store as job_store
from tasks.jobs.lifecycle import Outcome
from tasks.memory import budgets as memory_store
from tasks.planning.context import Context
from tasks.planning.planner import plan
from tasks.statements import Row
from workers.devices import open_device
from workers.execution.claimed_job import ClaimedJob, named
from workers.execution.scheduler import Entry
from workers.lease import take
from workers.operations import OPERATIONS
from workers.resident.residents import Resident


class Bench:
    """A device under a lease of an hour, with a budget of the test's choosing."""

    def __init__(self, database_url: str, settings: Settings, folder: Path, budget_bytes: int) -> None:
        self.engine: Engine = open_engine(database_url, pool_size=40)
        event.listen(self.engine, "connect", _do_not_wait_for_the_disk)
        self.settings = settings
        self.blobs = BlobStore(folder.as_uri())
        device = open_device("cpu", 0)
        about = device.describe()
        facts = {
            "device_id": "cpu_0", "backend": "cpu", "ordinal": 0, "node": None, "name": about.name,
            "vendor": about.vendor, "driver": about.driver, "total_bytes": budget_bytes, "free_bytes": None,
            "capabilities": dict(about.capabilities), "providers": list(about.providers),
        }  # fmt: skip
        self.lease, _ = take(self.engine, facts, budget_bytes, 3600)
        self.resident = Resident("cpu_0", self.lease.epoch, device, self.engine, settings, self.blobs)
        self.directory = Directory(self.engine, settings)

    def context(self, owner: str = "default") -> Context:
        return Context(self.engine, self.settings, self.directory, self.blobs, owner)

    def submit(self, requests: Sequence[tuple[Kind, dict[str, Any]]], owner: str = "default") -> list[Row]:
        """Records jobs, all or none, as a bulk submission does."""
        plans = [plan(self.context(owner), kind, parse(kind, request)) for kind, request in requests]
        with submit.transaction(self.engine) as connection:
            return submit.record(connection, plans)

    def attempt(
        self, requests: Sequence[tuple[Kind, dict[str, Any]]]
    ) -> tuple[list[Row], None] | tuple[None, OperationError]:
        """The jobs, or the refusal."""
        try:
            return self.submit(requests), None
        except OperationError as error:
            return None, error

    def run(self, limit: int = 1000) -> list[Row]:
        """Runs what is queued and eligible, the newest first, so that only its predecessors keep a job in its place."""
        ended: list[Row] = []
        while len(ended) < limit:
            with self.engine.connect() as connection:
                waiting = job_store.waiting(connection, "cpu_0", -1, 500)
                states = job_store.states(connection, {one for row in waiting for one in row["after"]})
                ready = [row for row in waiting if all(states[one] in TERMINAL for one in row["after"])]
                rows = job_store.claim(connection, [row["id"] for row in ready[-1:]], "cpu_0", self.lease.epoch)
            if not rows:
                return ended
            outcome = self._perform(rows[0])
            ended += lifecycle.finish(self.engine, [outcome], {rows[0]["id"]: rows[0]}, self.lease.epoch)
        return ended

    def _perform(self, row: Row) -> Outcome:
        entry = Entry(row["id"], row["kind"], row["priority"], row["seq"])
        work = ClaimedJob(entry, row, row["request"])
        try:
            made = OPERATIONS[row["kind"]](self.resident, work)
            if isinstance(made, Outcome):
                return made
            while True:
                try:
                    next(made)
                except StopIteration as stop:
                    outcome: Outcome = stop.value
                    return outcome
        except OperationError as error:
            return work.failed(named(error))

    def blob(self, data: bytes, owner: str = "default") -> str:
        stored = self.blobs.put(data)
        told = {"blob_id": stored.blob_id, "sha256": stored.sha256, "size_bytes": stored.size_bytes, "owner": owner}
        with self.engine.connect() as connection:
            blob_store.insert(connection, told, 3600)
        return stored.blob_id

    def standing(self) -> dict[str, Any]:
        with self.engine.connect() as connection:
            return memory_store.standing(connection, "cpu_0")[0]

    def job(self, job_id: str) -> Row:
        with self.engine.connect() as connection:
            found = job_store.get(connection, job_id)
        assert found is not None
        return found

    def close(self) -> None:
        for buffer in self.resident.allocations.values():
            self.resident.device.release(buffer)
        with submit.transaction(self.engine) as connection:
            device_store.lock(connection, "cpu_0")
            rescues.rescue(connection, "cpu_0", self.lease.epoch)
        self.engine.dispose()


def _do_not_wait_for_the_disk(connection: Any, _record: Any) -> None:
    """What a power cut would lose does not matter here, and it is several times faster."""
    with connection.cursor() as cursor:
        cursor.execute("SET synchronous_commit = off")
    connection.commit()
