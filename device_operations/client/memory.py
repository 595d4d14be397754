"""Device memory over HTTP: allocations, their bytes, and what the devices have left."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

from device_operations.client import arrays, blobs
from device_operations.client.blobs import Body, Source
from device_operations.client.submission import (
    MAX_WAIT_SECONDS,
    Submission,
    said,
    submission,
    submission_of_bytes,
    succeeded,
)
from device_operations.client.transport.calls import Call, Emit, Flow, at, get, json_of, send
from device_operations.client.transport.operations import Mode, Noun, emits, operation
from device_operations.jobs import Job, Kind
from device_operations.tensors import from_bytes
from device_operations.views import AllocationView, DeviceMemoryView
from device_operations.wire.json_types import FreeJson

if TYPE_CHECKING:
    from device_operations.tensors import Array


class Memory(Noun[Mode]):
    """The methods on allocations. Sizes and offsets are bytes."""

    @operation
    def allocate(
        self,
        size_bytes: int | None = None,
        *,
        shape: list[int] | tuple[int, ...] | None = None,
        dtype: str | None = None,
        device_id: str | None = None,
        fill: int = 0,
        label: str | None = None,
        ttl_seconds: float | None = None,
        allocation_id: str | None = None,
        **given: Unpack[Submission],
    ) -> Flow[Job]:
        """Allocates `size_bytes`, or a `shape` of `dtype`. The allocation's id is the job's `resource.id`, at once."""
        fields = said(
            size_bytes=size_bytes,
            shape=None if shape is None else list(shape),
            dtype=dtype,
            device_id=device_id,
            fill=fill or None,
            label=label,
            ttl_seconds=ttl_seconds,
            allocation_id=allocation_id,
        )
        return (yield from submission(Kind.MEMORY_ALLOCATE, fields, given))

    @operation
    def deallocate(self, allocation_id: str, **given: Unpack[Submission]) -> Flow[Job]:
        """Frees an allocation, after the jobs that were submitted on it before."""
        return (yield from submission(Kind.MEMORY_DEALLOCATE, {"allocation_id": allocation_id}, given))

    @operation
    def copy(
        self,
        source: str | Mapping[str, object],
        destination: str | Mapping[str, object],
        size_bytes: int | None = None,
        **given: Unpack[Submission],
    ) -> Flow[Job]:
        """Copies between allocations, given as ids or as `{"allocation_id", "offset"}`; across devices too."""
        fields = said(source=_place(source), destination=_place(destination), size_bytes=size_bytes)
        return (yield from submission(Kind.MEMORY_COPY, fields, given))

    @operation
    def clear(
        self,
        allocation_id: str,
        value: int = 0,
        *,
        offset: int = 0,
        size_bytes: int | None = None,
        **given: Unpack[Submission],
    ) -> Flow[Job]:
        """Sets a range to one byte value (0 to 255)."""
        fields = said(allocation_id=allocation_id, value=value, offset=offset, size_bytes=size_bytes)
        return (yield from submission(Kind.MEMORY_CLEAR, fields, given))

    @operation
    def write(
        self,
        allocation_id: str,
        data: Source | Array,
        *,
        offset: int = 0,
        **given: Unpack[Submission],
    ) -> Flow[Job]:
        """Writes bytes, a file, or an array's elements into an allocation."""
        source = arrays.raw_bytes(cast("Array", data)) if hasattr(data, "__array__") else data
        if "job" not in given:
            return (yield from submission_of_bytes(_data(allocation_id), {"offset": offset}, Body(source), given))
        blob = yield from blobs.upload(source)
        fields = {"allocation_id": allocation_id, "offset": offset, "blob_id": blob.blob_id, "sha256": blob.sha256}
        return (yield from submission(Kind.MEMORY_WRITE, fields, given))

    @operation
    def read(self, allocation_id: str, *, offset: int = 0, size_bytes: int | None = None) -> Flow[bytes]:
        """The bytes of a range, as the jobs submitted before leave it."""
        return (yield from _read(allocation_id, offset, size_bytes))

    @operation
    def read_array(
        self, allocation_id: str, dtype: str, shape: list[int] | tuple[int, ...], *, offset: int = 0
    ) -> Flow[Array]:
        """The elements that lie in an allocation, as a read-only array."""
        import numpy as np

        size = math.prod(shape) * np.dtype(dtype).itemsize
        raw = (yield from _read(allocation_id, offset, size)) if size else b""
        return from_bytes(raw, dtype, list(shape), allocation_id)

    @operation
    def download(self, allocation_id: str, path: str | os.PathLike[str]) -> Flow[Path]:
        """Writes a whole allocation to a file, which is there only once it is whole."""
        job = yield from submission(Kind.MEMORY_READ, {"allocation_id": allocation_id}, {})
        result = yield from succeeded(job, None)
        target = yield from blobs.download(at("/api/blobs/{}", result["blob_id"]), Path(path))
        yield from send(Call("DELETE", at("/api/blobs/{}", result["blob_id"])))
        return target

    @operation
    def renew(self, allocation_id: str, ttl_seconds: float) -> Flow[AllocationView]:
        """Gives an allocation a new time to live, counted from now."""
        response = yield from send(
            Call("POST", at("/api/memory/renew/{}", allocation_id), json={"ttl_seconds": ttl_seconds})
        )
        return cast("AllocationView", json_of(response))

    @operation
    def allocation(self, allocation_id: str) -> Flow[AllocationView]:
        """One allocation."""
        return cast("AllocationView", (yield from get(at("/api/memory/allocations/{}", allocation_id))))

    @emits(AllocationView)
    def allocations(
        self,
        *,
        device_id: str | None = None,
        owner: str | None = None,
        state: str | None = None,
        label: str | None = None,
    ) -> Flow[None]:
        """Allocations newest first, read page by page."""
        cursor = None
        while True:
            page = yield from get(
                "/api/memory/allocations", device_id=device_id, owner=owner, state=state, label=label, cursor=cursor
            )
            for allocation in page["allocations"]:
                yield Emit(allocation)
            cursor = page["next_cursor"]
            if cursor is None:
                return

    @operation
    def status(self) -> Flow[list[DeviceMemoryView]]:
        """The memory of each device; a figure that its backend cannot measure is None."""
        answer = yield from get("/api/memory/status")
        devices: list[DeviceMemoryView] = answer["devices"]
        return devices

    @operation
    def device(self, device_id: str, *, map: bool = False) -> Flow[DeviceMemoryView]:  # noqa: A002 - the API's name
        """The memory of one device, and with `map` what lies on it."""
        path = at("/api/memory/device/{}", device_id)
        return cast("DeviceMemoryView", (yield from get(path, map=map or None)))


def _read(allocation_id: str, offset: int, size_bytes: int | None) -> Flow[bytes]:
    """In one request where the device gets to it within a minute, else by the job's blob."""
    response = yield from send(
        Call("GET", _data(allocation_id), {"offset": offset, "size_bytes": size_bytes}, waits_seconds=MAX_WAIT_SECONDS)
    )
    if response.status_code == 202:
        result = yield from succeeded(Job.model_validate_json(response.content), None)
        return (yield from blobs.read(at("/api/blobs/{}", result["blob_id"])))
    return blobs.checked(response)


def _data(allocation_id: str) -> str:
    return at("/api/memory/data/{}", allocation_id)


def _place(given: str | Mapping[str, object]) -> FreeJson:
    return {"allocation_id": given} if isinstance(given, str) else dict(given)
