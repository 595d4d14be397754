"""ONNX operators as torch runs them, each beside ONNX Runtime's result on the same inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from device_operations.errors import OperationError
from workers.training.onnx.graph import read_graph
from workers.training.onnx.module import OnnxModule
from workers.training.onnx.operators import OPERATORS

Arrays = dict[str, np.ndarray]
_ELEMENTS = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.bool_): TensorProto.BOOL,
}


def compare(
    folder: Path,
    op_type: str,
    inputs: Arrays,
    constants: Arrays | None = None,
    *,
    opset: int = 17,
    outputs: int = 1,
    order: list[str] | None = None,
    tolerance: float = 1e-5,
    **attributes: Any,
) -> None:
    """Runs one node in both and compares; `inputs` are fed, `constants` are initializers, `order` is the node's own."""
    constants = constants or {}
    names = order if order is not None else [*inputs, *constants]
    results = [f"y{index}" for index in range(outputs)]
    node = helper.make_node(op_type, names, results, name="node", **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(n, _ELEMENTS[a.dtype], [None] * a.ndim) for n, a in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in results],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    )
    for value in model.graph.output:
        if value.type.WhichOneof("value") is None:  # inference does not know every operator
            value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, None))
    path = folder / "node.onnx"
    onnx.save(model, str(path))
    wanted = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)
    read = read_graph(path)
    module = OnnxModule(read).eval()
    with torch.no_grad():
        found = module(*(torch.from_numpy(inputs[port.name]) for port in read.inputs))
        on_meta = OnnxModule(read, meta=True).eval()(
            *(torch.empty(inputs[port.name].shape, dtype=port.dtype, device="meta") for port in read.inputs)
        )
    for expected, result, shape_only in zip(wanted, found, on_meta, strict=True):
        assert tuple(result.shape) == expected.shape
        assert tuple(shape_only.shape) == expected.shape
        np.testing.assert_allclose(result.numpy(), expected, rtol=tolerance, atol=tolerance)
        assert result.numpy().dtype == expected.dtype


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


X = floats(2, 4, 6)
IMAGE = floats(2, 4, 7, 9)

