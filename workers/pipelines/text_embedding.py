"""Text embedding: texts, or lists of token ids, become vectors. Its parts are in `workers.pipelines.text`.

A run of few texts goes at once, and joined with others of the same model that wait; one of many goes in steps: texts
are tokenised in portions, then run in batches of like length.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import orjson

from device_operations.errors import OperationError, failure
from workers.devices.base import Device
from workers.devices.onnx.runtime import Cancel
from workers.devices.onnx.session import Over
from workers.execution.claimed_job import Progress
from workers.pipelines.base import Parts, Pipeline, Result, RunContext, Steps
from workers.pipelines.files import read_part
from workers.pipelines.text.embedder import Embedder, TextVectors
from workers.pipelines.text.layout import Layout, read_layout
from workers.pipelines.text.pooling import normalized
from workers.pipelines.text.tokens import Text, Tokenized, Tokens
from workers.resident.batching import DEFAULT_ROWS, Batching, decide
from workers.rows.proof import Proof, Verdict

#: The name of the only part.
GRAPH = "model"

#: Texts that run together at most where rows are proven apart and the load names no max_batch_size: what keeps a GPU
#: busy. A CPU gains nothing by more than `DEFAULT_ROWS`.
ROWS_ON_A_GPU = 32


class TextEmbeddingPipeline(Pipeline):
    """One text embedding model on the device."""

    model_type: ClassVar[str] = "text_embedding"

    def __init__(self, parts: Parts, layout: Layout, tokens: Tokens) -> None:
        super().__init__(parts)
        self._layout = layout
        graph = parts[GRAPH]
        self._embedder = Embedder(
            layout, tokens, list(graph.inputs.values()), list(graph.outputs.values()), self._run_graph
        )
        self._padding_difference: float | None = None
        self._rows = Verdict(Proof.UNKNOWN, "the graph is not open")
        self._default_rows = DEFAULT_ROWS

    @classmethod
    def read(cls, source: Path, root: Path, options: Mapping[str, Any]) -> TextEmbeddingPipeline:
        if not source.is_dir():
            raise failure("model_invalid", "text embedding needs a folder with tokenizer.json; the source is one file")
        layout = read_layout(source)
        tokens = Tokens(layout)
        return cls(Parts([read_part(GRAPH, layout.graph, root)], root, options), layout, tokens)

    def open(self, device: Device, cancel: Cancel | None) -> None:
        """Opens the graph, and tries whether texts of different lengths may run together."""
        super().open(device, cancel)
        try:
            self._rows = self.parts.get(GRAPH, cancel).rows
            self._default_rows = DEFAULT_ROWS if device.host_memory else ROWS_ON_A_GPU
            self._padding_difference = self._embedder.try_out(cancel)
        except BaseException:
            self.close()
            raise
        self.parts.rest()

    def batching(self, asked: int | None) -> tuple[int, Batching]:
        """Rows run together where the graph's structure proves them apart, or does not disprove it and a load asks."""
        rows = self._rows
        most = self._default_rows if rows.proof is Proof.PROVEN and asked is None else decide(rows, asked)
        mixed = "texts of any lengths together" if self._embedder.pads else "texts of equal lengths together"
        reason = f"{rows.reason}; {mixed}" if most > 1 else rows.reason
        return most, Batching(most > 1, reason, self._padding_difference, rows.proof)

    def about(self) -> dict[str, Any]:
        layout = self._layout
        return {
            "dimensions": self._embedder.width,
            "max_tokens": layout.max_tokens,
            "pooling": layout.pooling.value,
            "normalize": layout.normalize,
        }

    def takes_steps(self, request: Mapping[str, Any], max_rows: int) -> bool:
        return _count(request) > max_rows

    def batch_of(self, request: Mapping[str, Any], max_rows: int) -> tuple[Hashable, int] | None:
        most = max_rows // _count(request)
        return (GRAPH, most) if most > 1 else None

    def run(self, run: RunContext) -> Steps:
        texts = _texts(run)
        self._check_dimensions(run)
        steps = self._embedder.embed(texts, run.max_rows, run.cancel)
        while True:
            try:
                done = next(steps)
            except StopIteration as stop:
                return self._result(run, stop.value, 0, len(texts))
            yield Progress({"done": done, "total": len(texts)})

    def run_joined(self, runs: Sequence[RunContext]) -> list[Result | OperationError]:
        given = [self._tokenized(run) for run in runs]
        joined = [one for tokenized in given if not isinstance(tokenized, OperationError) for one in tokenized]
        steps = self._embedder.run(joined, runs[0].max_rows, _JoinedTexts([run.cancel for run in runs]))
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                embedded: TextVectors = stop.value
                break
        found: list[Result | OperationError] = []
        first = 0
        for run, tokenized in zip(runs, given, strict=True):
            if isinstance(tokenized, OperationError):
                found.append(tokenized)
                continue
            found.append(self._result(run, embedded, first, first + len(tokenized)))
            first += len(tokenized)
        return found

    def _tokenized(self, run: RunContext) -> list[Tokenized] | OperationError:
        """The tokens of a run's texts, or what is wrong with it: that must not fail the others."""
        try:
            run.cancel.check()
            self._check_dimensions(run)
            return self._embedder.tokenize(_texts(run))
        except OperationError as error:
            return error

    def _run_graph(self, feeds: Mapping[str, Any], outputs: Sequence[str], cancel: Any) -> Mapping[str, Any]:
        return self.parts.get(GRAPH, cancel).run(feeds, outputs, cancel=cancel)

    def _result(self, run: RunContext, embedded: TextVectors, first: int, end: int) -> Result:
        """What a run gives whose texts are those from `first` to `end`."""
        vectors = embedded.vectors[first:end]
        dimensions = run.request.get("dimensions")
        if dimensions is not None and dimensions < self._embedder.width:
            vectors = normalized(vectors[:, :dimensions]) if self._normalizes(run) else vectors[:, :dimensions]
        elif self._normalizes(run):
            vectors = normalized(vectors)
        truncated = [index - first for index in embedded.truncated if first <= index < end]
        facts = {"tokens": sum(embedded.tokens[first:end]), "truncated": truncated}
        return Result({"embeddings": np.ascontiguousarray(vectors)}, facts=facts)

    def _normalizes(self, run: RunContext) -> bool:
        asked = run.request.get("normalize")
        return self._layout.normalize if asked is None else bool(asked)

    def _check_dimensions(self, run: RunContext) -> None:
        """Vectors are cut only where the model was trained for that: of others, the first numbers mean little."""
        wanted, width, known = run.request.get("dimensions"), self._embedder.width, self._layout.dimensions
        if wanted is None or wanted == width:
            return
        if wanted > width:
            raise failure("validation_failed", f"dimensions is {wanted}, and the model has {width}")
        if known is not None and wanted not in known:
            there = ", ".join(map(str, known)) if known else f"{width} alone (it was not trained for shorter ones)"
            raise failure("validation_failed", f"the model does not support dimensions = {wanted}; there are {there}")


class _JoinedTexts:
    """The cancels of several runs as one: whichever is tripped stops the graph."""

    def __init__(self, cancels: Sequence[Cancel]) -> None:
        self._cancels = cancels

    def over(self, options: Any) -> Over:
        """While inside, each `trip` reaches `options`."""
        return Over(self._cancels, options)


def _count(request: Mapping[str, Any]) -> int:
    tensor = request.get("texts") or request["tokens"]
    return int(tensor["shape"][0])


def _texts(run: RunContext) -> list[Text]:
    """The texts of a run, or the ids that it gives in place of them."""
    if run.request.get("texts") is not None:
        return [str(text) for text in run.tensor("texts")]
    given: list[Text] = []
    for at, text in enumerate(run.tensor("tokens")):
        ids = orjson.loads(text)
        if not isinstance(ids, list) or not ids or not all(type(one) is int for one in ids):
            raise failure("input_mismatch", f"tokens {at} is no list of whole numbers, or is empty")
        given.append(ids)
    return given
