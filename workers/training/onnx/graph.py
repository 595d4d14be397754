"""An ONNX file as training sees it: checked, its operators known, its constants sorted by their part in training.

Parameters and buffers carry the names that the ONNX file gives them. `roles` says which is which, `sharing` what
becomes of constants that several nodes read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx.inliner
from onnx import numpy_helper

from device_operations.errors import OperationError, failure
from workers.training.model.ports import Port
from workers.training.onnx.operators import OPERATORS
from workers.training.onnx.operators.node import DTYPES
from workers.training.onnx.origins import FOLDED_FROM, argument_of, called_with
from workers.training.onnx.roles import Role, find_roles
from workers.training.onnx.sharing import SharedConstant, bypass_identities, find_copies, split_merged


@dataclass(frozen=True)
class TrainableGraph:
    """A checked ONNX model: ports, nodes, and its constants by their part in training."""

    model: onnx.ModelProto
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opset: int
    #: What each constant is in training, and why.
    roles: tuple[Role, ...]
    #: The names of the trained tensors, without copies, and of the running statistics.
    parameters: tuple[str, ...]
    statistics: tuple[str, ...]
    #: Matrices that repeat a parameter's elements and follow it.
    copies: Mapping[str, SharedConstant]
    #: The tensors of initializers and Constant nodes, where they stand in the model.
    tensors: dict[str, onnx.TensorProto]


def read_graph(
    path: Path, trainable: Sequence[str] | None = None, *, frozen_statistics: bool = False
) -> TrainableGraph:
    """The model in the file at `path`, for sessions that train by default or what the patterns `trainable` name.

    Raises `validation_failed` for a pattern that fits nothing, and `model_invalid` for a file that is no ONNX model,
    keeps its weights in other files, or has an operator that the table does not know, which it names.
    """
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except Exception as error:
        raise failure("model_invalid", f"the file is no valid ONNX model: {str(error)[:500]}") from error
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    opset = _check_operators(model)
    _check_names(model)
    if not frozen_statistics:
        _check_folded(model)
    _find_tensors(model)
    split_merged(model, bypass_identities(model))
    tensors = _find_tensors(model)
    roles = find_roles(model, tensors, trainable)
    statistics = tuple(role.name for role in roles if role.part == "statistic")
    trained = [role.name for role in roles if role.part == "parameter"]
    copies = find_copies(tensors, trained, _readers(model))
    parameters = tuple(name for name in trained if name not in copies)
    given = set(tensors)
    return TrainableGraph(
        model,
        tuple(_port(value) for value in model.graph.input if value.name not in given),
        tuple(Port(value.name) for value in model.graph.output),
        opset,
        tuple(roles),
        parameters,
        statistics,
        copies,
        tensors,
    )


def _readers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def set_inference_mode(model: onnx.ModelProto) -> None:
    """Makes batch normalization use its running statistics and dropout pass everything, as in inference."""
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            kept = [attribute for attribute in node.attribute if attribute.name != "training_mode"]
            del node.attribute[:]
            node.attribute.extend(kept)
            del node.output[1:]
        elif node.op_type == "Dropout":
            del node.input[2:]


def _check_operators(model: onnx.ModelProto) -> int:
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < 7:
        raise failure(
            "model_invalid", f"ONNX opset {opset} is too old to train; convert the model to opset 13 or later"
        )
    unknown: dict[str, str] = {}
    for node in model.graph.node:
        kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        if kind not in OPERATORS and kind != "Constant":
            unknown.setdefault(kind, node.name or node.output[0])
    if unknown:
        places = ", ".join(f"{kind} (node {name!r})" for kind, name in sorted(unknown.items()))
        raise failure(
            "model_invalid",
            f"ONNX operators that cannot be trained here: {places}. Export the model by torch's other exporter "
            "(torch.onnx.export with dynamo=False or dynamo=True), or describe it as layers; "
            f"known are {', '.join(sorted(OPERATORS))}",
            detail={"operators": sorted(unknown), "nodes": unknown},
        )
    return opset


def _check_folded(model: onnx.ModelProto) -> None:
    """Refuses a file that lacks what torch would train: normalization folded into weights, biases left out.

    torch's tracing exporter shows the first by the names of weights; its newer one notes on each node what it came
    from.
    """
    arguments = called_with(model)
    made = {
        entry_of.name: re.findall(r"'([^']*)'", entry.value)
        for entry_of in (*model.graph.value_info, *model.graph.initializer)
        for entry in entry_of.metadata_props
        if entry.key == FOLDED_FROM
    }
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        notes = {entry.key: entry.value for entry in node.metadata_props}
        traced = model.producer_name == "pytorch" and any(_FOLDED_WEIGHT.fullmatch(name) for name in node.input[1:2])
        if traced or _NORMALIZATION.search(notes.get("pkg.torch.onnx.fx_node", "")):
            what = "folded batch normalization (or another computation of its weight) into"
            raise _unfaithful(node, what, "trains the folded weights as they are")
        if any(_is_computed(made.get(name, []), arguments) for name in node.input):
            raise _unfaithful(node, "computed from other parameters a weight of", "trains the weight as it is")
        left_out = _THIRD_PARAMETER.search(notes.get("pkg.torch.onnx.fx_node", ""))
        if left_out and node.op_type != "MatMul" and not (len(node.input) > 2 and node.input[2]):
            why = f"left out the bias {left_out[1]}, which was zero at the time, of"
            raise _unfaithful(node, why, "trains what the file has")


def _is_computed(made_from: list[str], arguments: set[str]) -> bool:
    """Whether a constant stands for more than one parameter: a weight that the network normalizes, for example."""
    named = [part for part in made_from if "." in part]
    return len(named) > 1 and not any(argument_of(part) in arguments for part in named)


def _unfaithful(node: onnx.NodeProto, why: str, consequence: str) -> OperationError:
    return failure(
        "model_invalid",
        f"the exporter has {why} {node.op_type} (node {node.name!r}): trained so, the model would not be what torch "
        "trains. Export it with training=TrainingMode.PRESERVE and do_constant_folding=False, or with dynamo=True and "
        f"optimize=False; or set frozen_statistics, which {consequence}",
        detail={"operator": node.op_type, "node": node.name},
    )


#: What torch's tracing exporter calls a weight that it has computed anew. That of a MatMul is mostly just transposed.
_FOLDED_WEIGHT = re.compile(r"onnx::(Conv|ConvTranspose|Gemm)_\d+")

#: The call that the newer exporter notes on a convolution with a batch normalization in it. The names of classes show
#: nothing: a network may be called `BatchNormalized`.
_NORMALIZATION = re.compile(r"target=torch\.ops\.aten\.\w*batch_norm")

#: The bias among the arguments of the call that a node was made from, where that was a parameter.
_THIRD_PARAMETER = re.compile(r"aten\.(?:linear|conv\w*)\.default\]\(args = \(%\w+, %\w+, %p_(\w+)")


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
            f"{len(outside)} tensors ({outside[0]!r}, …) are kept in files next to the model; "
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
