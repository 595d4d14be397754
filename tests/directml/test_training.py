"""Training sessions on torch-directml: our own optimizers, step by step, checkpointed and resumed bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_operations.requests.training import Initialize
from workers.devices import Device

torch = pytest.importorskip("torch", reason="torch is not installed")

from workers.training import checkpoints  # noqa: E402 - these import torch themselves
from workers.training.model.definition import Sources  # noqa: E402
from workers.training.model.ports import Batch  # noqa: E402
from workers.training.outcomes import StepOptions  # noqa: E402
from workers.training.session import Limits, TrainingSession, build_session  # noqa: E402

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"type": "sgd", "learning_rate": 0.1},
    "momentum": {"type": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adam": {"type": "adam", "learning_rate": 0.01},
    "adamw": {"type": "adamw", "learning_rate": 0.01},
}
LAYERS = [
    {"type": "linear", "name": "fc1", "in_features": 8, "out_features": 4},
    {"type": "tanh"},
    {"type": "linear", "name": "fc2", "in_features": 4, "out_features": 4},
]


def start(where: torch.device, optimizer: str = "sgd") -> TrainingSession:
    spec = {
        "model": {"kind": "layers", "layers": LAYERS},
        "loss": "mse",
        "optimizer": OPTIMIZERS[optimizer],
        "seed": 3,
    }
    limits = Limits(memory_bytes=1 << 30, max_batch_size=32)
    return build_session(Initialize.model_validate(spec), Sources(), where, limits)


def batch(number: int) -> Batch:
    random = np.random.RandomState(number)
    return Batch({"input": random.randn(4, 8).astype(np.float32)}, random.randn(4, 4).astype(np.float32))


def train(session: TrainingSession, first: int, last: int) -> list[float]:
    return [float(session.perform(batch(n), StepOptions(), n).loss or 0) for n in range(first, last + 1)]


def state_of(session: TrainingSession) -> dict[str, bytes]:
    tensors = session.snapshot().tensors
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_take_the_course_that_they_take_on_the_cpu(device: Device, optimizer: str) -> None:
    there, here = start(device.torch_device(), optimizer), start(torch.device("cpu"), optimizer)
    np.testing.assert_allclose(train(there, 1, 8), train(here, 1, 8), rtol=1e-4)
    for name, tensor in here.snapshot().tensors.items():
        np.testing.assert_allclose(there.snapshot().tensors[name].numpy(), tensor.numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_session_resumed_from_its_checkpoint_goes_on_bit_for_bit(
    device: Device, optimizer: str, tmp_path: Path
) -> None:
    straight = start(device.torch_device(), optimizer)
    train(straight, 1, 10)

    broken_off = start(device.torch_device(), optimizer)
    train(broken_off, 1, 4)
    written = checkpoints.write(broken_off.snapshot(), tmp_path / "checkpoint.safetensors")
    resumed = start(device.torch_device(), optimizer)
    resumed.restore(checkpoints.read(written.path, written.sha256))
    assert (resumed.step, resumed.sequence) == (4, 4)
    train(resumed, 5, 10)

    assert state_of(resumed) == state_of(straight)


def test_gradients_are_accumulated_and_applied(device: Device) -> None:
    session = start(device.torch_device())
    before = state_of(session)
    outcome = session.perform(batch(1), StepOptions(mode="gradients"), 1)
    assert outcome.gradient_norms
    assert session.step == 0
    session.perform(None, StepOptions(mode="apply"), 2)
    assert session.step == 1
    assert state_of(session) != before


def test_no_operator_of_a_step_falls_back_to_the_cpu(device: Device) -> None:
    for optimizer in OPTIMIZERS:
        session = start(device.torch_device(), optimizer)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train(session, 1, 2)
        assert [str(one.message) for one in told if "fall back" in str(one.message)] == []
