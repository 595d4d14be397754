"""The exporter has run before a validation needs its graph, in time that the device had to spare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from tests.support.databases import Databases
from tests.support.stack import eventually
from tests.training_service.calls import Training, arrays, batch, tensor
from tests.training_service.conftest import running
from tests.training_service.telling_worker import TOLD
from tests.training_service.test_datasets import dataset


def network(width: int) -> dict[str, Any]:
    """A model of so many hidden units. Each of its weights stands in the exported graph, so one graph serves all."""
    layers = [
        {"type": "linear", "name": "fc1", "in_features": 6, "out_features": width},
        {"type": "relu"},
        {"type": "dropout", "p": 0.3},
        {"type": "linear", "name": "fc2", "in_features": width, "out_features": 4},
    ]
    return {"kind": "layers", "layers": layers}


@pytest.fixture(scope="module")
def training(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """The routes of a stack whose worker's log tells of each run of the exporter."""
    with running(databases, tmp_path_factory.mktemp("telling")) as stack:
        stack.stop("cpu_0")
        stack.run_instead("cpu_0", "tests.training_service.telling_worker")
        stack.start("cpu_0")
        stack.wait_ready()
        yield Training(stack)


@pytest.fixture
def exports(training: Training) -> Callable[[], int]:
    """How often the exporter has run since the test began."""
    before = training.stack.log("cpu_0").count(TOLD)
    return lambda: training.stack.log("cpu_0").count(TOLD) - before


def test_the_first_validation_of_a_session_does_not_wait_for_the_exporter(
    training: Training, exports: Callable[[], int]
) -> None:
    first = training.initialize(model=network(8))
    training.done(training.step(first, 1))
    eventually(lambda: exports() == 1)
    inputs, targets = arrays(3, 20)
    body = {"inputs": {"input": tensor(inputs)}, "targets": tensor(targets)}
    found = training.done(training.submit("validate", {"session_id": first, **body}))["result"]
    assert found["largest_difference"] < 1e-5
    assert found["loss"] == pytest.approx(found["trained_loss"], rel=1e-5)
    training.done(training.step(first, 2))
    kept = training.checkpoint(first, export=["onnx"])
    training.end(first)

    # Another session of the same network needs no exporter even before its first step, and a checkpoint never does.
    second = training.initialize(model=network(8), seed=9)
    found = training.done(training.submit("validate", {"session_id": second, **body}))["result"]
    assert found["largest_difference"] < 1e-5
    training.done(training.submit("validate", {"checkpoint_id": kept["checkpoint_id"], **body}))
    assert exports() == 1

    other = training.initialize(model=network(9))
    found = training.done(training.submit("validate", {"session_id": other, **body}))["result"]
    assert found["largest_difference"] < 1e-5
    assert exports() == 2, "another network has a graph of its own"
    for session_id in (second, other):
        training.end(session_id)


def test_steps_between_which_the_exporter_runs_give_what_they_would_give_alone(
    training: Training, exports: Callable[[], int]
) -> None:
    def stepped() -> tuple[list[tuple[Any, ...]], dict[str, bytes]]:
        session_id = training.initialize(model=network(10), seed=2)
        for number in range(1, 8):
            training.done(training.step(session_id, number))
        made = training.losses(session_id), training.state(session_id)
        training.end(session_id)
        return made

    beside = stepped()
    assert exports() == 1
    assert stepped() == beside
    assert exports() == 1, "the network was exported before, so no exporter ran beside the second session"


def test_a_job_of_many_steps_makes_room_for_the_exporter(training: Training, exports: Callable[[], int]) -> None:
    session_id = training.initialize(model=network(13))
    job = training.step(session_id, 1, dataset=dataset(training, steps=1_000_000))
    eventually(lambda: exports() == 1)
    assert training.client.get(f"/api/jobs/{job['job_id']}").json()["state"] == "running"
    training.client.delete(f"/api/jobs/{job['job_id']}").raise_for_status()
    training.done(job, "cancelled")
    training.end(session_id)


def test_nothing_is_exported_for_a_session_that_has_ended_meanwhile(
    training: Training, exports: Callable[[], int]
) -> None:
    session_id = training.initialize(model=network(11))
    step = {"kind": "training.step", "request": {"session_id": session_id, **batch(1)}}
    end = {"kind": "training.end_session", "request": {"session_id": session_id}}
    for job in training.client.post("/api/jobs", json={"jobs": [step, end]}).json()["jobs"]:
        training.done(job)
    # What is done in spare time is done in order: by the time of this one's export the other's turn has come and gone.
    other = training.initialize(model=network(12))
    training.done(training.step(other, 1))
    eventually(exports)
    training.done(training.submit("validate", {"session_id": other, **batch(1)}))
    assert exports() == 1
    training.end(other)


def test_a_validation_renews_the_lease_of_its_session(training: Training) -> None:
    session_id = training.initialize(model=network(8), lease_seconds=100)

    def over_at() -> datetime:
        return datetime.fromisoformat(training.status(session_id)["lease_expires_at"])

    before = over_at()
    training.done(training.submit("validate", {"session_id": session_id, **batch(1)}))
    eventually(lambda: over_at() > before, 5)
    training.end(session_id)
