"""The cuda backend: ONNX Runtime's CUDA provider with I/O binding, torch for memory and training, NVML for facts.

Memory is given back on release and on unload: ONNX Runtime's arena takes what it needs and no more and keeps weights
outside of it, and torch's cache is emptied after a release that is worth it. Host memory moves through two pinned
blocks, one being filled while the other is on the bus; what is pinned already (`host_buffer`, `pin`) moves directly.

CUDA_VISIBLE_DEVICES is left alone: ordinals count what it shows.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_operations.errors import OperationError, failure
from workers.devices.adapters import nvml
from workers.devices.adapters.inventory import Found
from workers.devices.arrays import DTYPES, Array, BufferView, Storage
from workers.devices.libraries import installed, tidy
from workers.devices.torch_memory import TorchDevice, host_tensor
from workers.devices.values import Description, Provider, Reading

if TYPE_CHECKING:
    import torch

    from workers.devices.onnx.tensors import Kept
    from workers.devices.transfers import TensorTransfers

# CUDA would count the fastest GPU first, NVML counts along the bus; read when CUDA starts, which is after this.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

#: Each of the two pinned blocks that host memory moves through.
_STAGE_BYTES = 32 << 20

#: A release of less than this is not worth emptying torch's cache, which waits for the device.
_TRIM_ABOVE_BYTES = 1 << 20

#: An assertion inside a kernel kills the context as a fault of the hardware does, but the same request does it again.
_ASSERTED = r"device-side assert"


class CudaDevice(TorchDevice):
    """One GPU, by its ordinal among those that CUDA_VISIBLE_DEVICES shows."""

    backend = "cuda"
    out_of_memory_texts = (
        r"out of memory",
        r"(CUBLAS|CUDNN|CUSOLVER)_STATUS_ALLOC_FAILED",
        r"cudaErrorMemoryAllocation",
        r"Failed to allocate memory for requested buffer",
    )
    device_lost_texts = (
        r"illegal memory access",
        r"illegal instruction",
        r"misaligned address",
        r"unspecified launch failure",
        r"launch timed out",
        r"(uncorrectable|double.bit) ECC",
        r"GPU (is lost|has fallen off the bus)",
        r"device(\(s\))? is/are busy or unavailable",
        r"hardware stack error|invalid program counter|cudaErrorDevicesUnavailable",
        r"CUDA (failure|error) (46|214|700|702|71[0-9]|999)\b",
        r"\bXid\b",
        _ASSERTED,
    )

    def __init__(self, ordinal: int = 0) -> None:
        super().__init__(ordinal)
        here = nvml.gpus()
        if not 0 <= ordinal < len(here):
            listed = ", ".join(f"{gpu.ordinal}: {gpu.name}" for gpu in here) or "none"
            raise failure(
                "device_unavailable",
                f"There is no GPU {ordinal} for CUDA here; GPUs: {listed}. CUDA needs NVIDIA's driver "
                "(nvidia-smi shows what it sees) and a GPU that CUDA_VISIBLE_DEVICES does not hide.",
            )
        self._gpu = here[ordinal]

    # ---- facts

    def describe(self) -> Description:
        inference = installed("onnxruntime")
        return Description(
            backend=self.backend,
            ordinal=self.ordinal,
            name=self._gpu.name,
            vendor="NVIDIA",
            driver=self._gpu.driver,
            total_bytes=self._gpu.total_bytes,
            capabilities={
                "dtypes": list(DTYPES),
                "zero_copy": True,
                "inference": inference,
                "training": _torch_has_cuda(),
                "foreach": True,
                "returns_memory": True,
                "uuid": self._gpu.uuid,
            },
            providers=("CUDAExecutionProvider",) if inference else (),
        )

    def memory(self) -> Reading:
        usage = nvml.usage(self._gpu.index)
        if usage is None:
            return Reading(total_bytes=self._gpu.total_bytes)
        return Reading(
            total_bytes=usage.total_bytes,
            free_bytes=usage.free_bytes,
            used_bytes=usage.used_bytes,
            process_bytes=usage.process_bytes,
            busy_share=usage.busy_share,
        )

    def provider(self) -> Provider:
        _preload()
        # With the stream that inputs and outputs move on, a run needs no wait before it; see cuda_transfers.
        stream = {"user_compute_stream": str(self._stream.cuda_stream)} if _torch_has_cuda() else {}
        return Provider(
            "CUDAExecutionProvider",
            options={
                **stream,
                "device_id": str(self.ordinal),
                # By default the arena doubles at each growth, and a first run tries every convolution algorithm.
                "arena_extend_strategy": "kSameAsRequested",
                "cudnn_conv_algo_search": "HEURISTIC",
                # float32 means float32: TF32's ten bits of mantissa were seen to be off by 2e-3 in an attention layer.
                "use_tf32": "0",
            },
            # Weights outside the arena, so that unloading gives all of them back.
            settings={"session.use_device_allocator_for_initializers": "1"},
            binding="cuda",
            device_id=self.ordinal,
        )

    def classify(self, error: BaseException) -> OperationError:
        if not isinstance(error, OperationError) and re.search(_ASSERTED, str(error), re.IGNORECASE):
            return failure(
                "device_lost",
                f"A kernel on {self} refused its input (an index out of range, as a rule) and took the CUDA context "
                f"with it: {tidy(error)}",
                retryable=False,
            )
        return super().classify(error)

    # ---- memory

    def torch_device(self) -> torch.device:
        device = self._torch_device
        import torch

        # Each thread has a current GPU of its own, and begins with the first: what it pinned would be that one's.
        torch.cuda.set_device(device)
        return device

    def synchronize(self) -> None:
        """Waits for torch's work; ONNX Runtime waits for its own at the end of a run."""
        if "_torch_device" in self.__dict__:
            import torch

            self._guard(torch.cuda.current_stream(self._torch_device).synchronize, "synchronize")

    def queue(self) -> AbstractContextManager[object]:
        import torch

        return torch.cuda.stream(self._stream)

    def queued(self) -> Callable[[], None]:
        import torch

        mark = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]
        mark.record(self._stream)
        return lambda: self._guard(mark.synchronize, "wait for the queue")

    def trim(self) -> None:
        if "_torch_device" in self.__dict__:
            import torch

            with torch.cuda.device(self._torch_device):
                torch.cuda.empty_cache()

    def host_buffer(self, size_bytes: int) -> memoryview:
        if not _torch_has_cuda():
            return super().host_buffer(size_bytes)
        import torch

        self.torch_device()
        return self._guard(lambda: _bytes_of(torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)), "pin memory")

    def pin(self, memory: memoryview) -> Callable[[], None] | None:
        if not _torch_has_cuda():
            return None
        from workers.devices.cuda_transfers import pin

        return pin(self.torch_device(), memory)

    def transfers(self) -> TensorTransfers | None:
        """Through pinned memory, where torch is there to pin it; ONNX Runtime moves arrays by itself elsewhere."""
        if not _torch_has_cuda():
            return None
        from workers.devices.cuda_transfers import PinnedTransfers

        return PinnedTransfers(self.torch_device(), self._stream)

    def tensor_of(self, kept: Kept) -> torch.Tensor:
        import torch

        flat = self._bytes_at(kept.value, kept.size_bytes)
        return flat.view(getattr(torch, kept.dtype)).view(kept.shape)

    def take(self, view: BufferView, value: Any) -> None:
        source = self._bytes_at(value, view.size_bytes)
        self._guard(lambda: self._copy(view.buffer.storage, view.offset, source, 0, view.size_bytes), "copy an output")

    def _bytes_at(self, value: Any, size_bytes: int) -> torch.Tensor:
        """The bytes of an `onnxruntime.OrtValue` on this device, where they lie."""
        import torch

        from workers.devices.cuda_transfers import CudaBytes

        return torch.as_tensor(CudaBytes(value.data_ptr(), size_bytes), device=self.torch_device())

    def _address(self, storage: Storage) -> int:
        return int(storage.data_ptr())

    def _released(self, freed_bytes: int) -> None:
        if freed_bytes >= _TRIM_ABOVE_BYTES or self.buffer_count == 0:
            self.trim()

    # CUDA reports a failed kernel at a later call: waiting here gives each operation its own errors.

    def _fill(self, storage: torch.Tensor, value: int, offset: int, size_bytes: int) -> None:
        super()._fill(storage, value, offset, size_bytes)
        self.synchronize()

    def _copy(
        self, to: torch.Tensor, to_offset: int, source: torch.Tensor, source_offset: int, size_bytes: int
    ) -> None:
        super()._copy(to, to_offset, source, source_offset, size_bytes)
        self.synchronize()

    def _write(self, storage: torch.Tensor, offset: int, data: memoryview) -> None:
        import torch

        host = host_tensor(data)
        if host.is_pinned():
            storage[offset : offset + len(data)].copy_(host, non_blocking=True)
        else:
            for turn, start in enumerate(range(0, len(data), _STAGE_BYTES)):
                size = min(_STAGE_BYTES, len(data) - start)
                stage, moved = self._stages[turn % 2]
                moved.synchronize()
                stage[:size].copy_(host[start : start + size])
                storage[offset + start : offset + start + size].copy_(stage[:size], non_blocking=True)
                moved.record(torch.cuda.current_stream(self._torch_device))
        self.synchronize()

    def _read(self, storage: torch.Tensor, offset: int, into: memoryview) -> None:
        import torch

        host = host_tensor(into)
        if host.is_pinned():
            host.copy_(storage[offset : offset + len(into)], non_blocking=True)
            self.synchronize()
            return
        starts = range(0, len(into), _STAGE_BYTES)
        for turn, start in enumerate([*starts, None]):
            if start is not None:
                stage, moved = self._stages[turn % 2]
                size = min(_STAGE_BYTES, len(into) - start)
                stage[:size].copy_(storage[offset + start : offset + start + size], non_blocking=True)
                moved.record(torch.cuda.current_stream(self._torch_device))
            if turn > 0:  # the block before is there, or nearly: take it while this one is on the bus
                stage, moved = self._stages[(turn - 1) % 2]
                before = starts[turn - 1]
                moved.synchronize()
                size = min(_STAGE_BYTES, len(into) - before)
                host[before : before + size].copy_(stage[:size])

    @cached_property
    def _stages(self) -> tuple[tuple[torch.Tensor, torch.cuda.Event], ...]:
        """Two pinned blocks, each with the event that says that its last move is over."""
        import torch

        with torch.cuda.device(self.torch_device()):
            blocks = [torch.empty(_STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            return tuple((block, torch.cuda.Event()) for block in blocks)  # type: ignore[no-untyped-call, unused-ignore]

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """Where the models of this device run, each input's and output's transfer before and behind its run."""
        import torch

        return self._guard(lambda: torch.cuda.Stream(self.torch_device()), "make a stream")  # type: ignore[no-untyped-call, unused-ignore]

    @cached_property
    def _torch_device(self) -> torch.device:
        if not _torch_has_cuda():
            raise failure(
                "device_unavailable",
                f"{self} needs a build of torch with CUDA for memory and training; the one installed has none. "
                "Inference works without it.",
            )
        import torch

        return torch.device("cuda", self.ordinal)


def found() -> list[Found]:
    """The GPUs that CUDA may use, where a library that can drive them is installed."""
    if not (_torch_has_cuda() or _has_provider()):
        return []
    return [Found("cuda", gpu.ordinal, gpu.name, "NVIDIA", gpu.driver, gpu.total_bytes) for gpu in nvml.gpus()]


def _torch_has_cuda() -> bool:
    """Whether the torch installed here was built for CUDA, from its version file: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    return version is not None and version.is_file() and names_cuda(version.read_text("utf-8"))


def names_cuda(version_file: str) -> bool:
    """Whether torch's version file says a version of CUDA: `cuda: Optional[str] = '12.8'`."""
    return re.search(r"^cuda\b[^=\n]*=\s*['\"]\d", version_file, re.MULTILINE) is not None


def _has_provider() -> bool:
    if not installed("onnxruntime"):
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _preload() -> None:
    """Lets ONNX Runtime find the CUDA and cuDNN libraries that came with torch or as packages of their own."""
    import onnxruntime

    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        preload()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Array = tensor.numpy()
    return array.data
