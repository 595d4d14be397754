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
from workers.training.graph import Graph
from workers.training.operators import OPERATORS, Node, Operator
from workers.training.operators.node import DTYPES, Mode


@dataclass(frozen=True)
class _Call:
    """One node, ready to run: read these values, call, write those, forget what nobody reads later."""

    node: Node
    operator: Operator
    release: tuple[str, ...]


class OnnxModule(nn.Module):
    """The graph as a module: inputs positional in the file's order, outputs as a tuple in the file's order.

    `meta` builds it without memory for the weights, to try shapes on.
    """

    def __init__(self, graph: Graph, *, meta: bool = False) -> None:
        super().__init__()
        self.input_names = tuple(port.name for port in graph.inputs)
        self.output_names = tuple(port.name for port in graph.outputs)
        self._mode = Mode()
        self._host: dict[str, Tensor] = {}
        self._adapters: dict[str, float] = {}
        self._take_tensors(graph, meta)
        self._calls = self._build_calls(graph)

    def _take_tensors(self, graph: Graph, meta: bool) -> None:
        parameters, statistics = set(graph.parameters), set(graph.statistics)
        for name, tensor in graph.tensors.items():
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

    def _build_calls(self, graph: Graph) -> list[_Call]:
        fixed = set(graph.parameters) | set(graph.statistics)
        constants = {
            name: numpy_helper.to_array(t) for name, t in graph.tensors.items() if name not in fixed and _small(t)
        }
        last_use: dict[str, int] = {}
        for index, node in enumerate(graph.model.graph.node):
            for name in node.input:
                last_use[name] = index
        kept = set(self.output_names) | set(graph.tensors)
        calls = []
        for index, proto in enumerate(graph.model.graph.node):
            if proto.op_type == "Constant":
                continue
            node = Node(
                proto.op_type,
                proto.name,
                tuple(proto.input),
                tuple(proto.output),
                {a.name: _attribute(a) for a in proto.attribute},
                graph.opset,
                constants,
                self._mode,
            )
            release = {name for name in proto.input if name and last_use[name] == index and name not in kept}
            try:
                operator = OPERATORS[proto.op_type](node)
            except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
                raise node.refuse(f"its attributes or inputs do not fit: {error}") from error
            calls.append(_Call(node, operator, tuple(release)))
        return calls

    def adapt(self, weight: str, down: Tensor, up: Tensor, scale: float) -> None:
        """Lets `weight` act as weight + scale * up @ down, with two trained factors beside it."""
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
