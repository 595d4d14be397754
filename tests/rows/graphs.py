"""ONNX graphs whose rows are not independent although they look so, and some that are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Rows = dict[str, np.ndarray]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
node = helper.make_node


@dataclass(frozen=True)
class Case:
    """A graph, how one caller's rows are drawn, and what is proven of it."""

    name: str
    model: onnx.ModelProto
    rows: Callable[[np.random.Generator], Rows]
    proof: str
    #: The operator that decides, where one does.
    operator: str = ""


def value(name: str, shape: Sequence[Any] | None, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def const(name: str, content: Any, dtype: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(content, dtype), name)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Sequence[onnx.TensorProto] = (),
    opset: int = 17,
    domain: str = "",
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "case", inputs, outputs, constants)
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    made = helper.make_model(graph, opset_imports=imports, functions=functions)
    made.ir_version = 8 if opset < 20 else 10
    return made


def _normal(*shape: int, name: str = "x") -> Callable[[np.random.Generator], Rows]:
    return lambda random: {name: (random.standard_normal(shape) * 10.0 ** random.integers(0, 3)).astype(np.float32)}


def simple(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    proof: str,
    operator: str = "",
    *,
    row: Sequence[int] = (1, 4),
    constants: Sequence[onnx.TensorProto] = (),
    side: Sequence[Any] | None = None,
    rows: Callable[[np.random.Generator], Rows] | None = None,
    **more: Any,
) -> Case:
    """A graph from x to y, both with `row`'s sides behind the first."""
    shape = ["n", *(side if side is not None else row[1:])]
    made = model(nodes, [value("x", shape)], [value("y", ["n", *[None] * (len(row) - 1)])], constants, **more)
    return Case(name, made, rows or _normal(*row), proof, operator)


def reported() -> Iterator[Case]:
    """What people reported of model servers: each gave callers each other's values."""
    image = lambda random: {  # noqa: E731
        "x": (random.random((1, 3, 64, 64)) * 10.0 ** random.integers(-1, 2) + random.integers(0, 6)).astype("f4")
    }
    yield Case("standardise over everything", model(
        [node("ReduceMean", ["x"], ["m"], keepdims=0), node("Sub", ["x", "m"], ["d"]), node("Mul", ["d", "d"], ["q"]),
         node("ReduceMean", ["q"], ["v"], keepdims=0), node("Sqrt", ["v"], ["s"]), node("Div", ["d", "s"], ["y"])],
        [value("x", ["batch", 3, 64, 64])], [value("y", ["batch", 3, 64, 64])]), image, "disproven", "ReduceMean")  # fmt: skip
    yield Case("divide by the largest", model(
        [node("ReduceMax", ["x"], ["m"], keepdims=0), node("Div", ["x", "m"], ["y"])],
        [value("x", ["batch", 3, 224, 224])], [value("y", ["batch", 3, 224, 224])]),
        lambda random: {"x": (random.random((1, 3, 224, 224)) + 5 * random.integers(0, 2)).astype("f4")},
        "disproven", "ReduceMax")  # fmt: skip
    yield Case("sort", model(
        [node("Shape", ["x"], ["k"]), node("TopK", ["x", "k"], ["y", "i"], axis=0)],
        [value("x", ["n"])], [value("y", ["n"])]),
        lambda random: {"x": random.permutation(3).astype("f4") * np.float32(10.0 ** random.integers(0, 2))},
        "disproven", "TopK")  # fmt: skip
    boxes = np.array([[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]], "f4")
    yield Case("non-maximum suppression", model(
        [node("Unsqueeze", ["boxes", "a0"], ["b"]), node("Unsqueeze", ["scores", "a01"], ["s"]),
         node("NonMaxSuppression", ["b", "s", "most", "iou"], ["sel"]), node("Gather", ["sel", "two"], ["idx"], axis=1),
         node("Gather", ["boxes", "idx"], ["kept"], axis=0)],
        [value("boxes", ["num", 4]), value("scores", ["num"])], [value("kept", ["kept", 4])],
        [const("a0", [0], "i8"), const("a01", [0, 1], "i8"), const("most", [100], "i8"), const("iou", [0.5], "f4"),
         const("two", 2, "i8")]),
        lambda random: {"boxes": boxes + np.float32(50 * random.integers(0, 2)), "scores": random.random(3).astype("f4")},
        "disproven", "NonMaxSuppression")  # fmt: skip
    then = helper.make_graph([node("Mul", ["x", "zero"], ["t"])], "then", [], [value("t", None)])
    other = helper.make_graph([node("Identity", ["x"], ["e"])], "other", [], [value("e", None)])
    yield Case("a branch on the smallest", model(
        [node("ReduceMin", ["x"], ["m"], keepdims=0), node("Less", ["m", "limit"], ["bad"]),
         node("If", ["bad"], ["y"], then_branch=then, else_branch=other)],
        [value("x", ["n", 3])], [value("y", ["n", 3])], [const("limit", -50, "f4"), const("zero", 0, "f4")]),
        lambda random: {"x": (random.standard_normal((1, 3)) - 99 * random.integers(0, 2)).astype("f4")},
        "disproven", "ReduceMin")  # fmt: skip
    yield simple("each row by its own mean", [
        node("ReduceMean", ["x"], ["m"], axes=[1], keepdims=1), node("Sub", ["x", "m"], ["y"])], "proven", row=(1, 32))  # fmt: skip
    yield simple("attention over one's own tokens", [
        node("Transpose", ["x"], ["xt"], perm=[0, 2, 1]), node("MatMul", ["x", "xt"], ["w"]),
        node("Softmax", ["w"], ["p"], axis=-1), node("MatMul", ["p", "x"], ["y"])], "proven", row=(1, 4, 8),
        side=["tokens", 8])  # fmt: skip
    yield simple("quantised as a whole", [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])],
        "unknown", "DynamicQuantizeLinear", row=(1, 16),
        rows=lambda random: {"x": random.standard_normal((1, 16)).astype("f4")})  # fmt: skip


