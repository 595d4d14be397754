"""The operators of com.microsoft that optimised and quantised models are made of; those not here are unknown."""

from __future__ import annotations

from workers.rows.broadcasting import broadcast, pinned
from workers.rows.node import RULES, Answer, Node, rule
from workers.rows.operators import images, selecting  # noqa: F401 - their rules are taken over here
from workers.rows.operators.products import matrix_product, single_numbers
from workers.rows.operators.quantised import DYNAMIC
from workers.rows.operators.reductions import along, normalized
from workers.rows.operators.sequences import batched
from workers.rows.sizes import opaque_side
from workers.rows.values import FREE, ROWS, Shape, Value

MS = "com.microsoft"

# These mean what their namesakes of the default domain mean.
RULES.update(
    {
        (MS, name): RULES["", name]
        for name in ("Gelu", "Trilu", "Unique", "MatMulInteger", "GridSample", "BitShift", "QuantizeLinear")
    }
    | {(MS, "DequantizeLinear"): RULES["", "DequantizeLinear"], (MS, "FusedGemm"): RULES["", "Gemm"]}
    | {(MS, name): RULES["", "Conv"] for name in ("FusedConv",)}
    | {(MS, name): RULES["", "LayerNormalization"] for name in ("SimplifiedLayerNormalization", "LayerNormalization")}
)


@rule("QuickGelu", "FastGelu", "BiasGelu", "ExpandDims", domain=MS)
def _gelu(node: Node) -> Value:
    if node.operator == "ExpandDims":
        return node.unknown("its axis is not followed")
    return broadcast(node, [value for value in node.inputs if value is not None])


@rule("FusedMatMul", domain=MS)
def _fused_matmul(node: Node) -> Value:
    left, right = node.first, node.input(1)
    assert right is not None
    if node.number("transBatchA", 0) or node.number("transBatchB", 0):
        free = left.kind is FREE and right.kind is FREE
        return node.give(None) if free else node.unknown("it turns batch axes")
    return matrix_product(node, _turned(left, node.number("transA", 0)), _turned(right, node.number("transB", 0)))


def _turned(value: Value, turn: int) -> Value:
    if not turn or value.shape is None or len(value.shape) < 2:
        return value
    last = len(value.shape) - 1
    swapped = {last: last - 1, last - 1: last}
    shape = (*value.shape[:-2], value.shape[-1], value.shape[-2])
    return value._replace(shape=shape, axis=swapped.get(value.axis, value.axis))


@rule("DynamicQuantizeMatMul", "MatMulIntegerToFloat", domain=MS)
def _quantized_matmul(node: Node) -> Value:
    dynamic = node.operator == "DynamicQuantizeMatMul"
    left, right = node.first, node.input(1)
    assert right is not None
    odd = None if dynamic else single_numbers(node, left, (2, 4))
    if odd is not None or not node.free(*range(2 if dynamic else 3, len(node.inputs))) or right.kind is not FREE:
        return odd or node.unknown("its weights or scales come from the rows")
    product = matrix_product(node, left, right)
    return node.doubted(product, DYNAMIC) if dynamic and product.kind is ROWS else product


@rule("MatMulNBits", "MatMulFpQ4", "MatMulBnb4", domain=MS)
def _block_matmul(node: Node) -> Value:
    value = node.first
    if not node.free(*range(1, len(node.inputs))):
        return node.mixed("its weights come from the rows")
    return _last_side(node, value)


def _last_side(node: Node, value: Value) -> Value:
    """Work along the last axis, which then has another side."""
    found = along(node, -1, value)
    if found.shape is None or found.kind not in (FREE, ROWS):
        return found
    return node.give((*found.shape[:-1], node.number("N", 0) or opaque_side()), value.axis, value.outer)


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MS)
def _skip_layer_normalization(node: Node) -> Answer:
    count = len(node.proto.output)
    summed = [value for index in (0, 1) if (value := node.input(index)) is not None]
    bias = node.input(4 if node.operator[4] == "L" else 3)
    total = broadcast(node, [*summed, *([] if bias is None else [bias])])
    if total.kind not in (FREE, ROWS):
        return [total] * count
    weights = [2, 3] if node.operator[4] == "L" else [2]
    found = normalized(node, total, weights, -1)
    return [*([found] if isinstance(found, Value) else found)[:3], total][:count] if count == 4 else found


