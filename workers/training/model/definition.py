"""What a training session's model is, before it takes memory: read, checked and counted from its description or file.

A definition builds torch modules: one without memory (on the meta device) to count parameters and try shapes on, and
real ones on the CPU. Once the session is built it does not change, but for what is `learned`, and may be used from any
thread.
"""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import Tensor, nn

from device_operations.errors import failure
from device_operations.requests.training import LayersModel, Model, OnnxModel
from workers.training.model.layers import build_layers, index_limit
from workers.training.model.ports import Port
from workers.training.onnx.graph import TrainableGraph, read_graph, set_inference_mode
from workers.training.onnx.module import OnnxModule
from workers.training.optimization.determinism import derive_seed


@dataclass(frozen=True, slots=True)
class Learned:
    """What was learned about a network, independent of its weights: on the thread that steps, for all its sessions.

    `outputs` is what it makes of inputs, by mode, shapes and dtypes: meta tensors, or None if only a real run can show
    it (`ShapeTrial`). `graphs` are exported graphs without weights, by the inputs' dtypes and shapes; None where the
    exporter leaves the weights no places of their own (`export`).
    """

    outputs: OrderedDict[Any, list[Tensor] | None] = field(default_factory=OrderedDict)
    graphs: OrderedDict[str, onnx.ModelProto | None] = field(default_factory=OrderedDict)


@dataclass(frozen=True)
class Sources:
    """Local files of the blobs or paths that a session's request names, fetched by the caller beforehand."""

    model: Path | None = None
    weights: Path | None = None


class Definition(ABC):
    """The model of a session. `structure` is a hash: equal for models that differ in their weights alone."""

    inputs: tuple[Port, ...]
    output_names: tuple[str, ...]
    #: Which output the loss is taken of.
    trained_output: int = 0
    structure: str
    #: Shared by the definitions of one structure where they are made with the same `networks`.
    learned: Learned

    @abstractmethod
    def build_meta(self) -> nn.Module | None:
        """The module without memory; None where the model can only be had with it."""

    @abstractmethod
    def build(self, seed: int) -> nn.Module:
        """The module on the CPU with its initial weights: from the file, or random from `seed`."""


#: What was learned of each network, by its structure.
Networks = OrderedDict[str, Learned]

#: Networks that are remembered.
_REMEMBERED = 64


def define(
    model: Model,
    sources: Sources,
    *,
    trust_programs: bool,
    networks: Networks | None = None,
    trainable: Sequence[str] | None = None,
    frozen_statistics: bool = False,
) -> Definition:
    """The definition for a request's `model`; it shares what is learned with those of its structure in `networks`.

    `trainable` are the patterns of what is to be trained: they may name constants of
    a graph that are not trained otherwise.
    `frozen_statistics` takes graphs whose batch normalization was folded away.

    Raises `validation_failed`, `model_invalid`, `checksum_mismatch`, and `untrusted_program` for a program where
    programs are not trusted.
    """
    made = _define(model, sources, trust_programs, trainable, frozen_statistics)
    # With its statistics frozen, a network takes batches that it refuses otherwise: a single sample.
    key = f"{made.structure} frozen" if frozen_statistics else made.structure
    made.learned = Learned() if networks is None else networks.setdefault(key, Learned())
    while networks is not None and len(networks) > _REMEMBERED:
        networks.popitem(last=False)
    return made


def _define(
    model: Model, sources: Sources, trust_programs: bool, trainable: Sequence[str] | None, frozen_statistics: bool
) -> Definition:
    if isinstance(model, LayersModel):
        return LayersDefinition(model)
    if not isinstance(model, OnnxModel) and not trust_programs:
        raise failure(
            "untrusted_program",
            "a model of kind torchscript brings code of its own, and TRAINING__TRUST_PROGRAMS is not set here; "
            "send layers or an ONNX file",
        )
    if sources.model is None:
        raise failure("model_invalid", f"the file of the {model.kind} model was not found")
    if model.sha256 is not None:
        check_hash(sources.model, model.sha256, "the model file")
    if isinstance(model, OnnxModel):
        return OnnxDefinition(model, read_graph(sources.model, trainable, frozen_statistics=frozen_statistics))
    return ScriptDefinition(sources.model)


class LayersDefinition(Definition):
    """Layers in order, from the input `input` to the output `output`."""

    def __init__(self, model: LayersModel) -> None:
        self._layers = model.layers
        rows = index_limit(model.layers)
        self.inputs = (Port("input", torch.float32 if rows is None else torch.int64, rows=rows),)
        self.output_names = ("output",)
        self.structure = _hash(json.dumps(model.layers, sort_keys=True).encode())

    def build_meta(self) -> nn.Module:
        with torch.device("meta"):
            return build_layers(self._layers)

    def build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, "initial weights"))
            return build_layers(self._layers)


