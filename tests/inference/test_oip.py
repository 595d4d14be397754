"""The Open Inference Protocol, spoken by the unmodified client of Triton."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tasks.blobs.transients import KEPT_OF_A_SIZE
from tests.inference import graphs
from tests.inference.conftest import Api
from tests.support.stack import eventually


@pytest.fixture
def client(api: Api) -> Iterator[Any]:
    made = triton.InferenceServerClient(api.stack.http_url.removeprefix("http://"), concurrency=4)
    yield made
    made.close()


def given(name: str, array: np.ndarray, datatype: str, *, binary: bool = True) -> Any:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def test_the_server_tells_that_it_lives_and_what_it_is(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    told = client.get_server_metadata()
    assert told["name"] == "device-operations"
    assert "binary_tensor_data" in told["extensions"]


def test_metadata_versions_and_readiness_of_a_model(api: Api, client: Any) -> None:
    api.load(graphs.affine(3.0), "metadata", version="2")
    told = client.get_model_metadata("metadata")
    assert told["versions"] == ["2"]
    assert told["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert told["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}]
    assert client.get_model_metadata("metadata", "2") == told
    assert client.is_model_ready("metadata")
    assert client.is_model_ready("metadata", "2")
    assert not client.is_model_ready("metadata", "3")
    assert not client.is_model_ready("nobody")
    assert client.get_model_config("metadata")["input"][0]["data_type"] == "TYPE_FP32"


@pytest.mark.parametrize("width", [4, 40_000], ids=["small", "above what a row holds"])
@pytest.mark.parametrize("binary_out", [True, False], ids=["binary out", "json out"])
@pytest.mark.parametrize("binary_in", [True, False], ids=["binary in", "json in"])
def test_tensors_go_in_and_out_as_json_and_as_bytes(
    api: Api, client: Any, binary_in: bool, binary_out: bool, width: int
) -> None:
    api.load(graphs.wide(width), f"wide-{width}")
    x = np.random.default_rng(1).standard_normal((1, width)).astype(np.float32)
    answer = client.infer(
        f"wide-{width}",
        [given("x", x, "FP32", binary=binary_in)],
        outputs=[triton.InferRequestedOutput("y", binary_data=binary_out)],
        request_id="mine",
    )
    assert np.array_equal(answer.as_numpy("y"), x + 1)
    assert answer.get_response()["id"] == "mine"
    output = answer.get_output("y")
    assert ("data" in output) is not binary_out
    job = api.job(answer.get_response()["parameters"]["job_id"])
    assert job["state"] == "succeeded"
    assert job["kind"] == "inference.run"


@pytest.mark.parametrize("binary", [True, False])
def test_text_half_precision_and_truth_values(api: Api, client: Any, binary: bool) -> None:
    api.load(graphs.everything(), "everything")
    text = np.array(["déjà", "", "日本語"], object)
    half = np.array([[1.5, -2], [0, 65504], [0.1, 3]], np.float16)
    flag = np.array([True, False, True])
    answer = client.infer(
        "everything",
        [
            given("text", text, "BYTES", binary=binary),
            given("half", half, "FP16", binary=binary),
            given("flag", flag, "BOOL", binary=binary),
        ],
        outputs=[
            triton.InferRequestedOutput(name, binary_data=binary) for name in ("text_out", "half_out", "flag_out")
        ],
    )
    back = [item.decode() if isinstance(item, bytes) else item for item in answer.as_numpy("text_out")]
    assert back == list(text)
    assert np.array_equal(answer.as_numpy("half_out"), half)
    assert np.array_equal(answer.as_numpy("flag_out"), ~flag)


def test_big_text_passes_too(api: Api, client: Any) -> None:
    api.load(graphs.everything(), "everything")
    text = np.array(["x" * 50_000, "y" * 50_000], object)
    answer = client.infer(
        "everything",
        [
            given("text", text, "BYTES"),
            given("half", np.zeros((2, 2), np.float16), "FP16"),
            given("flag", np.zeros(2, bool), "BOOL"),
        ],
    )
    assert [item.decode() for item in answer.as_numpy("text_out")] == list(text)


def test_only_the_outputs_asked_for_come_back(api: Api, client: Any) -> None:
    api.load(graphs.everything(), "everything")
    inputs = [
        given("text", np.array(["a"], object), "BYTES"),
        given("half", np.zeros((1, 2), np.float16), "FP16"),
        given("flag", np.zeros(1, bool), "BOOL"),
    ]
    answer = client.infer("everything", inputs, outputs=[triton.InferRequestedOutput("flag_out")])
    assert [output["name"] for output in answer.get_response()["outputs"]] == ["flag_out"]
    everything = client.infer("everything", inputs)
    assert len(everything.get_response()["outputs"]) == 3


@pytest.mark.parametrize("back", ["gzip", "deflate", None])
@pytest.mark.parametrize("there", ["gzip", "deflate", None])
def test_requests_and_answers_may_be_compressed(api: Api, client: Any, there: str | None, back: str | None) -> None:
    api.load(graphs.wide(20_000), "compressed")
    x = np.zeros((1, 20_000), np.float32)
    answer = client.infer(
        "compressed",
        [given("x", x, "FP32")],
        request_compression_algorithm=there,
        response_compression_algorithm=back,
    )
    assert np.array_equal(answer.as_numpy("y"), x + 1)


def test_an_answer_is_compressed_for_who_asks_for_it_only(api: Api) -> None:
    api.load(graphs.affine(), "small")
    body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    url = f"{api.stack.http_url}/v2/models/small/infer"
    asked = httpx.post(url, json=body, headers={"Accept-Encoding": "gzip"})
    assert asked.headers["content-encoding"] == "gzip"
    assert asked.json()["outputs"][0]["data"] == [3, 5, 7, 9]
    assert "content-encoding" not in httpx.post(url, json=body).headers


def test_a_compressed_bomb_is_refused(api: Api) -> None:
    packed = gzip.compress(bytes(80 * 2**20))
    answer = api.http.post("/v2/models/small/infer", content=packed, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 413
    assert set(answer.json()) == {"error"}


def test_errors_have_the_protocols_form(api: Api, client: Any) -> None:
    api.load(graphs.affine(), "errors")
    x = np.zeros((1, 4), np.float32)
    with pytest.raises(InferenceServerException, match="no model named 'nobody'"):
        client.infer("nobody", [given("x", x, "FP32")])
    with pytest.raises(InferenceServerException, match="unknown input 'z'"):
        client.infer("errors", [given("z", x, "FP32")])
    with pytest.raises(InferenceServerException, match="float64, the model takes float32"):
        client.infer("errors", [given("x", x.astype(np.float64), "FP64")])
    with pytest.raises(InferenceServerException, match=r"shape \[1, 5\]"):
        client.infer("errors", [given("x", np.zeros((1, 5), np.float32), "FP32")])
    with pytest.raises(InferenceServerException, match="unknown output 'w'"):
        client.infer("errors", [given("x", x, "FP32")], outputs=[triton.InferRequestedOutput("w")])
    with pytest.raises(InferenceServerException, match="not supported"):
        client.infer("errors", [given("x", x, "FP32")], outputs=[triton.InferRequestedOutput("y", class_count=2)])
    assert np.array_equal(client.infer("errors", [given("x", x, "FP32")]).as_numpy("y"), x + 1)


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        (b"{}", 400, "inputs is not a JSON list"),
        (b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP8", "data": [0, 0, 0, 0]}]}', 422, "FP8"),
        (b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0, 0]}]}', 422, "shape"),
        (b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": ["1", "2", "3", "4"]}]}', 422, "str"),
        (b'{"inputs": [{"name": "x", "shape": [1, -4], "datatype": "FP32", "data": []}]}', 422, "shape"),
        (b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32"}]}', 422, "neither data"),
        (
            b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}]}',
            422,
            "bytes are left",
        ),
    ],
)
def test_bad_bodies_are_told_and_the_next_run_succeeds(api: Api, body: bytes, status: int, text: str) -> None:
    api.load(graphs.affine(), "errors")
    answer = api.http.post("/v2/models/errors/infer", content=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert text in answer.json()["error"]
    good = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [[1, 2, 3, 4]]}]}
    assert api.http.post("/v2/models/errors/infer", json=good).json()["outputs"][0]["data"] == [3, 5, 7, 9]


def test_fastapis_own_errors_have_the_protocols_form_too(api: Api) -> None:
    for answer in (api.http.get("/v2/nothing/here"), api.http.get("/v2/models/errors/infer")):
        assert answer.status_code in (404, 405)
        assert set(answer.json()) == {"error"}


def test_numbers_that_json_does_not_have_come_back_as_json(api: Api, client: Any) -> None:
    api.load(graphs.affine(), "errors")
    x = np.array([[np.nan, np.inf, -np.inf, 1]], np.float32)
    answer = client.infer(
        "errors", [given("x", x, "FP32")], outputs=[triton.InferRequestedOutput("y", binary_data=False)]
    )
    assert np.array_equal(answer.as_numpy("y"), x * 2 + 1, equal_nan=True)


def test_a_model_is_loaded_and_unloaded_by_the_repository(api: Api, client: Any) -> None:
    api.save(graphs.affine(5.0), "by-name/1/model.onnx")
    api.save(graphs.affine(7.0), "by-name/12/model.onnx")
    index = {entry["name"]: entry for entry in client.get_model_repository_index()}
    assert index["by-name"]["state"] == "UNAVAILABLE"
    client.load_model("by-name")
    assert client.is_model_ready("by-name")
    index = {entry["name"]: entry for entry in client.get_model_repository_index()}
    assert (index["by-name"]["state"], index["by-name"]["version"]) == ("READY", "12")
    x = np.ones((1, 4), np.float32)
    assert np.array_equal(client.infer("by-name", [given("x", x, "FP32")]).as_numpy("y"), x * 7 + 1)
    assert np.array_equal(client.infer("by-name", [given("x", x, "FP32")], model_version="12").as_numpy("y"), x * 7 + 1)
    client.unload_model("by-name")
    assert not client.is_model_ready("by-name")
    with pytest.raises(InferenceServerException, match="by-name"):
        client.infer("by-name", [given("x", x, "FP32")])
    with pytest.raises(InferenceServerException, match="model folder"):
        client.load_model("never-there")


def test_a_model_is_loaded_from_files_sent_along(client: Any) -> None:
    config = json.dumps({"max_batch_size": 4, "dynamic_batching": {"max_queue_delay_microseconds": 500}})
    client.load_model("sent", config=config, files={"file:1/model.onnx": graphs.affine(9.0)})
    x = np.ones((1, 4), np.float32)
    assert np.array_equal(client.infer("sent", [given("x", x, "FP32")]).as_numpy("y"), x * 9 + 1)
    assert client.get_model_config("sent")["dynamic_batching"] == {"max_queue_delay_microseconds": 500}


def test_statistics_count_runs_and_executions(api: Api, client: Any) -> None:
    api.load(graphs.affine(11.0), "counted")
    x = np.ones((1, 4), np.float32)
    for _ in range(3):
        client.infer("counted", [given("x", x, "FP32")])
    with pytest.raises(InferenceServerException):
        client.infer("counted", [given("x", x.astype(np.float64), "FP64")])

    def counted() -> dict[str, Any] | None:
        (found,) = client.get_inference_statistics("counted")["model_stats"]
        return found if found["inference_count"] == 3 else None

    found = eventually(counted)
    assert found["execution_count"] == 3
    assert found["inference_stats"]["success"]["count"] == 3
    assert found["inference_stats"]["compute_infer"]["ns"] > 0
    assert found["batch_stats"][0]["compute_infer"]["count"] == 3
    assert "counted" in [entry["name"] for entry in client.get_inference_statistics()["model_stats"]]


def test_priority_is_tritons_and_the_job_has_it(api: Api, client: Any) -> None:
    api.load(graphs.affine(), "small")
    x = np.ones((1, 4), np.float32)
    for sent, recorded in ((0, 5), (1, 9), (2, 8), (9, 1), (99, 0)):
        answer = client.infer("small", [given("x", x, "FP32")], priority=sent)
        assert api.job(answer.get_response()["parameters"]["job_id"])["priority"] == recorded


@pytest.mark.serial
def test_a_timeout_stops_the_run(api: Api, client: Any) -> None:
    api.load(graphs.slow(), "slow")
    api.load(graphs.affine(), "small")
    x = np.zeros((512, 512), np.float32)
    began = time.monotonic()
    with pytest.raises(InferenceServerException) as raised:
        client.infer("slow", [given("x", x, "FP32")], timeout=200_000)
    assert raised.value.status() == "504"
    assert time.monotonic() - began < 1.5
    client.infer("small", [given("x", np.ones((1, 4), np.float32), "FP32")])


def test_a_client_that_goes_away_cancels_its_run(api: Api, client: Any) -> None:
    api.load(graphs.slow(2000), "slower")
    body = json.dumps({"inputs": [{"name": "x", "shape": [512, 512], "datatype": "FP32", "data": [0.0] * (512 * 512)}]})
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{api.stack.http_url}/v2/models/slower/infer", content=body, timeout=httpx.Timeout(10, read=0.7))

    def cancelled() -> bool:
        jobs = api.http.get("/api/jobs", params={"kind": "inference.run", "limit": 5}).json()["jobs"]
        return jobs[0]["state"] == "cancelled"

    eventually(cancelled, seconds=5)


def test_many_clients_at_once_get_their_own_answers(api: Api, client: Any) -> None:
    api.load(graphs.wide(3_000), "many")
    wrong: list[int] = []

    def ask(number: int) -> None:
        own = triton.InferenceServerClient(api.stack.http_url.removeprefix("http://"))
        for step in range(10):
            x = np.full((1, 3_000), number * 100 + step, np.float32)
            if not np.array_equal(own.infer("many", [given("x", x, "FP32")]).as_numpy("y"), x + 1):
                wrong.append(number)
        own.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    folder = next(api.stack.folder.rglob("transient"))
    # What is left is no request's any more: a few files for the next bytes to be written over.
    eventually(lambda: all(file.name.startswith("kept-") for file in folder.iterdir()))
    assert len(list(folder.iterdir())) <= 2 * KEPT_OF_A_SIZE
