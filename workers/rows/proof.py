"""The verdict on a graph: may rows of different callers run as one batch?

proven      every output is, joined, what the callers' own would be behind each other
unknown     so far as the table goes; an operator that it does not know, or that looks at the whole batch in a way
            that changes results only a little, has touched an output
disproven   an output would depend on who else is in the batch, or is no list of rows
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from workers.rows.sizes import ONE_EACH, symbol
from workers.rows.values import FREE, MIXED, ROWS, UNKNOWN, Because, Value
from workers.rows.walk import OLDEST, TooLargeError, Walk

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto


class Proof(enum.StrEnum):
    """How far it is proven that rows of one batch leave each other alone."""

    PROVEN = "proven"
    UNKNOWN = "unknown"
    DISPROVEN = "disproven"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The proof, and the node that decided against it; `node` and `operator` are empty where none did."""

    proof: Proof
    reason: str
    node: str = ""
    operator: str = ""
    #: The most elements that a tensor within the graph has for one row, each open side counting as 1.
    largest_elements: int = 0


def prove(model: ModelProto, sizes: Mapping[str, int] | None = None) -> Verdict:
    """Whether runs may be joined along the first axis of every input that has one.

    `sizes` are the open sides that the session fixes, by name. An input that an initializer stands for is a constant:
    who gives one has runs of his own. The weights need not be loaded.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [_port(found, sizes or {}) for found in model.graph.input if found.name not in constants]
    outputs = [_port(found, sizes or {}) for found in model.graph.output]
    refused = _unfit(inputs, outputs)
    if refused is not None:
        return Verdict(Proof.DISPROVEN, refused)
    oldest = min((found.version for found in model.opset_import if found.domain in ("", "ai.onnx")), default=OLDEST)
    if oldest < OLDEST:
        return Verdict(Proof.UNKNOWN, f"its operator set {oldest} is older than {OLDEST}, the first that the table has")
    walk = Walk(model)
    try:
        found = walk.outputs(model.graph, {port.name: _given(port) for port in inputs})
    except TooLargeError as error:
        return Verdict(Proof.UNKNOWN, f"the graph is not followed: {error}")
    except (ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # ONNX Runtime accepts graphs that are not quite as the standard has them.
        return Verdict(Proof.UNKNOWN, f"the graph is not followed: {type(error).__name__} {error}")
    judged = _judged({port.name: found.get(port.name) for port in outputs})
    return replace(judged, largest_elements=walk.largest_elements)


@dataclass(frozen=True, slots=True)
class _Port:
    """An input or output as the graph declares it; a side is None where it is open, the shape where it is left out."""

    name: str
    is_tensor: bool
    shape: tuple[int | None, ...] | None


def _port(declared: ValueInfoProto, sizes: Mapping[str, int]) -> _Port:
    if not declared.type.HasField("tensor_type"):
        return _Port(declared.name, False, None)
    tensor = declared.type.tensor_type
    if not tensor.HasField("shape"):
        return _Port(declared.name, True, None)
    sides = [
        side.dim_value if side.HasField("dim_value") and side.dim_value >= 0 else sizes.get(side.dim_param)
        for side in tensor.shape.dim
    ]
    return _Port(declared.name, True, tuple(sides))


def _unfit(inputs: Sequence[_Port], outputs: Sequence[_Port]) -> str | None:
    """Why the inputs and outputs, as they are declared, cannot be parted by rows."""
    for port in [*inputs, *outputs]:
        if not port.is_tensor:
            return f"{port.name} is no tensor, and is not parted by rows"
    for port in inputs:
        if port.shape is None:
            return f"{port.name} declares no shape"
    rows = [port for port in inputs if port.shape]
    if not rows:
        return "no input has an axis"
    for port in [*rows, *outputs]:
        if port.shape is not None and (not port.shape or port.shape[0] is not None):
            return f"{port.name} has no open first axis"
    return None


def _given(port: _Port) -> Value:
    if not port.shape:
        return Value(FREE, ())
    sides = [symbol(f"{port.name}.{at}") if side is None else side for at, side in enumerate(port.shape)]
    return Value(ROWS, (ONE_EACH, *sides[1:]), 0)


def _judged(outputs: dict[str, Value | None]) -> Verdict:
    doubt: Because | None = None
    for name, value in outputs.items():
        if value is not None and value.kind is MIXED and value.because is not None:
            return _against(Proof.DISPROVEN, value.because)
        if value is None or value.kind is UNKNOWN:
            doubt = doubt or (value.because if value else None) or Because("", "", f"nothing is known of {name}")
        elif value.kind is not ROWS or value.axis != 0 or value.outer != 1 or value.shape is None:
            return Verdict(Proof.DISPROVEN, f"{name} does not have the rows along its first axis")
        elif value.shape[0] != ONE_EACH:
            return Verdict(Proof.DISPROVEN, f"{name} does not have a row for each row of the inputs")
        else:
            doubt = doubt or value.because
    if doubt is not None:
        return _against(Proof.UNKNOWN, doubt)
    return Verdict(Proof.PROVEN, "no operator lets rows touch each other")


def _against(proof: Proof, because: Because) -> Verdict:
    said = f"{because.operator} {because.node!r}: {because.reason}" if because.operator else because.reason
    return Verdict(proof, said, because.node, because.operator)
