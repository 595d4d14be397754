"""Constants that several nodes of an ONNX graph share: split where exporters merged them, tied where the model does it.

Exporters keep equal tensors once. So a scale of ones and a running variance of ones become one initializer, though only
one of them is trained; so do the weights of layers that start as copies of one another. `origins` says which is which.
What a model ties, an embedding that is the last layer's weight too, stays one parameter, also where constant folding
has left a transposed copy of it.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from workers.devices.arrays import Array as HostArray
from workers.training.onnx.origins import NOTHING, OWN, UNKNOWN, Origins, is_tie
from workers.training.onnx.roles import STATISTICS

#: A node and the position of the input that it reads.
Place = tuple[onnx.NodeProto, int]

#: Elements from which on two equal matrices are no coincidence.
_COPY_ELEMENTS = 16


@dataclass(frozen=True, slots=True)
class SharedConstant:
    """A tensor that holds the elements of the parameter `of`, transposed or as they are."""

    of: str
    transposed: bool


def bypass_identities(model: onnx.ModelProto) -> set[str]:
    """Lets nodes read a constant itself where they read it through Identity nodes, which exporters leave for merges.

    Gives the names that the constants had there.
    """
    graph = model.graph
    constants = _constants(model)
    outputs = {value.name for value in graph.output}
    instead: dict[str, str] = {}
    for node in list(graph.node):
        for index, name in enumerate(node.input):
            node.input[index] = instead.get(name, name)
        if node.op_type == "Identity" and node.input[0] in constants and node.output[0] not in outputs:
            instead[node.output[0]] = node.input[0]
            graph.node.remove(node)
    return set(instead)


def split_merged(model: onnx.ModelProto, names: set[str]) -> None:
    """Gives readers tensors of their own where exporters merged equal ones that train apart; `names` as they were.

    Layers that are copies of one another start with equal weights, as those of torch's TransformerEncoder do. Which
    parameter a node reads is seen by its origin (`origins`). Without an origin, running statistics, and constants
    with all elements equal (initial scales and biases), are taken to be apart in each place.
    """
    constants = _constants(model)
    origins = Origins(model, {*constants, *names})
    places: dict[str, list[Place]] = defaultdict(list)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in constants:
                places[name].append((node, index))
    for name, readers in places.items():
        tensor = constants[name]
        if len(readers) < 2 or tensor.data_type not in _FLOATS:
            continue
        groups = _grouped(name, tensor, readers, origins)
        for number, group in enumerate(groups[1:], 2):
            copy = _copied(model, tensor, f"{name}.{number}", recorded=group.parameter)
            for node, index in group.readers:
                node.input[index] = copy


@dataclass(slots=True)
class _Group:
    """Readers of what was one parameter; `parameter` is False for a constant of the exporter's own."""

    readers: list[Place]
    parameter: bool = True


def _grouped(name: str, tensor: onnx.TensorProto, readers: list[Place], origins: Origins) -> list[_Group]:
    """The readers by the parameter they read; those that keep the tensor's name first."""
    uniform = math.prod(tensor.dims) > 1 and _is_uniform(tensor)
    kept = _Group([])
    apart: dict[object, _Group] = {}
    for number, place in enumerate(readers):
        node, index = place
        key: object = origins.of(name, node)
        if index in STATISTICS.get(node.op_type, ()):
            # Statistics move out, so that the name stays with what is trained.
            apart.setdefault(("statistic", number if key is UNKNOWN else key), _Group([])).readers.append(place)
        elif key is UNKNOWN and uniform:
            apart.setdefault(("place", number), _Group([])).readers.append(place)
        elif key is NOTHING and uniform:
            apart.setdefault(NOTHING, _Group([], parameter=False)).readers.append(place)
        elif key in (OWN, UNKNOWN, NOTHING) or (kept.readers and is_tie(kept.readers[0][0], node)):
            kept.readers.append(place)
        else:
            apart.setdefault(key, _Group([])).readers.append(place)
    groups = sorted(apart.items(), key=lambda item: isinstance(item[0], tuple) and item[0][0] == "statistic")
    for _, group in groups:
        # A table that was read before what owns it was met.
        if kept.readers and group.parameter and all(is_tie(kept.readers[0][0], node) for node, _ in group.readers):
            kept.readers += group.readers
            group.readers = []
    found = [kept, *(group for _, group in groups)]
    return [group for group in found if group.readers]


def find_copies(
    tensors: Mapping[str, onnx.TensorProto], parameters: list[str], readers: Mapping[str, list[onnx.NodeProto]]
) -> dict[str, SharedConstant]:
    """The tables and products' matrices among `parameters` that have the same elements, the later ones by name.

    Two matrices of one kind with equal elements are no tie: layers are often made as copies of one another.
    """
    kinds = {name: {node.op_type == "Gather" for node in nodes if node.input} for name, nodes in readers.items()}
    seen: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    copies: dict[str, SharedConstant] = {}
    for name in parameters:
        tensor = tensors[name]
        if len(tensor.dims) != 2 or math.prod(tensor.dims) < _COPY_ELEMENTS:
            continue
        array = numpy_helper.to_array(tensor)
        if (array == array.flat[0]).all():
            continue
        straight = (tensor.data_type, array.shape, _digest(array))
        turned = (tensor.data_type, array.T.shape, _digest(array.T))
        for elements, transposed in ((straight, False), (turned, True)):
            other = seen.get(elements)
            if other is not None and kinds[other] != kinds[name]:
                copies[name] = SharedConstant(other, transposed)
                break
        else:
            seen.setdefault(straight, name)
    return copies


_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def _digest(array: HostArray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


def _is_uniform(tensor: onnx.TensorProto) -> bool:
    array = numpy_helper.to_array(tensor)
    return bool((array == array.flat[0]).all())


def _copied(model: onnx.ModelProto, tensor: onnx.TensorProto, name: str, *, recorded: bool) -> str:
    copy = model.graph.initializer.add()
    copy.CopyFrom(tensor)
    copy.name = name
    del copy.metadata_props[:]
    if recorded:
        noted = [value for value in (*model.graph.value_info, tensor) if value.name == tensor.name]
        copy.metadata_props.extend(entry for value in noted for entry in value.metadata_props)
    return name


def _constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers and the tensors of Constant nodes, by the name that nodes read them by."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found
