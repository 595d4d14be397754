"""docs/openai.md: its example runs as it stands, but for the address, the key and the image's size."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from tests.openai.conftest import loaded
from tests.openai.test_images import pixels
from tests.owners.things import client_of, done
from tests.pipelines.conftest import sdxl, sdxl_folder
from tests.support.stack import REPOSITORY, RunningStack

__all__ = ["sdxl", "sdxl_folder"]


def test_the_example_runs(served: RunningStack, sdxl_folder: Path) -> None:
    with client_of(served, "zelda") as http:
        loaded(http, "minilm")
        files = [file for file in sdxl_folder.rglob("*") if file.is_file()]
        blobs = {
            str(file.relative_to(sdxl_folder)): http.post("/api/blobs", content=file.read_bytes()).json()["blob_id"]
            for file in files
        }
        body = {"name": "sdxl", "model_type": "sdxl", "source": {"blobs": blobs}}
        done(http, http.post("/api/inference/load-model", json=body))
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "openai.md").read_text(), re.DOTALL)
    for there, here in (
        ("http://127.0.0.1:8000", served.http_url), ("key-of-alice", "key-of-zelda"), ("1024x1024", "64x32"),
    ):  # fmt: skip
        assert there in example
        example = example.replace(there, here)
    names: dict[str, Any] = {}
    exec(example, names)
    assert len(names["vectors"].data) == 2
    assert pixels(base64.b64decode(names["image"].data[0].b64_json)).shape == (32, 64, 3)
