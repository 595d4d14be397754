"""SGD, Adam and AdamW with torch's formulas, in operations that every backend runs on the device itself.

torch's own optimizers cannot serve all: on DirectML there are no `_foreach` kernels and no `lerp`, so stock Adam falls
back to the CPU at each step. Here one formula is written over lists of tensors; on cpu and cuda the lists go to the
`_foreach` kernels in one call, elsewhere tensor by tensor. State and its names are the same everywhere, so a checkpoint
is too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from device_operations.requests.optimizers import Adam, AdamW, Optimizer, Sgd

_List = list[Tensor]

#: Names of the state tensors that each type keeps for every parameter, as torch names them.
_SLOTS: dict[str, tuple[str, ...]] = {"adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq")}


def slots_of(spec: Optimizer) -> tuple[str, ...]:
    """The state tensors for each parameter: none for plain SGD."""
    if isinstance(spec, Sgd):
        return ("momentum_buffer",) if spec.momentum else ()
    return _SLOTS[spec.type]


class Lists:
    """Arithmetic on lists of tensors, in place: one `_foreach` call where the backend has it, else a loop.

    The functions are torch's `_foreach_*` without the prefix.
    """

    def __init__(self, device: torch.device) -> None:
        fused = device.type in ("cpu", "cuda")
        self.mul_: Callable[..., None] = torch._foreach_mul_ if fused else _loop("mul_")
        self.add_: Callable[..., None] = torch._foreach_add_ if fused else _loop("add_")
        self.div_: Callable[..., None] = torch._foreach_div_ if fused else _loop("div_")
        self.lerp_: Callable[..., None] = torch._foreach_lerp_ if fused else _blend
        self.sqrt_: Callable[..., None] = torch._foreach_sqrt_ if fused else _loop("sqrt_")
        self.copy_: Callable[..., None] = torch._foreach_copy_ if fused else _loop("copy_")
        self.addcmul_: Callable[..., None] = torch._foreach_addcmul_ if fused else _loop("addcmul_", "value")
        self.addcdiv_: Callable[..., None] = torch._foreach_addcdiv_ if fused else _loop("addcdiv_", "value")
        self.norm: Callable[..., Sequence[Tensor]] = torch._foreach_norm if fused else _norms


class Updater:
    """An optimizer over fixed lists of parameters; its state exists from the start, so its memory is known.

    `steps` counts the updates and is part of the state, as are the tensors of `state`: a list in the order of the
    parameters for each slot.
    """

    def __init__(self, spec: Optimizer, parameters: Sequence[Tensor], lists: Lists) -> None:
        self._spec, self._parameters, self._lists = spec, list(parameters), lists
        self.steps = 0
        self.state: dict[str, list[Tensor]] = {
            slot: [torch.zeros_like(parameter) for parameter in parameters] for slot in slots_of(spec)
        }

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor | None], learning_rate: float) -> None:
        """One update in place, from gradients in the order of the parameters; None for one that the loss does not use.

        The gradients are used up: their memory serves for the arithmetic.
        """
        self.steps += 1
        used = [index for index, gradient in enumerate(gradients) if gradient is not None]
        given = [gradient for gradient in gradients if gradient is not None]
        parameters, state = self._parameters, self.state
        if len(used) < len(parameters):
            # Parameters that the loss does not use stay as they are, decay included, as with torch's own.
            parameters = [parameters[index] for index in used]
            state = {slot: [tensors[index] for index in used] for slot, tensors in state.items()}
        if isinstance(self._spec, Sgd):
            self._sgd(self._spec, parameters, given, state, learning_rate)
        else:
            self._adam(self._spec, parameters, given, state, learning_rate)

    def tensors(self) -> Iterable[Tensor]:
        """All tensors of the state."""
        return (tensor for slot in self.state.values() for tensor in slot)

    def _sgd(
        self, spec: Sgd, parameters: _List, gradients: _List, state: dict[str, _List], learning_rate: float
    ) -> None:
        lists = self._lists
        if spec.weight_decay:
            lists.add_(gradients, parameters, alpha=spec.weight_decay)
        if spec.momentum:
            buffers = state["momentum_buffer"]
            if self.steps == 1:
                lists.copy_(buffers, gradients)
            else:
                lists.mul_(buffers, spec.momentum)
                lists.add_(buffers, gradients, alpha=1 - spec.dampening)
            if spec.nesterov:
                lists.add_(gradients, buffers, alpha=spec.momentum)
            else:
                gradients = buffers
        lists.add_(parameters, gradients, alpha=-learning_rate)

    def _adam(
        self, spec: Adam | AdamW, parameters: _List, gradients: _List, state: dict[str, _List], learning_rate: float
    ) -> None:
        lists, (beta1, beta2) = self._lists, spec.betas
        averages, squares = state["exp_avg"], state["exp_avg_sq"]
        if spec.weight_decay:
            if isinstance(spec, AdamW):
                lists.mul_(parameters, 1 - learning_rate * spec.weight_decay)
            else:
                lists.add_(gradients, parameters, alpha=spec.weight_decay)
        lists.lerp_(averages, gradients, 1 - beta1)
        lists.mul_(squares, beta2)
        lists.addcmul_(squares, gradients, gradients, 1 - beta2)
        # The gradients have done their part: their memory takes the denominator. The order is torch's to the bit: a
        # bias before a normalization has a gradient of rounding alone, which the division by its root makes visible.
        lists.copy_(gradients, squares)
        lists.sqrt_(gradients)
        lists.div_(gradients, math.sqrt(1 - beta2**self.steps))
        lists.add_(gradients, spec.eps)
        lists.addcdiv_(parameters, averages, gradients, -learning_rate / (1 - beta1**self.steps))


def _loop(name: str, third: str | None = None) -> Callable[..., None]:
    """torch's in-place method `name`, list by list; the last argument may be a number for all, passed as `third`."""

    def over(tensors: Sequence[Tensor], *others: object, **options: object) -> None:
        if third is not None and not isinstance(others[-1], Sequence):
            others, options = others[:-1], {**options, third: others[-1]}
        for index, tensor in enumerate(tensors):
            parts = [other[index] if isinstance(other, Sequence) else other for other in others]
            getattr(tensor, name)(*parts, **options)

    return over


def _blend(tensors: Sequence[Tensor], ends: Sequence[Tensor], share: float) -> None:
    """torch's lerp in two operations, for backends without it."""
    for tensor, end in zip(tensors, ends, strict=True):
        tensor.mul_(1 - share).add_(end, alpha=share)


def _norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.linalg.vector_norm(tensor) for tensor in tensors]
