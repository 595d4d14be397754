"""What the graphs of diffusion models spell out, joined into ONNX Runtime's own operators (domain com.microsoft).

    MatMul ─ Softmax ─ MatMul over heads      ▶ MultiHeadAttention
    Add ─ LayerNormalization                  ▶ SkipLayerNormalization, with the sum as a second result
    Add ─ Slice, Slice ─ Gelu ─ Mul           ▶ BiasSplitGelu
    InstanceNormalization over groups ─ SiLU  ▶ GroupNorm, channels last
    Conv                                      ▶ NhwcConv, channels last

Each is joined only where the graph says its sizes and constants and nothing else uses what lies between. The last two
stand between transpositions, which `onnx_channels_last` removes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from workers.devices.onnx.fusions.matching import (
    biased,
    computed,
    constant_of,
    initializer,
    known_as,
    made_by,
    new_node,
    number,
    other,
    perm_of,
    read_by,
    replace,
    sides,
    transposed,
)

#: Where ONNX Runtime keeps its own operators.
DOMAIN = "com.microsoft"

#: Sizes of both halves together for which ONNX Runtime has a kernel of BiasSplitGelu.
SPLIT_GELU_SIZES = frozenset({2560, 5120, 10240})

#: The widest head of which ONNX Runtime's flash attention takes tensors.
WIDEST_HEAD = 256

#: Channels of a convolution worth its place in channels last are a multiple of this: half a vector of tensor cores.
CONV_CHANNELS = 8

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def fuse(graph: ir.Graph) -> int:
    """Joins what fits, in place; the count of joined places."""
    _drop_identities(graph)
    _find_sides(graph)
    rules: tuple[tuple[str, Callable[[ir.Node], bool]], ...] = (
        ("Softmax", _attention),
        ("Erf", _split_gelu),
        ("InstanceNormalization", _group_norm),
        ("LayerNormalization", _skip_layer_norm),
        ("Conv", _conv),
    )
    joined = 0
    for kind, rule in rules:
        joined += sum(rule(node) for node in list(graph) if node.op_type == kind and node.domain == "")
    return joined


def _drop_identities(graph: ir.Graph) -> None:
    """Takes out what changes nothing: Identity, a division by one, a conversion to what a tensor is already."""
    for node in list(graph):
        if node.domain or node.outputs[0].is_graph_output():
            continue
        given = node.inputs[0] if node.inputs else None
        idle = node.op_type == "Identity"
        idle |= node.op_type == "Div" and number(node.inputs[1]) == 1 and not sides(node.inputs[1])
        if node.op_type == "Cast" and given is not None and given.dtype is not None:
            idle |= node.attributes["to"].as_int() == given.dtype.value
        if idle and given is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], given)


def _find_sides(graph: ir.Graph) -> None:
    """Notes the sides that ONNX leaves open though what a tensor is reshaped to follows from fixed ones: heads."""
    for node in graph:
        known = sides(node.outputs[0]) if node.op_type in ("Reshape", "Transpose") and not node.domain else []
        if None not in known:
            continue
        if node.op_type == "Reshape":
            wanted = computed(node.inputs[1])
            if wanted is None or wanted.size != len(known):
                continue
            # Of a side that is copied (0) or follows from the others (-1) nothing is said here.
            found = [int(side) if side > 0 else None for side in wanted]
        else:
            given = sides(node.inputs[0])
            found = [given[axis] for axis in perm_of(node)] if len(given) == len(perm_of(node)) else known
        before = node.outputs[0].shape
        if before is not None and len(found) == len(before):
            node.outputs[0].shape = ir.Shape(
                [old if new is None else new for old, new in zip(before, found, strict=True)]
            )


def _attention(softmax: ir.Node) -> bool:
    scores, mixed = made_by(softmax.inputs[0], "MatMul"), read_by(softmax.outputs[0], "MatMul")
    axis = softmax.attributes.get_int("axis", -1)
    if scores is None or mixed is None or mixed.inputs[0] is not softmax.outputs[0] or axis not in (-1, 3):
        return False
    query, query_scale = _unscaled(scores.inputs[0])
    key, key_scale = _unscaled(scores.inputs[1])
    if query_scale is None or key_scale is None:
        return False
    q, k, v = _heads_of(query, (0, 2, 1, 3)), _heads_of(key, TO_LAST), _heads_of(mixed.inputs[1], (0, 2, 1, 3))
    turned = read_by(mixed.outputs[0], "Transpose")
    joined = None if turned is None else read_by(turned.outputs[0], "Reshape")
    if q is None or k is None or v is None or turned is None or joined is None or len({q[1], k[1], v[1]}) != 1:
        return False
    whole = sides(q[0])[2]
    if perm_of(turned) != (0, 2, 1, 3) or len(sides(joined.outputs[0])) != 3 or whole is None or whole % q[1]:
        return False
    if whole // q[1] > WIDEST_HEAD or sides(k[0])[2] != whole or sides(v[0])[2] != whole:
        return False
    made = new_node(
        joined, "MultiHeadAttention", [q[0], k[0], v[0]], domain=DOMAIN, num_heads=q[1], scale=query_scale * key_scale
    )
    replace(joined.outputs[0], made.outputs[0])
    return True


def _heads_of(value: ir.Value | None, perm: tuple[int, ...]) -> tuple[ir.Value, int] | None:
    """The tensor `[b, s, heads x d]` that is cut into heads and transposed to `value`, and how many heads there are."""
    turned = made_by(value, "Transpose")
    cut = None if turned is None or perm_of(turned) != perm else made_by(turned.inputs[0], "Reshape")
    if cut is None or cut.inputs[0] is None or len(sides(cut.inputs[0])) != 3:
        return None
    heads = sides(cut.outputs[0])
    return (cut.inputs[0], heads[2]) if len(heads) == 4 and heads[2] else None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float | None]:
    """What a value is before it is multiplied by a number, and that number: 1 without one, None if it is not known."""
    node = made_by(value, "Mul")
    if node is None:
        return value, 1.0
    factor = computed(node.inputs[1])
    if factor is None or factor.size != 1 or np.isnan(factor).any():
        return value, None
    return node.inputs[0], float(factor.reshape(-1)[0])


def _split_gelu(erf: ir.Node) -> bool:
    """x · ½ · gate · (1 + erf(gate / √2)), where x and gate are the halves of a product with its bias."""
    halved = made_by(erf.inputs[0], "Div")
    more = read_by(erf.outputs[0], "Add")
    times = None if more is None else read_by(more.outputs[0], "Mul")
    half = None if times is None else read_by(times.outputs[0], "Mul")
    last = None if half is None else read_by(half.outputs[0], "Mul")
    if halved is None or more is None or times is None or half is None or last is None:
        return False
    root, one, a_half = (
        number(halved.inputs[1]),
        number(other(more, erf.outputs[0])),
        number(other(half, times.outputs[0])),
    )
    if root is None or abs(root - math.sqrt(2)) > 1e-3 or one != 1 or a_half != 0.5:
        return False
    gate, x = halved.inputs[0], other(last, half.outputs[0])
    if other(times, more.outputs[0]) is not gate:
        return False
    first, second = made_by(x, "Slice"), made_by(gate, "Slice")
    if first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return False
    added = made_by(first.inputs[0], "Add", alone=False)
    size = (sides(first.inputs[0]) or [None])[-1]
    if added is None or size not in SPLIT_GELU_SIZES or len(sides(first.inputs[0])) != 3:
        return False
    if _cut(first) != (0, size // 2) or _cut(second) != (size // 2, size):
        return False
    product, bias = biased(added)
    if product is None or bias is None:
        return False
    made = new_node(last, "BiasSplitGelu", [product, bias], domain=DOMAIN)
    replace(last.outputs[0], made.outputs[0])
    return True


def _cut(node: ir.Node) -> tuple[float, float] | None:
    """Where a slice along the last axis begins and ends."""
    known = [computed(one) for one in node.inputs[1:]]
    if len(known) not in (3, 4) or any(one is None or one.size != 1 or np.isnan(one).any() for one in known):
        return None
    start, end, axis, *step = [float(one.reshape(-1)[0]) for one in known if one is not None]
    return (start, end) if axis in (-1, 2) and step in ([], [1.0]) else None


def _group_norm(norm: ir.Node) -> bool:
    grouped, restored = made_by(norm.inputs[0], "Reshape"), read_by(norm.outputs[0], "Reshape")
    scaled = None if restored is None else read_by(restored.outputs[0], "Mul")
    shifted = None if scaled is None else read_by(scaled.outputs[0], "Add")
    if grouped is None or restored is None or scaled is None or shifted is None:
        return False
    x = grouped.inputs[0]
    ones, zeros = constant_of(norm.inputs[1]), constant_of(norm.inputs[2])
    gamma, beta = constant_of(other(scaled, restored.outputs[0])), constant_of(other(shifted, scaled.outputs[0]))
    channels = sides(x)[1] if len(sides(x)) == 4 else None
    if x is None or ones is None or zeros is None or gamma is None or beta is None or channels is None:
        return False
    cut = constant_of(grouped.inputs[1])
    if cut is None or cut.tolist() != [0, ones.size, -1] or not (ones == 1).all() or zeros.any():
        return False
    of_channels = (channels, 1, 1)
    if (
        gamma.shape[-3:] != of_channels
        or beta.shape[-3:] != of_channels
        or gamma.size != channels
        or beta.size != channels
    ):
        return False
    if channels % ones.size or channels // ones.size % 2:  # the kernel takes channels by twos
        return False
    last = _silu(shifted.outputs[0])
    node = last or shifted
    weights = [initializer(node, one.astype(np.float32).reshape(-1)) for one in (gamma, beta)]
    made = new_node(
        node, "GroupNorm", [transposed(node, x, TO_LAST), *weights], domain=DOMAIN, groups=int(ones.size),
        epsilon=norm.attributes.get_float("epsilon", 1e-5), activation=int(last is not None), channels_last=1,
    ).outputs[0]  # fmt: skip
    known_as(made, node.outputs[0], TO_LAST)
    replace(node.outputs[0], transposed(node, made, TO_FIRST))
    return True


def _silu(value: ir.Value) -> ir.Node | None:
    """The node that gives x · sigmoid(x), where nothing else reads x."""
    readers = [use.node for use in value.uses()]
    gates = [node for node in readers if node.op_type == "Sigmoid"]
    if len(gates) != 1 or len(readers) != 2:
        return None
    product = read_by(gates[0].outputs[0], "Mul")
    return product if product in readers else None


def _skip_layer_norm(norm: ir.Node) -> bool:
    added = made_by(norm.inputs[0], "Add", alone=False)
    if any(node is not None and node.outputs[0].is_graph_output() for node in (norm, added)):
        return False
    gamma, beta = norm.inputs[1], norm.inputs[2] if len(norm.inputs) > 2 else None
    if added is None or gamma is None or beta is None or norm.attributes.get_int("axis", -1) not in (-1, 2):
        return False
    width = sides(gamma)
    for operand in added.inputs:
        known = sides(operand)
        if len(known) != 3 or known[2:] != width or 1 in known or constant_of(operand) is not None:
            return False
    operands: list[ir.Value | None] = list(added.inputs)
    bias = None
    for at, operand in enumerate(operands):
        before = made_by(operand, "Add")
        if before is not None:
            product, found = biased(before)
            if product is not None and found is not None:
                operands[at], bias = product, found
                break
    made = new_node(
        added, "SkipLayerNormalization", [*operands, gamma, beta, *([bias] if bias is not None else [])],
        domain=DOMAIN, outputs=4, epsilon=norm.attributes.get_float("epsilon", 1e-5),
    )  # fmt: skip
    replace(norm.outputs[0], made.outputs[0])
    replace(added.outputs[0], made.outputs[3])
    made.outputs[1].name = made.outputs[2].name = ""
    return True


def _conv(conv: ir.Node) -> bool:
    x, weight = conv.inputs[0], conv.inputs[1]
    known = sides(weight)
    plain = conv.attributes.get_int("group", 1) == 1 and conv.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    if x is None or weight is None or not weight.is_initializer() or len(known) != 4 or not plain:
        return False
    outs, ins = known[0], known[1]
    if outs is None or ins is None or outs % CONV_CHANNELS or ins % CONV_CHANNELS or conv.outputs[0].is_graph_output():
        return False
    attributes = {
        name: conv.attributes[name].as_ints()
        for name in ("dilations", "kernel_shape", "pads", "strides") if name in conv.attributes
    }  # fmt: skip
    # ONNX Runtime transposes the weights once, at the load.
    inputs = [transposed(conv, x, TO_LAST), transposed(conv, weight, TO_LAST), *conv.inputs[2:]]
    node = ir.node("NhwcConv", inputs, attributes={"group": 1, **attributes}, domain=DOMAIN)
    assert conv.graph is not None
    conv.graph.insert_before(conv, node)
    made = node.outputs[0]
    known_as(made, conv.outputs[0], TO_LAST)
    replace(conv.outputs[0], transposed(conv, made, TO_FIRST))
    return True
