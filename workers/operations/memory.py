"""Copying, clearing and writing ranges of device memory.

Work on many bytes is a generator that yields between pieces, so that the scheduler can run something more urgent and a
cancellation takes effect; everything small is one call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

from device_operations.errors import failure
from device_operations.wire.json_types import JsonObject
from tasks.blobs.store import CHUNK_BYTES
from tasks.jobs.lifecycle import Outcome
from workers.devices.arrays import Buffer
from workers.execution.claimed_job import ClaimedJob, Progress, Steps
from workers.operations.allocations import buffer_of
from workers.resident.residents import Resident

#: Bytes copied or filled between two looks at the scheduler: a few hundredths of a second. The C library copies larger
#: pieces in a way of its own that is an eighth faster than for pieces of 128 MiB.
STEP_BYTES = 512 * 2**20


def copy(resident: Resident, work: ClaimedJob) -> Outcome | Steps:
    """Copies a range; within one allocation as memmove does, from another device see `workers.operations.transfers`."""
    request = work.request
    source, destination, size = request["source"], request["destination"], request["size_bytes"]
    to = buffer_of(resident, destination["allocation_id"])
    resident.hashes.pop(destination["allocation_id"], None)
    result = {
        "source": source["allocation_id"], "destination": destination["allocation_id"], "size_bytes": size,
    }  # fmt: skip
    start_to, start_from = destination.get("offset", 0), source.get("offset", 0)
    if source["allocation_id"] not in resident.allocations and request["source_device_id"] != resident.device_id:
        return _copy_from_elsewhere(resident, work, to, start_to, start_from, result)
    from_ = buffer_of(resident, source["allocation_id"])
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
    buffer = buffer_of(resident, request["allocation_id"])
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
    buffer = buffer_of(resident, allocation_id)
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
        written = hasher.hexdigest() if hasher is not None else known
        if request.get("sha256") not in (None, written):
            raise failure("checksum_mismatch", f"what was written has sha256 {written}, not {request['sha256']}")
        if offset == 0 and size == buffer.size_bytes and written:
            resident.hashes[allocation_id] = written
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