def siblings() -> Iterator[Case]:
    """Others of the same kinds."""
    yield from _along_the_rows()
    yield from _by_their_number()
    yield from _against_others()
    yield from _inside_other_graphs()
    yield from _apart()


def _along_the_rows() -> Iterator[Case]:
    zero, one = const("zero", 0, "i8"), const("one", 1, "i8")
    yield simple("softmax over the batch", [node("Softmax", ["x"], ["y"], axis=0)], "disproven", "Softmax")
    yield simple("softmax over everything, before opset 13", [node("Softmax", ["x"], ["y"], axis=0)], "disproven",
                 "Softmax", opset=11)  # fmt: skip
    yield simple("cumulative sum", [node("CumSum", ["x", "zero"], ["y"])], "disproven", "CumSum", constants=[zero])
    yield simple("cumulative sum of a row", [node("CumSum", ["x", "one"], ["y"])], "proven", constants=[one])
    yield simple("batch normalisation that trains", [
        node("BatchNormalization", ["x", "w", "b", "m", "v"], ["y", "m2", "v2"], training_mode=1)], "disproven",
        "BatchNormalization", row=(3, 4), constants=[const(name, [1] * 4, "f4") for name in "wbmv"])  # fmt: skip
    yield simple("normalisation over axes 0, 2 and 3", [node("MeanVarianceNormalization", ["x"], ["y"])], "disproven",
                 "MeanVarianceNormalization", row=(1, 2, 3, 3))  # fmt: skip
    yield simple("products over the batch", [
        node("Transpose", ["x"], ["t"], perm=[1, 0]), node("MatMul", ["t", "x"], ["g"]),
        node("MatMul", ["x", "g"], ["y"])], "disproven", "MatMul")  # fmt: skip
    yield simple("rows laid into one", [
        node("Reshape", ["x", "flat"], ["f"]), node("Softmax", ["f"], ["p"], axis=1),
        node("Shape", ["x"], ["s"]), node("Reshape", ["p", "s"], ["y"])], "disproven", "Softmax",
        constants=[const("flat", [1, -1], "i8")])  # fmt: skip
    yield simple("rows parted across others", [
        node("Reshape", ["x", "pairs"], ["f"]), node("Softmax", ["f"], ["p"], axis=1),
        node("Shape", ["x"], ["s"]), node("Reshape", ["p", "s"], ["y"])], "disproven", "Reshape",
        row=(2, 3), constants=[const("pairs", [3, -1], "i8")])  # fmt: skip
    yield simple("the first row for all", [
        node("Gather", ["x", "zero"], ["f"], axis=0), node("Add", ["x", "f"], ["y"])], "disproven", "Gather",
        constants=[zero])  # fmt: skip
    yield simple("rows backwards", [node("Slice", ["x", "a", "b", "c", "d"], ["y"])], "disproven", "Slice", row=(2, 4),
                 constants=[const(name, [at], "i8") for name, at in zip("abcd", (-1, -99, 0, -1), strict=True)])  # fmt: skip
    yield simple("rows shifted", [
        node("Pad", ["x", "pads"], ["p"]), node("Slice", ["p", "a", "b", "c"], ["y"])], "disproven", "Pad", row=(2, 4),
        constants=[const("pads", [1, 0, 0, 0], "i8"), const("a", [0], "i8"), const("b", [-1], "i8"),
                   const("c", [0], "i8")])  # fmt: skip
    yield simple("einsum over the batch", [node("Einsum", ["x", "x", "x"], ["y"], equation="bi,ci,cj->bj")], "disproven",
                 "Einsum")  # fmt: skip
    yield simple("a recurrence over the rows", [
        node("Unsqueeze", ["x", "one"], ["u"]), node("GRU", ["u", "w", "r"], ["o"], hidden_size=3),
        node("Squeeze", ["o", "axes"], ["y"])], "disproven", "GRU", row=(2, 4),
        constants=[const("one", [1], "i8"), const("axes", [1, 2], "i8"), const("w", np.ones((1, 9, 4)), "f4"),
                   const("r", np.ones((1, 9, 3)), "f4")])  # fmt: skip


