"""Compared with sentence-transformers itself, with MiniLM's real float32 weights in torch: equal to 1e-5.

Its side reads the package's own files (weights in safetensors); ours runs the graph that was exported from those
weights, with our tokens, pooling and normalisation.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.embedding.conftest import embed
from workers.pipelines.text.embedder import Embedder
from workers.pipelines.text.layout import read_layout
from workers.pipelines.text.pooling import normalized


def texts() -> list[str]:
    """Short and long, plain and odd, and some over the limit of 256 tokens."""
    drawn = random.Random(5)
    words = [
        "harbour",
        "light",
        "tide",
        "seldom",
        "17",
        "x-ray",
        "naïve",
        "réservé",
        "東京",
        "🙂",
        "don't",
        "e.g.",
        "##ing",
    ]
    made = [" ".join(drawn.choices(words, k=drawn.randint(1, 60))) for _ in range(40)]
    return [*made, "", "a", "Hello, World!", "[SEP] inside [MASK]", "z" * 3000, "long " * 400, "\ttabs\nand\r\nlines  "]


@pytest.fixture(scope="module")
def reference(models_dir: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(models_dir / "minilm-float"), device="cpu")


@pytest.mark.parametrize("most_rows", [1, 8, 32])
def test_embeddings_equal_sentence_transformers(
    reference: Any, minilm: Path, open_embedder: Callable[..., Embedder], most_rows: int
) -> None:
    found = embed(open_embedder(minilm), texts(), most_rows)
    expected = reference.encode(texts(), batch_size=16)
    difference = np.abs(normalized(found.vectors) - expected).max()
    print(f"largest difference with {most_rows} rows: {difference:.2e}")
    assert difference <= 1e-5
    assert [texts()[index][:5] for index in found.truncated] == ["long "]


@pytest.mark.parametrize("mode", ["cls", "mean"])
def test_pooling_without_normalisation_equals_too(
    minilm: Path, models_dir: Path, tmp_path: Path, open_embedder: Callable[..., Embedder], mode: str
) -> None:
    """The folder as sentence-transformers of now writes it: other names of modules, fields and files."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    theirs = SentenceTransformer(
        modules=[Transformer(str(models_dir / "minilm-float"), max_seq_length=64), Pooling(384, pooling_mode=mode)],
        device="cpu",
    )
    theirs.save(str(tmp_path / "saved"))
    shutil.copy(minilm / "model.onnx", tmp_path / "saved")
    layout = read_layout(tmp_path / "saved")
    assert (layout.max_tokens, layout.normalize, str(layout.pooling)) == (64, False, mode)
    expected = theirs.encode(texts())
    difference = np.abs(embed(open_embedder(tmp_path / "saved"), texts()).vectors - expected).max()
    print(f"largest difference by {mode}: {difference:.2e}")
    assert difference <= 1e-5
