"""Flower: every page of it asks for the password, and it does not start without one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import flower.urls
import httpx
import pytest

from device_operations.stack import processes, services
from device_operations.stack.state import free_port
from tests.support.stack import REPOSITORY, eventually

PASSWORD = "open-sesame"

#: Every address that Flower serves, with something for what varies in it.
PAGES = sorted(
    {
        str(getattr(entry, "regex", None).pattern if hasattr(entry, "regex") else entry[0])
        .rstrip("$")
        .replace("(.+)", "x")
        .replace("(.*)", "x")
        .replace("/?", "")
        .replace(".*", "/nowhere")
        for entry in flower.urls.handlers
    }
)


@pytest.fixture(scope="module")
def url(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("flower")
    port = free_port()
    settings = {"REDIS_URL": redis_url, "FLOWER__PORT": port, "FLOWER__PASSWORD": PASSWORD}
    # What a user has set for a Flower of their own must not change ours.
    environment = services.environment(settings) | {
        "FLOWER_UNAUTHENTICATED_API": "true",
        "FLOWER_BASIC_AUTH": "a:b",
        "FLOWER_URL_PREFIX": "elsewhere",
    }
    service = services.flower(environment, f"http://127.0.0.1:{port}", REPOSITORY)
    process = processes.start(service.command, folder / "flower.log")
    try:
        eventually(service.is_ready)
        yield service.url
    finally:
        processes.ask_to_stop(process)
        left = processes.await_end([process], 10)
        processes.end_tree(process)
        assert not left, "it stops when it is asked to"


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client() as client:
        yield client


def test_the_list_of_pages_is_flowers_own() -> None:
    assert {"/", "/metrics", "/healthcheck", "/api/tasks", "/tasks", "/login", "/nowhere"} <= set(PAGES)


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("/static")])
def test_no_page_answers_without_the_password(url: str, page: str, http: httpx.Client) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        for login in (None, ("admin", "wrong"), ("a", "b")):
            assert http.request(method, url + page, auth=login).status_code == 401, (method, login)


@pytest.mark.parametrize("page", ["/", "/metrics", "/healthcheck", "/api/workers", "/tasks"])
def test_pages_answer_with_the_password(url: str, page: str, http: httpx.Client) -> None:
    assert http.get(url + page, auth=("admin", PASSWORD)).status_code == 200


def test_it_does_not_start_without_a_password(redis_url: str, tmp_path: Path) -> None:
    environment = services.environment({"REDIS_URL": redis_url, "DATA_DIR": tmp_path})
    command = [sys.executable, *services.FLOWER]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "DEVICE_OPERATIONS_FLOWER__PASSWORD" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="only here is it read from /proc")
def test_the_password_is_no_argument(url: str) -> None:
    arguments = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [text for text in arguments if PASSWORD.encode() in text]
