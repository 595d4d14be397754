"""Random arrays, and arrays in allocations, for the conformance suite."""

from __future__ import annotations

import numpy as np

from workers.devices import BufferView, Device

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def placed(device: Device, array: np.ndarray, offset: int = 0, room: int = 0) -> BufferView:
    """The array in an allocation of its own, `offset` bytes from the beginning and with `room` bytes behind it."""
    buffer = device.allocate(offset + array.nbytes + room)
    device.write(buffer, offset, np.ascontiguousarray(array).data.cast("B"))
    return BufferView(buffer, offset, array.dtype.name, array.shape)


def seen(device: Device, view: BufferView) -> np.ndarray:
    flat = device.read(view.buffer, view.offset, view.size_bytes)
    return np.frombuffer(flat, view.dtype).reshape(view.shape)
