"""Recurrent networks and attention: which axis of which input is the batch, by operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from workers.rows.broadcasting import pinned
from workers.rows.node import Answer, Node, rule
from workers.rows.sizes import Dim, opaque_side, times
from workers.rows.values import FREE, ROWS, Shape, Value


def batched(
    node: Node, places: Mapping[int, int], weights: Sequence[int], outputs: Sequence[tuple[Shape | None, int]]
) -> Answer:
    """The answer of an operator whose inputs in `places` each have the batch on that axis; `weights` are the same for
    all rows. `outputs` are the outputs' shapes, the rows' side left out of account, and the batch's axis in each.
    """
    count = len(node.proto.output)
    batch: Dim | None = None
    outer: Dim = 1
    for index, axis in places.items():
        value = node.input(index)
        if value is None or value.kind is not ROWS or value.shape is None:
            continue
        if value.axis != axis:
            return [node.mixed("the rows do not lie along its batch axis")] * count
        if batch is not None and (value.shape[axis], value.outer) != (batch, outer):
            return [node.unknown("its inputs may have different numbers of each row")] * count
        batch, outer = value.shape[axis], value.outer
    if not node.free(*weights):
        return [node.mixed("its weights come from the rows")] * count
    if batch is None:
        return [node.give(_all_free(node, places, shape, axis)) for shape, axis in outputs][:count]
    for index, axis in places.items():
        value = node.input(index)
        if value is not None and value.kind is FREE:
            return [pinned(node, value.shape[axis] if value.shape and axis < len(value.shape) else 1)] * count
    answers = []
    for shape, axis in outputs[:count]:
        if shape is None:
            answers.append(node.unknown("the shape of an output is not known"))
        else:
            answers.append(node.give((*shape[:axis], batch, *shape[axis + 1 :]), axis, outer))
    return answers


def _all_free(node: Node, places: Mapping[int, int], shape: Shape | None, axis: int) -> Shape | None:
    """An output's shape where nothing carries rows: the batch's side is that of the first input that has one."""
    if shape is None:
        return None
    for index, at in places.items():
        value = node.input(index)
        if value is not None and value.shape is not None and at < len(value.shape):
            return (*shape[:axis], value.shape[at], *shape[axis + 1 :])
    return None


@rule("LSTM", "GRU", "RNN")
def _recurrent(node: Node) -> Answer:
    value, first = node.first, node.number("layout", 0)
    directions = 2 if node.text("direction", "forward") == "bidirectional" else 1
    hidden: Dim = node.number("hidden_size", 0) or opaque_side()
    batch = 0 if first else 1
    places = {0: batch, 4: 0, 5: batch}
    if node.operator == "LSTM":
        places[6] = batch
    if value.shape is None or len(value.shape) != 3:
        return [node.unknown("a shape is not known") if value.kind is ROWS else node.give(None)] * len(
            node.proto.output
        )
    steps, rows = value.shape[1 - batch], value.shape[batch]
    every: tuple[Shape, int] = (
        ((rows, steps, directions, hidden), 0) if first else ((steps, directions, rows, hidden), 2)
    )
    last: tuple[Shape, int] = ((rows, directions, hidden), 0) if first else ((directions, rows, hidden), 1)
    weights = [1, 2, 3, 7] if node.operator == "LSTM" else [1, 2, 3]
    return batched(node, places, weights, [every, last, last])


@rule("Attention")
def _attention(node: Node) -> Answer:
    query, key, value = (node.input(index) for index in (0, 1, 2))
    shapes = [found.shape for found in (query, key, value) if found is not None and found.shape is not None]
    if len(shapes) < 3:
        return [node.unknown("a shape is not known")] * len(node.proto.output)
    odd = _mask(node, node.input(3))
    if odd is not None:
        return [odd] * len(node.proto.output)
    wide = len(shapes[0]) == 4
    heads = shapes[0][1] if wide else node.number("q_num_heads", 1)
    if wide:
        given: Shape = (*shapes[0][:3], shapes[2][3])
    else:
        groups, own = node.number("kv_num_heads", 1), shapes[2][2]
        width = times(own // groups, heads) if isinstance(own, int) and groups else opaque_side()
        given = (*shapes[0][:2], width)
    cache: Shape = (1, opaque_side(), opaque_side(), opaque_side())
    scores: Shape = (1, heads, opaque_side(), opaque_side())
    places = {0: 0, 1: 0, 2: 0, 4: 0, 5: 0, 6: 0}
    if node.input(3) is not None and node.input(3).kind is ROWS:  # type: ignore[union-attr]
        places[3] = 0
    return batched(node, places, [], [(given, 0), (cache, 0), (cache, 0), (scores, 0)])


def _mask(node: Node, mask: Value | None) -> Value | None:
    """The answer where a mask of up to four axes, the batch's first, does not fit the rows."""
    if mask is None:
        return None
    if mask.shape is None:
        return node.unknown("the shape of its mask is not known")
    if mask.kind is ROWS and (len(mask.shape) != 4 or mask.axis != 0):
        return node.mixed("the rows do not lie along the batch axis of its mask")
    if mask.kind is FREE and len(mask.shape) == 4 and mask.shape[0] != 1 and node.first.kind is ROWS:
        return pinned(node, mask.shape[0])
    return None


@rule("RotaryEmbedding")
def _rotary(node: Node) -> Answer:
    places = {0: 0, 3: 0} if node.input(3) is not None else {0: 0, 1: 0, 2: 0}
    return batched(node, places, [1, 2] if 3 in places else [], [(node.first.shape, 0)])


@rule("TensorScatter")
def _tensor_scatter(node: Node) -> Answer:
    rank = len(node.first.shape or ())
    if node.number("axis", -2) % (rank or 1) == 0:
        return node.mixed("it puts values along the rows")
    return batched(node, {0: 0, 1: 0, 2: 0}, [], [(node.first.shape, 0)])
