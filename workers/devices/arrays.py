"""Arrays on the host, and the bytes and tensors that lie on a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from device_operations.tensors import numpy_dtype

if TYPE_CHECKING:
    from workers.devices.base import Device

#: An array of any dtype.
Array = np.ndarray[Any, np.dtype[Any]]

#: A backend's own array of uint8: a NumPy array on the CPU, a torch tensor elsewhere.
Storage: TypeAlias = Any

#: NumPy's name for each dtype that a tensor may have on any backend; what one backend takes is in its capabilities.
DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)  # fmt: skip


class Buffer:
    """Bytes on one device, made by `Device.allocate`; `storage` is the backend's own array of uint8."""

    __slots__ = ("device", "size_bytes", "storage")

    def __init__(self, device: Device, size_bytes: int, storage: Storage) -> None:
        self.device = device
        self.size_bytes = size_bytes
        self.storage = storage

    def __repr__(self) -> str:
        state = "released" if self.storage is None else f"{self.size_bytes} bytes"
        return f"<Buffer of {self.device}: {state}>"


@dataclass(frozen=True, slots=True)
class BufferView:
    """A tensor that lies in a buffer. A view that only says where an output goes may leave `dtype` and `shape` None."""

    buffer: Buffer
    offset: int = 0
    dtype: str | None = None
    shape: tuple[int, ...] | None = None

    @property
    def size_bytes(self) -> int:
        """The tensor's bytes; `dtype` and `shape` must be known."""
        assert self.dtype is not None
        assert self.shape is not None
        return numpy_dtype(self.dtype).itemsize * math.prod(self.shape)


def flat_bytes(array: Array) -> memoryview:
    """The array's bytes in row-major order; its own memory where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
