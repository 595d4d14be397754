"""Reading a range of an allocation: into the ring of a gateway that waits on this machine, or into a blob.

A generator that yields between pieces, as those of `workers.operations.memory`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Iterator

from device_operations.errors import failure
from tasks.blobs import records as blob_store
from tasks.blobs.ring import Ring
from tasks.blobs.store import CHUNK_BYTES
from workers.devices.arrays import Buffer
from workers.execution.claimed_job import ClaimedJob, Progress, Steps
from workers.operations.allocations import buffer_of
from workers.resident.residents import Resident

#: A read goes through a ring as long as its caller takes it about as fast as a blob would be written: bytes a second
#: on the average, and the seconds it may fall behind. Then the rest is written to a blob.
PACE_BYTES = 2**29

PATIENCE_SECONDS = 0.25

#: Seconds slept where a ring is full: less than the gateway needs for a piece.
PAUSE_SECONDS = 0.0001

#: Seconds that the rest of a read is kept for its caller.
PASSING_SECONDS = 60.0


def read(resident: Resident, work: ClaimedJob) -> Steps:
    """Reads a range: into the ring of a gateway that waits for it on this machine, else into a new blob."""
    request = work.request
    allocation_id, offset, size = request["allocation_id"], request.get("offset", 0), request["size_bytes"]
    buffer = buffer_of(resident, allocation_id)
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
    header = memoryview(sha256.encode())
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
        elif header:
            slot[: len(header)] = header
            ring.put(len(header))
            header = header[len(header) :]
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
    # The hash of a part that only passes through the gateway is not needed.
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
