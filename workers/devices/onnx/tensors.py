"""The tensors that go into and come out of a model: what it declares, what it is given, and whether the two fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from device_operations.tensors import TEXT_DTYPES, carries, numpy_dtype
from device_operations.wire.json_types import JsonObject
from workers.devices.arrays import Array, BufferView
from workers.devices.onnx.values import Values, ValueType

#: A value of ONNX Runtime's, which has no types: a NumPy array, an `OrtValue`, a list or a map.
RuntimeValue: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output: `dtype` by NumPy's name (`string` for text), each dimension a number, a symbol or None.

    What is no tensor has dtype `json`, its type in `values`, and one axis. An `optional` input may be left out; an
    `optional` output may have no value.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    optional: bool = False
    side: Literal["input", "output"] = "input"
    values: ValueType | None = None
    #: ONNX Runtime's word for the type of what is no tensor.
    type_text: str | None = None

    def as_json(self) -> JsonObject:
        """`{"name", "dtype", "shape"}`, as the model's record has it; `optional` and `type` if they say something."""
        form: JsonObject = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}
        if self.optional:
            form["optional"] = True
        if self.type_text is not None:
            form["type"] = self.type_text
        return form


@dataclass(frozen=True, slots=True)
class NotOffered:
    """An input or output that callers cannot give or get, and why."""

    name: str
    side: Literal["input", "output"]
    reason: str
    #: Whether no run goes without it.
    required: bool

    def as_json(self) -> JsonObject:
        """`{"name", "side", "reason"}`, as the model's record holds it."""
        return {"name": self.name, "side": self.side, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Kept:
    """An output that stayed on its device, to be fed to a later run of any model there."""

    #: A NumPy array on the CPU device and where the backend stages, an `onnxruntime.OrtValue` elsewhere.
    value: RuntimeValue
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes that it holds; 0 for text, whose bytes are not counted."""
        return 0 if self.dtype in TEXT_DTYPES else numpy_dtype(self.dtype).itemsize * math.prod(self.shape)

    def numpy(self) -> Array:
        """Its values on the host."""
        return self.value if isinstance(self.value, np.ndarray) else np.asarray(self.value.numpy())


Feed = Array | BufferView | Kept
#: None is an optional output without a value.
Fetched = Array | BufferView | Kept | Values | None


def kind(feed: Feed) -> tuple[str, tuple[int, ...]]:
    """The feed's dtype, as a model declares it, and its shape."""
    if isinstance(feed, np.ndarray):
        return ("string" if feed.dtype.kind in "OUS" else feed.dtype.name), feed.shape
    return feed.dtype or "?", feed.shape or ()


def unfit(spec: TensorSpec, dtype: str, shape: tuple[int, ...], sizes: dict[str, int]) -> list[str]:
    """What is wrong with a feed; learns the sizes of symbolic dimensions."""
    wrong = []
    if dtype != spec.dtype and not carries(dtype, spec.dtype):
        wrong.append(f"input {spec.name!r} is {dtype} and must be {spec.dtype}")
    fixed = [d if isinstance(d, int) else got for d, got in zip(spec.shape, shape, strict=False)]
    if len(shape) != len(spec.shape) or fixed != list(shape):
        wrong.append(f"input {spec.name!r} has shape {list(shape)} and must have {drawn(spec.shape)}")
        return wrong
    for dimension, got in zip(spec.shape, shape, strict=True):
        if isinstance(dimension, str) and sizes.setdefault(dimension, got) != got:
            sizes[dimension] = -1  # ONNX Runtime lets two inputs differ in one symbol, which then says nothing
    return wrong


def is_aligned(view: BufferView) -> bool:
    """Whether the tensor begins at a multiple of its element's size, as processors and providers want it."""
    return view.offset % numpy_dtype(view.dtype or "").itemsize == 0


def overlap(a: BufferView, b: BufferView) -> bool:
    """Whether two tensors share a byte."""
    return a.buffer is b.buffer and a.offset < b.offset + b.size_bytes and b.offset < a.offset + a.size_bytes


def drawn(shape: Sequence[int | str | None]) -> str:
    """A shape as messages show it: `[n, 4, ?]`."""
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"
