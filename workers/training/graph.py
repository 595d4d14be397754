"""An ONNX file as training sees it: checked, its operators known, its constants sorted by their part in training.

What trains: every float constant with more than one element, and single ones where an operator expects a weight, except
those that an operator reads as a setting (a clip's bounds, a resize's scales). Means and variances of batch
normalization are buffers. Parameters and buffers carry the names that the ONNX file gives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from onnx import numpy_helper

from device_operations.errors import failure
from workers.training.operators import OPERATORS
from workers.training.operators.node import DTYPES
from workers.training.ports import Port

#: Inputs by position that an operator reads as settings: never trained.
_SETTINGS: dict[str, set[int]] = {
    "Clip": {1, 2}, "Dropout": {1, 2}, "Expand": {1}, "Pad": {1, 2, 3}, "Pow": {1}, "Range": {0, 1, 2},
    "Resize": {1, 2, 3}, "Where": {0},
}  # fmt: skip

#: Inputs by position that are weights even where they have a single element.
_WEIGHTS: dict[str, set[int]] = {
    "BatchNormalization": {1, 2}, "Conv": {1, 2}, "ConvTranspose": {1, 2}, "Gemm": {0, 1, 2},
    "GroupNormalization": {1, 2}, "InstanceNormalization": {1, 2}, "LayerNormalization": {1, 2}, "MatMul": {0, 1},
    "PRelu": {1},
}  # fmt: skip

#: Running statistics by position: saved and updated in training, not trained.
_STATISTICS: dict[str, set[int]] = {"BatchNormalization": {3, 4}}

#: Nodes that hand their first input on unchanged in value, so that what they feed still says what it is.
_PASSING = {"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Cast"}


@dataclass(frozen=True)
class Graph:
    """A checked ONNX model: ports, nodes, and its constants by their part in training."""

    model: onnx.ModelProto
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opset: int
    parameters: tuple[str, ...]
    statistics: tuple[str, ...]
    #: The tensors of initializers and Constant nodes, where they stand in the model.
    tensors: dict[str, onnx.TensorProto]


def read_graph(path: Path) -> Graph:
    """The model in the file at `path`.

    Raises `model_invalid` for a file that is no ONNX model, keeps its weights in other files, or has an operator that
    the table does not know, which it names.
    """
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except Exception as error:
        raise failure("model_invalid", f"the file is no valid ONNX model: {str(error)[:500]}") from error
    opset = _check_operators(model)
    _check_names(model)
    tensors = _find_tensors(model)
    statistics, parameters = _classify(model, tensors)
    given = set(tensors)
    return Graph(
        model,
        tuple(_port(value) for value in model.graph.input if value.name not in given),
        tuple(Port(value.name) for value in model.graph.output),
        opset,
        parameters,
        statistics,
        tensors,
    )


def _check_operators(model: onnx.ModelProto) -> int:
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < 7:
        raise failure(
            "model_invalid", f"ONNX opset {opset} is too old to train; convert the model to opset 13 or later"
        )
    names = {f"{n.domain}.{n.op_type}" if n.domain not in ("", "ai.onnx") else n.op_type for n in model.graph.node}
    unknown = sorted(names - OPERATORS.keys() - {"Constant"})
    if unknown:
        raise failure(
            "model_invalid",
            f"ONNX operators that cannot be trained here: {', '.join(unknown)}; "
            f"known are {', '.join(sorted(OPERATORS))}",
            detail={"operators": unknown},
        )
    return opset


def _check_names(model: onnx.ModelProto) -> None:
    """Refuses a graph whose nodes or outputs read what nothing before them makes.

    onnx's own checker is not asked: it refuses files that ONNX Runtime runs, such as one that leaves out a shape.
    """
    graph = model.graph
    known = {""} | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        unknown = next((name for name in node.input if name not in known), None)
        if unknown is not None:
            raise failure("model_invalid", f"ONNX node {node.name!r} reads {unknown!r}, which nothing before it makes")
        if not node.output:
            raise failure("model_invalid", f"ONNX node {node.name!r} has no output")
        known.update(node.output)
    if not graph.output or any(value.name not in known - {""} for value in graph.output):
        raise failure("model_invalid", "the ONNX graph has no output, or one that nothing makes")


def _find_tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    if model.graph.sparse_initializer:
        raise failure("model_invalid", "sparse initializers cannot be trained here; store the weights densely")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            tensors[node.output[0]] = _constant_tensor(node)
    outside = [name for name, tensor in tensors.items() if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        raise failure(
            "model_invalid",
            f"{len(outside)} tensors ({outside[0]!r}, …) are kept in files beside the model; "
            "save it with its weights inside",
        )
    return tensors


def _constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto:
    """The node's tensor; other forms of its value are rewritten as a tensor first, so that write-back has one place."""
    if len(node.attribute) != 1:
        raise failure("model_invalid", f"ONNX Constant {node.name!r} has no value")
    attribute = node.attribute[0]
    if attribute.name != "value":
        value: Any = onnx.helper.get_attribute_value(attribute)
        kinds = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}
        if attribute.name not in kinds:
            raise failure("model_invalid", f"ONNX Constant {node.name!r} with {attribute.name} cannot be trained here")
        tensor = numpy_helper.from_array(np.array(value, dtype=kinds[attribute.name]), node.output[0])
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("value", tensor))
        attribute = node.attribute[0]
    return cast(onnx.TensorProto, attribute.t)


def _classify(model: onnx.ModelProto, tensors: dict[str, onnx.TensorProto]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(statistics, parameters): which float constants are saved and which are trained, in the order of the file."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    aliases = {name: name for name in tensors}
    matmul_outputs: set[str] = set()
    settings: set[str] = set()
    weights: set[str] = set()
    statistics: set[str] = set()
    free: set[str] = set()
    for node in model.graph.node:
        if node.op_type in _PASSING and node.input and node.input[0] in aliases:
            aliases[node.output[0]] = aliases[node.input[0]]
            continue
        if node.op_type == "MatMul":
            matmul_outputs.add(node.output[0])
        for index, name in enumerate(node.input):
            constant = aliases.get(name)
            if constant is None:
                continue
            if index in _SETTINGS.get(node.op_type, ()):
                settings.add(constant)
            elif index in _STATISTICS.get(node.op_type, ()):
                statistics.add(constant)
            else:
                bias = node.op_type == "Add" and constant in initializers and matmul_outputs & set(node.input)
                (weights if bias or index in _WEIGHTS.get(node.op_type, ()) else free).add(constant)
    floating = [name for name, tensor in tensors.items() if _is_floating(tensor)]
    several = {name for name in floating if int(np.prod(tensors[name].dims)) > 1}
    trained = ((free & several) | weights) - settings - statistics
    return (
        tuple(name for name in floating if name in statistics),
        tuple(name for name in floating if name in trained),
    )


def _is_floating(tensor: onnx.TensorProto) -> bool:
    dtype = DTYPES.get(tensor.data_type)
    return dtype is not None and dtype.is_floating_point


def _port(value: onnx.ValueInfoProto) -> Port:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or kind.elem_type not in DTYPES:
        raise failure(
            "model_invalid", f"{value.name!r} is not a tensor of numbers: such a model cannot be trained here"
        )
    shape = None
    if kind.HasField("shape"):
        sides = (side.dim_value if side.HasField("dim_value") else None for side in kind.shape.dim)
        # Some writers say -1 or 0 for an open side.
        shape = tuple(side if side is not None and side > 0 else None for side in sides)
    return Port(value.name, DTYPES[kind.elem_type], shape)
