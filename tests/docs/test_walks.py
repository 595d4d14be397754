"""The walks in docs/architecture.md are how jobs go: a running stack passes their stations in that order."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from tests.support.stack import REPOSITORY, RunningStack
from tests.training_service.calls import batch, described

_TEXT = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")


def _walks() -> dict[str, list[str]]:
    """The stations of each walk, by the first words of its heading."""
    walks = _TEXT[_TEXT.index("## Three walks") : _TEXT.index("## What runs where")]
    return {
        part.splitlines()[0].partition(":")[0]: re.findall(r"^\d\. `([\w/.]+::[\w.]+)`", part, re.MULTILINE)
        for part in walks.split("\n### ")[1:]
    }


WALKS = _walks()


def test_there_are_three_walks_of_eight_stations_at_most() -> None:
    assert list(WALKS) == ["An inference run", "A training step", "A memory copy"]
    for walk, stations in WALKS.items():
        assert 5 <= len(stations) <= 8, walk


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[int, str]]]:
    """Has processes that are started from now on note their calls of stations; gives what they noted so far."""
    file = tmp_path / "noted"
    stations = {station for walk in WALKS.values() for station in walk}
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "tracing"))
    monkeypatch.setenv("STATIONS", ",".join(stations))
    monkeypatch.setenv("STATIONS_ROOT", str(REPOSITORY))
    monkeypatch.setenv("STATIONS_NOTED", str(file))

    def read() -> list[tuple[int, str]]:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
        return sorted((int(at), station) for at, station in lines)

    return read


def doubling() -> bytes:
    """A model that gives its input twice over."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doubling", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def test_jobs_pass_the_stations_of_their_walk_in_order(
    noted: Callable[[], list[tuple[int, str]]], start_stack: Callable[..., RunningStack]
) -> None:
    stack = start_stack(wait=False)
    stack.wait_ready(seconds=180)

    def done(route: str, body: dict[str, Any]) -> str:
        """Submits a job, waits for its end, and gives the id of what it made."""
        job = stack.client.post(route, json=body, headers={"Prefer": "wait=60"}).json()
        assert job["state"] == "succeeded", job
        return str(job["resource"] and job["resource"]["id"])

    def passed(route: str, body: dict[str, Any]) -> list[str]:
        """The stations in the order of their first calls from a submission until it is answered."""
        began = time.time_ns()
        done(route, body)
        return list(dict.fromkeys(station for at, station in noted() if at >= began))

    blob = stack.client.post("/api/blobs", content=doubling()).json()["blob_id"]
    done("/api/inference/load-model", {"name": "doubling", "source": {"blob_id": blob}})
    session = done("/api/training/initialize", described())
    source, destination = (done("/api/memory/allocate", {"size_bytes": 64}) for _ in range(2))
    ends = {"source": {"allocation_id": source}, "destination": {"allocation_id": destination}}
    inputs = {"x": {"dtype": "float32", "shape": [2], "data": [1, 2]}}
    seen = {
        "An inference run": passed("/api/inference/run", {"model_name": "doubling", "inputs": inputs}),
        "A training step": passed("/api/training/step", {"session_id": session, "sequence": 1, **batch(0)}),
        "A memory copy": passed("/api/memory/copy", ends),
    }
    for walk, stations in WALKS.items():
        assert [station for station in seen[walk] if station in stations] == stations, walk
