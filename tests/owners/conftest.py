"""Two owners, each with a thing of every kind, and an admin, on one stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.owners.things import KEYS, Things, client_of, make_things
from tests.pipelines.conftest import sdxl, sdxl_folder, vae, vae_folder
from tests.support import embedding
from tests.support.stack import RunningStack

__all__ = ["sdxl", "sdxl_folder", "vae", "vae_folder"]


@pytest.fixture(scope="module")
def owned(databases: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """A stack with keys of two owners and an admin."""
    with databases.migrated() as url:
        settings: dict[str, object] = {"API_KEYS": KEYS, "INFERENCE__MAX_CONCURRENT_SESSIONS": 50}
        running = RunningStack(tmp_path_factory.mktemp("owned"), url, databases.redis_url(), "cpu:1", settings=settings)
        try:
            running.start()
            running.wait_ready()
            yield running
        finally:
            running.close()


@pytest.fixture(scope="module")
def pipelines(vae_folder: Path, sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each type of pipeline."""
    text_embedding = embedding.write(tmp_path_factory.mktemp("text-embedding"))
    return {"vae": vae_folder, "sdxl": sdxl_folder, "text_embedding": text_embedding}


@pytest.fixture(scope="module")
def zelda(owned: RunningStack, pipelines: dict[str, Path]) -> Iterator[Things]:
    """The owner whose things others try to reach."""
    with client_of(owned, "zelda") as client:
        yield make_things(client, "zelda", 0.5, pipelines)


@pytest.fixture(scope="module")
def bob(owned: RunningStack, pipelines: dict[str, Path]) -> Iterator[Things]:
    """The other owner, who tries."""
    with client_of(owned, "bob") as client:
        yield make_things(client, "bob", 0.25, pipelines)


@pytest.fixture(scope="module")
def root(owned: RunningStack) -> Iterator[httpx.Client]:
    """An admin's client."""
    with client_of(owned, "root") as client:
        yield client
