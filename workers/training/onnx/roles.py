"""Which constants of an ONNX graph are weights: what the file says, and where it says nothing, what reads them.

| part | which constants |
|---|---|
| parameter | what the exporter recorded as a parameter; else what reaches a weight's or bias's place of an operator |
| statistic | running means and variances of batch normalization |
| constant | everything else: buffers, masks, settings of operators, integers |

A constant that only adds to, scales or masks an activation is not trained unless `trainable` names it: a file cannot
tell a buffer from a parameter there. torch's newer exporter (`dynamo=True`) records which of the two each tensor was,
and then that counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper

from workers.training.model.selection import PATTERN, fitting, matching
from workers.training.onnx.operators.node import DTYPES
from workers.training.onnx.origins import FOLDED_FROM, argument_of, called_with

#: Inputs by position that an operator reads as settings: never trained.
_SETTINGS: dict[str, set[int]] = {
    "Clip": {1, 2}, "Dropout": {1, 2}, "Expand": {1}, "Pad": {1, 2, 3}, "Pow": {1}, "Range": {0, 1, 2},
    "Resize": {1, 2, 3}, "Where": {0},
}  # fmt: skip

#: Inputs by position that are weights and biases, even where they have a single element.
_WEIGHTS: dict[str, set[int]] = {
    "BatchNormalization": {1, 2}, "Conv": {1, 2}, "ConvTranspose": {1, 2}, "Einsum": {0, 1}, "GRU": {1, 2, 3},
    "Gemm": {0, 1, 2}, "GroupNormalization": {1, 2}, "InstanceNormalization": {1, 2}, "LSTM": {1, 2, 3, 7},
    "LayerNormalization": {1, 2}, "MatMul": {0, 1}, "PRelu": {1}, "RMSNormalization": {1}, "RNN": {1, 2, 3},
}  # fmt: skip

#: Running statistics by position: saved and updated in training, not trained.
STATISTICS: dict[str, set[int]] = {"BatchNormalization": {3, 4}}

#: Products by position of the operand that is a weight where it is a constant; a bias may be added to them afterwards.
_PRODUCTS = {"MatMul": (0, 1), "Gemm": (0, 1), "Conv": (1,), "ConvTranspose": (1,), "Einsum": (0, 1)}

#: The position of an operator's own bias; a product without one may have it added by the next node.
_OWN_BIAS = {"Gemm": 2, "Conv": 2, "ConvTranspose": 2}

#: Nodes whose output has the elements of their first input.
_SAME = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose"}

#: What the newer exporter notes of each value: what a tensor was.
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"

#: The reason of a tensor that is recorded as a parameter.
_PARAMETER = "parameter by the exporter's record"

Part = Literal["parameter", "statistic", "constant"]


@dataclass(frozen=True, slots=True)
class Role:
    """A constant's part in training and why. `offered` says whether a `trainable` pattern may name it."""

    name: str
    part: Part
    reason: str
    offered: bool = True


@dataclass
class _Reading:
    """What a walk over the nodes finds out about the constants. A value may be computed from several constants."""

    recorded: Mapping[str, str]
    single: set[str]
    aliases: dict[str, frozenset[str]]
    weights: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    #: Products of a weight that have no bias yet, and values that were normalized or normalized and scaled.
    products: set[str] = field(default_factory=set)
    normal: set[str] = field(default_factory=set)
    scaled: set[str] = field(default_factory=set)
    #: Instance normalizations that are the middle of a group normalization: their own scale and shift do nothing.
    grouped: set[str] = field(default_factory=set)
    makers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    #: Whether the exporter has recorded which tensors are parameters: the others are none. Some tools drop its records.
    complete: bool = False
    #: Constants that the exporter has added.
    added: set[str] = field(default_factory=set)


