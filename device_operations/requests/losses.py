"""Losses by torch's names: the plain name, or an object with the arguments that torch's loss of that name takes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from device_operations.requests.base import Request

LossName = Literal["mse", "cross_entropy", "bce_with_logits", "l1", "smooth_l1", "nll"]

#: The class number that torch's losses pass over unless another is named.
IGNORE_INDEX = -100

ClassNumber = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
ClassWeights = Annotated[list[Annotated[float, Field(ge=0, strict=True)]], Field(min_length=1, max_length=10_000_000)]


class MseLoss(Request):
    """torch.nn.MSELoss."""

    type: Literal["mse"]


class L1Loss(Request):
    """torch.nn.L1Loss."""

    type: Literal["l1"]


class SmoothL1Loss(Request):
    """torch.nn.SmoothL1Loss."""

    type: Literal["smooth_l1"]
    beta: Annotated[float, Field(ge=0, strict=True)] = 1.0


class CrossEntropyLoss(Request):
    """torch.nn.CrossEntropyLoss; `weight` has a number for each class."""

    type: Literal["cross_entropy"]
    ignore_index: ClassNumber = IGNORE_INDEX
    weight: ClassWeights | None = None
    label_smoothing: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.0


class NllLoss(Request):
    """torch.nn.NLLLoss; `weight` has a number for each class."""

    type: Literal["nll"]
    ignore_index: ClassNumber = IGNORE_INDEX
    weight: ClassWeights | None = None


class BceWithLogitsLoss(Request):
    """torch.nn.BCEWithLogitsLoss; `weight` and `pos_weight` have a number for each place of the output's last axis."""

    type: Literal["bce_with_logits"]
    weight: ClassWeights | None = None
    pos_weight: ClassWeights | None = None


LossForm = MseLoss | L1Loss | SmoothL1Loss | CrossEntropyLoss | NllLoss | BceWithLogitsLoss


def _kind_of(value: object) -> str | None:
    if isinstance(value, str):
        return "name"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


Loss = Annotated[
    Annotated[LossName, Tag("name")]
    | Annotated[MseLoss, Tag("mse")]
    | Annotated[L1Loss, Tag("l1")]
    | Annotated[SmoothL1Loss, Tag("smooth_l1")]
    | Annotated[CrossEntropyLoss, Tag("cross_entropy")]
    | Annotated[NllLoss, Tag("nll")]
    | Annotated[BceWithLogitsLoss, Tag("bce_with_logits")],
    Discriminator(
        _kind_of,
        custom_error_type="loss",
        custom_error_message="a loss is 'mse', 'cross_entropy', 'bce_with_logits', 'l1', 'smooth_l1' or 'nll', or an "
        "object whose type is one of these",
    ),
]

_FORMS: dict[str, type[LossForm]] = {
    "mse": MseLoss, "l1": L1Loss, "smooth_l1": SmoothL1Loss, "cross_entropy": CrossEntropyLoss, "nll": NllLoss,
    "bce_with_logits": BceWithLogitsLoss,
}  # fmt: skip


def form_of(loss: LossName | LossForm) -> LossForm:
    """The object form of a loss; a plain name has torch's defaults."""
    return _FORMS[loss].model_validate({"type": loss}) if isinstance(loss, str) else loss
