"""Tensors between requests and the device: what a request names becomes a feed, what a run gives becomes JSON."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping

import numpy as np

from device_operations.errors import failure
from device_operations.tensors import INLINE_BYTES, encode, from_bytes, from_numbers, to_bytes
from device_operations.wire.json_types import JsonObject
from device_operations.wire.texts import pack_texts, unpack_texts
from tasks.blobs import records as blob_store
from tasks.blobs.transients import TRANSIENT_BYTES
from workers.devices.arrays import Array, BufferView, flat_bytes
from workers.devices.onnx.runtime import Kept
from workers.devices.onnx.values import Values
from workers.resident.residents import Resident
from workers.stored_tensors import InAllocation, InBase64, InBlob, Inline, InTransient, StoredTensor, decode_tensor


def feed(resident: Resident, name: str, tensor: StoredTensor) -> Array | BufferView:
    """The array or buffer that a request's tensor names. Arrays over blobs and base64 are read-only."""
    place, what = tensor.place, f"input {name!r}"
    match place:
        case InAllocation():
            if place.is_on(resident.device_id):
                return view(resident, place.allocation_id, place.offset, tensor.dtype, tuple(tensor.shape))
            return from_bytes(_fetched(resident, place, tensor.size_bytes), tensor.dtype, tensor.shape, what)
        case Inline(data):
            return from_numbers(data, tensor.dtype, tensor.shape, what)
    if tensor.is_text:
        return _texts(resident, tensor, place, what)
    return from_bytes(_raw(resident, place, tensor.size_bytes), tensor.dtype, tensor.shape, what)


def read_feeds(resident: Resident, stored: Mapping[str, Mapping[str, object]]) -> dict[str, Array | BufferView]:
    """The arrays or buffers of a request's tensors, by name."""
    return {name: feed(resident, name, decode_tensor(tensor)) for name, tensor in stored.items()}


def _fetched(resident: Resident, place: InAllocation, size_bytes: int) -> bytearray:
    """A tensor's bytes from another device's allocation."""
    assert resident.transfers is not None
    assert place.device_id is not None
    return resident.transfers.fetch_now(place.device_id, place.allocation_id, place.offset, size_bytes)


def _raw(
    resident: Resident, place: InBase64 | InBlob | InTransient, size_bytes: int | None
) -> bytes | bytearray | memoryview:
    match place:
        case InBase64(text):  # checked when it was submitted
            return base64.b64decode(text)
        case InTransient(transient_id, offset):
            raw: bytes | memoryview = resident.transients.read(transient_id, offset, size_bytes)
            return raw
        case InBlob(blob_id, offset):
            stored: bytes | memoryview = resident.blobs.read(blob_id, offset, size_bytes)
            return stored


def _texts(resident: Resident, tensor: StoredTensor, place: InBase64 | InBlob | InTransient, what: str) -> Array:
    raw = _raw(resident, place, None if isinstance(place, InBase64) else place.size_bytes)
    array = np.empty(tensor.count, dtype=object)
    array[:] = unpack_texts(raw, tensor.count, what)
    return array.reshape(tensor.shape)


def staged_bytes(tensors: Iterable[StoredTensor]) -> int:
    """The bytes of a request's tensors that lie in another device's memory."""
    return sum(one.size_bytes for one in tensors if isinstance(one.place, InAllocation) and one.place.device_id)


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


def give(resident: Resident, value: object, form: str, owner: str) -> JsonObject | None:
    """The wire form of an output: `data` up to 64 KiB, else a blob, unless `form` says otherwise.

    Text is given as `data`; above 64 KiB as a blob too, each string behind its length (`device_operations.wire.texts`).
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


def hand_over(resident: Resident, values: Mapping[str, object]) -> dict[str, JsonObject]:
    """Outputs for a request that waits: small ones in the result itself, the others in one transient file.

    Of what is no tensor, the JSON texts; an optional output without a value is left out.
    """
    given: dict[str, JsonObject] = {}
    parts: list[bytes | memoryview] = []
    offset = 0
    for name, value in values.items():
        if value is None:
            continue
        raw: bytes | memoryview
        if isinstance(value, Values):
            raw = pack_texts(value.texts())
            given[name] = {"dtype": "json", "shape": list(value.shape)}
        else:
            array = host_array(value)
            text = array.dtype.kind in "OUS"
            raw = pack_texts(array.reshape(-1)) if text else flat_bytes(array)
            given[name] = {"dtype": "string" if text else array.dtype.name, "shape": list(array.shape)}
        if len(raw) <= TRANSIENT_BYTES:
            given[name]["base64"] = base64.b64encode(raw).decode()
        else:
            given[name] |= {"transient_id": "", "offset": offset, "size_bytes": len(raw)}
            parts.append(raw)
            offset += len(raw)
    if parts:
        transient_id = resident.transients.put(parts)
        for tensor in given.values():
            if "transient_id" in tensor:
                tensor["transient_id"] = transient_id
    return given


def host_array(value: object) -> Array:
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