class OnnxDefinition(Definition):
    """A graph from an ONNX file; parameters carry the names of the file's initializers and constants."""

    def __init__(self, model: OnnxModel, graph: TrainableGraph) -> None:
        self._graph = graph
        rows = _rows_by_input(self._graph)
        self.inputs = tuple(Port(port.name, port.dtype, port.shape, rows.get(port.name)) for port in self._graph.inputs)
        self.output_names = tuple(port.name for port in self._graph.outputs)
        if model.output is not None:
            if model.output not in self.output_names:
                raise failure(
                    "model_invalid", f"the model has no output {model.output!r}; it has {', '.join(self.output_names)}"
                )
            self.trained_output = self.output_names.index(model.output)
        self._weights = {
            name: self._graph.tensors[name]
            for name in (*self._graph.parameters, *self._graph.statistics, *self._graph.copies)
        }
        self._released = False
        self.structure = _hash(self._without_weights().SerializeToString(deterministic=True))

    @property
    def graph(self) -> TrainableGraph:
        """The checked file; its weights are gone once released."""
        return self._graph

    def build_meta(self) -> nn.Module:
        return OnnxModule(self._graph, meta=True)

    def build(self, seed: int) -> nn.Module:
        """As above, once: the weights are the module's from then on, and the file's copy of them is dropped."""
        if self._released:
            raise failure("internal_error", "the model's weights were handed over; read its file again")
        module = OnnxModule(self._graph)
        for tensor in self._weights.values():
            _clear(tensor)
        self._released = True
        return module

    def written_back(self, tensors: dict[str, Tensor]) -> onnx.ModelProto:
        """The file's model in inference mode, with these weights where its own were; `tensors` are on the CPU."""
        model = self._without_weights()
        places = _places(model)
        for name in self._weights:
            copy = self._graph.copies.get(name)
            weight = tensors[name if copy is None else copy.of]
            places[name].raw_data = raw_bytes(weight.t() if copy is not None and copy.transposed else weight)
        set_inference_mode(model)
        return model

    def _without_weights(self) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(self._graph.model)
        for name, tensor in _places(copy).items():
            if name in self._weights:
                _clear(tensor)
        return copy


class ScriptDefinition(Definition):
    """A TorchScript program, which runs code of its own: only where the operator of the service trusts programs."""

    def __init__(self, path: Path) -> None:
        self._program = path.read_bytes()
        names = [argument.name for argument in cast(Any, self.build(0)).forward.schema.arguments[1:]]
        self.inputs = tuple(Port(name) for name in names)
        self.output_names = ("output",)
        self.structure = _hash(self._program)

    def build_meta(self) -> None:
        return None

    def build(self, seed: int) -> nn.Module:
        try:
            return cast(nn.Module, _load_program(io.BytesIO(self._program), map_location="cpu"))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:300]
            raise failure("model_invalid", f"the file is no TorchScript program: {reason}") from error


_load_program: Callable[..., Any] = torch.jit.load


def raw_bytes(tensor: Tensor) -> bytes:
    """A host tensor's elements as ONNX keeps them: little-endian, row-major."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def check_hash(path: Path, wanted: str, what: str) -> None:
    """Raises `checksum_mismatch` unless the file's sha256 is `wanted`."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise failure(
            "checksum_mismatch",
            f"{what} has sha256 {found}, but {wanted} was announced; it is damaged or another file",
            detail={"wanted": wanted, "found": found},
        )


#: Operators whose output holds the numbers of their first input.
_PASSING = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten")


def _rows_by_input(graph: TrainableGraph) -> dict[str, int]:
    """For each input that a Gather reads as indices into a weight, the number of its rows."""
    origin = {port.name: port.name for port in graph.inputs}
    rows: dict[str, int] = {}
    for node in graph.model.graph.node:
        if node.op_type in _PASSING and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        elif node.op_type == "Gather" and node.input[1] in origin and node.input[0] in graph.tensors:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            count = int(graph.tensors[node.input[0]].dims[axis])
            name = origin[node.input[1]]
            rows[name] = min(count, rows.get(name, count))
    return rows


def _places(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    places = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            places[node.output[0]] = node.attribute[0].t
    return places


def _clear(tensor: onnx.TensorProto) -> None:
    for part in ("raw_data", "float_data", "int32_data", "double_data"):
        tensor.ClearField(part)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
