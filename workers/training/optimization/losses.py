"""The losses, and the check of targets against a model's output before torch sees them.

| loss | output | targets |
|---|---|---|
| mse, l1, smooth_l1 | any shape | the same shape |
| bce_with_logits | any shape, logits | the same shape, from 0 to 1 |
| cross_entropy | (batch, classes, …), logits | class numbers (batch, …), or shares of the output's shape, from 0 to 1 |
| nll | (batch, classes, …), logarithms | class numbers (batch, …) |

Each is the mean over its elements, as torch takes it: with class weights the weighted mean, without the elements whose
class is `ignore_index`. Class numbers may have any integer dtype; other targets are floats of the output's dtype, or
integers or booleans, which are converted to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from device_operations.errors import failure
from device_operations.requests.losses import (
    BceWithLogitsLoss,
    CrossEntropyLoss,
    Loss,
    NllLoss,
    SmoothL1Loss,
    form_of,
)
from workers.training.model.ports import Array, as_tensor, name_of

#: Losses of classes: their targets are class numbers.
_CLASSIFYING = ("cross_entropy", "nll")


class LossFunction:
    """A request's loss: what it makes of outputs and targets, and which targets it takes."""

    def __init__(self, loss: Loss) -> None:
        form = form_of(loss)
        self.name = form.type
        # A plain name passes over no class, so that a class number below 0 is not lost unseen.
        ignoring = isinstance(form, CrossEntropyLoss | NllLoss) and not isinstance(loss, str)
        self._ignored: int | None = getattr(form, "ignore_index", None) if ignoring else None
        self._weights: dict[str, Tensor] = {}
        for name in ("weight", "pos_weight"):
            given = getattr(form, name, None)
            if given is not None:
                self._weights[name] = torch.tensor(given, dtype=torch.float32)
        self._compute = self._computation(form)

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, a scalar, of targets that `take_targets` gave."""
        return self._compute(output, targets)

    def take_targets(self, output: Tensor, given: Array, *, check_values: bool = True) -> Tensor:
        """The targets as the loss takes them with an output of the shape and dtype of `output`.

        `output` may lie on the meta device: its elements are not read. Raises `input_mismatch`.
        """
        shape, loss = list(output.shape), self.name
        targets = as_tensor(given, "targets")
        classes = self._are_classes(targets)
        if loss in _CLASSIFYING and len(shape) < 2:
            raise failure(
                "input_mismatch", f"{loss} needs an output of shape (batch, classes, …), but the model's is {shape}"
            )
        if classes:
            targets = targets.to(torch.int64)
        elif not targets.is_floating_point():
            targets = targets.to(output.dtype)
        if not classes and targets.dtype != output.dtype:
            wanted = "class numbers or " if loss == "cross_entropy" else ""
            raise failure(
                "input_mismatch",
                f"targets: {loss} takes {wanted}{name_of(output.dtype)} here, but {name_of(targets.dtype)} was given",
            )
        wanted_shape = [shape[0], *shape[2:]] if classes else shape
        if list(targets.shape) != wanted_shape:
            raise failure(
                "input_mismatch",
                f"targets: {loss} beside an output of shape {shape} takes shape {wanted_shape}, "
                f"but {list(targets.shape)} was given",
            )
        self._check_weights(shape)
        if check_values:
            self.check_values(targets, shape[1] if len(shape) > 1 else 0)
        return targets

    def check_values(self, targets: Tensor, classes: int) -> None:
        """Refuses class numbers that are no class, and shares outside 0 to 1: torch aborts or trains wrongly on them.

        `targets` may have the dtype that they were sent in.
        """
        if targets.numel() == 0 or targets.dtype == torch.bool:
            return
        if self._are_classes(targets):
            self._check_classes(targets.to(torch.int64), classes)
        elif self.name in ("bce_with_logits", "cross_entropy"):
            least, most = (float(bound) for bound in torch.aminmax(targets))
            if not (least >= 0 and most <= 1):
                raise failure(
                    "input_mismatch",
                    f"targets: {self.name} takes shares from 0 to 1, but they go from {least:g} to {most:g}",
                )

    def count_correct(self, output: Tensor, targets: Tensor) -> tuple[int | None, int]:
        """(how many elements are classified rightly, of how many); (None, 0) for losses that do not classify."""
        if self.name in _CLASSIFYING:
            if targets.is_floating_point():
                return int((output.argmax(dim=1) == targets.argmax(dim=1)).sum()), targets.argmax(dim=1).numel()
            counted = torch.ones_like(targets, dtype=torch.bool) if self._ignored is None else targets != self._ignored
            return int(((output.argmax(dim=1) == targets) & counted).sum()), int(counted.sum())
        if self.name == "bce_with_logits":
            return int(((output > 0) == (targets > 0.5)).sum()), targets.numel()
        return None, 0

    def _are_classes(self, targets: Tensor) -> bool:
        """Whether targets of this dtype are class numbers. Raises `input_mismatch` where they had to be."""
        if self.name not in _CLASSIFYING:
            return False
        floating = targets.is_floating_point()
        if targets.dtype == torch.bool or (floating and self.name == "nll"):
            dtype = name_of(targets.dtype)
            raise failure("input_mismatch", f"targets: {self.name} takes class numbers, but {dtype} was given")
        if floating and self._ignored is not None and self._ignored >= 0:
            raise failure(
                "input_mismatch", "targets: ignore_index goes with class numbers, but shares of the classes were given"
            )
        return not floating

    def _check_classes(self, targets: Tensor, classes: int) -> None:
        low, high = (int(bound) for bound in torch.aminmax(targets))
        if low >= 0 and high < classes:
            return
        # Only now is it worth a pass to leave out what is ignored.
        outside = (targets < 0) | (targets >= classes)
        wrong = targets[outside if self._ignored is None else outside & (targets != self._ignored)]
        if wrong.numel():
            ignored = "; a loss with ignore_index passes over one more" if self._ignored is None else ""
            raise failure(
                "input_mismatch",
                f"targets: {int(wrong[0])} is none of the {classes} classes, 0 to {classes - 1}{ignored}",
            )

    def _check_weights(self, shape: list[int]) -> None:
        classes = self.name in _CLASSIFYING
        wanted = shape[1] if classes else shape[-1] if shape else 1
        for name, weights in self._weights.items():
            if len(weights) != wanted and (classes or len(weights) != 1):
                per = "class" if classes else "place of the output's last axis"
                raise failure(
                    "input_mismatch",
                    f"the loss has {len(weights)} numbers in {name}, but the model's output of shape {shape} takes "
                    f"{wanted}: one for each {per}",
                )

    def _weight(self, name: str, output: Tensor) -> Tensor | None:
        weights = self._weights.get(name)
        if weights is None:
            return None
        if weights.device != output.device or weights.dtype != output.dtype:
            weights = self._weights[name] = weights.to(output.device, output.dtype)
        return weights

    def _computation(self, form: object) -> Callable[[Tensor, Tensor], Tensor]:
        if isinstance(form, CrossEntropyLoss):
            smoothing, ignored = form.label_smoothing, form.ignore_index
            return lambda output, targets: F.cross_entropy(
                output, targets, self._weight("weight", output), ignore_index=ignored, label_smoothing=smoothing
            )
        if isinstance(form, NllLoss):
            ignored = form.ignore_index
            return lambda output, targets: F.nll_loss(
                output, targets, self._weight("weight", output), ignore_index=ignored
            )
        if isinstance(form, BceWithLogitsLoss):
            return lambda output, targets: F.binary_cross_entropy_with_logits(
                output, targets, self._weight("weight", output), pos_weight=self._weight("pos_weight", output)
            )
        if isinstance(form, SmoothL1Loss):
            beta = form.beta
            return lambda output, targets: F.smooth_l1_loss(output, targets, beta=beta)
        return F.mse_loss if self.name == "mse" else F.l1_loss