def _by_their_number() -> Iterator[Case]:
    count = [
        node("Shape", ["x"], ["s"], start=0, end=1),
        node("Squeeze", ["s"], ["k"]),
        node("Cast", ["k"], ["f"], to=1),
    ]
    yield simple("divided by the number of rows", [*count, node("Div", ["x", "f"], ["y"])], "disproven", "Div")
    yield simple("numbered", [
        *count[:2], node("Range", ["zero", "k", "one"], ["r"]), node("Cast", ["r"], ["c"], to=1),
        node("Unsqueeze", ["c", "axis"], ["u"]), node("Add", ["x", "u"], ["y"])], "disproven", "Add",
        constants=[const("zero", 0, "i8"), const("one", 1, "i8"), const("axis", [1], "i8")])  # fmt: skip
    yield simple("a table by the row's number", [
        *count[:2], node("Range", ["zero", "k", "one"], ["r"]), node("Gather", ["t", "r"], ["g"], axis=0),
        node("Add", ["x", "g"], ["y"])], "disproven", "Gather",
        constants=[const("zero", 0, "i8"), const("one", 1, "i8"), const("t", np.arange(400).reshape(100, 4), "f4")])  # fmt: skip
    body = helper.make_graph(
        [node("Identity", ["on"], ["still"]), node("Add", ["state", "x"], ["next"])], "body",
        [value("i", [], INT64), value("on", [], TensorProto.BOOL), value("state", None)],
        [value("still", [], TensorProto.BOOL), value("next", None)])  # fmt: skip
    yield simple("once around for each row", [*count[:2], node("Loop", ["k", "yes", "x"], ["y"], body=body)],
                 "disproven", "Loop", constants=[const("yes", True, "?")])  # fmt: skip
    branches = {
        name: helper.make_graph([node(kind, ["x"], [f"o{name}"])], name, [], [value(f"o{name}", None)])
        for name, kind in (("then_branch", "Neg"), ("else_branch", "Relu"))
    }
    yield simple("another way for one row", [*count[:2], node("Equal", ["k", "one"], ["c"]), node("If", ["c"], ["y"], **branches)],
                 "disproven", "If", constants=[const("one", 1, "i8")])  # fmt: skip
    yield simple("squeezed where it is one row", [node("Squeeze", ["x"], ["q"]), node("Softmax", ["q"], ["p"], axis=0),
                 node("Shape", ["x"], ["s"]), node("Reshape", ["p", "s"], ["y"])], "disproven", "Squeeze")  # fmt: skip


