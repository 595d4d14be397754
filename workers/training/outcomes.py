"""What goes into a step and what comes out of it: frozen values, with nothing of torch's graph behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from device_operations.requests import training as requests
from device_operations.requests.training import Mode
from workers.training.dataset import BatchPlan


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How a step is made. `learning_rate` in place of the schedule's; `return_gradients` copies them to the host.

    `group` is how many batches one update is made of: each loss is divided by it. `quiet` leaves out the norms by name.
    """

    mode: Mode = "train"
    learning_rate: float | None = None
    gradient_clip_norm: float | None = None
    accumulate: bool = True
    return_gradients: bool = False
    group: int = 1
    quiet: bool = False

    @classmethod
    def of(cls, request: requests.Step) -> StepOptions:
        """The options that a request asks for."""
        return cls(
            request.mode,
            request.learning_rate,
            request.gradient_clip_norm,
            request.accumulate,
            request.form == "blob",
        )


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One applied step as the log keeps it, enough to apply it again; `steps_applied` of a dataset job cut short."""

    sequence: int
    options: StepOptions
    plan: BatchPlan | None = None
    steps_applied: int | None = None


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step did.

    `step` is the number of updates the parameters have had after it. `loss` is the batch's mean, None for `apply` and
    for a skipped batch. `gradient_norm` is that of the gradients before clipping: what `train` and `apply` step with,
    this batch's own in mode `gradients`. `correct` counts right answers of a classifying loss in mode `evaluate`, out
    of `elements`. `update_loss` is the mean loss of the batches that an update was made of, where a dataset's job makes
    one of several.
    """

    step: int
    mode: Mode
    loss: float | None = None
    gradient_norm: float | None = None
    learning_rate: float | None = None
    samples: int = 0
    skipped: bool = False
    correct: int | None = None
    elements: int = 0
    accumulated_batches: int = 0
    gradient_norms: Mapping[str, float] | None = None
    gradients: Mapping[str, Tensor] | None = None
    update_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """Several outcomes as one: the loss weighted by samples, the last norm and rate, the share of right answers."""

    step: int
    steps: int
    samples: int
    loss: float | None
    last_loss: float | None
    gradient_norm: float | None
    learning_rate: float | None
    accuracy: float | None
    skipped: int


def summarize(outcomes: Iterable[StepOutcome]) -> Summary:
    """The summary of one job's outcomes, at least one."""
    steps = list(outcomes)
    kept = [outcome for outcome in steps if outcome.loss is not None]
    weight = sum(outcome.samples for outcome in kept)
    loss = sum((outcome.loss or 0.0) * outcome.samples for outcome in kept) / weight if weight else None
    judged = [outcome for outcome in steps if outcome.correct is not None]
    elements = sum(outcome.elements for outcome in judged)
    return Summary(
        step=steps[-1].step,
        steps=len(steps),
        samples=sum(outcome.samples for outcome in steps),
        loss=loss,
        last_loss=kept[-1].loss if kept else None,
        gradient_norm=steps[-1].gradient_norm,
        learning_rate=steps[-1].learning_rate,
        accuracy=sum(outcome.correct or 0 for outcome in judged) / elements if elements else None,
        skipped=sum(outcome.skipped for outcome in steps),
    )
