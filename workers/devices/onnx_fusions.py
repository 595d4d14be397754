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
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from workers.devices.base import Array

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


def new_node(
    before: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    *,
    domain: str = "",
    outputs: int = 1,
    **attributes: object,
) -> ir.Node:
    """A node put in front of another."""
    made = ir.node(kind, inputs, attributes=attributes or None, domain=domain, num_outputs=outputs)  # type: ignore[arg-type]
    assert before.graph is not None
    before.graph.insert_before(before, made)
    return made


def transposed(before: ir.Node, value: ir.Value, perm: Sequence[int]) -> ir.Value:
    """`value` transposed by a node in front of another, with what is known of its shape."""
    made = new_node(before, "Transpose", [value], perm=list(perm)).outputs[0]
    made.type = value.type
    if value.shape is not None and len(value.shape) == len(perm):
        made.shape = ir.Shape([value.shape[axis] for axis in perm])
    return made


def replace(old: ir.Value, new: ir.Value) -> None:
    """Gives every reader of `old` the value `new`, which has its type and shape."""
    new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new)


def constant(value: ir.Value | None) -> Array | None:
    """What a value is in every run; None where that depends on inputs, or is more than a small tensor."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size > 1 << 16 else np.asarray(tensor.numpy())


def number(value: ir.Value | None) -> float | None:
    """The one number that a constant is."""
    found = constant(value)
    return float(found.reshape(-1)[0]) if found is not None and found.size == 1 else None


def sides(value: ir.Value | None) -> list[int | None]:
    """The sides of a tensor, None for one that is not fixed; empty where even their count is not known."""
    if value is None or value.shape is None:
        return []
    return [side if isinstance(side, int) else None for side in value.shape]


def computed(value: ir.Value | None, depth: int = 0) -> Array | None:
    """A constant, or what follows from the fixed sides of tensors alone; NaN stands for what does not."""
    found = constant(value)
    if found is not None or value is None or depth > 12:
        return None if found is None else found.astype(np.float64)
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Shape" and not node.attributes:
        known = sides(node.inputs[0])
        return np.array([math.nan if side is None else side for side in known]) if known else None
    given = [computed(one, depth + 1) for one in node.inputs]
    if not given or any(one is None for one in given):
        return None
    whole = value.dtype is not None and value.dtype.is_integer()
    return _calculated(node.op_type, [one for one in given if one is not None], whole=whole)


def _calculated(kind: str, given: list[Array], *, whole: bool) -> Array | None:
    with np.errstate(all="ignore"):
        match kind, given:
            case (("Cast" | "Unsqueeze" | "Squeeze"), [one, *_]):
                return one.reshape(-1) if kind == "Unsqueeze" else one
            case "Sqrt", [one]:
                return np.asarray(np.sqrt(one))
            case "Div", [one, other]:
                return np.asarray(np.floor(one / other) if whole else one / other)
            case "Mul", [one, other]:
                return np.asarray(one * other)
            case "Add", [one, other]:
                return np.asarray(one + other)
            case "Gather", [one, at] if not np.isnan(at).any():
                return np.asarray(one[at.astype(np.int64)])
            case "Slice", [one, start, end] if one.ndim == 1 and not np.isnan([start, end]).any():
                return np.asarray(one[int(start[0]) : int(min(end[0], one.size))])
            case "Concat", [*_]:
                return np.concatenate([one.reshape(-1) for one in given])
    return None


# ---- rules


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
            found = [given[axis] for axis in _perm(node)] if len(given) == len(_perm(node)) else known
        before = node.outputs[0].shape
        if before is not None and len(found) == len(before):
            node.outputs[0].shape = ir.Shape(
                [old if new is None else new for old, new in zip(before, found, strict=True)]
            )


def _attention(softmax: ir.Node) -> bool:
    scores, mixed = _made_by(softmax.inputs[0], "MatMul"), _read_by(softmax.outputs[0], "MatMul")
    axis = softmax.attributes.get_int("axis", -1)
    if scores is None or mixed is None or mixed.inputs[0] is not softmax.outputs[0] or axis not in (-1, 3):
        return False
    query, query_scale = _unscaled(scores.inputs[0])
    key, key_scale = _unscaled(scores.inputs[1])
    if query_scale is None or key_scale is None:
        return False
    q, k, v = _heads_of(query, (0, 2, 1, 3)), _heads_of(key, TO_LAST), _heads_of(mixed.inputs[1], (0, 2, 1, 3))
    turned = _read_by(mixed.outputs[0], "Transpose")
    joined = None if turned is None else _read_by(turned.outputs[0], "Reshape")
    if q is None or k is None or v is None or turned is None or joined is None or not len({q[1], k[1], v[1]}) == 1:
        return False
    whole = sides(q[0])[2]
    if _perm(turned) != (0, 2, 1, 3) or len(sides(joined.outputs[0])) != 3 or whole is None or whole % q[1]:
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
    turned = _made_by(value, "Transpose")
    cut = None if turned is None or _perm(turned) != perm else _made_by(turned.inputs[0], "Reshape")
    if cut is None or cut.inputs[0] is None or len(sides(cut.inputs[0])) != 3:
        return None
    heads = sides(cut.outputs[0])
    return (cut.inputs[0], heads[2]) if len(heads) == 4 and heads[2] else None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float | None]:
    """What a value is before it is multiplied by one number, and that number: 1 without one, None if it is not known."""
    node = _made_by(value, "Mul")
    if node is None:
        return value, 1.0
    factor = computed(node.inputs[1])
    if factor is None or factor.size != 1 or np.isnan(factor).any():
        return value, None
    return node.inputs[0], float(factor.reshape(-1)[0])


def _split_gelu(erf: ir.Node) -> bool:
    """x · ½ · gate · (1 + erf(gate / √2)), where x and gate are the halves of a product with its bias."""
    halved = _made_by(erf.inputs[0], "Div")
    more = _read_by(erf.outputs[0], "Add")
    times = None if more is None else _read_by(more.outputs[0], "Mul")
    half = None if times is None else _read_by(times.outputs[0], "Mul")
    last = None if half is None else _read_by(half.outputs[0], "Mul")
    if halved is None or more is None or times is None or half is None or last is None:
        return False
    root, one, a_half = (
        number(halved.inputs[1]),
        number(_other(more, erf.outputs[0])),
        number(_other(half, times.outputs[0])),
    )
    if root is None or abs(root - math.sqrt(2)) > 1e-3 or one != 1 or a_half != 0.5:
        return False
    gate, x = halved.inputs[0], _other(last, half.outputs[0])
    if _other(times, more.outputs[0]) is not gate:
        return False
    first, second = _made_by(x, "Slice"), _made_by(gate, "Slice")
    if first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return False
    added = _made_by(first.inputs[0], "Add", alone=False)
    size = (sides(first.inputs[0]) or [None])[-1]
    if added is None or size not in SPLIT_GELU_SIZES or len(sides(first.inputs[0])) != 3:
        return False
    if _cut(first) != (0, size // 2) or _cut(second) != (size // 2, size):
        return False
    product, bias = _biased(added)
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
    grouped, restored = _made_by(norm.inputs[0], "Reshape"), _read_by(norm.outputs[0], "Reshape")
    scaled = None if restored is None else _read_by(restored.outputs[0], "Mul")
    shifted = None if scaled is None else _read_by(scaled.outputs[0], "Add")
    if grouped is None or restored is None or scaled is None or shifted is None:
        return False
    x = grouped.inputs[0]
    ones, zeros = constant(norm.inputs[1]), constant(norm.inputs[2])
    gamma, beta = constant(_other(scaled, restored.outputs[0])), constant(_other(shifted, scaled.outputs[0]))
    channels = sides(x)[1] if len(sides(x)) == 4 else None
    if x is None or ones is None or zeros is None or gamma is None or beta is None or channels is None:
        return False
    cut = constant(grouped.inputs[1])
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
    weights = [_initializer(node, one.astype(np.float32).reshape(-1)) for one in (gamma, beta)]
    made = new_node(
        node, "GroupNorm", [transposed(node, x, TO_LAST), *weights], domain=DOMAIN, groups=int(ones.size),
        epsilon=norm.attributes.get_float("epsilon", 1e-5), activation=int(last is not None), channels_last=1,
    ).outputs[0]  # fmt: skip
    _known_as(made, node.outputs[0], TO_LAST)
    replace(node.outputs[0], transposed(node, made, TO_FIRST))
    return True


def _silu(value: ir.Value) -> ir.Node | None:
    """The node that gives x · sigmoid(x), where nothing else reads x."""
    readers = [use.node for use in value.uses()]
    gates = [node for node in readers if node.op_type == "Sigmoid"]
    if len(gates) != 1 or len(readers) != 2:
        return None
    product = _read_by(gates[0].outputs[0], "Mul")
    return product if product in readers else None


def _skip_layer_norm(norm: ir.Node) -> bool:
    added = _made_by(norm.inputs[0], "Add", alone=False)
    if any(node is not None and node.outputs[0].is_graph_output() for node in (norm, added)):
        return False
    gamma, beta = norm.inputs[1], norm.inputs[2] if len(norm.inputs) > 2 else None
    if added is None or gamma is None or beta is None or norm.attributes.get_int("axis", -1) not in (-1, 2):
        return False
    width = sides(gamma)
    for operand in added.inputs:
        known = sides(operand)
        if len(known) != 3 or known[2:] != width or 1 in known or constant(operand) is not None:
            return False
    operands: list[ir.Value | None] = list(added.inputs)
    bias = None
    for at, operand in enumerate(operands):
        before = _made_by(operand, "Add")
        if before is not None:
            product, found = _biased(before)
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
    made = new_node(conv, "NhwcConv", inputs, domain=DOMAIN, group=1, **attributes).outputs[0]
    _known_as(made, conv.outputs[0], TO_LAST)
    replace(conv.outputs[0], transposed(conv, made, TO_FIRST))
    return True


# ---- reading the graph


def _made_by(value: ir.Value | None, kind: str, *, alone: bool = True) -> ir.Node | None:
    """The node of this kind that gives `value`; `alone` wants one reader of it."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != kind or node.domain:
        return None
    return node if not alone or kind in ("Slice", "Transpose", "Reshape") or _alone(value) else None


