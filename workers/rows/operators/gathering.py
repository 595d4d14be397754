"""Operators that read from places, or put values into places, which indices name."""

from __future__ import annotations

from collections.abc import Sequence

from workers.rows.broadcasting import pinned
from workers.rows.node import Node, rule
from workers.rows.operators.shapes import refusal
from workers.rows.sizes import opaque_side
from workers.rows.values import (
    FREE,
    MIXED,
    POSITIONS,
    ROWS,
    SIZE,
    UNKNOWN,
    Shape,
    Value,
    items_of,
    known,
    numbers,
    whole,
)

_ALONG = "it reads, or puts values, along the rows"


@rule("Gather", all_kinds=True)
def _gather(node: Node) -> Value:
    data, index = node.first, node.input(1)
    if index is None or index.kind in (UNKNOWN, MIXED) or data.kind in (UNKNOWN, MIXED):
        worst = data if index is None else max(data, index, key=lambda value: value.kind)
        return Value(worst.kind, None, because=worst.because)
    if data.shape is None or index.shape is None:
        if max(data.kind, index.kind) <= SIZE:
            return Value(max(data.kind, index.kind), None, because=node.doubt)
        return node.unknown("a shape is not known")
    axis = node.number("axis", 0) % (len(data.shape) or 1)
    shape = (*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])
    if data.kind <= SIZE and index.kind <= SIZE:
        items, chosen = items_of(data) if len(data.shape) == 1 else None, known(index)
        if items is not None and chosen is not None and all(-len(items) <= at < len(items) for at in chosen):
            return numbers(tuple([items[at] for at in chosen]), index.shape, node.doubt)
        return Value(max(data.kind, index.kind), shape, because=node.doubt)
    if data.kind is POSITIONS or data.kind is SIZE or index.kind is SIZE or index.component is not None:
        return node.mixed("the number of rows, or where a row lies, enters its values", shape)
    if index.kind is POSITIONS:
        same = data.kind is ROWS and data.axis == axis and data.outer == 1 and index.shape == (data.shape[axis],)
        return node.give(shape, axis) if same else node.mixed("a table is read by where a row lies", shape)
    if data.kind is ROWS and axis == data.axis:
        return node.mixed(_ALONG, shape)
    if data.kind is ROWS:
        if index.kind is ROWS:
            return node.mixed("every row is read by every other's index", shape)
        return node.give(shape, data.axis + (len(index.shape) - 1 if data.axis > axis else 0), data.outer)
    return node.give(shape, axis + index.axis, index.outer)


@rule("GatherElements")
def _gather_elements(node: Node) -> Value:
    data, index = node.first, node.input(1)
    assert index is not None
    if data.kind is FREE and index.kind is FREE:
        return node.give(index.shape)
    if data.shape is None or index.shape is None:
        return node.unknown("a shape is not known")
    axis = node.number("axis", 0) % (len(data.shape) or 1)
    if data.kind is FREE:
        return (
            node.give(index.shape, index.axis, index.outer)
            if axis == index.axis
            else pinned(node, data.shape[index.axis], index.shape)
        )
    if axis == data.axis:
        return node.mixed(_ALONG, index.shape)
    if index.kind is FREE:
        return pinned(node, index.shape[data.axis], index.shape)
    return aligned_rows(node, [data, index], index.shape)


def aligned_rows(node: Node, values: Sequence[Value], shape: Shape | None) -> Value:
    """The answer where all inputs carry rows alike, none of them broadcast; `shape` is the answer's."""
    first = values[0]
    for value in values:
        if value.kind is not ROWS or value.axis != first.axis:
            return node.mixed("the rows of one input meet another axis of the rows of the other", shape)
        if value.outer != first.outer or value.shape is None or first.shape is None:
            return node.unknown("the rows of its inputs may be interleaved differently", shape)
        if value.shape[value.axis] != first.shape[first.axis]:
            return node.unknown("its inputs may have different numbers of each row", shape)
    return node.give(shape, first.axis, first.outer)


