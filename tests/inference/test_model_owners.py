"""Whose a model is: others find and run it only where it is shared, and change it never."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import celery
import httpx
import numpy as np
import pytest

from tests.inference import graphs
from tests.inference.conftest import Api, as_tensor
from tests.inference.test_model_names import answer, index, memory, statistics
from tests.support.databases import Databases
from tests.support.stack import RunningStack, eventually

KEYS = "ada:key-of-ada,bob:key-of-bob,root:key-of-root:admin"
ONES = np.ones((1, 4), np.float32)

Of = Callable[[str], Api]


@pytest.fixture(scope="module")
def of(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Of]:
    """The inference routes as one owner sees them."""
    with databases.migrated() as url, ExitStack() as closing:
        folder = tmp_path_factory.mktemp("owners")
        running = RunningStack(folder, url, databases.redis_url(), "cpu:1", settings={"API_KEYS": KEYS})
        closing.callback(running.close)
        running.start()
        running.wait_ready()

        def seen_by(owner: str) -> Api:
            api = Api(running)
            headers = {"X-API-Key": f"key-of-{owner}"}
            api.http = closing.enter_context(
                httpx.Client(base_url=running.http_url, headers=headers, timeout=60, trust_env=False)
            )
            return api

        yield seen_by


def run(api: Api, **which: str) -> httpx.Response:
    return api.post("/api/inference/run", {"inputs": {"x": as_tensor(ONES)}, **which})


def told(response: httpx.Response, *names: str) -> tuple[int, str]:
    """Status and words, with the ids and names that were asked for taken out."""
    body = response.json()
    words = str(body.get("detail") or body.get("error"))
    for name in names:
        words = words.replace(name, "…")
    return response.status_code, words


def test_anothers_model_is_told_as_one_that_does_not_exist(of: Of) -> None:
    ada, bob = of("ada"), of("bob")
    mine = ada.load(graphs.affine(33), "private")["model_id"]
    infer = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}]}

    def asked(model_id: str, name: str) -> list[tuple[int, str]]:
        http = bob.http
        answers = [
            http.get(f"/api/inference/models/{model_id}"),
            http.delete(f"/api/inference/unload-model/{model_id}"),
            http.delete(f"/api/inference/unload-model/{model_id}", params={"force": True}),
            run(bob, model_id=model_id),
            run(bob, model_name=name),
            http.post("/api/inference/sessions", json={"model_id": model_id}),
            http.post("/api/inference/sessions", json={"model_name": name}),
            http.get(f"/v2/models/{name}"),
            http.get(f"/v2/models/{name}/versions/1"),
            http.get(f"/v2/models/{name}/ready"),
            http.get(f"/v2/models/{name}/config"),
            http.get(f"/v2/models/{name}/stats"),
            http.post(f"/v2/models/{name}/infer", json=infer),
            http.post(f"/v2/repository/models/{name}/unload", json={}),
            *(
                http.post("/api/jobs", json={"jobs": [{"kind": kind, "request": request}]})
                for kind, request in (
                    ("inference.run", {"model_id": model_id, "inputs": {"x": as_tensor(ONES)}}),
                    ("inference.run", {"model_name": name, "inputs": {"x": as_tensor(ONES)}}),
                    ("inference.unload_model", {"model_id": model_id, "force": True}),
                )
            ),
        ]
        return [told(one, model_id, name) for one in answers]

    theirs = asked(mine, "private")
    assert {status for status, _ in theirs} == {404}
    assert theirs == asked("01890000-0000-7000-8000-000000000000", "nothing")
    assert mine not in [model["model_id"] for model in bob.http.get("/api/inference/models").json()["models"]]
    assert index(bob, "private") == []
    assert "private" not in [one["name"] for one in bob.http.get("/v2/models/stats").json()["model_stats"]]
    assert answer(ada, "private") == 34
    ada.unload(mine)
    # What became of it is not told either.
    assert told(bob.http.get(f"/api/inference/models/{mine}"), mine) == theirs[0]
    assert told(run(bob, model_id=mine), mine) == theirs[3]
    assert told(bob.http.delete(f"/api/inference/unload-model/{mine}"), mine) == theirs[1]


def test_two_owners_use_one_name_and_one_graph_without_touching_each_other(of: Of) -> None:
    ada, bob, root = of("ada"), of("bob"), of("root")
    content = graphs.affine(33)
    before = memory(root)["reserved_bytes"]
    mine = ada.load(content, "common")
    reserved = memory(root)["reserved_bytes"]
    his = bob.load(content, "common")
    assert his["model_id"] != mine["model_id"]
    assert memory(root)["reserved_bytes"] == reserved
    # Bob sees what he would see alone: his model has its memory, and no other is listed for it.
    seen = memory(bob)
    (his_thing,) = [one for one in seen["map"] if one["id"] == his["model_id"]]
    assert his_thing["size_bytes"] == his["memory_bytes"]
    assert sum(one["size_bytes"] for one in seen["map"]) == seen["used_bytes"]
    assert seen["by_owner"]["bob"] == his["memory_bytes"]
    assert {one["size_bytes"] for one in memory(root)["map"] if one["label"] == "common"} == {his["memory_bytes"], 0}

    changed = bob.load(graphs.affine(44), "common", pin=True)
    assert (answer(ada, "common"), answer(bob, "common")) == (34, 45)
    kept = ada.model(mine["model_id"])
    assert (kept["replaced_by"], kept["pinned"]) == (None, False)
    bob.load(content, "common", options={"max_batch_size": 1})
    assert ada.load(content, "common")["model_id"] == mine["model_id"]
    assert ada.model(mine["model_id"])["options"]["max_batch_size"] is None
    assert statistics(ada, "common") == [("common", "1", ada.model(mine["model_id"])["run_count"])]
    assert index(ada, "common") == [("common", "1", "READY")]
    assert bob.http.post("/v2/repository/models/common/unload", json={}).status_code == 200
    assert answer(ada, "common") == 34
    assert told(run(bob, model_name="common"))[0] == 404
    assert ada.unload(mine["model_id"])["state"] == "succeeded"
    assert bob.model(changed["model_id"])["owner"] == "bob"

    eventually(lambda: memory(root)["reserved_bytes"] == before)  # what was replaced leaves a little later


def test_a_shared_model_is_run_and_read_by_all_and_changed_by_its_owner(of: Of) -> None:
    ada, bob, root = of("ada"), of("bob"), of("root")
    content = graphs.affine(51)
    model_id = ada.load(content, "open", shared=True)["model_id"]
    assert bob.model(model_id)["shared"] is True
    assert model_id in [model["model_id"] for model in bob.http.get("/api/inference/models").json()["models"]]
    assert answer(bob, "open") == 52
    assert run(bob, model_id=model_id).json()["state"] == "succeeded"
    assert index(bob, "open") == [("open", "1", "READY")]
    assert bob.http.get("/v2/models/open/ready").status_code == 200
    assert statistics(bob, "open")
    opened = bob.http.post("/api/inference/sessions", json={"model_name": "open"})
    assert opened.status_code == 201, opened.text
    for refused in (
        bob.http.delete(f"/api/inference/unload-model/{model_id}", params={"force": True}),
        bob.http.post("/v2/repository/models/open/unload", json={}),
    ):
        assert refused.status_code == 404
    # Its owner learns that sessions keep it, and not which.
    busy = ada.http.delete(f"/api/inference/unload-model/{model_id}")
    assert (busy.status_code, busy.json()["code"]) == (409, "model_in_use")
    assert opened.json()["session_id"] not in busy.text
    bob.http.delete(f"/api/inference/sessions/{opened.json()['session_id']}", headers={"Prefer": "wait=10"})

    # Bob's own of the name comes first for Bob only.
    own = bob.load(graphs.affine(61), "open")["model_id"]
    assert (answer(bob, "open"), answer(ada, "open"), answer(root, "open")) == (62, 52, 52)
    pinned = bob.load(content, "open", version="9", pin=True, shared=True)["model_id"]
    assert not ada.model(model_id)["pinned"]
    bob.unload(own)
    bob.unload(pinned)
    assert answer(bob, "open") == 52
    assert ada.load(content, "open", shared=False)["model_id"] == model_id
    assert told(run(bob, model_name="open"))[0] == 404
    assert told(run(bob, model_id=model_id))[0] == 404
    ada.unload(model_id)


def test_an_admin_runs_and_unloads_anybodys_and_acts_for_an_owner(of: Of) -> None:
    ada, bob, root = of("ada"), of("bob"), of("root")
    mine = ada.load(graphs.affine(71), "hers")["model_id"]
    assert answer(root, "hers") == 72
    bob.load(graphs.affine(72), "hers", shared=True)
    assert answer(root, "hers") == 73  # what is shared comes before what is not
    for_ada = run(root, model_name="hers", job={"owner": "ada"}).json()  # type: ignore[arg-type]
    assert root.arrays(for_ada)["y"][0, 0] == 72
    made = root.load(graphs.affine(73), "hers", job={"owner": "ada"})["model_id"]
    assert ada.model(made)["owner"] == "ada"
    assert answer(ada, "hers") == 74
    assert ada.model(mine)["replaced_by"] == made
    own = root.load(graphs.affine(74), "hers", shared=False)["model_id"]
    assert answer(root, "hers") == 75
    assert root.http.post("/v2/repository/models/hers/unload", json={}).status_code == 200
    assert root.model(own)["state"] == "unloaded"
    assert (answer(ada, "hers"), answer(bob, "hers")) == (74, 73)
    assert root.unload(made, force=True)["state"] == "succeeded"
    # Of hers none is left: the name means what Bob shares.
    assert answer(ada, "hers") == 73
    assert root.http.post("/v2/repository/models/hers/unload", json={}).status_code == 200
    assert index(root, "hers") == []


def test_what_an_admins_key_loads_is_for_all_unless_it_says_otherwise(of: Of) -> None:
    ada, root = of("ada"), of("root")
    model_id = root.load(graphs.affine(91), "for-all")["model_id"]
    assert answer(ada, "for-all") == 92
    assert ada.model(model_id)["shared"] is True
    assert ada.http.delete(f"/api/inference/unload-model/{model_id}").status_code == 404
    assert root.load(graphs.affine(91), "for-all", shared=False)["model_id"] == model_id
    assert run(ada, model_name="for-all").status_code == 404
    # Loaded for an owner, it is that owner's alone, as is what a key without such rights loads.
    for loaded in (root.load(graphs.affine(92), "hers", job={"owner": "ada"}), ada.load(graphs.affine(93), "hers-too")):
        assert ada.model(loaded["model_id"])["shared"] is False
        assert of("bob").http.get(f"/api/inference/models/{loaded['model_id']}").status_code == 404
        ada.unload(loaded["model_id"])
    root.unload(model_id)


def test_a_message_acts_for_the_owner_that_it_names(of: Of) -> None:
    ada, bob = of("ada"), of("bob")
    loaded = [ada.load(graphs.affine(81), "sent"), bob.load(graphs.affine(82), "sent", shared=True)]
    app = celery.Celery(broker=ada.stack.redis_url, backend=ada.stack.redis_url)

    def sent(**job: Any) -> float:
        request = {"model_name": "sent", "inputs": {"x": as_tensor(ONES)}, "job": job}
        task = app.send_task(
            "device_operations.inference.run", kwargs={"request": request}, queue="device.cpu_0", ignore_result=False
        )
        return float(task.get(timeout=30)["outputs"]["y"]["data"][0])

    assert [sent(owner="ada"), sent(owner="bob"), sent(owner="carol")] == [82, 83, 83]
    for api, model in zip((ada, bob), loaded, strict=True):
        api.unload(model["model_id"])
    app.close()
