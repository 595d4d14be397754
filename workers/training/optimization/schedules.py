"""The learning rate as a pure function of the step, and for `plateau` of the losses seen before it.

`step`, `exponential`, `one_cycle` and `plateau` follow the formulas of torch's StepLR, ExponentialLR, OneCycleLR and
ReduceLROnPlateau, with one step of the schedule for each update.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from device_operations.requests.schedules import (
    ConstantSchedule,
    ExponentialSchedule,
    FallingSchedule,
    OneCycleSchedule,
    PlateauSchedule,
    Schedule,
    StepSchedule,
)
from device_operations.wire.json_types import JsonObject


@dataclass(slots=True)
class Observed:
    """What a plateau schedule has seen: part of a session's state, and of its checkpoints.

    `total` is the sum of the weighted losses of the observation that is not complete, `weight` that of their weights.
    """

    best: float | None = None
    bad: int = 0
    cooldown: int = 0
    reductions: int = 0
    total: float = 0.0
    weight: float = 0.0

    def as_json(self) -> JsonObject:
        """The fields, as a checkpoint keeps them."""
        return asdict(self)


def learning_rate_at(schedule: Schedule, peak: float, step: int, observed: Observed | None = None) -> float:
    """The learning rate of the update that follows `step` updates (0 for the first).

    With a warm-up, the first of `warmup_steps` takes a `1 / warmup_steps` share of `peak`, the last of them `peak`.
    """
    if isinstance(schedule, ConstantSchedule | FallingSchedule):
        return _warmed_up(schedule, peak, step)
    if isinstance(schedule, StepSchedule):
        return float(peak * schedule.gamma ** (step // schedule.step_size))
    if isinstance(schedule, ExponentialSchedule):
        return float(peak * schedule.gamma**step)
    if isinstance(schedule, OneCycleSchedule):
        return _one_cycle(schedule, peak, min(step, schedule.total_steps - 1))
    return _reduced(schedule, peak, 0 if observed is None else observed.reductions)


def add_loss(observed: Observed, loss: float, weight: float = 1.0) -> None:
    """Takes a loss into the observation that is not complete yet."""
    observed.total += loss * weight
    observed.weight += weight


def observe(schedule: PlateauSchedule, observed: Observed) -> None:
    """Completes an observation: counts it as torch's ReduceLROnPlateau.step counts a metric."""
    if not observed.weight:
        return
    value = observed.total / observed.weight
    observed.total = observed.weight = 0.0
    if observed.best is None or _is_better(schedule, value, observed.best):
        observed.best, observed.bad = value, 0
    else:
        observed.bad += 1
    if observed.cooldown > 0:
        observed.cooldown -= 1
        observed.bad = 0
    if observed.bad > schedule.patience:
        observed.reductions += 1
        observed.cooldown, observed.bad = schedule.cooldown, 0


def _warmed_up(schedule: ConstantSchedule | FallingSchedule, peak: float, step: int) -> float:
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.total_steps is None:
        return peak
    done = min(1.0, (step - schedule.warmup_steps) / (schedule.total_steps - schedule.warmup_steps))
    share = (1 + math.cos(math.pi * done)) / 2 if schedule.type == "cosine" else 1 - done
    return schedule.min_learning_rate + (peak - schedule.min_learning_rate) * share


def _one_cycle(schedule: OneCycleSchedule, peak: float, step: int) -> float:
    start = peak / schedule.div_factor
    lowest = start / schedule.final_div_factor
    top, end = schedule.pct_start * schedule.total_steps - 1, schedule.total_steps - 1
    if step <= top:
        return _anneal(schedule, start, peak, step / top if top else 1.0)
    return _anneal(schedule, peak, lowest, (step - top) / (end - top))


def _anneal(schedule: OneCycleSchedule, start: float, end: float, share: float) -> float:
    if schedule.anneal_strategy == "linear":
        return (end - start) * share + start
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)


def _reduced(schedule: PlateauSchedule, peak: float, reductions: int) -> float:
    rate = peak
    for _ in range(reductions):
        lower = max(rate * schedule.factor, schedule.min_lr)
        if rate - lower <= schedule.eps:
            break
        rate = lower
    return rate


def _is_better(schedule: PlateauSchedule, value: float, best: float) -> bool:
    if schedule.threshold_mode == "rel":
        return value < best * (1.0 - schedule.threshold)
    return value < best - schedule.threshold
