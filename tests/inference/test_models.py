"""Models: loaded, shared, inspected, unloaded, evicted, brought back."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import celery
import celery.result
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto

from device_operations.wire.texts import unpack_texts
from tests.inference import graphs
from tests.inference.conftest import Api, as_tensor
from tests.support import models
from tests.support.stack import REPOSITORY, eventually

ROW = np.arange(4, dtype=np.float32).reshape(1, 4)


def test_a_model_loads_runs_and_tells_what_it_is(api: Api) -> None:
    model = api.load(graphs.affine(), "affine")
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert np.array_equal(api.outputs(model["model_id"], {"x": x})["y"], x * 2 + 1)
    assert np.array_equal(api.outputs(None, {"x": x}, model_name="affine")["y"], x * 2 + 1)
    told = api.model(model["model_id"])
    assert told["state"] == "loaded"
    assert told["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["n", 4]}]
    assert told["outputs"] == [{"name": "y", "dtype": "float32", "shape": ["n", 4]}]
    assert told["provider"] == "CPUExecutionProvider"
    assert told["memory_bytes"] > 0
    assert told["load_ms"] > 0
    assert told["batching"]["enabled"]
    assert model["model_id"] in [m["model_id"] for m in api.http.get("/api/inference/models").json()["models"]]
    assert eventually(lambda: api.model(model["model_id"])["run_count"] == 2)
    used = api.model(model["model_id"])
    assert used["statistics"]["executions"] == 2
    assert used["statistics"]["device_ns"] > 0
    assert used["last_used_at"] > told["created_at"]


def test_tensors_come_back_in_the_form_asked_for(api: Api) -> None:
    model_id = api.load(graphs.wide(20_000))["model_id"]
    x = np.random.default_rng(0).standard_normal((1, 20_000)).astype(np.float32)
    for form, key in (("auto", "blob_id"), ("data", "data"), ("base64", "base64"), ("blob", "blob_id")):
        job = api.run(model_id, {"x": x}, form=form)
        assert key in job["result"]["outputs"]["y"]
        assert np.array_equal(api.arrays(job)["y"], x + 1)
    small = api.load(graphs.affine())["model_id"]
    assert "data" in api.run(small, {"x": ROW})["result"]["outputs"]["y"]


def test_much_text_travels_as_bytes(api: Api) -> None:
    model_id = api.load(graphs.everything())["model_id"]
    text = np.array(["ä" * 40_000, "", "z" * 40_000], object)
    inputs = {"text": text, "half": np.zeros((3, 2), np.float16), "flag": np.zeros(3, bool)}
    job = api.run(model_id, inputs, form="data")
    assert job["result"]["outputs"]["text_out"]["data"] == list(text)
    apart = api.run(model_id, inputs)["result"]["outputs"]["text_out"]
    raw = api.http.get(f"/api/blobs/{apart['blob_id']}").content
    assert unpack_texts(raw, 3) == list(text)


def test_a_graph_written_anew_is_another_model_with_the_same_results(api: Api) -> None:
    content = (models.fetch_all() / "rapidocr" / "ch_ppocr_mobile_v2.0_cls_infer.onnx").read_bytes()
    plain, anew = api.load(content, "plain"), api.load(content, "anew", options={"graph_optimization": "rewrite"})
    assert anew["model_id"] != plain["model_id"]
    assert (anew["inputs"], anew["outputs"]) == (plain["inputs"], plain["outputs"])
    x = {"x": np.random.default_rng(3).standard_normal((1, 3, 48, 192), np.float32)}
    (wanted,), (got,) = (api.outputs(one["model_id"], x).values() for one in (plain, anew))
    assert not np.array_equal(got, wanted)  # else nothing would have been written anew
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("number_of_names", [1, 6])
def test_loads_of_one_content_at_the_same_moment_are_one_model_for_each_name(api: Api, number_of_names: int) -> None:
    content = graphs.affine(22.0 + number_of_names)
    path = api.save(content)

    def load(number: int) -> tuple[str, float]:
        name = f"moment-{number_of_names}-{number % number_of_names}"
        answer = api.post("/api/inference/load-model", {"name": name, "source": {"path": path}})
        assert answer.status_code == 200, answer.text
        assert answer.json()["state"] == "succeeded", answer.text
        return answer.json()["resource"]["id"], answer.json()["result"]["load_ms"]

    with ThreadPoolExecutor(6) as pool:
        loaded = list(pool.map(load, range(6)))
    assert len({model_id for model_id, _ in loaded}) == number_of_names
    assert len({load_ms for _, load_ms in loaded}) == 1, "the graph was opened once"


def test_a_run_submitted_while_the_model_loads_waits_for_it(api: Api) -> None:
    path = api.save(graphs.affine(23.0))
    loading = api.post("/api/inference/load-model", {"name": "soon", "source": {"path": path}}, wait=0).json()
    run = api.run(loading["resource"]["id"], {"x": ROW})
    assert run["state"] == "succeeded", run["error"]
    assert np.array_equal(api.arrays(run)["y"], ROW * 23 + 1)


def test_unloading_gives_the_memory_back_and_says_how_much(api: Api) -> None:
    megabytes = 96
    worker = api.stack.process("cpu_0")
    model = api.load(graphs.heavy(megabytes))
    held = worker.memory_info().rss
    reserved = api.http.get("/api/memory/device/cpu_0").json()["reserved_bytes"]
    assert model["memory_bytes"] >= megabytes * 2**20
    job = api.unload(model["model_id"])
    assert job["state"] == "succeeded"
    assert job["result"]["freed_bytes"] > 0.8 * megabytes * 2**20
    assert job["result"]["returns_memory"] is True
    assert held - worker.memory_info().rss > 0.8 * megabytes * 2**20
    told = api.model(model["model_id"])
    assert (told["state"], told["freed_bytes"]) == ("unloaded", job["result"]["freed_bytes"])
    assert reserved - api.http.get("/api/memory/device/cpu_0").json()["reserved_bytes"] == model["memory_bytes"]
    gone = api.http.delete(f"/api/inference/unload-model/{model['model_id']}")
    assert (gone.status_code, gone.json()["code"]) == (404, "model_not_found")


def test_a_load_behind_an_unload_of_the_same_content_loads_it_again(api: Api) -> None:
    content = graphs.affine(24.0)
    model_id = api.load(content, "to-and-fro")["model_id"]
    slow_id = api.load(graphs.slow(600), "slow")["model_id"]
    # The device is busy, so that the unload is still waiting when the load is submitted.
    api.run(slow_id, {"x": np.zeros((512, 512), np.float32)}, wait=0)
    unloading = api.http.delete(f"/api/inference/unload-model/{model_id}").json()
    again = api.load(content, "to-and-fro")
    assert api.job(unloading["job_id"])["state"] == "succeeded"
    assert again["model_id"] == model_id
    assert api.model(model_id)["state"] == "loaded"
    assert np.array_equal(api.outputs(model_id, {"x": ROW})["y"], ROW * 24 + 1)


def test_warm_up_and_free_dimensions(api: Api) -> None:
    model = api.load(graphs.affine(25.0), options={"warmup": True, "free_dimensions": {"n": 1}})
    assert model["inputs"][0]["shape"] == [1, 4]
    assert not model["batching"]["enabled"]
    assert np.array_equal(api.outputs(model["model_id"], {"x": ROW})["y"], ROW * 25 + 1)
    wrong = api.post("/api/inference/run", {
        "model_id": model["model_id"], "inputs": {"x": {"dtype": "float32", "shape": [2, 4], "data": [0] * 8}},
    })  # fmt: skip
    assert wrong.json()["code"] == "input_mismatch"


def test_a_model_in_a_folder_brings_its_external_data(api: Api) -> None:
    api.save(graphs.external("weights.bin"), "apart/model.onnx")
    (api.models / "apart" / "weights.bin").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    answer = api.post("/api/inference/load-model", {"name": "apart", "source": {"path": "apart"}})
    assert answer.json()["state"] == "succeeded", answer.text
    x = np.ones((1, 16), np.float32)
    model_id = answer.json()["resource"]["id"]
    assert api.outputs(model_id, {"x": x})["y"] == 120
    # Other weights under the same graph are another model.
    (api.models / "apart" / "weights.bin").write_bytes(np.ones(16, np.float32).tobytes())
    other = api.post("/api/inference/load-model", {"name": "apart", "source": {"path": "apart"}}).json()
    assert other["resource"]["id"] != model_id
    assert api.outputs(other["resource"]["id"], {"x": x})["y"] == 16


def test_a_model_of_several_blobs(api: Api) -> None:
    weights = np.full(16, 2, np.float32).tobytes()
    blobs = {
        name: api.http.post("/api/blobs", content=content).json()["blob_id"]
        for name, content in {"model.onnx": graphs.external("data/w.bin"), "data/w.bin": weights}.items()
    }
    answer = api.post("/api/inference/load-model", {"name": "blobs", "source": {"blobs": blobs}})
    assert answer.json()["state"] == "succeeded", answer.text
    assert api.outputs(answer.json()["resource"]["id"], {"x": np.ones((1, 16), np.float32)})["y"] == 32
    # A model keeps its blobs.
    assert api.http.delete(f"/api/blobs/{blobs['data/w.bin']}").status_code == 409
    outside = api.post("/api/inference/load-model", {"name": "out", "source": {"blobs": {"../x.onnx": "b"}}})
    assert (outside.status_code, outside.json()["code"]) == (422, "path_not_allowed")


def test_a_model_of_one_blob_cannot_reach_the_blobs_beside_it(api: Api) -> None:
    content = api.http.post("/api/blobs", content=graphs.affine(26.0)).json()["blob_id"]
    loaded = api.post("/api/inference/load-model", {"name": "one", "source": {"blob_id": content}}).json()
    assert np.array_equal(api.outputs(loaded["resource"]["id"], {"x": ROW})["y"], ROW * 26 + 1)
    secret = api.http.post("/api/blobs", content=np.ones(16, np.float32).tobytes()).json()["blob_id"]
    for _ in range(300):  # until both lie in one folder of the store
        if content[-2:] == secret[-2:]:
            break
        secret = api.http.post("/api/blobs", content=np.ones(16, np.float32).tobytes()).json()["blob_id"]
    thief = graphs.external(secret)
    for _ in range(600):
        blob = api.http.post("/api/blobs", content=thief).json()["blob_id"]
        if blob[-2:] == secret[-2:]:
            break
    job = api.post("/api/inference/load-model", {"name": "thief", "source": {"blob_id": blob}}).json()
    assert (job["state"], job["error"]["code"]) == ("failed", "model_invalid")


@pytest.mark.serial
@pytest.mark.slow
def test_a_model_above_two_gigabytes(api: Api) -> None:
    """Its weights lie apart, most of them in the holes of a sparse file."""
    rows, columns = 1024, 540_000
    size = rows * columns * 4
    assert size > 2**31
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[columns, rows], data_location=1)
    for key, value in {"location": "w.bin", "offset": "0", "length": str(size)}.items():
        weight.external_data.add(key=key, value=value)
    content = graphs.build(
        [graphs.node("Gather", "w i", "y", axis=0)],
        [("i", graphs.INT64, ["n"])],
        [("y", graphs.FLOAT, ["n", rows])],
        [weight],
    )
    api.save(content, "big/model.onnx")
    with (api.models / "big" / "w.bin").open("wb") as file:
        file.truncate(size)
        file.seek((columns - 1) * rows * 4)
        file.write(np.full(rows, 5, np.float32).tobytes())
    body = {"name": "big", "source": {"path": "big"}, "options": {"max_batch_size": 1, "graph_optimization": "disable"}}
    answer = api.post("/api/inference/load-model", body, wait=60)
    job = api.job(answer.json()["job_id"], wait=60)
    assert job["state"] == "succeeded", job["error"]
    outputs = api.outputs(job["resource"]["id"], {"i": np.array([0, columns - 1], np.int64)})
    assert outputs["y"][:, 0].tolist() == [0, 5]
    assert job["result"]["memory_bytes"] >= size
    freed = api.unload(job["resource"]["id"])
    assert freed["state"] == "succeeded"
    (api.models / "big" / "w.bin").unlink()


def test_idle_unpinned_models_make_room_the_least_recently_used_first(start_api: Callable[..., Api]) -> None:
    api = start_api()
    size = 40
    pinned, oldest, newer = (api.load(graphs.heavy(size + n), f"heavy-{n}", pin=n == 0)["model_id"] for n in range(3))
    session = api.http.post("/api/inference/sessions", json={"model_id": newer}).json()["session_id"]
    x = np.zeros((1, 1024), np.float32)
    for model_id in (newer, oldest):
        api.outputs(model_id, {"x": x}, outputs=["y"])
    _set_budget(api, free_bytes=16 * 2**20)
    # Room is there once the idle, unpinned one is gone; the other has a session open.
    fourth = api.load(graphs.heavy(32), "fourth")
    states = {name: api.model(model_id)["state"] for name, model_id in
              {"pinned": pinned, "oldest": oldest, "newer": newer, "fourth": fourth["model_id"]}.items()}  # fmt: skip
    assert states == {"pinned": "loaded", "oldest": "evicted", "newer": "loaded", "fourth": "loaded"}
    assert eventually(lambda: api.model(oldest)["freed_bytes"])
    # No more than that can be evicted: 507, and nothing is harmed.
    path = api.save(graphs.heavy(100))
    refused = api.post("/api/inference/load-model", {"name": "fifth", "source": {"path": path}})
    assert (refused.status_code, refused.json()["code"]) == (507, "insufficient_memory")
    assert api.model(fourth["model_id"])["state"] == "loaded"
    api.http.delete(f"/api/inference/sessions/{session}")


def test_models_come_back_after_their_workers_death(start_api: Callable[..., Api]) -> None:
    api = start_api(LEASE_SECONDS=2)
    content = graphs.affine(27.0)
    model_id = api.load(content, "back", pin=True)["model_id"]
    doomed = api.save(graphs.affine(28.0), "doomed.onnx")
    lost = api.post("/api/inference/load-model", {"name": "doomed", "source": {"path": doomed}}).json()["resource"]
    (api.models / "doomed.onnx").write_bytes(b"no longer a model")
    epoch = api.http.get("/api/devices/cpu_0").json()["epoch"]
    api.stack.kill("cpu_0")
    api.stack.start("cpu_0")
    eventually(lambda: api.http.get("/api/devices/cpu_0").json()["epoch"] > epoch)
    assert eventually(lambda: _try(api, model_id)) == (ROW * 27 + 1).tolist()
    assert api.model(model_id)["state"] == "loaded"
    failed = eventually(lambda: (model := api.model(lost["id"]))["state"] == "failed" and model)
    assert failed["error"]["code"] == "model_invalid"
    # The same content is still the same model.
    assert api.load(content, "back")["model_id"] == model_id


def test_two_devices_each_hold_their_models_and_share_the_work(start_api: Callable[..., Api]) -> None:
    api = start_api(devices="cpu:2")
    here = api.load(graphs.affine(30.0), "here", device_id="cpu_1")
    assert here["device_id"] == "cpu_1"
    assert api.run(here["model_id"], {"x": ROW})["device_id"] == "cpu_1"  # a run goes where its model is
    content = graphs.busy(60, 192)
    both = [api.load(content, "both", device_id=name)["model_id"] for name in ("cpu_0", "cpu_1")]
    assert both[0] != both[1]
    request = {"model_name": "both", "inputs": {"x": as_tensor(np.zeros((1, 192, 192), np.float32))}}
    # What the gateway knows of the models is half a second old at most.
    eventually(lambda: len({api.run(None, request["inputs"], model_name="both")["device_id"] for _ in range(4)}) == 2)
    # In one submission, and so placed by one look at the queues: what was placed since the look counts too.
    entries = [{"kind": "inference.run", "request": request}] * 40
    jobs = api.http.post("/api/jobs", json={"jobs": entries}).raise_for_status().json()["jobs"]
    ended = [api.job(job["job_id"]) for job in jobs]
    assert all(job["state"] == "succeeded" for job in ended)
    ran = Counter(job["device_id"] for job in ended)
    assert min(ran["cpu_0"], ran["cpu_1"]) >= 15, ran


@pytest.mark.slow
def test_work_for_any_device_is_shared_and_goes_where_its_model_is(start_api: Callable[..., Api]) -> None:
    api = start_api(devices="cpu:2")
    content = graphs.busy(60, 192)
    for name in ("cpu_0", "cpu_1"):
        api.load(content, "both", device_id=name)
    api.load(graphs.affine(33.0), "one", device_id="cpu_1")
    client = celery.Celery(broker=api.stack.redis_url, backend=api.stack.redis_url)

    def send(name: str, x: np.ndarray) -> celery.result.AsyncResult:
        body = {"model_name": name, "inputs": {"x": as_tensor(x)}}
        kwargs = {"request": body}
        return client.send_task("device_operations.inference.run", kwargs=kwargs, queue="device.any")

    shared = [send("both", np.zeros((1, 192, 192), np.float32)) for _ in range(30)]
    apart = [send("one", ROW) for _ in range(10)]
    for task in [*shared, *apart]:
        assert task.get(timeout=40)["outputs"]["y"]
    assert {api.job(task.id)["device_id"] for task in shared} == {"cpu_0", "cpu_1"}
    assert {api.job(task.id)["device_id"] for task in apart} == {"cpu_1"}


def test_a_worker_recycles_itself_where_memory_comes_back_in_no_other_way(start_api: Callable[..., Api]) -> None:
    api = start_api(LEASE_SECONDS=2)
    stays = api.load(graphs.affine(31.0), "stays")["model_id"]
    leaves = api.load(graphs.affine(32.0), "leaves")["model_id"]
    api.stack.stop("cpu_0")
    # The cpu backend gives memory back; a worker whose backend says that it does not is this one with another fact.
    program = (
        "import dataclasses, sys; from workers.devices.cpu import CpuDevice as D; told = D.describe\n"
        "def describe(self):\n"
        "    about = told(self)\n"
        "    return dataclasses.replace(about, capabilities={**about.capabilities, 'returns_memory': False})\n"
        "D.describe = describe\n"
        "from workers.__main__ import main; sys.exit(main(['--device', 'cpu_0']))"
    )
    log = (api.stack.folder / "keeps-memory.log").open("w")
    worker = subprocess.Popen(
        [sys.executable, "-c", program], env=api.stack.environment, cwd=REPOSITORY, stdout=log, stderr=log
    )
    try:
        eventually(lambda: api.model(leaves)["state"] == "loaded")
        told = eventually(lambda: _unloaded(api, leaves))
        assert told["returns_memory"] is False
        assert told["recycles"] is True
        assert worker.wait(20) == 77, Path(log.name).read_text()[-2000:]
    finally:
        worker.kill()
        worker.wait()
        log.close()
    api.stack.start("cpu_0")
    assert eventually(lambda: _try(api, stays)) == (ROW * 31 + 1).tolist()
    assert api.model(leaves)["state"] == "unloaded"


def test_the_real_sentence_model_gives_what_it_gives_in_process(api: Api, models_dir: Path) -> None:
    path = models_dir / "minilm" / "model.onnx"
    loaded = api.load(path.read_bytes(), "minilm", options={"max_batch_size": 1, "intra_op_threads": 1})
    ids = np.arange(100, 132, dtype=np.int64).reshape(1, 32)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    (expected,) = ort.InferenceSession(str(path), settings).run(None, feeds)
    assert np.array_equal(api.outputs(loaded["model_id"], feeds)["last_hidden_state"], expected)


def _try(api: Api, model_id: str) -> list[float] | None:
    job = api.post("/api/inference/run", {
        "model_id": model_id, "inputs": {"x": {"dtype": "float32", "shape": [1, 4], "data": [0, 1, 2, 3]}},
    }).json()  # fmt: skip
    return api.arrays(job)["y"].tolist() if job.get("state") == "succeeded" else None


def _unloaded(api: Api, model_id: str) -> dict[str, object] | None:
    answer = api.http.delete(
        f"/api/inference/unload-model/{model_id}", params={"recycle": True}, headers={"Prefer": "wait=20"}
    ).json()
    return answer.get("result")


def _set_budget(api: Api, free_bytes: int) -> None:
    """Leaves so much of the device's budget free, as if it were a smaller device."""
    import psycopg2

    connection = psycopg2.connect(api.stack.database_url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("UPDATE device_budgets SET budget_bytes = reserved_bytes + %s", (free_bytes,))
    connection.close()
