"""No list, figure or page that an owner may read says anything of another owner's things."""

from __future__ import annotations

import httpx
import pytest

from tests.owners import places
from tests.owners.test_walk import DOCUMENT
from tests.owners.things import Things

#: What is read without naming a thing: every such GET, and the one list that is asked for by POST.
READ = [
    route
    for route, _ in places.routes(DOCUMENT)
    if route in places.NAMES_NOTHING and (route.startswith("GET ") or route.endswith("/index"))
]


#: What identifies an owner's things: their ids by noun, their label, and the owner's name.
SECRETS = (
    "job", "allocation", "blob", "model", "model name", "inference session", "training session", "checkpoint", "label",
    "owner",
)  # fmt: skip


@pytest.mark.parametrize("noun", SECRETS)
def test_no_list_shows_anothers_things(noun: str, zelda: Things, bob: Things) -> None:
    secret = {**zelda.ids, "label": zelda.label, "owner": "zelda"}[noun]
    telling = [route for route in READ if secret in _read(bob, route)]
    assert telling == []


def test_its_owner_finds_each_thing_in_a_list(zelda: Things) -> None:
    everything = "".join(_read(zelda, route) for route in [*READ, "GET /api/training/checkpoints"])
    listed = {noun for noun, thing_id in zelda.ids.items() if thing_id in everything}
    assert listed == zelda.ids.keys() - {"blob"}  # there is no list of blobs
    assert zelda.label in everything


def test_an_admin_finds_everybodys(zelda: Things, bob: Things, root: httpx.Client) -> None:
    listed = root.get("/api/memory/allocations").json()["allocations"]
    assert {zelda.ids["allocation"], bob.ids["allocation"]} <= {one["allocation_id"] for one in listed}


@pytest.mark.parametrize("route", ["/api/jobs", "/api/memory/allocations"])
def test_only_an_admin_asks_for_another_owner(route: str, zelda: Things, bob: Things, root: httpx.Client) -> None:
    theirs, unknown = (bob.client.get(route, params={"owner": owner}) for owner in ("zelda", "link"))
    assert (theirs.status_code, theirs.json()["code"], theirs.content) == (403, "forbidden", unknown.content)
    assert root.get(route, params={"owner": "zelda"}).status_code == 200


def _read(things: Things, route: str) -> str:
    method, address = route.split(" ")
    answer = things.client.request(method, address.replace("{device_id}", "cpu_0"), params={"map": True})
    assert answer.status_code == 200, answer.text
    return answer.text
