"""`client.models` of OpenAI's unmodified client, whose models are whose, and errors in OpenAI's form."""

from __future__ import annotations

import http.client
import json
import time

import openai
import pytest

from tests.openai.conftest import Load, client
from tests.owners.things import client_of
from tests.support.stack import RunningStack


def test_models_are_listed_and_read(zelda: openai.OpenAI) -> None:
    listed = {model.id: model for model in zelda.models.list()}
    assert "tiny" in listed
    read = zelda.models.retrieve("tiny")
    assert read == listed["tiny"]
    assert (read.object, read.owned_by) == ("model", "zelda")
    assert abs(read.created - time.time()) < 600


def test_versions_have_ids_of_their_own_where_there_are_several(zelda: openai.OpenAI, load: Load) -> None:
    load("zelda", "twice")
    load("zelda", "twice", version="2")
    names = [model.id for model in zelda.models.list() if model.id.startswith("twice")]
    assert names == ["twice", "twice:1", "twice:2"]
    assert zelda.models.retrieve("twice:1").id == "twice:1"
    assert zelda.embeddings.create(model="twice:2", input="a").model == "twice:2"
    with pytest.raises(openai.NotFoundError):
        zelda.models.retrieve("twice:3")


def test_anothers_model_is_answered_as_one_that_does_not_exist(zelda: openai.OpenAI, bob: openai.OpenAI) -> None:
    assert "tiny" not in [model.id for model in bob.models.list()]
    refusals = []
    for name in ("tiny", "nope", "organisation/model"):
        for ask in (
            lambda name: bob.models.retrieve(name),
            lambda name: bob.embeddings.create(model=name, input="a"),
            lambda name: bob.images.generate(model=name, prompt="a"),
        ):
            with pytest.raises(openai.NotFoundError) as refused:
                ask(name)
            assert (refused.value.code, refused.value.type) == ("model_not_found", "invalid_request_error")
            refusals.append(str(refused.value.body).replace(name, "NAME"))
    assert len(set(refusals)) == 1, refusals


def test_a_shared_model_is_everybodys_to_run(bob: openai.OpenAI, load: Load) -> None:
    load("zelda", "for-all", shared=True)
    assert "for-all" in [model.id for model in bob.models.list()]
    assert len(bob.embeddings.create(model="for-all", input="a").data) == 1


def test_a_wrong_key_is_an_authentication_error(served: RunningStack) -> None:
    wrong = client(served, "stranger")
    for ask in (wrong.models.list, lambda: wrong.embeddings.create(model="tiny", input="a")):
        with pytest.raises(openai.AuthenticationError) as refused:
            ask()
        assert (refused.value.code, refused.value.status_code) == ("invalid_api_key", 401)


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/v1/nothing", None, 404),
        ("GET", "/v1", None, 404),
        ("GET", "/v1/embeddings", None, 405),
        ("POST", "/v1/embeddings", b"{", 400),
        ("POST", "/v1/embeddings", b"", 400),
        ("POST", "/v1/embeddings", b"[]", 400),
        ("POST", "/v1/images/generations", b"{}", 400),
        ("GET", "/v1/models/a%00b", None, 400),
        ("GET", "/v1/models?a=%00", None, 400),
        ("POST", "/v1/embeddings", b"[" * 100_000, 400),
    ],
)
def test_every_refusal_has_openais_form(
    served: RunningStack, method: str, path: str, content: bytes | None, status: int
) -> None:
    with client_of(served, "zelda") as zeldas:
        answer = zeldas.request(method, path, content=content)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    assert list(answer.json()["error"]) == ["message", "type", "param", "code"]
    assert answer.json()["error"]["message"]


def test_other_addresses_keep_their_form(served: RunningStack) -> None:
    with client_of(served, "zelda") as zeldas:
        answers = [zeldas.get(path) for path in ("/v10", "/v1x/models", "/api/nothing")]
    assert {answer.headers["content-type"] for answer in answers} == {"application/problem+json"}


def test_a_body_over_the_limit_is_refused_in_openais_form(served: RunningStack) -> None:
    connection = http.client.HTTPConnection(served.http_url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/v1/embeddings")
    connection.putheader("Authorization", "Bearer key-of-zelda")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["error"]["code"] == "payload_too_large"
    connection.close()
