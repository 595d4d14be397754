"""Requests on device memory, as `POST /api/jobs` and direct Celery callers send them."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from device_operations.requests.base import (
    MAX_BYTES,
    Identifier,
    JobRequest,
    Label,
    Name,
    Offset,
    Request,
    Sha256,
    Side,
    Size,
)
from device_operations.tensors import FIXED_DTYPES, Dtype


class Allocate(JobRequest):
    """`size_bytes`, or `shape` and `dtype`; every byte of it starts as `fill`."""

    chosen_id = "allocation_id"

    device_id: Name | None = None
    size_bytes: Size | None = None
    shape: list[Side] | None = Field(None, max_length=32)
    dtype: Dtype | None = None
    fill: int = Field(0, ge=0, le=255, strict=True)
    label: Label | None = None
    ttl_seconds: float | None = Field(None, gt=0, le=365 * 86400)
    allocation_id: Identifier | None = None

    @model_validator(mode="after")
    def _one_way_to_say_the_size(self) -> Allocate:
        if (self.size_bytes is None) == (self.shape is None or self.dtype is None):
            raise ValueError("give either size_bytes, or shape and dtype")
        if self.size_bytes is not None and (self.shape is not None or self.dtype is not None):
            raise ValueError("give either size_bytes, or shape and dtype, not both")
        if self.shape is not None and any(side <= 0 for side in self.shape):
            raise ValueError("every side of shape must be at least 1")
        if self.dtype is not None and self.dtype not in FIXED_DTYPES:
            raise ValueError(f"dtype {self.dtype!r} has no fixed size")
        if self.bytes_wanted > MAX_BYTES:
            raise ValueError("the size exceeds 2**63 - 1 bytes")
        return self

    @property
    def bytes_wanted(self) -> int:
        """The size in bytes, however it was said."""
        if self.size_bytes is not None:
            return self.size_bytes
        assert self.shape is not None
        assert self.dtype is not None
        return math.prod(self.shape) * FIXED_DTYPES[self.dtype]


class Deallocate(JobRequest):
    allocation_id: Identifier


class Place(Request):
    """A position in an allocation; `offset` in bytes."""

    allocation_id: Identifier
    offset: Offset = 0


class Copy(JobRequest):
    """Bytes from one allocation to another, across devices too; overlapping ranges behave as memmove."""

    source: Place
    destination: Place
    size_bytes: Size | None = None


class Clear(JobRequest):
    """Sets a range to one byte value."""

    allocation_id: Identifier
    value: int = Field(0, ge=0, le=255, strict=True)
    offset: Offset = 0
    size_bytes: Size | None = None


class Write(JobRequest):
    """Writes a blob's bytes into an allocation."""

    allocation_id: Identifier
    offset: Offset = 0
    blob_id: Identifier
    sha256: Sha256 | None = None

    def blob_ids(self) -> list[str]:
        return [self.blob_id]


class Read(JobRequest):
    """Reads a range of an allocation into a new blob, which is the job's result."""

    allocation_id: Identifier
    offset: Offset = 0
    size_bytes: Size | None = None


class Renew(Request):
    """Gives an allocation a new time to live, counted from now."""

    ttl_seconds: float = Field(gt=0, le=365 * 86400)


AllocationState = Literal["pending", "active", "freed", "failed", "lost"]
