"""Sessions on the CPU for tests: short ways to describe one, feed it, and say whether two are equal to the bit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device_operations.requests.training import Initialize
from workers.training import checkpoints
from workers.training.model.definition import Sources
from workers.training.model.ports import Batch
from workers.training.outcomes import StepOptions
from workers.training.session import Limits, TrainingSession, build_session

CPU = torch.device("cpu")
LIMITS = Limits(memory_bytes=2**32, max_batch_size=32)

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"type": "sgd", "learning_rate": 0.05},
    "sgd-momentum": {"type": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "adam": {"type": "adam", "learning_rate": 0.01, "weight_decay": 0.02},
    "adamw": {"type": "adamw", "learning_rate": 0.01},
}

#: A classifier with everything that has state of its own: dropout, running statistics, several kinds of parameter.
LAYERS: list[dict[str, Any]] = [
    {"type": "linear", "name": "fc1", "in_features": 6, "out_features": 12},
    {"type": "batch_norm1d", "name": "norm", "num_features": 12},
    {"type": "relu"},
    {"type": "dropout", "p": 0.4},
    {
        "type": "residual",
        "name": "block",
        "layers": [{"type": "linear", "name": "mix", "in_features": 12, "out_features": 12}],
    },
    {"type": "linear", "name": "fc2", "in_features": 12, "out_features": 4},
]


def describe(**fields: Any) -> Initialize:
    """A request for the classifier above, with AdamW, changed by `fields`."""
    plain = {"model": {"kind": "layers", "layers": LAYERS}, "loss": "cross_entropy", "optimizer": OPTIMIZERS["adamw"]}
    return Initialize.model_validate(plain | fields)


def start(sources: Sources | None = None, limits: Limits = LIMITS, **fields: Any) -> TrainingSession:
    """A session of `describe(**fields)`."""
    return build_session(describe(**fields), sources or Sources(), CPU, limits)


def batch(number: int, size: int = 8) -> Batch:
    """A batch for the classifier above, the same for the same number."""
    random = np.random.RandomState(number)
    return Batch({"input": random.randn(size, 6).astype(np.float32)}, random.randint(0, 4, size))


def train(session: TrainingSession, steps: int, first: int = 1, **options: Any) -> list[float | None]:
    """Steps on batches `first`, `first` + 1, …; the losses."""
    outcomes = [session.perform(batch(n), StepOptions(**options), n) for n in range(first, first + steps)]
    return [outcome.loss for outcome in outcomes]


def digest(session: TrainingSession) -> str:
    """A hash of the whole state: equal for two sessions only if they are equal to the bit."""
    snapshot = session.snapshot()
    found = hashlib.sha256(repr(sorted(snapshot.state.items())).encode())
    for name in sorted(snapshot.tensors):
        found.update(name.encode() + bytes(checkpoints._bytes_of(snapshot.tensors[name])))
    return found.hexdigest()


def carried_over(session: TrainingSession, folder: Path, **fields: Any) -> TrainingSession:
    """A new session from a checkpoint file of `session`."""
    written = checkpoints.write(session.snapshot(), folder / f"{session.sequence}-{session.step}.safetensors")
    fresh = start(**fields)
    fresh.restore(checkpoints.read(written.path, written.sha256))
    return fresh