def _against_others() -> Iterator[Case]:
    yield simple("a constant for each of two rows", [node("Add", ["x", "c"], ["y"])], "disproven", "Add",
                 constants=[const("c", [[1.0], [100.0]], "f4")])  # fmt: skip
    yield Case("a weight for each row of the other axis", model(
        [node("Mul", ["x", "w"], ["y"])], [value("x", ["n", "m"]), value("w", ["n"])], [value("y", ["n", "m"])]),
        lambda random: {"x": random.standard_normal((2, 2)).astype("f4"), "w": random.standard_normal(2).astype("f4")},
        "disproven", "Mul")  # fmt: skip
    yield Case("every row against every other", model(
        [node("Transpose", ["z"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["w"]),
         node("Softmax", ["w"], ["p"], axis=1), node("MatMul", ["p", "z"], ["y"])],
        [value("x", ["n", 4]), value("z", ["n", 4])], [value("y", ["n", 4])]),
        lambda random: {name: random.standard_normal((1, 4)).astype("f4") for name in "xz"}, "disproven", "MatMul")  # fmt: skip
    yield Case("one table for all callers", model(
        [node("Gather", ["t", "i"], ["y"], axis=0)], [value("t", ["n", 4]), value("i", ["n"], INT64)],
        [value("y", ["n", 4])]),
        lambda random: {"t": random.standard_normal((2, 4)).astype("f4"), "i": random.integers(0, 2, 2)},
        "disproven", "Gather")  # fmt: skip


def _inside_other_graphs() -> Iterator[Case]:
    inner = helper.make_graph([node("ReduceMax", ["x"], ["m"], keepdims=0), node("Div", ["x", "m"], ["o"])], "then", [],
                              [value("o", None)])  # fmt: skip
    plain = helper.make_graph([node("Identity", ["x"], ["e"])], "other", [], [value("e", None)])
    yield simple("the largest of all, inside a branch", [
        node("ConstantOfShape", ["none"], ["zero"]), node("Equal", ["zero", "limit"], ["c"]),
        node("If", ["c"], ["y"], then_branch=inner, else_branch=plain)], "disproven", "ReduceMax",
        constants=[const("none", [], "i8"), const("limit", 0, "f4")])  # fmt: skip
    body = helper.make_graph(
        [node("ReduceSum", ["state"], ["t"], keepdims=0), node("Less", ["t", "limit"], ["still"]),
         node("Add", ["state", "state"], ["next"])], "body",
        [value("i", [], INT64), value("on", [], TensorProto.BOOL), value("state", None)],
        [value("still", [], TensorProto.BOOL), value("next", None)])  # fmt: skip
    yield simple("until the sum of all is large", [node("Loop", ["ten", "yes", "x"], ["y"], body=body)], "disproven",
                 "ReduceSum", constants=[const("ten", 10, "i8"), const("yes", True, "?"), const("limit", 500, "f4")])  # fmt: skip
    step = helper.make_graph([node("Add", ["s", "e"], ["s2"]), node("Identity", ["s2"], ["out"])], "step",
                             [value("s", [4]), value("e", [4])], [value("s2", [4]), value("out", [4])])  # fmt: skip
    yield simple("a scan over the rows", [
        node("Scan", ["start", "x"], ["last", "y"], body=step, num_scan_inputs=1)], "disproven", "Scan",
        constants=[const("start", [0] * 4, "f4")])  # fmt: skip
    function = helper.make_function(
        "local", "Normal", ["a"], ["b"],
        [node("ReduceMean", ["a"], ["m"], keepdims=0), node("Sub", ["a", "m"], ["b"])], [helper.make_opsetid("", 17)])  # fmt: skip
    yield simple("the mean of all, inside a function", [node("Normal", ["x"], ["y"], domain="local")], "disproven",
                 "ReduceMean", domain="local", functions=[function])  # fmt: skip


def _apart() -> Iterator[Case]:
    yield simple("heads by shape", [
        node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["n"], axis=0), node("Gather", ["s", "one"], ["t"], axis=0),
        node("Unsqueeze", ["n", "axis"], ["n1"]), node("Unsqueeze", ["t", "axis"], ["t1"]),
        node("Concat", ["n1", "t1", "heads", "rest"], ["target"], axis=0), node("Reshape", ["x", "target"], ["h"]),
        node("Transpose", ["h"], ["p"], perm=[0, 2, 1, 3]), node("Softmax", ["p"], ["q"], axis=2),
        node("Transpose", ["q"], ["r"], perm=[0, 2, 1, 3]), node("Reshape", ["r", "s"], ["y"])], "proven",
        row=(1, 3, 8), side=["t", 8],
        constants=[const("zero", 0, "i8"), const("one", 1, "i8"), const("axis", [0], "i8"), const("heads", [2], "i8"),
                   const("rest", [-1], "i8")])  # fmt: skip
    yield simple("tokens merged with rows and parted again", [
        node("Shape", ["x"], ["s"]), node("Reshape", ["x", "flat"], ["f"]), node("Gemm", ["f", "w"], ["g"]),
        node("Softmax", ["g"], ["p"], axis=1), node("Reshape", ["p", "s"], ["y"])], "proven", row=(1, 3, 4), side=["t", 4],
        constants=[const("flat", [-1, 4], "i8"), const("w", np.eye(4) * 0.5, "f4")])  # fmt: skip
    yield simple("a token in front of each row", [
        node("Shape", ["x"], ["s"], start=0, end=1), node("Concat", ["s", "ones"], ["t"], axis=0),
        node("Expand", ["token", "t"], ["e"]), node("Concat", ["e", "x"], ["y"], axis=1)], "proven", row=(1, 3, 4),
        side=["t", 4], constants=[const("ones", [1, 4], "i8"), const("token", np.ones((1, 1, 4)), "f4")])  # fmt: skip
    yield simple("rows on the second axis", [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), node("LSTM", ["t", "w", "r"], ["o"], hidden_size=2),
        node("Squeeze", ["o", "one"], ["q"]), node("Transpose", ["q"], ["y"], perm=[1, 0, 2])], "proven", row=(1, 3, 4),
        side=["t", 4],
        constants=[const("one", [1], "i8"), const("w", np.full((1, 8, 4), 0.1), "f4"),
                   const("r", np.full((1, 8, 2), 0.1), "f4")])  # fmt: skip
    yield simple("the picked token of each row, by its number", [
        node("Shape", ["x"], ["s"], start=0, end=1), node("Squeeze", ["s"], ["k"]),
        node("Range", ["zero", "k", "one"], ["r"]), node("Unsqueeze", ["r", "last"], ["r1"]),
        node("ReduceMax", ["x"], ["m"], axes=[2], keepdims=0), node("ArgMax", ["m"], ["a"], axis=1, keepdims=1),
        node("Concat", ["r1", "a"], ["i"], axis=-1), node("GatherND", ["x", "i"], ["y"])], "proven", row=(1, 3, 4),
        side=["t", 4], constants=[const("zero", 0, "i8"), const("one", 1, "i8"), const("last", [-1], "i8")])  # fmt: skip
    yield simple("an operator of another house", [node("Mystery", ["x"], ["y"], domain="com.example")], "unknown",
                 "Mystery", domain="com.example")  # fmt: skip
    yield simple("drawn at random", [
        node("RandomNormalLike", ["x"], ["r"]), node("Add", ["x", "r"], ["y"])], "unknown", "RandomNormalLike")  # fmt: skip
    yield simple("quantised as a whole, and then mixed", [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("Softmax", ["d"], ["y"], axis=0)], "disproven", "Softmax", row=(1, 16))  # fmt: skip
