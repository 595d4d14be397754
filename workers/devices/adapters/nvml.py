"""NVIDIA's management library by ctypes: which GPUs there are, their memory and how busy they are.

It asks the driver and makes no CUDA context, so that a worker that has not used its GPU yet holds nothing on it.
Nothing is cached but the library itself; every call returns None, or nothing, where the library cannot tell.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_LIBRARIES = ("nvml.dll", r"C:\Program Files\NVIDIA Corporation\NVSMI\nvml.dll") if sys.platform == "win32" else (
    "libnvidia-ml.so.1",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that CUDA may use: its place in CUDA's order, its place in NVML's, and what it says of itself."""

    ordinal: int
    index: int
    uuid: str
    name: str
    driver: str | None
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """A GPU's memory over all processes, this process's share (None where it cannot be told), and how busy it is."""

    total_bytes: int
    free_bytes: int
    used_bytes: int
    process_bytes: int | None
    busy_share: float | None


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Utilization(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t of the calls whose names end in _v3."""

    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used_gpu_memory", ctypes.c_ulonglong),
        ("gpu_instance_id", ctypes.c_uint),
        ("compute_instance_id", ctypes.c_uint),
    ]


def gpus() -> list[Gpu]:
    """The GPUs in CUDA's order: those that CUDA_VISIBLE_DEVICES names, or all by their place on the bus."""
    library = _library()
    if library is None:
        return []
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    uuids = [_text(library.nvmlDeviceGetUUID, _handle(index)) or "" for index in range(count.value)]
    driver = _text(library.nvmlSystemGetDriverVersion)
    found = []
    for ordinal, index in enumerate(visible(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids)):
        handle = _handle(index)
        memory = _Memory()
        told = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
        name = _text(library.nvmlDeviceGetName, handle) or "NVIDIA GPU"
        found.append(Gpu(ordinal, index, uuids[index], name, driver, memory.total if told else None))
    return found


def visible(setting: str | None, uuids: list[str]) -> list[int]:
    """The places in NVML's order that CUDA shows under this CUDA_VISIBLE_DEVICES, in CUDA's own order.

    As CUDA reads it: numbers or beginnings of UUIDs, and everything from the first that names no GPU is ignored.
    """
    if setting is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit():
            places = [int(entry)] if int(entry) < len(uuids) else []
        else:
            places = [n for n, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
        if len(places) != 1 or places[0] in chosen:
            break
        chosen += places
    return chosen


def usage(index: int) -> Usage | None:
    """How the GPU at this place in NVML's order stands now."""
    library = _library()
    if library is None:
        return None
    handle, memory, utilization = _handle(index), _Memory(), _Utilization()
    if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    busy = library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(utilization)) == 0
    return Usage(
        total_bytes=memory.total,
        free_bytes=memory.free,
        used_bytes=memory.used,
        process_bytes=_own_bytes(handle),
        busy_share=utilization.gpu / 100 if busy else None,
    )


def _own_bytes(handle: ctypes.c_void_p) -> int | None:
    """This process's memory on the GPU; None in a container, whose process numbers the driver does not know."""
    ask = getattr(_library(), "nvmlDeviceGetComputeRunningProcesses_v3", None)
    if ask is None:
        return None
    count = ctypes.c_uint(256)
    processes = (_Process * 256)()
    if ask(handle, ctypes.byref(count), processes) != 0:
        return None
    own = [p.used_gpu_memory for p in processes[: count.value] if p.pid == os.getpid()]
    unknown = ctypes.c_ulonglong(-1).value  # NVML's own "not available"
    return own[0] if own and own[0] != unknown else None


@cache
def _library() -> Any:
    """The library, initialised; None where there is no NVIDIA driver."""
    for name in _LIBRARIES:
        if Path(name).is_absolute() and not Path(name).exists():
            continue
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if library.nvmlInit_v2() == 0:
            return library
    return None


def _handle(index: int) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    _library().nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
    return handle


def _text(ask: Any, *handle: ctypes.c_void_p) -> str | None:
    buffer = ctypes.create_string_buffer(96)
    return buffer.value.decode("utf-8", "replace") if ask(*handle, buffer, ctypes.c_uint(96)) == 0 else None
