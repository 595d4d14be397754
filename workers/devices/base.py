"""The device layer's one interface: the memory, the models and the facts of a single device, on any backend.

    open_device ─▶ Device ── allocate, fill, copy, write, read, release      bytes that outlive the call
                         ├── open_model ─▶ LoadedGraph                       inference, see onnx.py
                         ├── torch_device, tensor_view                       training
                         └── describe, memory, classify, synchronize         facts and errors

The public methods here check ranges, name errors and keep the count of what is allocated; a backend supplies the
primitives of the marked section, which may assume that their arguments are right. Nothing here knows of jobs, queues or
databases, and importing this module loads neither torch nor ONNX Runtime.
"""

from __future__ import annotations

import math
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from device_operations.errors import OperationError, failure
from workers.devices.arrays import DTYPES, Buffer, BufferView, Storage, flat_bytes
from workers.devices.libraries import tidy
from workers.devices.values import Description, Provider, Reading, SessionOptions

if TYPE_CHECKING:
    import torch

    from workers.devices.onnx.runtime import Cancel, LoadedGraph
    from workers.devices.onnx.tensors import Kept
    from workers.devices.transfers import TensorTransfers

T = TypeVar("T")

#: More bytes than this no library's size holds; what would come back is an error about its type.
MAX_BYTES = 2**63 - 1


