"""Operators that cut tensors, join them along an axis, pad them, or keep what passes a test."""

from __future__ import annotations

from collections.abc import Sequence

from workers.rows.broadcasting import pinned
from workers.rows.node import Answer, Node, rule
from workers.rows.operators.shapes import refusal
from workers.rows.sizes import Dim, Size, of_rows, opaque_side, plus
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

#: Ends of cuts that exporters write for "to the last".
_BEYOND = 10**9

_ALONG = "it picks, joins or moves along the rows"


@rule("Concat", all_kinds=True)
def _concat(node: Node) -> Value:
    values = [value for value in node.inputs if value is not None]
    worst = max(values, key=lambda value: value.kind)
    if worst.kind in (UNKNOWN, MIXED):
        return Value(worst.kind, None, because=worst.because)
    shapes = [value.shape for value in values if value.shape is not None]
    if len(shapes) < len(values):
        return (
            Value(worst.kind, None, because=node.doubt) if worst.kind <= SIZE else node.unknown("a shape is not known")
        )
    rank = len(shapes[0])
    axis = node.number("axis", 1) % (rank or 1)
    shape = (*shapes[0][:axis], _total([shape[axis] for shape in shapes]), *shapes[0][axis + 1 :])
    if worst.kind <= SIZE:
        items = _joined_items(values) if rank == 1 else None
        if items is not None:
            return numbers(items, because=node.doubt)
        return Value(worst.kind, shape, because=node.doubt)
    if worst.kind is POSITIONS:
        return _index_tuples(node, values, shape, axis)
    return _side_by_side(node, values, shape, axis)


def _total(sides: Sequence[Dim]) -> Dim:
    total: Dim = 0
    for side in sides:
        total = plus(total, side)
    return total


def _joined_items(values: Sequence[Value]) -> tuple[Item, ...] | None:
    joined: list[Item] = []
    for value in values:
        items = items_of(value)
        if items is None or len(joined) + len(items) > MOST_ITEMS:
            return None
        joined += items
    return tuple(joined)


def _side_by_side(node: Node, values: Sequence[Value], shape: Shape, axis: int) -> Value:
    rows = next(value for value in values if value.kind is ROWS)
    assert rows.shape is not None
    if rows.axis == axis:
        return rows if len(values) == 1 else node.mixed(_ALONG, shape)
    for value in values:
        assert value.shape is not None
        if value.kind is SIZE:
            return node.mixed("the number of rows enters its values", shape)
        if value.kind is FREE:
            return pinned(node, value.shape[rows.axis] if rows.axis < len(value.shape) else 1, shape)
        if value.axis != rows.axis:
            return node.mixed("the rows of one input meet another axis of the rows of the other", shape)
        if value.outer != rows.outer:
            return node.unknown("the rows of its inputs may be interleaved differently", shape)
    return node.give(shape, rows.axis, rows.outer)


def _index_tuples(node: Node, values: Sequence[Value], shape: Shape, axis: int) -> Value:
    """Indices into a tensor, one of whose parts numbers the rows: `[[0, a], [1, b], …]`."""
    at = [index for index, value in enumerate(values) if value.kind is POSITIONS]
    position = values[at[0]]
    assert position.shape is not None
    single = all(value.shape is not None and value.shape[-1] == 1 for value in values)
    others = all(
        value.kind is FREE or (value.kind is ROWS and value.axis == position.axis and value.outer == 1)
        for value in values
        if value is not position
    )
    if axis != len(shape) - 1 or position.axis == axis or len(at) > 1 or not single or not others:
        return node.mixed("the number of rows, or where a row lies, enters its values", shape)
    for value in values:
        assert value.shape is not None
        if value.kind is FREE and value.shape[position.axis] != 1 and value.shape != ():
            return pinned(node, value.shape[position.axis], shape)
    if any(value.kind is FREE for value in values):
        return node.mixed("a fixed side of 1 lies along the rows", shape)
    return Value(POSITIONS, shape, position.axis, because=node.doubt, component=at[0])


