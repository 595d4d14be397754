"""Plans for runs of pipelines: what such a run gives is held to the schema of its model's type, and stored."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from device_operations.errors import failure
from device_operations.requests.pipelines import AnyPipelineRun, Picture, PipelineRun
from device_operations.tensors import INLINE_BYTES
from tasks.asked import asked_of
from tasks.plans.base import Context, check_blobs, keep_bytes, owner_of, store_tensors
from tasks.plans.memory import check_tensors
from tasks.plans.residents import find_model
from tasks.store.connection import Row
from tasks.submit import Plan


def plan_pipeline_run(context: Context, request: PipelineRun, job_id: str) -> Plan:
    """Runs a pipeline where it is.

    Raises `model_not_found`, `validation_failed` where the fields are not those of the model's type, and what
    `stored_run` raises.
    """
    from tasks.plans.inference import plan_stored_run

    owner = owner_of(context, request.job)
    model = find_model(context, request.model_id, request.model_name, owner=owner)
    run = request.fitted(model["model_type"]) if isinstance(request, AnyPipelineRun) else request
    payload, allocations, blob_ids = stored_run(context, run, model, owner)
    return plan_stored_run(
        context, run.job, job_id, model, payload, allocations=allocations, blob_ids=blob_ids,
        asked=asked_of(run),
    )  # fmt: skip


def stored_run(
    context: Context, run: PipelineRun, model: Row, owner: str
) -> tuple[dict[str, Any], tuple[str, ...], list[str]]:
    """The run as it is stored, the allocations that it reads, and the blobs that it needs.

    Tensors and pictures above 64 KiB become blobs of the owner's. Raises `blob_not_found`, `allocation_not_found` and
    their like for what is not the caller's, `input_mismatch` for elements that do not fit.
    """
    tensors = run.tensors()
    allocations, staged = check_tensors(context, tensors, model["device_id"], "{}")
    kept, blob_ids = store_tensors(context, tensors, owner, allocations)
    payload = run.payload()
    for name, tensor in kept.items():
        payload[name] = tensor.model_dump(mode="json", exclude_unset=True)
        if name in staged:
            payload[name]["device_id"] = staged[name]
    for name, given in run.pictures().items():
        pictures = given if isinstance(given, list) else [given]
        told = [_stored_picture(context, picture, owner, name) for picture in pictures]
        blob_ids += [picture["blob_id"] for picture in told if "blob_id" in picture]
        payload[name] = told if isinstance(given, list) else told[0]
    return payload, allocations, blob_ids


def _stored_picture(context: Context, picture: Picture, owner: str, name: str) -> dict[str, str]:
    if picture.blob_id is not None:
        check_blobs(context, [picture.blob_id])
        return {"blob_id": picture.blob_id}
    assert picture.base64 is not None
    try:
        raw = base64.b64decode(picture.base64, validate=True)
    except (binascii.Error, ValueError) as error:
        raise failure("input_mismatch", f"{name}: base64 does not decode: {error}") from error
    if len(raw) <= INLINE_BYTES:
        return {"base64": picture.base64}
    return {"blob_id": keep_bytes(context, raw, owner)}
