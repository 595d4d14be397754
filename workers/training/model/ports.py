"""What goes into a model: named inputs, and the check of a batch against them before torch sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from device_operations.errors import failure
from workers.devices.arrays import Array as HostArray

#: What the caller hands over: tensors on any device, or NumPy arrays.
Array = Tensor | HostArray


@dataclass(frozen=True)
class Port:
    """An input or output; a side is None where it is open, the dtype where it is not known beforehand.

    `rows` is the number of rows of an embedding that reads this input: its elements must be below it.
    """

    name: str
    dtype: torch.dtype | None = None
    shape: tuple[int | None, ...] | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Batch:
    """Inputs by name, and targets; the first axis of each counts the samples."""

    inputs: Mapping[str, Array]
    targets: Array


@dataclass(frozen=True, slots=True)
class Taken:
    """A batch on the device, checked; its targets are not where only a real run shows the output's shape."""

    inputs: list[Tensor]
    targets: Array
    checked: bool
    #: Dtype and shape of one sample of each input, by name.
    shapes: dict[str, tuple[str, list[int]]]

    @property
    def size(self) -> int:
        return self.inputs[0].shape[0]


def as_tensor(value: Array, name: str) -> Tensor:
    """The tensor of an array, without a copy where NumPy allows it; `input_mismatch` for dtypes torch lacks."""
    if isinstance(value, Tensor):
        return value
    if value.dtype.kind not in "fiub" or value.dtype.name in ("float128", "longdouble"):
        raise failure("input_mismatch", f"{name}: dtype {value.dtype.name} cannot be trained on; send numbers or bools")
    native = value.astype(value.dtype.newbyteorder("="), copy=not value.flags.writeable)
    return torch.from_numpy(np.asarray(native, order="C"))


def take_inputs(ports: tuple[Port, ...], given: Mapping[str, Array], *, check_rows: bool = True) -> list[Tensor]:
    """The inputs in the order of `ports`, checked for name, dtype, rank and fixed sides.

    Whole numbers of any width are taken where int64 is wanted; nothing else is converted. Raises `input_mismatch`.
    """
    names = [port.name for port in ports]
    if set(given) != set(names):
        raise failure(
            "input_mismatch",
            f"the model takes the inputs {sorted(names)}, but {sorted(given)} were given",
            detail={"wanted": sorted(names), "given": sorted(given)},
        )
    return [_take(port, as_tensor(given[port.name], port.name), check_rows) for port in ports]


def _take(port: Port, tensor: Tensor, check_rows: bool) -> Tensor:
    if port.dtype is not None and tensor.dtype != port.dtype:
        if port.dtype != torch.int64 or tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise failure(
                "input_mismatch",
                f"{port.name}: the model takes {name_of(port.dtype)}, but {name_of(tensor.dtype)} was given",
            )
        tensor = tensor.to(torch.int64)
    if port.shape is not None:
        shape = tuple(tensor.shape)
        if len(shape) != len(port.shape) or any(
            want is not None and want != side for want, side in zip(port.shape, shape, strict=True)
        ):
            wanted = ["any" if side is None else side for side in port.shape]
            raise failure("input_mismatch", f"{port.name}: the model takes shape {wanted}, but {list(shape)} was given")
    if tensor.dim() == 0 or tensor.shape[0] == 0:
        raise failure("input_mismatch", f"{port.name}: shape {list(tensor.shape)} holds no samples")
    if check_rows:
        check_row_numbers(port, tensor)
    return tensor


def check_row_numbers(port: Port, tensor: Tensor) -> None:
    """Refuses indices outside an embedding: on an accelerator they would cost the process, not an exception."""
    if port.rows is None or tensor.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(tensor))
    if low < 0 or high >= port.rows:
        wrong = low if low < 0 else high
        raise failure("input_mismatch", f"{port.name}: {wrong} is none of the embedding's {port.rows} rows")


def name_of(dtype: torch.dtype) -> str:
    """NumPy's name of a torch dtype, as `float32`."""
    return str(dtype).removeprefix("torch.")
