"""Whether runs of a model may be joined: proven from its graph, and tried on made-up rows where it was not disproven.

Joined runs must give each caller what it would have got alone.

    proof        max_batch_size   runs are joined
    proven       not given        up to DEFAULT_ROWS
    proven       given            up to that
    unknown      not given        never
    unknown      given            up to that
    disproven    any              never

The trial is a second check: it only ever takes away. Two rows are run alone and then joined, and compared. It makes up
at most `MADE_UP_BYTES`, is left out where rows would take more, and is stopped after `TRIAL_SECONDS`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnxruntime as ort

from device_operations.errors import OperationError
from device_operations.tensors import numpy_dtype
from device_operations.wire.json_types import JsonObject
from tasks.statements import Row
from workers.devices.arrays import Array
from workers.devices.onnx.runtime import Cancel, LoadedGraph, TensorSpec
from workers.devices.onnx.session import Over, Stoppable
from workers.rows.proof import Proof, Verdict

#: How many rows are joined at most where rows are proven apart and the caller gave no max_batch_size.
DEFAULT_ROWS = 8

#: What made-up inputs and the outputs that the model declares for them may take, in bytes.
MADE_UP_BYTES = 64 << 20

#: What the largest tensor inside the graph may take, in bytes, for the graph to be run on made-up rows.
LARGEST_INSIDE_BYTES = 1 << 30

#: How far, as a share of the largest value, a joined row may lie from the row alone. Quantisation to eight bits of the
#: whole batch moves outputs by a few parts in a hundred in ONNX Runtime itself; rows that mix move by their own size.
TOLERANCE = 0.1

#: How long the trial may take before it is stopped.
TRIAL_SECONDS = 5.0

#: What the open axes behind the first are tried with, until the model runs.
_SIDES = (4, 32, 64, 1)


@dataclass(frozen=True, slots=True)
class Batching:
    """Whether runs may be joined, why, and how far a joined row lay from the row alone, as a share."""

    enabled: bool
    reason: str
    largest_difference: float | None = None
    proof: Proof | None = None
    #: The node that decided against a proof: its name, operator and what it does.
    decided_by: dict[str, str] | None = None
    #: What became of the trial; None where there was nothing to try.
    trial: str | None = None
    #: What became of the warm-up; None where none was asked for.
    warmup: str | None = None

    def as_json(self) -> JsonObject:
        """As the model's record holds it."""
        return asdict(self)


def decide(verdict: Verdict, asked: int | None) -> int:
    """How many rows may be joined at most, where the caller gave `asked` as max_batch_size; 1 is never."""
    if verdict.proof is Proof.DISPROVEN:
        return 1
    if verdict.proof is Proof.UNKNOWN:
        return asked or 1
    return asked or DEFAULT_ROWS


def find_out(
    model: LoadedGraph,
    asked: int | None,
    cancel: Cancel | None = None,
    *,
    earlier: Row | None = None,
    may_try: bool = True,
) -> Batching:
    """Whether runs of `model` may be joined, with the caller's max_batch_size, or None.

    Takes three runs on one or two made-up rows, for each size tried until the model runs; none if an `earlier` record
    of the same model and proof has a trial, or `may_try` is false. Raises `cancelled`, `timeout`, `device_lost`.
    """
    verdict = model.rows
    found = _proven(verdict, asked)
    if not found.enabled:
        return found
    for spec in (*model.inputs, *model.outputs):
        if spec.dtype == "json" or spec.optional:
            return replace(found, enabled=False, reason=f"{spec.name} is not always a tensor")
    if earlier is not None and earlier.get("trial") is not None and earlier.get("proof") == verdict.proof:
        same = replace(found, trial=earlier["trial"], largest_difference=earlier.get("largest_difference"))
        return same if earlier.get("enabled") else replace(same, enabled=False, reason=earlier["trial"])
    return _tried(model, found, cancel) if may_try else replace(found, trial="not tried at a restart")


def made_up_bytes(model: LoadedGraph, side: int, rows: int) -> int:
    """What `rows` made-up rows take, with the outputs declared for them, where each other open side is `side`."""
    return sum(_elements(spec, side, rows) * _item_bytes(spec) for spec in (*model.inputs, *model.outputs))


def too_large(model: LoadedGraph, side: int, rows: int) -> str | None:
    """Why the model is not run on made-up rows of that size; None where it may be."""
    needed = made_up_bytes(model, side, rows)
    if needed > MADE_UP_BYTES:
        return f"made-up rows would take {_mebibytes(needed)}, more than {_mebibytes(MADE_UP_BYTES)}"
    inside = model.rows.largest_elements * rows * 4
    if inside > LARGEST_INSIDE_BYTES:
        return (
            f"a tensor inside the graph would take {_mebibytes(inside)}, more than {_mebibytes(LARGEST_INSIDE_BYTES)}"
        )
    return None


