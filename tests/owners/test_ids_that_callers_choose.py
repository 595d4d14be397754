"""Ids that callers choose themselves reach nothing of another owner's: not its bytes, its order, nor its fall."""

from __future__ import annotations

import contextlib
from typing import Any

import httpx
import psycopg2
import pytest

from tests.memory.calls import refused
from tests.owners.things import FLOATS, Things, counting, done
from tests.support.stack import RunningStack


def test_an_allocation_id_that_is_taken_is_refused_in_the_same_words_whoever_has_it(zelda: Things, bob: Things) -> None:
    own = {"size_bytes": 8, "allocation_id": "bobs-own"}
    done(bob.client, bob.client.post("/api/memory/allocate", json=own))
    before = zelda.standing()
    details = []
    for taken in (zelda.ids["allocation"], "bobs-own"):
        answer = bob.client.post("/api/memory/allocate", json={"size_bytes": 24, "allocation_id": taken})
        details.append(refused(answer, 409, "allocation_exists")["detail"].replace(taken, "ID"))
    assert details[0] == details[1]
    assert zelda.standing() == before
    refused(bob.client.get(f"/api/memory/data/{zelda.ids['allocation']}"), 404, "allocation_not_found")


@pytest.mark.parametrize("noun", ["model", "inference session", "training session"])
def test_no_allocation_takes_the_id_of_a_model_or_a_session(noun: str, zelda: Things, bob: Things) -> None:
    """Its jobs would be put into the other's order, keep it from ending, and take it along where they fail."""
    body = {"size_bytes": 8, "allocation_id": zelda.ids[noun], "job": {"delay_seconds": 3600}}
    refused(bob.client.post("/api/memory/allocate", json=body), 409, "allocation_exists")
    one = {"kind": "memory.allocate", "request": body}
    refused(bob.client.post("/api/jobs", json={"jobs": [one]}), 409, "allocation_exists")


def test_an_idempotency_key_is_its_owners(zelda: Things, bob: Things) -> None:
    body, headers = {"size_bytes": 8}, {"Idempotency-Key": "the-same"}
    first, other = (
        each.client.post("/api/memory/allocate", json=body, headers=headers).json() for each in (zelda, bob)
    )
    assert first["job_id"] != other["job_id"]
    assert other["owner"] == "bob"
    again = bob.client.post("/api/memory/allocate", json=body, headers=headers).json()
    assert again["job_id"] == other["job_id"]


def test_a_predecessor_is_ones_own_or_an_admins_to_name(zelda: Things, bob: Things, root: httpx.Client) -> None:
    body = {"size_bytes": 8, "job": {"after": [zelda.ids["job"]]}}
    refused(bob.client.post("/api/memory/allocate", json=body), 404, "job_not_found")
    waiting = root.post("/api/memory/allocate", json=body)
    assert waiting.status_code == 202, waiting.text
    assert root.delete(f"/api/jobs/{waiting.json()['job_id']}").status_code == 202
    both = {"size_bytes": 8, "job": {"after": [bob.ids["job"], zelda.ids["job"]]}}
    detail = refused(bob.client.post("/api/memory/allocate", json=both), 404, "job_not_found")["detail"]
    assert zelda.ids["job"] in detail
    assert bob.ids["job"] not in detail


def test_a_run_of_anothers_is_no_session_either(zelda: Things, bob: Things) -> None:
    """A run without a session has one of its own, whose id is the job's."""
    running = {"model_id": zelda.ids["model"], "inputs": {"x": FLOATS, "before": FLOATS}}
    job = done(zelda.client, zelda.client.post("/api/inference/run", json=running))
    assert zelda.client.get(f"/api/inference/status/{job['job_id']}").status_code == 200
    refused(bob.client.get(f"/api/inference/status/{job['job_id']}"), 404, "session_not_found")


