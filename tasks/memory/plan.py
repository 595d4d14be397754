"""Plans for device memory: quota and admission before anything is queued, ranges and owners checked on what exists.

An allocation is an exclusive resource: jobs that name it take effect in the order of their submission, so that all of
them can be submitted without waiting.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sqlalchemy import Connection

from device_operations.errors import OperationError, failure
from device_operations.jobs import Kind, new_id
from device_operations.requests.base import JobRequest
from device_operations.requests.memory import Allocate, Clear, Copy, Deallocate, Read, Write
from device_operations.wire.json_types import FreeJson
from tasks.devices.rows import DeviceRow
from tasks.jobs.model import NewJob
from tasks.memory import allocations as store
from tasks.memory.admission import reserve
from tasks.memory.named import Range, check_range, find, find_many, gone
from tasks.memory.rows import AllocationRow, KnownAllocation
from tasks.planning.context import Context, check_blobs, new_job, owner_of, place
from tasks.planning.earlier import Earlier
from tasks.planning.plan import Plan, Recorded, body_hash
from tasks.redis.queues import device_queue

GIB = 2**30

#: The form of the ids that the service itself gives (`new_id`): only an id of this form can be another thing's too.
_LIKE_OURS = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def plan_allocate(context: Context, request: Allocate, job_id: str) -> Plan:
    """Makes zeroed (or filled) bytes on a device. A caller's own `allocation_id` gives the first job again."""
    size = request.bytes_wanted
    quota = int(context.settings.max_memory_allocation_gb * GIB)
    if size > quota:
        raise failure(
            "allocation_too_large",
            f"{size} bytes were asked for, and one allocation may have {quota} (MAX_MEMORY_ALLOCATION_GB is "
            f"{context.settings.max_memory_allocation_gb:g}); make several",
            detail={"asked_bytes": size, "quota_bytes": quota},
        )
    device = place(context, request.device_id, size_bytes=size)
    allocation_id = request.allocation_id or new_id()
    job = new_job(
        context, Kind.MEMORY_ALLOCATE, request, job_id, device,
        payload={**request.payload(), "allocation_id": allocation_id, "size_bytes": size},
        resource_type="allocation", resource_id=allocation_id,
    )  # fmt: skip
    makes = {
        "allocation_id": allocation_id, "device_id": device["device_id"], "size_bytes": size, "dtype": request.dtype,
        "shape": request.shape, "label": request.label, "owner": job.owner, "job_id": job_id,
        "request_sha256": body_hash(request.payload()), "ttl_seconds": request.ttl_seconds,
        "is_chosen": request.allocation_id is not None,
    }  # fmt: skip
    return Plan(job, exclusive=(allocation_id,), together=record_allocations, makes=makes)


def foresee(earlier: Earlier, made_id: str, makes: FreeJson) -> None:
    """Notes the allocation that an entry makes; of several with one id the first counts."""
    allocation: KnownAllocation = {
        "allocation_id": made_id, "device_id": makes["device_id"], "state": "pending",
        "size_bytes": makes["size_bytes"], "owner": makes["owner"], "error": None,
    }  # fmt: skip
    earlier.allocations.setdefault(made_id, allocation)


def record_allocations(connection: Connection, plans: Sequence[Plan]) -> Recorded:
    """Records the allocations of all plans as pending and reserves their memory: a statement each, however many.

    Raises `allocation_exists` for an id that is another owner's, was used with another request, or is a model's or a
    session's, and `insufficient_memory`.
    """
    chosen = {plan.makes["allocation_id"] for plan in plans if plan.makes["is_chosen"]}
    alike = {allocation_id for allocation_id in chosen if _LIKE_OURS.fullmatch(allocation_id)}
    for allocation_id in sorted(store.names_another(connection, alike)) if alike else ():
        raise _taken(allocation_id)
    recorded = store.insert(connection, [plan.makes for plan in plans])
    made = [plan for plan in plans if recorded.get(plan.makes["allocation_id"]) == plan.job.id]
    answered = {}
    if len(made) < len(plans):
        known = store.get_many(connection, {plan.makes["allocation_id"] for plan in plans})
        for plan in plans:
            there = known[plan.makes["allocation_id"]]
            if there["job_id"] == plan.job.id:
                continue
            if there["owner"] != plan.job.owner or there["request_sha256"] != plan.makes["request_sha256"]:
                raise _taken(there["allocation_id"])
            answered[plan.job.id] = there["job_id"]
    after = {}
    wanted: dict[str, list[Plan]] = {}
    for plan in made:
        wanted.setdefault(plan.makes["device_id"], []).append(plan)
    for device_id in sorted(wanted):
        here = wanted[device_id]
        what = "the allocation" if len(here) == 1 else f"{len(here)} allocations together"
        waits_for = reserve(connection, device_id, sum(plan.makes["size_bytes"] for plan in here), what)
        if waits_for:
            after.update({plan.job.id: waits_for for plan in here})
    return Recorded(answered, after=after)


def plan_deallocate(context: Context, request: Deallocate, job_id: str) -> Plan:
    """Frees an allocation after the jobs submitted before. While one deallocation waits, another is that one again."""
    there = find(context, request.allocation_id)
    return Plan(
        _job_on(context, Kind.MEMORY_DEALLOCATE, request, job_id, there),
        exclusive=(request.allocation_id,),
        together=record_freeing,
    )


