"""The directml backend: any DirectX 12 adapter, through ONNX Runtime's DirectML provider and torch-directml.

What it has to live with, and why the code is as it is:

- Two runs at once on one adapter end in 887A0005 (device removed), also of two sessions: one lock per adapter.
- ONNX Runtime counts adapters in DXGI's order and torch in DXCore's: they are matched by name.
- torch-directml's tensors have neither a data pointer nor a view as another dtype: tensors pass through the host on
  their way to ONNX Runtime and to training, and there is no I/O binding.
- Memory is given out lazily and never given back while the process lives, and running out may end the process: what
  does not fit the budget of Windows is refused before torch is asked. Our own count of allocations is the truth.
- A bfloat16 tensor aborts the process: dtypes are checked before torch sees them.

On WSL there is torch-directml and no DirectML provider: there ONNX Runtime runs on the CPU, and the device says so.
"""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from device_operations.errors import OperationError, failure
from workers.devices.adapters import dxgi
from workers.devices.adapters.inventory import Found
from workers.devices.arrays import Buffer
from workers.devices.libraries import installed, tidy
from workers.devices.torch_memory import TorchDevice
from workers.devices.values import Description, Provider, Reading

if TYPE_CHECKING:
    import torch

#: The dtypes that torch-directml holds on every adapter; float64 needs hardware that few adapters have.
DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32")

#: DirectML counts a tensor's elements in 32 bits, and an allocation is one tensor of bytes.
LARGEST_ALLOCATION_BYTES = (1 << 32) - 1

#: torch-directml says once a process, and as a warning only, that it runs an operator on the CPU.
_FALLBACK = re.compile(r"operator '([\w:.]+)' is not currently supported on the DML backend")
_FALLEN_BACK: dict[str, None] = {}

#: One lock per adapter for the whole process, by ordinal.
_LOCKS: dict[int, threading.RLock] = {}


class DirectMLDevice(TorchDevice):
    """One adapter; `ordinal` counts the hardware adapters in DXGI's order (torch's own order on WSL)."""

    backend = "directml"
    out_of_memory_texts = (
        r"8007000E",
        r"Could not allocate tensor with \d+ bytes",
        r"DML allocator out of memory",
        r"Not enough memory resources",
    )
    device_lost_texts = (
        r"887A000[567]",  # DXGI_ERROR_DEVICE_REMOVED, _HUNG, _RESET
        r"887A0020",  # DXGI_ERROR_DRIVER_INTERNAL_ERROR
        r"device (was )?(removed|hung)",
        r"GPU (device instance|will not respond)",
    )

    def __init__(self, ordinal: int = 0) -> None:
        super().__init__(ordinal)
        self._adapter = _adapter(ordinal)
        self._lock = _LOCKS.setdefault(ordinal, threading.RLock())

    # ---- facts

    def describe(self) -> Description:
        inference = installed("onnxruntime")
        return Description(
            backend=self.backend,
            ordinal=self.ordinal,
            name=self._adapter.name,
            vendor=self._adapter.vendor,
            driver=self._adapter.driver,
            total_bytes=self._total_bytes,
            capabilities={
                "dtypes": list(DTYPES),
                "zero_copy": False,
                "inference": inference,
                "training": installed("torch_directml"),
                "foreach": False,
                "returns_memory": False,
                # ONNX Runtime 1.24 holds the interpreter while it makes a session: no other thread runs meanwhile.
                "load_holds_interpreter": True,
                "largest_allocation_bytes": LARGEST_ALLOCATION_BYTES,
                "luid": f"{self._adapter.luid & 0xFFFFFFFFFFFFFFFF:016x}",
            },
            providers=(self.provider().name,) if inference else (),
        )

    def memory(self) -> Reading:
        """Windows reports this process's budget and use, not what other processes use."""
        reported = dxgi.video_memory(self._adapter.index)
        if reported is None:
            return Reading(total_bytes=self._total_bytes)
        return Reading(
            total_bytes=self._total_bytes,
            free_bytes=max(0, reported.budget_bytes - reported.usage_bytes),
            process_bytes=reported.usage_bytes,
            budget_bytes=reported.budget_bytes,
        )

    def provider(self) -> Provider:
        if sys.platform != "win32":
            return Provider("CPUExecutionProvider", lock=self._lock)
        return Provider(
            "DmlExecutionProvider",
            options={"device_id": str(self._adapter.index)},
            memory_pattern=False,
            lock=self._lock,
        )

    def classify(self, error: BaseException) -> OperationError:
        text = str(error)
        if not isinstance(error, OperationError):
            if "887A0002" in text.upper():  # DXGI_ERROR_NOT_FOUND
                return failure(
                    "device_unavailable",
                    f"DirectX has no adapter {self._adapter.index} ({self._adapter.name}) any more: {tidy(error)}",
                )
            # E_FAIL comes from one operator; torch writes it without its number.
            if "80004005" in text or text.strip() == "Call failed.":
                return failure(
                    "run_failed",
                    f"DirectML or the graphics driver failed at an operator (80004005) on {self}: "
                    f"{tidy(error)}. A newer driver may help, or another device.",
                    detail={"hresult": "80004005"},
                )
        return super().classify(error)

    # ---- memory and tensors

    @property
    def cpu_fallback_operators(self) -> tuple[str, ...]:
        return tuple(_FALLEN_BACK)

    def torch_device(self) -> torch.device:
        return self._torch_device

    def tensor_view(self, buffer: Buffer, dtype: str, shape: Sequence[int], offset: int = 0) -> torch.Tensor:
        """A tensor on the device with the bytes' values: a copy, as torch-directml views no bytes as another dtype."""
        import torch

        if dtype not in DTYPES:
            raise failure("dtype_unsupported", f"{self} has no torch tensors of {dtype}; it has {', '.join(DTYPES)}.")
        kind = np.dtype(dtype)
        size_bytes = kind.itemsize * int(np.prod(shape, dtype=object))
        values = np.frombuffer(self.read(buffer, offset, size_bytes), kind).reshape(tuple(shape))
        return self._guard(lambda: torch.from_numpy(values).to(self.torch_device()), "make a tensor")

    def synchronize(self) -> None:
        """DirectML has no call for it: the queue is in order, so that reading a byte back waits for all before it."""
        if "_torch_device" in self.__dict__:
            import torch

            self._guard(lambda: torch.zeros(1, dtype=torch.uint8, device=self.torch_device()).cpu(), "synchronize")

    def _allocate(self, size_bytes: int) -> torch.Tensor:
        free = self.memory().free_bytes
        if size_bytes > LARGEST_ALLOCATION_BYTES or (free is not None and size_bytes > free):
            room = "what is free is unknown" if free is None else f"{free} bytes are free"
            raise failure(
                "out_of_memory",
                f"{self} cannot allocate {size_bytes} bytes: {room}, and one allocation has at most "
                f"{LARGEST_ALLOCATION_BYTES}. Free allocations, unload models, or allocate in parts.",
                detail={"size_bytes": size_bytes, "free_bytes": free, "allocated_bytes": self.allocated_bytes},
            )
        return super()._allocate(size_bytes)

    def _read(self, storage: torch.Tensor, offset: int, into: memoryview) -> None:
        # `cpu()` waits for the device; copying into a tensor of the host returns before the bytes are there.
        np.copyto(np.frombuffer(into, np.uint8), storage[offset : offset + len(into)].cpu().numpy())

    @cached_property
    def _torch_device(self) -> torch.device:
        if not installed("torch_directml"):
            raise failure(
                "device_unavailable",
                f"{self} needs torch-directml for memory and training; it can be had for Python up to 3.12: "
                "pip install torch-directml. Inference works without it.",
            )
        import torch_directml

        _note_fallbacks()
        device: torch.device = torch_directml.device(_torch_index(self._adapter, _torch_names(torch_directml)))
        return device

    @cached_property
    def _total_bytes(self) -> int | None:
        """An adapter's own memory; where it shares the processor's, what Windows lets a process have of that."""
        reported = dxgi.video_memory(self._adapter.index)
        return max(self._adapter.dedicated_bytes, reported.budget_bytes if reported else 0) or None


