"""The cpu backend: NumPy's memory, ONNX Runtime's CPU provider, torch on the CPU. Runs without torch installed."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from device_operations.errors import failure
from workers.devices.adapters.inventory import Found
from workers.devices.arrays import DTYPES, Array, Storage
from workers.devices.base import Device
from workers.devices.libraries import installed
from workers.devices.values import Description, Provider, Reading

if TYPE_CHECKING:
    import torch

#: glibc may keep freed blocks of this size: smaller ones are not worth a system call, larger ones are mappings of their
#: own (its threshold moves up to 32 MiB), which go back by themselves.
_TRIM_BYTES = range(1 << 20, 33 << 20)


class CpuDevice(Device):
    """The host's processors as one device; `ordinal` only distinguishes workers on one machine."""

    backend = "cpu"
    host_memory = True
    out_of_memory_texts = (
        r"bad[_ ]alloc",
        r"can't allocate memory",
        r"Failed to allocate memory",
        r"not enough memory",
    )

    def describe(self) -> Description:
        torch_here = installed("torch")
        return Description(
            backend=self.backend,
            ordinal=self.ordinal,
            name=self._processor[0],
            vendor=self._processor[1],
            driver=f"{platform.system()} {platform.release()}",
            total_bytes=_limits()[0],
            capabilities={
                "dtypes": list(DTYPES),
                "zero_copy": True,
                "inference": installed("onnxruntime"),
                "training": torch_here,
                "foreach": True,
                "returns_memory": True,
            },
            providers=("CPUExecutionProvider",) if installed("onnxruntime") else (),
        )

    def memory(self) -> Reading:
        total, free = _limits()
        return Reading(
            total_bytes=total,
            free_bytes=free,
            used_bytes=total - free,
            process_bytes=self.held_bytes(),
        )

    def held_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    def provider(self) -> Provider:
        return Provider("CPUExecutionProvider", binding="cpu")

    def _allocate(self, size_bytes: int) -> Array:
        free = _limits()[1]
        if size_bytes > free:
            # Linux promises memory that it does not have, and then kills the process that touches it.
            raise failure(
                "out_of_memory",
                f"{self} has {free} bytes free, and {size_bytes} were asked. Free allocations or unload models.",
                detail={"size_bytes": size_bytes, "free_bytes": free, "allocated_bytes": self.allocated_bytes},
            )
        storage = np.empty(size_bytes, np.uint8)
        storage.fill(0)  # touches every page, so that what is allocated is held and later copies run at full speed
        return storage

    def _fill(self, storage: Array, value: int, offset: int, size_bytes: int) -> None:
        storage[offset : offset + size_bytes].fill(value)

    def _copy(self, to: Array, to_offset: int, source: Array, source_offset: int, size_bytes: int) -> None:
        # ctypes.memmove is the C function itself: overlap in both directions, and the GIL is released.
        ctypes.memmove(to.ctypes.data + to_offset, source.ctypes.data + source_offset, size_bytes)

    def _write(self, storage: Array, offset: int, data: memoryview) -> None:
        np.copyto(storage[offset : offset + len(data)], np.frombuffer(data, np.uint8))

    def _read(self, storage: Array, offset: int, into: memoryview) -> None:
        np.copyto(np.frombuffer(into, np.uint8), storage[offset : offset + len(into)])

    def _as_tensor(self, storage: Array) -> torch.Tensor:
        import torch

        return torch.from_numpy(storage)

    def _address(self, storage: Storage) -> int:
        return int(storage.ctypes.data)

    def trim(self) -> None:
        """Asks the C library to hand freed pages back to the system (glibc keeps small ones otherwise)."""
        if sys.platform.startswith("linux"):
            trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim_heap is not None:
                trim_heap(0)

    def _released(self, freed_bytes: int) -> None:
        if freed_bytes in _TRIM_BYTES:
            self.trim()

    @cached_property
    def _process(self) -> psutil.Process:
        return psutil.Process()

    @cached_property
    def _processor(self) -> tuple[str, str | None]:
        """The processor's name and maker, from the system that knows them."""
        name, maker = platform.processor() or platform.machine(), None
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.is_file():
            said = dict(_split(line) for line in cpuinfo.read_text("utf-8", "replace").splitlines()[:40] if ":" in line)
            name, maker = said.get("model name", name), said.get("vendor_id")
        elif os.name == "nt":
            maker = name.rsplit(", ", 1)[-1] if ", " in name else None
        return name, {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}.get(maker or "", maker)


def found() -> list[Found]:
    """The CPU as one device. How many workers share it is the operator's to say (`DEVICES=cpu:2`)."""
    about = CpuDevice().describe()
    return [Found("cpu", 0, about.name, about.vendor, about.driver, about.total_bytes)]


def _limits() -> tuple[int, int]:
    """Total and free bytes of the machine, or of the container (cgroup 2 or 1) where that has less."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for folder, limit_name, used_name, cache_name in _CGROUPS:
        limit = _number(folder / limit_name)
        if limit is None or limit >= machine.total:
            continue
        used = (_number(folder / used_name) or 0) - _cache(folder / "memory.stat", cache_name)
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _number(path: Path) -> int | None:
    """The whole number in a file; None where the file is missing or says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cache(path: Path, name: str) -> int:
    """Bytes of page cache that the kernel gives up before it refuses an allocation."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name + " ")), 0)


def _split(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()
