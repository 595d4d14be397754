"""Tensors between requests and the device: what a request names becomes a feed, what a run gives becomes JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from device_operations.errors import failure
from device_operations.tensors import INLINE_BYTES, Tensor, decode, encode, from_bytes, to_bytes
from tasks.store import blobs as blob_store
from workers.devices.base import BufferView
from workers.devices.onnx import Kept
from workers.resident import Resident


def feed(resident: Resident, name: str, tensor: dict[str, Any]) -> np.ndarray | BufferView:
    """The array or buffer that a request's tensor names. Arrays over blobs and base64 are read-only."""
    dtype, shape = tensor["dtype"], tensor["shape"]
    what = f"input {name!r}"
    blob_id = tensor.get("blob_id")
    if blob_id:
        wanted = Tensor.model_validate(tensor).size_bytes
        return from_bytes(resident.blobs.read(blob_id, tensor.get("offset", 0), wanted), dtype, shape, what)
    allocation_id = tensor.get("allocation_id")
    if allocation_id:
        return view(resident, allocation_id, tensor.get("offset", 0), dtype, tuple(shape))
    return decode(Tensor.model_construct(**tensor), what)


def view(
    resident: Resident, allocation_id: str, offset: int, dtype: str | None = None, shape: tuple[int, ...] | None = None
) -> BufferView:
    """A tensor in one of this device's allocations."""
    buffer = resident.allocations.get(allocation_id)
    if buffer is None:
        raise failure("allocation_not_found", f"{resident.device_id} holds no allocation {allocation_id!r}")
    return BufferView(buffer, offset, dtype, shape)


def give(resident: Resident, value: Any, form: str, owner: str) -> dict[str, Any]:
    """The wire form of an output: `data` up to 64 KiB, else a blob, unless `form` says otherwise."""
    array: np.ndarray = value.numpy() if isinstance(value, Kept) else np.asarray(value)
    if array.dtype.kind in "OUS" or form == "data" or (form == "auto" and array.nbytes <= INLINE_BYTES):
        return encode(array, "data")
    if form == "base64":
        return encode(array, "base64")
    blob_id = keep(resident, to_bytes(array), owner)
    return {"dtype": array.dtype.name, "shape": list(array.shape), "blob_id": blob_id}


def keep(resident: Resident, data: bytes | memoryview, owner: str) -> str:
    """Stores bytes as a blob of the job's owner, and gives its id."""
    stored = resident.blobs.put(data)
    with resident.engine.connect() as connection:
        blob_store.insert(
            connection,
            {"blob_id": stored.blob_id, "sha256": stored.sha256, "size_bytes": stored.size_bytes, "owner": owner},
            resident.settings.blobs.ttl_hours * 3600,
        )
    return stored.blob_id
