"""Schedules that watch the loss: what they count, and that a checkpoint or a replay gives the same rates.

`test_plain_torch` compares schedules with torch's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.sessions import batch, carried_over, digest, start, train
from workers.training.dataset import BatchPlan, Samples
from workers.training.optimization.schedules import Observed
from workers.training.outcomes import StepOptions, StepRecord
from workers.training.session import TrainingSession

EVALUATE = StepOptions(mode="evaluate")


def watching(metric: str = "evaluate", **more: Any) -> dict[str, Any]:
    plateau = {"type": "plateau", "metric": metric, "patience": 0, "factor": 0.5} | more
    return {"schedule": plateau, "optimizer": {"type": "sgd", "learning_rate": 0.4}}


def held_out(*numbers: int) -> Samples:
    parts = [batch(number) for number in numbers]
    return Samples(
        {"input": np.concatenate([part.inputs["input"] for part in parts])},
        np.concatenate([part.targets for part in parts]),
    )


def evaluate(session: TrainingSession, number: int, dataset: Samples) -> None:
    run = session.run(dataset, BatchPlan(8, epochs=1, shuffle=False), EVALUATE, number)
    for _ in run:
        pass
    run.finish()


def test_an_evaluation_with_a_number_is_one_observation_and_others_change_nothing() -> None:
    session = start(**watching())
    first, second = batch(1), batch(2)
    losses = [session.advance(one, EVALUATE).loss for one in (first, second)]
    better, worse = (first, second) if (losses[0] or 0) < (losses[1] or 0) else (second, first)
    session.perform(better, EVALUATE, 1)
    for _ in range(3):
        session.advance(worse, EVALUATE)
        assert session.learning_rate == 0.4
    session.perform(worse, EVALUATE, 2)
    assert session.learning_rate == 0.2
    # A dataset's evaluation is one observation: the mean over its samples, which is between the two.
    evaluate(session, 3, held_out(1, 2))
    assert session.learning_rate == 0.1


def test_an_evaluation_of_a_dataset_without_a_number_is_forgotten() -> None:
    session = start(**watching())
    run = session.run(held_out(1, 2), BatchPlan(8, epochs=1), EVALUATE, 1)
    next(run)
    assert session.state.observed != Observed()
    session.abandon_run()
    assert session.state.observed == Observed()
    assert session.state.unfinished_run is None


def test_the_rate_comes_back_from_a_checkpoint_within_an_evaluation_and_from_a_replay(tmp_path: Path) -> None:
    session = start(**watching())
    for number in range(1, 5):
        session.perform(batch(number % 2), EVALUATE if number % 2 else StepOptions(), number)
    dataset, plan = held_out(5, 6, 7), BatchPlan(8, epochs=1)
    run = session.run(dataset, plan, EVALUATE, 5)
    next(run)
    resumed = carried_over(session, tmp_path, **watching())
    for one in (session, resumed):
        rest = one.run(dataset, plan, EVALUATE, 5)
        for _ in rest:
            pass
        rest.finish()
    assert digest(resumed) == digest(session)

    replayed = start(**watching())
    for number in range(1, 5):
        replayed.replay(StepRecord(number, EVALUATE if number % 2 else StepOptions()), batch(number % 2))
    replayed.replay(StepRecord(5, EVALUATE, plan), dataset)
    assert digest(replayed) == digest(session)
    assert replayed.learning_rate == session.learning_rate < 0.4


def test_a_window_of_updates_is_one_observation() -> None:
    session = start(**watching("train", every_steps=5))
    losses = [loss or 0.0 for loss in train(session, 4)]
    assert session.state.observed.best is None
    losses += [loss or 0.0 for loss in train(session, 1, first=5)]
    assert session.state.observed.best == pytest.approx(sum(losses) / 5)


def test_an_update_from_accumulated_gradients_is_observed_with_the_mean_of_their_losses() -> None:
    session = start(**watching("train"))
    losses = [session.perform(batch(n), StepOptions(mode="gradients"), n).loss or 0.0 for n in (1, 2)]
    assert session.state.observed.best is None
    session.perform(None, StepOptions(mode="apply"), 3)
    assert session.state.observed.best == pytest.approx(sum(losses) / 2)
    last = session.perform(batch(4), StepOptions(mode="gradients"), 4).loss or 0.0
    second = session.perform(batch(5), StepOptions(), 5).loss or 0.0
    assert session.state.observed.best == pytest.approx(min(sum(losses) / 2, (last + second) / 2))


def test_a_checkpoint_of_an_earlier_version_starts_a_schedule_and_a_scale_anew() -> None:
    session = start(**watching("train"), precision="float16")
    snapshot = session.snapshot()
    old = {k: v for k, v in snapshot.state.items() if k not in ("observed", "loss_scale", "accumulated_loss")}
    train(session, 3)
    session.restore(type(snapshot)(snapshot.tensors, old))
    assert session.state.observed.best is None
    assert session.state.loss_scale is not None and session.state.loss_scale.scale == 65536
    assert torch.equal(*(s.part("parameter/")["fc1.weight"] for s in (session.snapshot(), snapshot)))
