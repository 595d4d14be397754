"""The losses, and the check of targets against a model's output before torch sees them.

| loss | output | targets |
|---|---|---|
| mse, l1, smooth_l1 | any shape | the same shape, floats |
| bce_with_logits | any shape, logits | the same shape, floats from 0 to 1 |
| cross_entropy | (batch, classes, …), logits | class numbers (batch, …), or shares of the output's shape, from 0 to 1 |
| nll | (batch, classes, …), logarithms | class numbers (batch, …) |

Each is the mean over its elements, as torch takes it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from device_operations.errors import failure
from device_operations.requests.training import Loss
from workers.training.ports import Array, as_tensor, name_of

LOSSES: dict[Loss, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "nll": F.nll_loss,
}


def take_targets(loss: Loss, output: Tensor, given: Array, *, check_values: bool = True) -> Tensor:
    """The targets, as `loss` takes them beside an output of the shape and dtype of `output`.

    `output` may lie on the meta device: its elements are not read. Raises `input_mismatch`.
    """
    targets = as_tensor(given, "targets")
    classes = loss in ("cross_entropy", "nll") and not targets.is_floating_point()
    if loss == "nll" and not classes:
        raise failure("input_mismatch", f"targets: nll takes class numbers, but {name_of(targets.dtype)} was given")
    if classes and targets.dtype == torch.bool:
        raise failure("input_mismatch", f"targets: {loss} takes class numbers, but bool was given")
    if not classes and targets.dtype != output.dtype:
        wanted = "class numbers or " if loss == "cross_entropy" else ""
        raise failure(
            "input_mismatch",
            f"targets: {loss} takes {wanted}{name_of(output.dtype)} here, but {name_of(targets.dtype)} was given",
        )
    shape = list(output.shape)
    if loss in ("cross_entropy", "nll") and len(shape) < 2:
        raise failure(
            "input_mismatch", f"{loss} needs an output of shape (batch, classes, …), but the model's is {shape}"
        )
    wanted_shape = [shape[0], *shape[2:]] if classes else shape
    if list(targets.shape) != wanted_shape:
        raise failure(
            "input_mismatch",
            f"targets: {loss} beside an output of shape {shape} takes shape {wanted_shape}, "
            f"but {list(targets.shape)} was given",
        )
    targets = targets.to(torch.int64) if classes else targets
    if check_values:
        check_target_values(loss, targets, shape[1] if len(shape) > 1 else 0)
    return targets


def check_target_values(loss: Loss, targets: Tensor, classes: int) -> None:
    """Refuses class numbers that are no class, and shares outside 0 to 1, on which torch aborts or trains wrongly."""
    if targets.numel() == 0:
        return
    if not targets.is_floating_point() and loss in ("cross_entropy", "nll"):
        low, high = (int(bound) for bound in torch.aminmax(targets))
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise failure("input_mismatch", f"targets: {wrong} is none of the {classes} classes, 0 to {classes - 1}")
    elif loss in ("bce_with_logits", "cross_entropy"):
        least, most = (float(bound) for bound in torch.aminmax(targets))
        if not (least >= 0 and most <= 1):
            raise failure(
                "input_mismatch", f"targets: {loss} takes shares from 0 to 1, but they go from {least:g} to {most:g}"
            )


def count_correct(loss: Loss, output: Tensor, targets: Tensor) -> tuple[int | None, int]:
    """(how many elements are classified rightly, of how many); (None, 0) for losses that do not classify."""
    if loss in ("cross_entropy", "nll"):
        wanted = targets.argmax(dim=1) if targets.is_floating_point() else targets
        return int((output.argmax(dim=1) == wanted).sum()), wanted.numel()
    if loss == "bce_with_logits":
        return int(((output > 0) == (targets > 0.5)).sum()), targets.numel()
    return None, 0
