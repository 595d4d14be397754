"""Optimizers by torch's names and arguments, as a request for a training session names them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from device_operations.requests.base import Request

LearningRate = Annotated[float, Field(ge=0, le=1e6, strict=True)]
Share = Annotated[float, Field(ge=0, lt=1, strict=True)]
NotNegative = Annotated[float, Field(ge=0, strict=True)]
Steps = Annotated[int, Field(ge=1, le=2**53, strict=True)]


class Sgd(Request):
    """torch.optim.SGD's arguments by their own names."""

    type: Literal["sgd"]
    learning_rate: LearningRate
    momentum: Share = 0.0
    dampening: NotNegative = 0.0
    weight_decay: NotNegative = 0.0
    nesterov: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Sgd:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs a momentum above 0 and no dampening")
        return self


class Adam(Request):
    """torch.optim.Adam's arguments by their own names; `weight_decay` adds to the gradient."""

    type: Literal["adam"]
    learning_rate: LearningRate
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, strict=True)] = 1e-8
    weight_decay: NotNegative = 0.0


class AdamW(Request):
    """torch.optim.AdamW's arguments by their own names; `weight_decay` shrinks the weights."""

    type: Literal["adamw"]
    learning_rate: LearningRate
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, strict=True)] = 1e-8
    weight_decay: NotNegative = 0.01


Optimizer = Annotated[Sgd | Adam | AdamW, Field(discriminator="type")]
