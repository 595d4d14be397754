"""Reading and changing a graph of `onnx_ir`: who makes a value and who reads it, what is constant, new nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from workers.devices.arrays import Array


def new_node(
    before: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    *,
    domain: str = "",
    outputs: int = 1,
    **attributes: object,
) -> ir.Node:
    """A node put in front of another."""
    made = ir.node(kind, inputs, attributes=attributes or None, domain=domain, num_outputs=outputs)  # type: ignore[arg-type]
    assert before.graph is not None
    before.graph.insert_before(before, made)
    return made


def transposed(before: ir.Node, value: ir.Value, perm: Sequence[int]) -> ir.Value:
    """`value` transposed by a node in front of another, with what is known of its shape."""
    made = new_node(before, "Transpose", [value], perm=list(perm)).outputs[0]
    made.type = value.type
    if value.shape is not None and len(value.shape) == len(perm):
        made.shape = ir.Shape([value.shape[axis] for axis in perm])
    return made


def replace(old: ir.Value, new: ir.Value) -> None:
    """Gives every reader of `old` the value `new`, which has its type and shape."""
    new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new)


def constant_of(value: ir.Value | None) -> Array | None:
    """What a value is in every run; None where that depends on inputs, or is more than a small tensor."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size > 1 << 16 else np.asarray(tensor.numpy())


def number(value: ir.Value | None) -> float | None:
    """The one number that a constant is."""
    found = constant_of(value)
    return float(found.reshape(-1)[0]) if found is not None and found.size == 1 else None


def sides(value: ir.Value | None) -> list[int | None]:
    """The sides of a tensor, None for one that is not fixed; empty where even their count is not known."""
    if value is None or value.shape is None:
        return []
    return [side if isinstance(side, int) else None for side in value.shape]


def computed(value: ir.Value | None, depth: int = 0) -> Array | None:
    """A constant, or what follows from the fixed sides of tensors alone; NaN stands for what does not."""
    found = constant_of(value)
    if found is not None or value is None or depth > 12:
        return None if found is None else found.astype(np.float64)
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Shape" and not node.attributes:
        known = sides(node.inputs[0])
        return np.array([math.nan if side is None else side for side in known]) if known else None
    given = [computed(one, depth + 1) for one in node.inputs]
    if not given or any(one is None for one in given):
        return None
    whole = value.dtype is not None and value.dtype.is_integer()
    return _calculated(node.op_type, [one for one in given if one is not None], whole=whole)


def _calculated(kind: str, given: list[Array], *, whole: bool) -> Array | None:
    with np.errstate(all="ignore"):
        match kind, given:
            case (("Cast" | "Unsqueeze" | "Squeeze"), [one, *_]):
                return one.reshape(-1) if kind == "Unsqueeze" else one
            case "Sqrt", [one]:
                return np.asarray(np.sqrt(one))
            case "Div", [one, other]:
                return np.asarray(np.floor(one / other) if whole else one / other)
            case "Mul", [one, other]:
                return np.asarray(one * other)
            case "Add", [one, other]:
                return np.asarray(one + other)
            case "Gather", [one, at] if not np.isnan(at).any():
                return np.asarray(one[at.astype(np.int64)])
            case "Slice", [one, start, end] if one.ndim == 1 and not np.isnan([start, end]).any():
                return np.asarray(one[int(start[0]) : int(min(end[0], one.size))])
            case "Concat", [*_]:
                return np.asarray(np.concatenate([one.reshape(-1) for one in given]))
    return None


def made_by(value: ir.Value | None, kind: str, *, alone: bool = True) -> ir.Node | None:
    """The node of this kind that gives `value`; `alone` wants one reader of it."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != kind or node.domain:
        return None
    return node if not alone or kind in ("Slice", "Transpose", "Reshape") or read_once(value) else None


def read_by(value: ir.Value, kind: str) -> ir.Node | None:
    """The only reader of `value`, where it is of this kind."""
    readers = list(value.uses())
    if len(readers) != 1 or value.is_graph_output() or readers[0].node.op_type != kind or readers[0].node.domain:
        return None
    return readers[0].node


def read_once(value: ir.Value) -> bool:
    """Whether one node reads a value, besides those that ask for its shape."""
    return not value.is_graph_output() and sum(use.node.op_type != "Shape" for use in value.uses()) == 1


def other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input of a node of two that is not `value`."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def biased(added: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """What is added to, and the bias of one axis that is added."""
    for at in (0, 1):
        bias, product = added.inputs[at], added.inputs[1 - at]
        if bias is not None and bias.is_initializer() and len(sides(bias)) == 1 and len(sides(product)) == 3:
            return product, bias
    return None, None


def perm_of(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()


def known_as(made: ir.Value, other: ir.Value, perm: Sequence[int]) -> None:
    made.type = other.type
    if other.shape is not None and len(other.shape) == len(perm):
        made.shape = ir.Shape([other.shape[axis] for axis in perm])


def initializer(near: ir.Node, values: Array) -> ir.Value:
    graph = near.graph
    assert graph is not None
    name = f"{near.outputs[0].name}_fused_{len(graph.initializers)}"
    tensor = ir.tensor(values, name=name)
    made = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(made)  # type: ignore[union-attr, unused-ignore]
    return made
