"""How the learning rate goes on with the steps: the schedules that a request for a training session may name.

`step`, `exponential`, `one_cycle` and `plateau` are torch's StepLR, ExponentialLR, OneCycleLR and ReduceLROnPlateau
with torch's arguments. Each update of the parameters is one step of the schedule.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from device_operations.requests.base import Request
from device_operations.requests.optimizers import LearningRate, NotNegative, Steps

WarmupSteps = Annotated[int, Field(ge=0, le=2**53, strict=True)]
Factor = Annotated[float, Field(gt=0, le=1, strict=True)]


class ConstantSchedule(Request):
    """`warmup_steps` climb linearly to the optimizer's `learning_rate`, which then stays.

    The other two fields are those of its siblings, refused by name.
    """

    type: Literal["constant"] = "constant"
    warmup_steps: WarmupSteps = 0
    total_steps: Steps | None = None
    min_learning_rate: LearningRate = 0.0

    @model_validator(mode="after")
    def _has_no_end(self) -> ConstantSchedule:
        if self.total_steps is not None or self.min_learning_rate:
            raise ValueError("total_steps and min_learning_rate go with type cosine or linear")
        return self


class FallingSchedule(Request):
    """`warmup_steps` climb linearly to the optimizer's `learning_rate`.

    Then `cosine` and `linear` fall to `min_learning_rate` at `total_steps` (warm-up included) and stay there.
    """

    type: Literal["cosine", "linear"]
    warmup_steps: WarmupSteps = 0
    total_steps: Steps | None = None
    min_learning_rate: LearningRate = 0.0

    @model_validator(mode="after")
    def _end_is_known(self) -> FallingSchedule:
        if self.total_steps is None or self.total_steps <= self.warmup_steps:
            raise ValueError(f"a {self.type} schedule needs total_steps above warmup_steps")
        return self


class StepSchedule(Request):
    """torch's StepLR: the rate is multiplied by `gamma` after every `step_size` updates."""

    type: Literal["step"]
    step_size: Steps
    gamma: Factor = 0.1


class ExponentialSchedule(Request):
    """torch's ExponentialLR: the rate is multiplied by `gamma` after every update."""

    type: Literal["exponential"]
    gamma: Factor


class OneCycleSchedule(Request):
    """torch's OneCycleLR, its highest rate the optimizer's `learning_rate`; the momentum stays as it is."""

    type: Literal["one_cycle"]
    total_steps: Steps
    pct_start: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: Annotated[float, Field(gt=0, strict=True)] = 25.0
    final_div_factor: Annotated[float, Field(gt=0, strict=True)] = 1e4


class PlateauSchedule(Request):
    """torch's ReduceLROnPlateau: the rate falls once the loss has not fallen for longer than `patience` observations.

    With `metric` `train` an observation is the mean loss of `every_steps` updates; with `evaluate` it is the loss of
    each evaluation that has a sequence number.
    """

    type: Literal["plateau"]
    metric: Literal["train", "evaluate"] = "train"
    every_steps: Steps = 1
    factor: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.1
    patience: WarmupSteps = 10
    threshold: NotNegative = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: WarmupSteps = 0
    min_lr: LearningRate = 0.0
    eps: NotNegative = 1e-8

    @model_validator(mode="after")
    def _windows_are_of_updates(self) -> PlateauSchedule:
        if self.metric == "evaluate" and self.every_steps != 1:
            raise ValueError("every_steps goes with metric train")
        return self


def _kind_of(value: object) -> str | None:
    kind = value.get("type", "constant") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


Schedule = Annotated[
    Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[FallingSchedule, Tag("cosine")]
    | Annotated[FallingSchedule, Tag("linear")]
    | Annotated[StepSchedule, Tag("step")]
    | Annotated[ExponentialSchedule, Tag("exponential")]
    | Annotated[OneCycleSchedule, Tag("one_cycle")]
    | Annotated[PlateauSchedule, Tag("plateau")],
    Discriminator(
        _kind_of,
        custom_error_type="schedule",
        custom_error_message="the type of a schedule is 'constant', 'cosine', 'linear', 'step', 'exponential', "
        "'one_cycle' or 'plateau'",
    ),
]