@rule("GatherND", all_kinds=True)
def _gather_nd(node: Node) -> Value:
    data, index = node.first, node.input(1)
    if index is None or index.kind in (UNKNOWN, MIXED) or data.kind not in (FREE, ROWS):
        refused = refusal(node, arguments=(1,))
        return node.unknown("an input is missing") if refused is None else refused
    if data.shape is None or index.shape is None or not index.shape or not isinstance(index.shape[-1], int):
        if data.kind is FREE and index.kind is FREE:
            return Value(FREE, None, because=node.doubt)
        return node.unknown("a shape is not known")
    batch, depth = node.number("batch_dims", 0), index.shape[-1]
    shape = (*index.shape[:-1], *data.shape[batch + depth :])
    if index.kind is SIZE:
        return node.mixed("a table is read by the number of rows", shape)
    if data.kind is FREE and index.kind is FREE:
        return node.give(shape)
    if index.kind is POSITIONS:
        same = data.kind is ROWS and data.outer == 1 and batch == 0 and index.component == data.axis
        same = same and index.axis >= 0 and index.shape[index.axis] == data.shape[data.axis]
        return node.give(shape, index.axis) if same else node.mixed("a table is read by where a row lies", shape)
    if index.kind is FREE:
        if data.axis < batch + depth:
            return node.mixed(_ALONG, shape) if data.axis >= batch else pinned(node, index.shape[data.axis], shape)
        return node.give(shape, data.axis - batch - depth + len(index.shape) - 1, data.outer)
    if index.axis == len(index.shape) - 1:
        return node.mixed(_ALONG, shape)
    if data.kind is FREE:
        return (
            node.give(shape, index.axis, index.outer)
            if index.axis >= batch
            else pinned(node, data.shape[index.axis], shape)
        )
    if index.axis < batch and data.axis == index.axis:
        return aligned_rows(node, [index, data], shape)
    return node.mixed(_ALONG, shape)


@rule("ScatterElements", "Scatter")
def _scatter_elements(node: Node) -> Value:
    values = [value for value in node.inputs if value is not None]
    data = values[0]
    if all(value.kind is FREE for value in values):
        return node.give(data.shape)
    rows = next(value for value in values if value.kind is ROWS)
    assert rows.shape is not None
    if node.number("axis", 0) % len(rows.shape) == rows.axis:
        return node.mixed(_ALONG, data.shape)
    for value in values:
        if value.kind is FREE:
            return pinned(node, 1 if value.shape is None else value.shape[rows.axis], data.shape)
    return aligned_rows(node, values, data.shape)


@rule("ScatterND", all_kinds=True)
def _scatter_nd(node: Node) -> Value:
    data, index, updates = node.first, node.input(1), node.input(2)
    if index is None or updates is None or index.kind in (UNKNOWN, MIXED):
        refused = refusal(node, arguments=(1,))
        return node.unknown("an input is missing") if refused is None else refused
    refused = refusal(node, data=(0, 2))
    if refused is not None:
        return refused
    if all(value.kind is FREE for value in (data, index, updates)):
        return node.give(data.shape)
    if data.shape is None or index.shape is None or updates.shape is None or not index.shape:
        return node.unknown("a shape is not known")
    if index.kind is POSITIONS:
        same = data.kind is ROWS and data.outer == 1 and index.component == data.axis
        same = same and updates.kind is ROWS and updates.outer == 1 and updates.axis == index.axis
        same = same and index.shape[index.axis] == data.shape[data.axis] == updates.shape[updates.axis]
        return node.give(data.shape, data.axis) if same else node.mixed(_ALONG, data.shape)
    depth = index.shape[-1]
    if index.kind is FREE and isinstance(depth, int) and data.kind is ROWS and data.axis >= depth:
        at = data.axis - depth + len(index.shape) - 1
        if updates.kind is ROWS and updates.axis == at and updates.outer == data.outer:
            return node.give(data.shape, data.axis, data.outer)
    return node.mixed(_ALONG, data.shape)


@rule("OneHot")
def _one_hot(node: Node) -> Value:
    index, depth = node.first, whole(node.input(1))
    if not node.free(1, 2):
        return node.mixed("its depth or values come from the rows")
    if index.shape is None:
        return Value(FREE, None, because=node.doubt)
    axis = node.number("axis", -1) % (len(index.shape) + 1)
    side = depth[0] if depth else opaque_side()
    shape = (*index.shape[:axis], side, *index.shape[axis:])
    return node.give(shape, index.axis + (axis <= index.axis) if index.axis >= 0 else -1, index.outer)
