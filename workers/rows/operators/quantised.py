"""Quantisation of the default domain. That of a whole batch at once is a doubt: a row then meets another scale."""

from __future__ import annotations

from workers.rows.broadcasting import broadcast, pinned
from workers.rows.node import Answer, Node, rule
from workers.rows.values import FREE, ROWS, Value

#: Said of every operator that finds its scale in the batch.
DYNAMIC = "it quantises the batch as a whole"


@rule("DynamicQuantizeLinear")
def _dynamic(node: Node) -> Answer:
    value = node.first
    if value.kind is FREE:
        return [node.give(value.shape), node.give(()), node.give(())]
    same = node.give(value.shape, value.axis, value.outer)
    return [node.doubted(found, DYNAMIC) for found in (same, node.give(()), node.give(()))]


@rule("QuantizeLinear", "DequantizeLinear")
def _scaled(node: Node) -> Value:
    value, scales = node.first, [found for index in (1, 2) if (found := node.input(index)) is not None]
    if value.kind is FREE:
        return node.give(value.shape) if all(scale.kind is FREE for scale in scales) else node.unknown("of the rows")
    assert value.shape is not None
    axis = node.number("axis", 1)
    for scale in scales:
        if scale.shape is None:
            return node.unknown("the shape of its scale is not known", value.shape)
        if scale.kind is FREE and all(dim == 1 for dim in scale.shape):
            continue
        if len(scale.shape) != 1:
            return _blockwise(node, value, scale)
        at = axis % len(value.shape)
        if scale.kind is FREE and at == value.axis:
            return pinned(node, scale.shape[0], value.shape)
        if scale.kind is ROWS and (at != value.axis or (scale.outer, value.outer) != (1, 1)):
            return node.mixed("its scales are of the rows, and lie along another axis", value.shape)
    return node.give(value.shape, value.axis, value.outer)


def _blockwise(node: Node, value: Value, scale: Value) -> Value:
    """Scales of as many axes as the tensor has, one for each block along one of them."""
    assert value.shape is not None
    assert scale.shape is not None
    if len(scale.shape) != len(value.shape) or node.number("axis", 1) % len(value.shape) == value.axis:
        return node.unknown("its scales do not fit the rows for certain", value.shape)
    if scale.kind is FREE:
        return pinned(node, scale.shape[value.axis], value.shape)
    return value if broadcast(node, [value, scale]).kind is ROWS else node.unknown("its scales are not its rows' own")