class Device(ABC):
    """One accelerator, or the CPU. All calls may be made from any thread; the worker makes them from one.

    Raises `OperationError` only: `out_of_range`, `out_of_memory`, `allocation_not_found` (a buffer that was released),
    `dtype_unsupported`, `device_unavailable` (a library is missing), `device_lost`, `run_failed`, `internal_error`, and
    what `open_model` adds.
    """

    backend: ClassVar[str]
    #: True where a buffer's bytes can be addressed by the host, so that arrays and tensors share them.
    host_memory: ClassVar[bool] = False
    #: What the backend's libraries write when memory runs out, and when the device is gone for this process.
    out_of_memory_texts: ClassVar[tuple[str, ...]] = ()
    device_lost_texts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, ordinal: int = 0) -> None:
        self.ordinal = ordinal
        self._counting = threading.Lock()
        self._allocated_bytes = 0
        self._buffer_count = 0

    def __repr__(self) -> str:
        return f"{self.backend}:{self.ordinal}"

    # ---- memory

    @property
    def allocated_bytes(self) -> int:
        """The bytes of all buffers that are not yet released, by this process's own count."""
        return self._allocated_bytes

    @property
    def buffer_count(self) -> int:
        """How many buffers are not yet released."""
        return self._buffer_count

    def allocate(self, size_bytes: int) -> Buffer:
        """A new buffer of zeroed bytes. Raises `out_of_memory`, which names the device and what it has."""
        if size_bytes < 1:
            raise failure("out_of_range", f"An allocation has at least 1 byte; {size_bytes} was asked of {self}.")
        if size_bytes > MAX_BYTES:
            raise failure("out_of_memory", f"{self} cannot hold {size_bytes} bytes. {self._standing()}")
        storage = self._guard(lambda: self._allocate(size_bytes), f"allocate {size_bytes} bytes")
        with self._counting:
            self._allocated_bytes += size_bytes
            self._buffer_count += 1
        return Buffer(self, size_bytes, storage)

    def release(self, buffer: Buffer) -> None:
        """Gives the buffer's memory back; later use of the buffer raises `allocation_not_found`. Twice is no error."""
        self._own(buffer)
        with self._counting:
            if buffer.storage is None:
                return
            buffer.storage = None
            self._allocated_bytes -= buffer.size_bytes
            self._buffer_count -= 1
        self._guard(lambda: self._released(buffer.size_bytes), "give memory back")

    def fill(self, buffer: Buffer, value: int, offset: int = 0, size_bytes: int | None = None) -> None:
        """Sets every byte of the range to `value` (0 to 255)."""
        if not 0 <= value <= 255:
            raise failure("out_of_range", f"A buffer is filled with one byte, 0 to 255; {value} was asked.")
        size_bytes = self._range(buffer, offset, size_bytes, "fill")
        if size_bytes:
            self._guard(lambda: self._fill(buffer.storage, value, offset, size_bytes), f"fill {size_bytes} bytes")

    def copy(
        self, destination: Buffer, destination_offset: int, source: Buffer, source_offset: int, size_bytes: int
    ) -> None:
        """Copies between two buffers of this device, or within one: overlapping ranges behave as memmove."""
        self._range(source, source_offset, size_bytes, "copy from")
        self._range(destination, destination_offset, size_bytes, "copy to")
        if not size_bytes or (source is destination and source_offset == destination_offset):
            return
        self._guard(
            lambda: self._copy(destination.storage, destination_offset, source.storage, source_offset, size_bytes),
            f"copy {size_bytes} bytes",
        )

    def write(self, buffer: Buffer, offset: int, data: memoryview | bytes | bytearray) -> None:
        """Host to device. `data` is any contiguous bytes-like object; it may be reused as soon as this returns."""
        view = memoryview(data)
        flat = view if view.format == "B" and view.ndim == 1 else view.cast("B") if view.nbytes else memoryview(b"")
        self._range(buffer, offset, len(flat), "write")
        if len(flat):
            self._guard(lambda: self._write(buffer.storage, offset, flat), f"write {len(flat)} bytes")

    def read(
        self, buffer: Buffer, offset: int = 0, size_bytes: int | None = None, into: memoryview | None = None
    ) -> memoryview:
        """Device to host: a copy of the range, in `into` (writable bytes of that size) where one is given."""
        size_bytes = self._range(buffer, offset, size_bytes, "read")
        view = np.empty(size_bytes, np.uint8).data if into is None else into
        if view.ndim != 1 or view.format != "B":
            view = view.cast("B")
        if len(view) != size_bytes or view.readonly:
            raise failure("internal_error", f"read needs a writable view of {size_bytes} bytes, got {len(view)}.")
        if size_bytes:
            self._guard(lambda: self._read(buffer.storage, offset, view), f"read {size_bytes} bytes")
        return view

    def host_view(self, buffer: Buffer, offset: int = 0, size_bytes: int | None = None) -> memoryview | None:
        """The range itself as writable host bytes where the device's memory is the host's, else None."""
        size_bytes = self._range(buffer, offset, size_bytes, "view")
        return buffer.storage[offset : offset + size_bytes].data if self.host_memory else None

    # ---- models and tensors

    @property
    def cpu_fallback_operators(self) -> tuple[str, ...]:
        """torch's operators that this process has asked of the device and torch has run on the CPU instead."""
        return ()

    def open_model(
        self, source: Path | bytes, options: SessionOptions | None = None, cancel: Cancel | None = None
    ) -> LoadedGraph:
        """Loads an ONNX file, or the bytes of one. Raises `model_invalid`, `out_of_memory`, `device_unavailable`."""
        from workers.devices.onnx.runtime import LoadedGraph

        return LoadedGraph(self, source, options or SessionOptions(), cancel)

    def tensor_view(self, buffer: Buffer, dtype: str, shape: Sequence[int], offset: int = 0) -> torch.Tensor:
        """A torch tensor over the bytes where they lie; a copy only where `offset` is not aligned to the dtype."""
        import torch

        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype) or dtype not in self.describe().capabilities.get("dtypes", DTYPES):
            raise failure("dtype_unsupported", f"{self} has no torch tensors of {dtype}.")
        size_bytes = kind.itemsize * math.prod(shape)
        self._range(buffer, offset, size_bytes, "view")
        return self._guard(
            lambda: _viewed(self._as_tensor(buffer.storage)[offset : offset + size_bytes], kind, tuple(shape)),
            "view a tensor",
        )

    def address(self, view: BufferView) -> int | None:
        """Where the tensor begins, for ONNX Runtime's I/O binding; None where it cannot be bound."""
        self._range(view.buffer, view.offset, view.size_bytes, "bind")
        base = self._address(view.buffer.storage)
        return None if base is None else base + view.offset

    def tensor_of(self, kept: Kept) -> torch.Tensor:
        """An output that stayed on the device, as a torch tensor over the same bytes, which live as long as `kept`."""
        import torch

        return torch.from_numpy(kept.numpy())

    def take(self, view: BufferView, value: Any) -> None:
        """Copies an `onnxruntime.OrtValue` that lies on this device into a buffer."""
        self.write(view.buffer, view.offset, flat_bytes(value.numpy()))

    # ---- errors

    def classify(self, error: BaseException) -> OperationError:
        """What `error`, raised by a library that drives this device, means for a job."""
        if isinstance(error, OperationError):
            return error
        text = tidy(error)
        kind = type(error).__name__
        if _matches(self.device_lost_texts, text):
            return failure("device_lost", f"{self} was lost: {text}. Its worker restarts; submit the job again.")
        if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or _matches(self.out_of_memory_texts, text):
            return failure("out_of_memory", f"{self} ran out of memory: {text or kind}. {self._standing()}")
        if type(error).__module__.startswith("onnxruntime"):
            return failure("run_failed", f"ONNX Runtime failed on {self}: {text}")
        return failure("internal_error", f"{kind} on {self}: {text}", detail={"type": kind})

    # ---- what a backend supplies

    @abstractmethod
    def describe(self) -> Description:
        """What the device is."""

    @abstractmethod
    def memory(self) -> Reading:
        """How its memory stands now."""

    @abstractmethod
    def _allocate(self, size_bytes: int) -> Storage:
        """An array of zeroed uint8 from the backend's own allocator."""

    @abstractmethod
    def _fill(self, storage: Storage, value: int, offset: int, size_bytes: int) -> None: ...

    @abstractmethod
    def _copy(self, to: Storage, to_offset: int, source: Storage, source_offset: int, size_bytes: int) -> None:
        """As memmove, also where both are one array."""

    @abstractmethod
    def _write(self, storage: Storage, offset: int, data: memoryview) -> None: ...

    @abstractmethod
    def _read(self, storage: Storage, offset: int, into: memoryview) -> None: ...

    @abstractmethod
    def _as_tensor(self, storage: Storage) -> torch.Tensor:
        """The array as a torch tensor of uint8 that shares its memory."""

    @abstractmethod
    def provider(self) -> Provider:
        """How ONNX Runtime is to drive this device."""

    # ---- what a backend may replace

    def held_bytes(self) -> int | None:
        """What this process holds on the device; where only the whole device's use is known, that."""
        reading = self.memory()
        return reading.used_bytes if reading.process_bytes is None else reading.process_bytes

    def torch_device(self) -> torch.device:
        """The torch device of this device; loads torch."""
        import torch

        return torch.device("cpu")

    def synchronize(self) -> None:  # noqa: B027 - a device whose calls return when they are done has nothing to wait for
        """Returns when everything asked of the device so far is done."""

    def queue(self) -> AbstractContextManager[object]:
        """While inside, torch's work goes where models run: what is asked later is done later, and nothing waits."""
        return nullcontext()

    def queued(self) -> Callable[[], None]:
        """Waits, when it is called, for what is in that queue now."""
        return lambda: None

    def _address(self, storage: Storage) -> int | None:
        """Where the array begins, for ONNX Runtime's I/O binding; None where it cannot be bound."""
        return None

    def transfers(self) -> TensorTransfers | None:
        """The way of one model's arrays to the device and back, where that is faster than ONNX Runtime's own."""
        return None

    def trim(self) -> None:  # noqa: B027 - an allocator that gives memory back by itself needs none
        """Hands back to the system what the backend's allocator keeps of memory that was freed."""

    def host_buffer(self, size_bytes: int) -> memoryview:
        """Writable host memory from which `write`, and into which `read`, is fastest; it lives as long as the view."""
        return np.empty(size_bytes, np.uint8).data

    def pin(self, memory: memoryview) -> Callable[[], None] | None:
        """Makes the host's memory one that `write` and `read` are fastest with; what undoes it, before the memory goes.

        None where the backend knows no such thing, or the system does not let it.
        """
        return None

    def _released(self, freed_bytes: int) -> None:  # noqa: B027 - see trim
        """Called after a release, to trim where this is worth it."""

    # ---- checks

    def _own(self, buffer: Buffer) -> None:
        if buffer.device is not self:
            raise failure("internal_error", f"{buffer!r} was given to {self}.")

    def _range(self, buffer: Buffer, offset: int, size_bytes: int | None, verb: str) -> int:
        """`size_bytes`, or the rest from `offset`, once the range is known to lie inside a live buffer of ours."""
        self._own(buffer)
        if buffer.storage is None:
            raise failure("allocation_not_found", f"The buffer of {self} to {verb} was released.")
        size = buffer.size_bytes - offset if size_bytes is None else size_bytes
        if offset < 0 or size < 0 or offset + size > buffer.size_bytes:
            raise failure(
                "out_of_range",
                f"Cannot {verb} {size} bytes at offset {offset}: the allocation has {buffer.size_bytes} bytes.",
                detail={"offset": offset, "size_bytes": size, "allocation_bytes": buffer.size_bytes},
            )
        return size

    def _guard(self, call: Callable[[], T], what: str) -> T:
        try:
            return call()
        except OperationError:
            raise
        except Exception as error:
            named = self.classify(error)
            named.message = f"Cannot {what}. {named.message}"
            named.args = (named.message,)
            raise named from error

    def _standing(self) -> str:
        """What is held and free here, for an out-of-memory message; says less where the device cannot be asked."""
        try:
            free = self.memory().free_bytes
        except Exception:  # noqa: BLE001 - the error that is being reported matters more than this figure
            free = None
        shown = "unknown" if free is None else f"{free} bytes"
        return f"Allocations hold {self._allocated_bytes} bytes in {self._buffer_count} buffers; free: {shown}."


def _matches(patterns: Sequence[str], text: str) -> bool:
    return any(re.search(pattern, text, re.IGNORECASE) for pattern in patterns)


def _viewed(flat: torch.Tensor, kind: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if flat.storage_offset() % kind.itemsize:
        flat = flat.clone()
    return flat.view(kind).view(shape)
