"""Operators that make or repeat a tensor to a shape that is given by its numbers."""

from __future__ import annotations

from workers.rows.broadcasting import broadcast_shape, pinned
from workers.rows.node import Node, rule
from workers.rows.operators.shapes import refusal, shaped_by_rows
from workers.rows.sizes import Size, counts_rows, of_rows, opaque, opaque_side, plus, product_of, times
from workers.rows.values import (
    FREE,
    MIXED,
    MOST_ITEMS,
    POSITIONS,
    SIZE,
    UNKNOWN,
    Shape,
    Value,
    items_of,
    whole,
)


@rule("Expand", all_kinds=True)
def _expand(node: Node) -> Value:
    target = node.input(1)
    asked = whole(target)
    if target is None or target.kind > SIZE:
        return shaped_by_rows(node, target or node.first)
    value = node.first
    asked = None if asked is None else tuple(1 if dim == -1 else dim for dim in asked)
    if asked is None or value.shape is None:
        if value.kind is FREE and target.kind is FREE:
            return Value(FREE, None, because=node.doubt)
        return node.unknown("the shape asked for is computed in a way that is not followed")
    shape = broadcast_shape([value.shape, asked])
    assert shape is not None
    if value.kind in (UNKNOWN, MIXED):
        return Value(value.kind, shape, because=value.because)
    return _spread(node, value, asked, shape)


def _spread(node: Node, value: Value, asked: Shape, shape: Shape) -> Value:
    assert value.shape is not None
    rank = len(shape)
    axes = [index for index, dim in enumerate(shape) if of_rows(dim)]
    if value.axis < 0:
        if len(axes) > 1 or (axes and not counts_rows(shape[axes[0]])) or (axes and value.kind is SIZE):
            return node.mixed("the rows run along two of its axes", shape)
        if not axes:
            count = shape[0] if len(shape) == 1 else 0
            items = items_of(value) if isinstance(count, int) and 0 < count <= MOST_ITEMS else None
            repeated = items * int(str(count)) if items is not None and len(items) == 1 else None
            return Value(value.kind, shape, -1, 1, repeated, node.doubt)
        at = axes[0] - rank + len(value.shape)
        if at >= 0 and value.shape[at] != 1:
            return pinned(node, value.shape[at], shape)
        return node.give(shape, axes[0])
    axis = value.axis + rank - len(value.shape)
    along = asked[axis - rank + len(asked)] if axis - rank + len(asked) >= 0 else 1
    if along not in (1, value.shape[value.axis]):
        return pinned(node, along, shape) if not of_rows(along) else node.unknown("rows are repeated", shape)
    if [index for index in axes if index != axis]:
        return node.mixed("the rows run along two of its axes", shape)
    if value.component is not None and axis == rank - 1:
        return node.mixed("the number of rows, or where a row lies, enters its values", shape)
    return value._replace(shape=shape, axis=axis)


@rule("ConstantOfShape", all_kinds=True)
def _constant_of_shape(node: Node) -> Value:
    target = node.first
    if target.kind > SIZE:
        return shaped_by_rows(node, target)
    asked = whole(target)
    if asked is None:
        if target.kind is FREE:
            count = target.shape[0] if target.shape else None
            shape = tuple(opaque_side() for _ in range(count)) if isinstance(count, int) and count < 32 else None
            return Value(FREE, shape, because=node.doubt)
        return node.unknown("the shape asked for is computed in a way that is not followed")
    axes = [index for index, dim in enumerate(asked) if of_rows(dim)]
    if len(axes) > 1:
        return node.mixed("the rows run along two of its axes", asked)
    if axes:
        return node.give(asked, axes[0])
    made = Value(FREE, asked, because=node.doubt)
    if len(asked) > 1 or not all(isinstance(dim, int) and 0 <= dim <= MOST_ITEMS for dim in asked):
        return made
    filled = node.attribute("value")
    items = (0,) if filled is None else items_of(Value(FREE, (1,), tensor=filled.t))
    return made if not items else made._replace(items=items * int(str(product_of(asked))))


@rule("Range", all_kinds=True)
def _range(node: Node) -> Value:
    worst = max((value for value in node.inputs if value is not None), key=lambda value: value.kind)
    if worst.kind > SIZE:
        return shaped_by_rows(node, worst)
    found = [items_of(value) for value in node.inputs]
    start, limit, step = [items[0] if items is not None and len(items) == 1 else None for items in found]
    if worst.kind is SIZE:
        if start == 0 and step == 1 and isinstance(limit, Size) and counts_rows(limit):
            return Value(POSITIONS, (limit,), 0, because=node.doubt)
        return node.mixed("it counts up to a number computed from how many rows there are")
    if isinstance(start, int) and isinstance(limit, int) and isinstance(step, int) and step:
        made = range(start, limit, step)
        if len(made) <= MOST_ITEMS:
            return Value(FREE, (len(made),), -1, 1, tuple(made), node.doubt)
        return Value(FREE, (len(made),), because=node.doubt)
    simple = step == 1 and start is not None and isinstance(limit, int | Size) and not isinstance(start, float)
    side = plus(limit, start, -1) if simple else opaque()  # type: ignore[arg-type]
    return Value(FREE, (side,), because=node.doubt)


@rule("Tile", all_kinds=True)
def _tile(node: Node) -> Value:
    refused = refusal(node, arguments=(1,))
    if refused is not None:
        return refused
    value, times_each = node.first, whole(node.input(1))
    if value.shape is None or times_each is None or len(times_each) != len(value.shape):
        if value.kind is FREE:
            return Value(FREE, None, because=node.doubt)
        return node.unknown("it is not known how often each axis is repeated")
    shape = tuple(times(dim, often) for dim, often in zip(value.shape, times_each, strict=True))
    if value.kind is FREE:
        axes = [index for index, often in enumerate(times_each) if of_rows(often)]
        return node.mixed("the rows run along two of its axes", shape) if len(axes) > 1 else node.give(shape, *axes)
    return node.give(shape, value.axis, times(value.outer, times_each[value.axis]))
