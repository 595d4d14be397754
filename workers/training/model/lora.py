"""Low-rank adapters: a frozen matrix gets two narrow ones that are trained, and export adds their product to it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from device_operations.errors import failure
from device_operations.requests.training import Lora
from workers.training.model.selection import matching
from workers.training.onnx.module import OnnxModule
from workers.training.optimization.determinism import derive_seed

#: How the two factors of an adapter are named after the layer (or ONNX weight) they belong to.
DOWN, UP = ".lora_a", ".lora_b"


class LoraLinear(nn.Module):
    """A linear layer with an adapter: x @ weight.T + bias + scale * (x @ lora_a.T) @ lora_b.T."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.lora_a, self.lora_b = nn.Parameter(down), nn.Parameter(up)
        self._scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self._scale


def add_adapters(module: nn.Module, lora: Lora, seed: int) -> None:
    """Adds an adapter to each linear layer of `module` that `lora.targets` name; all of them where it names none.

    Raises `validation_failed` where the model has no linear layer or a target fits none.
    """
    shapes = _linear_shapes(module)
    if not shapes:
        raise failure("validation_failed", "lora needs linear layers, and the model has none")
    targets = matching(lora.targets, shapes, "the lora target") if lora.targets else set(shapes)
    for name in sorted(targets):
        down, up = _initial_factors(module, shapes[name], lora.rank, derive_seed(seed, "lora", name))
        if isinstance(module, OnnxModule):
            module.adapt(name, down, up, scale_of(lora))
        else:
            parent, _, child = name.rpartition(".")
            base = module.get_submodule(name)
            assert isinstance(base, nn.Linear)
            setattr(module.get_submodule(parent), child, LoraLinear(base, down, up, scale_of(lora)))


def scale_of(lora: Lora) -> float:
    """What the product of the factors is multiplied with: alpha / rank, 1 where alpha is not said."""
    return (lora.rank if lora.alpha is None else lora.alpha) / lora.rank


def is_adapter(parameter: str) -> bool:
    """Whether a parameter of this name is a factor of an adapter."""
    return parameter.endswith((DOWN, UP))


def merge_adapters(tensors: Mapping[str, Tensor], lora: Lora | None) -> dict[str, Tensor]:
    """The tensors of the model without adapters: each adapted weight plus its adapter's product."""
    merged = {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}
    for name in tensors:
        if lora is not None and name.endswith(DOWN):
            base = name.removesuffix(DOWN)
            weight = base if base in merged else f"{base}.weight"
            product = tensors[base + UP] @ tensors[base + DOWN]
            merged[weight] = merged[weight] + scale_of(lora) * product
    return merged


def _linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    if isinstance(module, OnnxModule):
        return module.linear_weights()
    # Exactly nn.Linear: attention reads the weight of its own subclass directly, past any adapter.
    linear = {name: child for name, child in module.named_modules() if type(child) is nn.Linear}
    return {name: (child.weight.shape[0], child.weight.shape[1]) for name, child in linear.items()}


def _initial_factors(module: nn.Module, shape: tuple[int, int], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """(rank, columns) uniform as torch starts a linear layer, (rows, rank) zero: at first the adapter adds nothing."""
    rows, columns = shape
    if next(module.parameters()).device.type == "meta":
        return torch.empty(rank, columns, device="meta"), torch.empty(rows, rank, device="meta")
    bound = 1 / math.sqrt(columns)
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(rank, columns).uniform_(-bound, bound, generator=generator), torch.zeros(rows, rank)
