"""A model's inputs and outputs on their way between the host and a GPU: pinned memory, on the stream of the run itself.

Inputs go to one place on the GPU each, kept and grown as batches need it. Outputs come into pinned memory of torch's
own cache: a block goes back there when the last array over it is gone, so that results may be written down while the
next run is on the GPU. What is enqueued here and by ONNX Runtime runs in order, without the host between the input's
transfer and the graph.

The copies are the driver's own calls. Between two batches a processor's caches have long held something else, and
torch's way to the same call (a stream to enter, tensors over both ends, a look-up of the pinned block) was seen to keep
the GPU waiting for a fifth of the graph's time; and it lets the interpreter go, which another thread may then hold.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workers.devices.arrays import Array
from workers.devices.onnx.tensors import RuntimeValue
from workers.devices.transfers import TensorTransfers

if TYPE_CHECKING:
    from torch.cuda import Event, Stream

#: An output of more bytes than this comes into plain memory: what was pinned once stays pinned with the process.
_LARGEST_PINNED_BYTES = 64 << 20

#: A transfer of more bytes than this lets other threads run meanwhile: from memory that is not pinned it takes as long
#: as a copy on the host.
_LARGEST_HELD_BYTES = 16 << 20


class PinnedTransfers(TensorTransfers):
    """The transfers of one model on `device`, enqueued on `stream`."""

    def __init__(self, device: torch.device, stream: Stream) -> None:
        self._device = device
        self._stream = stream
        self._inputs: dict[str, torch.Tensor] = {}
        self._began, self._ended = _timer(), _timer()
        # Makes the context that torch and ONNX Runtime share, if it does not exist yet.
        torch.empty(1, device=device)
        self._driver = _CudaDriver(device.index or 0, stream.cuda_stream)

    def put(self, name: str, array: Array) -> int:
        size = array.nbytes
        place = self._inputs.get(name)
        if place is None or place.numel() < size:
            self._inputs.pop(name, None)
            with torch.cuda.stream(self._stream):
                place = self._inputs[name] = torch.empty(size, dtype=torch.uint8, device=self._device)
        address = place.data_ptr()
        self._driver.to_device(address, array.ctypes.data, size)
        return address

    def begin(self) -> None:
        self._began.record(self._stream)

    def end(self) -> None:
        self._ended.record(self._stream)

    def fetch(self, values: Sequence[tuple[RuntimeValue, str]]) -> list[Array]:
        arrays = [self._coming(value, np.dtype(dtype)) for value, dtype in values]
        self._stream.synchronize()
        return arrays

    def graph_ms(self) -> float:
        return float(self._began.elapsed_time(self._ended))

    def close(self) -> None:
        self._inputs.clear()

    def _coming(self, value: RuntimeValue, dtype: np.dtype[Any]) -> Array:
        shape = tuple(value.shape())
        size = dtype.itemsize * math.prod(shape)
        if not size:
            return np.empty(shape, dtype)
        host = torch.empty(size, dtype=torch.uint8, pin_memory=size <= _LARGEST_PINNED_BYTES)
        self._driver.to_host(host.data_ptr(), value.data_ptr(), size)
        array: Array = host.numpy().view(dtype).reshape(shape)
        return array


def pin(device: torch.device, memory: memoryview) -> Callable[[], None] | None:
    """Pins the host's memory where it lies; what lets it go again, or None where the system does not let it be."""
    driver = _CudaDriver(device.index or 0, 0)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    if not driver.register(address, memory.nbytes):
        return None
    return lambda: driver.unregister(address)


class CudaBytes:
    """Memory of the device that ONNX Runtime owns, for torch to see as bytes without a copy."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (size_bytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


class _CudaDriver:
    """Copies on one stream of one GPU, enqueued by CUDA's driver, and memory pinned for them.

    Each raises RuntimeError with the driver's words.
    """

    def __init__(self, ordinal: int, stream: int) -> None:
        self._stream = ctypes.c_void_p(stream)
        self._context = ctypes.c_void_p()
        device = ctypes.c_int()
        library = _library(held=False)
        _check(library.cuDeviceGet(ctypes.byref(device), ordinal))
        # Retained with torch's own: that of the process, which lives as long as it does.
        _check(library.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device))

    def to_device(self, address: int, host: int, size_bytes: int) -> None:
        """Enqueues a copy to the device. The host's bytes must stay until the stream has come by."""
        library = self._ready(size_bytes)
        _check(library.cuMemcpyHtoDAsync_v2(_pointer(address), _pointer(host), _size(size_bytes), self._stream))

    def to_host(self, host: int, address: int, size_bytes: int) -> None:
        """Enqueues a copy to the host, which is over when the stream has come by."""
        library = self._ready(size_bytes)
        _check(library.cuMemcpyDtoHAsync_v2(_pointer(host), _pointer(address), _size(size_bytes), self._stream))

    def register(self, host: int, size_bytes: int) -> bool:
        """Pins the host's bytes; whether that could be done."""
        library = self._ready(size_bytes)
        return bool(library.cuMemHostRegister_v2(_pointer(host), _size(size_bytes), _PORTABLE) == 0)

    def unregister(self, host: int) -> None:
        """Lets go what `register` pinned. Nothing is checked: a context that was lost has let go of it already."""
        library = _library(held=False)
        library.cuCtxSetCurrent(self._context)
        library.cuMemHostUnregister(_pointer(host))

    def _ready(self, size_bytes: int) -> Any:
        library = _library(held=size_bytes <= _LARGEST_HELD_BYTES)
        # Each thread has a current context of its own, and begins with none.
        _check(library.cuCtxSetCurrent(self._context))
        return library


_pointer, _size = ctypes.c_void_p, ctypes.c_size_t

#: CU_MEMHOSTREGISTER_PORTABLE of cuda.h: pinned for every context of the process.
_PORTABLE = 1


@cache
def _library(*, held: bool) -> Any:
    """The driver's library; `held` says that its calls keep the interpreter."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    return ctypes.PyDLL(name) if held else ctypes.CDLL(name)


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        known = _library(held=True).cuGetErrorString(status, ctypes.byref(text)) == 0 and text.value
        raise RuntimeError(f"CUDA error {status}: {known.decode() if known else 'unknown to the driver'}")


def _timer() -> Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
