"""Making and freeing allocations, many at a time if they are small, and finding the bytes of one."""

from __future__ import annotations

from collections.abc import Sequence

from device_operations.errors import OperationError, failure, from_job_error
from tasks.jobs.lifecycle import Outcome
from tasks.jobs.model import StoredRequest
from tasks.memory import allocations as store
from tasks.memory import budgets as memory_store
from workers.devices.arrays import Buffer
from workers.execution.claimed_job import ClaimedJob, named
from workers.execution.scheduler import Entry
from workers.resident.models import evict_one, make_room
from workers.resident.residents import Resident

#: Allocations up to this size are made many at a time, and so many at most.
SMALL_BYTES = 2**20

BATCH_LIMIT = 512


def join_small(resident: Resident, entry: Entry, request: StoredRequest) -> None:
    """Joins allocations that are small; a large one runs alone."""
    if request["size_bytes"] <= SMALL_BYTES:
        join_all(resident, entry, request)


def join_all(resident: Resident, entry: Entry, request: StoredRequest) -> None:
    """Joins all jobs of one kind."""
    entry.batch_key, entry.batch_limit = entry.kind, BATCH_LIMIT


def allocate(resident: Resident, work: ClaimedJob) -> Outcome:
    """Makes the bytes, zeroed or filled; idle models make room."""
    return allocate_batch(resident, [work])[0]


def allocate_batch(resident: Resident, works: Sequence[ClaimedJob]) -> list[Outcome]:
    """Makes many allocations; each fails alone."""
    ids = [work.request["allocation_id"] for work in works]
    # What fits counted on nothing; else some were admitted against room that may not have come.
    rooms = {} if make_room(resident) else resident.read(memory_store.rooms, resident.device_id, ids)
    given_up = 0
    outcomes = []
    for work in works:
        try:
            outcomes.append(_allocate(resident, work, rooms.get(work.request["allocation_id"], 0) + given_up))
        except OperationError as error:
            if error.code == "device_lost":
                raise
            given_up += work.request["size_bytes"]
            outcomes.append(work.failed(error))
        except Exception as error:  # noqa: BLE001 - any failure of one allocation is that one's outcome
            given_up += work.request["size_bytes"]
            outcomes.append(work.failed(named(error)))
    return outcomes


def _allocate(resident: Resident, work: ClaimedJob, room: int) -> Outcome:
    allocation_id, size = work.request["allocation_id"], work.request["size_bytes"]
    if room < 0:
        raise failure(
            "insufficient_memory",
            f"{size} bytes were admitted to {resident.device_id} against memory that was to be freed and was not: "
            f"{-room} bytes are missing; free allocations, or unload models",
            detail={"needed_bytes": size, "missing_bytes": -room},
        )
    buffer = resident.allocations.get(allocation_id) or _buffer(resident, size)
    fill = work.request.get("fill", 0)
    if fill:
        try:
            resident.device.fill(buffer, fill)
        except BaseException:
            resident.device.release(buffer)
            raise
    resident.allocations[allocation_id] = buffer
    return work.succeeded({"allocation_id": allocation_id, "device_id": resident.device_id, "size_bytes": size})


def _buffer(resident: Resident, size: int) -> Buffer:
    """Zeroed bytes; where the device has fewer than its budget says, idle models go first."""
    while True:
        try:
            return resident.device.allocate(size)
        except OperationError as error:
            if error.code != "out_of_memory" or not evict_one(resident):
                raise


def deallocate(resident: Resident, work: ClaimedJob) -> Outcome:
    """Gives the bytes back to the device."""
    allocation_id = work.request["allocation_id"]
    buffer = buffer_of(resident, allocation_id)
    resident.device.release(buffer)
    del resident.allocations[allocation_id]
    resident.hashes.pop(allocation_id, None)
    return work.succeeded({"allocation_id": allocation_id, "freed_bytes": buffer.size_bytes})


def deallocate_batch(resident: Resident, works: Sequence[ClaimedJob]) -> list[Outcome]:
    """Frees many; each fails alone."""
    outcomes = []
    for work in works:
        try:
            outcomes.append(deallocate(resident, work))
        except OperationError as error:
            if error.code == "device_lost":
                raise
            outcomes.append(work.failed(error))
    return outcomes


def buffer_of(resident: Resident, allocation_id: str) -> Buffer:
    """The allocation's bytes on this device, or why they are not here."""
    buffer = resident.allocations.get(allocation_id)
    if buffer is not None:
        return buffer
    there = resident.read(store.get, allocation_id)
    if there is not None and there["state"] == "lost":
        raise failure("allocation_lost", f"allocation {allocation_id} was lost with its worker")
    if there is not None and there["state"] == "failed" and there["error"]:
        raise from_job_error(there["error"])
    raise failure("allocation_not_found", f"{resident.device_id} holds no allocation {allocation_id!r}: it was freed")
