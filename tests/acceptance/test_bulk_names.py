"""Entries of one bulk submission name what earlier entries make: by an id or name of the caller's own, or by entry."""

from __future__ import annotations

from itertools import count
from typing import Any

import httpx
import numpy as np
import pytest

from tests.memory.calls import refused
from tests.support import graphs
from tests.support.stack import RunningStack
from tests.training_service.calls import batch, described

_numbers = count(1)
WAIT = {"Prefer": "wait=60"}
X = graphs.tensor(np.ones((1, 4), np.float32))


@pytest.fixture(scope="module")
def http(stack: RunningStack) -> httpx.Client:
    graphs.tiny(stack.folder / "models" / "tiny.onnx")
    return stack.client


def own() -> str:
    return f"own-{next(_numbers)}"


def submit(http: httpx.Client, *entries: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    body = {"jobs": [{"kind": kind, "request": request} for kind, request in entries]}
    answer = http.post("/api/jobs", json=body, headers=WAIT)
    assert answer.status_code == 200, answer.text
    jobs = answer.json()["jobs"]
    assert [job["state"] for job in jobs] == ["succeeded"] * len(entries), jobs
    return list(jobs)


def refusal(http: httpx.Client, *entries: tuple[str, dict[str, Any]]) -> httpx.Response:
    return http.post("/api/jobs", json={"jobs": [{"kind": kind, "request": request} for kind, request in entries]})


def test_an_allocation_by_the_callers_own_id(http: httpx.Client) -> None:
    one, other = own(), own()
    jobs = submit(
        http,
        ("memory.allocate", {"size_bytes": 16, "allocation_id": one, "fill": 5}),
        ("memory.allocate", {"size_bytes": 16, "allocation_id": other}),
        ("memory.copy", {"source": {"allocation_id": one}, "destination": {"allocation_id": other}, "size_bytes": 8}),
        ("memory.clear", {"allocation_id": one, "value": 9}),
        ("memory.read", {"allocation_id": other}),
        ("memory.deallocate", {"allocation_id": one}),
    )
    assert http.get(f"/api/blobs/{jobs[4]['result']['blob_id']}").content == bytes([5] * 8 + [0] * 8)
    assert http.get(f"/api/memory/allocations/{one}").json()["state"] == "freed"


def test_ranges_of_it_are_checked_at_once(http: httpx.Client) -> None:
    one = own()
    refused(
        refusal(
            http,
            ("memory.allocate", {"size_bytes": 16, "allocation_id": one}),
            ("memory.clear", {"allocation_id": one, "offset": 16}),
        ),
        422,
        "out_of_range",
    )
    assert http.get(f"/api/memory/allocations/{one}").status_code == 404, "all or none"


def test_a_later_entry_is_not_named(http: httpx.Client) -> None:
    one = own()
    clear, make = ("memory.clear", {"allocation_id": one}), ("memory.allocate", {"size_bytes": 1, "allocation_id": one})
    assert "jobs.0" in refused(refusal(http, clear, make), 404, "allocation_not_found")["detail"]


def test_a_model_by_its_name(http: httpx.Client) -> None:
    name, one = own(), own()
    into = {"y": {"allocation_id": one}}
    jobs = submit(
        http,
        ("inference.load_model", {"name": name, "source": {"path": "tiny.onnx"}, "options": {"max_batch_size": 3}}),
        ("memory.allocate", {"size_bytes": 16, "allocation_id": one}),
        ("inference.run", {"model_name": name, "inputs": {"x": X}}),
        ("inference.run", {"model_name": name, "inputs": {"x": X}, "into": into}),
        ("memory.read", {"allocation_id": one}),
        ("inference.unload_model", {"model_id": {"$entry": 0}}),
    )
    assert jobs[2]["result"]["outputs"]["y"]["data"] == [3.0] * 4
    raw = http.get(f"/api/blobs/{jobs[4]['result']['blob_id']}").content
    assert np.frombuffer(raw, np.float32).tolist() == [3.0] * 4
    assert jobs[0]["finished_at"] <= jobs[2]["started_at"]
    assert max(jobs[2]["finished_at"], jobs[3]["finished_at"]) <= jobs[5]["started_at"]


def test_anything_by_its_entry(http: httpx.Client) -> None:
    session = {"session_id": {"$entry": 0}}
    jobs = submit(
        http,
        ("training.initialize", described()),
        ("training.step", {**session, **batch(1)}),
        ("training.step", {**session, "sequence": 2, **batch(2)}),
        ("training.step", {**session, "mode": "evaluate", **batch(3)}),
        ("training.checkpoint", session),
        ("training.validate", {**session, **batch(4)}),
        ("training.end_session", session),
        ("memory.allocate", {"size_bytes": 8}),
        ("memory.clear", {"allocation_id": {"$entry": 7}, "value": 1}),
        ("memory.copy", {"source": {"allocation_id": {"$entry": 7}}, "destination": {"allocation_id": {"$entry": 7}}}),
    )
    assert jobs[2]["result"]["step"] == 2
    assert jobs[8]["resource"] == jobs[7]["resource"]


def test_predecessors_by_their_entry(http: httpx.Client) -> None:
    late = {"size_bytes": 8, "job": {"delay_seconds": 0.5}}
    first, second = submit(
        http, ("memory.allocate", late), ("memory.allocate", {"size_bytes": 8, "job": {"after": [{"$entry": 0}]}})
    )
    assert first["finished_at"] <= second["started_at"]


@pytest.mark.parametrize("entry", [1, 2, -1, True, "0", None, 0.5])
def test_only_earlier_entries_can_be_named(http: httpx.Client, entry: Any) -> None:
    make = ("memory.allocate", {"size_bytes": 8})
    for request in (
        {"allocation_id": {"$entry": entry}},
        {"allocation_id": "a", "job": {"after": [{"$entry": entry}]}},
    ):
        told = refused(refusal(http, make, ("memory.clear", request)), 422, "validation_failed")
        assert "jobs.1" in told["detail"]
