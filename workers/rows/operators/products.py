"""Matrix products by all their names: rows may run along what is not summed over, and in one operand's own axes."""

from __future__ import annotations

from collections.abc import Sequence

from workers.rows.broadcasting import broadcast, broadcast_shape, pinned
from workers.rows.node import Node, rule
from workers.rows.sizes import Dim, either, opaque_side
from workers.rows.values import FREE, ROWS, Shape, Value

_SUMMED = "it sums over the rows"
_OTHERS = "every row meets every other"


@rule("MatMul", "MatMulInteger", "QLinearMatMul")
def _matmul(node: Node) -> Value:
    linear = node.operator == "QLinearMatMul"
    left, right = node.first, node.input(3 if linear else 1)
    of_left, of_right = ([1, 2, 6, 7], [4, 5]) if linear else ([2], [3])
    assert right is not None
    if node.operator != "MatMul":
        for value, scales in ((left, of_left), (right, of_right)):
            odd = single_numbers(node, value, scales)
            if odd is not None:
                return odd
    return matrix_product(node, left, right)


def single_numbers(node: Node, value: Value, scales: Sequence[int]) -> Value | None:
    """The answer where a scale or zero point of `value` is not one number, the same for every row."""
    for index in scales:
        scale = node.input(index)
        if scale is None:
            continue
        if scale.kind is not FREE:
            return node.mixed("a scale or zero point comes from the rows")
        if value.kind is ROWS and (scale.shape is None or any(dim != 1 for dim in scale.shape)):
            return node.unknown("a scale or zero point has a number for each of a fixed number of rows")
    return None


def matrix_product(node: Node, left: Value, right: Value) -> Value:
    """NumPy's matmul: the last axis of the left is summed over with the last but one of the right."""
    if left.shape is None or right.shape is None:
        free = left.kind is FREE and right.kind is FREE
        return Value(FREE, None, because=node.doubt) if free else node.unknown("a shape is not known")
    if not left.shape or not right.shape:
        return node.unknown("a matrix product of a scalar")
    a, b = left.shape, right.shape
    vectors = (len(a) == 1, len(b) == 1)
    if vectors[0]:
        a = (1, *a)
    if vectors[1]:
        b = (*b, 1)
    if left.axis == len(left.shape) - 1 or (right.axis >= 0 and right.axis == max(len(right.shape) - 2, 0)):
        return node.mixed(_SUMMED)
    batch = broadcast_shape([a[:-2], b[:-2]])
    assert batch is not None
    rank = len(batch) + 2
    at = {}
    for value, shape in ((left, a), (right, b)):
        if value.kind is ROWS:
            at[id(value)] = rank - len(shape) + value.axis
    shape = (*batch, a[-2], b[-1])
    places = set(at.values())
    if len(places) > 1:
        return node.mixed(_OTHERS, shape)
    axis = next(iter(places)) if places else -1
    if axis >= 0:
        odd = _opposite(node, left, right, axis - rank, shape)
        if odd is not None:
            return odd
    keep = [
        index
        for index in range(rank)
        if not (vectors[0] and index == rank - 2) and not (vectors[1] and index == rank - 1)
    ]
    outer = left.outer if left.kind is ROWS else right.outer
    return node.give(tuple([shape[index] for index in keep]), keep.index(axis) if axis >= 0 else -1, outer)


def _opposite(node: Node, left: Value, right: Value, from_last: int, shape: Shape) -> Value | None:
    """The answer where what lies across from the rows does not fit them; `from_last` is the rows' axis, counted so."""
    if left.kind is ROWS and right.kind is ROWS:
        if from_last >= -2:
            return node.mixed(_OTHERS, shape)
        return None if left.outer == right.outer else node.unknown("rows may be interleaved differently", shape)
    if from_last >= -2:
        return None
    other = right if left.kind is ROWS else left
    assert other.shape is not None
    side = other.shape[from_last] if -from_last <= len(other.shape) else 1
    return None if side == 1 else pinned(node, side, shape)


@rule("Gemm")
def _gemm(node: Node) -> Value:
    left, right = node.first, node.input(1)
    assert right is not None
    product = matrix_product(node, _turned(left, node.number("transA", 0)), _turned(right, node.number("transB", 0)))
    bias = node.input(2)
    if bias is None or product.kind not in (FREE, ROWS):
        return product
    return broadcast(node, [product, bias])


def _turned(value: Value, turn: int) -> Value:
    """A matrix, transposed where `turn`."""
    if not turn or value.shape is None:
        return value
    axis = len(value.shape) - 1
    swapped = {axis: axis - 1, axis - 1: axis}
    shape = (*value.shape[:-2], value.shape[-1], value.shape[-2]) if axis else value.shape
    return value._replace(shape=shape, axis=swapped.get(value.axis, value.axis))


@rule("Einsum")
def _einsum(node: Node) -> Value:
    equation = node.text("equation", "").replace(" ", "")
    values = [value for value in node.inputs if value is not None]
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if any(value.shape is None for value in values) or len(terms) != len(values):
        if all(value.kind is FREE for value in values):
            return Value(FREE, None, because=node.doubt)
        return node.unknown("a shape is not known")
    ranks = [len(value.shape or ()) for value in values]
    dots = max([rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)], default=0)
    labelled = [_labels(term, rank, dots) for term, rank in zip(terms, ranks, strict=True)]
    if arrow:
        out = _labels(output, len(output.replace("...", "")) + (dots if "..." in output else 0), dots)
    else:
        every = [label for labels in labelled for label in labels]
        out = [label for label in map(str, range(dots)) if label in every]
        out += sorted({label for label in every if every.count(label) == 1 and not label.isdigit()})
    return _einsum_of(node, values, labelled, out)


def _labels(term: str, rank: int, dots: int) -> list[str]:
    """A letter for each axis; those of an ellipsis are numbered from the last."""
    before, found, behind = term.partition("...")
    hidden = rank - len(before) - len(behind) if found else 0
    return [*before, *(str(index) for index in range(dots - hidden, dots)), *behind]


def _einsum_of(node: Node, values: list[Value], labelled: list[list[str]], out: list[str]) -> Value:
    sides: dict[str, Dim] = {}
    rows: str | None = None
    outer: Dim = 1
    for value, labels in zip(values, labelled, strict=True):
        if len(labels) != len(value.shape or ()):
            return node.unknown("its equation does not fit its inputs")
        for label, side in zip(labels, value.shape or (), strict=True):
            sides[label] = either(sides.get(label, 1), side)
        if value.kind is not ROWS:
            continue
        label = labels[value.axis]
        if labels.count(label) > 1 or (rows is not None and label != rows):
            return node.mixed(_OTHERS)
        if rows is not None and value.outer != outer:
            return node.unknown("rows may be interleaved differently")
        rows, outer = label, value.outer
    shape = tuple([sides.get(label, opaque_side()) for label in out])
    if rows is None:
        return node.give(shape)
    for value, labels in zip(values, labelled, strict=True):
        if value.kind is FREE and rows in labels and (side := (value.shape or ())[labels.index(rows)]) != 1:
            return pinned(node, side)
    return node.give(shape, out.index(rows), outer) if out.count(rows) == 1 else node.mixed(_SUMMED)