def found() -> list[Found]:
    """The hardware adapters, where a library that can drive them is installed."""
    if not (installed("torch_directml") or _has_provider()):
        return []
    devices = []
    for ordinal, adapter in enumerate(_hardware()):
        total = DirectMLDevice(ordinal).describe().total_bytes
        devices.append(Found("directml", ordinal, adapter.name, adapter.vendor, adapter.driver, total))
    return devices


def _adapter(ordinal: int) -> dxgi.Adapter:
    here = _hardware()
    if 0 <= ordinal < len(here):
        return here[ordinal]
    listed = ", ".join(f"{n}: {adapter.name}" for n, adapter in enumerate(here)) or "none"
    raise failure(
        "device_unavailable",
        f"There is no DirectX 12 adapter {ordinal} for DirectML here; adapters: {listed}. DirectML needs Windows with "
        "a graphics driver, or WSL with torch-directml.",
    )


def _hardware() -> list[dxgi.Adapter]:
    """The adapters that are not Windows' own software renderer, in DXGI's order; on WSL those that torch lists."""
    if sys.platform == "win32":
        return [adapter for adapter in dxgi.adapters() if not adapter.software]
    if not installed("torch_directml"):
        return []
    import torch_directml

    names = _torch_names(torch_directml)
    return [dxgi.Adapter(n, name, 0, None, None, 0, 0, False) for n, name in enumerate(names)]


def _torch_names(torch_directml: Any) -> list[str]:
    # Each name ends in a NUL, which PostgreSQL refuses.
    return [torch_directml.device_name(n).rstrip("\0 ") for n in range(torch_directml.device_count())]


def _torch_index(adapter: dxgi.Adapter, torch_names: Sequence[str]) -> int:
    """Where torch, which counts in DXCore's order, has the adapter: by name, and among equals by their order."""
    if sys.platform != "win32":
        return adapter.index
    equals = [other.index for other in _hardware() if other.name == adapter.name]
    places = [n for n, name in enumerate(torch_names) if name == adapter.name]
    rank = equals.index(adapter.index)
    if rank >= len(places):
        raise failure(
            "device_unavailable",
            f"torch-directml does not list {adapter.name}; it lists {', '.join(torch_names) or 'nothing'}.",
        )
    return places[rank]


@cache
def _note_fallbacks() -> None:
    """From now on keeps the names that torch-directml's warnings give; the warnings go where they went before."""
    shown = warnings.showwarning

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        found = _FALLBACK.search(str(message))
        if found:
            _FALLEN_BACK.setdefault(found[1])
        shown(message, *where, **more)

    warnings.showwarning = show


def _has_provider() -> bool:
    if not installed("onnxruntime"):
        return False
    import onnxruntime

    return "DmlExecutionProvider" in onnxruntime.get_available_providers()
