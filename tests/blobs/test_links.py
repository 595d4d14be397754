"""Links to a blob that need no key: what one opens, and what it does not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest

from api_gateway import links
from device_operations.settings import Settings
from tests.support.stack import RunningStack

KEYS = "zelda:key-of-zelda,bob:key-of-bob"


@pytest.fixture
def linked(start_stack: Callable[..., RunningStack], settings: Callable[..., Settings]) -> tuple[str, str, str]:
    """A service, a blob of zelda's on it, and a link to the blob."""
    stack = start_stack(API_KEYS=KEYS)
    made = httpx.post(f"{stack.http_url}/api/blobs", content=b"0123456789", headers={"X-API-Key": "key-of-zelda"})
    blob_id = made.json()["blob_id"]
    return stack.http_url, blob_id, links.path_of(settings(API_KEYS=KEYS), blob_id)


def test_a_link_opens_its_blob_and_nothing_else(linked: tuple[str, str, str]) -> None:
    service, blob_id, link = linked
    whole = httpx.get(service + link)
    assert (whole.status_code, whole.content) == (200, b"0123456789")
    assert httpx.get(service + link, headers={"Range": "bytes=2-4"}).content == b"234"
    query = dict(parse_qsl(urlsplit(link).query))
    other = httpx.post(f"{service}/api/blobs", content=b"other", headers={"X-API-Key": "key-of-zelda"}).json()[
        "blob_id"
    ]
    tried: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", other, query),
        ("GET", blob_id, {}),
        ("GET", blob_id, query | {"expires": str(int(query["expires"]) + 1)}),
        ("GET", blob_id, query | {"expires": "9" * 5000}),
        ("GET", blob_id, query | {"expires": "soon"}),
        ("GET", blob_id, query | {"signature": "0" * 64}),
        ("GET", blob_id, query | {"signature": "é"}),
        ("GET", blob_id, {"expires": query["expires"]}),
        ("GET", blob_id, {"signature": query["signature"]}),
        ("DELETE", blob_id, query),
        ("HEAD", blob_id, query),
    ]
    for method, blob, given in tried:
        refused = httpx.request(method, f"{service}/api/blobs/{blob}", params=given)
        assert refused.status_code == 401, (method, given)
    bob = {"X-API-Key": "key-of-bob"}
    assert httpx.get(f"{service}/api/blobs/{blob_id}", headers=bob).status_code == 404
    assert (
        httpx.get(f"{service}/api/blobs/{blob_id}", params={"expires": "1", "signature": "a"}, headers=bob).status_code
        == 404
    )


def test_a_link_ends_after_an_hour_and_with_the_keys(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    before, after = settings(API_KEYS=KEYS), settings(API_KEYS="zelda:another-key")
    query = dict(parse_qsl(urlsplit(links.path_of(before, "b")).query))

    def is_good(known: Settings) -> bool:
        return links.is_good(known, "b", query["expires"], query["signature"])

    assert is_good(before)
    assert not is_good(after)
    monkeypatch.setattr(time, "time", lambda: now + links.LINK_SECONDS + 2)
    assert not is_good(before)


def test_without_keys_a_link_is_the_address_alone(settings: Any) -> None:
    assert links.path_of(settings(), "a b") == "/api/blobs/a%20b"
    assert not links.is_good(settings(), "a", str(1 << 40), "")
