"""The sdxl pipeline over HTTP: images as blobs, progress with previews, stopping, and what goes between its steps."""

from __future__ import annotations

import json
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.inference import graphs
from tests.inference.conftest import Api, as_tensor
from tests.pipelines.conftest import load_folder, pixels, png, refused, run, upload
from tests.pipelines.driving import context, made, opened
from tests.support.stack import eventually

#: Sides for which one step takes a good part of a second.
LARGE = {"width": 192, "height": 192}
PROMPT = "an astronaut riding a horse"


@pytest.fixture(scope="module")
def model(api: Api, sdxl_folder: Path) -> str:
    """The tiny pipeline, loaded."""
    shutil.copytree(sdxl_folder, api.models / "tiny-sdxl")
    body = {"name": "tiny", "model_type": "sdxl", "source": {"path": "tiny-sdxl"}}
    answer = api.post("/api/inference/load-model", body, wait=60)
    assert answer.json()["state"] == "succeeded", answer.text
    return str(answer.json()["result"]["model_id"])


def job_of(api: Api, job_id: str) -> dict[str, Any]:
    return dict(api.http.get(f"/api/jobs/{job_id}").json())


def begun(api: Api, model: str, **more: Any) -> dict[str, Any]:
    """A long run that has done a step, and goes on."""
    job = run(api, wait=0, model_id=model, **{"prompt": PROMPT, "steps": 1000, **LARGE, **more})
    eventually(lambda: (job_of(api, job["job_id"])["progress"] or {}).get("done", 0) >= 2)
    return job_of(api, job["job_id"])


def test_a_prompt_becomes_images_that_belong_to_the_caller(api: Api, model: str, sdxl_folder: Path) -> None:
    asked = {"prompt": PROMPT, "width": 32, "height": 48, "steps": 3, "images": 2, "seed": 11, "scheduler": "unipc"}
    job = run(api, model_id=model, **asked)
    assert job["state"] == "succeeded", job["error"]
    result = job["result"]
    assert [(one["media_type"], one["width"], one["height"], one["seed"]) for one in result["images"]] == [
        ("image/png", 32, 48, 11), ("image/png", 32, 48, 12),
    ]  # fmt: skip
    assert (result["seed"], result["steps"], result["scheduler"], result["truncated"]) == (11, 3, "unipc", [])
    alone = made(opened("sdxl", sdxl_folder), context({**asked, "images": 1}))
    assert np.array_equal(pixels(api, result["images"][0]), alone.images[0].pixels)
    # The same again by name, one of them alone and as WebP.
    again = run(api, model_name="tiny", **{**asked, "images": 1, "seed": 12, "output_format": "webp"})
    (image,) = again["result"]["images"]
    assert image["media_type"] == "image/webp"
    assert np.array_equal(pixels(api, image), pixels(api, result["images"][1]))


def test_a_load_and_its_runs_go_in_one_submission(api: Api, model: str) -> None:
    load = {
        "name": "in-bulk",
        "model_type": "sdxl",
        "source": {"path": "tiny-sdxl"},
        "options": {"intra_op_threads": 1},
    }
    asked = {"prompt": PROMPT, "width": 32, "height": 32, "steps": 2, "seed": 1}
    jobs = [
        {"kind": "inference.load_model", "request": load},
        {"kind": "inference.run", "request": {"model_id": {"$entry": 0}, **asked}},
        {"kind": "inference.run", "request": {"model_name": "in-bulk", **asked}},
    ]
    ended = api.post("/api/jobs", {"jobs": jobs}, wait=60).json()["jobs"]
    assert [job["state"] for job in ended] == ["succeeded"] * 3, [job["error"] for job in ended]
    assert np.array_equal(*(pixels(api, job["result"]["images"][0]) for job in ended[1:]))
    wrong = {"kind": "inference.run", "request": {"model_id": {"$entry": 0}, **asked, "steps": 0}}
    refusal = api.post("/api/jobs", {"jobs": [{**jobs[0], "request": {**load, "name": "other"}}, wrong]})
    assert (refusal.status_code, refusal.json()["code"]) == (422, "validation_failed")
    assert not [one for one in api.http.get("/api/inference/models").json()["models"] if one["name"] == "other"]


def test_without_a_seed_each_run_has_one_of_its_own_that_makes_the_same_image(api: Api, model: str) -> None:
    asked = {"model_id": model, "prompt": PROMPT, "width": 32, "height": 32, "steps": 2}
    first, second = run(api, **asked)["result"], run(api, **asked)["result"]
    assert first["seed"] != second["seed"]
    again = run(api, **asked, seed=second["seed"])["result"]
    assert np.array_equal(pixels(api, again["images"][0]), pixels(api, second["images"][0]))


