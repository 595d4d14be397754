"""Operators that ask for a shape, or give a tensor another one; what they do to the rows' axis."""

from __future__ import annotations

from workers.rows.node import Node, rule
from workers.rows.sizes import Dim, Size, counts_rows, of_rows, opaque_side, over, product_of, times
from workers.rows.values import (
    FREE,
    MIXED,
    MOST_ITEMS,
    POSITIONS,
    ROWS,
    SIZE,
    UNKNOWN,
    Item,
    Shape,
    Value,
    items_of,
    known,
    numbers,
    whole,
)


@rule("Shape", all_kinds=True)
def _shape(node: Node) -> Value:
    value = node.first
    if value.shape is None:
        return _of_unknown_shape(node, value)
    shape = value.shape[_bounds(node, len(value.shape))]
    return numbers(tuple(shape), because=node.doubt)


@rule("Size", all_kinds=True)
def _size(node: Node) -> Value:
    value = node.first
    return _of_unknown_shape(node, value) if value.shape is None else numbers((product_of(value.shape),), ())


def _of_unknown_shape(node: Node, value: Value) -> Value:
    return value if value.kind in (UNKNOWN, MIXED) else Value(value.kind, None, because=node.doubt)


def _bounds(node: Node, rank: int) -> slice:
    end = node.attribute("end")
    return slice(node.number("start", 0), rank if end is None else int(end.i))


@rule("Reshape", all_kinds=True)
def _reshape(node: Node) -> Value:
    target = node.input(1)
    asked = node.numbers("shape") if target is None else whole(target)
    if target is not None and target.kind > SIZE:
        return shaped_by_rows(node, target)
    if asked is None:
        rank = target.shape[0] if target is not None and target.shape else None
        if node.first.kind is FREE and (target is None or target.kind is FREE):
            free = tuple(opaque_side() for _ in range(rank)) if isinstance(rank, int) and rank <= MOST_ITEMS else None
            return Value(FREE, free, because=node.doubt)
        return node.unknown("the shape asked for is computed in a way that is not followed")
    return reshaped(node, node.first, list(asked), allow_zero=bool(node.number("allowzero", 0)))


def refusal(node: Node, arguments: tuple[int, ...] = (), data: tuple[int, ...] = (0,)) -> Value | None:
    """The answer where the data are neither FREE nor ROWS, or an argument is computed from what the rows hold."""
    for index in arguments:
        argument = node.input(index)
        if argument is not None and argument.kind > SIZE:
            return shaped_by_rows(node, argument)
    for index in data:
        value = node.input(index)
        if value is not None and value.kind not in (FREE, ROWS):
            if value.kind in (UNKNOWN, MIXED):
                return Value(value.kind, None, because=value.because)
            return node.mixed("the number of rows, or where a row lies, enters its values")
    return None


def shaped_by_rows(node: Node, target: Value) -> Value:
    """The answer where a shape or an index is not FREE or SIZE."""
    if target.kind in (UNKNOWN, MIXED):
        return Value(target.kind, None, because=target.because)
    return node.mixed("a shape or index is computed from what the rows hold")


@rule("Flatten")
def _flatten(node: Node) -> Value:
    value = node.first
    if value.shape is None:
        return Value(FREE, (opaque_side(), opaque_side()), because=node.doubt)
    axis = node.number("axis", 1)
    axis += len(value.shape) if axis < 0 else 0
    return reshaped(node, value, [product_of(value.shape[:axis]), product_of(value.shape[axis:])], allow_zero=True)


def reshaped(node: Node, value: Value, asked: list[Dim], *, allow_zero: bool) -> Value:
    """A reshape to `asked`, which may hold one -1, and 0 for a side that stays unless `allow_zero`."""
    known_shape = value.shape
    for index, dim in enumerate(asked):
        if dim == 0 and not allow_zero:
            asked[index] = opaque_side() if known_shape is None else known_shape[index]
    if -1 in asked and known_shape is not None:
        _infer(asked, known_shape)
    shape = tuple(opaque_side() if dim == -1 else dim for dim in asked)
    if value.kind is FREE and not any(of_rows(dim) for dim in shape):
        return Value(FREE, shape, -1, 1, _still(value, shape), node.doubt, tensor=value.tensor)
    if value.kind is SIZE and not any(of_rows(dim) for dim in shape):
        return Value(SIZE, shape, -1, 1, _still(value, shape), node.doubt)
    if value.kind in (UNKNOWN, MIXED):
        return Value(value.kind, shape, because=value.because)
    if value.kind not in (ROWS, POSITIONS) or value.component is not None:
        return node.mixed("a tensor is shaped by the number of rows", shape)
    return _rows_reshaped(node, value, shape)


def _infer(asked: list[Dim], given: Shape) -> None:
    """Puts what is left over in place of -1."""
    at = asked.index(-1)
    total, others = product_of(given), product_of([dim for index, dim in enumerate(asked) if index != at])
    left = over(total, others)
    if left is not None:
        asked[at] = left
    else:
        # What does not divide for certain: of the rows, it only stays theirs where they cancel out.
        asked[at] = opaque_side(_rows_in(total) != _rows_in(others))


