"""A graph cut in two where one tensor of the latents' sides is all that passes: one half in tiles, one on the whole.

decoder    latents -> attention -> | -> upsampling -> image      the first half on the whole, the second in tiles
encoder    image -> downsampling -> | -> attention -> latents    the first half in tiles, the second on the whole
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

#: The operators of attention, fused or not, which take from the whole of their input.
ATTENTION = {"Softmax", "Attention", "MultiHeadAttention", "PackedMultiHeadAttention", "GroupQueryAttention"}
_UP = {"Resize", "Upsample", "ConvTranspose", "DepthToSpace"}
_DOWN = {"SpaceToDepth", "AveragePool", "MaxPool"}


@dataclass(frozen=True, slots=True)
class Halves:
    """Two graphs, the second of which takes `at` from the first."""

    first: onnx.ModelProto
    second: onnx.ModelProto
    at: str


def before_upsampling(model: onnx.ModelProto) -> Halves | None:
    """A decoder cut where its last tensor has the latents' sides; None where attention would be in the second half."""
    scaling = _scaling(model)
    if not scaling:
        return None
    places = [place for place in _places(model) if place[0] < scaling[0]]
    attention = _attention(model)
    if not places or (attention and attention[-1] > places[-1][0]):
        return None
    return _halves(model, *places[-1])


def after_downsampling(model: onnx.ModelProto) -> Halves | None:
    """An encoder cut where its first tensor has the latents' sides; None where attention would be in the first half."""
    scaling = _scaling(model)
    if not scaling:
        return None
    places = [place for place in _places(model) if place[0] >= scaling[-1]]
    attention = _attention(model)
    if not places or (attention and attention[0] <= places[0][0]):
        return None
    return _halves(model, *places[0])


def _scaling(model: onnx.ModelProto) -> list[int]:
    """Where the nodes stand that change an image's sides."""
    return [
        number
        for number, node in enumerate(model.graph.node)
        if node.op_type in _UP | _DOWN
        or any(one.name == "strides" and any(step != 1 for step in one.ints) for one in node.attribute)
    ]


def _attention(model: onnx.ModelProto) -> list[int]:
    return [number for number, node in enumerate(model.graph.node) if node.op_type in ATTENTION]


def _places(model: onnx.ModelProto) -> Iterator[tuple[int, onnx.ValueInfoProto]]:
    """The nodes behind which a single tensor of four sides is all that later nodes take, and that tensor."""
    graph = model.graph
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    constant = {"", *(one.name for one in graph.initializer)}
    last = {name: number for number, node in enumerate(graph.node) for name in node.input}
    last |= {output.name: len(graph.node) for output in graph.output}
    live = {one.name for one in graph.input if one.name not in constant}
    for number, node in enumerate(graph.node):
        target = constant if constant.issuperset(node.input) else live
        target.update(node.output)
        live = {name for name in live if last.get(name, -1) > number}
        if len(live) == 1:
            value = known.get(next(iter(live)))
            if value is not None and value.name in node.output and len(value.type.tensor_type.shape.dim) == 4:
                yield number, value


def _halves(model: onnx.ModelProto, number: int, value: onnx.ValueInfoProto) -> Halves:
    graph = model.graph
    channels = value.type.tensor_type.shape.dim[1]
    sides = ["cut_batch", channels.dim_value if channels.HasField("dim_value") else None, "cut_height", "cut_width"]
    between = helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, sides)
    nodes = list(graph.node)
    return Halves(
        _part(model, nodes[: number + 1], graph.input, [between]),
        _part(model, nodes, [between], graph.output),
        value.name,
    )


def _part(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """The nodes that `outputs` need where `inputs` are given, with their weights."""
    given = {one.name for one in inputs}
    needed = {one.name for one in outputs}
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if any(name in needed and name not in given for name in node.output):
            kept.append(node)
            needed.update(node.input)
    weights = [one for one in model.graph.initializer if one.name in needed]
    made = helper.make_model(
        helper.make_graph(kept[::-1], model.graph.name, inputs, outputs, weights), opset_imports=model.opset_import
    )
    made.ir_version = model.ir_version
    made.functions.extend(model.functions)
    return made
