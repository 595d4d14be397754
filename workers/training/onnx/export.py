"""A trained model as an ONNX file that plain ONNX Runtime runs, made from a snapshot.

A model that came as ONNX gets its trained weights written back where its own stood: no exporter takes part. Layers and
programs go through torch's exporter; layers once, where it leaves each weight in a place of its own: later exports are
written back too, and `export_ahead` makes the graph before there is anything to write into it. Adapters are merged into
the weights they belong to.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from device_operations.errors import failure
from device_operations.requests.training import Initialize
from workers.training.checkpoints import Snapshot, WrittenFile, write_bytes
from workers.training.model.definition import Definition, LayersDefinition, OnnxDefinition, raw_bytes
from workers.training.model.lora import merge_adapters
from workers.training.model.ports import Array, name_of, take_inputs

#: Old enough for every runtime in use, new enough for LayerNormalization as one operator.
OPSET = 17

#: protobuf's limit for one message.
_MAX_BYTES = 2**31 - 1

#: Dtype and shape of one sample of each input, by name.
Shapes = Mapping[str, tuple[str, list[int]]]

#: Graphs of one network that are remembered.
_REMEMBERED = 16

#: What is exported ahead: networks of so many tensors, and of so many products of a weight and an element of a sample,
#: at the most. The exporter then takes about as long as a few steps.
_AHEAD_TENSORS, _AHEAD_PRODUCTS = 100, 2**30


def export_onnx(
    definition: Definition,
    spec: Initialize,
    snapshot: Snapshot,
    path: Path,
    example: Mapping[str, Array] | None = None,
) -> WrittenFile:
    """Writes the model of `snapshot` to `path`, whole or not at all.

    The first axis of inputs and outputs is open. torch's exporter changes state of the process, so for models that did
    not come as ONNX call this on the thread that steps; with ONNX any thread will do. Raises `model_invalid` where the
    model cannot be exported, `validation_failed` before the first step where there is no `example` of the inputs
    either, `storage_full`.
    """
    return write_bytes(onnx_bytes(definition, spec, snapshot, example), path)


def onnx_bytes(
    definition: Definition, spec: Initialize, snapshot: Snapshot, example: Mapping[str, Array] | None = None
) -> bytes:
    """The same as bytes, for a runtime in this process."""
    tensors = merge_adapters({**snapshot.part("parameter/"), **snapshot.part("buffer/")}, spec.lora)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > _MAX_BYTES - 2**20:
        raise failure("model_invalid", f"the model's {size} bytes of weights exceed what one ONNX file holds, 2 GiB")
    if isinstance(definition, OnnxDefinition):
        return bytes(definition.written_back(tensors).SerializeToString())
    shapes = snapshot.state["last_inputs"]
    if example is not None:
        taken = zip(definition.inputs, take_inputs(definition.inputs, example), strict=True)
        shapes = {port.name: (name_of(tensor.dtype), list(tensor.shape[1:])) for port, tensor in taken}
    if shapes is None:
        raise failure("validation_failed", "the export needs the shape of an input: make or evaluate one step first")
    known = definition.learned.graphs.get(_key(shapes))
    if known is not None:
        return _filled(known, tensors)
    meta = definition.build_meta()
    # Weights that are replaced at once need not be drawn first.
    module = definition.build(spec.seed) if meta is None else meta.to_empty(device="cpu")
    module.load_state_dict(tensors)
    content = _traced(definition, module, shapes)
    if isinstance(definition, LayersDefinition):
        graph = _emptied(content, tensors)
        if graph is not None:
            _remember(definition, shapes, graph)
    return content


def export_ahead(definition: Definition, shapes: Shapes) -> None:
    """Makes the graph that an export for inputs of these shapes will fill, for layers and small networks.

    It is traced on weights of its own, no two of them equal: a session's own weights are neither read nor waited for.
    Call it on the thread that steps, as `onnx_bytes`. Raises `model_invalid` where torch cannot export the model.
    """
    if not isinstance(definition, LayersDefinition) or _key(shapes) in definition.learned.graphs:
        return
    empty = definition.build_meta()
    weights = [tensor for tensor in empty.state_dict().values() if tensor.is_floating_point()]
    elements = sum(math.prod(shape) for _, shape in shapes.values())
    if len(weights) > _AHEAD_TENSORS or sum(one.numel() for one in weights) * elements > _AHEAD_PRODUCTS:
        return
    module = empty.to_empty(device="cpu")
    tensors = module.state_dict()
    random = torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=random)
        else:
            tensor.zero_()
    _remember(definition, shapes, _emptied(_traced(definition, module, shapes), tensors))


def _key(shapes: Shapes) -> str:
    return json.dumps(shapes, sort_keys=True)


def _remember(definition: LayersDefinition, shapes: Shapes, graph: onnx.ModelProto | None) -> None:
    graphs = definition.learned.graphs
    graphs[_key(shapes)] = graph
    if len(graphs) > _REMEMBERED:
        graphs.popitem(last=False)


def _emptied(content: bytes, tensors: Mapping[str, Tensor]) -> onnx.ModelProto | None:
    """The exported graph without its weights; None unless every weight stands in it by its own name and nothing else.

    The exporter folds normalization into convolutions, transposes what it multiplies by, and merges tensors that are
    equal at the time: what it made of one set of weights then is not what it makes of the next.
    """
    model = onnx.load_from_string(content)
    weights = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    places = {place.name: place for place in model.graph.initializer}
    if set(places) != set(weights):
        return None
    for name, place in places.items():
        if list(place.dims) != list(weights[name].shape) or place.raw_data != raw_bytes(weights[name]):
            return None
        place.ClearField("raw_data")
    return model


def _filled(graph: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> bytes:
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    for place in model.graph.initializer:
        place.raw_data = raw_bytes(tensors[place.name])
    return bytes(model.SerializeToString())


def _traced(definition: Definition, module: nn.Module, shapes: Shapes) -> bytes:
    names = [port.name for port in definition.inputs]
    # Two samples, so that the batch is no axis of 1 that operators spread. Zeros are valid indices too.
    examples = [torch.zeros(2, *shapes[name][1], dtype=getattr(torch, shapes[name][0])) for name in names]
    buffer = io.BytesIO()
    axes = {name: {0: "batch"} for name in (*names, *definition.output_names)}
    try:
        with _quiet():
            _export(module, tuple(examples), buffer, names, list(definition.output_names), axes)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:500] if str(error).strip() else type(error).__name__
        raise failure("model_invalid", f"torch cannot export the model to ONNX: {reason}") from error
    return buffer.getvalue()


def _export(
    module: nn.Module, examples: tuple[Tensor, ...], file: io.BytesIO, inputs: list[str], outputs: list[str], axes: Any
) -> None:
    # The exporter that traces, in evaluation mode: it needs no further package, takes milliseconds where the newer one
    # takes seconds, and is in every torch from 2.4 on.
    torch.onnx.export(
        module,
        examples,
        file,  # type: ignore[arg-type] # a file object is taken where dynamo is off
        input_names=inputs,
        output_names=outputs,
        dynamic_axes=axes,
        opset_version=OPSET,
        dynamo=False,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