def test_a_session_that_is_in_the_way_is_named_to_its_owner_only(
    zelda: Things, bob: Things, root: httpx.Client
) -> None:
    blob = zelda.client.post("/api/blobs", content=counting(0.75)).json()["blob_id"]
    loading = {"name": "in-use", "source": {"blob_id": blob}}
    model = done(zelda.client, zelda.client.post("/api/inference/load-model", json=loading))["resource"]["id"]
    opening = {"model_id": model, "state": {"total": "before"}, "owner": "bob"}
    session = root.post("/api/inference/sessions", json=opening).json()["session_id"]
    answer = zelda.client.delete(f"/api/inference/unload-model/{model}")
    assert "1 open sessions" in refused(answer, 409, "model_in_use")["detail"]
    assert session not in answer.text
    assert session in root.delete(f"/api/inference/unload-model/{model}").text
    done(root, root.delete(f"/api/inference/sessions/{session}"))


# ---- a session's beginning


def test_a_session_begins_with_what_lies_in_ones_own_allocation(bob: Things) -> None:
    allocation, session = _session_over(bob, "begins-here", 5.0)
    assert _run(bob, session)["result"]["outputs"]["total"]["data"] == [5.0 + 1.0 + 0.25]
    done(bob.client, bob.client.delete(f"/api/inference/sessions/{session}"))
    done(bob.client, bob.client.delete(f"/api/memory/deallocate/{allocation}"))


def test_a_session_begins_with_no_allocation_that_is_too_short(bob: Things) -> None:
    done(bob.client, bob.client.post("/api/memory/allocate", json={"size_bytes": 2, "allocation_id": "short"}))
    opening = _opening(bob, {"dtype": "float32", "shape": [1], "allocation_id": "short"})
    refused(bob.client.post("/api/inference/sessions", json=opening), 422, "out_of_range")


def test_a_session_does_not_begin_with_what_another_owner_put_under_the_id_since(
    owned: RunningStack, zelda: Things, bob: Things
) -> None:
    allocation, session = _session_over(bob, "changes-hands", 5.0)
    done(bob.client, bob.client.delete(f"/api/memory/deallocate/{allocation}"))
    # As after JOBS__RETENTION_DAYS: the id is anybody's again.
    with contextlib.closing(psycopg2.connect(owned.database_url)) as connection, connection, connection.cursor() as at:
        at.execute("DELETE FROM allocations WHERE allocation_id = %s AND state = 'freed'", [allocation])
    secret = {"shape": [1], "dtype": "float32", "fill": 0x42, "allocation_id": allocation}
    done(zelda.client, zelda.client.post("/api/memory/allocate", json=secret))
    assert _run(bob, session, "failed")["error"]["code"] == "allocation_not_found"
    done(bob.client, bob.client.delete(f"/api/inference/sessions/{session}"))


def _session_over(things: Things, allocation: str, value: float) -> tuple[str, str]:
    """The ids of an allocation that holds one number and of a session that is to begin with it."""
    import struct

    made = things.client.post("/api/memory/allocate", json={"size_bytes": 4, "allocation_id": allocation})
    done(things.client, made)
    written = things.client.put(f"/api/memory/data/{allocation}", content=struct.pack("<f", value))
    done(things.client, written)
    tensor = {"dtype": "float32", "shape": [1], "allocation_id": allocation}
    answer = things.client.post("/api/inference/sessions", json=_opening(things, tensor))
    assert answer.status_code == 201, answer.text
    return allocation, str(answer.json()["session_id"])


def _opening(things: Things, tensor: dict[str, Any]) -> dict[str, Any]:
    return {"model_id": things.ids["model"], "state": {"total": "before"}, "initial": {"before": tensor}}


def _run(things: Things, session: str, state: str = "succeeded") -> dict[str, Any]:
    running = {"session_id": session, "inputs": {"x": FLOATS}}
    return done(things.client, things.client.post("/api/inference/run", json=running), state)
