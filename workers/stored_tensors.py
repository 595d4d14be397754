"""A tensor as a recorded request names it: its dtype, its shape, and the place where its elements are.

    StoredTensor ─ place ─┬─ Inline          in the request, as numbers or texts
                          ├─ InBase64        in the request, as bytes
                          ├─ InBlob          in the blob store
                          ├─ InTransient     in a file of the gateway that waits for the job
                          └─ InAllocation    in device memory, of this device or another

`decode_tensor` is the only reader of the JSON form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from device_operations.tensors import FIXED_DTYPES, TEXT_DTYPES


@dataclass(frozen=True, slots=True)
class Inline:
    """Elements in the request: nested lists of JSON values."""

    data: object


@dataclass(frozen=True, slots=True)
class InBase64:
    """Bytes in the request, as base64; of text, each element behind its length."""

    text: str


@dataclass(frozen=True, slots=True)
class InBlob:
    """Bytes of a blob from `offset` on; `size_bytes` is given for text alone, whose size its shape does not say."""

    blob_id: str
    offset: int = 0
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class InTransient:
    """The same in a transient file, which is deleted with the request."""

    transient_id: str
    offset: int = 0
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class InAllocation:
    """Bytes of an allocation from `offset` on; `device_id` is None if the planner knew it to be on the job's device."""

    allocation_id: str
    offset: int = 0
    device_id: str | None = None

    def is_on(self, device_id: str) -> bool:
        """Whether the allocation is on the device, which runs the job."""
        return self.device_id is None or self.device_id == device_id


Place: TypeAlias = Inline | InBase64 | InBlob | InTransient | InAllocation


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a recorded request."""

    dtype: str
    shape: list[int]
    place: Place

    @property
    def is_text(self) -> bool:
        """Whether its elements are strings or JSON texts, which have no fixed size."""
        return self.dtype in TEXT_DTYPES

    @property
    def count(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """The bytes of its elements, which must not be text."""
        return self.count * FIXED_DTYPES[self.dtype]


def decode_tensor(stored: Mapping[str, Any]) -> StoredTensor:
    """The tensor of a recorded request's JSON form."""
    return StoredTensor(stored["dtype"], stored["shape"], decode_place(stored))


def decode_place(stored: Mapping[str, Any]) -> Place:
    """Where the elements of a tensor, an output or a picture are."""
    if stored.get("allocation_id"):
        return InAllocation(stored["allocation_id"], stored.get("offset", 0), stored.get("device_id"))
    if stored.get("base64") is not None:
        return InBase64(stored["base64"])
    if "transient_id" in stored:
        return InTransient(stored["transient_id"], stored.get("offset", 0), stored.get("size_bytes"))
    if stored.get("blob_id"):
        return InBlob(stored["blob_id"], stored.get("offset", 0), stored.get("size_bytes"))
    return Inline(stored.get("data"))
