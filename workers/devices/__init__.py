"""The device layer: one interface, one file per backend, opened by name. Importing it loads no backend.

    base       Device, Buffer, BufferView, Description, Reading, SessionOptions
    onnx       LoadedGraph, Cancel: a loaded model, run with arrays or buffers
    inventory  which devices this machine has; `python -m workers.devices --json`

and a file for each backend.
"""

from __future__ import annotations

import importlib

from device_operations.errors import failure
from workers.devices.adapters.inventory import BACKENDS, Found, enumerate_devices
from workers.devices.arrays import Buffer, BufferView
from workers.devices.base import Device
from workers.devices.values import Description, Reading, SessionOptions


def open_device(backend: str, ordinal: int = 0) -> Device:
    """The device `ordinal` of `backend`, ready for use. Raises `device_unavailable` with what is missing here."""
    if backend not in BACKENDS:
        raise failure("device_unavailable", f"There is no backend {backend!r}; there are {', '.join(BACKENDS)}.")
    module, name = BACKENDS[backend]
    device: Device = getattr(importlib.import_module(module), name)(ordinal)
    return device


__all__ = [
    "BACKENDS", "Buffer", "BufferView", "Description", "Device", "Found", "Reading", "SessionOptions",
    "enumerate_devices", "open_device",
]  # fmt: skip
