"""Models of many files: torch's plain export writes each large tensor into a file of its own, SDXL's UNet into 1,522."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from device_operations.errors import OperationError
from device_operations.requests.inference import MAX_FILES
from tasks.inference import content as models
from tests.inference.conftest import Api, as_tensor
from tests.pipelines.conftest import pixels, run, upload

FILES = 1600


def many_files(folder: Path) -> Path:
    """A decoder that adds 1,600 tensors to its latents, each in a file of its own with the same bytes."""
    step = 1 / FILES
    nodes, weights = [], []
    for number in range(FILES):
        weight = numpy_helper.from_array(np.full((1, 3, 1, 1), step, np.float32), f"weight_{number}")
        weights.append(weight)
        before = "latent_sample" if not number else f"sum_{number}"
        after = "sample" if number == FILES - 1 else f"sum_{number + 1}"
        nodes.append(helper.make_node("Add", [before, weight.name], [after]))
    sides = ["batch_size", 3, "height", "width"]
    graph = helper.make_graph(
        nodes, "decoder", [helper.make_tensor_value_info("latent_sample", TensorProto.FLOAT, sides)],
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, sides)], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    place = folder / "vae_decoder"
    place.mkdir(parents=True)
    onnx.save(model, place / "model.onnx", save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)
    assert len(list(place.iterdir())) == FILES + 1
    return folder


def grey(api: Api, job: dict[str, Any]) -> None:
    """The loaded decoder gives zeros plus 1, which is white."""
    assert job["state"] == "succeeded", job["error"]
    latents = as_tensor(np.zeros((1, 3, 8, 8), np.float32))
    made = run(api, model_id=job["result"]["model_id"], latents=latents)
    assert made["state"] == "succeeded", made["error"]
    assert (pixels(api, made["result"]["images"][0]) >= 254).all()


def test_a_pipeline_of_many_files_loads_from_a_folder_and_from_blobs(api: Api) -> None:
    folder = many_files(api.models / "many")
    body = {"name": "many", "model_type": "vae", "source": {"path": "many"}}
    grey(api, api.post("/api/inference/load-model", body, wait=60).json())
    weight = upload(api, next((folder / "vae_decoder").glob("weight_*")).read_bytes())
    blobs = {f"vae_decoder/weight_{number}": weight for number in range(FILES)}
    blobs["vae_decoder/model.onnx"] = upload(api, (folder / "vae_decoder" / "model.onnx").read_bytes())
    body = {"name": "of-blobs", "model_type": "vae", "source": {"blobs": blobs}}
    grey(api, api.post("/api/inference/load-model", body, wait=60).json())


def test_more_files_than_a_model_may_have_are_refused(api: Api) -> None:
    blob_id = upload(api, b"weights")
    blobs = {f"vae_decoder/{number}": blob_id for number in range(MAX_FILES + 1)}
    answer = api.post("/api/inference/load-model", {"name": "over", "model_type": "vae", "source": {"blobs": blobs}})
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
    assert str(MAX_FILES) in answer.text


@pytest.mark.parametrize("model_type", ["vae", "onnx"])
def test_a_folder_of_more_files_is_refused_before_any_of_them_is_read(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "MAX_FILES", 20)
    for number in range(19):
        (tmp_path / f"weight_{number}").write_bytes(b"weights")
    (tmp_path / "model.onnx").write_bytes(b"graph")
    models.key_of_files(tmp_path, model_type, {})
    (tmp_path / "one-more").write_bytes(b"weights")
    monkeypatch.setattr(models, "_sha256", _never)
    with pytest.raises(OperationError, match="more than 20 files"):
        models.key_of_files(tmp_path, model_type, {})


def test_files_that_did_not_change_are_hashed_once(tmp_path: Path) -> None:
    for number in range(5000):
        (tmp_path / f"weight_{number}").write_bytes(number.to_bytes(4))
    (tmp_path / "model.onnx").write_bytes(b"graph")
    models.key_of_files(tmp_path, "vae", {})
    before = models._sha256.cache_info().misses
    models.key_of_files(tmp_path, "vae", {})
    assert models._sha256.cache_info().misses == before


def _never(*given: object) -> str:
    raise AssertionError("nothing is read")
