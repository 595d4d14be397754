"""The optimizers beside torch's own, and the loop that other devices need beside the lists that cpu and cuda take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from device_operations.requests.optimizers import Optimizer
from device_operations.requests.schedules import Schedule
from tests.training.sessions import OPTIMIZERS, batch, describe, start, train
from workers.training.optimization.optimizers import Lists, Updater, slots_of
from workers.training.optimization.schedules import learning_rate_at
from workers.training.outcomes import StepOptions

CASES: dict[str, dict[str, Any]] = {
    **OPTIMIZERS,
    "sgd-dampened": {"type": "sgd", "learning_rate": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    "adam-betas": {"type": "adam", "learning_rate": 0.01, "betas": [0.5, 0.9], "eps": 1e-3},
}


def shapes() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, 3), torch.randn(7), torch.randn(2, 2, 2)]


def theirs(spec: dict[str, Any], parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    arguments = {key: value for key, value in spec.items() if key not in ("type", "learning_rate")}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec["type"]]
    return kind(parameters, lr=spec["learning_rate"], **arguments)


@pytest.mark.parametrize("device", ["cpu", "looped"])
@pytest.mark.parametrize("case", CASES)
def test_a_hundred_updates_are_torchs_own(case: str, device: str) -> None:
    spec = TypeAdapter(Optimizer).validate_python(CASES[case])
    ours, reference = shapes(), [parameter.requires_grad_() for parameter in shapes()]
    stock = theirs(CASES[case], reference)
    # Any type but cpu and cuda takes the loop; the tensors themselves stay here.
    updater = Updater(spec, ours, Lists(torch.device("cpu" if device == "cpu" else "privateuseone")))
    for step in range(100):
        torch.manual_seed(100 + step)
        gradients = [torch.randn_like(parameter) for parameter in ours]
        for parameter, gradient in zip(reference, gradients, strict=True):
            parameter.grad = gradient.clone()
        stock.step()
        updater.update(gradients, CASES[case]["learning_rate"])
    for mine, stocks in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, stocks.detach(), rtol=2e-5, atol=2e-6)
    for slot in slots_of(spec):
        for mine, parameter in zip(updater.state[slot], reference, strict=True):
            torch.testing.assert_close(mine, stock.state[parameter][slot], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_parameter_that_the_loss_does_not_use_stays_as_torchs_would(case: str) -> None:
    spec = TypeAdapter(Optimizer).validate_python(CASES[case])
    ours, reference = shapes(), [parameter.requires_grad_() for parameter in shapes()]
    stock, updater = theirs(CASES[case], reference), Updater(spec, ours, Lists(torch.device("cpu")))
    for step in range(5):
        torch.manual_seed(step)
        gradients = [torch.randn_like(ours[0]), None, torch.randn_like(ours[2])]
        for parameter, gradient in zip(reference, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        stock.step()
        updater.update(gradients, CASES[case]["learning_rate"])
    assert torch.equal(ours[1], shapes()[1])
    torch.testing.assert_close(ours, [parameter.detach() for parameter in reference], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_session_ends_where_a_bare_torch_loop_ends(case: str) -> None:
    layers = [{"type": "linear", "in_features": 6, "out_features": 9}, {"type": "tanh"}]
    layers.append({"type": "linear", "in_features": 9, "out_features": 4})
    session = start(model={"kind": "layers", "layers": layers}, optimizer=CASES[case], seed=11)
    module = session.definition.build(11)
    stock = theirs(CASES[case], list(module.parameters()))

    for number in range(1, 31):
        one = batch(number)
        stock.zero_grad()
        logits = module(torch.from_numpy(one.inputs["input"]))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(one.targets)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        stock.step()
    train(session, 30, gradient_clip_norm=0.5)
    found = session.snapshot().part("parameter/")
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_schedules_climb_fall_and_stay() -> None:
    def rates(**fields: Any) -> list[float]:
        return [learning_rate_at(TypeAdapter(Schedule).validate_python(fields), 1.0, step) for step in range(12)]

    np.testing.assert_allclose(rates(warmup_steps=4), [0.25, 0.5, 0.75] + [1] * 9)
    linear = rates(type="linear", warmup_steps=2, total_steps=10, min_learning_rate=0.2)
    np.testing.assert_allclose(linear, [0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2])
    cosine = rates(type="cosine", total_steps=10)
    np.testing.assert_allclose(cosine, [(1 + np.cos(np.pi * step / 10)) / 2 for step in range(10)] + [0, 0], atol=1e-12)


def test_a_step_says_the_rate_it_used_and_a_request_may_override_it() -> None:
    session = start(schedule={"type": "linear", "total_steps": 4}, optimizer={"type": "sgd", "learning_rate": 0.4})

    given = [None, None, 0.125, None, None]
    used = [session.perform(batch(n), StepOptions(learning_rate=r), n).learning_rate for n, r in enumerate(given, 1)]
    np.testing.assert_allclose(used, [0.4, 0.3, 0.125, 0.1, 0.0], atol=1e-12)


def test_the_default_weight_decay_is_torchs_for_each_type() -> None:
    assert describe(optimizer={"type": "adam", "learning_rate": 1}).optimizer.weight_decay == 0.0
    assert describe(optimizer={"type": "adamw", "learning_rate": 1}).optimizer.weight_decay == 0.01
