"""Device memory: allocating, freeing, copying, clearing, writing and reading.

Work on many bytes is a generator that yields between pieces, so that the lane can run something more urgent and a
cancellation takes effect; everything small is one call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from device_operations.errors import OperationError, failure, from_job_error
from device_operations.jobs import Kind
from tasks.blobs import CHUNK_BYTES
from tasks.lifecycle import Outcome
from tasks.store import allocations as store
from tasks.store import blobs as blob_store
from tasks.store import devices as device_store
from workers.devices.base import Buffer
from workers.models import evict_one, make_room
from workers.resident import Resident
from workers.work import Progress, Work, named

Steps = Generator[Progress, None, Outcome]

#: Bytes copied or filled between two looks at the lane: a few hundredths of a second. The C library copies larger
#: pieces in a way of its own that is an eighth faster than for pieces of 128 MiB.
STEP_BYTES = 512 * 2**20

#: Allocations up to this size are made many at a time.
SMALL_BYTES = 2**20
BATCH_LIMIT = 512


def allocate(resident: Resident, work: Work) -> Outcome:
    """Makes the bytes, zeroed or filled; idle models make room."""
    return allocate_batch(resident, [work])[0]


def allocate_batch(resident: Resident, works: Sequence[Work]) -> list[Outcome]:
    """Makes many allocations; each fails alone."""
    make_room(resident)
    room = _room(resident)
    outcomes = []
    for work in works:
        try:
            outcomes.append(_allocate(resident, work, room))
        except OperationError as error:
            if error.code == "device_lost":
                raise
            room += work.request["size_bytes"]
            outcomes.append(work.failed(error))
        except Exception as error:  # noqa: BLE001 - any failure of one allocation is that one's outcome
            room += work.request["size_bytes"]
            outcomes.append(work.failed(named(error)))
    return outcomes


def _room(resident: Resident) -> int:
    """Bytes of the budget that are not reserved: below 0 where admission counted on room that did not come."""
    with resident.engine.connect() as connection:
        device = device_store.get(connection, resident.device_id)
    return 0 if device is None else int(device["budget_bytes"] - device["reserved_bytes"])


def _allocate(resident: Resident, work: Work, room: int) -> Outcome:
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


def deallocate(resident: Resident, work: Work) -> Outcome:
    """Gives the bytes back to the device."""
    allocation_id = work.request["allocation_id"]
    buffer = _held(resident, allocation_id)
    resident.device.release(buffer)
    del resident.allocations[allocation_id]
    resident.hashes.pop(allocation_id, None)
    return work.succeeded({"allocation_id": allocation_id, "freed_bytes": buffer.size_bytes})


def deallocate_batch(resident: Resident, works: Sequence[Work]) -> list[Outcome]:
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


def copy(resident: Resident, work: Work) -> Outcome | Steps:
    """Copies a range; within one allocation as memmove does, from another device through `workers.transfers`."""
    request = work.request
    source, destination, size = request["source"], request["destination"], request["size_bytes"]
    to = _held(resident, destination["allocation_id"])
    resident.hashes.pop(destination["allocation_id"], None)
    result = {
        "source": source["allocation_id"], "destination": destination["allocation_id"], "size_bytes": size,
    }  # fmt: skip
    start_to, start_from = destination.get("offset", 0), source.get("offset", 0)
    if source["allocation_id"] not in resident.allocations and request["source_device_id"] != resident.device_id:
        return _copy_from_elsewhere(resident, work, to, start_to, start_from, result)
    from_ = _held(resident, source["allocation_id"])
    return _in_steps(
        work,
        result,
        size,
        lambda start, step: resident.device.copy(to, start_to + start, from_, start_from + start, step),
        # Overlapping ranges are copied from the end that is not overwritten first.
        backwards=to is from_ and start_to > start_from,
        settle=resident.device.synchronize,
    )


def _copy_from_elsewhere(
    resident: Resident, work: Work, to: Buffer, offset: int, source_offset: int, result: dict[str, Any]
) -> Steps:
    assert resident.transfers is not None
    request = work.request
    via = yield from resident.transfers.fetch(
        work.job_id, request["source_device_id"], request["source"]["allocation_id"], source_offset,
        request["size_bytes"], lambda start, data: resident.device.write(to, offset + start, data),
    )  # fmt: skip
    return work.succeeded({**result, "source_device_id": request["source_device_id"], "via": via})


def clear(resident: Resident, work: Work) -> Outcome | Steps:
    """Sets a range to one byte."""
    request = work.request
    buffer = _held(resident, request["allocation_id"])
    resident.hashes.pop(request["allocation_id"], None)
    offset, value = request.get("offset", 0), request.get("value", 0)
    return _in_steps(
        work,
        {"allocation_id": request["allocation_id"], "size_bytes": request["size_bytes"], "value": value},
        request["size_bytes"],
        lambda start, step: resident.device.fill(buffer, value, offset + start, step),
        settle=resident.device.synchronize,
    )


def write(resident: Resident, work: Work) -> Outcome | Steps:
    """Writes a blob's bytes into a range; straight from its file where the device's memory is the host's."""
    request = work.request
    allocation_id, offset, size = request["allocation_id"], request.get("offset", 0), request["size_bytes"]
    buffer = _held(resident, allocation_id)
    resident.hashes.pop(allocation_id, None)
    known = request.get("blob_sha256")
    hasher = hashlib.sha256() if request.get("sha256") or known is None else None
    staging: bytearray | None = None

    def move(start: int, step: int) -> None:
        nonlocal staging
        view = resident.device.host_view(buffer, offset + start, step)
        if view is None:
            staging = staging or bytearray(min(size, CHUNK_BYTES))
            view = memoryview(staging)[:step]
        resident.blobs.read_into(request["blob_id"], start, view)
        if hasher is not None:
            hasher.update(view)
        if staging is not None:
            resident.device.write(buffer, offset + start, view)

    def settle() -> None:
        resident.device.synchronize()
        told = hasher.hexdigest() if hasher is not None else known
        if request.get("sha256") not in (None, told):
            raise failure("checksum_mismatch", f"what was written has sha256 {told}, not {request['sha256']}")
        if offset == 0 and size == buffer.size_bytes and told:
            resident.hashes[allocation_id] = told

    result = {
        "allocation_id": allocation_id,
        "offset": offset,
        "size_bytes": size,
        "sha256": request.get("blob_sha256"),
    }
    whole = offset == 0 and size == buffer.size_bytes
    return _in_steps(
        work, result, size, move, settle=settle, step_bytes=CHUNK_BYTES,
        facts=(lambda: {"sha256": resident.hashes.get(allocation_id)} if whole else {}),
    )  # fmt: skip


