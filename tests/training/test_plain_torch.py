"""Everything that a session may be made of trains as plain torch does: the same losses, rates, weights, evaluation.

The table is `cases`. The same kernels run in both, so float32 is compared to the last bit but one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from device_operations.requests.layers import LAYERS as TABLE
from tests.training.cases import (
    CASES,
    LAYER_CASES,
    Case,
    build_loss,
    build_network,
    build_optimizer,
    build_schedule,
)
from tests.training.sessions import CPU, LIMITS, describe, digest
from tests.training.test_layers import EXAMPLES
from workers.training import checkpoints
from workers.training.dataset import BatchPlan, Samples
from workers.training.model.definition import Sources
from workers.training.model.ports import Batch
from workers.training.outcomes import StepOptions
from workers.training.session import TrainingSession, build_session

STEPS, ROWS = 20, 6
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def start(case: Case) -> TrainingSession:
    fields: dict[str, Any] = {"loss": case.loss, "optimizer": case.optimizer, "precision": case.precision, "seed": 3}
    if case.schedule is not None:
        fields["schedule"] = case.schedule
    return build_session(describe(model={"kind": "layers", "layers": case.layers}, **fields), Sources(), CPU, LIMITS)


def twin(case: Case, session: TrainingSession) -> nn.Module:
    """torch's own network with the session's weights."""
    network = build_network(case)
    given = list(session.definition.build(3).state_dict().values())
    network.load_state_dict(dict(zip(network.state_dict(), given, strict=True)))
    return network


def batches(case: Case, network: nn.Module) -> list[Batch]:
    random = np.random.RandomState(7)
    whole = case.layers[0]["type"] == "embedding"
    rows = (ROWS, *case.sample)
    inputs = [random.randint(0, 9, rows) if whole else random.randn(*rows).astype(np.float32) for _ in range(STEPS)]
    with torch.no_grad():
        shape = tuple(network.eval()(torch.from_numpy(inputs[0])).shape)
    return [Batch({"input": x}, case.targets(random, shape)) for x in inputs]


def as_torch_takes(case: Case, targets: np.ndarray[Any, Any]) -> torch.Tensor:
    """What a user of torch writes: class numbers as int64, everything else as floats."""
    classes = "cross_entropy" in str(case.loss) or "nll" in str(case.loss)
    return torch.from_numpy(targets.astype(np.int64 if classes and targets.dtype.kind in "iu" else np.float32))


class Plain:
    """A loop in plain torch, with its autocast and its GradScaler where the case asks for them."""

    def __init__(self, case: Case, network: nn.Module) -> None:
        self.case, self.network, self.loss = case, network, build_loss(case)
        self.optimizer = build_optimizer(case, network)
        self.schedule = build_schedule(case, self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", enabled=case.precision == "float16")

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        dtype = DTYPES.get(self.case.precision)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            yield

    def judge(self, batch: Batch) -> torch.Tensor:
        with self.autocast():
            output = self.network(torch.from_numpy(batch.inputs["input"]))
        loss: torch.Tensor = self.loss(output.float(), as_torch_takes(self.case, np.asarray(batch.targets)))
        return loss

    def gather(self, batch: Batch) -> float:
        loss = self.judge(batch)
        self.scaler.scale(loss / self.case.grad_accumulation).backward()
        return loss.item()

    def update(self, observed: float) -> float:
        """Steps optimizer and schedule; the rate that was used."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(observed)
        elif self.schedule is not None:
            self.schedule.step()
        return rate


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.grad_accumulation == 1])
def test_a_session_trains_as_plain_torch(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    session = start(case)
    network = twin(case, session)
    given = batches(case, network)
    plain = Plain(case, network.train())
    for number, batch in enumerate(given, 1):
        loss = plain.gather(batch)
        rate = plain.update(loss)
        outcome = session.perform(batch, StepOptions(), number)
        assert outcome.loss == pytest.approx(loss, rel=1e-6, abs=1e-7), f"step {number}"
        assert outcome.learning_rate == pytest.approx(rate, rel=1e-9, abs=1e-15), f"step {number}"
        if number == STEPS // 2:
            # What is not in a checkpoint would be missed from here on.
            written = checkpoints.write(session.snapshot(), tmp_path / "half")
            undisturbed, session = session, start(case)
            session.restore(checkpoints.read(written.path, written.sha256))
        if number > STEPS // 2:
            undisturbed.perform(batch, StepOptions(), number)
    assert digest(session) == digest(undisturbed)
    with torch.no_grad():
        network.eval()
        wanted = plain.judge(given[0]).item()
    evaluated = session.perform(given[0], StepOptions(mode="evaluate"), STEPS + 1)
    assert evaluated.loss == pytest.approx(wanted, rel=1e-6, abs=1e-7)
    for ours, theirs in zip(session.snapshot().part("parameter/").values(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)


def test_the_table_has_every_layer() -> None:
    assert {name.removeprefix("layer ") for name in LAYER_CASES} == set(EXAMPLES)
    # Those without an example take nothing and are torch's activations, which `test_layers` trains.
    assert all(TABLE[kind].required == {} for kind in set(TABLE) - set(EXAMPLES))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.grad_accumulation > 1])
def test_a_datasets_job_makes_one_update_of_the_gradients_of_several_batches(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    session = start(case)
    network = twin(case, session)
    given = batches(case, network)
    plain = Plain(case, network.train())
    dataset = Samples(
        {"input": np.concatenate([batch.inputs["input"] for batch in given])},
        np.concatenate([batch.targets for batch in given]),
    )
    plan = BatchPlan(ROWS, epochs=2, shuffle=False, grad_accumulation=case.grad_accumulation)
    run = session.run(dataset, plan, StepOptions(), 1)
    assert run.steps_total == 2 * STEPS
    for number in range(2 * STEPS):
        position = number % STEPS
        loss = plain.gather(given[position])
        # The last group of an epoch is smaller where the batches do not come out even.
        updated = (position + 1) % case.grad_accumulation == 0 or position + 1 == STEPS
        if updated:
            plain.update(loss)
        outcome = next(run)
        assert outcome.loss == pytest.approx(loss, rel=1e-6), f"batch {number}"
        assert (outcome.mode, outcome.accumulated_batches == 0) == ("train" if updated else "gradients", updated)
        if number == 10:  # in the middle of a group
            assert outcome.accumulated_batches > 0
            written = checkpoints.write(session.snapshot(), tmp_path / "cut")
            resumed = start(case)
            resumed.restore(checkpoints.read(written.path, written.sha256))
            other = resumed.run(dataset, plan, StepOptions(), 1)
    run.finish()
    for _ in other:
        pass
    other.finish()
    assert digest(resumed) == digest(session)
    assert session.step == 2 * -(-STEPS // case.grad_accumulation)
    for ours, theirs in zip(session.snapshot().part("parameter/").values(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)
