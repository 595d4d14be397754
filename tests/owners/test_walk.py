"""Every route and kind, with every kind of id in every place, for two owners: what is another's does not exist."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api_gateway.app import create_app
from device_operations.settings import Settings
from tests.owners import places
from tests.owners.places import Place
from tests.owners.requests import send
from tests.owners.things import Things, absent_like
from tests.support.stack import RunningStack

DOCUMENT = create_app(Settings()).openapi()

CODES = {
    "job": "job_not_found", "allocation": "allocation_not_found", "blob": "blob_not_found", "model": "model_not_found",
    "model name": "model_not_found", "inference session": "session_not_found", "training session": "session_not_found",
    "checkpoint": "checkpoint_not_found",
}  # fmt: skip

#: A caller's own id for an allocation that is to be made: `test_ids_that_callers_choose.py`.
CHOSEN = [place for place in places.find(DOCUMENT) if (place.request, place.keys) == ("Allocate", ("allocation_id",))]

#: Filters of lists: one that names another's gives the empty list, as one that names nothing does.
FILTERS = [place for place in places.find(DOCUMENT) if place.where == "query"]


def _walked() -> list[Any]:
    found = [place for place in places.find(DOCUMENT) if place not in CHOSEN and place not in FILTERS]
    return [pytest.param(place, id=str(place)) for place in found]


@pytest.mark.parametrize("place", _walked())
def test_what_is_anothers_is_answered_as_what_does_not_exist(place: Place, zelda: Things, bob: Things) -> None:
    before = zelda.standing()
    theirs, nothing = zelda.ids[place.noun], absent_like(place.noun)
    refusal = send(bob, place, theirs)
    assert refusal.status_code == 404, refusal.text
    assert _without_id(refusal, theirs) == _without_id(send(bob, place, nothing), nothing)
    path = place.route.split(" ")[1]
    if refusal.content and not path.startswith("/v2"):
        told = refusal.json()
        assert (told["error"] if path.startswith("/v1/") else told)["code"] == CODES[place.noun]
    assert "zelda" not in refusal.text.replace(theirs, "")
    assert zelda.standing() == before


@pytest.mark.parametrize("place", FILTERS, ids=str)
def test_a_list_of_anothers_is_the_list_of_nothing(place: Place, zelda: Things, bob: Things) -> None:
    theirs, nothing = zelda.ids[place.noun], absent_like(place.noun)
    answer = send(bob, place, theirs)
    assert answer.status_code == 200, answer.text
    assert _without_id(answer, theirs) == _without_id(send(bob, place, nothing), nothing)
    assert send(zelda, place, theirs).content != answer.content, "the filter finds nothing for its owner either"


def test_every_route_parameter_and_field_is_looked_at() -> None:
    assert places.complaints(DOCUMENT) == []


def test_the_service_has_no_routes_that_are_not_in_its_document(owned: RunningStack) -> None:
    assert owned.client.get("/openapi.json").json() == DOCUMENT


@pytest.mark.parametrize(
    ("path", "parameter"), [("/api/things/{thing_id}", "thing_id"), ("/api/things", "like"), ("/api/things", None)]
)
def test_a_new_route_that_is_not_covered_is_reported(path: str, parameter: str | None) -> None:
    app = FastAPI()

    async def with_like(like: str) -> None: ...

    async def with_thing(thing_id: str) -> None: ...

    async def without() -> None: ...

    app.add_api_route(path, {"like": with_like, "thing_id": with_thing, None: without}[parameter])
    document = app.openapi()
    document["paths"] |= DOCUMENT["paths"]
    document["components"] = DOCUMENT["components"]
    lines = places.complaints(document)
    assert any(f"GET {path} names nothing that is known" in line for line in lines), lines
    assert parameter is None or any(f"the parameter {parameter} an id?" in line for line in lines), lines


def _without_id(answer: httpx.Response, thing_id: str) -> tuple[int, bytes, dict[str, str]]:
    """What an answer says, with any mention of the id replaced."""
    headers = {name: value for name, value in answer.headers.items() if name not in ("date", "content-length")}
    return answer.status_code, answer.content.replace(thing_id.encode(), b"ID"), headers
