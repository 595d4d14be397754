"""Device memory: allocating, freeing, copying, clearing, writing and reading.

Work on many bytes is a generator that yields between pieces, so that the scheduler can run something more urgent and a
cancellation takes effect; everything small is one call.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence

from device_operations.errors import OperationError, failure, from_job_error
from tasks.blobs import records as blob_store
from tasks.blobs.ring import Ring
from tasks.blobs.store import CHUNK_BYTES
from tasks.jobs.lifecycle import Outcome
from tasks.memory import allocations as store
from tasks.memory import budgets as memory_store
from workers.devices.arrays import Buffer
from workers.execution.claimed_job import ClaimedJob, Progress, Steps, named
from workers.execution.scheduler import Entry
from workers.json_types import JsonObject, StoredRequest
from workers.resident.models import evict_one, make_room
from workers.resident.residents import Resident

#: Bytes copied or filled between two looks at the scheduler: a few hundredths of a second. The C library copies larger
#: pieces in a way of its own that is an eighth faster than for pieces of 128 MiB.
STEP_BYTES = 512 * 2**20

#: A read goes through a ring as long as its caller takes it about as fast as a blob would be written: bytes a second
#: on the average, and the seconds it may fall behind. Then the rest is written to a blob.
PACE_BYTES = 2**29
PATIENCE_SECONDS = 0.25

#: Seconds slept where a ring is full: less than the gateway needs for a piece.
PAUSE_SECONDS = 0.0001

#: Seconds that the rest of a read is kept for its caller.
PASSING_SECONDS = 60.0

#: Allocations up to this size are made many at a time, and so many at most.
SMALL_BYTES = 2**20
BATCH_LIMIT = 512


def join_small(resident: Resident, entry: Entry, request: StoredRequest) -> None:
    """Joins allocations that are small; a large one runs alone."""
    if request["size_bytes"] <= SMALL_BYTES:
        join_all(resident, entry, request)


def join_all(resident: Resident, entry: Entry, request: StoredRequest) -> None:
    """Joins jobs of one kind, whatever they are for."""
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
    buffer = _held(resident, allocation_id)
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


def copy(resident: Resident, work: ClaimedJob) -> Outcome | Steps:
    """Copies a range; within one allocation as memmove does, from another device see `workers.operations.transfers`."""
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
    resident: Resident, work: ClaimedJob, to: Buffer, offset: int, source_offset: int, result: JsonObject
) -> Steps:
    assert resident.transfers is not None
    request = work.request
    via = yield from resident.transfers.fetch(
        work.job_id, request["source_device_id"], request["source"]["allocation_id"], source_offset,
        request["size_bytes"], lambda start, data: resident.device.write(to, offset + start, data),
    )  # fmt: skip
    return work.succeeded({**result, "source_device_id": request["source_device_id"], "via": via})


def clear(resident: Resident, work: ClaimedJob) -> Outcome | Steps:
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


def write(resident: Resident, work: ClaimedJob) -> Outcome | Steps:
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
        if request.get("passing"):
            resident.background.submit(resident.blobs.retire, request["blob_id"])

    result = {
        "allocation_id": allocation_id,
        "offset": offset,
        "size_bytes": size,
        "sha256": request.get("blob_sha256"),
    }
    whole = offset == 0 and size == buffer.size_bytes
    return _in_steps(
        work, result, size, move, settle=settle, step_bytes=CHUNK_BYTES,
        sha256=(lambda: resident.hashes.get(allocation_id) if whole else None),
    )  # fmt: skip


def read(resident: Resident, work: ClaimedJob) -> Steps:
    """Reads a range: into the ring of a gateway that waits for it on this machine, else into a new blob."""
    request = work.request
    allocation_id, offset, size = request["allocation_id"], request.get("offset", 0), request["size_bytes"]
    buffer = _held(resident, allocation_id)
    whole = offset == 0 and size == buffer.size_bytes
    known = resident.hashes.get(allocation_id) if whole else None
    ring = _attached(request.get("ring"))
    if ring is None:
        sha256 = yield from _into_blob(resident, work, buffer, known)
        passed = 0
    else:
        try:
            sha256 = known or (yield from _hashed(resident, work, buffer))
            passed = yield from _into_ring(resident, work, buffer, ring, sha256)
        finally:
            ring.close()
    result = {
        "allocation_id": allocation_id, "offset": offset, "size_bytes": size, "sha256": sha256,
        "blob_id": request["blob_id"] if passed < size else None, "passed_bytes": passed,
    }  # fmt: skip
    if not whole:
        return work.succeeded(result)
    resident.hashes[allocation_id] = sha256
    return work.succeeded(result, sha256=sha256)


def _into_blob(
    resident: Resident, work: ClaimedJob, buffer: Buffer, known: str | None
) -> Generator[Progress, None, str]:
    """A blob of the job's owner that holds the range, hashed on the way unless the hash is known; gives the hash."""
    size = work.request["size_bytes"]
    with resident.blobs.writer(work.request["blob_id"], sha256=known) as writer:
        for start, data in _chunks(resident, work, buffer):
            writer.write(data)
            if start + len(data) < size:
                yield Progress({"done_bytes": start + len(data), "total_bytes": size})
        stored = writer.finish()
    _record(resident, work, stored.sha256, size, resident.settings.blobs.ttl_hours * 3600)
    return stored.sha256


