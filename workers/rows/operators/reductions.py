"""Operators that reduce, normalise, sort or run along axes: theirs must not be the rows'."""

from __future__ import annotations

from workers.rows.broadcasting import broadcast, pinned
from workers.rows.node import Answer, Node, rule
from workers.rows.operators.shapes import refusal
from workers.rows.sizes import Dim, opaque_side, product_of
from workers.rows.values import FREE, MIXED, ROWS, SIZE, Shape, Value, items_of, known, numbers, whole

_ALONG = "it works along the rows"


@rule(
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", all_kinds=True,
)  # fmt: skip
def _reduce(node: Node) -> Value:
    if node.first.kind is SIZE and node.operator == "ReduceProd":
        items = whole(node.first)
        if items is not None:
            shape: Shape = (1,) * len(node.first.shape or ()) if node.number("keepdims", 1) else ()
            return numbers((product_of(items),), shape, node.doubt)
    refused = refusal(node, arguments=(1,))
    if refused is not None:
        return refused
    axes = node.numbers("axes")
    if axes is None:
        axes = [] if node.input(1) is None else known(node.input(1))
    if axes == [] and node.number("noop_with_empty_axes", 0):
        return node.first._replace(items=None, tensor=None)
    return _reduced(node, axes, bool(node.number("keepdims", 1)))


@rule("ArgMax", "ArgMin")
def _arg(node: Node) -> Value:
    return _reduced(node, [node.number("axis", 0)], bool(node.number("keepdims", 1)))


def _reduced(node: Node, axes: list[int] | None, keep: bool) -> Value:
    """Over `axes`, or over all where there are none; `axes` is None where they are not known."""
    value = node.first
    if value.shape is None or (axes is None and value.kind is FREE):
        rank = len(value.shape) if value.shape is not None and keep else None
        return Value(FREE, None if rank is None else tuple(opaque_side() for _ in range(rank)), because=node.doubt)
    if axes is None:
        return node.unknown("it is not known over which axes it goes")
    rank = len(value.shape)
    gone = {axis % rank for axis in axes} if axes and rank else set(range(rank))
    if value.axis in gone:
        return node.mixed(_ALONG if axes else "it reduces all rows to one value")
    shape = tuple([1 if index in gone else dim for index, dim in enumerate(value.shape) if keep or index not in gone])
    axis = value.axis - (0 if keep else sum(index < value.axis for index in gone)) if value.axis >= 0 else -1
    return node.give(shape, axis, value.outer)


def along(node: Node, axis: int, value: Value | None = None) -> Value:
    """The same shape, from work along `axis`."""
    value = node.first if value is None else value
    if value.shape is None:
        return Value(FREE, None, because=node.doubt)
    if value.axis >= 0 and axis % len(value.shape) == value.axis:
        return node.mixed(_ALONG, value.shape)
    return node.give(value.shape, value.axis, value.outer)


def from_axis(node: Node, axis: int, value: Value | None = None) -> Value:
    """The same shape, from work over `axis` and all behind it."""
    value = node.first if value is None else value
    if value.shape is None:
        return Value(FREE, None, because=node.doubt)
    if value.axis >= (axis % len(value.shape) if value.shape else 0) and value.axis >= 0:
        return node.mixed(_ALONG, value.shape)
    return node.give(value.shape, value.axis, value.outer)


@rule("Softmax", "LogSoftmax", "Hardmax")
def _softmax(node: Node) -> Value:
    return along(node, node.number("axis", -1)) if node.version >= 13 else from_axis(node, node.number("axis", 1))


@rule("LpNormalization")
def _lp_normalization(node: Node) -> Value:
    return along(node, node.number("axis", -1))


@rule("CumSum", "CumProd")
def _cumulated(node: Node) -> Value:
    axis = known(node.input(1))
    if not node.free(1) or not axis:
        return node.unknown("its axis is not known") if node.first.kind is ROWS else Value(FREE, node.first.shape)
    return along(node, axis[0])


@rule("TopK")
def _top_k(node: Node) -> Answer:
    value = node.first
    if not node.free(1):
        return [node.mixed("how many it takes comes from the rows")] * 2
    if value.shape is None:
        return [Value(FREE, None, because=node.doubt)] * 2
    axis = node.number("axis", -1) % (len(value.shape) or 1)
    if axis == value.axis:
        return [node.mixed("it sorts along the rows")] * 2
    count = whole(node.input(1)) or (node.number("k", 0),)
    side: Dim = count[0] or opaque_side()
    return [node.give((*value.shape[:axis], side, *value.shape[axis + 1 :]), value.axis, value.outer)] * 2


@rule("Trilu")
def _trilu(node: Node) -> Value:
    if not node.free(1):
        return node.mixed("its diagonal comes from the rows")
    rank = len(node.first.shape or ())
    return from_axis(node, rank - 2) if node.first.shape is not None else Value(FREE, None)


@rule("EyeLike")
def _eye(node: Node) -> Value:
    return from_axis(node, 0)


@rule("Det")
def _det(node: Node) -> Value:
    value = node.first
    if value.shape is None:
        return Value(FREE, None, because=node.doubt)
    found = from_axis(node, len(value.shape) - 2)
    return found if found.kind is MIXED else node.give(value.shape[:-2], value.axis, value.outer)


