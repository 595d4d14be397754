"""Mixed precision: torch's autocast for the model, and a scale of the loss so that small gradients survive float16.

The rules of the scale are those of torch's GradScaler with its defaults. The scale is part of a session's state and of
its checkpoints. As it is a power of two, gradients that are scaled back are exact wherever float16 had room for them.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from device_operations.errors import failure
from device_operations.requests.training import Precision
from device_operations.wire.json_types import JsonObject

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

#: NVIDIA's compute capability from which on bfloat16 is computed by the hardware.
_BFLOAT16_CAPABILITY = 8

#: torch's GradScaler: by what the scale grows after so many updates in a row, and shrinks after an overflow.
GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0, 0.5, 2000


@dataclass(slots=True)
class LossScale:
    """What the loss is multiplied by before the backward pass, and how many updates it has stood for."""

    scale: float = 65536.0
    updates: int = 0

    def grow(self) -> None:
        """An update was made with finite gradients."""
        self.updates += 1
        if self.updates == GROWTH_INTERVAL:
            self.scale, self.updates = self.scale * GROWTH, 0

    def back_off(self) -> None:
        """The gradients overflowed."""
        self.scale, self.updates = self.scale * BACKOFF, 0

    def as_json(self) -> JsonObject:
        """The fields, as a checkpoint keeps them."""
        return asdict(self)


class Autocast:
    """The context that a session's forward passes run in."""

    def __init__(self, precision: Precision, device: torch.device) -> None:
        """Raises `dtype_unsupported` where the device has no such arithmetic."""
        self._device = device
        self._dtype = _DTYPES.get(precision)
        if self._dtype is not None:
            _check(precision, device)

    def __call__(self) -> contextlib.AbstractContextManager[object]:
        """A context for one forward pass."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def widened(self, outputs: list[Tensor]) -> list[Tensor]:
        """The outputs as the loss takes them: in float32, as autocast computes losses."""
        if self._dtype is None:
            return outputs
        return [output.float() if output.dtype == self._dtype else output for output in outputs]


def _check(precision: Precision, device: torch.device) -> None:
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise failure(
            "dtype_unsupported",
            f"precision {precision} needs torch's autocast, which there is on CUDA and the CPU, not on {device.type}; "
            "leave precision out",
        )
    if precision == "bfloat16" and torch.cuda.get_device_capability(device)[0] < _BFLOAT16_CAPABILITY:
        raise failure(
            "dtype_unsupported",
            f"{torch.cuda.get_device_name(device)} has no bfloat16; train with precision float16 or float32",
        )