@rule("Split", all_kinds=True)
def _split(node: Node) -> Answer:
    count = len(node.proto.output)
    refused = refusal(node, arguments=(1,)) if node.first.kind is not SIZE else None
    if refused is not None:
        return [refused] * count
    value = node.first
    if value.shape is None:
        return [Value(value.kind, None, because=node.doubt)] * count
    axis = node.number("axis", 0) % (len(value.shape) or 1)
    if axis == value.axis:
        return value if count == 1 else [node.mixed(_ALONG)] * count
    parts: list[Dim] = list(node.numbers("split") or whole(node.input(1)) or ())
    if any(of_rows(part) for part in parts):
        return [node.mixed("a tensor is cut by the number of rows")] * count
    side = value.shape[axis]
    if len(parts) != count:
        even = isinstance(side, int) and node.input(1) is None and side % count == 0
        parts = [side // count if isinstance(side, int) and even else opaque_side() for _ in range(count)]
    answers, at, items = [], 0, items_of(value) if len(value.shape) == 1 else None
    for part in parts:
        shape = (*value.shape[:axis], part, *value.shape[axis + 1 :])
        if items is not None and isinstance(part, int):
            answers.append(numbers(items[at : at + part], because=node.doubt))
            at += part
        else:
            answers.append(value._replace(shape=shape, items=None, tensor=None))
    return answers


@rule("Slice", all_kinds=True)
def _slice(node: Node) -> Value:
    value = node.first
    refused = refusal(node, arguments=(1, 2, 3, 4)) if value.kind is not SIZE else None
    if refused is not None:
        return refused
    if value.shape is None:
        return Value(value.kind, None, because=node.doubt)
    rank = len(value.shape)
    if node.version < 10:
        starts, ends = (tuple(node.numbers(name) or ()) for name in ("starts", "ends"))  # type: tuple[Dim, ...] | None, tuple[Dim, ...] | None
        axes, steps = node.numbers("axes"), None  # type: list[int] | None, tuple[Dim, ...] | None
    else:
        starts, ends, axes = whole(node.input(1)), whole(node.input(2)), known(node.input(3))
        steps = whole(node.input(4))
        if (node.input(3) is not None and axes is None) or any(
            (argument := node.input(index)) is not None and argument.kind is SIZE and whole(argument) is None
            for index in (1, 2, 4)
        ):
            return _sliced_somewhere(node, value, None)
    given = [found for found in (starts, ends) if found is not None]
    if axes is None:
        count = len(given[0]) if given else _length(node.input(1))
        axes = list(range(count)) if count is not None else None
    if axes is None or len(axes) > rank:
        return _sliced_somewhere(node, value, None)
    axes = [axis % rank for axis in axes]
    shape = list(value.shape)
    for index, axis in enumerate(axes):
        start = starts[index] if starts is not None and index < len(starts) else None
        end = ends[index] if ends is not None and index < len(ends) else None
        step = steps[index] if steps is not None and index < len(steps) else (1 if node.input(4) is None else None)
        side = _sliced_side(value.shape[axis], start, end, step)
        if axis == value.axis and side != value.shape[axis]:
            return node.mixed(_ALONG)
        if axis != value.axis and any(of_rows(bound) for bound in (start, end, step) if bound is not None):
            return node.mixed("a tensor is cut by the number of rows")
        shape[axis] = side
    items = items_of(value) if rank == 1 else None
    if items is not None and axes:
        start, end, step = (bound[0] if bound else None for bound in (starts, ends, steps))
        if isinstance(start, int) and isinstance(end, int) and (isinstance(step, int) or node.input(4) is None):
            return numbers(_cut(items, start, end, step if isinstance(step, int) else 1), because=node.doubt)
    return value._replace(shape=tuple(shape), items=None, tensor=None)


def _cut(items: tuple[Item, ...], start: int, end: int, step: int) -> tuple[Item, ...]:
    """As ONNX cuts: an end below the first element, going backwards, takes the first too."""
    count = len(items)
    if step < 0 and end < -count:
        return items[slice(start, None, step)]
    return items[slice(start, end, step)]


def _sliced_somewhere(node: Node, value: Value, shape: Shape | None) -> Value:
    if value.kind is FREE and all((found := node.input(index)) is None or found.kind is FREE for index in (1, 2, 3, 4)):
        return Value(FREE, tuple(opaque_side() for _ in value.shape or ()), because=node.doubt)
    return node.unknown("it is not known along which axis it cuts", shape)


def _length(value: Value | None) -> int | None:
    return value.shape[0] if value is not None and value.shape and isinstance(value.shape[0], int) else None


def _sliced_side(side: Dim, start: Dim | None, end: Dim | None, step: Dim | None) -> Dim:
    """How long a side is after a cut; the whole side where the cut certainly takes all of it, in its order."""
    if step == 1 and start == 0 and end is not None and (end == side or (isinstance(end, int) and end >= _BEYOND)):
        return side
    if isinstance(side, int) and isinstance(start, int) and isinstance(end, int) and isinstance(step, int) and step:
        return len(_cut((0,) * side, start, end, step)) if side <= 1 << 20 else opaque_side()
    if step == 1 and start == 0 and isinstance(end, Size):
        return opaque_side(of_rows(end))
    return opaque_side()


@rule("Compress", "NonZero", "Unique", "NonMaxSuppression", "StringNormalizer", "StringSplit")
def _by_what_they_hold(node: Node) -> Answer:
    """How much comes out depends on what all rows hold together."""
    if all(value is None or value.kind is FREE for value in node.inputs):
        return [Value(FREE, None, because=node.doubt) for _ in node.proto.output]
    return [node.mixed("how much comes out depends on what all rows hold together")] * len(node.proto.output)


@rule("SplitToSequence")
def _split_to_sequence(node: Node) -> Value:
    """Sequences are not followed, but that rows are parted is seen."""
    value = node.first
    if value.kind is ROWS and value.shape and node.number("axis", 0) % len(value.shape) == value.axis:
        return node.mixed(_ALONG)
    return Value(FREE, None, because=node.doubt) if node.free(0, 1) else node.unknown("sequences are not followed")


@rule("TfIdfVectorizer")
def _tf_idf(node: Node) -> Value:
    value = node.first
    if value.kind is ROWS and (value.shape is None or len(value.shape) != 2 or value.axis != 0):
        return node.mixed("it counts words over all rows")
    return node.give(None if value.shape is None else (*value.shape[:-1], opaque_side()), value.axis, value.outer)


@rule("Pad", all_kinds=True)
def _pad(node: Node) -> Value:
    refused = refusal(node, arguments=(1, 3), data=(0, 2))
    if refused is not None or not node.free(2):
        return refused or node.mixed("it fills with what the rows hold")
    value = node.first
    if value.shape is None:
        return Value(FREE, None, because=node.doubt)
    rank = len(value.shape)
    pads = tuple(node.numbers("pads") or ()) if node.version < 11 else whole(node.input(1))
    axes = list(range(rank)) if node.input(3) is None else known(node.input(3))
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        if value.kind is FREE and node.free(1, 3):
            return Value(FREE, tuple(opaque_side() for _ in value.shape), because=node.doubt)
        return node.unknown("it is not known how much is put before and behind the rows")
    shape = list(value.shape)
    for index, axis in enumerate([axis % rank for axis in axes]):
        added = plus(pads[index], pads[index + len(axes)])
        if axis == value.axis and (pads[index], added) != (0, 0):
            return node.mixed("it puts something before or behind the rows")
        if of_rows(pads[index]) or of_rows(pads[index + len(axes)]):
            return node.mixed("a tensor is shaped by the number of rows")
        shape[axis] = plus(shape[axis], added)
    return node.give(tuple(shape), value.axis, value.outer)
