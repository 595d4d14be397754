"""One table of what a session may be made of, each with plain torch's counterpart: layers, losses, optimizers, schedules.

A case changes one thing about a small classifier; `build_*` give torch's own object for it, made by torch's names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.training.test_layers import EXAMPLES

LINEAR = [
    {"type": "linear", "in_features": 6, "out_features": 9},
    {"type": "tanh"},
    {"type": "linear", "in_features": 9, "out_features": 4},
]


def classes(random: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return random.randint(0, shape[1], (shape[0], *shape[2:]))


def some_ignored(index: int) -> Callable[..., np.ndarray[Any, Any]]:
    def draw(random: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        chosen = classes(random, shape)
        chosen[random.rand(*chosen.shape) < 0.3] = index
        return chosen

    return draw


def small(dtype: str) -> Callable[..., np.ndarray[Any, Any]]:
    return lambda random, shape: classes(random, shape).astype(dtype)


def normal(random: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return random.randn(*shape).astype(np.float32)


def shares(random: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    drawn = random.rand(*shape).astype(np.float32)
    return drawn / drawn.sum(1, keepdims=True)


def bits(dtype: str) -> Callable[..., np.ndarray[Any, Any]]:
    return lambda random, shape: random.randint(0, 2, shape).astype(dtype)


@dataclass(frozen=True)
class Case:
    """What a request says, and how targets for an output of some shape are drawn."""

    layers: list[dict[str, Any]] = field(default_factory=lambda: LINEAR)
    sample: tuple[int, ...] = (6,)
    loss: Any = "cross_entropy"
    targets: Callable[[np.random.RandomState, tuple[int, ...]], np.ndarray[Any, Any]] = classes
    optimizer: dict[str, Any] = field(default_factory=lambda: {"type": "sgd", "learning_rate": 0.1})
    schedule: dict[str, Any] | None = None
    precision: str = "float32"
    grad_accumulation: int = 1


def _layer_case(kind: str) -> Case:
    arguments, shape = EXAMPLES.get(kind, ({}, (6,)))
    # What is drawn at random is drawn by other rules here: p 0 leaves the layer and takes the chance.
    arguments = {**arguments, "p": 0.0} if "dropout" in kind else arguments
    before = [] if kind == "embedding" else [{"type": "layer_norm", "normalized_shape": [shape[-1]]}]
    return Case([*before, {"type": kind, **arguments}], shape, loss="mse", targets=normal)


W4, POSITIVE = [0.2, 1.0, 3.0, 0.5], [1.0, 4.0, 0.5, 2.0]

LOSSES: dict[str, Case] = {
    "cross_entropy": Case(),
    "cross_entropy of shares": Case(targets=shares),
    "cross_entropy of int32": Case(targets=small("int32")),
    "cross_entropy of uint8": Case(targets=small("uint8")),
    "cross_entropy, torch's ignored class": Case(loss={"type": "cross_entropy"}, targets=some_ignored(-100)),
    "cross_entropy, a class ignored": Case(
        loss={"type": "cross_entropy", "ignore_index": 2, "weight": W4}, targets=some_ignored(2)
    ),
    "cross_entropy smoothed": Case(
        loss={"type": "cross_entropy", "label_smoothing": 0.2, "weight": W4, "ignore_index": -1},
        targets=some_ignored(-1),
    ),
    "cross_entropy of weighted shares": Case(
        loss={"type": "cross_entropy", "label_smoothing": 0.1, "weight": W4}, targets=shares
    ),
    "cross_entropy of pixels": Case(
        [{"type": "conv2d", "in_channels": 2, "out_channels": 4, "kernel_size": 3, "padding": 1}],
        (2, 5, 5),
        loss={"type": "cross_entropy", "ignore_index": 255, "weight": W4},
        targets=some_ignored(255),
    ),
    "nll": Case([*LINEAR, {"type": "log_softmax", "dim": 1}], loss="nll", targets=small("int16")),
    "nll weighted": Case(
        [*LINEAR, {"type": "log_softmax", "dim": 1}],
        loss={"type": "nll", "weight": W4, "ignore_index": -7},
        targets=some_ignored(-7),
    ),
    "bce_with_logits": Case(loss="bce_with_logits", targets=bits("float32")),
    "bce_with_logits of int64": Case(loss="bce_with_logits", targets=bits("int64")),
    "bce_with_logits of bool": Case(loss="bce_with_logits", targets=bits("bool")),
    "bce_with_logits weighted": Case(
        loss={"type": "bce_with_logits", "pos_weight": POSITIVE, "weight": W4}, targets=bits("float32")
    ),
    "bce_with_logits, one weight": Case(loss={"type": "bce_with_logits", "pos_weight": [3.0]}, targets=bits("uint8")),
    "mse": Case(loss="mse", targets=normal),
    "mse of int64": Case(loss={"type": "mse"}, targets=bits("int64")),
    "l1": Case(loss="l1", targets=normal),
    "l1 of bool": Case(loss={"type": "l1"}, targets=bits("bool")),
    "smooth_l1": Case(loss="smooth_l1", targets=normal),
    "smooth_l1 of beta": Case(loss={"type": "smooth_l1", "beta": 0.3}, targets=normal),
    "smooth_l1 of beta 0": Case(loss={"type": "smooth_l1", "beta": 0.0}, targets=normal),
}

OPTIMIZERS: dict[str, Case] = {
    name: Case(optimizer={"type": name.partition(" ")[0], **arguments})
    for name, arguments in {
        "sgd": {"learning_rate": 0.1},
        "sgd with momentum": {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01},
        "sgd dampened": {"learning_rate": 0.05, "momentum": 0.8, "dampening": 0.3},
        "sgd of nesterov": {"learning_rate": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
        "adam": {"learning_rate": 0.01},
        "adam decayed": {"learning_rate": 0.01, "weight_decay": 0.02, "betas": [0.8, 0.95], "eps": 1e-6},
        "adamw": {"learning_rate": 0.01},
        "adamw decayed": {"learning_rate": 0.02, "weight_decay": 0.2},
    }.items()
}

SCHEDULES: dict[str, Case] = {
    f"schedule {number} {schedule['type']}": Case(schedule=schedule)
    for number, schedule in enumerate(
        [
            {"type": "step", "step_size": 3},
            {"type": "step", "step_size": 1, "gamma": 0.5},
            {"type": "exponential", "gamma": 0.93},
            {"type": "one_cycle", "total_steps": 20},
            {"type": "one_cycle", "total_steps": 31, "pct_start": 0.45, "anneal_strategy": "linear"},
            {"type": "one_cycle", "total_steps": 24, "pct_start": 0.0, "div_factor": 5.0, "final_div_factor": 7.0},
            {"type": "one_cycle", "total_steps": 21, "pct_start": 1.0},
            {"type": "plateau", "patience": 1, "factor": 0.5},
            {"type": "plateau", "patience": 0, "factor": 0.3, "cooldown": 2, "min_lr": 0.004},
            {"type": "plateau", "patience": 1, "threshold": 0.05, "threshold_mode": "abs", "eps": 0.02},
        ]
    )
}

MIXED: dict[str, Case] = {
    "bfloat16": Case(precision="bfloat16"),
    "float16": Case(precision="float16", optimizer={"type": "adam", "learning_rate": 0.01}),
    "gradients of 3 batches": Case(grad_accumulation=3, optimizer={"type": "adamw", "learning_rate": 0.01}),
    "float16, gradients of 2 batches": Case(precision="float16", grad_accumulation=2),
}

LAYER_CASES: dict[str, Case] = {f"layer {kind}": _layer_case(kind) for kind in EXAMPLES}

CASES: dict[str, Case] = {**LOSSES, **OPTIMIZERS, **SCHEDULES, **MIXED, **LAYER_CASES}


# ---- torch's own


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class _Parallel(nn.Module):
    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class _Cells(nn.Module):
    def __init__(self, kind: Any, last: bool, **arguments: Any) -> None:
        super().__init__()
        self.cells, self.last = kind(batch_first=True, **arguments), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.cells(x)[0]
        return y[:, -1] if self.last else y


class _Attention(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(batch_first=True, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def _build_layer(layer: dict[str, Any]) -> nn.Module:
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in layer.items()}
    kind, inner = arguments.pop("type"), list(arguments.pop("layers", []))
    if inner:
        built = [_build_layer(one) for one in inner]
        if kind == "parallel":
            return _Parallel(built)
        return nn.Sequential(*built) if kind == "sequential" else _Residual(nn.Sequential(*built))
    if kind in ("lstm", "gru"):
        return _Cells(getattr(nn, kind.upper()), arguments.pop("output", "sequence") == "last", **arguments)
    if kind == "multihead_attention":
        return _Attention(**arguments)
    by_name = {name.lower(): getattr(nn, name) for name in dir(nn)}
    made: nn.Module = by_name[kind.replace("_", "")](**arguments)
    return made


def build_network(case: Case) -> nn.Module:
    """The case's layers, as torch's own classes."""
    return nn.Sequential(*(_build_layer(layer) for layer in case.layers))


def build_loss(case: Case) -> nn.Module:
    """The case's loss, as torch's own class."""
    form = {"type": case.loss} if isinstance(case.loss, str) else dict(case.loss)
    kind = {
        "mse": nn.MSELoss, "l1": nn.L1Loss, "smooth_l1": nn.SmoothL1Loss, "cross_entropy": nn.CrossEntropyLoss,
        "nll": nn.NLLLoss, "bce_with_logits": nn.BCEWithLogitsLoss,
    }[form.pop("type")]  # fmt: skip
    made: nn.Module = kind(
        **{name: torch.tensor(value) if isinstance(value, list) else value for name, value in form.items()}
    )
    return made


def build_optimizer(case: Case, network: nn.Module) -> torch.optim.Optimizer:
    """The case's optimizer, as torch's own class."""
    arguments = {name: value for name, value in case.optimizer.items() if name not in ("type", "learning_rate")}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[case.optimizer["type"]]
    return kind(network.parameters(), lr=case.optimizer["learning_rate"], **arguments)


def build_schedule(case: Case, optimizer: torch.optim.Optimizer) -> Any:
    """The case's schedule, as torch's own class; None where the rate stays."""
    if case.schedule is None:
        return None
    arguments = {name: value for name, value in case.schedule.items() if name != "type"}
    kinds = torch.optim.lr_scheduler
    if case.schedule["type"] == "one_cycle":
        rate = case.optimizer["learning_rate"]
        return kinds.OneCycleLR(optimizer, max_lr=rate, cycle_momentum=False, **arguments)
    kind = {"step": kinds.StepLR, "exponential": kinds.ExponentialLR, "plateau": kinds.ReduceLROnPlateau}
    return kind[case.schedule["type"]](optimizer, **arguments)
