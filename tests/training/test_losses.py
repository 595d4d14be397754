"""Which targets and weights a loss takes, and what it counts. `test_plain_torch` compares its values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from device_operations.errors import OperationError
from device_operations.requests.losses import Loss
from tests.training.sessions import LAYERS, batch, start
from workers.training.dataset import BatchPlan, Samples
from workers.training.model.ports import Batch
from workers.training.optimization.losses import LossFunction
from workers.training.outcomes import StepOptions

OUTPUT = torch.zeros(3, 4)


def loss(form: Any) -> LossFunction:
    return LossFunction(TypeAdapter(Loss).validate_python(form))


@pytest.mark.parametrize(
    ("form", "targets", "words"),
    [
        ("cross_entropy", [0, -100, 1], "-100 is none of the 4 classes, 0 to 3; a loss with ignore_index"),
        ({"type": "cross_entropy"}, [0, -1, 1], "-1 is none of the 4 classes"),
        ({"type": "cross_entropy", "ignore_index": 2}, [0, 2, 4], "4 is none"),
        ({"type": "cross_entropy", "ignore_index": 0}, np.full((3, 4), 0.25, np.float32), "goes with class numbers"),
        ({"type": "cross_entropy", "weight": [1.0, 2.0]}, [0, 1, 2], r"2 numbers in weight.* takes 4.*each class"),
        ({"type": "nll", "weight": [1.0]}, [0, 1, 2], "1 numbers in weight"),
        ({"type": "nll"}, np.zeros(3, np.float32), "takes class numbers, but float32"),
        ({"type": "bce_with_logits", "pos_weight": [1.0] * 3}, np.zeros((3, 4), bool), "pos_weight.*last axis"),
        ({"type": "bce_with_logits"}, np.full((3, 4), 2), "shares from 0 to 1, but they go from 2 to 2"),
        ("bce_with_logits", np.zeros((3, 4)), "takes float32 here, but float64"),
        ("mse", np.zeros(3, np.int64), r"takes shape \[3, 4\]"),
    ],
)
def test_targets_and_weights_that_do_not_fit_are_refused(form: Any, targets: Any, words: str) -> None:
    with pytest.raises(OperationError, match=words) as caught:
        loss(form).take_targets(OUTPUT, np.asarray(targets))
    assert caught.value.code == "input_mismatch"


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "bool"])
@pytest.mark.parametrize("name", ["mse", "l1", "smooth_l1", "bce_with_logits"])
def test_whole_and_boolean_targets_become_floats_of_the_outputs_dtype(name: str, dtype: str) -> None:
    for kind in (torch.float32, torch.float64):
        taken = loss(name).take_targets(OUTPUT.to(kind), np.ones((3, 4), dtype))
        assert taken.dtype == kind and taken.eq(1).all()


def test_what_is_ignored_counts_neither_as_right_nor_as_wrong() -> None:
    output = torch.eye(4)[:3]
    assert loss({"type": "cross_entropy"}).count_correct(output, torch.tensor([0, -100, 3])) == (1, 2)
    assert loss({"type": "nll", "ignore_index": 3}).count_correct(output, torch.tensor([0, 1, 3])) == (2, 2)
    assert loss("cross_entropy").count_correct(output, torch.tensor([0, 1, 3])) == (2, 3)


def test_a_dataset_is_checked_whole_and_its_ignored_targets_are_taken() -> None:
    session = start(loss={"type": "cross_entropy", "ignore_index": -1})
    one = batch(1, 16)
    targets = one.targets.astype(np.int16)
    targets[::3] = -1
    outcomes = list(session.run(Samples(one.inputs, targets), BatchPlan(8, epochs=1, shuffle=False), StepOptions(), 1))
    wanted = start(loss={"type": "cross_entropy", "ignore_index": -1})
    batches = [Batch({"input": one.inputs["input"][rows]}, targets[rows]) for rows in (slice(8), slice(8, 16))]
    assert [outcome.loss for outcome in outcomes] == [wanted.advance(part, StepOptions()).loss for part in batches]
    targets[15] = -2
    with pytest.raises(OperationError, match="-2 is none of the 4 classes"):
        session.run(Samples(one.inputs, targets), BatchPlan(8, epochs=1), StepOptions(), 2)


def test_boolean_targets_of_a_dataset_are_taken() -> None:
    layers = [*LAYERS[:-1], {**LAYERS[-1], "out_features": 1}]
    session = start(model={"kind": "layers", "layers": layers}, loss="bce_with_logits")
    one = batch(1, 16)
    dataset = Samples(one.inputs, (one.targets > 1)[:, None])
    outcomes = list(session.run(dataset, BatchPlan(8, epochs=1), StepOptions(mode="evaluate"), 1))
    assert sum(outcome.elements for outcome in outcomes) == 16


def test_a_batch_of_ignored_targets_alone_is_refused_as_its_mean_is_none() -> None:
    session = start(loss={"type": "cross_entropy"})
    one = batch(1)
    with pytest.raises(OperationError, match="the loss is nan") as caught:
        session.perform(Batch(one.inputs, np.full(8, -100)), StepOptions(), 1)
    assert caught.value.code == "nonfinite_loss"


def test_a_checkpoint_goes_on_with_the_loss_of_its_new_session() -> None:
    session = start(loss={"type": "cross_entropy", "label_smoothing": 0.1})
    session.perform(batch(1), StepOptions(), 1)
    other = start(loss={"type": "cross_entropy", "weight": [1.0, 2.0, 3.0, 4.0]})
    other.restore(session.snapshot())
    fresh = other.perform(batch(2), StepOptions(mode="evaluate"), 2).loss
    assert fresh != session.perform(batch(2), StepOptions(mode="evaluate"), 2).loss
