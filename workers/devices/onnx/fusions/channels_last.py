"""Transpositions between channels first and channels last, taken out where what lies between them does not care.

A value may have a twin: the same tensor with its channels last. A node whose inputs have twins is done once more on
them, and gives a twin; what still reads channels first reads a transposition, which goes where nothing does.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from workers.devices.onnx.fusions.matching import constant_of, new_node, replace, sides, transposed
from workers.devices.onnx.fusions.rules import TO_FIRST, TO_LAST

#: What is done to each number by itself.
_EACH = frozenset({"Add", "Sub", "Mul", "Div", "Sigmoid", "Relu", "Tanh"})


def spread(graph: ir.Graph) -> None:
    """Moves the graph to channels last from the nodes that are there already, in place."""
    twins: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.domain or not node.inputs or node.inputs[0] is None:
            continue
        if node.op_type == "Transpose":
            _noted(node, twins)
        elif node.op_type == "Shape" and node.inputs[0] in twins and not node.attributes:
            shape = new_node(node, "Shape", [twins[node.inputs[0]]]).outputs[0]
            order = new_node(node, "Constant", [], value=ir.tensor(np.array(TO_FIRST, np.int64))).outputs[0]
            replace(node.outputs[0], new_node(node, "Gather", [shape, order], axis=0).outputs[0])
        else:
            made = _done_last(node, twins)
            if made is not None:
                made.type = node.outputs[0].type
                made.shape = _turned(node.outputs[0])
                first = transposed(node, made, TO_FIRST)
                replace(node.outputs[0], first)
                twins[first] = made


def _noted(node: ir.Node, twins: dict[ir.Value, ir.Value]) -> None:
    given, made = node.inputs[0], node.outputs[0]
    perm = tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()
    if given is None or made.is_graph_output() or given.is_initializer():
        return
    if perm == TO_FIRST:
        twins[made] = given
    elif perm == TO_LAST and given in twins:
        replace(made, twins[given])
    elif perm == TO_LAST:
        twins[given] = made


def _done_last(node: ir.Node, twins: dict[ir.Value, ir.Value]) -> ir.Value | None:
    """The twin of the node's result, made from its inputs' twins."""
    if node.outputs[0].is_graph_output() or not any(one in twins for one in node.inputs if one is not None):
        return None
    if node.op_type in _EACH:
        given = [_last(node, one, twins) for one in node.inputs]
        if all(one is not None for one in given):
            return new_node(node, node.op_type, given).outputs[0]
    elif node.op_type == "Concat" and node.attributes["axis"].as_int() == 1:
        if all(one in twins for one in node.inputs if one is not None):
            last = [twins[one] for one in node.inputs if one is not None]
            return new_node(node, "Concat", last, axis=3).outputs[0]
    elif node.op_type == "Resize" and len(node.inputs) == 3 and node.attributes.get_string("mode", "") == "nearest":
        scales, given_twin = constant_of(node.inputs[2]), twins.get(node.inputs[0])  # type: ignore[arg-type]
        if scales is not None and scales.size == 4 and given_twin is not None and "axes" not in node.attributes:
            turned = ir.tensor(scales.reshape(-1)[list(TO_LAST)].astype(np.float32))
            order = new_node(node, "Constant", [], value=turned).outputs[0]
            made = ir.Node("", "Resize", [given_twin, None, order], attributes=list(node.attributes.values()))
            assert node.graph is not None
            node.graph.insert_before(node, made)
            return made.outputs[0]
    return None


def _last(node: ir.Node, value: ir.Value | None, twins: dict[ir.Value, ir.Value]) -> ir.Value | None:
    """An operand with its channels last: its twin, itself where it is one number, or a small tensor transposed."""
    if value is None or value in twins:
        return None if value is None else twins[value]
    known = sides(value)
    if value.shape is not None and (not known or known == [1]):
        return value
    return transposed(node, value, TO_LAST) if len(known) == 4 and known[2:] == [1, 1] else None


def _turned(value: ir.Value) -> ir.Shape | None:
    if value.shape is None or len(value.shape) != 4:
        return None
    return ir.Shape([value.shape[axis] for axis in TO_LAST])