def record_freeing(connection: Connection, plans: Sequence[Plan]) -> Recorded:
    """Notes which job frees each allocation; an earlier one that is still to do so answers for a later one."""
    noted = store.set_freeing(connection, {str(plan.job.resource_id): plan.job.id for plan in reversed(plans)})
    late = [plan for plan in plans if noted.get(str(plan.job.resource_id)) != plan.job.id]
    if not late:
        return Recorded()
    known = store.get_many(connection, {str(plan.job.resource_id) for plan in late})
    answered = {}
    for plan in late:
        there = known.get(str(plan.job.resource_id))
        if there is None or there["freeing_job_id"] is None:
            raise gone(str(plan.job.resource_id), there)
        answered[plan.job.id] = there["freeing_job_id"]
    return Recorded(answered)


def plan_expiry(allocation: AllocationRow) -> Plan:
    """Frees an allocation whose time is up, for its owner, also on a device that takes no new jobs of callers."""
    job = NewJob(
        id=new_id(), kind=Kind.MEMORY_DEALLOCATE.value, device_id=allocation["device_id"],
        queue=device_queue(allocation["device_id"]), request={"allocation_id": allocation["allocation_id"]},
        owner=allocation["owner"], resource_type="allocation", resource_id=allocation["allocation_id"],
        needs=[allocation["allocation_id"]], labels={"reason": "ttl"},
    )  # fmt: skip
    return Plan(job, exclusive=(allocation["allocation_id"],), together=record_expiry)


def record_expiry(connection: Connection, plans: Sequence[Plan]) -> Recorded:
    """The same as for callers' own deallocations; what is gone, or freed by someone else, meanwhile is left alone."""
    noted = store.set_freeing(connection, {str(plan.job.resource_id): plan.job.id for plan in plans})
    return Recorded(dropped={plan.job.id for plan in plans if str(plan.job.resource_id) not in noted})


def plan_copy(context: Context, request: Copy, job_id: str) -> Plan:
    """Copies on the destination's device. Without a size: what is left of the shorter of the two."""
    source, destination = request.source, request.destination
    both = find_many(context, [source.allocation_id, destination.allocation_id])
    from_row, to_row = both[source.allocation_id], both[destination.allocation_id]
    size = request.size_bytes
    if size is None:
        size = min(from_row["size_bytes"] - source.offset, to_row["size_bytes"] - destination.offset)
        if size <= 0:
            size = 1  # one offset lies at or past the end: the check below says which
    check_range(from_row, Range(source.allocation_id, source.offset, size))
    check_range(to_row, Range(destination.allocation_id, destination.offset, size))
    names = sorted(both)
    payload = {**request.payload(), "size_bytes": size, "source_device_id": from_row["device_id"]}
    if from_row["device_id"] != to_row["device_id"]:
        _require_online(context, from_row["device_id"])
    return Plan(
        _job_on(context, Kind.MEMORY_COPY, request, job_id, to_row, needs=names, payload=payload),
        exclusive=tuple(names),
    )


def plan_clear(context: Context, request: Clear, job_id: str) -> Plan:
    """Sets a range to one byte."""
    there = find(context, request.allocation_id)
    size = check_range(there, Range(request.allocation_id, request.offset, request.size_bytes))
    payload = {**request.payload(), "size_bytes": size}
    return Plan(
        _job_on(context, Kind.MEMORY_CLEAR, request, job_id, there, payload=payload),
        exclusive=(request.allocation_id,),
    )


def plan_write(context: Context, request: Write, job_id: str) -> Plan:
    """Writes a blob into an allocation; `checksum_mismatch` at once where the blob's recorded hash is another."""
    there = find(context, request.allocation_id)
    blob = check_blobs(context, [request.blob_id])[request.blob_id]
    size = check_range(there, Range(request.allocation_id, request.offset, blob["size_bytes"]))
    if request.sha256 is not None and blob["sha256"] is not None and request.sha256 != blob["sha256"]:
        raise failure("checksum_mismatch", f"blob {request.blob_id} has sha256 {blob['sha256']}, not {request.sha256}")
    payload = {**request.payload(), "size_bytes": size, "blob_sha256": blob["sha256"]}
    return Plan(
        _job_on(context, Kind.MEMORY_WRITE, request, job_id, there, payload=payload, blob_ids=[request.blob_id]),
        exclusive=(request.allocation_id,),
    )


def plan_read(context: Context, request: Read, job_id: str) -> Plan:
    """Reads a range into a new blob."""
    there = find(context, request.allocation_id)
    size = check_range(there, Range(request.allocation_id, request.offset, request.size_bytes))
    payload = {**request.payload(), "size_bytes": size, "blob_id": new_id()}
    return Plan(
        _job_on(context, Kind.MEMORY_READ, request, job_id, there, payload=payload),
        exclusive=(request.allocation_id,),
    )


def _job_on(
    context: Context,
    kind: Kind,
    request: JobRequest,
    job_id: str,
    allocation: KnownAllocation,
    *,
    payload: FreeJson | None = None,
    needs: Sequence[str] = (),
    blob_ids: Sequence[str] = (),
) -> NewJob:
    """The job of a request on the device that holds an allocation, which it needs unless `needs` says more."""
    owner_of(context, request.job)
    return new_job(
        context, kind, request, job_id, _require_online(context, allocation["device_id"]), payload=payload,
        resource_type="allocation", resource_id=allocation["allocation_id"],
        needs=needs or [allocation["allocation_id"]], blob_ids=blob_ids,
    )  # fmt: skip


def _require_online(context: Context, device_id: str) -> DeviceRow:
    """The device, which must take jobs; a worker that plans for itself takes them."""
    if context.device_id == device_id:
        return context.directory.snapshot().devices[device_id]
    return context.directory.device(device_id)


def _taken(allocation_id: str) -> OperationError:
    return failure(
        "allocation_exists", f"the allocation id {allocation_id!r} is taken by another request; choose another"
    )
