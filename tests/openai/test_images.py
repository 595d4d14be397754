"""`client.images.generate` of OpenAI's unmodified client, on a tiny SDXL with random weights."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.openai.conftest import client
from tests.owners.things import client_of, done
from tests.pipelines.conftest import sdxl, sdxl_folder
from tests.support.stack import RunningStack, eventually

__all__ = ["sdxl", "sdxl_folder"]

SIZE = "64x32"


@pytest.fixture(scope="module")
def painter(served: RunningStack, zelda: openai.OpenAI, sdxl_folder: Path) -> str:
    """The name of zelda's model that makes images."""
    with client_of(served, "zelda") as http:
        blobs = {
            str(file.relative_to(sdxl_folder)): http.post("/api/blobs", content=file.read_bytes()).json()["blob_id"]
            for file in sdxl_folder.rglob("*")
            if file.is_file()
        }
        body = {"name": "painter", "model_type": "sdxl", "source": {"blobs": blobs}}
        done(http, http.post("/api/inference/load-model", json=body))
    return "painter"


def generate(zelda: Any, **fields: Any) -> Any:
    extra = {"steps": 3, "seed": 7, **fields.pop("extra_body", {})}
    return zelda.images.generate(**{"prompt": "a lighthouse", "size": SIZE, "extra_body": extra, **fields})


