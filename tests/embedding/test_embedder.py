"""Texts in, vectors out: what runs together, what padding may change, and what a graph must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_operations.errors import OperationError
from tests.embedding.conftest import embed, embedder_over
from tests.support import embedding
from workers.devices import Device
from workers.devices.onnx.runtime import Cancel
from workers.devices.values import SessionOptions
from workers.pipelines.text.batches import MOST_BATCH_TOKENS, by_length
from workers.pipelines.text.embedder import PORTION_TEXTS, Embedder
from workers.pipelines.text.layout import read_layout
from workers.pipelines.text.pooling import normalized
from workers.pipelines.text.tokens import Tokens

Open = Callable[..., Embedder]

TEXTS = ["hello world", "", "a b c d e f g h i j k l", "dusk", [4, 5, 6], "A LIGHTHOUSE at dusk", "a b"]


def alone(made: Embedder, texts: list[Any]) -> np.ndarray:
    return np.concatenate([embed(made, [text]).vectors for text in texts])


def test_texts_come_out_in_their_order_and_as_they_do_alone(tmp_path: Path, open_embedder: Open) -> None:
    made = open_embedder(embedding.write(tmp_path))
    assert made.pads
    found = embed(made, TEXTS)
    assert found.vectors.dtype == np.float32
    np.testing.assert_allclose(found.vectors, alone(made, TEXTS), atol=1e-6)
    assert found.tokens == [4, 2, 12, 3, 5, 6, 4]
    assert found.truncated == [2]


def test_vectors_are_the_mean_of_tokens_or_the_first_one(tmp_path: Path, open_embedder: Open) -> None:
    table = np.random.default_rng(3).standard_normal((len(embedding.WORDS), embedding.WIDTH)).astype(np.float32)
    ids = [embedding.WORDS.index(word) for word in ("[CLS]", "hello", "world", "[SEP]")]
    mean = table[ids].mean(0)
    config = {"pooling_mode": "cls"}
    by_mean = open_embedder(embedding.write(tmp_path / "mean"))
    by_cls = open_embedder(embedding.write(tmp_path / "cls", {"1_Pooling/config.json": config}))
    texts = ["hello world", "a"]
    np.testing.assert_allclose(embed(by_mean, texts).vectors[0], 2 * mean, atol=1e-6)
    np.testing.assert_allclose(embed(by_cls, texts).vectors[0], table[ids[0]] + mean, atol=1e-6)


def test_normalising_gives_length_one_and_leaves_zeros() -> None:
    found = normalized(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.0, 0.0]], atol=1e-7)


@pytest.mark.parametrize("graph", [embedding.graph(heeds_mask=False), embedding.graph(takes_mask=False)])
def test_where_a_graph_does_not_heed_its_mask_or_has_none_only_equal_lengths_run_together(
    tmp_path: Path, open_embedder: Open, graph: bytes
) -> None:
    made = open_embedder(embedding.write(tmp_path, {"model.onnx": graph}))
    assert not made.pads
    texts = [*TEXTS, "b c", "dusk dusk"]
    np.testing.assert_allclose(embed(made, texts).vectors, alone(made, texts), atol=1e-6)


def test_batches_are_of_like_length_the_longest_first() -> None:
    lengths = [3, 9, 3, 5, 9, 1]
    assert by_length(lengths, 2, pads=True) == [[1, 4], [3, 0], [2, 5]]
    assert by_length(lengths, 8, pads=False) == [[1, 4], [3], [0, 2], [5]]
    assert by_length(lengths, 1, pads=True) == [[1], [4], [3], [0], [2], [5]]
    assert by_length([], 8, pads=True) == []
    assert [len(batch) for batch in by_length([512] * 100, 64, pads=True)] == [MOST_BATCH_TOKENS // 512] * 3 + [4]


def test_many_texts_go_in_portions_and_say_how_far_they_are(tmp_path: Path, open_embedder: Open) -> None:
    made = open_embedder(embedding.write(tmp_path))
    texts = [f"{'a ' * (at % 9)} {'bcdef'[at % 5]}" for at in range(8192)]
    reported = list(made.embed(texts, 32))
    portions = 8192 // PORTION_TEXTS
    assert reported == [0] * portions + list(range(32, 8193, 32))


def test_a_cancel_is_heard_between_batches(tmp_path: Path, open_embedder: Open) -> None:
    made = open_embedder(embedding.write(tmp_path))
    cancel = Cancel()
    steps = made.embed(["a"] * 100, 2, cancel)
    next(steps)
    next(steps)
    cancel.trip("cancelled")
    with pytest.raises(OperationError, match="cancel"):
        next(steps)


def test_a_graph_may_take_token_types(tmp_path: Path, open_embedder: Open) -> None:
    found = open_embedder(embedding.write(tmp_path, {"model.onnx": embedding.graph(types=True)}))
    assert embed(found, TEXTS).vectors.shape == (len(TEXTS), embedding.WIDTH)


def test_a_graph_of_another_width_is_refused(tmp_path: Path, open_embedder: Open) -> None:
    folder = embedding.write(tmp_path, {"model.onnx": embedding.graph(width=8)})
    with pytest.raises(OperationError, match="vectors of 8 numbers, and the folder says 4") as refused:
        open_embedder(folder)
    assert refused.value.code == "model_invalid"


def test_a_graph_that_is_no_text_model_is_refused(tmp_path: Path, open_embedder: Open) -> None:
    from tests.inference import graphs

    folder = embedding.write(tmp_path, {"model.onnx": graphs.affine()})
    with pytest.raises(OperationError, match="the graph takes x") as refused:
        open_embedder(folder)
    assert refused.value.code == "model_invalid"


def test_int8_minilm_is_the_same_joined_as_alone(models_dir: Path, minilm: Path, cpu: Device) -> None:
    """The published int8 file quantises its weights only, so that rows are proven apart: float noise remains."""
    layout = read_layout(minilm)
    model = cpu.open_model(models_dir / "minilm" / "model.onnx", SessionOptions())
    made = embedder_over(layout, Tokens(layout), model)
    made.try_out()
    texts = ["a lighthouse", "at dusk the sea is calm and grey", "", "word " * 100]
    np.testing.assert_allclose(embed(made, texts).vectors, alone(made, texts), atol=1e-6)