def read(resident: Resident, work: Work) -> Steps:
    """Reads a range into a new blob of the job's owner, hashed on the way unless the hash is known."""
    request = work.request
    allocation_id, offset, size = request["allocation_id"], request.get("offset", 0), request["size_bytes"]
    buffer = _held(resident, allocation_id)
    whole = offset == 0 and size == buffer.size_bytes
    known = resident.hashes.get(allocation_id) if whole else None
    with resident.blobs.writer(request["blob_id"], sha256=known) as writer:
        staging: memoryview | None = None
        for start in range(0, size, CHUNK_BYTES):
            step = min(CHUNK_BYTES, size - start)
            data = resident.device.host_view(buffer, offset + start, step)
            if data is None:
                staging = staging or memoryview(bytearray(min(size, CHUNK_BYTES)))
                data = resident.device.read(buffer, offset + start, step, staging[:step])
            writer.write(data)
            if start + step < size:
                yield Progress({"done_bytes": start + step, "total_bytes": size})
        stored = writer.finish()
    if whole:
        resident.hashes[allocation_id] = stored.sha256
    with resident.engine.connect() as connection:
        blob_store.insert(
            connection,
            {"blob_id": stored.blob_id, "sha256": stored.sha256, "size_bytes": size, "owner": work.row["owner"]},
            resident.settings.blobs.ttl_hours * 3600,
        )
    result = {
        "allocation_id": allocation_id, "offset": offset, "size_bytes": size, "blob_id": stored.blob_id,
        "sha256": stored.sha256,
    }  # fmt: skip
    facts: dict[str, Any] = {"sha256": stored.sha256} if whole else {}
    return work.succeeded(result, **facts)


def _in_steps(
    work: Work,
    result: dict[str, Any],
    size: int,
    move: Any,
    *,
    settle: Any,
    backwards: bool = False,
    step_bytes: int = STEP_BYTES,
    facts: Any = dict,
) -> Outcome | Steps:
    """Moves `size` bytes: at once where they are few, else piece by piece with progress between."""
    if size <= step_bytes:
        move(0, size)
        settle()
        return work.succeeded(result, **facts())
    return _pieces(work, result, size, move, settle, backwards, step_bytes, facts)


def _pieces(
    work: Work, result: dict[str, Any], size: int, move: Any, settle: Any, backwards: bool, step_bytes: int, facts: Any
) -> Steps:
    done = 0
    for start, step in _ranges(size, step_bytes, backwards):
        move(start, step)
        done += step
        if done < size:
            yield Progress({"done_bytes": done, "total_bytes": size})
    settle()
    return work.succeeded(result, **facts())


def _ranges(size: int, step_bytes: int, backwards: bool) -> Iterator[tuple[int, int]]:
    starts = range(0, size, step_bytes)
    for start in reversed(starts) if backwards else starts:
        yield start, min(step_bytes, size - start)


def _held(resident: Resident, allocation_id: str) -> Buffer:
    """The allocation's bytes on this device, or why they are not here."""
    buffer = resident.allocations.get(allocation_id)
    if buffer is not None:
        return buffer
    with resident.engine.connect() as connection:
        there = store.get(connection, allocation_id)
    if there is not None and there["state"] == "lost":
        raise failure("allocation_lost", f"allocation {allocation_id} was lost with its worker")
    if there is not None and there["state"] == "failed" and there["error"]:
        raise from_job_error(there["error"])
    raise failure("allocation_not_found", f"{resident.device_id} holds no allocation {allocation_id!r}: it was freed")


OPERATIONS = {
    Kind.MEMORY_ALLOCATE.value: allocate,
    Kind.MEMORY_DEALLOCATE.value: deallocate,
    Kind.MEMORY_COPY.value: copy,
    Kind.MEMORY_CLEAR.value: clear,
    Kind.MEMORY_WRITE.value: write,
    Kind.MEMORY_READ.value: read,
}
BATCHES = {Kind.MEMORY_ALLOCATE.value: allocate_batch, Kind.MEMORY_DEALLOCATE.value: deallocate_batch}
