"""`client.embeddings.create` of OpenAI's unmodified client: every form of input and answer, usage, and what it refuses."""

from __future__ import annotations

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.embedding.conftest import embed, embedder_over
from tests.openai.conftest import Load, client, loaded
from tests.owners.things import client_of
from tests.support import embedding
from tests.support.stack import RunningStack, eventually
from workers.devices import open_device
from workers.devices.values import SessionOptions
from workers.pipelines.text.layout import read_layout
from workers.pipelines.text.pooling import normalized
from workers.pipelines.text.tokens import Tokens

TEXTS = ["hello world", "a lighthouse at dusk", "a", "b c d e f g h i j k l m n"]


def ids(*words: str) -> list[int]:
    return [embedding.WORDS.index(word) for word in words]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """expected(texts) -> the vectors of length 1, each text alone."""
    folder: Path = embedding.write(tmp_path_factory.mktemp("expected"))
    layout = read_layout(folder)
    graph = open_device("cpu", 0).open_model(layout.graph, SessionOptions(root=folder))
    made = embedder_over(layout, Tokens(layout), graph)
    return lambda texts: normalized(np.concatenate([embed(made, [text]).vectors for text in texts]))


def test_a_list_of_texts(zelda: openai.OpenAI, expected: Any) -> None:
    answer = zelda.embeddings.create(model="tiny", input=TEXTS)
    assert [(one.index, one.object) for one in answer.data] == [(at, "embedding") for at in range(len(TEXTS))]
    np.testing.assert_allclose([one.embedding for one in answer.data], expected(TEXTS), atol=1e-6)
    assert (answer.object, answer.model) == ("list", "tiny")
    # Two special tokens with each; the last text is cut at twelve.
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 4 + 6 + 3 + 12
    assert answer.model_extra is not None and answer.model_extra["truncated"] == [3]


@pytest.mark.parametrize("given", ["hello world", ["hello world"], ids("hello", "world"), [ids("hello", "world")]])
@pytest.mark.parametrize("form", ["float", "base64"])
def test_every_form_of_input_and_encoding(zelda: openai.OpenAI, expected: Any, given: Any, form: Any) -> None:
    answer = zelda.embeddings.create(model="tiny", input=given, encoding_format=form)
    vector: Any = answer.data[0].embedding
    if form == "base64":
        vector = np.frombuffer(base64.b64decode(vector), "<f4")
    np.testing.assert_allclose([vector], expected(["hello world"]), atol=1e-6)
    assert answer.usage.prompt_tokens == 4


def test_many_texts_at_once(zelda: openai.OpenAI, expected: Any) -> None:
    texts = [f"{'a ' * (at % 8)}{'bcdef'[at % 5]}" for at in range(8192)]
    answer = zelda.embeddings.create(model="tiny", input=texts)
    found = np.array([one.embedding for one in answer.data])
    assert found.shape == (8192, embedding.WIDTH)
    np.testing.assert_allclose(found[:40], expected(texts[:40]), atol=1e-6)


def test_asynchronous_clients_at_once_are_each_given_their_own(served: RunningStack, zelda: Any, expected: Any) -> None:
    texts = [" ".join("abcdefghij"[: at % 10 + 1]) for at in range(60)]

    async def ask() -> list[Any]:
        key, url = "key-of-zelda", f"{served.http_url}/v1"
        async with openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0) as asynchronous:
            return await asyncio.gather(*(asynchronous.embeddings.create(model="tiny", input=text) for text in texts))

    answers = asyncio.run(ask())
    np.testing.assert_allclose([answer.data[0].embedding for answer in answers], expected(texts), atol=1e-6)