@rule("ReverseSequence")
def _reverse_sequence(node: Node) -> Value:
    value, lengths = node.first, node.input(1)
    batch, time = node.number("batch_axis", 1), node.number("time_axis", 0)
    if lengths is None or (value.kind is FREE and lengths.kind is FREE):
        return node.give(value.shape)
    if value.kind is FREE or value.axis == time:
        return node.mixed(_ALONG, value.shape)
    if value.axis == batch:
        if lengths.kind is FREE:
            return pinned(node, lengths.shape[0] if lengths.shape else 1, value.shape)
        same = lengths.shape is not None and value.shape is not None and lengths.shape[0] == value.shape[batch]
        if not same or (lengths.outer, value.outer) != (1, 1):
            return node.unknown("its lengths may not be those of the rows", value.shape)
    elif lengths.kind is not FREE:
        return node.mixed("its lengths come from the rows", value.shape)
    return node.give(value.shape, value.axis, value.outer)


# ---- normalisation


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _layer_normalization(node: Node) -> Answer:
    return normalized(node, node.first, [1, 2], node.number("axis", -1))


def normalized(node: Node, value: Value, weights: list[int], axis: int) -> Answer:
    """Normalised over `axis` and what lies behind it, scaled by weights; the statistics follow."""
    count = len(node.proto.output)
    found = from_axis(node, axis, value)
    if found.kind is ROWS:
        # Weights that lie before the axis would have to have a side of 1 there.
        found = broadcast(node, [value, *(weight for at in weights if (weight := node.input(at)) is not None)])
    if found.kind is not ROWS or value.shape is None:
        return [found] * count
    start = axis % len(value.shape)
    statistics = tuple([1 if index >= start else dim for index, dim in enumerate(value.shape)])
    return [found, *[node.give(statistics, value.axis, value.outer)] * (count - 1)]


@rule("BatchNormalization")
def _batch_normalization(node: Node) -> Answer:
    count = len(node.proto.output)
    training = node.number("training_mode", 0) if node.version >= 14 else count > 1
    if training or (node.version < 7 and not node.number("is_test", 0)):
        return [node.mixed("it normalises over the batch: it is in training mode")] * count
    return [_by_channel(node, [1, 2, 3, 4])] * count


@rule("InstanceNormalization")
def _instance_normalization(node: Node) -> Value:
    return _by_sample(node, [1, 2])


@rule("GroupNormalization", "LRN")
def _by_group(node: Node) -> Value:
    return _by_sample(node, [1, 2])


@rule("MeanVarianceNormalization")
def _mean_variance(node: Node) -> Value:
    value, axes = node.first, node.numbers("axes") or [0, 2, 3]
    if value.shape is None or value.kind is FREE:
        return node.give(value.shape)
    if value.axis in {axis % len(value.shape) for axis in axes}:
        return node.mixed(_ALONG, value.shape)
    return node.give(value.shape, value.axis, value.outer)


def _by_channel(node: Node, weights: list[int]) -> Value:
    value = node.first
    if not node.free(*weights):
        return node.mixed("its weights come from the rows", value.shape)
    if value.axis == 1:
        return node.mixed("the rows lie along its channels", value.shape)
    return node.give(value.shape, value.axis, value.outer)


def _by_sample(node: Node, weights: list[int]) -> Value:
    value = node.first
    if not node.free(*weights):
        return node.mixed("its weights come from the rows", value.shape)
    if value.axis > 0:
        return node.mixed("the rows do not lie along its batch axis", value.shape)
    return node.give(value.shape, value.axis, value.outer)


@rule("Dropout")
def _dropout(node: Node) -> Answer:
    value, count = node.first, len(node.proto.output)
    same = node.give(value.shape, value.axis, value.outer)
    training = items_of(node.input(2))
    if (node.input(2) is not None and training != (False,)) or (node.version < 7 and not node.number("is_test", 0)):
        same = node.doubted(same, "it may draw at random")
    return [same] * count


@rule("Bernoulli", "RandomNormalLike", "RandomUniformLike", "Multinomial", "RandomNormal", "RandomUniform")
def _random(node: Node) -> Value:
    value, shape = node.first, node.first.shape
    if node.operator in ("RandomNormal", "RandomUniform"):
        shape = tuple(node.numbers("shape") or ())
    elif node.operator == "Multinomial":
        shape = (value.shape or (opaque_side(),))[0], node.number("sample_size", 1)
    if node.operator == "Multinomial" and value.axis == 1:
        return node.mixed(_ALONG)
    return node.doubted(node.give(shape, value.axis, value.outer), "it draws at random, for the batch as a whole")


@rule("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss")
def _loss(node: Node) -> Answer:
    count = len(node.proto.output)
    value, targets = node.first, node.input(1)
    if node.text("reduction", "mean") != "none":
        lost = node.mixed("it reduces all rows to one value") if value.kind is ROWS else node.give(())
        return [lost, *[from_axis(node, 1) if node.operator[0] == "S" else value] * (count - 1)]
    if targets is None or not node.free(2):
        return [node.mixed("its weights come from the rows")] * count
    if value.kind is FREE and targets.kind is FREE:
        return [node.give(targets.shape), *[node.give(value.shape)] * (count - 1)]
    if value.axis != 0 or targets.axis != 0 or value.kind is not targets.kind:
        return [node.mixed("the rows do not lie along its batch axis")] * count
    return [node.give(targets.shape, 0, targets.outer), *[node.give(value.shape, 0, value.outer)] * (count - 1)]
