"""What ended jobs do to allocations and their reservations: all jobs of one kind that ended together at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection

from device_operations.errors import error_of, failure
from device_operations.jobs import State
from tasks.devices import store as devices
from tasks.jobs.model import Fallen, JobRow, resource_of
from tasks.memory import allocations
from tasks.memory.facts import HashFacts
from tasks.memory.rows import FreedAllocation

#: The error of jobs that need an allocation which died with its worker.
LOST = failure(
    "allocation_lost", "An allocation that the job needs was lost with its worker; allocate and write it again."
).as_job_error()

#: The error of jobs that were submitted for an allocation after its deallocation.
FREED = failure(
    "allocation_not_found", "An allocation that the job needs was freed by a job submitted before it."
).as_job_error()


def allocated(connection: Connection, jobs: list[JobRow], facts: Mapping[str, HashFacts], epoch: int | None) -> Fallen:
    """`memory.allocate` ended: allocations are active, or failed and their reservations given back."""
    won = [resource_of(job) for job in jobs if job["state"] == State.SUCCEEDED]
    if won:
        assert epoch is not None
        allocations.activate(connection, won, epoch)
    fallen: Fallen = []
    gone: list[FreedAllocation] = []
    for job in jobs:
        if job["state"] == State.SUCCEEDED:
            continue
        error = error_of(job["error"], job["state"], "The allocation's job")
        failed = allocations.end(connection, [(resource_of(job), job["id"])], "failed", error)
        if failed:
            gone += failed
            fallen.append((resource_of(job), error))
    _give_back(connection, gone)
    return fallen


def deallocated(
    connection: Connection, jobs: list[JobRow], facts: Mapping[str, HashFacts], epoch: int | None
) -> Fallen:
    """`memory.deallocate` ended: the reservations are free again, and what was to use the allocations fails."""
    failed = [job["id"] for job in jobs if job["state"] != State.SUCCEEDED]
    if failed:
        allocations.clear_freeing(connection, failed)
    freed = [(resource_of(job), job["id"]) for job in jobs if job["state"] == State.SUCCEEDED]
    gone = allocations.end(connection, freed, "freed") if freed else []
    _give_back(connection, gone)
    return [(row["allocation_id"], FREED) for row in gone]


def changed(connection: Connection, jobs: list[JobRow], facts: Mapping[str, HashFacts], epoch: int | None) -> Fallen:
    """A copy, clear or write ended: the hash of the bytes is what it found, or, if it had begun, no longer known."""
    _note_hashes(connection, jobs, facts, forget=True)
    return []


def was_read(connection: Connection, jobs: list[JobRow], facts: Mapping[str, HashFacts], epoch: int | None) -> Fallen:
    """A read ended: the hash of the bytes is what it found, or what was known before."""
    _note_hashes(connection, jobs, facts, forget=False)
    return []


def _note_hashes(connection: Connection, jobs: list[JobRow], facts: Mapping[str, HashFacts], *, forget: bool) -> None:
    hashes: dict[str, tuple[str | None, str]] = {}
    for job in sorted(jobs, key=lambda job: job["seq"]):
        found = facts.get(job["id"], HashFacts())
        if "sha256" in found:
            hashes[resource_of(job)] = (found["sha256"], job["id"])
        elif forget and job["started_at"] is not None:
            hashes[resource_of(job)] = (None, job["id"])
    if hashes:
        allocations.set_sha256(connection, hashes)


def lose(connection: Connection, device_id: str, epoch: int) -> list[str]:
    """A worker died: its allocations are lost, and their reservations given back."""
    gone = allocations.lose(connection, device_id, epoch)
    _give_back(connection, [{**row, "device_id": device_id} for row in gone])
    return [row["allocation_id"] for row in gone]


def _give_back(connection: Connection, gone: Sequence[FreedAllocation]) -> None:
    by_device: dict[str, int] = {}
    for row in gone:
        by_device[row["device_id"]] = by_device.get(row["device_id"], 0) + row["size_bytes"]
    for device_id in sorted(by_device):
        devices.adjust_reservation(connection, device_id, -by_device[device_id])
