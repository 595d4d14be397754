"""Random small graphs, of operators that keep rows apart and operators that do not, with shapes asked for in between.

Every step takes tensors made so far and is kept only if ONNX Runtime could run it on one caller's rows: NumPy-like
shapes are followed by running, not by guessing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

Draw = Callable[[st.SearchStrategy], object]

#: Sides behind the rows' axis; few, so that they meet; 2 and 3 are also numbers of rows that callers send.
SIDES = st.sampled_from([1, 2, 3, 4])


@dataclass
class Made:
    """A graph under construction: tensors by name, with the rank that they have."""

    draw: Draw
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    floats: list[tuple[str, int]] = field(default_factory=list)
    shapes: list[tuple[str, int]] = field(default_factory=list)
    count: int = 0

    def name(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def constant(self, value: object, dtype: type) -> str:
        name = self.name()
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def node(self, operator: str, inputs: list[str], rank: int, outputs: int = 1, **attributes: object) -> str:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        self.floats.append((names[0], rank))
        return names[0]

    def whole(self, operator: str, inputs: list[str], length: int, **attributes: object) -> str:
        name = self.name()
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        self.shapes.append((name, length))
        return name

    def pick(self, least: int = 0) -> tuple[str, int]:
        found = [tensor for tensor in self.floats if tensor[1] >= least] or self.floats
        # The latest come more often, so that what is made is used.
        return self.draw(st.sampled_from([*found, *found[-2:], *found[-1:] * 3]))  # type: ignore[return-value]

    def axis(self, rank: int) -> int:
        return self.draw(st.integers(-rank, rank - 1)) if rank else 0  # type: ignore[return-value]

    def weights(self, *shape: int) -> str:
        seed = self.draw(st.integers(0, 99))
        return self.constant(np.random.default_rng(seed).standard_normal(shape), np.float32)  # type: ignore[arg-type]


def _elementwise(made: Made) -> None:
    a, rank = made.pick()
    b, other = made.pick()
    made.node(made.draw(st.sampled_from(["Add", "Sub", "Mul", "Max"])), [a, b], max(rank, other))  # type: ignore[arg-type]


def _unary(made: Made) -> None:
    a, rank = made.pick()
    made.node(made.draw(st.sampled_from(["Relu", "Sigmoid", "Tanh", "Neg", "Identity", "Softsign"])), [a], rank)  # type: ignore[arg-type]


def _with_constant(made: Made) -> None:
    a, rank = made.pick()
    shape = made.draw(st.lists(SIDES, max_size=3))
    made.node("Add", [a, made.weights(*shape)], max(rank, len(shape)))  # type: ignore[arg-type, misc]


def _reduce(made: Made) -> None:
    a, rank = made.pick(1)
    keep = made.draw(st.integers(0, 1))
    operator = made.draw(st.sampled_from(["ReduceMean", "ReduceMax"]))
    made.node(operator, [a], rank if keep else max(rank - 1, 0), axes=[made.axis(rank)], keepdims=keep)  # type: ignore[arg-type]


def _reduce_all(made: Made) -> None:
    a, _ = made.pick()
    made.node("ReduceSum", [a], 0, keepdims=0)


def _along(made: Made) -> None:
    a, rank = made.pick(1)
    made.node(made.draw(st.sampled_from(["Softmax", "LogSoftmax", "Hardmax"])), [a], rank, axis=made.axis(rank))  # type: ignore[arg-type]


def _cumulate(made: Made) -> None:
    a, rank = made.pick(1)
    made.node("CumSum", [a, made.constant(made.axis(rank), np.int64)], rank)


def _transpose(made: Made) -> None:
    a, rank = made.pick(1)
    made.node("Transpose", [a], rank, perm=made.draw(st.permutations(range(rank))))


def _matmul(made: Made) -> None:
    a, rank = made.pick(1)
    b, other = made.pick(1)
    made.node("MatMul", [a, b], max(rank, other))


def _own_products(made: Made) -> None:
    a, rank = made.pick(2)
    turned = made.node("Transpose", [a], rank, perm=[*range(rank - 2), rank - 1, rank - 2][-rank:])
    made.node("MatMul", [a, turned], rank)


def _weighted(made: Made) -> None:
    a, rank = made.pick(2)
    made.node("MatMul", [a, made.weights(made.draw(SIDES), made.draw(SIDES))], rank)  # type: ignore[arg-type]


def _gather(made: Made) -> None:
    a, rank = made.pick(1)
    index = made.constant(made.draw(st.lists(st.integers(-1, 1), min_size=1, max_size=3)), np.int64)
    made.node("Gather", [a, index], rank, axis=made.axis(rank))


def _slice(made: Made) -> None:
    a, rank = made.pick(1)
    bounds = made.draw(st.sampled_from([(0, 1, 1), (1, 9, 1), (0, 2**31 - 1, 1), (-1, -9, -1), (0, 9, 2)]))
    parts = [made.constant([value], np.int64) for value in (bounds[0], bounds[1], made.axis(rank), bounds[2])]  # type: ignore[index]
    made.node("Slice", [a, *parts], rank)


def _concat(made: Made) -> None:
    a, rank = made.pick(1)
    b, _ = made.draw(st.sampled_from([tensor for tensor in made.floats if tensor[1] == rank]))  # type: ignore[misc]
    made.node("Concat", [a, b], rank, axis=made.axis(rank))


def _split(made: Made) -> None:
    a, rank = made.pick(1)
    made.node("Split", [a], rank, outputs=2, axis=made.axis(rank))


def _tile(made: Made) -> None:
    a, rank = made.pick(1)
    often = made.draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    made.node("Tile", [a, made.constant(often, np.int64)], rank)


def _pad(made: Made) -> None:
    a, rank = made.pick(1)
    pads = made.draw(st.lists(st.sampled_from([0, 0, 1]), min_size=2 * rank, max_size=2 * rank))
    made.node("Pad", [a, made.constant(pads, np.int64)], rank)


def _unsqueeze(made: Made) -> None:
    a, rank = made.pick()
    made.node("Unsqueeze", [a, made.constant([made.axis(rank + 1)], np.int64)], rank + 1)


def _squeeze(made: Made) -> None:
    a, rank = made.pick(1)
    if made.draw(st.booleans()):
        made.node("Squeeze", [a, made.constant([made.axis(rank)], np.int64)], rank - 1)
    else:
        made.node("Squeeze", [a], max(rank - 1, 0))


def _top_k(made: Made) -> None:
    a, rank = made.pick(1)
    count = made.draw(st.sampled_from(made.shapes))[0] if made.shapes and made.draw(st.booleans()) else None
    k = made.constant([1], np.int64) if count is None else count
    made.node("TopK", [a, k], rank, outputs=2, axis=made.axis(rank))


def _flatten(made: Made) -> None:
    a, rank = made.pick()
    made.node("Flatten", [a], 2, axis=made.draw(st.integers(-rank, rank)))


def _reshape(made: Made) -> None:
    a, _ = made.pick()
    shape = made.draw(st.lists(st.sampled_from([-1, 0, 1, 2, 3, 4, 6]), min_size=1, max_size=3))
    made.node("Reshape", [a, made.constant(shape, np.int64)], len(shape))  # type: ignore[arg-type]


def _layer_norm(made: Made) -> None:
    a, rank = made.pick(1)
    made.node("LayerNormalization", [a, made.constant(1, np.float32)], rank, axis=made.axis(rank))


def _lookup(made: Made) -> None:
    a, rank = made.pick()
    clipped = made.node("Clip", [a, made.constant(0, np.float32), made.constant(2, np.float32)], rank)
    index = made.name()
    made.nodes.append(helper.make_node("Cast", [clipped], [index], to=TensorProto.INT64))
    table, other = (made.weights(3, 2), 2) if made.draw(st.booleans()) else made.pick(1)
    made.node("Gather", [table, index], rank + other - 1, axis=0)


def _branch(made: Made) -> None:
    a, rank = made.pick()
    low = made.node("ReduceMin", [made.pick()[0]], 0, keepdims=0)
    condition = made.name()
    made.nodes.append(helper.make_node("Less", [low, made.constant(0, np.float32)], [condition]))
    branches = [
        helper.make_graph([helper.make_node(operator, [a], ["out"])], operator, [], [_declared("out")])
        for operator in ("Relu", "Neg")
    ]
    made.node("If", [condition], rank, then_branch=branches[0], else_branch=branches[1])


def _loop(made: Made) -> None:
    a, rank = made.pick()
    rounds = made.draw(st.sampled_from(made.shapes))[0] if made.shapes and made.draw(st.booleans()) else None
    if rounds is not None:
        rounds = made.whole("ReduceSum", [rounds], 0, keepdims=0)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["on"], ["still"]),
            helper.make_node(made.draw(st.sampled_from(["Add", "Sub"])), ["state", a], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            _declared("state"),
        ],
        [helper.make_tensor_value_info("still", TensorProto.BOOL, []), _declared("next")],
    )
    often = rounds or made.constant(2, np.int64)
    made.node("Loop", [often, made.constant(True, np.bool_), a], rank, body=body)


def _growing_loop(made: Made) -> None:
    """What is carried grows along an axis."""
    a, rank = made.pick(1)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["on"], ["still"]),
            helper.make_node("Concat", ["state", a], ["next"], axis=made.axis(rank)),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            _declared("state"),
        ],
        [helper.make_tensor_value_info("still", TensorProto.BOOL, []), _declared("next")],
    )
    made.node("Loop", [made.constant(2, np.int64), made.constant(True, np.bool_), a], rank, body=body)


def _einsum(made: Made) -> None:
    a, rank = made.pick(1)
    b, other = made.pick(1)
    letters = made.draw(st.lists(st.sampled_from("abc"), min_size=rank + other, max_size=rank + other))
    left, right = "".join(letters[:rank]), "".join(letters[rank:])
    out = made.draw(st.permutations(sorted({*letters})))[: made.draw(st.integers(0, 3))]  # type: ignore[misc]
    made.node("Einsum", [a, b], len(out), equation=f"{left},{right}->{''.join(out)}")


def _where(made: Made) -> None:
    a, rank = made.pick()
    b, other = made.pick()
    condition = made.name()
    made.nodes.append(helper.make_node("Less", [a, made.constant(0, np.float32)], [condition]))
    made.node("Where", [condition, a, b], max(rank, other))


def _picked(made: Made) -> None:
    a, rank = made.pick(1)
    axis, index = made.axis(rank), made.name()
    made.nodes.append(helper.make_node("ArgMax", [a], [index], axis=axis, keepdims=1))
    made.node("GatherElements", [made.pick(1)[0], index], rank, axis=axis)


def _declared(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


# ---- shapes, and what is made of them


def _shape(made: Made) -> None:
    a, rank = made.pick(1)
    made.whole("Shape", [a], rank)


def _shape_part(made: Made) -> None:
    shape, length = made.draw(st.sampled_from(made.shapes))  # type: ignore[misc]
    at = made.draw(st.integers(0, max(length - 1, 0)))
    made.whole("Gather", [shape, made.constant([at], np.int64)], 1, axis=0)


def _shape_joined(made: Made) -> None:
    parts = made.draw(st.lists(st.sampled_from(made.shapes), min_size=1, max_size=2))
    more = made.constant([made.draw(st.sampled_from([-1, 1, 2, 3]))], np.int64)
    order = [part[0] for part in parts]  # type: ignore[attr-defined]
    order.insert(made.draw(st.integers(0, len(order))), more)  # type: ignore[arg-type]
    made.whole("Concat", order, sum(part[1] for part in parts) + 1, axis=0)  # type: ignore[attr-defined]


def _shape_arithmetic(made: Made) -> None:
    shape, length = made.draw(st.sampled_from(made.shapes))  # type: ignore[misc]
    operator = made.draw(st.sampled_from(["Mul", "Div", "Add", "Sub"]))
    made.whole(operator, [shape, made.constant([made.draw(st.integers(1, 3))], np.int64)], length)  # type: ignore[arg-type]


def _shape_scaled(made: Made) -> None:
    """A size as exporters compute it for a resize: in floating point, and rounded."""
    shape, length = made.draw(st.sampled_from(made.shapes))  # type: ignore[misc]
    real, scaled, rounded = made.name(), made.name(), made.name()
    factor = made.constant(made.draw(st.sampled_from([0.5, 1.0, 2.0, 0.7])), np.float32)
    made.nodes += [
        helper.make_node("Cast", [shape], [real], to=TensorProto.FLOAT),
        helper.make_node(made.draw(st.sampled_from(["Mul", "Div"])), [real, factor], [scaled]),
        helper.make_node(made.draw(st.sampled_from(["Floor", "Ceil"])), [scaled], [rounded]),
    ]
    made.whole("Cast", [rounded], length, to=TensorProto.INT64)


def _reshape_by(made: Made) -> None:
    a, _ = made.pick()
    shape, length = made.draw(st.sampled_from(made.shapes))  # type: ignore[misc]
    made.node("Reshape", [a, shape], length)


def _expand(made: Made) -> None:
    a, rank = made.pick()
    shape, length = made.draw(st.sampled_from(made.shapes))  # type: ignore[misc]
    made.node("Expand", [a, shape], max(rank, length))


def _filled(made: Made) -> None:
    shape, length = made.draw(st.sampled_from(made.shapes))  # type: ignore[misc]
    value = numpy_helper.from_array(np.array([0.5], np.float32))
    made.node("ConstantOfShape", [shape], length, value=value)


def _as_values(made: Made) -> None:
    shape, _ = made.draw(st.sampled_from(made.shapes))  # type: ignore[misc]
    made.node("Cast", [shape], 1, to=TensorProto.FLOAT)


def _counted(made: Made) -> None:
    shape, _ = made.draw(st.sampled_from(made.shapes))  # type: ignore[misc]
    limit = made.whole("ReduceMax", [shape], 0, keepdims=0)
    numbered = made.name()
    zero, one = made.constant(0, np.int64), made.constant(1, np.int64)
    made.nodes.append(helper.make_node("Range", [zero, limit, one], [numbered]))
    if made.draw(st.booleans()):
        a, rank = made.pick(1)
        made.node("Gather", [a, numbered], rank, axis=made.axis(rank))
    else:
        made.node("Cast", [numbered], 1, to=TensorProto.FLOAT)


#: What keeps rows apart comes more often, so that graphs stay proven long enough to be worth comparing.
STEPS: list[Callable[[Made], None]] = [
    *([_elementwise, _unary, _with_constant, _weighted, _shape, _shape_joined, _reshape_by] * 3),
    _reduce, _reduce, _reduce_all, _along, _along, _cumulate, _transpose, _transpose, _matmul, _own_products, _gather,
    _slice, _concat, _concat, _split, _tile, _pad, _unsqueeze, _unsqueeze, _squeeze, _top_k, _flatten, _flatten,
    _reshape, _reshape, _layer_norm, _lookup, _branch, _loop, _shape_part, _shape_part, _shape_arithmetic, _expand,
    _expand, _filled, _as_values, _counted, _growing_loop, _einsum, _einsum, _where, _picked, _shape_scaled,
]  # fmt: skip

_OF_SHAPES = {
    _shape_scaled,
    _shape_part,
    _shape_joined,
    _shape_arithmetic,
    _reshape_by,
    _expand,
    _filled,
    _as_values,
    _counted,
}


@st.composite
def graphs(draw: Draw) -> tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]:
    """A graph, and what its inputs' rows look like: each side behind the first."""
    sides = {"x": tuple(draw(st.lists(SIDES, max_size=3)))}  # type: ignore[call-overload]
    if draw(st.booleans()):
        sides["z"] = tuple(draw(st.lists(SIDES, max_size=2)))  # type: ignore[call-overload]
    made = Made(draw)
    made.floats = [(name, len(shape) + 1) for name, shape in sides.items()]
    for _ in range(draw(st.integers(1, 7))):  # type: ignore[call-overload]
        step = draw(st.sampled_from(STEPS))
        if step in _OF_SHAPES and not made.shapes:
            step = _shape
        step(made)  # type: ignore[operator]
    out = made.floats[-1][0]
    if out in sides:
        out = made.node("Identity", [out], made.floats[-1][1])
    inputs = [
        helper.make_tensor_value_info(
            name,
            TensorProto.FLOAT,
            ["n", *(side if draw(st.booleans()) else f"{name}{at}" for at, side in enumerate(shape))],
        )
        for name, shape in sides.items()
    ]
    graph = helper.make_graph(_used(made.nodes, out), "random", inputs, [_declared(out)], made.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model, sides


def _used(nodes: list[onnx.NodeProto], out: str) -> list[onnx.NodeProto]:
    """Without what the output does not need: an operator that fails there would fail the whole run."""
    needed, kept = {out}, []
    for node in reversed(nodes):
        if needed.isdisjoint(node.output):
            continue
        kept.append(node)
        needed.update(node.input)
        for attribute in node.attribute:
            needed.update(name for inner in attribute.g.node for name in inner.input)
    return kept[::-1]