def _hashed(resident: Resident, work: ClaimedJob, buffer: Buffer) -> Generator[Progress, None, str]:
    """The range's sha256."""
    hasher = hashlib.sha256()
    for _, data in _chunks(resident, work, buffer):
        hasher.update(data)
        yield Progress()
    return hasher.hexdigest()


def _into_ring(
    resident: Resident, work: ClaimedJob, buffer: Buffer, ring: Ring, sha256: str
) -> Generator[Progress, None, int]:
    """Puts the hash and then the bytes into the ring, as fast as they are taken; gives how many went that way.

    A caller that takes them slowly holds neither the device nor the allocation: what is left then goes into a blob.
    """
    size, offset, done = work.request["size_bytes"], work.request.get("offset", 0), 0
    told = memoryview(sha256.encode())
    began = time.monotonic()
    while done < size:
        if ring.closed:
            raise failure("cancelled", "who asked for the bytes has left")
        slot = ring.room()
        if slot is None:
            if time.monotonic() - began > PATIENCE_SECONDS + done / PACE_BYTES:
                yield from _rest_into_blob(resident, work, buffer, ring, done)
                return done
            time.sleep(PAUSE_SECONDS)
        elif told:
            slot[: len(told)] = told
            ring.put(len(told))
            told = told[len(told) :]
        else:
            step = min(len(slot), size - done)
            resident.device.read(buffer, offset + done, step, slot[:step])
            ring.put(step)
            done += step
        yield Progress()
    return done


def _rest_into_blob(
    resident: Resident, work: ClaimedJob, buffer: Buffer, ring: Ring, done: int
) -> Generator[Progress, None, None]:
    with resident.blobs.writer(work.request["blob_id"], sha256="0" * 64) as writer:
        for _, data in _chunks(resident, work, buffer, done):
            if ring.closed:
                raise failure("cancelled", "who asked for the bytes has left")
            writer.write(data)
            yield Progress()
        stored = writer.finish()
    # Nobody asks for the hash of a part that only passes through the gateway.
    _record(resident, work, None, stored.size_bytes, PASSING_SECONDS)


def _attached(name: str | None) -> Ring | None:
    """The ring that a gateway offers, where it is on this machine and still wants the bytes that way."""
    if name is None:
        return None
    try:
        return Ring.attach(name)
    except OSError:
        return None


def _chunks(resident: Resident, work: ClaimedJob, buffer: Buffer, done: int = 0) -> Iterator[tuple[int, memoryview]]:
    """The range from `done` on, a chunk at a time; each is valid until the next."""
    size, offset = work.request["size_bytes"], work.request.get("offset", 0)
    staging: memoryview | None = None
    for start in range(done, size, CHUNK_BYTES):
        step = min(CHUNK_BYTES, size - start)
        data = resident.device.host_view(buffer, offset + start, step)
        if data is None:
            staging = staging or memoryview(bytearray(min(size, CHUNK_BYTES)))
            data = resident.device.read(buffer, offset + start, step, staging[:step])
        yield start, data


def _record(resident: Resident, work: ClaimedJob, sha256: str | None, size: int, ttl_seconds: float) -> None:
    blob = {
        "blob_id": work.request["blob_id"], "sha256": sha256, "size_bytes": size, "owner": work.row["owner"],
    }  # fmt: skip
    with resident.engine.connect() as connection:
        blob_store.insert(connection, blob, ttl_seconds)


def _in_steps(
    work: ClaimedJob,
    result: JsonObject,
    size: int,
    move: Callable[[int, int], None],
    *,
    settle: Callable[[], None],
    backwards: bool = False,
    step_bytes: int = STEP_BYTES,
    sha256: Callable[[], str | None] = lambda: None,
) -> Outcome | Steps:
    """Moves `size` bytes: at once where they are few, else piece by piece with progress between."""
    if size <= step_bytes:
        move(0, size)
        settle()
        return _moved(work, result, sha256())
    return _pieces(work, result, size, move, settle, backwards, step_bytes, sha256)


def _pieces(
    work: ClaimedJob,
    result: JsonObject,
    size: int,
    move: Callable[[int, int], None],
    settle: Callable[[], None],
    backwards: bool,
    step_bytes: int,
    sha256: Callable[[], str | None],
) -> Steps:
    done = 0
    for start, step in _ranges(size, step_bytes, backwards):
        move(start, step)
        done += step
        if done < size:
            yield Progress({"done_bytes": done, "total_bytes": size})
    settle()
    return _moved(work, result, sha256())


def _moved(work: ClaimedJob, result: JsonObject, sha256: str | None) -> Outcome:
    return work.succeeded(result) if sha256 is None else work.succeeded(result, sha256=sha256)


def _ranges(size: int, step_bytes: int, backwards: bool) -> Iterator[tuple[int, int]]:
    starts = range(0, size, step_bytes)
    for start in reversed(starts) if backwards else starts:
        yield start, min(step_bytes, size - start)


def _held(resident: Resident, allocation_id: str) -> Buffer:
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
