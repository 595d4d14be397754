"""Which of a network's parameters a node of an exported graph reads, as torch's exporters let it be seen.

The newer exporter notes on each node the call that it came from, with the parameters by name. The tracing one names
nodes after the module that they belong to: `/layers.1/linear/MatMul`, with a number behind a module's second call.
"""

from __future__ import annotations

import re
from enum import Enum

import onnx

#: The newer exporter's notes: the call that a node came from, and what a computed constant was made of.
CALL, FOLDED_FROM = "pkg.torch.onnx.fx_node", "pkg.onnxscript.optimizer.folded_from"

#: A parameter or buffer among the arguments of a call.
_ARGUMENT = re.compile(r"%([pb]_\w+)")


class Origin(Enum):
    """What is known without a name: the tensor itself, nothing at all, or that a call reads no parameter."""

    OWN = "own"
    UNKNOWN = "unknown"
    NOTHING = "nothing"


OWN, UNKNOWN, NOTHING = Origin.OWN, Origin.UNKNOWN, Origin.NOTHING


class Origins:
    """The origins of what the nodes of one file read."""

    def __init__(self, model: onnx.ModelProto, names: set[str]) -> None:
        self._modules = {part for name in names for part in _ancestors(name)}
        self._traced = model.producer_name == "pytorch"
        self._made_from: dict[str, set[str]] = {}
        for value in (*model.graph.value_info, *model.graph.initializer):
            for entry in value.metadata_props:
                if entry.key == FOLDED_FROM:
                    named = {argument_of(part) for part in re.findall(r"'([^']*)'", entry.value)}
                    self._made_from.setdefault(value.name, set()).update(named)

    def of(self, tensor: str, node: onnx.NodeProto) -> object:
        """What `node` reads where it reads `tensor`: an `Origin`, or what names another parameter."""
        call = next((entry.value for entry in node.metadata_props if entry.key == CALL), None)
        if call is not None:
            arguments = frozenset(_ARGUMENT.findall(call))
            if not arguments:
                return NOTHING
            return OWN if arguments & {argument_of(tensor), *self._made_from.get(tensor, ())} else arguments
        if not self._traced or not node.name.startswith("/"):
            return UNKNOWN
        module = self._module(node.name)
        owner = tensor.rpartition(".")[0]
        if "::" in tensor or tensor.startswith("/"):
            return module  # computed by the exporter: its name says nothing
        # A module may read the parameters of those within it.
        return OWN if module in ("", owner) or owner.startswith(f"{module}.") else module

    def _module(self, node: str) -> str:
        parts: list[str] = []
        for part in node.split("/")[1:-1]:
            parts += part.split(".")
            if ".".join(parts) not in self._modules:
                parts[-1] = re.sub(r"_\d+$", "", parts[-1])
        return ".".join(parts)


def is_tie(one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    """Whether two modules that read one tensor are tied by it: an embedding and the product at the other end."""
    return (one.op_type == "Gather") != (other.op_type == "Gather")


def called_with(model: onnx.ModelProto) -> set[str]:
    """The parameters and buffers, as calls name them, that the nodes of the graph came from."""
    notes = [entry.value for node in model.graph.node for entry in node.metadata_props if entry.key == CALL]
    return {argument for note in notes for argument in _ARGUMENT.findall(note)}


def argument_of(name: str) -> str:
    """How a call names the parameter `name`."""
    return "p_" + re.sub(r"\W", "_", name)


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