@rule("EmbedLayerNormalization", domain=MS)
def _embed_layer_normalization(node: Node) -> Answer:
    ids, table = node.first, node.input(2)
    if ids.shape is None or table is None or table.shape is None:
        return [node.unknown("a shape is not known")] * len(node.proto.output)
    shape: Shape = (*ids.shape, table.shape[-1])
    return batched(node, {0: 0, 1: 0, 7: 0, 8: 0}, [2, 3, 4, 5, 6], [(shape, 0), (ids.shape[:1], 0), (shape, 0)])


@rule("Attention", "QAttention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", domain=MS)
def _attention(node: Node) -> Answer:
    """Attention over one's own tokens; masks, biases and caches must each have the batch first."""
    weights, mask, own, bias = _ATTENTION.get(node.operator, ((), -1, (), -1))
    value = node.first
    if not own or value.shape is None:
        return [node.unknown("its layout is not followed")] * len(node.proto.output)
    places = dict.fromkeys(own, 0)
    for index in (mask, bias):
        found = node.input(index) if index >= 0 else None
        if found is None or (found.kind is FREE and found.shape is not None and found.shape[:1] == (1,)):
            continue
        if found.kind is FREE and value.kind is ROWS:
            return [pinned(node, opaque_side())] * len(node.proto.output)
        if index == mask and (found.shape is None or len(found.shape) < 2):
            return [node.unknown("a mask of lengths may count through the batch")] * len(node.proto.output)
        places[index] = 0
    past = {"Attention": 4, "QAttention": 8}.get(node.operator, -1)
    if any(
        index not in {*places, *weights, mask, bias, past} and not node.free(index) for index in range(len(node.inputs))
    ):
        return [node.unknown("its layout is not followed")] * len(node.proto.output)
    shape: Shape = (*value.shape[:2], opaque_side())
    caches: list[tuple[Shape, int]] = [((1, *(opaque_side() for _ in range(3))), 0)] * 2
    if past >= 0:
        caches = [((2, 1, *(opaque_side() for _ in range(3))), 1)]
        places[past] = 1
    return batched(node, places, weights, [(shape, 0), *caches])


#: Of each operator: what is the same for all rows, the mask, what has the batch first, and what is added to scores.
_ATTENTION: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], int]] = {
    "Attention": ((1, 2, 6), 3, (0,), 5),
    "QAttention": ((1, 2, 3, 4, 6, 7), 5, (0,), -1),
    "MultiHeadAttention": ((3,), 4, (0, 1, 2, 6, 7), 5),
    "GroupQueryAttention": ((6, 7, 8), -1, (0, 1, 2, 3, 4, 5), -1),
}


@rule("QLinearAdd", "QLinearMul", domain=MS)
def _quantized_sum(node: Node) -> Value:
    second = node.input(3)
    assert second is not None
    odd = single_numbers(node, node.first, (1, 2, 4, 5, 6, 7))
    return broadcast(node, [node.first, second]) if odd is None else odd


@rule(
    "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearGlobalAveragePool", "QLinearAveragePool", domain=MS
)
def _quantized_one(node: Node) -> Value:
    value = node.first
    odd = single_numbers(node, value, (1, 2, 3, 4))
    if odd is not None:
        return odd
    if node.operator == "QLinearSoftmax":
        return along(node, node.number("axis", -1)) if node.number("opset", 13) >= 13 else _before(node)
    if node.operator.endswith("Pool"):
        return _quantized_pool(node)
    return node.give(value.shape, value.axis, value.outer)


def _before(node: Node) -> Value:
    return node.unknown("its axis is not followed") if node.first.axis != 0 else along(node, -1)


def _quantized_pool(node: Node) -> Value:
    value = node.first
    if value.shape is None or value.axis > 0:
        return node.unknown("the rows do not lie along its batch axis") if value.kind is ROWS else node.give(None)
    first, last = value.shape[0], node.number("channels_last", 0)
    middle = [opaque_side() for _ in value.shape[2:]]
    shape = (first, *middle, value.shape[-1]) if last else (first, value.shape[1], *middle)
    return node.give(shape, value.axis, value.outer)


@rule("NhwcMaxPool", "QLinearConv", domain=MS)
def _channels_last(node: Node) -> Answer:
    shape = node.first.shape
    given = None if shape is None else (*shape[:1], *(opaque_side() for _ in shape[1:]))
    return batched(node, {0: 0}, list(range(1, len(node.inputs))), [(given, 0)])


@rule("Inverse", domain=MS)
def _inverse(node: Node) -> Value:
    found = along(node, -1)
    return found if found.kind is not ROWS else along(node, -2)
