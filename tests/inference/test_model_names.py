"""A name is a model, a graph is memory: what shares a graph lives and dies apart, and loading again is what holds."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg2
import pytest

from device_operations.jobs import Kind
from device_operations.requests.kinds import parse
from device_operations.settings import Settings
from tasks.blobs.store import BlobStore
from tasks.database import open_engine
from tasks.devices.directory import Directory
from tasks.jobs import submit
from tasks.planning.context import Context
from tasks.planning.planner import plan
from tasks.redis.publish import Publisher, connect
from tests.inference import graphs
from tests.inference.conftest import Api, as_tensor
from tests.support.stack import eventually

ONES = np.ones((1, 4), np.float32)


def answer(api: Api, name: str, version: str | None = None) -> float:
    """The first number that the model of that name gives for ones, over /v2; a version only where one is given."""
    where = f"/v2/models/{name}" + ("" if version is None else f"/versions/{version}")
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}
    told = api.http.post(f"{where}/infer", json={"inputs": [tensor]})
    assert told.status_code == 200, told.text
    return float(told.json()["outputs"][0]["data"][0])


def memory(api: Api, device_id: str = "cpu_0") -> dict[str, Any]:
    return api.http.get(f"/api/memory/device/{device_id}", params={"map": True}).json()


def statistics(api: Api, name: str, version: str | None = None) -> list[tuple[str, str, int]]:
    where = f"/v2/models/{name}" + ("" if version is None else f"/versions/{version}")
    told = api.http.get(f"{where}/stats").json()["model_stats"]
    return [(one["name"], one["version"], one["inference_count"]) for one in told]


def index(api: Api, *names: str) -> list[tuple[str, str, str]]:
    told = api.http.post("/v2/repository/index", json={}).json()
    return sorted((one["name"], one["version"], one["state"]) for one in told if one["name"] in names)


def opened_graphs(api: Api) -> list[str]:
    """The content keys of the graphs that the worker has opened, in order."""
    lines = [json.loads(line) for line in api.stack.log("cpu_0").splitlines() if '"graph opened"' in line]
    return [line["content_key"] for line in lines]


def gone(api: Api, model_id: str) -> dict[str, Any]:
    """The model, once it has been unloaded."""
    return eventually(lambda: (told := api.model(model_id))["state"] == "unloaded" and told)


def test_equal_bytes_under_two_names_cost_memory_once_and_die_apart(api: Api) -> None:
    # The first model of a process pages in ONNX Runtime's library, whose pages stay: they are not what is counted here.
    api.unload(api.load(graphs.affine(2.0), "first")["model_id"])
    megabytes = 24
    content = graphs.heavy(megabytes)
    before = memory(api)
    stage = api.load(content, "stage")
    with_one = memory(api)
    prod = api.load(content, "prod")
    with_both = memory(api)
    assert prod["model_id"] != stage["model_id"]
    for figure in ("reserved_bytes", "models_bytes", "used_bytes"):
        assert with_one[figure] - before[figure] == stage["memory_bytes"]
        assert with_both[figure] == with_one[figure]
    assert with_both["by_owner"] == with_one["by_owner"]
    lying = {one["label"]: one["size_bytes"] for one in with_both["map"] if one["type"] == "model"}
    assert (lying["stage"], lying["prod"]) == (stage["memory_bytes"], 0)
    assert index(api, "stage", "prod") == [("prod", "1", "READY"), ("stage", "1", "READY")]
    x = np.zeros((1, 1024), np.float32)
    api.outputs(None, {"x": x}, model_name="prod")
    assert eventually(lambda: statistics(api, "prod") == [("prod", "1", 1)])
    assert statistics(api, "stage") == [("stage", "1", 0)]

    assert api.unload(stage["model_id"])["result"]["freed_bytes"] == 0
    assert api.model(stage["model_id"])["freed_bytes"] == 0
    assert memory(api)["reserved_bytes"] == with_both["reserved_bytes"]
    api.outputs(None, {"x": x}, model_name="prod")
    assert index(api, "stage", "prod") == [("prod", "1", "READY")]
    refused = api.post("/api/inference/run", {"model_name": "stage", "inputs": {"x": as_tensor(x)}})
    assert (refused.status_code, refused.json()["code"]) == (404, "model_not_found")
    freed = api.unload(prod["model_id"])["result"]["freed_bytes"]
    assert freed > max(0.95 * stage["memory_bytes"], megabytes * 2**20)
    after = memory(api)
    assert (after["reserved_bytes"], after["models_bytes"]) == (before["reserved_bytes"], before["models_bytes"])


def test_a_name_that_is_loaded_again_rolls_forward_and_back(api: Api) -> None:
    before = memory(api)["reserved_bytes"]
    ids = []
    for scale in (33, 44, 33):
        path = api.save(graphs.affine(scale), "rolled.onnx")
        job = api.post("/api/inference/load-model", {"name": "rolled", "source": {"path": path}}).json()
        assert job["state"] == "succeeded", job["error"]
        ids.append(job["resource"]["id"])
        assert answer(api, "rolled") == scale + 1
        assert api.arrays(api.run(None, {"x": ONES}, model_name="rolled"))["y"][0, 0] == scale + 1
    assert len(set(ids)) == 3
    assert [gone(api, model_id)["replaced_by"] for model_id in ids[:2]] == ids[1:]
    refused = api.post("/api/inference/run", {"model_id": ids[0], "inputs": {"x": as_tensor(ONES)}})
    assert (refused.status_code, refused.json()["code"]) == (404, "model_not_found")
    assert "replaced" in refused.json()["detail"]
    assert ids[1] in refused.json()["detail"]
    assert answer(api, "rolled") == 34
    assert index(api, "rolled") == [("rolled", "1", "READY")]
    assert statistics(api, "rolled") == [("rolled", "1", eventually(lambda: api.model(ids[2])["run_count"]))]
    api.unload(ids[2])
    assert memory(api)["reserved_bytes"] == before


def test_a_file_that_keeps_its_size_and_its_time_is_read_anew(api: Api) -> None:
    stamps = None
    for scale in (51, 52, 51):
        path = api.save(graphs.affine(scale), "dated.onnx")
        if stamps is not None:
            os.utime(api.models / path, ns=stamps)  # as `cp -p` and unpacking an archive do
        about = (api.models / path).stat()
        stamps = (about.st_atime_ns, about.st_mtime_ns)
        api.post("/api/inference/load-model", {"name": "dated", "source": {"path": path}})
        assert answer(api, "dated") == scale + 1


def test_later_options_hold_and_the_graph_stays(api: Api) -> None:
    content = graphs.affine(61)
    first = api.load(content, "optioned")
    alone = api.load(content, "optioned", options={"max_batch_size": 1, "max_delay_ms": 3})
    assert alone["model_id"] != first["model_id"]
    told = api.model(alone["model_id"])
    assert (told["options"]["max_batch_size"], told["options"]["max_delay_ms"]) == (1, 3)
    assert told["load_ms"] == first["load_ms"]  # the graph is the same one
    assert not told["batching"]["enabled"]
    body = {"model_name": "optioned", "inputs": {"x": as_tensor(ONES)}}
    jobs = api.http.post("/api/jobs", json={"jobs": [{"kind": "inference.run", "request": body}] * 20}).json()["jobs"]
    assert {api.job(job["job_id"])["result"]["batch_size"] for job in jobs} == {1}
    config = api.http.get("/v2/models/optioned/config").json()
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 3000
    assert config["parameters"]["device_operations"]["string_value"] == alone["model_id"]
    shaped = api.load(content, "optioned", options={"graph_optimization": "disable"})
    assert shaped["load_ms"] != first["load_ms"]  # what shapes the session makes another graph
    assert answer(api, "optioned") == 62
    assert gone(api, first["model_id"])["replaced_by"] == alone["model_id"]
    assert gone(api, alone["model_id"])["replaced_by"] == shaped["model_id"]


def test_loading_the_same_again_is_the_same_model_and_what_it_says_of_pin_and_shared_holds(api: Api) -> None:
    content = graphs.affine(62)
    model_id = api.load(content, "same")["model_id"]
    told = [(api.model(model_id)["pinned"], api.model(model_id)["shared"])]
    for more in ({"pin": True}, {}, {"shared": True}, {"pin": False}, {"shared": False}):
        assert api.load(content, "same", **more)["model_id"] == model_id
        told.append((api.model(model_id)["pinned"], api.model(model_id)["shared"]))
    assert told == [(False, False), (True, False), (True, False), (True, True), (False, True), (False, False)]
    # A number is the same however it is written.
    assert api.load(content, "same", options={"max_delay_ms": 0.0})["model_id"] == model_id


def test_versions_of_a_name_stand_side_by_side(api: Api) -> None:
    one = api.load(graphs.affine(71), "versions", version="1")
    two = api.load(graphs.affine(72), "versions", version="2")
    assert [answer(api, "versions", version) for version in (None, "1", "2")] == [73, 72, 73]
    assert api.http.get("/v2/models/versions").json()["versions"] == ["1", "2"]
    assert index(api, "versions") == [("versions", "1", "READY"), ("versions", "2", "READY")]
    # The last load is what the name means, also where it is that of a lower version.
    anew = api.load(graphs.affine(73), "versions", version="1")
    assert [answer(api, "versions", version) for version in (None, "1", "2")] == [74, 74, 73]
    assert eventually(lambda: statistics(api, "versions") == [("versions", "1", 2), ("versions", "2", 3)])
    assert statistics(api, "versions", "2") == [("versions", "2", 3)]
    assert gone(api, one["model_id"])["replaced_by"] == anew["model_id"]
    api.unload(anew["model_id"])
    assert answer(api, "versions") == 73
    assert api.http.get("/v2/models/versions/versions/1/ready").status_code == 404
    assert api.http.get("/v2/models/versions/ready").status_code == 200
    assert api.http.get("/v2/models/versions").json()["versions"] == ["2"]
    # By the repository, all versions go.
    api.load(graphs.affine(71), "versions", version="3")
    assert api.http.post("/v2/repository/models/versions/unload", json={}).status_code == 200
    assert api.model(two["model_id"])["state"] == "unloaded"
    assert index(api, "versions") == []


def test_a_load_that_fails_leaves_the_name_what_it_meant(api: Api) -> None:
    kept = api.load(graphs.affine(81), "kept")
    job = api.load_job(b"no model", "kept")
    assert job["state"] == "failed"
    assert answer(api, "kept") == 82
    assert api.model(kept["model_id"])["replaced_by"] is None
    job = api.load_job(b"no model", "kept", version="2")
    assert answer(api, "kept") == 82


def test_while_a_load_is_under_way_the_name_means_what_it_meant(api: Api) -> None:
    api.load(graphs.affine(83), "meanwhile")
    slow_id = api.load(graphs.slow(800), "slow-before")["model_id"]
    blocking = api.run(slow_id, {"x": np.zeros((512, 512), np.float32)}, wait=0)
    path = api.save(graphs.affine(84))
    loading = api.post(
        "/api/inference/load-model", {"name": "meanwhile", "version": "2", "source": {"path": path}}, wait=0
    ).json()
    eventually(lambda: ("meanwhile", "2", "LOADING") in index(api, "meanwhile"))  # the gateway knows of it
    run = api.run(None, {"x": ONES}, model_name="meanwhile", job={"priority": 9})
    assert api.arrays(run)["y"][0, 0] == 84
    api.http.delete(f"/api/jobs/{blocking['job_id']}")
    assert api.job(loading["job_id"])["state"] == "succeeded"
    assert answer(api, "meanwhile") == 85


def test_runs_that_were_submitted_keep_the_model_that_they_were_submitted_to(api: Api) -> None:
    content = graphs.busy(200, 256)
    old = api.load(content, "busy", options={"max_batch_size": 1})["model_id"]
    x = as_tensor(np.zeros((1, 256, 256), np.float32))
    runs = [api.run(None, {"x": x}, wait=0, model_name="busy", job={"priority": 1}) for _ in range(12)]
    new = api.load(graphs.affine(91), "busy", job={"priority": 9})["model_id"]
    assert answer(api, "busy") == 92
    ended = [api.job(job["job_id"]) for job in runs]
    assert [job["state"] for job in ended] == ["succeeded"] * 12
    assert gone(api, old)["replaced_by"] == new
    assert eventually(lambda: api.model(old)["run_count"] == 12)


def test_a_name_can_be_run_at_any_moment_of_its_replacement(api: Api) -> None:
    api.load(graphs.affine(1), "always")
    wrong: list[str] = []
    over = threading.Event()

    def ask() -> None:
        last = 0.0
        while not over.is_set():
            try:
                got = answer(api, "always")
            except AssertionError as error:
                wrong.append(str(error))
                return
            if got < last:
                wrong.append(f"{got} after {last}")
            last = got

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for scale in range(2, 9):
            api.load(graphs.affine(scale), "always", pin=True)
            time.sleep(0.5)  # so that some replaced ones leave meanwhile
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong
    # Pinned as they were, those that were replaced have left.
    models = api.http.get("/api/inference/models", params={"limit": 200}).json()["models"]
    ids = [model["model_id"] for model in models if model["name"] == "always"]
    assert len(ids) == 8
    eventually(lambda: sorted(api.model(one)["state"] for one in ids) == ["loaded"] + ["unloaded"] * 7)
    api.unload(ids[0])


def test_a_run_that_was_being_planned_while_its_model_was_replaced_still_finds_it(
    api: Api, settings: Callable[..., Settings]
) -> None:
    old = api.load(graphs.affine(85), "planned")["model_id"]
    mine = settings(DATABASE_URL=api.stack.database_url, DATA_DIR=api.stack.folder / "data")
    engine = open_engine(api.stack.database_url)
    with contextlib.closing(connect(api.stack.redis_url)) as client:
        context = Context(engine, mine, Directory(engine, mine), BlobStore(str(mine.blobs.url)), "default", admin=True)
        request = parse(Kind.INFERENCE_RUN, {"model_name": "planned", "inputs": {"x": as_tensor(ONES)}})
        made = plan(context, Kind.INFERENCE_RUN, request)
        assert made.job.needs == [old]
        api.load(graphs.affine(86), "planned")
        time.sleep(1.5)  # longer than a gateway's knowledge of names is used, and than a worker's look at what may go
        submit.submit(engine, Publisher(client), [made])
    engine.dispose()
    job = api.job(made.job.id)
    assert job["state"] == "succeeded", job["error"]
    assert api.arrays(job)["y"][0, 0] == 86
    gone(api, old)


def test_a_session_keeps_its_model_until_it_is_closed(api: Api) -> None:
    old = api.load(graphs.counter(), "talked-to")["model_id"]
    opened = api.http.post(
        "/api/inference/sessions", json={"model_name": "talked-to", "state": {"total": "before"}}
    ).json()
    one = np.ones(1, np.float32)
    assert api.outputs(None, {"x": one}, session_id=opened["session_id"])["total"][0] == 1
    new = api.load(graphs.affine(93), "talked-to")["model_id"]
    assert answer(api, "talked-to") == 94
    time.sleep(3)  # as long as it would have stayed without the session, and more
    assert api.outputs(None, {"x": one}, session_id=opened["session_id"])["total"][0] == 2
    assert api.model(old)["state"] == "loaded"
    refused = api.http.post("/api/inference/sessions", json={"model_id": old})
    assert (refused.status_code, refused.json()["code"]) == (404, "model_not_found")
    api.http.delete(f"/api/inference/sessions/{opened['session_id']}", headers={"Prefer": "wait=10"})
    assert gone(api, old)["replaced_by"] == new


def test_of_several_loads_in_one_submission_the_last_holds(api: Api) -> None:
    sources = [api.save(graphs.affine(scale)) for scale in (95, 96, 97)]
    jobs = [
        {"kind": "inference.load_model", "request": {"name": "bulk", "source": {"path": path}, "job": {"priority": n}}}
        for n, path in zip((1, 5, 3), sources, strict=True)
    ]
    told = api.http.post("/api/jobs", json={"jobs": jobs}).raise_for_status().json()["jobs"]
    assert [api.job(job["job_id"])["state"] for job in told] == ["succeeded"] * 3
    assert answer(api, "bulk") == 98
    for job in told[:2]:
        assert gone(api, job["resource"]["id"])["replaced_by"]


def test_equal_loads_in_one_submission_are_one_load_and_their_order_holds(api: Api) -> None:
    one, other = (api.save(graphs.affine(scale)) for scale in (105, 106))
    entries = [{"name": "bulk-again", "source": {"path": path}} for path in (one, other, one)]
    entries[2]["pin"] = True
    jobs = [{"kind": "inference.load_model", "request": entry} for entry in entries]
    told = api.http.post("/api/jobs", json={"jobs": jobs}).raise_for_status().json()["jobs"]
    assert told[2]["job_id"] == told[0]["job_id"]
    assert [api.job(job["job_id"])["state"] for job in told] == ["succeeded"] * 3
    assert answer(api, "bulk-again") == 106
    assert api.model(told[0]["resource"]["id"])["pinned"]
    assert gone(api, told[1]["resource"]["id"])["replaced_by"] == told[0]["resource"]["id"]


def test_an_unload_of_one_name_leaves_the_load_of_another_that_waits(api: Api) -> None:
    content = graphs.affine(98)
    first = api.load(content, "one-name")["model_id"]
    slow_id = api.load(graphs.slow(400), "slow-again")["model_id"]
    api.run(slow_id, {"x": np.zeros((512, 512), np.float32)}, wait=0)
    unloading = api.http.delete(f"/api/inference/unload-model/{first}").json()
    other = api.load(content, "other-name")
    assert api.job(unloading["job_id"])["state"] == "succeeded"
    assert answer(api, "other-name") == 99
    assert api.model(first)["state"] == "unloaded"
    api.unload(other["model_id"])


@pytest.mark.slow
def test_a_name_means_the_same_on_every_device(start_api: Callable[..., Api]) -> None:
    api = start_api(devices="cpu:2")
    old = api.load(graphs.affine(33), "spread", device_id="cpu_0")["model_id"]
    new = api.load(graphs.affine(44), "spread", device_id="cpu_1")["model_id"]
    assert {answer(api, "spread") for _ in range(10)} == {45}
    assert gone(api, old)["replaced_by"] == new
    # The same on another device stays, and both are one entry of the index and of the statistics.
    twin = api.load(graphs.affine(44), "spread", device_id="cpu_0")["model_id"]
    assert twin not in (old, new)
    assert {answer(api, "spread") for _ in range(10)} == {45}
    assert index(api, "spread") == [("spread", "1", "READY")]
    assert eventually(lambda: statistics(api, "spread") == [("spread", "1", 20)])
    assert [api.model(one)["state"] for one in (new, twin)] == ["loaded", "loaded"]
    again = api.load(graphs.affine(33), "spread", device_id="cpu_1")["model_id"]
    assert {answer(api, "spread") for _ in range(10)} == {34}
    assert {gone(api, one)["replaced_by"] for one in (new, twin)} == {again}
    assert memory(api, "cpu_0")["reserved_bytes"] == 0


def test_all_models_come_back_and_each_graph_is_opened_once(start_api: Callable[..., Api]) -> None:
    api = start_api(LEASE_SECONDS=2)
    content, shaped = graphs.affine(33), {"graph_optimization": "basic"}
    kept = [
        api.load(content, "stage", pin=True)["model_id"],
        api.load(content, "prod", options={"max_batch_size": 1})["model_id"],
        api.load(content, "prod", version="2", options=shaped)["model_id"],
        api.load(graphs.affine(44), "stage", version="2")["model_id"],
    ]
    replaced = api.load(graphs.affine(55), "rolled")["model_id"]
    kept.append(api.load(content, "rolled")["model_id"])
    before = memory(api)
    opened = opened_graphs(api)
    assert len(opened) == 4
    api.stack.kill("cpu_0")
    api.stack.start("cpu_0")
    api.stack.wait_ready()
    eventually(lambda: [api.model(one)["state"] for one in kept] == ["loaded"] * 5)
    gone(api, replaced)
    anew = opened_graphs(api)[4:]
    # The one that was replaced comes back for a moment, where it was replaced just before.
    assert len(anew) == len(set(anew))
    assert len(set(anew) - {opened[3]}) == 3
    told = {"stage": 45, "prod": 34, "rolled": 34}
    assert {name: answer(api, name) for name in told} == told
    assert answer(api, "stage", "1") == 34
    assert api.model(kept[0])["pinned"]
    assert api.model(kept[1])["options"]["max_batch_size"] == 1
    after = memory(api)
    assert after["reserved_bytes"] == after["models_bytes"] < before["reserved_bytes"]
    for model_id in kept:
        api.unload(model_id)
    assert (memory(api)["reserved_bytes"], memory(api)["map"]) == (0, [])


def test_what_is_read_from_a_file_that_has_changed_does_not_come_back_as_another(
    start_api: Callable[..., Api],
) -> None:
    api = start_api(LEASE_SECONDS=2)
    path = api.save(graphs.affine(33), "changing.onnx")
    model_id = api.post("/api/inference/load-model", {"name": "v", "source": {"path": path}}).json()["resource"]["id"]
    blob = api.http.post("/api/blobs", content=graphs.affine(33)).json()["blob_id"]
    same = api.post("/api/inference/load-model", {"name": "w", "source": {"blob_id": blob}}).json()["resource"]["id"]
    api.save(graphs.affine(44), "changing.onnx")
    api.stack.kill("cpu_0")
    api.stack.start("cpu_0")
    api.stack.wait_ready()
    failed = eventually(lambda: (told := api.model(model_id))["state"] == "failed" and told)
    assert failed["error"]["code"] == "model_invalid"
    assert "has changed" in failed["error"]["message"]
    eventually(lambda: api.model(same)["state"] == "loaded")
    assert answer(api, "w") == 34


def test_room_is_made_by_whole_graphs_the_least_recently_used_first(start_api: Callable[..., Api]) -> None:
    api = start_api()
    shared, half_pinned, used = graphs.heavy(40), graphs.heavy(41), graphs.heavy(42)
    oldest = [api.load(shared, name)["model_id"] for name in ("a", "b")]
    pinned = [api.load(half_pinned, name, pin=name == "d")["model_id"] for name in ("c", "d")]
    newest = [api.load(used, name)["model_id"] for name in ("e", "f")]
    x = np.zeros((1, 1024), np.float32)
    for model_id in (oldest[0], newest[1]):
        api.outputs(model_id, {"x": x}, outputs=["y"])
        eventually(lambda model_id=model_id: api.model(model_id)["run_count"] == 1)
    reserved = memory(api)["reserved_bytes"]
    connection = psycopg2.connect(api.stack.database_url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("UPDATE device_budgets SET budget_bytes = reserved_bytes + %s", (16 * 2**20,))
    connection.close()
    # More than all that could go: each graph counts once, and one with a pinned model not at all.
    refused = api.post("/api/inference/load-model", {"name": "g", "source": {"path": api.save(graphs.heavy(100))}})
    assert (refused.status_code, refused.json()["code"]) == (507, "insufficient_memory")
    evictable = sum(api.model(models[0])["memory_bytes"] for models in (oldest, newest))
    assert evictable == int(refused.json()["detail"].split(" in idle")[0].split()[-1])
    assert memory(api)["reserved_bytes"] == reserved
    api.load(graphs.heavy(32), "g")
    states = [[api.model(model_id)["state"] for model_id in models] for models in (oldest, pinned, newest)]
    assert states == [["evicted", "evicted"], ["loaded", "loaded"], ["loaded", "loaded"]]
    freed = eventually(
        lambda: sorted(told for one in oldest if (told := api.model(one)["freed_bytes"]) is not None)[1:]
    )
    assert freed[0] > 0.8 * 40 * 2**20
    for model_id in pinned:
        api.outputs(model_id, {"x": x}, outputs=["y"])


def test_an_idle_model_leaves_the_graph_to_the_one_that_is_used(start_api: Callable[..., Api]) -> None:
    api = start_api(INFERENCE__SESSION_TIMEOUT_MINUTES=0.05)
    content = graphs.affine(33)
    idle, pinned = api.load(content, "idle")["model_id"], api.load(content, "pinned", pin=True)["model_id"]
    reserved = memory(api)["reserved_bytes"]
    assert eventually(lambda: (told := api.model(idle))["state"] == "unloaded" and told)["replaced_by"] is None
    assert eventually(lambda: api.model(idle)["freed_bytes"] is not None)
    assert api.model(idle)["freed_bytes"] == 0
    assert memory(api)["reserved_bytes"] == reserved
    assert answer(api, "pinned") == 34
    assert api.model(pinned)["state"] == "loaded"


@pytest.mark.parametrize("loads", [["33"], ["33", "44"]], ids=["the same", "one after another"])
def test_many_loads_of_one_name_at_once_leave_one_model_and_its_memory(
    start_api: Callable[..., Api], loads: list[str]
) -> None:
    api = start_api()
    paths = [api.save(graphs.affine(float(scale))) for scale in loads]
    jobs: list[dict[str, Any]] = []

    def load(number: int) -> None:
        body = {"name": "raced", "source": {"path": paths[number % len(paths)]}}
        jobs.append(api.post("/api/inference/load-model", body).json())

    threads = [threading.Thread(target=load, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [job.get("state", job) for job in jobs] == ["succeeded"] * 12
    assert len({answer(api, "raced") for _ in range(5)}) == 1

    def left() -> list[dict[str, Any]] | None:
        models = api.http.get("/api/inference/models", params={"state": "loaded"}).json()["models"]
        return models if len(models) == 1 else None

    (model,) = eventually(left)
    assert memory(api)["reserved_bytes"] == model["memory_bytes"]
    api.unload(model["model_id"])
    assert memory(api)["reserved_bytes"] == 0
