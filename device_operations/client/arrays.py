"""NumPy arrays as tensors on the wire, and tensors that came back as arrays. NumPy is imported when the first is made.

Up to 64 KiB an array rides in the request as base64; above that it is uploaded, and the request names the blob.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias, cast

from device_operations.client import blobs
from device_operations.client.transport.calls import Flow, at
from device_operations.errors import failure
from device_operations.tensors import (
    FIXED_DTYPES,
    INLINE_BYTES,
    TEXT_DTYPES,
    Tensor,
    decode,
    encode,
    from_bytes,
    from_numbers,
)
from device_operations.wire.json_text import loads
from device_operations.wire.json_types import FreeJson
from device_operations.wire.texts import unpack_texts

if TYPE_CHECKING:
    from device_operations.tensors import Array

#: What a method takes as a tensor: an array, or the tensor in its form on the wire (`device_operations.tensors`).
TensorLike: TypeAlias = "Array | Tensor | Mapping[str, object]"

#: What a job gave back: an array; where it was left on the device; JSON values; None for an optional output left out.
Received: TypeAlias = "Array | dict[str, object] | list[dict[str, object]] | None"


def sent(value: TensorLike, name: str) -> Flow[dict[str, object]]:
    """The wire form of a tensor; a big array is uploaded first."""
    if isinstance(value, Tensor):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return dict(value)
    array = _array(value, name)
    if array.dtype == object or array.nbytes <= INLINE_BYTES:
        return encode(array, "base64")
    blob = yield from blobs.upload(raw_bytes(array))
    return {"dtype": array.dtype.name, "shape": list(array.shape), "blob_id": blob.blob_id}


def all_sent(values: Mapping[str, TensorLike]) -> Flow[dict[str, dict[str, object]]]:
    """The wire forms of named tensors."""
    made = {}
    for name, value in values.items():
        made[name] = yield from sent(value, name)
    return made


def received(tensor: FreeJson | None, name: str) -> Flow[Received]:
    """The array of a tensor that a job gave back, downloaded where it is a blob.

    What stayed on the device (`into`) is given as the object that says where, which is a tensor for the next run. What
    is no tensor (dtype `json`) is a list of JSON values; an optional output without a value is None.
    """
    if tensor is None:
        return None
    if tensor.get("allocation_id") is not None:
        return dict(tensor)
    if tensor.get("blob_id") is not None:
        raw = yield from blobs.read(at("/api/blobs/{}", tensor["blob_id"]))
        if tensor["dtype"] in TEXT_DTYPES:
            return _from_texts(unpack_texts(raw, math.prod(tensor["shape"]), name), tensor)
        return from_bytes(raw, tensor["dtype"], tensor["shape"], name)
    if tensor["dtype"] == "json":
        return list(tensor["data"])
    known = {key: tensor[key] for key in ("dtype", "shape", "data", "base64") if key in tensor}
    return decode(Tensor.model_validate(known), name)


def _from_texts(texts: list[str], tensor: FreeJson) -> Received:
    if tensor["dtype"] == "json":
        return [loads(text, anywhere=True) for text in texts]
    return from_numbers(texts, "string", list(tensor["shape"]))


def raw_bytes(array: Array) -> memoryview:
    """The elements as little-endian, row-major bytes; not copied where they lie so already."""
    import numpy as np

    ordered = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return ordered.reshape(-1).view(np.uint8).data


def received_array(tensor: FreeJson, name: str) -> Flow[Array]:
    """The array of a tensor that is neither left on the device nor one of JSON values."""
    return cast("Array", (yield from received(tensor, name)))


def _array(value: object, name: str) -> Array:
    import numpy as np

    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        return array.astype(object)
    if array.dtype.name not in FIXED_DTYPES:
        known = ", ".join(FIXED_DTYPES)
        raise failure("dtype_unsupported", f"{name}: dtype {array.dtype} has no form here; use one of {known}")
    return array
