"""Parts of an idle pipeline leave one by one where memory runs out, and come back when a run needs them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tasks.inference.content import ESTIMATE_BYTES, ESTIMATE_FACTOR
from tests.inference import graphs
from tests.inference.conftest import Api
from tests.inference.test_models import _set_budget
from tests.pipelines.conftest import pixels, png, run, upload
from tests.pipelines.driving import opened

ASKED: dict[str, Any] = {"prompt": "a photo of a cat", "seed": 3, "steps": 2, "width": 32, "height": 32}


def loaded(api: Api, folder: Path, **more: Any) -> dict[str, Any]:
    shutil.copytree(folder, api.models / "tiny-sdxl", dirs_exist_ok=True)
    body = {"name": "tiny", "model_type": "sdxl", "source": {"path": "tiny-sdxl"}, **more}
    job = api.post("/api/inference/load-model", body, wait=60).json()
    assert job["state"] == "succeeded", job["error"]
    return api.model(job["result"]["model_id"])


def sizes(model: dict[str, Any]) -> dict[str, int]:
    return {part["name"]: part["memory_bytes"] for part in model["parts"]}


def evicted(api: Api, model_id: str) -> set[str]:
    """The parts that are away; what the model takes is what the others take, and what is reserved is what all take."""
    model = api.model(model_id)
    gone = {part["name"] for part in model["parts"] if part["evicted"]}
    here = sum(size for name, size in sizes(model).items() if name not in gone)
    assert model["memory_bytes"] == max(here, ESTIMATE_BYTES)
    every = [one for one in api.http.get("/api/inference/models").json()["models"] if one["state"] == "loaded"]
    assert reserved(api) == sum(one["memory_bytes"] for one in every)
    return gone


def reserved(api: Api) -> int:
    """The bytes as recorded: the routes say no more than the budget that a test has set."""
    import psycopg2

    connection = psycopg2.connect(api.stack.database_url)
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT reserved_bytes FROM device_budgets")
        (found,) = cursor.fetchone() or (None,)
    connection.close()
    return int(found)


def make_room(api: Api, name: str, megabytes: int, free_bytes: int) -> str:
    """Loads a model where only so many bytes are free, before its size has been measured."""
    _set_budget(api, free_bytes=int(megabytes * 2**20 * ESTIMATE_FACTOR) + ESTIMATE_BYTES + free_bytes)
    return str(api.load(graphs.heavy(megabytes), name)["model_id"])


def test_parts_leave_the_least_recently_used_first_and_come_back(
    start_api: Callable[..., Api], sdxl_folder: Path
) -> None:
    api = start_api()
    model = loaded(api, sdxl_folder)
    model_id, parts = str(model["model_id"]), sizes(model)
    assert evicted(api, model_id) == set()
    before = run(api, model_id=model_id, **ASKED)["result"]["images"][0]
    # The encoder of images was not used since the load. One byte more than it holds is missing.
    heavy = make_room(api, "first", 24, -parts["vae_encoder"])
    assert evicted(api, model_id) >= {"vae_encoder", "text_encoder"}
    assert "vae_decoder" not in evicted(api, model_id), "it was used last"
    assert api.model(model_id)["state"] == "loaded"
    api.unload(heavy)
    again = run(api, model_id=model_id, **ASKED)["result"]["images"][0]
    assert np.array_equal(pixels(api, again), pixels(api, before))
    assert evicted(api, model_id) == {"vae_encoder"}
    picture = upload(api, png(np.zeros((32, 32, 3), np.uint8)))
    assert run(api, model_id=model_id, **ASKED, image={"blob_id": picture}, strength=0.6)["state"] == "succeeded"
    assert evicted(api, model_id) == set()


def test_a_part_that_comes_back_makes_room_for_itself(start_api: Callable[..., Api], sdxl_folder: Path) -> None:
    api = start_api()
    model = loaded(api, sdxl_folder)
    model_id, parts = str(model["model_id"]), sizes(model)
    run(api, model_id=model_id, **ASKED)
    heavy = make_room(api, "first", 24, -parts["vae_encoder"])
    assert evicted(api, model_id)
    _set_budget(api, free_bytes=0)
    assert run(api, model_id=model_id, **ASKED)["state"] == "succeeded"
    assert evicted(api, model_id) == {"vae_encoder"}
    assert api.model(heavy)["state"] == "evicted", "it was idle, and the pipeline was not"


def test_the_last_part_leaves_with_the_model(start_api: Callable[..., Api], sdxl_folder: Path) -> None:
    api = start_api()
    model = loaded(api, sdxl_folder)
    # Nearly all that it holds is missing: the file has some bytes besides its weights.
    make_room(api, "first", 24, 1000 - sum(sizes(model).values()))
    gone = api.model(str(model["model_id"]))
    assert gone["state"] == "evicted"
    assert reserved(api) == sum(
        one["memory_bytes"]
        for one in api.http.get("/api/inference/models").json()["models"]
        if one["state"] == "loaded"
    )
    # A new load of the same has all of its parts.
    api.unload(
        str(
            next(one for one in api.http.get("/api/inference/models").json()["models"] if one["name"] == "first")[
                "model_id"
            ]
        )
    )
    again = loaded(api, sdxl_folder)
    assert evicted(api, str(again["model_id"])) == set()


def test_what_shares_the_graph_is_told_what_is_there(start_api: Callable[..., Api], sdxl_folder: Path) -> None:
    api = start_api()
    model = loaded(api, sdxl_folder)
    model_id = str(model["model_id"])
    heavy = make_room(api, "first", 24, -1)
    gone = evicted(api, model_id)
    assert gone
    api.unload(heavy)
    other = loaded(api, sdxl_folder, name="other")
    assert {part["name"] for part in other["parts"] if part["evicted"]} == gone
    assert other["memory_bytes"] == api.model(model_id)["memory_bytes"]
    assert run(api, model_id=other["model_id"], **ASKED)["state"] == "succeeded"
    assert api.model(model_id)["parts"] == api.model(str(other["model_id"]))["parts"]


def test_neither_the_last_part_nor_one_of_low_memory_is_evicted_alone(sdxl_folder: Path) -> None:
    pipeline = opened("sdxl", sdxl_folder)
    whole = pipeline.parts.memory_bytes
    assert [pipeline.parts.evict_part() for _ in range(5)] == [True] * 4 + [False]
    assert 0 < pipeline.parts.memory_bytes < whole
    assert not opened("sdxl", sdxl_folder, low_memory=True).parts.evict_part()
