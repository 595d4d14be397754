"""Each tensor of a session's model with whether it is trained, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from device_operations.requests.training import Initialize
from workers.training.model.definition import Definition, LayersDefinition, OnnxDefinition
from workers.training.model.lora import is_adapter
from workers.training.model.on_device import DeviceModel
from workers.training.model.ports import name_of
from workers.training.onnx.operators.node import DTYPES


@dataclass(frozen=True, slots=True)
class ListedTensor:
    """A floating-point tensor of the model, as the session's status lists it; `dtype` is NumPy's name."""

    name: str
    shape: list[int]
    dtype: str
    trained: bool
    reason: str


def list_tensors(definition: Definition, spec: Initialize, model: DeviceModel) -> list[ListedTensor]:
    """Every floating-point parameter, buffer and constant of the model, adapters last."""
    if isinstance(definition, OnnxDefinition):
        listed = _of_graph(definition, spec, model)
    else:
        listed = _of_module(definition, spec, model)
    adapters = [name for name in model.trained if spec.lora is not None and is_adapter(name)]
    return listed + [_listed(name, model.parameters[name], True, "adapter of lora") for name in adapters]


def _of_graph(definition: OnnxDefinition, spec: Initialize, model: DeviceModel) -> list[ListedTensor]:
    graph = definition.graph
    listed = []
    for role in graph.roles:
        tensor = graph.tensors[role.name]
        dtype = DTYPES.get(tensor.data_type)
        if dtype is None or not dtype.is_floating_point:
            continue
        copy = graph.copies.get(role.name)
        trained = (role.name if copy is None else copy.of) in model.trained
        reason = role.reason
        if copy is not None:
            reason = f"has the elements of {copy.of} and follows it; {reason}"
        elif role.part == "parameter" and not trained:
            reason = f"{_frozen_by(spec)}; {reason}"
        listed.append(ListedTensor(role.name, list(tensor.dims), name_of(dtype), trained, reason))
    return listed


def _of_module(definition: Definition, spec: Initialize, model: DeviceModel) -> list[ListedTensor]:
    owner = "a layer" if isinstance(definition, LayersDefinition) else "the program"
    listed = []
    for name, parameter in model.parameters.items():
        if spec.lora is not None and is_adapter(name):
            continue
        trained = name in model.trained
        reason = f"parameter of {owner}"
        if not trained:
            reason = f"{_frozen_by(spec)}; {reason}"
        elif spec.trainable is not None:
            reason = f"named by trainable; {reason}"
        listed.append(_listed(name, parameter, trained, reason))
    buffers = [_listed(name, buffer, False, f"buffer of {owner}") for name, buffer in model.buffers.items()]
    return [tensor for tensor in listed + buffers if tensor.dtype.startswith(("float", "bfloat"))]


def _frozen_by(spec: Initialize) -> str:
    return "frozen: lora" if spec.trainable is None else "frozen: not named by trainable"


def _listed(name: str, tensor: Tensor, trained: bool, reason: str) -> ListedTensor:
    return ListedTensor(name, list(tensor.shape), name_of(tensor.dtype), trained, reason)
