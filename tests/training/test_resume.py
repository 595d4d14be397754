"""Bit for bit: a session carried over into a new one at any point ends where the undisturbed one ends."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_operations.errors import OperationError
from tests.training.sessions import LAYERS, OPTIMIZERS, batch, carried_over, digest, start, train
from workers.training import checkpoints
from workers.training.dataset import BatchPlan, Samples
from workers.training.model.ports import Batch
from workers.training.model.shapes import ShapeTrial
from workers.training.outcomes import StepOptions, StepOutcome, StepRecord

SCHEDULES = [
    {},
    {"type": "cosine", "warmup_steps": 3, "total_steps": 20, "min_learning_rate": 1e-4},
    {"type": "linear", "total_steps": 9},
    {"type": "one_cycle", "total_steps": 12},
    {"type": "plateau", "patience": 0, "every_steps": 2},
    {"type": "plateau", "patience": 0, "metric": "evaluate", "factor": 0.5},
]

#: One job of each kind; its number is its place in the list.
JOBS: dict[str, Any] = {
    "train": (StepOptions(), None),
    "clipped": (StepOptions(gradient_clip_norm=0.3, learning_rate=0.02), None),
    "gradients": (StepOptions(mode="gradients"), None),
    "query": (StepOptions(mode="gradients", accumulate=False), None),
    "apply": (StepOptions(mode="apply"), None),
    "evaluate": (StepOptions(mode="evaluate"), None),
    "epoch": (StepOptions(), BatchPlan(batch_size=8, epochs=1)),
    "drawn": (StepOptions(), BatchPlan(batch_size=7, steps=5, drop_last=True)),
    "grouped": (StepOptions(gradient_clip_norm=0.5), BatchPlan(batch_size=6, epochs=2, grad_accumulation=2)),
    "judged": (StepOptions(mode="evaluate"), BatchPlan(batch_size=8, epochs=1)),
    "gathered": (StepOptions(mode="gradients"), BatchPlan(batch_size=8, steps=2, shuffle=False)),
}


def samples() -> Samples:
    whole = [batch(number, 13) for number in (50, 51)]
    return Samples(
        {"input": np.concatenate([part.inputs["input"] for part in whole])},
        np.concatenate([part.targets for part in whole]),
    )


def advance(session: Any, jobs: list[str], *, stop_after: int | None = None) -> list[StepOutcome]:
    """Does the jobs that the session has not done, up to `stop_after` steps in all, and stays wherever that is."""
    outcomes: list[StepOutcome] = []
    for number, job in enumerate(jobs, 1):
        if number <= session.sequence:
            continue
        options, plan = JOBS[job]
        if options.mode == "apply" and session.state.accumulated is None:
            options = StepOptions()
        if plan is None:
            if stop_after is not None and len(outcomes) >= stop_after:
                return outcomes
            outcomes.append(session.perform(None if options.mode == "apply" else batch(number), options, number))
            continue
        run = session.run(samples(), plan, options, number)
        while run.steps_done < run.steps_total:
            if stop_after is not None and len(outcomes) >= stop_after:
                return outcomes
            outcomes.append(next(run))
        run.finish()
    return outcomes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    schedule=st.sampled_from(SCHEDULES),
    jobs=st.lists(st.sampled_from(list(JOBS)), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    seed=st.integers(0, 2**63 - 1),
    precision=st.sampled_from(["float32", "float16"]),
)
def test_a_session_carried_over_at_any_steps_ends_where_it_would_have_ended(
    optimizer: str, schedule: dict[str, Any], jobs: list[str], cuts: list[int], seed: int, precision: str
) -> None:
    fields = {"optimizer": OPTIMIZERS[optimizer], "schedule": schedule, "seed": seed, "precision": precision}
    whole = start(**fields)
    wanted = advance(whole, jobs)

    session, outcomes = start(**fields), []
    with tempfile.TemporaryDirectory() as folder:
        for cut in cuts:
            outcomes += advance(session, jobs, stop_after=cut)
            # The new session starts from another seed: the checkpoint's must win.
            session = carried_over(session, Path(folder), **{**fields, "seed": 7})
        outcomes += advance(session, jobs)

    assert digest(session) == digest(whole)
    assert outcomes == wanted


@pytest.mark.parametrize("jobs", [["train", "gradients", "apply", "epoch", "drawn", "clipped", "evaluate"]])
def test_a_log_of_records_replayed_from_a_checkpoint_gives_the_same_state(jobs: list[str], tmp_path: Path) -> None:
    session = start()
    advance(session, jobs[:2])
    restored = carried_over(session, tmp_path)
    advance(session, jobs)
    # One dataset job more, cut short after three steps.
    plan = BatchPlan(batch_size=4, epochs=3)
    cut = session.run(samples(), plan, StepOptions(), 8)
    for _ in range(3):
        next(cut)
    cut.finish()

    log = [StepRecord(number, *JOBS[job]) for number, job in enumerate(jobs, 1)]
    log.append(StepRecord(8, StepOptions(), plan, 3))
    for record in log:
        data = samples() if record.plan else None if record.options.mode == "apply" else batch(record.sequence)
        restored.replay(record, data)
    assert digest(restored) == digest(session)
    assert restored.replay(log[3], samples()) == []


def test_equal_states_make_equal_files(tmp_path: Path) -> None:
    one, two = start(), start()
    for session in (one, two):
        advance(session, ["train", "gradients"])
    written = [checkpoints.write(s.snapshot(), tmp_path / f"{index}") for index, s in enumerate((one, two))]
    assert written[0].sha256 == written[1].sha256
    assert written[0].size_bytes == (tmp_path / "0").stat().st_size


def test_a_snapshot_is_at_rest_while_training_goes_on(tmp_path: Path) -> None:
    session = start()
    train(session, 2)
    snapshot = session.snapshot()
    first = checkpoints.write(snapshot, tmp_path / "first")
    train(session, 2, first=3)
    assert checkpoints.write(snapshot, tmp_path / "second").sha256 == first.sha256
    assert snapshot.step == 2


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "another layer": (
        {"model": {"kind": "layers", "layers": [*LAYERS[:2], {"type": "tanh"}, *LAYERS[3:]]}},
        "layers or graph",
    ),
    "another width": (
        {"model": {"kind": "layers", "layers": [{"type": "linear", "in_features": 6, "out_features": 4}]}},
        "parameters",
    ),
    "another optimizer": ({"optimizer": OPTIMIZERS["sgd-momentum"]}, "optimizer"),
    "other trained parameters": ({"trainable": ["fc*"]}, "trained parameters"),
    "adapters": ({"lora": {"rank": 2}}, "adapters"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(other: str, tmp_path: Path) -> None:
    fields, words = OTHERS[other]
    session = start()
    train(session, 2)
    written = checkpoints.write(session.snapshot(), tmp_path / "checkpoint")
    stranger = start(**fields)
    before = digest(stranger)
    with pytest.raises(OperationError, match=words) as caught:
        stranger.restore(checkpoints.read(written.path, written.sha256))
    assert caught.value.code == "model_invalid"
    assert digest(stranger) == before


def test_a_new_learning_rate_may_be_given_with_an_old_checkpoint(tmp_path: Path) -> None:
    session = start()
    train(session, 2)
    resumed = carried_over(session, tmp_path, optimizer={"type": "adamw", "learning_rate": 0.5})
    assert resumed.perform(batch(3), StepOptions(), 3).learning_rate == 0.5


def test_steps_made_again_tell_what_batches_of_their_shapes_give(monkeypatch: pytest.MonkeyPatch) -> None:
    twin, session = start(), start()
    tried: list[object] = []
    attempt = ShapeTrial._try
    monkeypatch.setattr(ShapeTrial, "_try", lambda *given: tried.append(given) or attempt(*given))
    session.replay(StepRecord(1, StepOptions(), None, None), batch(1))
    outcome = session.perform(batch(2), StepOptions(), 2)
    assert tried == [], "a trial imports torch's compiler, which a session on its way back need not wait for"
    for wrong in (Batch(batch(3).inputs, batch(3).targets[:, None]), Batch(batch(3).inputs, batch(3).targets + 99)):
        with pytest.raises(OperationError) as caught:
            session.perform(wrong, StepOptions(), 3)
        assert caught.value.code == "input_mismatch"
    session.perform(batch(3, 5), StepOptions(), 3)
    assert len(tried) == 1
    monkeypatch.undo()
    train(twin, 2)
    twin.perform(batch(3, 5), StepOptions(), 3)
    assert digest(session) == digest(twin) and outcome.step == 2