#: A name for each case, the operator, what is fed, what is constant, and the rest of `compare`'s arguments.
CASES: dict[str, tuple[str, Arrays, Arrays, dict[str, Any]]] = {
    **{
        name: (name, {"x": X}, {}, {})
        for name in [
            "Abs",
            "Ceil",
            "Cos",
            "Elu",
            "Erf",
            "Exp",
            "Floor",
            "HardSigmoid",
            "HardSwish",
            "Identity",
            "LeakyRelu",
            "Neg",
            "Relu",
            "Sigmoid",
            "Sin",
            "Softplus",
            "Softsign",
            "Tanh",
            "Softmax",
            "LogSoftmax",
            "ReduceMean",
            "ReduceSum",
            "ReduceMax",
            "ReduceMin",
            "ReduceL2",
            "Transpose",
            "Flatten",
            "Shape",
            "Size",
            "ArgMax",
            "GlobalAveragePool",
            "GlobalMaxPool",
            "Dropout",
            "Atan",
            "Celu",
            "Cosh",
            "IsInf",
            "Round",
            "Selu",
            "Shrink",
            "Sign",
            "Sinh",
            "Tan",
            "ThresholdedRelu",
            "ReduceL1",
            "ReduceLogSumExp",
            "ReduceProd",
            "ReduceSumSquare",
        ]
    },
    **{name: (name, {"x": np.tanh(X)}, {}, {}) for name in ("Acos", "Asin")},
    "IsInf upwards": (
        "IsInf",
        {"x": np.array([np.inf, -np.inf, 1, np.nan], np.float32)},
        {},
        {"detect_negative": 0},
    ),
    "Mod of integers": ("Mod", {"a": whole(7, -7, 9, -9), "b": whole(2, 2, -4, -4)}, {}, {}),
    "Mod of floats": ("Mod", {"a": X, "b": np.full((4, 1), 0.3, np.float32)}, {}, {"fmod": 1}),
    "Xor": ("Xor", {"a": X > 0, "b": X < 1}, {}, {}),
    "Clip by what is computed": (
        "Clip",
        {"x": X, "low": np.array(-0.5, np.float32), "high": np.array(0.5, np.float32)},
        {},
        {},
    ),
    "Trilu": ("Trilu", {"x": X}, {}, {}),
    "Trilu below": ("Trilu", {"x": X}, {"k": np.array(-1)}, {"upper": 0}),
    "GatherElements": ("GatherElements", {"x": X}, {"i": np.array([[[0, -1, 2]]])}, {"axis": 2}),
    "CumSum": ("CumSum", {"x": X}, {"axis": np.array(1)}, {}),
    "ScatterND": (
        "ScatterND",
        {"x": X, "u": floats(2, 6, seed=5)},
        {"i": np.array([[0, 1], [1, 3]])},
        {"order": ["x", "i", "u"]},
    ),
    "ScatterND adding": (
        "ScatterND",
        {"x": X, "u": floats(2, 6, seed=5)},
        {"i": np.array([[0, 1], [0, 1]])},
        {"order": ["x", "i", "u"], "reduction": "add"},
    ),
    "Einsum": ("Einsum", {"a": X, "b": floats(2, 6, 3, seed=1)}, {}, {"equation": "bij, bjk -> bik"}),
    **{name: (name, {"x": np.abs(X) + 0.1}, {}, {}) for name in ("Log", "Reciprocal", "Sqrt")},
    **{
        name: (name, {"a": X, "b": floats(4, 1, seed=1)}, {}, {})
        for name in [
            "Add",
            "Sub",
            "Mul",
            "Div",
            "Max",
            "Min",
            "Mean",
            "Sum",
            "Equal",
            "Greater",
            "GreaterOrEqual",
            "Less",
            "LessOrEqual",
            "PRelu",
        ]
    },
    "Mish": ("Mish", {"x": X}, {}, {"opset": 18}),
    "Gelu": ("Gelu", {"x": X}, {}, {"opset": 20}),
    "Gelu tanh": ("Gelu", {"x": X}, {}, {"opset": 20, "approximate": "tanh"}),
    "Div of integers": ("Div", {"a": whole(7, -7, 9), "b": whole(2, 2, -4)}, {}, {}),
    "And": ("And", {"a": X > 0, "b": X < 1}, {}, {}),
    "Or": ("Or", {"a": X > 0, "b": X < 1}, {}, {}),
    "Not": ("Not", {"a": X > 0}, {}, {}),
    "Where": ("Where", {"c": X > 0, "a": X, "b": floats(6, seed=2)}, {}, {}),
    "Pow of 2": ("Pow", {"x": X}, {"e": np.array(2, np.float32)}, {}),
    "Pow of 0.5": ("Pow", {"x": np.abs(X)}, {"e": np.array(0.5, np.float32)}, {}),
    "Pow computed": ("Pow", {"x": np.abs(X), "e": floats(6, seed=3)}, {}, {}),
    "Clip": ("Clip", {"x": X}, {"low": np.array(-0.5, np.float32), "high": np.array(0.7, np.float32)}, {}),
    "Clip above only": ("Clip", {"x": X}, {"high": np.array(0.7, np.float32)}, {"order": ["x", "", "high"]}),
    "Clip before 11": ("Clip", {"x": X}, {}, {"opset": 10, "min": -0.5, "max": 0.7}),
    "Cast to integer": ("Cast", {"x": X * 5}, {}, {"to": TensorProto.INT32}),
    "Cast to float": ("Cast", {"x": whole(1, 2)}, {}, {"to": TensorProto.FLOAT}),
    "HardSigmoid of its own": ("HardSigmoid", {"x": X * 4}, {}, {"alpha": 1 / 6, "beta": 0.5}),
    "Softmax before 13": ("Softmax", {"x": X}, {}, {"opset": 11, "axis": 1}),
    "Softmax on an axis": ("Softmax", {"x": X}, {}, {"axis": 1}),
    "ReduceMean on axes": ("ReduceMean", {"x": X}, {}, {"axes": [0, -1], "keepdims": 0}),
    "ReduceMean from 18": ("ReduceMean", {"x": X}, {"axes": whole(1)}, {"opset": 18}),
    "ReduceSum from 13": ("ReduceSum", {"x": X}, {"axes": whole(1)}, {"keepdims": 0}),
    "Reshape": ("Reshape", {"x": X}, {"s": whole(0, -1, 3)}, {}),
    "Transpose by order": ("Transpose", {"x": X}, {}, {"perm": [1, 2, 0]}),
    "Flatten at 2": ("Flatten", {"x": IMAGE}, {}, {"axis": -2}),
    "Squeeze": ("Squeeze", {"x": X[:, None]}, {"axes": whole(1)}, {}),
    "Squeeze before 13": ("Squeeze", {"x": X[:, None]}, {}, {"opset": 11, "axes": [1]}),
    "Unsqueeze": ("Unsqueeze", {"x": X}, {"axes": whole(0, -1)}, {}),
    "Concat": ("Concat", {"a": X, "b": floats(2, 4, 1, seed=4)}, {}, {"axis": -1}),
    "Split evenly": ("Split", {"x": X}, {}, {"axis": 1, "outputs": 2}),
    "Split unevenly": ("Split", {"x": X}, {"s": whole(1, 5)}, {"axis": 2, "outputs": 2}),
    "Split in parts": ("Split", {"x": IMAGE}, {}, {"axis": 2, "outputs": 4, "num_outputs": 4, "opset": 18}),
    "Slice before 10": ("Slice", {"x": X}, {}, {"opset": 9, "starts": [1, 0], "ends": [3, 9], "axes": [1, 2]}),
    "Gather rows": ("Gather", {"i": np.array([[2, 0], [-1, 1]])}, {"w": floats(3, 5)}, {"order": ["w", "i"]}),
    "GatherND": ("GatherND", {"x": X}, {"i": np.array([[[0, 1], [1, -1]]])}, {}),
    "IsNaN": ("IsNaN", {"x": np.where(X > 0, X, np.nan).astype(np.float32)}, {}, {}),
    "Gather one": ("Gather", {"x": X}, {"i": np.array(-1)}, {"axis": 1}),
    "Expand": ("Expand", {"x": X[:, :1]}, {"s": whole(3, 1, 4, 1)}, {}),
    "Tile": ("Tile", {"x": X}, {"r": whole(1, 2, 1)}, {}),
    "Pad": ("Pad", {"x": X}, {"p": whole(0, 1, 2, 0, 0, 1)}, {}),
    "Pad with a value": ("Pad", {"x": X}, {"p": whole(0, 0, 2, 0, 0, 1), "v": np.array(3, np.float32)}, {}),
    "Pad by reflection": ("Pad", {"x": X}, {"p": whole(0, 0, 2, 0, 0, 1)}, {"mode": "reflect"}),
    "MatMul": ("MatMul", {"a": X}, {"b": floats(6, 3)}, {}),
    "MatMul of batches": ("MatMul", {"a": X, "b": floats(2, 6, 3)}, {}, {}),
    "Gemm": ("Gemm", {"a": floats(3, 4)}, {"b": floats(4, 5), "c": floats(5)}, {}),
    "Gemm turned": ("Gemm", {"a": floats(3, 4)}, {"b": floats(5, 4), "c": floats(5)}, {"transB": 1}),
    "Gemm scaled": (
        "Gemm",
        {"a": floats(4, 3)},
        {"b": floats(4, 5), "c": floats(3, 1)},
        {"transA": 1, "alpha": 0.5, "beta": 2.0},
    ),
    "Conv": (
        "Conv",
        {"x": IMAGE},
        {"w": floats(6, 4, 3, 3), "b": floats(6)},
        {"pads": [1, 1, 1, 1], "strides": [2, 1]},
    ),
    "Conv in groups": ("Conv", {"x": IMAGE}, {"w": floats(4, 1, 3, 2)}, {"group": 4, "dilations": [2, 1]}),
    "Conv of one axis": ("Conv", {"x": X}, {"w": floats(5, 4, 3)}, {"pads": [0, 2]}),
    "Conv same above": ("Conv", {"x": IMAGE}, {"w": floats(6, 4, 4, 3)}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "Conv same below": ("Conv", {"x": IMAGE}, {"w": floats(6, 4, 4, 3)}, {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "ConvTranspose": ("ConvTranspose", {"x": IMAGE}, {"w": floats(4, 5, 2, 2), "b": floats(5)}, {"strides": [2, 2]}),
    "ConvTranspose uneven": (
        "ConvTranspose",
        {"x": IMAGE},
        {"w": floats(4, 5, 3, 3)},
        {"strides": [2, 2], "pads": [1, 0, 0, 1], "output_padding": [1, 0]},
    ),
    "BatchNormalization": (
        "BatchNormalization",
        {"x": IMAGE},
        {"s": floats(4), "b": floats(4, seed=1), "m": floats(4, seed=2), "v": np.abs(floats(4)) + 0.5},
        {"epsilon": 1e-3},
    ),
    "LayerNormalization": ("LayerNormalization", {"x": X}, {"s": floats(6), "b": floats(6, seed=1)}, {}),
    "LayerNormalization on two axes": ("LayerNormalization", {"x": X}, {"s": floats(4, 6)}, {"axis": 1}),
    "InstanceNormalization": ("InstanceNormalization", {"x": IMAGE}, {"s": floats(4), "b": floats(4)}, {}),
    "GroupNormalization": (
        "GroupNormalization",
        {"x": IMAGE},
        {"s": floats(4), "b": floats(4)},
        {"num_groups": 2, "opset": 21},
    ),
    "MaxPool": ("MaxPool", {"x": IMAGE}, {}, {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]}),
    "MaxPool uneven": ("MaxPool", {"x": IMAGE}, {}, {"kernel_shape": [3, 3], "pads": [0, 1, 2, 1]}),
    "MaxPool same": (
        "MaxPool",
        {"x": IMAGE},
        {},
        {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    ),
    "MaxPool up": ("MaxPool", {"x": IMAGE}, {}, {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    "AveragePool": ("AveragePool", {"x": IMAGE}, {}, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    "AveragePool with padding": (
        "AveragePool",
        {"x": IMAGE},
        {},
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    ),
    "AveragePool uneven": ("AveragePool", {"x": IMAGE}, {}, {"kernel_shape": [3, 3], "pads": [0, 0, 1, 2]}),
    "Resize nearest": (
        "Resize",
        {"x": IMAGE},
        {"scales": np.array([1, 1, 2, 3], np.float32)},
        {
            "order": ["x", "", "scales"],
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        },
    ),
    "Resize linear": (
        "Resize",
        {"x": IMAGE},
        {"scales": np.array([1, 1, 1.5, 2], np.float32)},
        {"order": ["x", "", "scales"], "mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    ),
    "Resize to sizes": (
        "Resize",
        {"x": IMAGE},
        {"sizes": whole(2, 4, 14, 5)},
        {"order": ["x", "", "", "sizes"], "mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
    **{
        f"{kind} {direction}": (
            kind,
            {"x": floats(5, 2, 3)},
            {
                "w": floats(1 + (direction == "bidirectional"), gates * 4, 3, seed=1),
                "r": floats(1 + (direction == "bidirectional"), gates * 4, 4, seed=2),
                "b": floats(1 + (direction == "bidirectional"), 2 * gates * 4, seed=3),
            },
            {"hidden_size": 4, "direction": direction, "outputs": 3 if kind == "LSTM" else 2},
        )
        for kind, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
        for direction in ("forward", "reverse", "bidirectional")
    },
    "GRU of torch": (
        "GRU",
        {"x": floats(5, 2, 3), "h": floats(1, 2, 4, seed=4)},
        {"w": floats(1, 12, 3, seed=1), "r": floats(1, 12, 4, seed=2), "b": floats(1, 24, seed=3)},
        {"hidden_size": 4, "linear_before_reset": 1, "outputs": 2, "order": ["x", "w", "r", "b", "", "h"]},
    ),
    "LSTM from a state": (
        "LSTM",
        {"x": floats(5, 2, 3), "h": floats(1, 2, 4, seed=4), "c": floats(1, 2, 4, seed=5)},
        {"w": floats(1, 16, 3, seed=1), "r": floats(1, 16, 4, seed=2)},
        {"hidden_size": 4, "outputs": 3, "order": ["x", "w", "r", "", "", "h", "c"]},
    ),
    "RNN with another activation": (
        "RNN",
        {"x": floats(5, 2, 3)},
        {"w": floats(1, 4, 3, seed=1), "r": floats(1, 4, 4, seed=2)},
        {"hidden_size": 4, "outputs": 2, "activations": ["Relu"]},
    ),
    "DepthToSpace": ("DepthToSpace", {"x": floats(2, 8, 3, 2)}, {}, {"blocksize": 2}),
    "DepthToSpace of torch": ("DepthToSpace", {"x": floats(2, 8, 3, 2)}, {}, {"blocksize": 2, "mode": "CRD"}),
    "SpaceToDepth": ("SpaceToDepth", {"x": floats(2, 3, 4, 6)}, {}, {"blocksize": 2}),
    "CastLike": ("CastLike", {"x": X, "like": whole(1)}, {}, {"opset": 19}),
    "ConstantOfShape": (
        "ConstantOfShape",
        {},
        {"s": whole(2, 3)},
        {"value": numpy_helper.from_array(np.array([1.5], np.float32))},
    ),
    "Range": ("Range", {}, {"a": np.array(1), "b": np.array(9), "c": np.array(3)}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operator_gives_what_onnx_runtime_gives(case: str, tmp_path: Path) -> None:
    op_type, inputs, constants, arguments = CASES[case]
    compare(tmp_path, op_type, inputs, constants, **arguments)


def test_every_operator_of_the_table_is_compared() -> None:
    elsewhere = {"Slice", "SequenceAt", "SplitToSequence"}
    assert {case[0] for case in CASES.values()} | elsewhere == set(OPERATORS)


@pytest.mark.parametrize("sizes", [np.array(2), whole(1, 3)])
def test_a_part_of_a_sequence_is_onnx_runtimes(sizes: np.ndarray, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("SplitToSequence", ["x", "sizes"], ["parts"], axis=1),
        helper.make_node("SequenceAt", ["parts", "last"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = [numpy_helper.from_array(sizes, "sizes"), numpy_helper.from_array(np.array(-1), "last")]
    path = tmp_path / "m.onnx"
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "g", [x], [y], constants),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=8,
        ),
        str(path),
    )
    (wanted,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": X})
    (found,) = OnnxModule(read_graph(path)).eval()(torch.from_numpy(X))
    np.testing.assert_array_equal(found.detach().numpy(), wanted)


_bound = st.integers(-9, 9)


@settings(max_examples=60, deadline=None)
@given(start=_bound, end=_bound, step=st.sampled_from([-3, -2, -1, 1, 2, 4]), axis=st.sampled_from([0, 1, 2, -1]))
def test_any_slice_is_onnx_runtimes(
    tmp_path_factory: pytest.TempPathFactory, start: int, end: int, step: int, axis: int
) -> None:
    parts = {"start": whole(start), "end": whole(end), "axes": whole(axis), "steps": whole(step)}
    compare(tmp_path_factory.mktemp("slice"), "Slice", {"x": X}, parts)


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
)
def test_any_convolution_is_onnx_runtimes(
    tmp_path_factory: pytest.TempPathFactory,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[int, ...],
    dilation: int,
    groups: int,
) -> None:
    weights = {"w": floats(4, 4 // groups, *kernel), "b": floats(4, seed=1)}
    compare(
        tmp_path_factory.mktemp("conv"), "Conv", {"x": IMAGE}, weights,
        pads=list(pads), strides=list(stride), dilations=[dilation] * 2, group=groups,
    )  # fmt: skip


def test_an_unknown_operator_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(OperationError, match="Det") as caught:
        compare(tmp_path, "Det", {"x": floats(2, 2)})
    assert caught.value.code == "model_invalid"
    assert caught.value.detail == {"operators": ["Det"], "nodes": {"Det": "node"}}


def test_an_operator_of_another_domain_is_refused_by_its_full_name(tmp_path: Path) -> None:
    node = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy"]
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(
        helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]), opset_imports=sets), tmp_path / "m"
    )
    with pytest.raises(OperationError, match=r"com\.microsoft\.Gelu"):
        read_graph(tmp_path / "m")


@pytest.mark.parametrize(
    ("op_type", "constants", "arguments", "reason"),
    [
        ("Resize", {"scales": np.ones(4, np.float32)}, {"order": ["x", "", "scales"], "mode": "cubic"}, "cubic"),
        ("MaxPool", {}, {"kernel_shape": [2, 2], "outputs": 2}, "indices"),
    ],
)
def test_a_use_of_an_operator_that_is_not_known_is_refused_with_node_and_reason(
    op_type: str, constants: Arrays, arguments: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(OperationError, match=reason) as caught:
        compare(tmp_path, op_type, {"x": IMAGE}, constants, **arguments)
    assert caught.value.detail == {"operator": op_type, "node": "node"}


def test_a_graph_that_reads_what_nothing_makes_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["elsewhere"], ["y"], name="lost")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy"]
    onnx.save(helper.make_model(helper.make_graph([node], "g", values[:1], values[1:])), tmp_path / "m")
    with pytest.raises(OperationError, match=r"lost.*elsewhere"):
        read_graph(tmp_path / "m")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07" * 50])
def test_a_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(OperationError) as caught:
        read_graph(tmp_path / "m")
    assert caught.value.code == "model_invalid"