def _proven(verdict: Verdict, asked: int | None) -> Batching:
    """What the proof and the caller's limit say, before anything is tried."""
    decided_by = None
    if verdict.operator:
        decided_by = {"node": verdict.node, "operator": verdict.operator, "reason": verdict.reason}
    found = Batching(True, verdict.reason, proof=verdict.proof, decided_by=decided_by)
    if decide(verdict, asked) > 1:
        if verdict.proof is Proof.UNKNOWN:
            return replace(found, reason=f"max_batch_size was given; it is not proven: {verdict.reason}")
        return found
    if verdict.proof is Proof.DISPROVEN:
        return replace(found, enabled=False)
    if asked is None:
        return replace(found, enabled=False, reason=f"not proven, and no max_batch_size was given: {verdict.reason}")
    return replace(found, enabled=False, reason="max_batch_size is 1")


class Within:
    """A limit on how long runs may take, in addition to the caller's own cancel, for `LoadedGraph.run`."""

    def __init__(self, seconds: float, cancel: Cancel | None) -> None:
        self._own = Cancel()
        self._cancel = cancel
        self._timer = threading.Timer(seconds, self._own.trip, ("timeout",))
        self._timer.daemon = True

    @property
    def expired(self) -> bool:
        """Whether the time was up, and the caller did not stop the runs."""
        return self._own.code is not None and (self._cancel is None or self._cancel.code is None)

    def over(self, options: ort.RunOptions | ort.SessionOptions) -> Over:
        """While inside, the limit and the caller's cancel reach `options`."""
        return Over([self._own] if self._cancel is None else [self._cancel, self._own], options)

    def __enter__(self) -> Within:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


# ---- the trial


def _tried(model: LoadedGraph, found: Batching, cancel: Cancel | None) -> Batching:
    reason = None
    sides = _SIDES if any(_open_sides(spec) for spec in model.inputs) else _SIDES[:1]
    with Within(TRIAL_SECONDS, cancel) as limit:
        for side in sides:
            reason = too_large(model, side, 4)  # each row once alone and once joined
            if reason is not None:
                continue
            try:
                return _compared(model, found, side, limit)
            except OperationError as error:
                if limit.expired:
                    return replace(found, trial=f"stopped after {TRIAL_SECONDS:g} s")
                if error.code in ("cancelled", "timeout", "device_lost"):
                    raise
    return replace(found, trial=f"not tried: {reason}" if reason else "the model does not run on made-up rows")


def _compared(model: LoadedGraph, found: Batching, side: int, cancel: Stoppable) -> Batching:
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
            return _refuted(found, f"{name} does not have a row for each row of the inputs")
        largest = max(largest, _difference(np.asarray(both), np.concatenate(rows)))
    if largest > TOLERANCE:
        return replace(_refuted(found, "rows of one batch change each other"), largest_difference=round(largest, 6))
    return replace(found, trial="joined rows are what they are alone", largest_difference=round(largest, 6))


def _refuted(found: Batching, why: str) -> Batching:
    return replace(found, enabled=False, reason=why, trial=why)


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
    shape = _sides(spec, side, 1)
    count = math.prod(shape)
    if spec.dtype == "string":
        return np.full(shape, "ab"[row], object)
    if spec.dtype.startswith("float"):
        drawn = np.random.default_rng([row, *spec.name.encode()]).standard_normal(count, np.float32)
        return drawn.reshape(shape).astype(numpy_dtype(spec.dtype), copy=False)
    pattern = np.ones(count, numpy_dtype(spec.dtype))
    if row:
        pattern[1::2] = 0
    return pattern.reshape(shape)


def _sides(spec: TensorSpec, side: int, rows: int) -> list[int]:
    return [rows, *(d if isinstance(d, int) else side for d in spec.shape[1:])] if spec.shape else []


def _elements(spec: TensorSpec, side: int, rows: int) -> int:
    return math.prod(_sides(spec, side, rows))


def _item_bytes(spec: TensorSpec) -> int:
    """Bytes of an element; those of a reference where it is an object of Python's."""
    return 8 if spec.dtype in ("string", "json") else numpy_dtype(spec.dtype).itemsize


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"


def _open_sides(spec: TensorSpec) -> bool:
    sides: Sequence[int | str | None] = spec.shape[1:]
    return any(not isinstance(side, int) for side in sides)
