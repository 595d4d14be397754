"""Images by the command line and by the Python client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from device_operations import Producer
from device_operations.client import AsyncClient, Client
from device_operations.errors import OperationError
from device_operations.requests.pipelines import SdxlRun
from tests.inference.conftest import Api
from tests.pipelines.conftest import load_folder
from tests.stack.test_cli import Cli

ASKED = {"width": 32, "height": 48, "steps": 2, "seed": 4}


@pytest.fixture(scope="module")
def cli(api: Api) -> Cli:
    return Cli(api.stack)


@pytest.fixture(scope="module")
def loaded(api: Api, sdxl_folder: Path, vae_folder: Path) -> None:
    for model_type, folder in (("sdxl", sdxl_folder), ("vae", vae_folder)):
        job = load_folder(api, folder, model_type, name=f"tiny-{model_type}")
        assert job["state"] == "succeeded", job["error"]


def test_a_prompt_becomes_a_file(cli: Cli, loaded: None, tmp_path: Path) -> None:
    file = tmp_path / "out.png"
    size = ["--size", "32x48", "--steps", 2, "--seed", 4]
    told = cli("image", "a cat", "-o", file, *size)
    assert Image.open(file).size == (32, 48)
    assert "seed" in told.stdout
    several = cli.json("image", "a cat " * 90, "-o", tmp_path / "more.webp", *size, "--images", 2, "--scheduler", "lcm")
    assert [one["seed"] for one in several["images"]] == [4, 5]
    assert [Path(one["file"]).name for one in several["images"]] == ["more-1.webp", "more-2.webp"]
    assert Image.open(tmp_path / "more-2.webp").format == "WEBP"
    again = cli("image", "a cat " * 90, "-o", tmp_path / "again.png", *size, "--image", file, "--strength", 0.5)
    assert "the rest is left out" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "/nope/x.png"], "is not there"),
        (["-o", "x.gif"], "ends in .png or .webp"),
        (["--size", "big"], "is not WIDTHxHEIGHT"),
        (["--model", "nothing"], "no model 'nothing' is loaded"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_sent(
    cli: Cli, loaded: None, arguments: list[str], says: str
) -> None:
    assert says in cli("image", "a cat", *arguments, status=2).stderr


def test_a_refusal_of_the_gateway_is_the_commands_failure(cli: Cli, loaded: None, tmp_path: Path) -> None:
    refused = cli("image", "a cat", "-o", tmp_path / "x.png", "--scheduler", "heun", status=1)
    assert "scheduler" in refused.stderr
    assert not (tmp_path / "x.png").exists()


def test_the_client_gives_pillows_images_and_arrays(api: Api, loaded: None, tmp_path: Path) -> None:
    with Client(api.stack.http_url) as client:
        result = client.images.generate("a cat", model_name="tiny-sdxl", options={**ASKED, "images": 2})
        first, second = result.images
        assert (first.seed, second.seed, result.facts["steps"]) == (4, 5, 2)
        assert first.pil().size == (32, 48)
        assert first.array().shape == (48, 32, 3)
        for image in (first.pil(), first.save(tmp_path / "first.png"), first.data, {"blob_id": first.blob_id}):
            changed = client.images.generate(
                "a cat", model_name="tiny-sdxl", image=image, options={"steps": 2, "strength": 0.5, "seed": 1}
            )
            assert changed.images[0].array().shape == (48, 32, 3)
        latents = client.images.encode([first.pil(), second.pil()], model_name="tiny-vae")
        assert latents.shape == (2, 4, 24, 16)
        again = client.images.decode(latents, model_name="tiny-vae")
        assert [one.array().shape for one in again.images] == [(48, 32, 3)] * 2
        assert again.images[0].seed is None
        with pytest.raises(OperationError, match="steps"):
            client.images.generate("a cat", model_name="tiny-sdxl", options={"steps": 0})


def test_the_asynchronous_client_makes_the_same_image(api: Api, loaded: None) -> None:
    async def make() -> np.ndarray:
        async with AsyncClient(api.stack.http_url) as client:
            job = await client.images.submit("a cat", model_name="tiny-sdxl", options=ASKED)
            return (await client.images.result(job)).images[0].array()

    with Client(api.stack.http_url) as client:
        wanted = client.images.generate("a cat", model_name="tiny-sdxl", options=ASKED).images[0].array()
    assert np.array_equal(asyncio.run(make()), wanted)


def test_a_direct_caller_makes_the_same_image_without_http(api: Api, loaded: None, settings: Any) -> None:
    settings(REDIS_URL=api.stack.redis_url)
    with Client(api.stack.http_url) as client, Producer(api.stack.redis_url) as producer:
        sent = producer.send(SdxlRun(model_name="tiny-sdxl", prompt="a cat", **ASKED))
        (image,) = sent.get(timeout=60)["images"]
        wanted = client.images.generate("a cat", model_name="tiny-sdxl", options=ASKED).images[0].data
        assert client.blobs.read(image["blob_id"]) == wanted
        again = api.http.post(f"/api/jobs/{sent.id}/retry", json={"seed": 9}, headers={"Prefer": "wait=30"}).json()
        assert again["result"]["seed"] == 9
        asked = api.http.get(f"/api/jobs/{sent.id}?include=request").json()["request"]
        assert asked == {"model_name": "tiny-sdxl", "prompt": "a cat", **ASKED, "job": {"priority": 5}}
