"""The text embedding pipeline over HTTP: loads, runs of few and of many texts, what joins, and what is refused."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import celery
import numpy as np
import pytest

from device_operations.jobs import new_id
from tests.embedding.conftest import cpu, embed, minilm, open_embedder
from tests.inference.conftest import Api
from tests.pipelines.conftest import load_folder, refused, run, upload
from tests.support import embedding, graphs
from tests.support.stack import eventually
from workers.pipelines.text.pooling import normalized

__all__ = ["cpu", "minilm", "open_embedder"]

MEAN = {"1_Pooling/config.json": {"pooling_mode": "mean"}}
SAYS_EIGHT, SAYS_NOTHING = MEAN | {"config.json": {"hidden_size": 8}}, MEAN | {"config.json": None}

MANY = [f"{'a ' * (at % 9)}{'bcdef'[at % 5]} {'hello' if at % 2 else ''}" for at in range(8192)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedding.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(api: Api, folder: Path) -> str:
    """The tiny model, loaded from a path."""
    embedding.write(api.models / "tiny")
    body = {"name": "tiny", "model_type": "text_embedding", "source": {"path": "tiny"}}
    job = api.post("/api/inference/load-model", body).json()
    assert job["state"] == "succeeded", job["error"]
    assert job["result"]["pipeline"] == {"dimensions": 4, "max_tokens": 12, "pooling": "mean", "normalize": True}
    return str(job["result"]["model_id"])


@pytest.fixture
def expected(folder: Path, open_embedder: Any) -> Any:
    """expected(texts) -> the vectors as pooled, each text alone."""
    made = open_embedder(folder)
    return lambda texts: np.concatenate([embed(made, [text]).vectors for text in texts])


def vectors(api: Api, job: dict[str, Any]) -> np.ndarray:
    assert job["state"] == "succeeded", job["error"]
    return api.arrays(job)["embeddings"]


def test_texts_become_vectors(api: Api, model: str, expected: Any) -> None:
    texts = ["hello world", "", "a b c d e f g h i j k l"]
    job = run(api, model_id=model, texts=texts)
    np.testing.assert_allclose(vectors(api, job), normalized(expected(texts)), atol=1e-6)
    assert job["result"]["outputs"]["embeddings"]["dtype"] == "float32"
    assert (job["result"]["tokens"], job["result"]["truncated"]) == (4 + 2 + 12, [2])
    plain = run(api, model_name="tiny", texts=texts, normalize=False)
    np.testing.assert_allclose(vectors(api, plain), expected(texts), atol=1e-6)
    ids = [[embedding.WORDS.index(word) for word in ("hello", "world")]]
    np.testing.assert_allclose(
        vectors(api, run(api, model_id=model, tokens=ids)), normalized(expected(texts[:1])), atol=1e-6
    )


@pytest.mark.parametrize("form", ["data", "base64", "blob"])
def test_vectors_come_in_the_form_that_is_asked_for(api: Api, model: str, expected: Any, form: str) -> None:
    job = run(api, model_id=model, texts=["a", "b"], form=form)
    assert {"data": "data", "base64": "base64", "blob": "blob_id"}[form] in job["result"]["outputs"]["embeddings"]
    np.testing.assert_allclose(vectors(api, job), normalized(expected(["a", "b"])), atol=1e-6)


def test_many_texts_are_one_job_in_portions_with_progress(api: Api, model: str, expected: Any) -> None:
    job = api.post("/api/inference/run", {"model_id": model, "texts": MANY}, wait=0).json()
    with api.http.stream("GET", f"/api/jobs/{job['job_id']}/events") as events:
        reported = [line for line in events.iter_lines() if '"total":8192' in line.replace(" ", "")]
    job = api.job(job["job_id"])
    found = vectors(api, job)
    assert found.shape == (8192, embedding.WIDTH)
    picked = slice(0, 8192, 97)
    np.testing.assert_allclose(found[picked], normalized(expected(MANY[picked])), atol=1e-6)
    assert (job["progress"]["done"], job["progress"]["total"]) == (8192, 8192)
    assert reported, "no progress was reported while it ran"
    stored = api.http.get(f"/api/jobs/{job['job_id']}", params={"include": "request"}).json()["request"]
    assert "blob_id" in stored["texts"], "texts above 64 KiB ride in the row"


def test_a_job_is_tried_again_with_its_texts(api: Api, model: str) -> None:
    for fields in ({"texts": MANY}, {"texts": ["a"]}, {"tokens": [[4, 5]] * 8000}, {"tokens": [[4]]}):
        first = run(api, model_id=model, **fields)
        again = api.http.post(f"/api/jobs/{first['job_id']}/retry", headers={"Prefer": "wait=30"}).json()
        assert again["retried_from"] == first["job_id"]
        np.testing.assert_array_equal(vectors(api, again), vectors(api, first))


def test_small_runs_of_several_callers_are_joined_and_each_gets_what_it_gets_alone(
    api: Api, folder: Path, expected: Any
) -> None:
    job = load_folder(api, folder, "text_embedding", name="joined", options={"max_delay_ms": 200})
    assert job["state"] == "succeeded", job["error"]
    assert api.model(job["result"]["model_id"])["batching"]["enabled"]
    asked = [["hello"], ["a b c d"], ["dusk", "e"], ["f g h i j k l m n o p"]] * 5
    with ThreadPoolExecutor(len(asked)) as at_once:
        jobs = list(at_once.map(lambda texts: run(api, model_name="joined", texts=texts), asked))
    for texts, one in zip(asked, jobs, strict=True):
        np.testing.assert_allclose(vectors(api, one), normalized(expected(texts)), atol=1e-6)
    assert max(one["result"]["batch_size"] for one in jobs) > 1
    eventually(lambda: api.model(job["result"]["model_id"])["run_count"] == len(asked))
    assert api.model(job["result"]["model_id"])["statistics"]["executions"] < len(asked)


def test_one_bad_run_in_a_joined_one_fails_alone(api: Api, folder: Path) -> None:
    job = load_folder(api, folder, "text_embedding", name="one-bad", options={"max_delay_ms": 200})
    assert job["state"] == "succeeded", job["error"]
    asked: list[dict[str, Any]] = [
        {"texts": ["a"]},
        {"tokens": [[10**6]]},
        {"texts": ["b"], "dimensions": 3},
        {"texts": ["c"]},
    ] * 3
    with ThreadPoolExecutor(len(asked)) as at_once:
        jobs = list(at_once.map(lambda fields: run(api, model_name="one-bad", **fields), asked))
    assert [one["state"] for one in jobs] == ["succeeded", "failed", "failed", "succeeded"] * 3
    assert {one["error"]["code"] for one in jobs if one["error"]} == {"input_mismatch", "validation_failed"}
    assert max(one["result"]["batch_size"] for one in jobs if one["result"]) > 1, "the good ones lost their company"


def test_the_options_of_each_load_hold_though_the_graph_is_shared(api: Api, folder: Path) -> None:
    first = load_folder(api, folder, "text_embedding", name="many-rows", options={"max_batch_size": 16})["result"]
    second = load_folder(api, folder, "text_embedding", name="one-row", options={"max_batch_size": 1})["result"]
    assert (first["batching"]["enabled"], second["batching"]["enabled"]) == (True, False)
    texts = ["a", "b c d e", "f"] * 20
    found = [vectors(api, run(api, model_id=one["model_id"], texts=texts)) for one in (first, second)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_rows_that_touch_each_other_never_run_together(api: Api, tmp_path: Path, open_embedder: Any) -> None:
    made = embedding.write(tmp_path / "mixing", {"model.onnx": embedding.graph(mean_over_batch=True)})
    loaded = load_folder(api, made, "text_embedding", options={"max_batch_size": 16})["result"]
    assert (loaded["batching"]["enabled"], loaded["batching"]["proof"]) == (False, "disproven")
    texts = ["a b", "c d", "e f"]
    alone = np.concatenate([embed(open_embedder(made), [text]).vectors for text in texts])
    job = run(api, model_id=loaded["model_id"], texts=texts, normalize=False)
    np.testing.assert_allclose(vectors(api, job), alone, atol=1e-6)


def test_a_long_job_gives_way_between_steps_and_is_cancelled_between_them(api: Api, model: str, tmp_path: Path) -> None:
    made = embedding.write(tmp_path / "slow", {"model.onnx": embedding.graph(slow=True)})
    slow = load_folder(api, made, "text_embedding")["result"]["model_id"]
    job = api.post("/api/inference/run", {"model_id": slow, "texts": ["a"] * 1000}, wait=0).json()
    eventually(lambda: api.job(job["job_id"], wait=0)["progress"])
    began = time.monotonic()
    urgent = run(api, model_id=model, texts=["a"], job={"priority": 9})
    assert urgent["state"] == "succeeded"
    assert api.job(job["job_id"], wait=0)["state"] == "running"
    assert time.monotonic() - began < 5
    api.http.delete(f"/api/jobs/{job['job_id']}").raise_for_status()
    assert api.job(job["job_id"], wait=5)["state"] == "cancelled"
    overdue = run(api, model_id=slow, texts=["a"] * 1000, job={"timeout_seconds": 1})
    assert (overdue["state"], overdue["error"]["code"]) == ("failed", "timeout")


def test_parts_come_and_go_with_low_memory(api: Api, folder: Path, expected: Any) -> None:
    loaded = load_folder(api, folder, "text_embedding", name="low", options={"low_memory": True})["result"]
    texts = ["a", "hello dusk"] * 30
    found = vectors(api, run(api, model_id=loaded["model_id"], texts=texts))
    np.testing.assert_allclose(found, normalized(expected(texts)), atol=1e-6)


def test_any_service_may_enqueue_one_over_redis(api: Api, model: str, expected: Any) -> None:
    with celery.Celery(broker=api.stack.redis_url, backend=api.stack.redis_url) as app:
        app.send_task(
            "device_operations.inference.run", kwargs={"request": {"model_name": "tiny", "texts": ["hello"]}},
            queue="device.any", task_id=(job_id := new_id()), ignore_result=False,
        )  # fmt: skip
        result = app.AsyncResult(job_id).get(timeout=30)
    np.testing.assert_allclose([result["outputs"]["embeddings"]["data"]], normalized(expected(["hello"])), atol=1e-6)


def test_the_model_is_back_after_its_worker_died(api: Api, model: str, expected: Any) -> None:
    api.stack.kill("cpu_0")
    api.stack.start("cpu_0")
    api.stack.wait_ready()
    eventually(lambda: api.model(model)["state"] == "loaded")
    np.testing.assert_allclose(
        vectors(api, run(api, model_id=model, texts=["dusk"])), normalized(expected(["dusk"])), atol=1e-6
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"texts": []},
        {"texts": ["a"] * 8193},
        {"texts": ["a"] * 10**6},
        {"texts": "a"},
        {"texts": [1]},
        {"texts": ["a", None]},
        {"texts": [["a"]]},
        {"texts": {"dtype": "float32", "shape": [1], "data": [1.0]}},
        {"texts": {"dtype": "string", "shape": [1, 1], "data": [["a"]]}},
        {"texts": {"dtype": "string", "shape": [0], "data": []}},
        {"texts": {"dtype": "string", "shape": [2], "data": ["a"]}},
        {"texts": {"dtype": "string", "shape": [1], "blob_id": "b"}},
        {"texts": ["a\x00"]},
        {"texts": ["a"], "tokens": [[1]]},
        {"tokens": [[]]},
        {"tokens": [[1.5]]},
        {"tokens": [[True]]},
        {"tokens": [1]},
        {"tokens": {"dtype": "json", "shape": [1], "data": [1, 2]}},
        {"texts": ["a"], "normalize": "yes"},
        {"texts": ["a"], "normalize": 1},
        {"texts": ["a"], "dimensions": 0},
        {"texts": ["a"], "dimensions": 2.5},
        {"texts": ["a"], "latents": 1},
        {"texts": ["a"], "steps": 3},
        {"normalize": True},
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_recorded(api: Api, model: str, fields: dict[str, Any]) -> None:
    before = api.http.get("/api/jobs", params={"limit": 1}).json()["jobs"][0]["job_id"]
    problem = refused(api, model_id=model, **fields)
    assert problem["code"] in ("validation_failed", "input_mismatch"), problem
    assert api.http.get("/api/jobs", params={"limit": 1}).json()["jobs"][0]["job_id"] == before


def test_half_of_a_surrogate_pair_is_refused(api: Api, model: str) -> None:
    content = b'{"model_id": "' + model.encode() + b'", "texts": ["\\udc00"]}'
    answer = api.http.post("/api/inference/run", content=content)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_request")


def test_tokens_that_are_json_of_another_kind_fail_the_run(api: Api, model: str) -> None:
    job = run(api, model_id=model, tokens={"dtype": "json", "shape": [1], "data": [{"a": 1}]})
    assert (job["state"], job["error"]["code"]) == ("failed", "input_mismatch")


def test_a_text_of_megabytes_is_cut_and_said_to_be(api: Api, model: str) -> None:
    job = run(api, model_id=model, texts=["a " * 2_000_000, "b"])
    assert (job["result"]["tokens"], job["result"]["truncated"]) == (12 + 3, [0])


def test_graphs_and_other_protocols_refuse_texts_in_words(api: Api, model: str, tmp_path: Path) -> None:
    graphs.tiny(api.models / "graph.onnx")
    plain = api.post("/api/inference/load-model", {"name": "graph", "source": {"path": "graph.onnx"}}).json()
    problem = refused(api, model_id=plain["resource"]["id"], texts=["a"])
    assert "texts are for" in problem["detail"]
    tensor = {"name": "texts", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    answer = api.http.post("/v2/models/tiny/infer", json={"inputs": [tensor]})
    assert answer.status_code == 422
    assert "texts" in answer.json()["error"]
    inputs = {"x": {"dtype": "float32", "shape": [1], "data": [1.0]}}
    assert "texts" in refused(api, model_id=model, inputs=inputs)["detail"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.json": None}, "no tokenizer.json"),
        ({"tokenizer.json": b"\x00\x01"}, "tokenizer"),
        ({"tokenizer.json": b"{}"}, "no tokenizer"),
        ({"model.onnx": b"not onnx"}, "model"),
        ({"model.onnx": embedding.graph(width=8)}, "8"),
        ({"config.json": {"hidden_size": 8}}, "8"),
        ({"1_Pooling/config.json": {"pooling_mode": "max"}}, "max"),
        ({"config.json": {"hidden_size": 4, "vocab_size": 3}}, "vocab_size"),
        ({"model.onnx": embedding.graph(symbolic_width=True), **SAYS_EIGHT}, "two short texts"),
        ({"model.onnx": embedding.graph(symbolic_width=True), **SAYS_NOTHING}, "neither graph nor config.json"),
        ({"modules.json": [{"type": "a.Transformer", "path": "../.."}]}, "model's folder"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_a_clear_problem(
    api: Api, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    job = load_folder(api, embedding.write(tmp_path / "bad", changes), "text_embedding")
    assert (job["state"], job["error"]["code"]) == ("failed", "model_invalid")
    assert words in job["error"]["message"]


def test_a_single_file_is_no_text_embedding_model(api: Api) -> None:
    source = {"blob_id": upload(api, embedding.graph())}
    body = {"name": "file", "model_type": "text_embedding", "source": source}
    job = api.post("/api/inference/load-model", body).json()
    assert job["error"]["code"] == "model_invalid"
    assert "needs a folder" in job["error"]["message"] or "no tokenizer.json" in job["error"]["message"]


def test_minilm_with_its_published_int8_weights(api: Api, minilm: Path, models_dir: Path) -> None:
    import shutil

    folder = api.models / "minilm-int8"
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("model.onnx"))
    shutil.copy(models_dir / "minilm" / "model.onnx", folder)
    body = {"name": "minilm", "model_type": "text_embedding", "source": {"path": "minilm-int8"}}
    loaded = api.post("/api/inference/load-model", body).json()
    assert loaded["state"] == "succeeded", loaded["error"]
    texts = ["a lighthouse by the sea", "a beacon at the coast", "quarterly tax returns"]
    found = vectors(api, run(api, model_name="minilm", texts=texts))
    alone = [vectors(api, run(api, model_name="minilm", texts=[text]))[0] for text in texts]
    np.testing.assert_allclose(found, alone, atol=1e-6)
    assert found[0] @ found[1] > 0.4
    assert found[0] @ found[2] < 0.2


def test_a_load_and_its_runs_go_in_one_submission(api: Api, folder: Path, expected: Any) -> None:
    embedding.write(api.models / "in-bulk", {"sentence_bert_config.json": {"max_seq_length": 10}})
    load = {"name": "in-bulk", "model_type": "text_embedding", "source": {"path": "in-bulk"}}
    runs = [
        {"kind": "inference.run", "request": {"model_name": "in-bulk", "texts": ["a", "b"][:count]}} for count in (1, 2)
    ]
    answer = api.post("/api/jobs", {"jobs": [{"kind": "inference.load_model", "request": load}, *runs]}, wait=30)
    assert answer.status_code == 200, answer.text
    _, first, second = answer.json()["jobs"]
    np.testing.assert_allclose(vectors(api, first), normalized(expected(["a"])), atol=1e-6)
    np.testing.assert_allclose(vectors(api, second), normalized(expected(["a", "b"])), atol=1e-6)
