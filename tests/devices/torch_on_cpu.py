"""The code that the torch backends share, and I/O binding by address, driven on the CPU where there is no GPU.

To the conformance suite it is a backend of its own: buffers are torch tensors that the host is not let see, and ONNX
Runtime binds them by their addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workers.devices.base import DTYPES, Description, Provider, Reading
from workers.devices.cpu import CpuDevice
from workers.devices.torch_memory import TorchDevice

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

    def _allocate(self, size_bytes: int) -> torch.Tensor:
        if size_bytes > 1 << 40:
            raise MemoryError  # torch on the CPU takes any size that the kernel promises
        return super()._allocate(size_bytes)

    def _address(self, storage: Any) -> int:
        return int(storage.data_ptr())
