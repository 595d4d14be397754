"""What every planner needs: who asks, what is known of devices and models, and where big tensors go."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine

from device_operations.errors import failure
from device_operations.jobs import Kind, State
from device_operations.requests.addresses import refuse_private
from device_operations.requests.base import JobOptions, JobRequest
from device_operations.settings import Settings
from device_operations.tensors import INLINE_BYTES, TEXT_DTYPES, Tensor, decode, to_bytes
from device_operations.wire.json_types import FreeJson
from device_operations.wire.texts import pack_texts
from tasks.blobs import records as blob_store
from tasks.blobs.rows import BlobRow
from tasks.blobs.store import BlobStore
from tasks.devices.directory import Directory
from tasks.devices.rows import DeviceRow
from tasks.jobs.model import NewJob
from tasks.jobs.options import asked_of
from tasks.owners import absent, found
from tasks.planning.earlier import Earlier
from tasks.redis.queues import device_queue


@dataclass(frozen=True, slots=True)
class Context:
    """Who asks and where. `device_id` is set where the device is given: the worker that received a direct message."""

    engine: Engine
    settings: Settings
    directory: Directory
    blobs: BlobStore
    owner: str
    admin: bool = False
    device_id: str | None = None
    #: What Celery is to be given at the end of a direct caller's task.
    celery: FreeJson | None = None
    #: What earlier entries of the same submission make; None for a submission of one.
    earlier: Earlier | None = None


def owner_of(context: Context, options: JobOptions) -> str:
    """Whose job it is: the key's own owner, or the one that an admin names."""
    if options.owner is None or options.owner == context.owner:
        return context.owner
    if not context.admin:
        raise failure("forbidden", f"job.owner is {options.owner!r}, but this key stands for {context.owner!r}")
    return options.owner


def place(context: Context, wanted: str | None, *, size_bytes: int = 0, holding: list[str] | None = None) -> DeviceRow:
    """The device that the job is for: the one given, the one wanted, or the best."""
    if context.device_id is not None and wanted in (None, context.device_id):
        return context.directory.snapshot().devices[context.device_id]
    if wanted is not None:
        return context.directory.device(wanted)
    return context.directory.choose(size_bytes, holding)


def new_job(
    context: Context,
    kind: Kind,
    request: JobRequest,
    job_id: str,
    device: DeviceRow,
    *,
    resource_type: str,
    resource_id: str,
    payload: FreeJson | None = None,
    needs: Sequence[str] = (),
    blob_ids: Sequence[str] = (),
    after: Sequence[str] = (),
) -> NewJob:
    """The job of a request on a device, with the options that came with it."""
    stored = request.payload() if payload is None else payload
    return new_stored_job(
        context, kind, request.job, job_id, device, stored, resource_type=resource_type, resource_id=resource_id,
        needs=needs, blob_ids=blob_ids, after=after, asked=asked_of(request),
    )  # fmt: skip


def new_stored_job(
    context: Context,
    kind: Kind,
    options: JobOptions,
    job_id: str,
    device: DeviceRow,
    payload: FreeJson,
    *,
    resource_type: str,
    resource_id: str,
    needs: Sequence[str] = (),
    blob_ids: Sequence[str] = (),
    after: Sequence[str] = (),
    asked: FreeJson | None = None,
) -> NewJob:
    """The same for a request that is stored as `payload` already."""
    device_id = device["device_id"]
    if options.webhook_url is not None and not context.settings.webhook.allow_private:
        refuse_private(options.webhook_url)
    context.directory.snapshot().placed[device_id] += 1
    return NewJob(
        id=job_id,
        kind=kind.value,
        device_id=device_id,
        queue=device_queue(device_id),
        request=payload,
        owner=owner_of(context, options),
        priority=options.priority,
        state=(State.SCHEDULED if options.delay_seconds else State.QUEUED).value,
        max_attempts=options.max_attempts,
        after=[*after, *options.after],
        own_after=() if context.admin else options.after,
        requires=options.after if options.after_success and options.after else None,
        labels=options.labels,
        delay_seconds=options.delay_seconds,
        expires_in_seconds=options.expires_in_seconds,
        timeout_seconds=options.timeout_seconds,
        webhook_url=options.webhook_url,
        celery=context.celery,
        # A direct message waits already, in Redis: refusing its record would not make the queue shorter.
        queue_limit=context.settings.queue.max_length if context.device_id is None else None,
        resource_type=resource_type,
        resource_id=resource_id,
        needs=needs,
        blob_ids=blob_ids,
        asked=asked,
    )


def store_tensors(
    context: Context, tensors: dict[str, Tensor], owner: str, allocations: Collection[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors with every inline one checked, those above 64 KiB moved to blobs; and the ids of all blobs named.

    `allocations` are the ids that were checked (`tasks.memory.plan.check_allocations`): no other may be named. Raises
    `input_mismatch` for elements that do not fit, `blob_not_found` for blobs that are not the caller's.
    """
    for tensor in tensors.values():
        if tensor.allocation_id is not None and tensor.allocation_id not in allocations:
            raise absent("allocation", tensor.allocation_id)
    kept: dict[str, Tensor] = {}
    named = [tensor.blob_id for tensor in tensors.values() if tensor.blob_id]
    check_blobs(context, named, tensors)
    for name, tensor in tensors.items():
        if tensor.blob_id or tensor.allocation_id:
            kept[name] = tensor
            continue
        array = decode(tensor, f"input {name!r}")
        text = tensor.dtype in TEXT_DTYPES
        raw = pack_texts(array.reshape(-1)) if text else memoryview(b"")
        if max(tensor.size_bytes, len(raw)) <= INLINE_BYTES:
            kept[name] = tensor
            continue
        blob_id = keep_bytes(context, raw if text else to_bytes(array), owner)
        named.append(blob_id)
        # Callers give text as data only; here it is as many bytes as anything else.
        kept[name] = Tensor.model_construct(dtype=tensor.dtype, shape=tensor.shape, blob_id=blob_id)
    return kept, named


def keep_bytes(context: Context, data: bytes | memoryview, owner: str) -> str:
    """Stores bytes as a blob that expires like any other, and gives its id."""
    stored = context.blobs.put(data)
    with context.engine.connect() as connection:
        blob_store.insert(
            connection,
            {"blob_id": stored.blob_id, "sha256": stored.sha256, "size_bytes": stored.size_bytes, "owner": owner},
            context.settings.blobs.ttl_hours * 3600,
        )
    return stored.blob_id


def check_blobs(context: Context, blob_ids: list[str], tensors: dict[str, Tensor] | None = None) -> dict[str, BlobRow]:
    """The rows of blobs that the caller may read; a blob shorter than its tensor is an `input_mismatch`."""
    if not blob_ids:
        return {}
    with context.engine.connect() as connection:
        known = blob_store.get_many(connection, blob_ids)
    for blob_id in blob_ids:
        found(context, known.get(blob_id), "blob", blob_id)
    for name, tensor in (tensors or {}).items():
        if tensor.blob_id and tensor.offset + tensor.size_bytes > known[tensor.blob_id]["size_bytes"]:
            raise failure(
                "input_mismatch",
                f"input {name!r}: {tensor.dtype} {tensor.shape} takes {tensor.size_bytes} bytes from offset "
                f"{tensor.offset}, but blob {tensor.blob_id} has {known[tensor.blob_id]['size_bytes']}",
            )
    return known