def pixels(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_images_as_base64(zelda: openai.OpenAI, painter: str) -> None:
    answer = generate(zelda, model=painter, n=2, response_format="b64_json")
    assert answer.created > 1_700_000_000
    found = [pixels(base64.b64decode(image.b64_json)) for image in answer.data]
    assert [one.shape for one in found] == [(32, 64, 3)] * 2
    assert [image.seed for image in answer.data] == [7, 8]
    assert not np.array_equal(*found)
    again = generate(zelda, model=painter, response_format="b64_json", extra_body={"seed": 8})
    assert np.array_equal(pixels(base64.b64decode(again.data[0].b64_json)), found[1])


def test_images_as_addresses_that_need_no_key(served: RunningStack, zelda: openai.OpenAI, painter: str) -> None:
    answer = generate(zelda, model=painter)
    url = answer.data[0].url
    assert url.startswith(f"{served.http_url}/api/blobs/")
    assert pixels(httpx.get(url).raise_for_status().content).shape == (32, 64, 3)
    bare = url.partition("?")[0]
    assert httpx.get(bare).status_code == 401
    with client_of(served, "bob") as bob:
        assert bob.get(bare).status_code == 404


def test_what_openai_has_no_field_for_goes_in_the_extra_body(
    served: RunningStack, zelda: openai.OpenAI, painter: str
) -> None:
    extra = {"steps": 2, "guidance": 3.5, "negative_prompt": "fog", "scheduler": "ddim", "seed": 11}
    answer = generate(zelda, model=painter, extra_body={**extra, "job": {"labels": {"who": "painter"}}})
    with client_of(served, "zelda") as http:
        job = http.get(f"/api/jobs/{answer.job_id}", params={"include": "request"}).json()
    facts = {name: job["result"][name] for name in ("seed", "steps", "guidance_scale", "scheduler")}
    assert facts == {"seed": 11, "steps": 2, "guidance_scale": 3.5, "scheduler": "ddim"}
    assert job["request"]["negative_prompt"] == "fog"
    assert job["labels"] == {"who": "painter"}
    other = generate(zelda, model=painter, response_format="b64_json")
    plain = generate(zelda, model=painter, response_format="b64_json", extra_body={"negative_prompt": "fog"})
    assert other.data[0].b64_json != plain.data[0].b64_json


def test_the_model_may_be_left_out_where_there_is_just_one(
    zelda: openai.OpenAI, bob: openai.OpenAI, painter: str
) -> None:
    assert len(generate(zelda, quality="hd", style="vivid", user="u").data) == 1
    with pytest.raises(openai.BadRequestError) as refused:
        generate(bob)
    assert refused.value.param == "model"


def test_the_asynchronous_client(served: RunningStack, zelda: openai.OpenAI, painter: str) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(api_key="key-of-zelda", base_url=f"{served.http_url}/v1") as asynchronous:
            return await asyncio.gather(
                *(generate(asynchronous, model=painter, extra_body={"seed": seed}) for seed in range(3))
            )

    assert [answer.data[0].seed for answer in asyncio.run(ask())] == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a" * 32_001}, "prompt"),
        ({"prompt": "a" * 32_000}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": "2"}, "n"),
        ({"size": "64"}, "size"),
        ({"size": "64x"}, "size"),
        ({"size": "0x64"}, "size"),
        ({"size": "60x64"}, "size"),
        ({"size": "99992x64"}, "size"),
        ({"size": "4096x4096"}, None),
        ({"response_format": "file"}, "response_format"),
        ({"steps": 0}, "steps"),
        ({"steps": 10**6}, "steps"),
        ({"guidance": -1}, "guidance_scale"),
        ({"guidance_scale": 1e9}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"scheduler": "magic"}, "scheduler"),
        ({"stream": True}, "stream"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "jpeg"}, "output_format"),
        ({"unknown": 1}, "unknown"),
        ({"prompt": "a\x00"}, None),
    ],
)
def test_what_cannot_be_made_is_a_bad_request(
    zelda: openai.OpenAI, painter: str, fields: dict[str, Any], parameter: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        zelda.post(
            "/images/generations", body={"model": painter, "prompt": "a", "size": SIZE, **fields}, cast_to=object
        )
    assert (refused.value.param, refused.value.type) == (parameter, "invalid_request_error")


def test_guidance_that_is_no_number_is_a_bad_request(served: RunningStack, painter: str) -> None:
    with client_of(served, "zelda") as http:
        for word in (b"NaN", b"Infinity", b'"NaN"', b"1e999"):
            body = b'{"model": "painter", "prompt": "a", "guidance": ' + word + b"}"
            answer = http.post("/v1/images/generations", content=body)
            assert answer.status_code == 400, word


def test_a_model_that_embeds_makes_no_images(zelda: openai.OpenAI, painter: str) -> None:
    with pytest.raises(openai.BadRequestError, match="makes no images") as refused:
        generate(zelda, model="tiny")
    assert refused.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        zelda.embeddings.create(model=painter, input="a")
    assert {"tiny", painter} <= {model.id for model in zelda.models.list()}


def test_a_client_that_leaves_cancels_its_job(served: RunningStack, zelda: openai.OpenAI, painter: str) -> None:
    impatient = zelda.with_options(timeout=httpx.Timeout(60, read=1))
    with pytest.raises(openai.APITimeoutError):
        generate(
            impatient,
            model=painter,
            n=10,
            size="256x256",
            extra_body={"steps": 1000, "job": {"labels": {"who": "left"}}},
        )
    with client_of(served, "zelda") as http:

        def state() -> str:
            (job,) = http.get("/api/jobs", params={"label": "who=left"}).json()["jobs"]
            return str(job["state"])

        eventually(lambda: state() == "cancelled")


def test_without_keys_addresses_are_plain(start_stack: Any, sdxl_folder: Path) -> None:
    stack = start_stack()
    http = stack.client
    blobs = {
        str(file.relative_to(sdxl_folder)): http.post("/api/blobs", content=file.read_bytes()).json()["blob_id"]
        for file in sdxl_folder.rglob("*")
        if file.is_file()
    }
    done(
        http,
        http.post("/api/inference/load-model", json={"name": "p", "model_type": "sdxl", "source": {"blobs": blobs}}),
    )
    url = generate(client(stack, "anybody")).data[0].url
    assert "?" not in url
    assert pixels(httpx.get(url).content).shape == (32, 64, 3)
