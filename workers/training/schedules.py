"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from device_operations.requests.training import Schedule


def learning_rate_at(schedule: Schedule, peak: float, step: int) -> float:
    """The learning rate of the update that follows `step` updates (0 for the first).

    The first of `warmup_steps` takes a `1 / warmup_steps` share of `peak`, the last of them `peak` itself.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.total_steps is None:
        return peak
    done = min(1.0, (step - schedule.warmup_steps) / (schedule.total_steps - schedule.warmup_steps))
    share = (1 + math.cos(math.pi * done)) / 2 if schedule.type == "cosine" else 1 - done
    return schedule.min_learning_rate + (peak - schedule.min_learning_rate) * share
