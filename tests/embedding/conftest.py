"""Fixtures for text embedding: a device, tiny models, and MiniLM with its real weights.

cpu             session   the CPU device
open_embedder   function  open_embedder(folder) -> Embedder over the folder's graph
minilm          session   the folder of MiniLM in float32: the package's files, and model.onnx exported from them
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import embedding
from workers.devices import Device, open_device
from workers.devices.onnx.runtime import LoadedGraph
from workers.devices.values import SessionOptions
from workers.pipelines.text.embedder import Embedder, TextVectors
from workers.pipelines.text.layout import Layout, read_layout
from workers.pipelines.text.tokens import Tokens

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def cpu() -> Device:
    return open_device("cpu", 0)


@pytest.fixture(scope="session")
def minilm(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedding.export_minilm(models_dir / "minilm-float", tmp_path_factory.mktemp("minilm") / "minilm")


@pytest.fixture
def open_embedder(cpu: Device) -> Callable[..., Embedder]:
    def open_it(folder: Path) -> Embedder:
        layout = read_layout(folder)
        tokens = Tokens(layout)
        model = cpu.open_model(layout.graph, SessionOptions(root=folder))
        made = embedder_over(layout, tokens, model)
        made.try_out()
        return made

    return open_it


def embedder_over(layout: Layout, tokens: Tokens, model: LoadedGraph) -> Embedder:
    """An embedder that runs a loaded graph."""
    return Embedder(
        layout,
        tokens,
        model.inputs,
        model.outputs,
        lambda feeds, outputs, cancel: model.run(feeds, outputs, cancel=cancel),
    )


def embed(embedder: Embedder, texts: Any, most_rows: int = 8) -> TextVectors:
    """All of it at once."""
    steps = embedder.embed(texts, most_rows)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            found = stop.value
            assert isinstance(found, TextVectors)
            return found
