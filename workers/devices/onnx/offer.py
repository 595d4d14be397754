"""What of a loaded model's inputs and outputs callers can give and get, and why not the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnxruntime as ort

from device_operations.errors import failure
from device_operations.tensors import ML_DTYPES, TEXT_DTYPES
from workers.devices.onnx.tensors import NotOffered, TensorSpec
from workers.devices.onnx.values import is_offered, parse_type, why_not


@dataclass(frozen=True, slots=True)
class Offer:
    """What of a model's inputs and outputs callers can give and get, and what not."""

    inputs: tuple[TensorSpec, ...]
    optional_inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    not_offered: tuple[NotOffered, ...]


def offer_of(session: ort.InferenceSession, model: str) -> Offer:
    """Raises `model_invalid` where an input that every run needs cannot be given, or no output can be got."""
    sides = (
        _specs(session.get_inputs(), "input"),
        # Initializers that the graph lists as inputs too: their values hold unless a run brings others.
        _specs(session.get_overridable_initializers(), "input", optional=True),
        _specs(session.get_outputs(), "output"),
    )
    if any(spec.dtype in ML_DTYPES for offered, _ in sides for spec in offered):
        sides = tuple(_in_ort_values(*side) for side in sides)  # type: ignore[assignment]
    (inputs, refused), (defaults, without), (outputs, lost) = sides
    needed = [one for one in refused if one.required]
    if needed:
        raise failure("model_invalid", f"{model} takes {needed[0].name!r}, which cannot be given: {needed[0].reason}.")
    if not outputs:
        why = "; ".join(f"{one.name!r}: {one.reason}" for one in lost)
        raise failure("model_invalid", f"{model} gives nothing that can be offered. {why}.")
    return Offer(
        tuple(spec for spec in inputs if not spec.optional),
        tuple(spec for spec in (*inputs, *defaults) if spec.optional),
        tuple(outputs),
        (*refused, *without, *lost),
    )


def _specs(
    arguments: Sequence[ort.NodeArg], side: Literal["input", "output"], *, optional: bool = False
) -> tuple[list[TensorSpec], list[NotOffered]]:
    """A model's arguments on one side as callers give or get them, and those that they cannot, with the reason."""
    offered: list[TensorSpec] = []
    refused: list[NotOffered] = []
    for argument in arguments:
        kind = parse_type(argument.type)
        may_lack = optional or argument.type.startswith("optional(")
        if kind is None or (kind.inner.form != "tensor" and not is_offered(kind)):
            refused.append(NotOffered(argument.name, side, why_not(argument.type), required=not may_lack))
        elif kind.inner.form == "tensor":
            shape = tuple(d if isinstance(d, int) and d >= 0 else (d or None) for d in argument.shape)
            known = tuple(d if d != -1 else None for d in shape)
            offered.append(TensorSpec(argument.name, kind.inner.dtype, known, may_lack, side))
        else:
            axis = (None,) if kind.is_sequence else (1,)
            offered.append(TensorSpec(argument.name, "json", axis, may_lack, side, kind, argument.type))
    return offered, refused


def _in_ort_values(offered: list[TensorSpec], refused: list[NotOffered]) -> tuple[list[TensorSpec], list[NotOffered]]:
    """Of one side of a model with floats that NumPy has not: what passes in the same call as those."""
    passing = [spec for spec in offered if spec.dtype not in TEXT_DTYPES]
    reason = "ONNX Runtime's Python interface passes no text, sequence or map beside bfloat16 and floats of eight bits"
    left = [NotOffered(s.name, s.side, reason, required=not s.optional) for s in offered if s.dtype in TEXT_DTYPES]
    return passing, refused + left