def _rows_in(dim: Dim) -> int:
    return dim.symbols.count("rows") if isinstance(dim, Size) else 0


def _still(value: Value, shape: Shape) -> tuple[Item, ...] | None:
    return items_of(value) if len(shape) <= 1 else value.items


def _rows_reshaped(node: Node, value: Value, shape: Shape) -> Value:
    """The rows stay one block behind another where a side of the new shape begins no later than they do."""
    assert value.shape is not None
    axes = [index for index, dim in enumerate(shape) if of_rows(dim)]
    if not axes:
        return node.mixed(f"it makes [{', '.join(map(str, shape))}] of all rows together", shape)
    axis = axes[0]
    if len(axes) > 1 or not counts_rows(shape[axis]):
        return node.unknown("it is not certain that each row fills whole parts of the new shape", shape)
    before = times(product_of(value.shape[: value.axis]), value.outer)
    outer = over(before, product_of(shape[:axis]))
    if outer is None:
        if isinstance(before, int) and isinstance(product_of(shape[:axis]), int):
            return node.mixed("it lays parts of several rows into one", shape)
        return node.unknown("it is not certain that each row fills whole parts of the new shape", shape)
    inner = over(shape[axis], times(outer, _EACH))
    if inner is None:
        return node.unknown("it is not certain that each row fills whole parts of the new shape", shape)
    if value.kind is POSITIONS:
        if inner != 1 or outer != 1 or value.outer != 1:
            return node.mixed("the number of rows, or where a row lies, enters its values", shape)
        return Value(POSITIONS, shape, axis, because=node.doubt)
    return node.give(shape, axis, outer)


_EACH = Size(1, ("rows",))


@rule("Transpose", all_kinds=True)
def _transpose(node: Node) -> Value:
    value = node.first
    if value.shape is None:
        return value._replace(items=None, tensor=None)
    rank = len(value.shape)
    order = node.numbers("perm") or list(range(rank - 1, -1, -1))
    if sorted(order) != list(range(rank)):
        return node.unknown("its permutation does not fit its input")
    shape = tuple([value.shape[index] for index in order])
    if value.component is not None and order[-1] != rank - 1:
        return node.mixed("the number of rows, or where a row lies, enters its values", shape)
    axis = order.index(value.axis) if value.axis >= 0 else -1
    return value._replace(shape=shape, axis=axis, items=value.items if rank < 2 else None, tensor=None)


def axes_asked(node: Node, index: int = 1) -> list[int] | None:
    """The axes that an operator is given as an attribute or an input; an empty list where none; None if not known."""
    attribute = node.numbers("axes")
    if attribute is not None:
        return attribute
    return [] if node.input(index) is None else known(node.input(index))


def moved(value: Value, shape: Shape, axis: int, items: tuple[Item, ...] | None) -> Value:
    """The same tensor with sides of 1 more or fewer."""
    return value._replace(shape=shape, axis=axis, items=items, tensor=value.tensor if len(shape) < 2 else None)


@rule("Unsqueeze", all_kinds=True)
def _unsqueeze(node: Node) -> Value:
    value, axes = node.first, axes_asked(node)
    if value.shape is None or axes is None:
        return _lost(node, value, "the axes are not known")
    rank = len(value.shape) + len(axes)
    new = {axis % rank for axis in axes}
    old = [index for index in range(rank) if index not in new]
    shape: list[Dim] = [1] * rank
    if len(old) != len(value.shape):
        return node.unknown("its axes do not fit its input")
    for index, dim in zip(old, value.shape, strict=True):
        shape[index] = dim
    if value.component is not None and rank - 1 in new:
        return node.mixed("the number of rows, or where a row lies, enters its values", tuple(shape))
    return moved(value, tuple(shape), old[value.axis] if value.axis >= 0 else -1, items_of(value) if rank < 2 else None)


@rule("Squeeze", all_kinds=True)
def _squeeze(node: Node) -> Value:
    value, axes = node.first, axes_asked(node)
    if value.shape is None or axes is None:
        return _lost(node, value, "the axes are not known")
    rank = len(value.shape)
    if axes:
        gone = {axis % rank for axis in axes} if rank else set()
    elif any(isinstance(dim, Size) and not of_rows(dim) for dim in value.shape):
        return _lost(node, value, "it is not known which sides are 1")
    else:
        gone = {index for index, dim in enumerate(value.shape) if dim == 1}
        if value.kind in (ROWS, POSITIONS):
            return node.mixed("the batch axis of a single row is dropped", None)
    if value.axis in gone or (value.component is not None and rank - 1 in gone):
        return node.mixed("the batch axis of a single row is dropped", None)
    shape = tuple([dim for index, dim in enumerate(value.shape) if index not in gone])
    axis = value.axis - sum(index < value.axis for index in gone) if value.axis >= 0 else -1
    return moved(value, shape, axis, items_of(value) if len(shape) < 2 else None)


def _lost(node: Node, value: Value, reason: str) -> Value:
    """The same contents in a shape that is not known."""
    if value.kind in (ROWS, POSITIONS):
        return node.unknown(reason)
    return Value(value.kind, None, because=value.because or node.doubt)
