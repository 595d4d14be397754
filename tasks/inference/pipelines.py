"""What a run of a pipeline gives, as it is stored with its job: tensors and pictures where they are found again."""

from __future__ import annotations

import base64
import binascii

from device_operations.errors import failure
from device_operations.requests.pipelines import Picture, PipelineRun
from device_operations.tensors import INLINE_BYTES
from device_operations.wire.json_types import FreeJson
from tasks.inference.rows import KnownModel
from tasks.memory.named import check_tensors
from tasks.planning.context import Context, check_blobs, keep_bytes, store_tensors


def stored_run(
    context: Context, run: PipelineRun, model: KnownModel, owner: str
) -> tuple[FreeJson, tuple[str, ...], list[str]]:
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
        stored = [_stored_picture(context, picture, owner, name) for picture in pictures]
        blob_ids += [picture["blob_id"] for picture in stored if "blob_id" in picture]
        payload[name] = stored if isinstance(given, list) else stored[0]
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
