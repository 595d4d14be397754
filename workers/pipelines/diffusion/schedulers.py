"""diffusers' schedulers by the names that requests use, and the one that a pipeline's configuration names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging

from device_operations.errors import failure

logging.set_verbosity_error()  # of options that one scheduler has and another has not

#: The name: the class, and what it is made with besides the configuration.
NAMED: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m_karras": (
        DPMSolverMultistepScheduler,
        {"use_karras_sigmas": True, "algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    "ddim": (DDIMScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
}

#: The classes that a configuration may name.
CLASSES: dict[str, type[Any]] = {scheduler.__name__: scheduler for scheduler, _ in NAMED.values()}

#: Steps of the training at most, of which a scheduler keeps a few numbers each.
MAX_TRAIN_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class Schedule:
    """A scheduler that is set to its steps; it is used for one image."""

    name: str
    scheduler: Any
    timesteps: list[torch.Tensor]

    def scaled(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The latents as the model takes them at that timestep."""
        made: torch.Tensor = self.scheduler.scale_model_input(latents, timestep)
        return made

    def step(
        self, predicted: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The latents after the step, and the image's latents as they are foreseen, if the scheduler says them."""
        more = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        made = self.scheduler.step(predicted, timestep, latents, **more)
        foreseen = getattr(made, "pred_original_sample", None)
        return made.prev_sample, foreseen if foreseen is not None else getattr(made, "denoised", None)


class Schedulers:
    """The schedulers that a pipeline's configuration makes. Timesteps and sigmas stay on the host."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises `model_invalid` where the configuration names no scheduler that is known, or does not make one."""
        self._config = {name: value for name, value in config.items() if not name.startswith("_")}
        named = config.get("_class_name", EulerDiscreteScheduler.__name__)
        if not isinstance(named, str) or named not in CLASSES:
            raise failure(
                "model_invalid",
                f"scheduler_config.json names the scheduler {str(named)[:80]!r}; there are {', '.join(CLASSES)}",
            )
        self._own = CLASSES[named]
        steps = self._config.get("num_train_timesteps", 1000)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_TRAIN_STEPS:
            raise failure(
                "model_invalid",
                f"scheduler_config.json: num_train_timesteps is {str(steps)[:50]}; 1 to {MAX_TRAIN_STEPS}",
            )
        self.train_steps = steps
        for name in ("trained_betas", "timesteps", "sigmas"):
            value = self._config.get(name)
            if value is not None and (not isinstance(value, list) or len(value) > MAX_TRAIN_STEPS):
                raise failure("model_invalid", f"scheduler_config.json: {name} is no list of up to {MAX_TRAIN_STEPS}")
        self._check_own()

    @property
    def is_distilled(self) -> bool:
        """Whether the configuration is one of a model that takes few steps and no guidance (LCM, turbo)."""
        trailing = self._config.get("timestep_spacing") == "trailing"
        return self._own is LCMScheduler or (self._own is EulerAncestralDiscreteScheduler and trailing)

    @property
    def own_name(self) -> str:
        """How the result of a run says the configuration's own scheduler: a request's name, or the class's."""
        for name, (scheduler, more) in NAMED.items():
            if scheduler is self._own and all(self._config.get(key) == value for key, value in more.items()):
                return name
        return self._own.__name__

    def schedule(self, name: str | None, steps: int, strength: float | None = None) -> Schedule:
        """A scheduler set to `steps`; with `strength` from 0 to 1 only that share of them, the last ones.

        Raises `validation_failed` where it takes no such number of steps.
        """
        if steps > self.train_steps:
            raise failure("validation_failed", f"steps is {steps}; this model's schedule has {self.train_steps}")
        try:
            scheduler = self._made(name)
            scheduler.set_timesteps(steps, device="cpu")
        except Exception as error:
            raise failure("validation_failed", f"{name or self.own_name} takes no {steps} steps: {error}") from error
        first = 0 if strength is None else max(steps - min(int(steps * strength), steps), 0)
        first *= getattr(scheduler, "order", 1)
        timesteps = list(scheduler.timesteps[first:])
        if not timesteps:
            raise failure("validation_failed", f"strength {strength} of {steps} steps leaves no step")
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return Schedule(name or self.own_name, scheduler, timesteps)

    def _made(self, name: str | None) -> Any:
        scheduler, more = (self._own, {}) if name is None else NAMED[name]
        return scheduler.from_config(dict(self._config), **more)

    def _check_own(self) -> None:
        """Raises `model_invalid` where the configuration does not make its own scheduler."""
        try:
            made = self._made(None)
            finite = bool(torch.isfinite(made.alphas_cumprod).all())
        except Exception as error:
            raise failure("model_invalid", f"scheduler_config.json makes no scheduler: {str(error)[:200]}") from error
        if not finite:
            raise failure("model_invalid", "scheduler_config.json: its betas are not finite")
