"""NVIDIA's management library: which GPUs there are, their memory and how busy they are.

It asks the driver and makes no CUDA context, so that a worker that has not used its GPU yet holds nothing on it.
Nothing is cached but the library itself; every call returns None, or nothing, if the library cannot answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol, TypeVar

T = TypeVar("T")


class ComputeProcess(Protocol):
    """A process that computes on a GPU, as the library lists it."""

    pid: int
    #: None if the driver does not say.
    usedGpuMemory: int | None  # noqa: N815 - the library's name


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that CUDA may use: its place in CUDA's order, its place in NVML's, and what NVML says of it."""

    ordinal: int
    index: int
    uuid: str
    name: str
    driver: str | None
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """A GPU's memory over all processes, this process's share (None if it cannot be measured), and how busy it is."""

    total_bytes: int
    free_bytes: int
    used_bytes: int
    process_bytes: int | None
    busy_share: float | None


def gpus() -> list[Gpu]:
    """The GPUs in CUDA's order: those that CUDA_VISIBLE_DEVICES names, or all by their place on the bus."""
    nvml = _library()
    if nvml is None:
        return []
    handles = [_asked(nvml.nvmlDeviceGetHandleByIndex, index) for index in range(_asked(nvml.nvmlDeviceGetCount) or 0)]
    uuids = [_asked(nvml.nvmlDeviceGetUUID, handle) or "" for handle in handles]
    driver = _asked(nvml.nvmlSystemGetDriverVersion)
    found = []
    for ordinal, index in enumerate(visible(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids)):
        memory = _asked(nvml.nvmlDeviceGetMemoryInfo, handles[index])
        name = _asked(nvml.nvmlDeviceGetName, handles[index]) or "NVIDIA GPU"
        found.append(Gpu(ordinal, index, uuids[index], name, driver, None if memory is None else int(memory.total)))
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
    """The present memory and load of the GPU at this place in NVML's order."""
    nvml = _library()
    handle = None if nvml is None else _asked(nvml.nvmlDeviceGetHandleByIndex, index)
    if nvml is None or handle is None:
        return None
    memory = _asked(nvml.nvmlDeviceGetMemoryInfo, handle)
    if memory is None:
        return None
    rates = _asked(nvml.nvmlDeviceGetUtilizationRates, handle)
    return Usage(
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        used_bytes=int(memory.used),
        process_bytes=_own_bytes(_asked(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []),
        busy_share=None if rates is None else rates.gpu / 100,
    )


def _own_bytes(processes: list[ComputeProcess]) -> int | None:
    """This process's memory on the GPU; None in a container, whose process numbers the driver does not know."""
    own = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return own[0] if own else None


def _asked(ask: Callable[..., T], *given: object) -> T | None:
    """What a call of the library returns; None if it fails."""
    import pynvml

    try:
        return ask(*given)
    except pynvml.NVMLError:
        return None


@cache
def _library() -> ModuleType | None:
    """The library, initialised; None if there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    module: ModuleType = pynvml
    return module