def test_dimensions_are_cut_only_where_the_model_was_trained_for_it(zelda: openai.OpenAI, load: Load) -> None:
    config = {"hidden_size": embedding.WIDTH, "vocab_size": len(embedding.WORDS)}
    load("zelda", "nested", {"config.json": config | {"matryoshka_dimensions": [2, 4]}})
    load("zelda", "any", {"config.json": config | {"is_matryoshka": True}})
    whole = np.array(zelda.embeddings.create(model="nested", input="hello").data[0].embedding)
    cut = np.array(zelda.embeddings.create(model="nested", input="hello", dimensions=2).data[0].embedding)
    np.testing.assert_allclose(cut, whole[:2] / np.linalg.norm(whole[:2]), atol=1e-6)
    assert len(zelda.embeddings.create(model="any", input="hello", dimensions=3).data[0].embedding) == 3
    assert len(zelda.embeddings.create(model="tiny", input="hello", dimensions=4).data[0].embedding) == 4
    for model, dimensions, words in [("tiny", 2, "does not support"), ("nested", 3, "2, 4"), ("any", 5, "has 4")]:
        with pytest.raises(openai.BadRequestError, match=words):
            zelda.embeddings.create(model=model, input="hello", dimensions=dimensions)


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a"] * 8193}, "input"),
        ({"input": ["a", [4]]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": None}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": "4"}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "unknown": 1}, "unknown"),
        ({"input": "a\x00b"}, None),
        ({"input": [10**6]}, None),
        ({"input": [-1]}, None),
        ({"input": [10**30]}, "input"),
    ],
)
def test_what_does_not_fit_is_a_bad_request(
    zelda: openai.OpenAI, fields: dict[str, Any], parameter: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        zelda.post("/embeddings", body={"model": "tiny", **fields}, cast_to=object)
    assert refused.value.type == "invalid_request_error"
    assert refused.value.param == parameter


def test_half_of_a_surrogate_pair_is_a_bad_request(served: RunningStack, zelda: openai.OpenAI) -> None:
    with client_of(served, "zelda") as http:
        answer = http.post("/v1/embeddings", content=b'{"model": "tiny", "input": "\\ud800"}')
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_model_of_another_type_makes_no_embeddings(served: RunningStack, zelda: openai.OpenAI) -> None:
    from tests.owners.things import counting, done

    with client_of(served, "zelda") as http:
        blob_id = http.post("/api/blobs", content=counting(0.5)).json()["blob_id"]
        done(http, http.post("/api/inference/load-model", json={"name": "plain", "source": {"blob_id": blob_id}}))
    with pytest.raises(openai.BadRequestError, match="makes no embeddings") as refused:
        zelda.embeddings.create(model="plain", input="a")
    assert refused.value.param == "model"
    assert "plain" not in [model.id for model in zelda.models.list()]


@pytest.fixture(scope="module")
def slow(load: Load) -> str:
    """The name of a model that takes some tenths of a second for each text."""
    return str(load("zelda", "slow", {"model.onnx": embedding.graph(slow=True)})["name"])


def job_of(http: httpx.Client, label: str) -> dict[str, Any]:
    (job,) = http.get("/api/jobs", params={"label": f"who={label}"}).json()["jobs"]
    return dict(job)


def test_a_client_that_leaves_cancels_its_job(served: RunningStack, zelda: openai.OpenAI, slow: str) -> None:
    impatient = zelda.with_options(timeout=httpx.Timeout(60, read=1.5))
    with pytest.raises(openai.APITimeoutError):
        impatient.embeddings.create(model=slow, input=["a"] * 500, extra_body={"job": {"labels": {"who": "left"}}})
    with client_of(served, "zelda") as http:
        eventually(lambda: job_of(http, "left")["state"] == "cancelled", seconds=20)


def test_a_job_that_is_cancelled_is_not_sent_again(served: RunningStack, zelda: openai.OpenAI, slow: str) -> None:
    retrying = zelda.with_options(max_retries=2)
    with client_of(served, "zelda") as http, ThreadPoolExecutor(1) as other:
        options = {"job": {"labels": {"who": "cancelled"}}}
        asked = other.submit(retrying.embeddings.create, model=slow, input=["a"] * 500, extra_body=options)
        eventually(lambda: bool(http.get("/api/jobs", params={"label": "who=cancelled"}).json()["jobs"]), seconds=20)
        running = job_of(http, "cancelled")
        eventually(lambda: (job_of(http, "cancelled")["progress"] or {}).get("total") == 500, seconds=20)
        assert http.delete(f"/api/jobs/{running['job_id']}").status_code == 202
        with pytest.raises(openai.ConflictError) as refused:
            asked.result(timeout=30)
        assert (refused.value.code, refused.value.type) == ("cancelled", "invalid_request_error")
        assert job_of(http, "cancelled")["state"] == "cancelled"


@pytest.mark.parametrize("count", [2, 8000], ids=["in the row", "in a blob"])
def test_the_same_key_and_body_give_the_first_answer_again(
    served: RunningStack, zelda: openai.OpenAI, load: Load, expected: Any, count: int
) -> None:
    model = load("zelda", f"for-{count}")
    asked: Any = {"model": f"for-{count}", "extra_headers": {"Idempotency-Key": f"key-{count}"}}
    texts = ["hello", "dusk"] * (count // 2)
    first = zelda.embeddings.create(input=texts, **asked)
    np.testing.assert_allclose([one.embedding for one in first.data[:2]], expected(texts[:2]), atol=1e-6)
    with client_of(served, "zelda") as http:
        http.delete(
            f"/api/inference/unload-model/{model['model_id']}", headers={"Prefer": "wait=30"}
        ).raise_for_status()
    assert zelda.embeddings.create(input=texts, **asked) == first
    with pytest.raises(openai.ConflictError) as refused:
        zelda.embeddings.create(input="another", **asked)
    assert refused.value.code == "idempotency_conflict"
    with pytest.raises(openai.NotFoundError):
        zelda.embeddings.create(input=texts, model=f"for-{count}")


def test_a_rate_limit_has_openais_form(start_stack: Any) -> None:
    stack = start_stack(API_KEYS="zelda:key-of-zelda", HTTP__RATE_LIMIT_PER_SECOND=3)
    with client_of(stack, "zelda") as http:
        loaded(http, "tiny")
    limited = client(stack, "zelda")
    with pytest.raises(openai.RateLimitError) as refused:
        for _ in range(20):
            limited.embeddings.create(model="tiny", input="a")
    assert refused.value.code == "rate_limit_exceeded"
    assert int(refused.value.response.headers["retry-after"]) >= 1