def _read_by(value: ir.Value, kind: str) -> ir.Node | None:
    """The only reader of `value`, where it is of this kind."""
    readers = list(value.uses())
    if len(readers) != 1 or value.is_graph_output() or readers[0].node.op_type != kind or readers[0].node.domain:
        return None
    return readers[0].node


def _alone(value: ir.Value) -> bool:
    """Whether one node reads a value, besides those that ask for its shape."""
    return not value.is_graph_output() and sum(use.node.op_type != "Shape" for use in value.uses()) == 1


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input of a node of two that is not `value`."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _biased(added: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """What is added to, and the bias of one axis that is added."""
    for at in (0, 1):
        bias, product = added.inputs[at], added.inputs[1 - at]
        if bias is not None and bias.is_initializer() and len(sides(bias)) == 1 and len(sides(product)) == 3:
            return product, bias
    return None, None


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()


def _known_as(made: ir.Value, other: ir.Value, perm: Sequence[int]) -> None:
    made.type = other.type
    if other.shape is not None and len(other.shape) == len(perm):
        made.shape = ir.Shape([other.shape[axis] for axis in perm])


def _initializer(near: ir.Node, values: Array) -> ir.Value:
    graph = near.graph
    assert graph is not None
    name = f"{near.outputs[0].name}_fused_{len(graph.initializers)}"
    tensor = ir.tensor(values, name=name)
    made = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(made)  # type: ignore[union-attr, unused-ignore]
    return made
