"""A stack with keys of two owners and an admin, with embedding models on it, and OpenAI's own clients.

served    module    the stack
zelda     module    openai.OpenAI with zelda's key, who has the models
bob       module    the same for another owner
load      module    load(owner, name, changes={}, **fields) -> the loaded model, made of `tests.support.embedding`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.owners.things import KEYS, client_of, done
from tests.support import embedding
from tests.support.stack import RunningStack

Load = Callable[..., dict[str, Any]]


def loaded(http: httpx.Client, name: str, changes: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """Loads a tiny text embedding model from blobs."""
    blobs = {
        path: http.post("/api/blobs", content=content).json()["blob_id"]
        for path, content in embedding.files(changes).items()
    }
    body = {"name": name, "model_type": "text_embedding", "source": {"blobs": blobs}, **fields}
    result: dict[str, Any] = done(http, http.post("/api/inference/load-model", json=body))["result"]
    return result


def client(stack: RunningStack, owner: str, **options: Any) -> openai.OpenAI:
    """OpenAI's client with the owner's key."""
    return openai.OpenAI(
        api_key=f"key-of-{owner}", base_url=f"{stack.http_url}/v1", max_retries=0, timeout=60, **options
    )


@pytest.fixture(scope="module")
def served(databases: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with databases.migrated() as url:
        folder = tmp_path_factory.mktemp("served")
        running = RunningStack(folder, url, databases.redis_url(), "cpu:1", settings={"API_KEYS": KEYS})
        try:
            running.start()
            running.wait_ready()
            yield running
        finally:
            running.close()


@pytest.fixture(scope="module")
def load(served: RunningStack) -> Iterator[Load]:
    clients = {owner: client_of(served, owner) for owner in ("zelda", "bob", "root")}
    yield lambda owner, *given, **fields: loaded(clients[owner], *given, **fields)
    for http in clients.values():
        http.close()


@pytest.fixture(scope="module")
def zelda(served: RunningStack, load: Load) -> openai.OpenAI:
    load("zelda", "tiny")
    return client(served, "zelda")


@pytest.fixture(scope="module")
def bob(served: RunningStack) -> openai.OpenAI:
    return client(served, "bob")
