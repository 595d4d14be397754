"""Device memory out of torch's own allocator: what the cuda and directml backends have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from workers.devices.arrays import Array, Storage
from workers.devices.base import Device

if TYPE_CHECKING:
    import torch

#: A move within one buffer goes block by block, so that it needs no more than this beyond the buffer.
_MOVE_BYTES = 64 << 20


class TorchDevice(Device):
    """A device whose buffers are torch tensors of uint8."""

    @abstractmethod
    def torch_device(self) -> torch.device:
        """The torch device of this device; loads torch."""

    def _allocate(self, size_bytes: int) -> torch.Tensor:
        import torch

        return torch.zeros(size_bytes, dtype=torch.uint8, device=self.torch_device())

    def _fill(self, storage: torch.Tensor, value: int, offset: int, size_bytes: int) -> None:
        storage[offset : offset + size_bytes].fill_(value)

    def _copy(
        self, to: torch.Tensor, to_offset: int, source: torch.Tensor, source_offset: int, size_bytes: int
    ) -> None:
        shift = to_offset - source_offset
        if to is not source or abs(shift) >= size_bytes:
            to[to_offset : to_offset + size_bytes].copy_(source[source_offset : source_offset + size_bytes])
            return
        starts = range(0, size_bytes, _MOVE_BYTES)
        for start in reversed(starts) if shift > 0 else starts:
            size = min(_MOVE_BYTES, size_bytes - start)
            block = source[source_offset + start : source_offset + start + size].clone()
            to[to_offset + start : to_offset + start + size].copy_(block)

    def _write(self, storage: torch.Tensor, offset: int, data: memoryview) -> None:
        storage[offset : offset + len(data)].copy_(host_tensor(data))

    def _read(self, storage: torch.Tensor, offset: int, into: memoryview) -> None:
        host_tensor(into).copy_(storage[offset : offset + len(into)])

    def _as_tensor(self, storage: Storage) -> torch.Tensor:
        tensor: torch.Tensor = storage
        return tensor


class _Writable:
    """Read-only bytes under the name of writable ones: torch warns of them, and here it only reads what it is given."""

    def __init__(self, array: Array) -> None:
        self._keeps_alive = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def host_tensor(data: memoryview) -> torch.Tensor:
    """The host's bytes as a torch tensor of uint8 that shares their memory."""
    import torch

    array = np.frombuffer(data, np.uint8)
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))
