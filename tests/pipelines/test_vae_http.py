"""The vae pipeline over HTTP: loaded from a folder and from blobs, latents to images and back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.inference.conftest import Api, as_tensor
from tests.pipelines.conftest import load_folder, pixels, png, refused, run, upload


@pytest.fixture(scope="module")
def model(api: Api, vae_folder: Path) -> str:
    """The tiny autoencoder, loaded."""
    shutil.copytree(vae_folder, api.models / "tiny-vae")
    answer = api.post("/api/inference/load-model", {"name": "vae", "model_type": "vae", "source": {"path": "tiny-vae"}})
    assert answer.json()["state"] == "succeeded", answer.text
    return str(answer.json()["result"]["model_id"])


def test_a_vae_is_loaded_and_tells_its_parts(api: Api, model: str, vae_folder: Path) -> None:
    told = api.model(model)
    assert (told["state"], told["model_type"], told["inputs"]) == ("loaded", "vae", [])
    parts = {part["name"]: part for part in told["parts"]}
    assert parts.keys() == {"vae_decoder", "vae_encoder"}
    for name, part in parts.items():
        assert part["file_bytes"] == (vae_folder / name / "model.onnx").stat().st_size
        assert part["memory_bytes"] >= part["file_bytes"]
    assert told["memory_bytes"] >= sum(part["memory_bytes"] for part in parts.values())
    # The same content out of blobs is the same graph.
    job = load_folder(api, vae_folder, "vae")
    assert job["state"] == "succeeded", job["error"]
    assert api.model(job["result"]["model_id"])["sha256"] == told["sha256"]


def test_latents_become_the_image_that_diffusers_makes(api: Api, model: str, vae: Any) -> None:
    latents = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    job = run(api, model_id=model, latents=as_tensor(latents.numpy()), output_format="tensor")
    assert job["state"] == "succeeded", job["error"]
    (image,) = api.arrays(job).values()
    assert np.abs(image - wanted.numpy()).max() < 1e-5
    for form in ("png", "webp"):
        job = run(api, model_name="vae", latents=as_tensor(latents.numpy()), output_format=form)
        made = job["result"]["images"]
        assert [(one["media_type"], one["width"], one["height"]) for one in made] == [(f"image/{form}", 48, 32)] * 2
        for one, expected in zip(made, wanted, strict=True):
            whole = ((expected / 2 + 0.5).clamp(0, 1) * 255).round().numpy().transpose(1, 2, 0)
            assert np.abs(pixels(api, one).astype(int) - whole).max() <= 1
    assert job["progress"]["total"] == 2


def test_an_image_becomes_the_latents_that_diffusers_makes(api: Api, model: str, vae: Any) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    values = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    with torch.no_grad():
        found = vae.encode(values).latent_dist
    wanted = ((found.mode() - vae.config.shift_factor) * vae.config.scaling_factor).numpy()
    blob_id = upload(api, png(picture))
    for given in (
        {"image": {"blob_id": blob_id}},
        {"image": as_tensor(values.numpy())},
        {"images": [{"blob_id": blob_id}]},
    ):
        job = run(api, model_id=model, **given)
        assert job["state"] == "succeeded", job["error"]
        assert np.abs(api.arrays(job)["latents"] - wanted).max() < 1e-5


def test_what_a_vae_does_not_take_is_refused_before_a_job_is_made(api: Api, model: str) -> None:
    latents = as_tensor(np.zeros((1, 4, 8, 8), np.float32))
    assert "exactly one of latents" in refused(api, model_id=model, latents=latents, image={"blob_id": "b"})["detail"]
    assert "has no runs with inputs" in refused(api, model_id=model, inputs={"latents": latents})["detail"]
    answer = api.post("/api/inference/run", {"model_id": model, "image": {"blob_id": "none"}})
    assert (answer.status_code, answer.json()["code"]) == (404, "blob_not_found")
