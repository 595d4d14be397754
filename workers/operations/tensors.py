"""Tensors between requests and the device: what a request names becomes a feed, what a run gives becomes JSON."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

from device_operations.errors import failure
from device_operations.tensors import (
    FIXED_DTYPES,
    INLINE_BYTES,
    TEXT_DTYPES,
    Tensor,
    decode,
    encode,
    from_bytes,
    to_bytes,
)
from device_operations.texts import pack_texts, unpack_texts
from tasks.blobs import records as blob_store
from tasks.blobs.transients import TRANSIENT_BYTES
from workers.devices.arrays import Array, BufferView, flat_bytes
from workers.devices.onnx.runtime import Kept
from workers.devices.onnx.values import Values
from workers.resident.residents import Resident


def feed(resident: Resident, name: str, tensor: dict[str, Any]) -> Array | BufferView:
    """The array or buffer that a request's tensor names. Arrays over blobs and base64 are read-only."""
    dtype, shape = tensor["dtype"], tensor["shape"]
    what = f"input {name!r}"
    allocation_id = tensor.get("allocation_id")
    if allocation_id and tensor.get("device_id") not in (None, resident.device_id):
        return from_bytes(_fetched(resident, tensor), dtype, shape, what)
    if allocation_id:
        return view(resident, allocation_id, tensor.get("offset", 0), dtype, tuple(shape))
    if dtype in TEXT_DTYPES and "data" not in tensor:
        return _texts(resident, tensor, what)
    if tensor.get("base64") is not None:  # checked when it was submitted
        return from_bytes(base64.b64decode(tensor["base64"]), dtype, shape, what)
    if "transient_id" in tensor or tensor.get("blob_id"):
        return from_bytes(_raw(resident, tensor, math.prod(shape) * FIXED_DTYPES[dtype]), dtype, shape, what)
    return decode(Tensor.model_construct(**tensor), what)


def _fetched(resident: Resident, tensor: dict[str, Any]) -> bytearray:
    """A tensor's bytes from another device's allocation."""
    assert resident.transfers is not None
    size = math.prod(tensor["shape"]) * FIXED_DTYPES[tensor["dtype"]]
    return resident.transfers.fetch_now(tensor["device_id"], tensor["allocation_id"], tensor.get("offset", 0), size)


def staged_bytes(inputs: dict[str, dict[str, Any]]) -> int:
    """The bytes of a request's tensors that lie on another device than the job."""
    elsewhere = [tensor for tensor in inputs.values() if tensor.get("device_id")]
    return sum(math.prod(tensor["shape"]) * FIXED_DTYPES[tensor["dtype"]] for tensor in elsewhere)


def view(
    resident: Resident, allocation_id: str, offset: int, dtype: str | None = None, shape: tuple[int, ...] | None = None
) -> BufferView:
    """A tensor in one of this device's allocations."""
    buffer = resident.allocations.get(allocation_id)
    if buffer is None:
        raise failure("allocation_not_found", f"{resident.device_id} holds no allocation {allocation_id!r}")
    if dtype is None:  # an output goes there
        resident.hashes.pop(allocation_id, None)
    return BufferView(buffer, offset, dtype, shape)


def give(resident: Resident, value: Any, form: str, owner: str) -> dict[str, Any] | None:
    """The wire form of an output: `data` up to 64 KiB, else a blob, unless `form` says otherwise.

    Text is given as `data`; above 64 KiB as a blob too, each string behind its length (`device_operations.texts`).
    What is no tensor is a list of JSON values, and in a blob the same as text. None is an optional output without one.
    """
    if value is None:
        return None
    if isinstance(value, Values):
        packed = pack_texts(value.texts()) if form in ("blob", "auto") else b""
        if form == "blob" or len(packed) > INLINE_BYTES:
            return {"dtype": "json", "shape": list(value.shape), "blob_id": keep(resident, packed, owner)}
        return {"dtype": "json", "shape": list(value.shape), "data": value.strict()}
    array = host_array(value)
    if array.dtype.kind in "OUS":
        packed = pack_texts(array.reshape(-1)) if form in ("blob", "auto") else b""
        if form == "blob" or len(packed) > INLINE_BYTES:
            return {"dtype": "string", "shape": list(array.shape), "blob_id": keep(resident, packed, owner)}
        return encode(array, "data")
    if form == "data" or (form == "auto" and array.nbytes <= INLINE_BYTES):
        return encode(array, "data")
    if form == "base64":
        return encode(array, "base64")
    blob_id = keep(resident, to_bytes(array), owner)
    return {"dtype": array.dtype.name, "shape": list(array.shape), "blob_id": blob_id}


def hand_over(resident: Resident, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Outputs for a request that waits: small ones in the result itself, the others in one transient file.

    Of what is no tensor, the JSON texts; an optional output without a value is left out.
    """
    told: dict[str, dict[str, Any]] = {}
    parts: list[bytes | memoryview] = []
    offset = 0
    for name, value in values.items():
        if value is None:
            continue
        raw: bytes | memoryview
        if isinstance(value, Values):
            raw = pack_texts(value.texts())
            told[name] = {"dtype": "json", "shape": list(value.shape)}
        else:
            array = host_array(value)
            text = array.dtype.kind in "OUS"
            raw = pack_texts(array.reshape(-1)) if text else flat_bytes(array)
            told[name] = {"dtype": "string" if text else array.dtype.name, "shape": list(array.shape)}
        if len(raw) <= TRANSIENT_BYTES:
            told[name]["base64"] = base64.b64encode(raw).decode()
        else:
            told[name] |= {"transient_id": "", "offset": offset, "size_bytes": len(raw)}
            parts.append(raw)
            offset += len(raw)
    if parts:
        transient_id = resident.transients.put(parts)
        for tensor in told.values():
            if "transient_id" in tensor:
                tensor["transient_id"] = transient_id
    return told


def host_array(value: Any) -> Array:
    """An output's values on the host."""
    return value.numpy() if isinstance(value, Kept) else np.asarray(value)


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


def _raw(resident: Resident, tensor: dict[str, Any], size_bytes: int | None) -> Any:
    offset = tensor.get("offset", 0)
    if "transient_id" in tensor:
        return resident.transients.read(tensor["transient_id"], offset, size_bytes)
    return resident.blobs.read(tensor["blob_id"], offset, size_bytes)


def _texts(resident: Resident, tensor: dict[str, Any], what: str) -> Array:
    inline = tensor.get("base64")
    raw = base64.b64decode(inline) if inline is not None else _raw(resident, tensor, tensor.get("size_bytes"))
    count = math.prod(tensor["shape"])
    array = np.empty(count, dtype=object)
    array[:] = unpack_texts(raw, count, what)
    return array.reshape(tensor["shape"])
