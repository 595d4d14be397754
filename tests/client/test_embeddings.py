"""`client.embed` and the command `embed`: texts in, vectors out."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from device_operations import AsyncClient, Client
from device_operations.errors import OperationError
from tests.stack.test_cli import Cli
from tests.support import embedding
from tests.support.stack import RunningStack


@pytest.fixture(scope="module")
def served(stack: RunningStack) -> RunningStack:
    embedding.write(stack.folder / "models" / "tiny")
    with Client(stack.http_url) as client:
        client.result(client.inference.load_model("tiny", "tiny", model_type="text_embedding", wait=30))
    return stack


def test_one_text_or_several_become_vectors(served: RunningStack) -> None:
    with Client(served.http_url) as client:
        one = client.embed("hello world", "tiny")
        several = client.embed(["hello world", "a b c d e f g h i j k"], "tiny")
    assert one.vectors.shape == (1, embedding.WIDTH)
    assert one.vectors.dtype == np.float32
    np.testing.assert_allclose(several.vectors[0], one.vectors[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(several.vectors, axis=1), 1, atol=1e-6)
    assert (one.tokens, one.truncated, several.truncated) == (4, [], [1])


def test_many_texts_come_back_through_a_blob(served: RunningStack) -> None:
    with Client(served.http_url) as client:
        job = client.submit_embed(["a", "hello world"] * 4096, "tiny", normalize=False)
        found = client.embedded(job, timeout=60)
    assert found.vectors.shape == (8192, embedding.WIDTH)
    np.testing.assert_allclose(found.vectors[2::2], found.vectors[:-2:2], atol=1e-6)
    assert found.job_id == job.job_id


def test_what_does_not_fit_is_raised(served: RunningStack) -> None:
    with Client(served.http_url) as client:
        for given, code in (
            ({"texts": []}, "validation_failed"),
            ({"texts": ["a", 1]}, "validation_failed"),
            ({"texts": "a", "model": "nothing"}, "model_not_found"),
            ({"texts": "a", "dimensions": 2}, "validation_failed"),
        ):
            with pytest.raises(OperationError) as refused:
                client.embed(**{"model": "tiny", **given})
            assert refused.value.code == code


def test_the_asynchronous_client_does_the_same(served: RunningStack) -> None:
    async def ask() -> list[np.ndarray]:
        async with AsyncClient(served.http_url) as client:
            found = await asyncio.gather(*(client.embed(text, "tiny") for text in ("a", "b", "a")))
            return [one.vectors for one in found]

    first, other, again = asyncio.run(ask())
    np.testing.assert_allclose(first, again, atol=1e-6)
    assert not np.allclose(first, other)


def test_the_command_prints_or_writes_vectors(served: RunningStack, tmp_path: Path) -> None:
    cli = Cli(served)
    shown = cli.json("embed", "tiny", "hello world", "a")
    assert (shown["shape"], shown["tokens"], shown["truncated"]) == ([2, 4], 7, [])
    np.testing.assert_allclose(np.linalg.norm(shown["vectors"], axis=1), 1, atol=1e-6)
    assert "hello world" in cli("embed", "tiny", "hello world").stdout
    source, target = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    source.write_text("hello world\na b c d e f g h i j k\n", encoding="utf-8")
    done = cli("embed", "tiny", "--file", source, "--output", target, "--no-normalize")
    assert "2 vectors of 4 numbers" in done.stdout
    assert "cut at the model's limit of tokens: 1" in done.stderr
    assert np.load(target).shape == (2, 4)
    np.testing.assert_allclose(shown["vectors"][0], np.load(target)[0] / np.linalg.norm(np.load(target)[0]), atol=1e-6)
    assert cli("embed", "tiny", "--file", "-", stdin="dusk\n").stdout.count("dusk") == 1
    for arguments, status in (
        (("embed", "tiny"), 2),
        (("embed", "tiny", "a", "--output", tmp_path / "no" / "v.npy"), 2),
        (("embed", "nothing", "a"), 1),
        (("embed", "tiny", "a", "--dimensions", "2"), 1),
    ):
        cli(*arguments, status=status)
