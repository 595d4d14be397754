"""The models that contenders serve, and the rows that clients send."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont

from benchmarks.peers.wire import Array
from tests.support import graphs, models


@dataclass(frozen=True)
class Case:
    """One model. `row` has the shapes of one row without the batch axis; `batch` is everybody's batch limit."""

    name: str
    title: str
    model: Path
    row: dict[str, tuple[str, tuple[int, ...]]]
    outputs: list[str]
    batch: int
    #: Whether tensors go as numbers in JSON, where the contender offers that; else as raw bytes where it takes them.
    as_json: bool
    #: How far an output may lie from ONNX Runtime's own when the row is run alone, as a share of the largest value.
    tolerance: float
    #: The same where rows are run in batches: quantisation to eight bits looks at the whole batch.
    tolerance_in_batches: float
    #: Whether the product is also asked for the graph written anew (`graph_optimization: rewrite`).
    rewrite: bool = False

    def rows(self, count: int) -> list[dict[str, Array]]:
        """Different rows, the same each time; arrays have a batch axis of 1."""
        random = np.random.default_rng(7)
        return [{name: self._filled(random, name, *spec) for name, spec in self.row.items()} for _ in range(count)]

    @cached_property
    def session(self) -> Any:
        """ONNX Runtime itself, with one thread."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(str(self.model), options, providers=["CPUExecutionProvider"])

    def expected(self, row: dict[str, Array]) -> list[Array]:
        """What ONNX Runtime gives for a row alone, flat."""
        return [output.ravel() for output in self.session.run(self.outputs, row)]

    def _filled(self, random: np.random.Generator, name: str, dtype: str, shape: tuple[int, ...]) -> Array:
        if name == "x" and len(shape) == 3:
            return _page(random, shape[1:])
        if dtype == "float32":
            return random.random((1, *shape), np.float32)
        if name == "input_ids":
            return random.integers(1000, 28_000, (1, *shape), dtype)
        return np.full((1, *shape), int(name == "attention_mask"), dtype)


def _page(random: np.random.Generator, size: tuple[int, ...]) -> Array:
    """Lines of digits on white, as a text detector takes them: float32 [1, 3, height, width], about -2 to 3."""
    height, width = size
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(24)
    for top in range(8, height - 30, 40):
        pen.text((random.integers(4, width // 2), top), str(random.integers(10**9)), fill="black", font=font)
    pixels = np.asarray(image, np.float32) / 255
    scaled = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


def all_cases(folder: Path) -> dict[str, Case]:
    """The three cases by name; what has to be made is made in `folder`."""
    fetched = models.fetch_all()
    tokens = ("int64", (32,))
    cases = [
        Case(
            "minilm", "int8 MiniLM, 32 tokens", fetched / "minilm" / "model.onnx",
            {"input_ids": tokens, "attention_mask": tokens, "token_type_ids": tokens}, ["last_hidden_state"],
            batch=8, as_json=False, tolerance=1e-4, tolerance_in_batches=1e-4,
        ),
        # A text detector, which takes images of just this kind. A batch gains nothing there on one thread (72 rows a
        # second alone, 59 in eights), so nobody batches.
        Case(
            "image", "text detector, 3x320x320 float32 (1.2 MB)", fetched / "rapidocr" / "ch_PP-OCRv4_det_infer.onnx",
            {"x": ("float32", (3, 320, 320))}, ["sigmoid_0.tmp_0"],
            batch=1, as_json=False, tolerance=1e-4, tolerance_in_batches=1e-4, rewrite=True,
        ),
        Case(
            "tiny", "y = 2x + 1 on 4 numbers", graphs.tiny(folder / "tiny.onnx"),
            {"x": ("float32", (4,))}, ["y"],
            batch=32, as_json=True, tolerance=1e-6, tolerance_in_batches=1e-6,
        ),
    ]  # fmt: skip
    return {case.name: case for case in cases}
