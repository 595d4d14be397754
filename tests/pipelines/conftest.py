"""Fixtures of the pipelines' tests: tiny pipelines made once a session, and the inference routes of a stack."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import EulerDiscreteScheduler
from PIL import Image

from tests.inference.conftest import Api, api, start_api
from tests.support.pipelines import export_sdxl, export_vae, tiny_sdxl, tiny_vae

__all__ = ["Api", "api", "start_api"]


@pytest.fixture(scope="session")
def vae() -> Any:
    """diffusers' own, with the weights of `vae_folder`."""
    return tiny_vae(shift_factor=0.05)


@pytest.fixture(scope="session")
def vae_folder(vae: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same exported."""
    return export_vae(vae, tmp_path_factory.mktemp("vae"))


def upload(api: Api, data: bytes) -> str:
    """A new blob's id."""
    answer = api.http.post("/api/blobs", content=data)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["blob_id"])


def upload_folder(api: Api, folder: Path) -> dict[str, str]:
    """The blobs of a folder's files, by relative path, as `source.blobs` takes them."""
    return {
        str(file.relative_to(folder)): upload(api, file.read_bytes()) for file in folder.rglob("*") if file.is_file()
    }


def load_folder(api: Api, folder: Path, model_type: str, **more: Any) -> dict[str, Any]:
    """Loads a folder through blobs, and gives the ended job."""
    body = {
        "name": f"{model_type}-{folder.name}",
        "model_type": model_type,
        "source": {"blobs": upload_folder(api, folder)},
    }
    answer = api.post("/api/inference/load-model", {**body, **more}, wait=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def run(api: Api, wait: float = 60, **request: Any) -> dict[str, Any]:
    """Runs a pipeline and gives the job."""
    answer = api.post("/api/inference/run", request, wait)
    assert answer.status_code in (200, 202), answer.text
    return dict(answer.json())


def refused(api: Api, **request: Any) -> dict[str, Any]:
    """The problem that a run is refused with, before anything is recorded."""
    answer = api.post("/api/inference/run", request)
    assert answer.status_code == 422, answer.text
    return dict(answer.json())


def pixels(api: Api, image: dict[str, Any]) -> np.ndarray:
    """The pixels of an image that a job made, `[H, W, 3]`."""
    answer = api.http.get(f"/api/blobs/{image['blob_id']}")
    assert answer.status_code == 200
    return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"))


def png(array: np.ndarray, form: str = "PNG", **more: Any) -> bytes:
    """The file of an image."""
    written = io.BytesIO()
    Image.fromarray(array, "RGB").save(written, form, **more)
    return written.getvalue()


@pytest.fixture(scope="session")
def sdxl() -> dict[str, Any]:
    """diffusers' and transformers' modules, with the weights of `sdxl_folder`."""
    return tiny_sdxl()


@pytest.fixture(scope="session")
def sdxl_folder(sdxl: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same exported, with the scheduler that SDXL base has."""
    return export_sdxl(sdxl, tmp_path_factory.mktemp("sdxl"), base_scheduler())


def base_scheduler(**more: Any) -> EulerDiscreteScheduler:
    """The scheduler of SDXL base."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading",
        **more,
    )  # fmt: skip
