"""What a model makes of inputs of given shapes, found out on the meta device: no memory, no arithmetic, no harm.

A batch that does not fit is refused here with the model's own reason, before the device sees it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from device_operations.errors import OperationError, failure
from workers.training.model.modes import set_mode

#: Shapes whose result is remembered.
_REMEMBERED = 256

_Key = tuple[bool, tuple[tuple[torch.Size, torch.dtype], ...]]


class ShapeTrial:
    """Runs batches through the model's module on the meta device, once for each combination of shapes and dtypes.

    What it finds out it keeps in `known`, with all others of the same network.
    """

    def __init__(
        self,
        module: nn.Module | None,
        known: OrderedDict[_Key, list[Tensor] | None],
        *,
        frozen_statistics: bool = False,
    ) -> None:
        self._module, self._frozen = module, frozen_statistics
        self._known = known
        #: Whether batches are known to fit, so that none is tried; `learn` then records what a real run gave.
        self.trusting = False

    def outputs(self, inputs: Sequence[Tensor], training: bool) -> list[Tensor] | None:
        """The outputs' shapes and dtypes, as meta tensors; None if only a real run shows them.

        Raises `input_mismatch` when the model cannot take these inputs.
        """
        if self._module is None:
            return None
        key = _key(inputs, training)
        if key not in self._known and not training:
            # Layers that take a batch in training take it in evaluation too, and give as much of it.
            key = _key(inputs, True) if _key(inputs, True) in self._known else key
        if key not in self._known:
            if self.trusting:
                return None
            self._remember(key, self._try(self._module, inputs, training))
        return self._known[key]

    def learn(self, inputs: Sequence[Tensor], training: bool, outputs: Sequence[Tensor]) -> None:
        """Remembers what a real run gave: batches of these shapes and dtypes need no trial any more."""
        if self._module is not None:
            self._remember(_key(inputs, training), [torch.empty_like(output, device="meta") for output in outputs])

    def _remember(self, key: _Key, outputs: list[Tensor] | None) -> None:
        self._known[key] = outputs
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _try(self, module: nn.Module, inputs: Sequence[Tensor], training: bool) -> list[Tensor] | None:
        set_mode(module, training=training, frozen_statistics=self._frozen)
        try:
            with torch.no_grad():
                return as_list(module(*(torch.empty_like(tensor, device="meta") for tensor in inputs)))
        except OperationError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            if "meta tensor" in str(error):  # a shape that depends on the inputs' elements
                return None
            shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs)
            place = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            reason = str(error).strip().splitlines()[0][:500]
            raise failure(
                "input_mismatch", f"the model cannot take inputs of shape {shapes}: {reason}{place}"
            ) from error


def _key(inputs: Sequence[Tensor], training: bool) -> _Key:
    return training, tuple((tensor.shape, tensor.dtype) for tensor in inputs)


@cache
def load_meta_kernels() -> None:
    """Lets torch import what its kernels without memory are made of, for about a second: not in a step, then."""
    nothing = torch.empty(1, 1, device="meta")
    nn.functional.linear(nothing, nothing, nothing[0])


def as_list(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A module's result as a list of its outputs."""
    return [result] if isinstance(result, Tensor) else list(result)
