"""Whether runs of a model may be joined: asked of the model itself, when it is loaded.

Joined runs must give each caller what it would have got alone. What a model declares does not say so: exporters give
one batch axis two names, or leave axes open that are none. So two rows are run alone and then joined, and compared:

    every input (but scalars) and every output leaves its first axis open?  no ─▶ runs go alone
    joined outputs have two rows, and each is what its row gave alone?      no ─▶ runs go alone
    the model could not be run on made-up rows?  joined only if all first axes have one and the same name
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from device_operations.errors import OperationError
from device_operations.tensors import numpy_dtype
from workers.devices.base import Array
from workers.devices.onnx import Cancel, OnnxModel, TensorSpec

#: How far, as a share of the largest value, a joined row may lie from the row alone. Quantisation to eight bits of the
#: whole batch moves outputs by a few parts in a hundred in ONNX Runtime itself; rows that mix move by their own size.
TOLERANCE = 0.1

#: What the open axes behind the first are tried with, until the model runs.
_SIDES = (4, 32, 64, 1)


@dataclass(frozen=True, slots=True)
class Batching:
    """Whether runs may be joined, why, and how far a joined row lay from the row alone, as a share."""

    enabled: bool
    reason: str
    largest_difference: float | None = None

    def as_json(self) -> dict[str, Any]:
        """As the model's record holds it."""
        return asdict(self)


def find_out(model: OnnxModel, max_batch_size: int, cancel: Cancel | None = None) -> Batching:
    """Whether runs of `model` may be joined. Takes three runs on one or two rows where the axes leave it open."""
    if max_batch_size < 2:
        return Batching(False, "max_batch_size is 1")
    for spec in (*model.inputs, *model.outputs):
        if spec.dtype == "json" or spec.optional:
            return Batching(False, f"{spec.name} is not always a tensor")
    arrays = [spec for spec in model.inputs if spec.shape]
    if not arrays:
        return Batching(False, "no input has an axis")
    for spec in [*arrays, *model.outputs]:
        if not spec.shape or isinstance(spec.shape[0], int):
            return Batching(False, f"{spec.name} has no open first axis")
    for side in _SIDES if any(_open_sides(spec) for spec in arrays) else _SIDES[:1]:
        try:
            return _compared(model, side, cancel)
        except OperationError as error:
            if error.code in ("cancelled", "timeout", "device_lost"):
                raise
    names = {spec.shape[0] for spec in [*arrays, *model.outputs]}
    if len(names) == 1 and None not in names:
        return Batching(True, f"all first axes are named {names.pop()!r}; the model does not run on made-up rows")
    return Batching(False, "first axes have several names, and the model does not run on made-up rows")


def _compared(model: OnnxModel, side: int, cancel: Cancel | None) -> Batching:
    first, second = ({spec.name: _made_up(spec, side, row) for spec in model.inputs if spec.shape} for row in (0, 1))
    scalars = {spec.name: _made_up(spec, side, 0) for spec in model.inputs if not spec.shape}
    alone = [model.run({**rows, **scalars}, cancel=cancel) for rows in (first, second)]
    joined = model.run(
        {**{name: np.concatenate([first[name], second[name]]) for name in first}, **scalars}, cancel=cancel
    )
    largest = 0.0
    for name, both in joined.items():
        rows = [np.asarray(one[name]) for one in alone]
        if any(row.shape[:1] != (1,) for row in rows) or np.asarray(both).shape != (2, *rows[0].shape[1:]):
            return Batching(False, f"{name} does not have a row for each row of the inputs")
        largest = max(largest, _difference(np.asarray(both), np.concatenate(rows)))
    if largest > TOLERANCE:
        return Batching(False, "rows of one batch change each other", round(largest, 6))
    return Batching(True, "joined rows are what they are alone", round(largest, 6))


def _difference(a: Array, b: Array) -> float:
    """The largest difference as a share of the largest value; anything but numbers is either equal or wholly not."""
    if a.dtype.kind != "f":
        return 0.0 if np.array_equal(a, b) else 1.0
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return 1.0
    if not finite.any():
        return 0.0
    a, b = a[finite].astype(np.float64), b[finite].astype(np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9))


def _made_up(spec: TensorSpec, side: int, row: int) -> Array:
    """One row for an input: rows differ, and whole numbers are 0 and 1, which tables, masks and flags all take."""
    shape = [1, *(d if isinstance(d, int) else side for d in spec.shape[1:])] if spec.shape else []
    count = int(np.prod(shape))
    if spec.dtype == "string":
        return np.full(shape, "ab"[row], object)
    if spec.dtype.startswith("float"):
        drawn = np.random.default_rng([row, *spec.name.encode()]).standard_normal(count)
        return drawn.reshape(shape).astype(numpy_dtype(spec.dtype))
    pattern: Sequence[int] = [1] * count if row == 0 else [(index + 1) % 2 for index in range(count)]
    return np.array(pattern).reshape(shape).astype(numpy_dtype(spec.dtype))


def _open_sides(spec: TensorSpec) -> bool:
    return any(not isinstance(side, int) for side in spec.shape[1:])