def test_blobs_load_it_with_little_memory_and_an_image_starts_from_one(api: Api, model: str, sdxl_folder: Path) -> None:
    job = load_folder(api, sdxl_folder, "sdxl", options={"low_memory": True})
    assert job["state"] == "succeeded", job["error"]
    assert job["result"]["pipeline"] == {"scheduler": "euler", "image_to_image": True}
    frugal, whole = api.model(job["result"]["model_id"]), api.model(model)
    parts = {part["name"]: part["memory_bytes"] for part in frugal["parts"]}
    assert parts.keys() == {"text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"}
    assert frugal["memory_bytes"] == max(*parts.values(), 4 << 20)
    assert whole["memory_bytes"] >= sum(part["file_bytes"] for part in whole["parts"])
    picture = np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8)
    asked = {
        "prompt": PROMPT,
        "image": {"blob_id": upload(api, png(picture, "JPEG"))},
        "strength": 0.5,
        "steps": 4,
        "seed": 3,
    }
    images = [run(api, model_id=one["model_id"], **asked)["result"]["images"][0] for one in (frugal, whole)]
    assert images[0]["width"] == 32
    assert np.array_equal(*(pixels(api, image) for image in images))


def test_progress_has_each_step_with_the_time_left_and_previews_as_events(api: Api, model: str) -> None:
    job = begun(api, model, steps=12, preview_every=3)
    told: list[dict[str, Any]] = []
    address = f"/api/jobs/{job['job_id']}/events"
    with (
        httpx.Client(base_url=api.stack.http_url, timeout=60, trust_env=False) as client,
        client.stream("GET", address) as events,
    ):
        told += [json.loads(line[5:]) for line in events.iter_lines() if line.startswith("data:")]
    progress = [one for one in told if "done" in one]
    assert {one["total"] for one in progress} == {12}
    assert all(one["seconds_left"] > 0 for one in progress if one["done"] < 12)
    previews = [one["preview"] for one in progress if "preview" in one]
    assert previews, told
    assert pixels(api, previews[-1]).shape == (96, 96, 3)
    assert told[-1]["state"] == "succeeded"
    assert told[-1]["progress"]["done"] == 12, "the last step is kept"


def test_a_run_that_is_cancelled_ends_within_its_step(api: Api, model: str) -> None:
    job = begun(api, model)
    one_step = job["progress"]["seconds_left"] / (1000 - job["progress"]["done"])
    began = time.monotonic()
    assert api.http.delete(f"/api/jobs/{job['job_id']}").status_code == 202
    ended = api.http.get(f"/api/jobs/{job['job_id']}", params={"wait": 30}).json()
    took = time.monotonic() - began
    assert ended["state"] == "cancelled"
    assert took < 2 * one_step + 1, f"one step takes {one_step:.2f} s, and the end took {took:.2f} s"


def test_a_run_ends_when_its_time_is_up(api: Api, model: str) -> None:
    asked = {"prompt": PROMPT, "steps": 1000, **LARGE, "job": {"timeout_seconds": 1.5}}
    ended = run(api, wait=50, model_id=model, **asked)
    assert (ended["state"], ended["error"]["code"]) == ("failed", "timeout")


def test_an_urgent_run_of_another_model_goes_between_two_steps(api: Api, model: str) -> None:
    other = api.load(graphs.affine())["model_id"]
    long = begun(api, model)
    before = job_of(api, long["job_id"])["progress"]["done"]
    urgent = api.run(other, {"x": np.zeros((1, 4), np.float32)}, job={"priority": 9})
    assert urgent["state"] == "succeeded"
    there = job_of(api, long["job_id"])
    assert there["state"] == "running"
    assert there["progress"]["done"] <= before + 3, "the urgent run waited for more than the step under way"
    eventually(lambda: job_of(api, long["job_id"])["progress"]["done"] > there["progress"]["done"])
    # A second image, of the same pipeline, goes between too, and neither is the other.
    small = {"model_id": model, "prompt": PROMPT, "width": 32, "height": 32, "steps": 2, "seed": 5}
    between = run(api, **small, job={"priority": 9})["result"]["images"][0]
    assert job_of(api, long["job_id"])["state"] == "running"
    api.http.delete(f"/api/jobs/{long['job_id']}")
    assert np.array_equal(pixels(api, between), pixels(api, run(api, **small)["result"]["images"][0]))


def test_unloading_by_force_stops_a_run_and_frees_the_memory(api: Api, sdxl_folder: Path) -> None:
    job = load_folder(api, sdxl_folder, "sdxl", name="to-go", version="2", options={"intra_op_threads": 3})
    model_id = job["result"]["model_id"]
    reserved = api.http.get("/api/memory/device/cpu_0").json()["models_bytes"]
    running = begun(api, model_id)
    answer = api.http.delete(f"/api/inference/unload-model/{model_id}?force=true", headers={"Prefer": "wait=30"})
    assert answer.json()["state"] == "succeeded", answer.text
    assert job_of(api, running["job_id"])["state"] == "cancelled"
    assert api.http.get("/api/memory/device/cpu_0").json()["models_bytes"] < reserved


