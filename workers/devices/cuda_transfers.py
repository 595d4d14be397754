"""A model's inputs and outputs on their way between the host and a GPU: pinned memory, on the stream of the run itself.

Inputs go to one place on the GPU each, kept and grown as batches need it. Outputs come into pinned memory of torch's
own cache: a block goes back there when the last array over it is gone, so that results may be written down while the
next run is on the GPU. What is enqueued here and by ONNX Runtime runs in order, without the host between the input's
transfer and the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workers.devices.base import Array, flat_bytes
from workers.devices.torch_memory import host_tensor
from workers.devices.transfers import Transfers

if TYPE_CHECKING:
    from torch.cuda import Event, Stream

#: An output of more bytes than this comes into plain memory: what was pinned once stays pinned with the process.
_LARGEST_PINNED_BYTES = 64 << 20


class PinnedTransfers(Transfers):
    """The transfers of one model on `device`, enqueued on `stream`."""

    def __init__(self, device: torch.device, stream: Stream) -> None:
        self._device = device
        self._stream = stream
        self._inputs: dict[str, torch.Tensor] = {}
        self._began, self._ended = _timer(), _timer()

    def put(self, name: str, array: Array) -> int:
        size = array.nbytes
        with torch.cuda.stream(self._stream):
            place = self._inputs.get(name)
            if place is None or place.numel() < size:
                self._inputs.pop(name, None)
                place = self._inputs[name] = torch.empty(size, dtype=torch.uint8, device=self._device)
            place[:size].copy_(host_tensor(flat_bytes(array)), non_blocking=True)
        return place.data_ptr()

    def begin(self) -> None:
        self._began.record(self._stream)

    def end(self) -> None:
        self._ended.record(self._stream)

    def fetch(self, values: Sequence[tuple[Any, str]]) -> list[Array]:
        with torch.cuda.stream(self._stream):
            arrays = [self._coming(value, np.dtype(dtype)) for value, dtype in values]
            self._stream.synchronize()
        return arrays

    def graph_ms(self) -> float:
        return float(self._began.elapsed_time(self._ended))

    def close(self) -> None:
        self._inputs.clear()

    def _coming(self, value: Any, dtype: np.dtype[Any]) -> Array:
        shape = tuple(value.shape())
        size = dtype.itemsize * math.prod(shape)
        if not size:
            return np.empty(shape, dtype)
        host = torch.empty(size, dtype=torch.uint8, pin_memory=size <= _LARGEST_PINNED_BYTES)
        host.copy_(torch.as_tensor(CudaBytes(value.data_ptr(), size), device=self._device), non_blocking=True)
        array: Array = host.numpy().view(dtype).reshape(shape)
        return array


class CudaBytes:
    """Memory of the device that ONNX Runtime owns, for torch to see as bytes without a copy."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (size_bytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


def _timer() -> Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
