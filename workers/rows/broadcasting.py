"""Tensors put against each other element by element, from their last axes on, and tensors of which either may come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workers.rows.node import Node
from workers.rows.sizes import Dim, either, opaque_side
from workers.rows.values import FREE, MIXED, POSITIONS, ROWS, SIZE, UNKNOWN, Because, Dependence, Shape, Value

Side = Callable[[Dim, Dim], Dim]


def broadcast(node: Node, values: Sequence[Value]) -> Value:
    """What an operator gives that takes tensors of every shape that broadcasts, element by element."""
    worst = max([value.kind for value in values])
    shape = broadcast_shape([value.shape for value in values])
    if worst is FREE:
        return Value(FREE, shape, because=node.doubt)
    if worst is ROWS or worst is POSITIONS:
        return _rows(node, values, shape)
    if worst is SIZE:
        return Value(SIZE, shape, because=node.doubt)
    return Value(worst, shape, because=next(value.because for value in values if value.kind is worst))


def _rows(node: Node, values: Sequence[Value], shape: Shape | None) -> Value:
    """The rows' axis is the same in all that carry rows, and meets nothing else but a side of 1."""
    if shape is None:
        return node.unknown("the shape of an input is not known")
    rank = len(shape)
    axis, outer = -1, 1  # type: int, Dim
    for value in values:
        if value.kind is SIZE or value.kind is POSITIONS:
            return node.mixed("the number of rows, or where a row lies, enters its values", shape)
        if value.kind is ROWS:
            assert value.shape is not None
            here = rank - len(value.shape) + value.axis
            if axis < 0:
                axis, outer = here, value.outer
            elif here != axis:
                return node.mixed("the rows of one input meet another axis of the rows of the other", shape)
            elif outer != value.outer:
                return node.unknown("the rows of its inputs may be interleaved differently", shape)
    for value in values:
        if value.kind is FREE and value.shape is not None:
            at = axis - rank + len(value.shape)
            side = value.shape[at] if at >= 0 else 1
            if side != 1:
                return pinned(node, side, shape)
    return node.give(shape, axis, outer)


def pinned(node: Node, side: Dim, shape: Shape | None = None) -> Value:
    """A side that does not grow with the rows lies along the rows' axis."""
    if isinstance(side, int):
        return node.mixed(f"a fixed side of {side} lies along the rows", shape)
    return node.unknown("a side that does not grow with the rows lies along them", shape)


def broadcast_shape(shapes: Sequence[Shape | None], side: Side = either) -> Shape | None:
    """The shape of all together; None where one has a rank that is not known."""
    result: Shape = ()
    for shape in shapes:
        if shape is None:
            return None
        if not result or result == shape:
            result = shape or result
        elif shape:
            longer, shorter = (result, shape) if len(result) >= len(shape) else (shape, result)
            lead = len(longer) - len(shorter)
            result = longer[:lead] + tuple(map(side, longer[lead:], shorter))
    return result


def merged(node: Node, a: Value, b: Value) -> Value:
    """What is known of a tensor that is either `a` or `b`, and which one does not depend on the rows."""
    if a == b:
        return a
    because = a.because or b.because
    worst: Dependence = max(a.kind, b.kind)
    if worst is MIXED or worst is UNKNOWN:
        return Value(worst, None, because=next(v.because for v in (a, b) if v.kind is worst))
    shape = _same_rank(a.shape, b.shape)
    if worst is FREE or worst is SIZE:
        return Value(worst, shape, because=because)
    if a.kind is not b.kind or shape is None:
        return node.unknown("only one of its ways carries the rows on")
    if (a.axis, a.outer, a.component) != (b.axis, b.outer, b.component):
        return node.unknown("its ways carry the rows on along different axes")
    assert a.shape is not None
    assert b.shape is not None
    if a.shape[a.axis] != b.shape[b.axis]:
        return node.unknown("its ways give different numbers of each row")
    return Value(worst, shape, a.axis, a.outer, because=because, component=a.component)


def _same_rank(a: Shape | None, b: Shape | None) -> Shape | None:
    if a is None or b is None or len(a) != len(b):
        return None
    return tuple([one if one == other else opaque_side() for one, other in zip(a, b, strict=True)])


def with_doubt(value: Value, doubt: Because | None) -> Value:
    """The same with a doubt, where it has none."""
    return value if doubt is None or value.because is not None else value._replace(because=doubt)
