"""The tensors that go into and come out of a model: what it declares, what it is given, and whether the two fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workers.devices.base import Array, BufferView

#: What ONNX Runtime calls a tensor of each dtype. The others (bfloat16, float8, int4) have no NumPy name.
DTYPE_OF = {
    "tensor(bool)": "bool", "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32",
    "tensor(int64)": "int64", "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64", "tensor(float16)": "float16", "tensor(float)": "float32",
    "tensor(double)": "float64", "tensor(string)": "string",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output: `dtype` by NumPy's name (`string` for text), each dimension a number, a symbol or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def as_json(self) -> dict[str, Any]:
        """`{"name", "dtype", "shape"}`, as the contract lists a model's inputs and outputs."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class Kept:
    """An output that stayed on its device, to be fed to a later run of any model there."""

    value: Any  # numpy.ndarray on the cpu device and where the backend stages, onnxruntime.OrtValue elsewhere
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes that it holds; 0 for text, whose bytes nobody counts."""
        return 0 if self.dtype == "string" else np.dtype(self.dtype).itemsize * math.prod(self.shape)

    def numpy(self) -> Array:
        """Its values on the host."""
        return self.value if isinstance(self.value, np.ndarray) else np.asarray(self.value.numpy())


Feed = Array | BufferView | Kept
Fetched = Array | BufferView | Kept


def kind(feed: Feed) -> tuple[str, tuple[int, ...]]:
    """The feed's dtype, as a model declares it, and its shape."""
    if isinstance(feed, np.ndarray):
        return ("string" if feed.dtype.kind in "OUS" else feed.dtype.name), feed.shape
    return feed.dtype or "?", feed.shape or ()


def unfit(spec: TensorSpec, dtype: str, shape: tuple[int, ...], sizes: dict[str, int]) -> list[str]:
    """What is wrong with a feed; learns the sizes of symbolic dimensions."""
    wrong = []
    if dtype != spec.dtype:
        wrong.append(f"input {spec.name!r} is {dtype} and must be {spec.dtype}")
    fixed = [d if isinstance(d, int) else got for d, got in zip(spec.shape, shape, strict=False)]
    if len(shape) != len(spec.shape) or fixed != list(shape):
        wrong.append(f"input {spec.name!r} has shape {list(shape)} and must have {drawn(spec.shape)}")
        return wrong
    for dimension, got in zip(spec.shape, shape, strict=True):
        if isinstance(dimension, str) and sizes.setdefault(dimension, got) != got:
            sizes[dimension] = -1  # ONNX Runtime lets two inputs differ in one symbol, which then says nothing
    return wrong


def aligned(view: BufferView) -> bool:
    """Whether the tensor begins at a multiple of its element's size, as processors and providers want it."""
    return view.offset % np.dtype(view.dtype).itemsize == 0


def overlap(a: BufferView, b: BufferView) -> bool:
    """Whether two tensors share a byte."""
    return a.buffer is b.buffer and a.offset < b.offset + b.size_bytes and b.offset < a.offset + a.size_bytes


def drawn(shape: Sequence[int | str | None]) -> str:
    """A shape as messages show it: `[n, 4, ?]`."""
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"
