"""What does not fit is told with a code that says why, and the next run succeeds."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.inference import graphs
from tests.inference.conftest import Api, as_tensor

GOOD = as_tensor(np.ones((1, 4), np.float32))


def tensor(**changes: Any) -> dict[str, Any]:
    made = {"dtype": "float32", "shape": [1, 4], "data": [1, 2, 3, 4], **changes}
    return {name: value for name, value in made.items() if value is not None}


@pytest.fixture(scope="module")
def model_id(api: Api) -> str:
    return api.load(graphs.affine(), "good")["model_id"]


@pytest.fixture(autouse=True)
def _the_next_run_succeeds(api: Api, model_id: str) -> Any:
    yield
    assert np.array_equal(api.outputs(model_id, {"x": GOOD})["y"], np.full((1, 4), 3.0, np.float32))


@pytest.mark.parametrize(
    ("inputs", "code", "text"),
    [
        ({"z": GOOD}, "input_mismatch", "unknown input 'z'"),
        ({}, "input_mismatch", "missing input 'x'"),
        ({"x": tensor(dtype="float64")}, "input_mismatch", "is float64, the model takes float32"),
        ({"x": tensor(shape=[4])}, "input_mismatch", "shape [4]"),
        ({"x": tensor(shape=[1, 5], data=[1, 2, 3, 4, 5])}, "input_mismatch", "shape [1, 5]"),
        ({"x": tensor(data=[[1, 2], [3]])}, "input_mismatch", "ragged"),
        ({"x": tensor(data=[1, 2, 3])}, "input_mismatch", "holds 4 elements"),
        ({"x": tensor(data=["1", "2", "3", "4"])}, "input_mismatch", "str"),
        ({"x": tensor(data=[1, 2, None, 4])}, "input_mismatch", "null"),
        ({"x": tensor(data=None, base64="!!!!")}, "input_mismatch", "base64"),
        ({"x": tensor(data=None, base64=base64.b64encode(bytes(12)).decode())}, "input_mismatch", "12 were given"),
        ({"x": tensor(base64="AAAA")}, "validation_failed", "exactly one of"),
        ({"x": tensor(data=None)}, "validation_failed", "exactly one of"),
        ({"x": tensor(dtype="bfloat16")}, "input_mismatch", "is bfloat16, the model takes float32"),
        ({"x": tensor(dtype="float31")}, "validation_failed", "dtype"),
        ({"x": tensor(shape=[1, -4])}, "validation_failed", "greater than or equal to 0"),
        ({"x": tensor(data=None, blob_id="nobody")}, "blob_not_found", "nobody"),
        ({"x": tensor(data=None, allocation_id="nobody")}, "allocation_not_found", "nobody"),
        ({"x": tensor(transient_id="mine")}, "validation_failed", "transient_id"),
    ],
)
def test_inputs_that_do_not_fit(api: Api, model_id: str, inputs: dict[str, Any], code: str, text: str) -> None:
    answer = api.post("/api/inference/run", {"model_id": model_id, "inputs": inputs})
    assert answer.status_code in (404, 422), answer.text
    assert answer.json()["code"] == code, answer.text
    told = answer.json()["detail"] + str(answer.json().get("errors", ""))
    assert text in told


def test_a_blob_shorter_than_its_shape(api: Api, model_id: str) -> None:
    blob = api.http.post("/api/blobs", content=bytes(15)).json()["blob_id"]
    answer = api.post("/api/inference/run", {"model_id": model_id, "inputs": {"x": tensor(data=None, blob_id=blob)}})
    assert (answer.status_code, answer.json()["code"]) == (422, "input_mismatch")
    assert "16 bytes" in answer.json()["detail"]


def test_unknown_outputs_and_models(api: Api, model_id: str) -> None:
    answer = api.post("/api/inference/run", {"model_id": model_id, "inputs": {"x": GOOD}, "outputs": ["w"]})
    assert (answer.status_code, answer.json()["code"]) == (422, "input_mismatch")
    for body in ({"model_id": "nobody"}, {"model_name": "nobody"}):
        answer = api.post("/api/inference/run", {**body, "inputs": {"x": GOOD}})
        assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")


def test_an_empty_batch_gives_an_empty_answer(api: Api, model_id: str) -> None:
    empty = tensor(shape=[0, 4], data=[])
    outputs = api.outputs(model_id, {"x": empty})
    assert outputs["y"].shape == (0, 4)


def test_a_model_that_fails_in_the_middle_of_its_graph(api: Api) -> None:
    model_id = api.load(graphs.picky())["model_id"]
    job = api.run(model_id, {"i": np.array([17], np.int64)})
    assert (job["state"], job["error"]["code"]) == ("failed", "run_failed")
    assert "indices" in job["error"]["message"]
    assert api.outputs(model_id, {"i": np.array([3], np.int64)})["y"].shape == (1, 2)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "empty (0 bytes)"),
        (b"not a model", "not an ONNX model"),
        (graphs.affine()[:-40], ""),
        (graphs.custom_operator(), "Mystery"),
        (graphs.too_new(), "opset"),
        (graphs.external("../secret.bin"), "../secret.bin"),
        (graphs.external("missing.bin"), "missing.bin"),
    ],
    ids=["empty", "no model", "cut off", "custom operator", "opset too new", "data outside", "data missing"],
)
def test_models_that_cannot_be_loaded(api: Api, content: bytes, text: str) -> None:
    job = api.load_job(content)
    assert (job["state"], job["error"]["code"]) == ("failed", "model_invalid")
    assert text.lower() in job["error"]["message"].lower()
    model = api.model(job["resource"]["id"])
    assert (model["state"], model["error"]["code"]) == ("failed", "model_invalid")
    run = api.post("/api/inference/run", {"model_id": job["resource"]["id"], "inputs": {"x": GOOD}}).json()
    # Refused, or taken by a gateway that has not heard of the failure and then failed: for the same reason.
    code, why = (run["code"], run["detail"]) if "code" in run else (run["error"]["code"], run["error"]["message"])
    assert code == "model_not_found"
    assert "failed to load" in why


@pytest.mark.parametrize("path", ["../outside.onnx", "/etc/passwd", "a/../../b.onnx", "C:\\x.onnx", "link.onnx"])
def test_paths_that_leave_the_model_folder(api: Api, tmp_path: Path, path: str) -> None:
    outside = tmp_path / "outside.onnx"
    outside.write_bytes(graphs.affine())
    api.models.mkdir(exist_ok=True)
    (api.models / "link.onnx").unlink(missing_ok=True)
    (api.models / "link.onnx").symlink_to(outside)
    answer = api.post("/api/inference/load-model", {"name": "bad", "source": {"path": path}})
    assert (answer.status_code, answer.json()["code"]) == (422, "path_not_allowed")


def test_a_source_that_is_not_there_and_a_wrong_checksum(api: Api) -> None:
    answer = api.post("/api/inference/load-model", {"name": "gone", "source": {"path": "gone.onnx"}})
    assert (answer.status_code, answer.json()["code"]) == (422, "model_invalid")
    answer = api.post("/api/inference/load-model", {"name": "gone", "source": {"blob_id": "nobody"}})
    assert (answer.status_code, answer.json()["code"]) == (404, "blob_not_found")
    path = api.save(graphs.affine(77.0))
    answer = api.post("/api/inference/load-model", {"name": "sum", "source": {"path": path}, "sha256": "0" * 64})
    assert (answer.status_code, answer.json()["code"]) == (422, "checksum_mismatch")
    answer = api.post("/api/inference/load-model", {"name": "x", "source": {"path": path}, "model_type": "diffusion"})
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
    answer = api.post("/api/inference/load-model", {"name": "x", "source": {"path": path}, "device_id": "gpu_9"})
    assert (answer.status_code, answer.json()["code"]) == (404, "device_not_found")


def test_options_that_the_model_does_not_have(api: Api) -> None:
    job = api.load_job(graphs.affine(78.0), options={"free_dimensions": {"nobody": 4}})
    assert job["error"]["code"] == "model_invalid"
    assert "nobody" in job["error"]["message"]
