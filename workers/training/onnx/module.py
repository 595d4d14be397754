"""An ONNX graph as a torch module: its nodes run in order through the operator table, its weights are parameters.

Parameters and buffers carry the names that the ONNX file gives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from device_operations.errors import failure
from workers.devices.arrays import Array as HostArray
from workers.training.onnx.graph import TrainableGraph
from workers.training.onnx.operators import OPERATORS, OnnxNode, Operator
from workers.training.onnx.operators.node import DTYPES, Mode

#: Operators that are not computed beforehand: they follow the mode, or draw numbers.
_UNFOLDED = {"BatchNormalization", "Dropout"}


@dataclass(frozen=True)
class _Call:
    """One node, ready to run: read these values, call, write those, drop values that are not read later."""

    node: OnnxNode
    operator: Operator
    release: tuple[str, ...]


class OnnxModule(nn.Module):
    """The graph as a module: inputs positional in the file's order, outputs as a tuple in the file's order.

    `meta` builds it without memory for the weights, to try shapes on.
    """

    def __init__(self, graph: TrainableGraph, *, meta: bool = False) -> None:
        super().__init__()
        self.input_names = tuple(port.name for port in graph.inputs)
        self.output_names = tuple(port.name for port in graph.outputs)
        self._mode = Mode()
        self._host: dict[str, Tensor] = {}
        self._copies = graph.copies
        self._adapters: dict[str, float] = {}
        self._take_tensors(graph, meta)
        self._calls = self._build_calls(graph)

    def _take_tensors(self, graph: TrainableGraph, meta: bool) -> None:
        parameters, statistics = set(graph.parameters), set(graph.statistics)
        for name, tensor in graph.tensors.items():
            if name in graph.copies:
                continue
            if tensor.data_type not in DTYPES:
                raise failure(
                    "model_invalid", f"the constant {name!r} has ONNX type {tensor.data_type}, unknown to torch"
                )
            dtype = DTYPES[tensor.data_type]
            if meta and (name in parameters or name in statistics):
                value = torch.empty(tuple(tensor.dims), dtype=dtype, device="meta")
            else:
                value = to_torch(tensor)
            # ONNX names hold dots, which register_parameter refuses; everything else takes them as they are.
            if name in parameters:
                self._parameters[name] = nn.Parameter(value)
            elif dtype.is_floating_point:
                self._buffers[name] = value.to("meta") if meta else value
                if name not in statistics:
                    self._non_persistent_buffers_set.add(name)
            else:
                self._host[name] = value

    def _build_calls(self, graph: TrainableGraph) -> list[_Call]:
        fixed = {*graph.parameters, *graph.statistics, *graph.copies}
        constants = {
            name: numpy_helper.to_array(t) for name, t in graph.tensors.items() if name not in fixed and _small(t)
        }
        last_use: dict[str, int] = {}
        for index, node in enumerate(graph.model.graph.node):
            for name in node.input:
                last_use[name] = index
        kept = set(self.output_names) | set(graph.tensors)
        read = set(last_use) | set(self.output_names)
        calls = []
        for index, proto in enumerate(graph.model.graph.node):
            if proto.op_type == "Constant":
                continue
            node = OnnxNode(
                proto.op_type,
                proto.name,
                tuple(proto.input),
                # An output that is not read counts as one that is left out.
                tuple(name if name in read else "" for name in proto.output),
                {a.name: _attribute(a) for a in proto.attribute},
                graph.opset,
                constants,
                self._mode,
            )
            if self._fold(node, constants):
                kept.update(name for name in node.outputs if name)
                continue
            release = {name for name in proto.input if name and last_use[name] == index and name not in kept}
            calls.append(_Call(node, _built(node), tuple(release)))
        return calls

    def _fold(self, node: OnnxNode, constants: dict[str, HostArray]) -> bool:
        """Computes a node of small constants once, so that what reads it finds a constant; whether it was one.

        What it gives is a setting of the graph: the scales of a resize, a shape, a mask.
        """
        given = [name for name in node.inputs if name]
        if node.op_type in _UNFOLDED or not given or any(name not in constants for name in given):
            return False
        inputs = [torch.from_numpy(np.array(constants[name])) if name else None for name in node.inputs]
        result = _built(node)(*inputs)
        for name, value in zip(node.outputs, [result] if isinstance(result, Tensor) else result, strict=False):
            if name:
                constants[name] = value.numpy()
                if value.is_floating_point():
                    self._buffers[name] = value
                    self._non_persistent_buffers_set.add(name)
                else:
                    self._host[name] = value
        return True

    def freeze_statistics(self) -> None:
        """From now on batch normalization uses its running statistics in training too."""
        self._mode.frozen = True

    def adapt(self, weight: str, down: Tensor, up: Tensor, scale: float) -> None:
        """Lets `weight` act as weight + scale * up @ down, with two trained factors."""
        self._parameters[f"{weight}.lora_a"] = nn.Parameter(down)
        self._parameters[f"{weight}.lora_b"] = nn.Parameter(up)
        self._adapters[weight] = scale

    def linear_weights(self) -> dict[str, tuple[int, int]]:
        """The matrices that MatMul and Gemm multiply with, and their shapes."""
        found = {}
        for call in self._calls:
            if call.node.op_type in ("MatMul", "Gemm"):
                for name in call.node.inputs[:2]:
                    weight = self._parameters.get(name)
                    if weight is not None and weight.dim() == 2:
                        found[name] = (weight.shape[0], weight.shape[1])
        return found

    def train(self, mode: bool = True) -> OnnxModule:
        super().train(mode)
        # Operators hold this and not the module: a cycle would keep its memory until Python collects.
        self._mode.training = mode
        return self

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values: dict[str, Any] = {**self._host, **self._buffers, **self._parameters}
        for weight, scale in self._adapters.items():
            values[weight] = values[weight] + scale * (values[f"{weight}.lora_b"] @ values[f"{weight}.lora_a"])
        for name, copy in self._copies.items():
            values[name] = values[copy.of].t() if copy.transposed else values[copy.of]
        values.update(zip(self.input_names, inputs, strict=True))
        for call in self._calls:
            node = call.node
            try:
                result = call.operator(*[values[name] if name else None for name in node.inputs])
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
                error.add_note(f"at ONNX operator {node.op_type}, node {node.name!r}")
                raise
            if isinstance(result, Tensor):
                values[node.outputs[0]] = result
            else:
                values.update(zip(node.outputs, result, strict=False))
            for name in call.release:
                del values[name]
        return tuple(values[name] for name in self.output_names)


def _built(node: OnnxNode) -> Operator:
    try:
        return OPERATORS[node.op_type](node)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise node.refuse(f"its attributes or inputs do not fit: {error}") from error


def to_torch(tensor: onnx.TensorProto) -> Tensor:
    """A torch tensor of its own memory with the elements of an ONNX tensor."""
    array = numpy_helper.to_array(tensor)
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C", copy=True))


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _small(tensor: onnx.TensorProto) -> bool:
    return int(np.prod(tensor.dims)) <= 4096 and tensor.data_type in DTYPES
