"""The code that the torch backends share, and I/O binding by address, driven on the CPU where there is no GPU.

To the conformance suite it is a backend of its own: buffers are torch tensors that the host is not let see, and ONNX
Runtime binds them by their addresses.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workers.devices.arrays import DTYPES, Array
from workers.devices.cpu import CpuDevice
from workers.devices.torch_memory import TorchDevice
from workers.devices.transfers import TensorTransfers
from workers.devices.values import Description, Provider, Reading

if TYPE_CHECKING:
    import torch


class TorchOnCpu(TorchDevice):
    backend = "torch"
    out_of_memory_texts = CpuDevice.out_of_memory_texts

    def describe(self) -> Description:
        capabilities = {
            "dtypes": list(DTYPES), "zero_copy": True, "inference": True, "training": True, "foreach": True,
            "returns_memory": False,
        }  # fmt: skip
        return Description(
            self.backend, 0, "torch on the CPU", capabilities=capabilities, providers=("CPUExecutionProvider",)
        )

    def memory(self) -> Reading:
        return CpuDevice().memory()

    def provider(self) -> Provider:
        return Provider("CPUExecutionProvider", binding="cpu")

    def torch_device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    def transfers(self) -> TensorTransfers:
        return CopiedTransfers()

    def _allocate(self, size_bytes: int) -> torch.Tensor:
        if size_bytes > 1 << 40:
            raise MemoryError  # torch on the CPU takes any size that the kernel promises
        return super()._allocate(size_bytes)

    def _address(self, storage: Any) -> int:
        return int(storage.data_ptr())


class CopiedTransfers(TensorTransfers):
    """Inputs and outputs copied to places of their own, as to and from a device that the host cannot address."""

    def __init__(self) -> None:
        self._inputs: dict[str, Array] = {}
        self._began = self._ended = 0.0

    def put(self, name: str, array: Array) -> int:
        self._inputs[name] = np.frombuffer(bytearray(array.tobytes()), np.uint8)
        return int(self._inputs[name].ctypes.data)

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self) -> None:
        self._ended = time.perf_counter()

    def fetch(self, values: Sequence[tuple[Any, str]]) -> list[Array]:
        arrays = []
        for value, dtype in values:
            array = np.empty(value.shape(), dtype)
            ctypes.memmove(array.ctypes.data, value.data_ptr(), array.itemsize * math.prod(array.shape))
            arrays.append(array)
        return arrays

    def graph_ms(self) -> float:
        return (self._ended - self._began) * 1e3

    def close(self) -> None:
        self._inputs.clear()
