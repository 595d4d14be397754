"""What is known of a tensor: how it depends on the rows, its shape, and small whole numbers that it holds.

    FREE       the same alone and joined
    SIZE       computed from the rows' count, not from what they hold: shapes, mostly
    ROWS       joined, it is the callers' own tensors behind each other along one axis
    POSITIONS  numbers the rows along one axis: 0, 1, 2, …
    UNKNOWN    what the table does not know has touched it
    MIXED      anything else: a caller's part would depend on who else is in the batch

A side that carries rows is `outer · rows · inner`: the callers' parts lie behind each other inside each of `outer`
blocks. A reshape that merges axes raises `outer` or `inner`, and one that parts them lowers them again.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from workers.rows.sizes import Dim, Size, of_rows

if TYPE_CHECKING:
    from onnx import TensorProto

#: Tensors of more numbers than this are not followed number by number.
MOST_ITEMS = 64

Item = int | float | Size
Shape = tuple[Dim, ...]


class Dependence(IntEnum):
    """How a tensor depends on the rows; a larger one outweighs a smaller one."""

    FREE = 0
    SIZE = 1
    ROWS = 2
    POSITIONS = 3
    UNKNOWN = 4
    MIXED = 5


FREE, SIZE, ROWS, POSITIONS, UNKNOWN, MIXED = Dependence


class Because(NamedTuple):
    """The node that decided, by name and operator, and why."""

    node: str
    operator: str
    reason: str


class Value(NamedTuple):
    """What is known of one tensor. `shape` is None where not even its rank is known.

    `axis` and `outer` are those of ROWS and POSITIONS. `items` are the numbers that it holds, flat, where they are
    followed; `tensor` holds a constant's, not read yet. `because` says what made it UNKNOWN or MIXED, or, on any other
    kind, what leaves a doubt: all else is proven of it. Where `component` is set, the last axis holds indices of which
    only that one numbers rows.
    """

    kind: Dependence
    shape: Shape | None
    axis: int = -1
    outer: Dim = 1
    items: tuple[Item, ...] | None = None
    because: Because | None = None
    component: int | None = None
    tensor: TensorProto | None = None


def free(shape: Shape | None, items: tuple[Item, ...] | None = None, because: Because | None = None) -> Value:
    """A tensor that is the same alone and joined."""
    return Value(FREE, shape, -1, 1, items, because)


def numbers(items: tuple[Item, ...], shape: Shape | None = None, because: Because | None = None) -> Value:
    """A tensor of numbers that are followed: FREE, or SIZE where any depends on the rows' count."""
    shape = (len(items),) if shape is None else shape
    for item in items:
        if of_rows(item):
            return Value(SIZE, shape, -1, 1, items, because)
    return Value(FREE, shape, -1, 1, items, because)


def items_of(value: Value | None) -> tuple[Item, ...] | None:
    """The numbers that a tensor holds, where they are followed; a constant's are read now."""
    if value is None or value.items is not None or value.tensor is None:
        return None if value is None else value.items
    tensor = value.tensor
    if tensor.data_location == 1 or tensor.data_type not in _READABLE or math.prod(tensor.dims) > MOST_ITEMS:
        return None
    from onnx import numpy_helper

    read: tuple[Item, ...] = tuple(numpy_helper.to_array(tensor).reshape(-1).tolist())
    return read


def whole(value: Value | None) -> tuple[Dim, ...] | None:
    """The same for whole numbers, symbols included; None where any is none."""
    items = items_of(value)
    if items is None:
        return None
    dims: list[Dim] = []
    for item in items:
        if isinstance(item, float):
            return None
        dims.append(item)
    return tuple(dims)


def known(value: Value | None) -> list[int] | None:
    """The whole numbers that a tensor holds, where each is known."""
    dims = whole(value)
    if dims is None:
        return None
    plain = [dim for dim in dims if not isinstance(dim, Size)]
    return plain if len(plain) == len(dims) else None


#: FLOAT, UINT8, INT8, UINT16, INT16, INT32, INT64, BOOL, FLOAT16, DOUBLE, UINT32, UINT64: what numbers are kept in.
_READABLE = frozenset({1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13})