def find_roles(
    model: onnx.ModelProto, tensors: Mapping[str, onnx.TensorProto], trainable: Sequence[str] | None = None
) -> list[Role]:
    """The role of each tensor, in the order of `tensors`; constants that `trainable` patterns name are parameters too.

    A pattern that fits a parameter means parameters alone: `*` trains no buffer. One that fits none means other
    constants, but single numbers only by their whole names, as exporters write many of them.
    Raises `validation_failed` for a pattern that fits no tensor that could be trained.
    """
    single = {name for name, tensor in tensors.items() if math.prod(tensor.dims) == 1}
    read = _Reading(_recorded(model), single, {name: frozenset({name}) for name in tensors})
    read.grouped = _grouped(model, tensors)
    read.complete = _PARAMETER in read.recorded.values()
    if model.producer_name == "pytorch":
        # torch's exporters keep parameters as initializers: a scale of ones that they add is a Constant node.
        read.added = {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    for node in model.graph.node:
        if node.op_type != "Constant":
            _read_node(read, node)
    roles = [_role(read, name, tensor) for name, tensor in tensors.items()]
    if trainable is None:
        return roles
    chosen = _named_constants(roles, single, trainable)
    return [
        replace(role, part="parameter", reason=f"named by trainable; {role.reason}") if role.name in chosen else role
        for role in roles
    ]


def _named_constants(roles: Sequence[Role], single: Collection[str], trainable: Sequence[str]) -> set[str]:
    """The constants that become parameters because a pattern fits them and no parameter."""
    parameters = [role.name for role in roles if role.part == "parameter"]
    constants = [role.name for role in roles if role.part == "constant" and role.offered]
    chosen: set[str] = set()
    for pattern in trainable:
        if fitting(pattern, parameters):
            continue
        found = {name for name in fitting(pattern, constants) if name == pattern or name not in single}
        if not found:
            matching([pattern], [*parameters, *(name for name in constants if name not in single)], PATTERN)
        chosen |= found
    return chosen


def _grouped(model: onnx.ModelProto, tensors: Mapping[str, onnx.TensorProto]) -> set[str]:
    """Outputs of instance normalizations with a scale of ones and a shift of zeros that a Reshape reads."""
    reshaped = {node.input[0] for node in model.graph.node if node.op_type == "Reshape"}
    found = set()
    for node in model.graph.node:
        known = all(name in tensors for name in node.input[1:3])
        if node.op_type == "InstanceNormalization" and node.output[0] in reshaped and known:
            scale, shift = (numpy_helper.to_array(tensors[name]) for name in node.input[1:3])
            if (scale == 1).all() and not shift.any():
                found.add(node.output[0])
    return found


def _recorded(model: onnx.ModelProto) -> dict[str, str]:
    """The reason of each tensor that the exporter has noted: `parameter …` or `buffer …`."""
    noted: dict[str, dict[str, str]] = {}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.initializer):
        noted.setdefault(value.name, {}).update({entry.key: entry.value for entry in value.metadata_props})
    arguments = called_with(model)
    found: dict[str, str] = {}
    for name, entries in noted.items():
        parts = re.findall(r"'([^']*)'", entries.get(FOLDED_FROM, ""))
        weights = [part for part in parts if "weight" in part.rpartition(".")[2] or argument_of(part) in arguments]
        if entries.get(_KIND) in ("PARAMETER", "BUFFER"):
            found[name] = _PARAMETER if entries[_KIND] == "PARAMETER" else "buffer by the exporter's record"
        elif weights:
            found[name] = f"parameter computed by the exporter from {', '.join(weights)}"
    return found


def _read_node(read: _Reading, node: onnx.NodeProto) -> None:
    for output in node.output:
        read.makers[output] = node
    if node.op_type in ("Shape", "Size"):
        # What is computed of sides alone is a setting: a weight that is cut by them is the weight still.
        read.aliases[node.output[0]] = frozenset()
        return
    sources = [read.aliases.get(name, frozenset()) for name in node.input]
    given = [name for name in node.input if name]
    # What is computed from constants alone stands for all of them: a weight that is cut, joined or scaled first.
    if given and all(name in read.aliases for name in given) and not node.op_type.startswith("Random"):
        for index, names in enumerate(sources):
            if index in _SETTINGS.get(node.op_type, ()):
                _note(read.settings, names, f"a setting of {_named(node)}")
        joined: frozenset[str] = frozenset().union(*sources)
        read.aliases |= dict.fromkeys((output for output in node.output if output), joined)
        if not _reads_weights(node):
            return
    for index, names in enumerate(sources):
        if names:
            _read_input(read, node, index, names)
    _follow(read, node)


def _reads_weights(node: onnx.NodeProto) -> bool:
    return node.op_type in _WEIGHTS or node.op_type == "Gather"


def _read_input(read: _Reading, node: onnx.NodeProto, index: int, names: frozenset[str]) -> None:
    kind = node.op_type
    if len(names) > 1:
        # Numbers that a weight is computed with are no weights themselves.
        names -= read.single
    if index in _SETTINGS.get(kind, ()):
        _note(read.settings, names, f"a setting of {_named(node)}")
    elif index in STATISTICS.get(kind, ()):
        _note(read.statistics, names, f"running statistic of {_named(node)}")
    elif node.output[0] in read.grouped:
        _note(read.others, names, f"neutral in {_named(node)}, part of a group normalization")
    elif index in _WEIGHTS.get(kind, ()):
        _note(read.weights, names, f"{'bias' if index == _OWN_BIAS.get(kind) else 'weight'} of {_named(node)}")
    elif kind == "Gather" and index == 0:
        # A table has rows; a list of single numbers that is looked up is a schedule or the like.
        _note(read.weights, names, f"table of {_named(node)}")
    elif kind == "Add" and _other(node, index) in read.products:
        _note(read.weights, names, f"bias added to a product at {_named(node)}")
    elif kind == "Mul" and _other(node, index) in read.normal:
        _note(read.weights, names, f"scale of a normalization at {_named(node)}")
    elif kind == "Add" and _other(node, index) in read.scaled | read.normal:
        _note(read.weights, names, f"shift of a normalization at {_named(node)}")
    else:
        _note(read.others, names, f"only read by {_named(node)}")


