"""One node of an ONNX graph as an operator sees it: attributes, opset, and which of its inputs are constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from device_operations.errors import OperationError, failure
from workers.devices.arrays import Array as HostArray

#: What a built operator is: tensors in (None where an optional input is left out), one tensor or several out.
Operator = Callable[..., "Tensor | Sequence[Tensor]"]


@dataclass
class Mode:
    """Whether the graph is being trained: one for all operators of a module, which do not know the module itself.

    `frozen` keeps batch normalization at its running statistics even then.
    """

    training: bool = True
    frozen: bool = False


@dataclass(frozen=True)
class OnnxNode:
    """A node's description. `constants` holds inputs that are the same in every run, parameters not among them."""

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    opset: int
    constants: Mapping[str, HostArray]
    mode: Mode

    def attribute(self, name: str, default: Any = None) -> Any:
        """The attribute's value, text decoded; `default` where the node does not say."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, index: int) -> bool:
        """Whether the input at `index` is given."""
        return len(self.inputs) > index and bool(self.inputs[index])

    def constant(self, index: int) -> HostArray | None:
        """The constant at `index`; None where the input is left out. Refused where it is computed in the graph."""
        if not self.has(index):
            return None
        value = self.constants.get(self.inputs[index])
        if value is None:
            raise self.refuse(f"its input {self.inputs[index]!r} is not a constant")
        return value

    def integers(self, index: int, attribute: str, since: int) -> list[int] | None:
        """Integers that are an attribute before opset `since` and a constant input from then on."""
        if self.opset < since:
            value = self.attribute(attribute)
            return None if value is None else [int(number) for number in value]
        constant = self.constant(index)
        return None if constant is None else [int(number) for number in constant.reshape(-1)]

    def refuse(self, why: str) -> OperationError:
        """The failure that names this node."""
        return failure(
            "model_invalid",
            f"ONNX operator {self.op_type} (node {self.name!r}) cannot be trained here: {why}",
            detail={"operator": self.op_type, "node": self.name},
        )


def aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on one device: host integers follow what is on the accelerator."""
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    if device is None:
        return tensors
    return tuple(tensor if tensor.device == device else tensor.to(device) for tensor in tensors)


def host_integers(tensor: Tensor) -> list[int]:
    """The elements of a shape computed in the graph. It is on the host already unless it came from a model input."""
    return [int(number) for number in tensor.reshape(-1).tolist()]


#: torch's dtype for each of ONNX's that training knows.
DTYPES: dict[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