REFUSED = [
    ({"steps": 0}, "steps"),
    ({"steps": 10**6}, "steps"),
    ({"guidance_scale": "NaN"}, "guidance_scale"),
    ({"guidance_scale": 1e9}, "guidance_scale"),
    ({"guidance_scale": -1}, "guidance_scale"),
    ({"scheduler": "heun"}, "scheduler"),
    ({"width": 33}, "width"),
    ({"width": 0}, "width"),
    ({"height": 8192}, "height"),
    ({"width": 4096, "height": 4096}, "4194304 pixels"),
    ({"width": 32.5}, "width"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"images": 0}, "images"),
    ({"images": 17}, "images"),
    ({"strength": 0.5}, "strength goes with image"),
    ({"strength": 1.5, "image": {"base64": ""}}, "strength"),
    ({"image": {}}, "exactly one of blob_id and base64"),
    ({"image": {"base64": "%%%"}}, "base64 does not decode"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "a\x00b"}, "NUL"),
    ({"prompt": "a" * 20_001}, "prompt"),
    ({"preview_every": 0}, "preview_every"),
    ({"output_format": "gif"}, "output_format"),
    ({"color": "red"}, "color"),
    ({"latents": as_tensor(np.zeros(1, np.float32))}, "latents"),
]


@pytest.mark.parametrize(
    ("more", "says"), REFUSED, ids=[f"{list(more)}-{number}" for number, (more, _) in enumerate(REFUSED)]
)
def test_a_request_that_does_not_fit_is_refused_before_a_job_is_made(
    api: Api, model: str, more: dict[str, Any], says: str
) -> None:
    problem = refused(api, model_id=model, **{"prompt": PROMPT, **more})
    assert says in json.dumps(problem), problem
    assert problem["code"] in ("validation_failed", "input_mismatch")


def test_guidance_that_is_no_number_is_refused_in_json_too(api: Api, model: str) -> None:
    body = json.dumps({"model_id": model, "prompt": PROMPT, "guidance_scale": float("nan")})
    answer = api.http.post("/api/inference/run", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text


def damaged() -> bytes:
    whole = png(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    return whole[: len(whole) // 2]


BEFORE_THE_FIRST_STEP = {
    "a damaged PNG": ({}, damaged(), "damaged"),
    "an image bomb": ({}, b"", "pixels"),
    "no picture": ({}, b"GIF89a" + bytes(100), "neither a PNG nor a JPEG"),
    "more steps than the schedule has": ({"steps": 51, "scheduler": "lcm"}, None, "steps"),
    "a strength that leaves no step": ({"steps": 2, "strength": 0.1}, png(np.zeros((32, 32, 3), np.uint8)), "leaves no step"),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE_THE_FIRST_STEP)
def test_what_shows_only_in_the_worker_fails_before_the_first_step(api: Api, model: str, name: str) -> None:
    more, picture, says = BEFORE_THE_FIRST_STEP[name]
    if name == "an image bomb":
        picture = png(np.zeros((1, 1, 3), np.uint8))
        # The head says 60000 x 60000 pixels, and is right about itself.
        head = picture[12:16] + (60_000).to_bytes(4, "big") * 2 + picture[24:29]
        picture = picture[:12] + head + zlib.crc32(head).to_bytes(4, "big") + picture[33:]
    given = {} if picture is None else {"image": {"blob_id": upload(api, picture)}}
    job = run(api, model_id=model, prompt=PROMPT, **{**given, **more})
    assert job["state"] == "failed", job
    assert job["error"]["code"] in ("input_mismatch", "validation_failed"), job["error"]
    assert says in job["error"]["message"]
    assert job["progress"] is None


def test_a_folder_with_a_missing_part_is_a_failed_load(api: Api, sdxl_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(sdxl_folder, folder)
    shutil.rmtree(folder / "unet")
    job = load_folder(api, folder, "sdxl")
    assert (job["state"], job["error"]["code"]) == ("failed", "model_invalid")
    assert "missing: unet" in job["error"]["message"]
    assert "low_memory" in json.dumps(
        api.post(
            "/api/inference/load-model",
            {"name": "x", "source": {"path": api.save(graphs.affine())}, "options": {"low_memory": True}},
        ).json()
    )


@pytest.mark.slow
def test_a_pipeline_comes_back_after_its_worker_died(api: Api, model: str, start_api: Any, sdxl_folder: Path) -> None:
    own = start_api(LEASE_SECONDS=3)
    job = load_folder(own, sdxl_folder, "sdxl")
    model_id = job["result"]["model_id"]
    asked = {"model_id": model_id, "prompt": PROMPT, "width": 32, "height": 32, "steps": 2, "seed": 1}
    before = pixels(own, run(own, **asked)["result"]["images"][0])
    long = begun(own, model_id, steps=8, seed=4)
    own.stack.kill("cpu_0")
    own.stack.start("cpu_0")
    own.stack.wait_ready()
    ended = own.http.get(f"/api/jobs/{long['job_id']}", params={"wait": 60}).json()
    assert ended["state"] == "succeeded", ended["error"]
    assert np.array_equal(pixels(own, run(own, **asked)["result"]["images"][0]), before)
    assert {part["name"] for part in own.model(model_id)["parts"]} >= {"unet", "vae_decoder"}