def _follow(read: _Reading, node: onnx.NodeProto) -> None:
    """Notes what the node's output is: a product, a normalized value, or the same as its input."""
    kind, output = node.op_type, node.output[0]
    constant = [bool(read.aliases.get(name)) for name in node.input]
    if kind in _PRODUCTS:
        weighed = any(index < len(constant) and constant[index] for index in _PRODUCTS[kind])
        bias = _OWN_BIAS.get(kind)
        if weighed and not (bias is not None and len(node.input) > bias and node.input[bias]):
            read.products.add(output)
    elif kind in _SAME:
        for found in (read.products, read.normal, read.scaled):
            if node.input[0] in found:
                found.add(output)
    elif (
        output in read.grouped
        or (kind in ("LayerNormalization", "RMSNormalization") and node.input[1] in read.added)
        or (kind == "Div" and _is_deviation(read, node.input[1]))
        or (kind == "Mul" and any(_is_inverse_deviation(read, name) for name in node.input))
    ):
        read.normal.add(output)
    elif kind == "Mul" and any(name in read.normal for name in node.input) and any(constant):
        read.scaled.add(output)


def _is_deviation(read: _Reading, name: str) -> bool:
    """Whether a value is the square root of a mean, with a small number added perhaps."""
    node = _origin(read, name)
    if node is None or node.op_type not in ("Sqrt", "Pow"):
        return False
    return _is_mean(read, node.input[0])


def _is_inverse_deviation(read: _Reading, name: str) -> bool:
    node = _origin(read, name)
    if node is None:
        return False
    if node.op_type == "Reciprocal":
        return _is_deviation(read, node.input[0])
    if node.op_type == "Div":
        return bool(read.aliases.get(node.input[0])) and _is_deviation(read, node.input[1])
    return node.op_type == "Pow" and _is_mean(read, node.input[0])


def _is_mean(read: _Reading, name: str) -> bool:
    node = _origin(read, name)
    if node is not None and node.op_type in ("Add", "Max", "Clip"):
        return any(_is_mean(read, part) for part in node.input if part and not read.aliases.get(part))
    return node is not None and node.op_type == "ReduceMean"


def _origin(read: _Reading, name: str) -> onnx.NodeProto | None:
    node = read.makers.get(name)
    while node is not None and node.op_type in _SAME:
        node = read.makers.get(node.input[0])
    return node


def _role(read: _Reading, name: str, tensor: onnx.TensorProto) -> Role:
    dtype = DTYPES.get(tensor.data_type)
    if dtype is None or not dtype.is_floating_point:
        return Role(name, "constant", "integers and booleans are not trained", offered=False)
    if name in read.statistics:
        return Role(name, "statistic", read.statistics[name], offered=False)
    if name in read.settings:
        return Role(name, "constant", read.settings[name], offered=False)
    recorded = read.recorded.get(name)
    if recorded is not None:
        return Role(name, "parameter" if recorded.startswith("parameter") else "constant", recorded)
    if name in read.added or (read.complete and name in read.weights):
        return Role(name, "constant", f"added by the exporter, {read.weights.get(name) or read.others.get(name, '')}")
    if name in read.weights and _is_weight(read.weights[name], tensor):
        return Role(name, "parameter", read.weights[name])
    reason = read.weights.get(name) or read.others.get(name, "nothing reads it")
    if math.prod(tensor.dims) == 1:
        return Role(name, "constant", f"a single number, {reason}")
    return Role(name, "constant", f"{reason}, in no weight's or bias's place")


def _is_weight(reason: str, tensor: onnx.TensorProto) -> bool:
    """Masks hold infinities; a table that is looked up has rows and columns."""
    if reason.startswith("table") and len(tensor.dims) < 2:
        return False
    return reason.startswith(("weight", "bias of", "table")) or bool(np.isfinite(numpy_helper.to_array(tensor)).all())


def _note(found: dict[str, str], names: frozenset[str], reason: str) -> None:
    for name in names:
        found.setdefault(name, reason)


def _other(node: onnx.NodeProto, index: int) -> str:
    return str(node.input[1 - index])


def _named(node: onnx.NodeProto) -> str:
    return f"{node.op_type} (node {node.name!r})" if node.name else str(node.op_type)
