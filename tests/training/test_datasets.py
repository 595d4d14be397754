"""Datasets: the order is a function of seed, sequence and batch; files are mapped; bad ones are refused as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from device_operations.errors import OperationError
from device_operations.requests.training import Dataset as DatasetRequest
from tests.training.sessions import batch, digest, start
from workers.training import checkpoints
from workers.training.dataset import BatchPlan, Order, Samples
from workers.training.outcomes import StepOptions, summarize

#: From the first release of this order; it may never change, or old logs replay differently.
FIXED_ORDER = [[4, 0, 2, 7], [5, 1, 9, 3], [6, 8]]


def rows(order: Order, number: int, count: int) -> list[int]:
    return torch.arange(count)[order.rows(number)].tolist()


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 2**63 - 1),
    sequence=st.integers(1, 2**40),
    shuffle=st.booleans(),
)
def test_every_epoch_draws_every_sample_once_in_an_order_that_any_process_finds_again(
    count: int, batch_size: int, seed: int, sequence: int, shuffle: bool
) -> None:
    plan = BatchPlan(batch_size, epochs=3, shuffle=shuffle)
    order, again = Order(count, plan, seed, sequence), Order(count, plan, seed, sequence)
    drawn = [rows(order, number, count) for number in range(order.batches)]
    per_epoch = order.batches // 3
    for epoch in range(3):
        of_epoch = drawn[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for batch_rows in of_epoch for row in batch_rows) == list(range(count))
    # Backwards, and from the middle: no batch depends on those before it.
    assert [rows(again, number, count) for number in reversed(range(order.batches))] == drawn[::-1]


def test_the_order_is_fixed_for_good() -> None:
    order = Order(10, BatchPlan(4, epochs=2), seed=1, sequence=2)
    assert [rows(order, number, 10) for number in range(3)] == FIXED_ORDER


def test_epochs_sequences_and_seeds_are_shuffled_differently() -> None:
    plan = BatchPlan(30, epochs=2)
    orders = [Order(30, plan, seed, sequence) for seed, sequence in ((1, 1), (1, 2), (2, 1))]
    drawn = [tuple(rows(order, number, 30)) for order in orders for number in (0, 1)]
    assert len(set(drawn)) == 6


def test_steps_go_through_as_many_epochs_as_they_need_and_the_rest_may_be_dropped() -> None:
    order = Order(10, BatchPlan(4, steps=7, drop_last=True), 0, 1)
    assert order.batches == 7
    assert [len(rows(order, number, 10)) for number in range(7)] == [4] * 7
    with pytest.raises(OperationError, match="no batch of 11"):
        Order(10, BatchPlan(11, epochs=1, drop_last=True), 0, 1)


def test_a_file_and_the_tensors_in_it_train_alike(tmp_path: Path) -> None:
    whole = batch(1, 20)
    tensors = {"input": torch.from_numpy(whole.inputs["input"]), "targets": torch.from_numpy(whole.targets)}
    path = checkpoints.write_tensors(tensors, tmp_path / "data.safetensors").path
    sessions = start(), start()
    for session, dataset in zip(sessions, (Samples.from_file(path), Samples(whole.inputs, whole.targets)), strict=True):
        run = session.run(dataset, BatchPlan(8, epochs=2), StepOptions(), 1)
        assert [outcome.samples for outcome in run] == [8, 8, 4] * 2
        run.finish()
    assert digest(sessions[0]) == digest(sessions[1])


def test_narrow_whole_numbers_are_widened_in_every_batch() -> None:
    layers = [
        {"type": "embedding", "num_embeddings": 9, "embedding_dim": 4},
        {"type": "flatten"},
        {"type": "linear", "in_features": 12, "out_features": 4},
    ]
    random = np.random.RandomState(0)
    ids, labels = random.randint(0, 9, (20, 3)), random.randint(0, 4, 20)
    wide, narrow = (start(model={"kind": "layers", "layers": layers}) for _ in range(2))
    for session, dataset in (
        (wide, Samples({"input": ids}, labels)),
        (narrow, Samples({"input": ids.astype(np.int16)}, labels.astype(np.int16))),
    ):
        run = session.run(dataset, BatchPlan(8, epochs=2), StepOptions(), 1)
        assert len(list(run)) == 6
    assert digest(wide) == digest(narrow)


def test_a_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    resident = Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("the resident size is read from /proc")
    tensors = {"input": torch.ones(10_000_000, 2), "targets": torch.zeros(10_000_000, dtype=torch.uint8)}
    path = checkpoints.write_tensors(tensors, tmp_path / "large.safetensors").path
    del tensors
    before = int(resident.read_text().split()[1]) * 4096
    dataset = Samples.from_file(path)
    taken = dataset.take(torch.tensor([3, 9_999_999]))
    grown = int(resident.read_text().split()[1]) * 4096 - before
    assert taken.inputs["input"].tolist() == [[1, 1], [1, 1]]
    assert grown < 20_000_000


def test_a_run_is_made_step_by_step_and_may_be_ended_anywhere() -> None:
    session, whole = start(), batch(1, 20)
    run = session.run(Samples(whole.inputs, whole.targets), BatchPlan(5, steps=9), StepOptions(), 3)
    first = [next(run) for _ in range(4)]
    assert (run.steps_done, run.steps_total, session.sequence) == (4, 9, 0)
    run.finish()
    assert [outcome.step for outcome in first] == [1, 2, 3, 4]
    assert (session.sequence, session.step, session.state.unfinished_run) == (3, 4, None)
    summary = summarize(first)
    assert (summary.steps, summary.samples, summary.step) == (4, 20, 4)
    assert summary.loss == pytest.approx(np.mean([outcome.loss for outcome in first]))


def test_a_bad_batch_in_the_middle_stops_the_run_at_the_step_before_it() -> None:
    session, whole = start(), batch(1, 20)
    whole.inputs["input"][12] = np.nan
    run = session.run(Samples(whole.inputs, whole.targets), BatchPlan(5, epochs=1, shuffle=False), StepOptions(), 1)
    outcomes = [next(run), next(run)]
    before = digest(session)
    with pytest.raises(OperationError, match="step 3") as caught:
        next(run)
    assert caught.value.code == "nonfinite_loss"
    assert (run.steps_done, session.step, len(outcomes)) == (2, 2, 2)
    assert digest(session) == before


def test_evaluating_a_dataset_gives_the_loss_of_all_samples() -> None:
    session, whole = start(), batch(1, 20)
    run = session.run(
        Samples(whole.inputs, whole.targets), BatchPlan(8, epochs=1, shuffle=False), StepOptions("evaluate"), 1
    )
    summary = summarize(run)
    logits = session.outputs(whole.inputs)["output"]
    targets = torch.from_numpy(whole.targets)
    assert summary.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-5)
    assert summary.accuracy == pytest.approx(float((logits.argmax(1) == targets).float().mean()))


def _bad(change: str) -> tuple[dict[str, Any], Any]:
    whole = batch(1, 12)
    x, y = whole.inputs["input"], whole.targets
    return {
        "a class at the end": ({"input": x}, np.append(y[:-1], 4)),
        "counts that differ": ({"input": x}, y[:-1]),
        "another name": ({"x": x}, y),
        "another width": ({"input": x[:, :5]}, y),
        "nothing": ({"input": x[:0]}, y[:0]),
    }[change]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("a class at the end", "4 is none of the 4 classes"),
        ("counts that differ", "as many samples"),
        ("another name", "the model takes the inputs"),
        ("another width", r"shape \[4, 5\]"),
        ("nothing", "at least one"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused_before_its_first_step(change: str, words: str) -> None:
    session = start()
    before = digest(session)
    with pytest.raises(OperationError, match=words) as caught:
        session.run(Samples(*_bad(change)), BatchPlan(4, epochs=1, shuffle=False), StepOptions(), 1)
    assert caught.value.code == "input_mismatch"
    assert digest(session) == before


def test_batches_over_the_limit_are_refused() -> None:
    whole = batch(1, 40)
    with pytest.raises(OperationError) as caught:
        start().run(Samples(whole.inputs, whole.targets), BatchPlan(33, epochs=1), StepOptions(), 1)
    assert caught.value.code == "batch_too_large"


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, "no targets"])
def test_a_file_that_is_no_dataset_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        checkpoints.write_tensors({"input": torch.zeros(3, 6)}, path)
    with pytest.raises(OperationError) as caught:
        Samples.from_file(path)
    assert caught.value.code == "input_mismatch"


def test_a_request_describes_the_plan() -> None:
    request = DatasetRequest(blob_id="b", batch_size=16, epochs=2, shuffle=False)
    assert BatchPlan.of(request) == BatchPlan(16, None, 2, shuffle=False)
