"""Which devices this machine has, asked without loading torch or ONNX Runtime wherever the system itself lists them."""

from __future__ import annotations

import importlib
import logging
from dataclasses import asdict, dataclass

from device_operations.wire.json_types import JsonObject

_log = logging.getLogger(__name__)

#: Each backend's file and class, in the order of preference where several can drive one machine.
BACKENDS = {
    "cuda": ("workers.devices.cuda", "CudaDevice"),
    "directml": ("workers.devices.directml", "DirectMLDevice"),
    "cpu": ("workers.devices.cpu", "CpuDevice"),
}


@dataclass(frozen=True, slots=True)
class Found:
    """One device that a worker could be started for, as `open_device(backend, ordinal)` takes it."""

    backend: str
    ordinal: int
    name: str
    vendor: str | None = None
    driver: str | None = None
    total_bytes: int | None = None

    def as_json(self) -> JsonObject:
        return asdict(self)


def enumerate_devices() -> list[Found]:
    """Every device here, graphics devices first, the CPU always last. A backend that cannot be asked is logged."""
    found: list[Found] = []
    for backend, (module, _) in BACKENDS.items():
        try:
            found += importlib.import_module(module).found()
        except Exception as error:  # noqa: BLE001 - one broken driver must not hide the other devices
            _log.warning("the %s backend could not be asked for its devices: %s", backend, error)
    return found
