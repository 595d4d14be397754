"""What a training session takes of a device's memory, and how torch says what a device cannot do."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

#: Texts of allocation failures that are plain RuntimeErrors: torch on the CPU (Linux, Windows), and torch-directml.
_TEXTS = ("can't allocate memory", "not enough memory", "could not allocate tensor", "dml allocator out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or Python, says with `error` that there was no memory."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _TEXTS)


def is_nondeterministic(error: BaseException) -> bool:
    """Whether torch refuses with `error` an operator that has no deterministic kernel on the device."""
    return isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error)


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' elements; also for tensors on the meta device, which have none."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
