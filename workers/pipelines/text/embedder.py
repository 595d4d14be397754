"""Texts in, vectors out: tokens in portions, then batches of like length through the graph, then pooling.

    texts ─ Tokens ─▶ ids ─ by_length ─▶ batches ─ graph ─▶ vectors of tokens ─ pool ─▶ one vector a text

Rows of one run belong to one caller or to several. A row is what it is alone where the graph's structure proves that
rows do not touch each other, and where attention masks hide the padding: `pads` says whether the load found that so.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from device_operations.errors import OperationError, failure
from device_operations.tensors import numpy_dtype
from workers.devices.onnx.tensors import TensorSpec
from workers.pipelines.text.batches import by_length
from workers.pipelines.text.layout import Layout
from workers.pipelines.text.pooling import pool
from workers.pipelines.text.tokens import Text, Tokenized, Tokens

Array = np.ndarray[Any, Any]

#: Texts, and characters, that are tokenised in one step: some tens of milliseconds.
PORTION_TEXTS, PORTION_CHARACTERS = 512, 1 << 18

#: How far a row's vector may move by padding or by other rows, as a share of the largest value, for texts of different
#: lengths to run together: float32 sums in another order move it by some 1e-7.
PADDING_TOLERANCE = 1e-3

#: The tensors that a graph is given, by their usual names.
IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"


class RunGraph(Protocol):
    """Runs the graph on the device: the wanted outputs by name, for arrays by the inputs' names."""

    def __call__(self, feeds: Mapping[str, Array], outputs: Sequence[str], cancel: Any) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class TextVectors:
    """`vectors` [texts, width] in float32, as pooled; how many tokens each text took, and which texts had more."""

    vectors: Array
    tokens: list[int]
    truncated: list[int]


class Embedder:
    """One text embedding model on one device."""

    def __init__(
        self,
        layout: Layout,
        tokens: Tokens,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        run_graph: RunGraph,
    ) -> None:
        """Raises `model_invalid` where the graph takes or gives something else than the layout says."""
        self._layout = layout
        self._tokens = tokens
        self._run_graph = run_graph
        self._inputs = {spec.name: spec for spec in inputs}
        self._outputs = outputs
        self._check_inputs()
        self._output, self._is_pooled = self._find_output()
        #: Numbers in one vector.
        self.width = self._find_width()
        #: Whether texts of different lengths may run together.
        self.pads = False

    def try_out(self, cancel: Any = None) -> float | None:
        """Runs two texts, alone and together; the largest difference that padding made as a share, None if not tried.

        Texts of different lengths only run together where these come out as they do alone. Raises `model_invalid` where
        the graph does not run on tokens or gives another shape than it says.
        """
        short, long = self._tokens.encode(["a", "a b c d e f g h"])
        try:
            alone = [self._run([one], cancel)[0] for one in (short, long)]
            if MASK not in self._inputs or len(short.ids) == len(long.ids):
                return None
            together = self._run([short, long], cancel)
        except OperationError as error:
            if error.code in ("run_failed", "input_mismatch"):
                raise failure("model_invalid", f"the graph does not run on two short texts: {error.message}") from error
            raise
        largest = max(float(np.abs(vector).max()) for vector in alone) or 1.0
        difference = max(float(np.abs(a - b).max()) for a, b in zip(alone, together, strict=True)) / largest
        self.pads = difference <= PADDING_TOLERANCE  # NaN is not
        return difference

    def tokenize(self, texts: Sequence[Text], first: int = 0) -> list[Tokenized]:
        """The tokens of each text; `first` is the place of the first one in its request.

        Raises `input_mismatch` for a text without tokens, and for ids that are none.
        """
        return self._tokens.encode(texts, first)

    def run(
        self, tokenized: Sequence[Tokenized], most_rows: int, cancel: Any = None
    ) -> Generator[int, None, TextVectors]:
        """Embeds texts that are tokens already, a batch of at most `most_rows` each step; yields how many are done.

        `cancel` is a run's, or those of several as one. Raises `cancelled`, `timeout`, `run_failed`.
        """
        vectors = np.empty((len(tokenized), self.width), np.float32)
        done = 0
        for batch in by_length([len(one.ids) for one in tokenized], most_rows, pads=self.pads):
            vectors[batch] = self._run([tokenized[index] for index in batch], cancel)
            done += len(batch)
            yield done
        truncated = [index for index, one in enumerate(tokenized) if one.truncated]
        return TextVectors(vectors, [len(one.ids) for one in tokenized], truncated)

    def embed(self, texts: Sequence[Text], most_rows: int, cancel: Any = None) -> Generator[int, None, TextVectors]:
        """Embeds texts: a portion is tokenised, or a batch runs, each step; yields how many are done."""
        tokenized: list[Tokenized] = []
        for portion in _portions(texts):
            tokenized += self.tokenize(portion, first=len(tokenized))
            yield 0
        return (yield from self.run(tokenized, most_rows, cancel))

    def _run(self, rows: Sequence[Tokenized], cancel: Any) -> Array:
        """The vectors [rows, width] of texts that run together."""
        longest = max(len(row.ids) for row in rows)
        ids = np.full((len(rows), longest), self._tokens.pad_id, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for at, row in enumerate(rows):
            size = len(row.ids)
            ids[at, :size], mask[at, :size], types[at, :size] = row.ids, 1, row.types
        given = {IDS: ids, MASK: mask, TYPES: types}
        feeds = {name: given[name].astype(numpy_dtype(spec.dtype)) for name, spec in self._inputs.items()}
        found = np.asarray(self._run_graph(feeds, [self._output], cancel)[self._output])
        wanted = (len(rows), self.width) if self._is_pooled else (len(rows), longest, self.width)
        if found.shape != wanted:
            raise failure("run_failed", f"output {self._output!r} has shape {list(found.shape)}, not {list(wanted)}")
        return found.astype(np.float32) if self._is_pooled else pool(found, mask, self._layout.pooling)

    # ---- what the graph takes and gives

    def _check_inputs(self) -> None:
        unknown = sorted(self._inputs.keys() - {IDS, MASK, TYPES})
        if IDS not in self._inputs or unknown:
            raise failure(
                "model_invalid",
                f"the graph takes {', '.join(self._inputs)[:300]}; a text embedding model takes {IDS}, and maybe "
                f"{MASK} and {TYPES}",
            )
        for name, spec in self._inputs.items():
            if spec.dtype not in ("int64", "int32") or len(spec.shape) != 2 or isinstance(spec.shape[1], int):
                raise failure(
                    "model_invalid",
                    f"the graph's input {name} is {spec.dtype} {list(spec.shape)}; it must be whole numbers of shape "
                    "[texts, tokens] with open sides",
                )

    def _find_output(self) -> tuple[str, bool]:
        """The output to take, and whether it is one vector a text already."""
        floats = [spec for spec in self._outputs if spec.dtype.startswith(("float", "bfloat"))]
        by_rank = {rank: [spec.name for spec in floats if len(spec.shape) == rank] for rank in (2, 3)}
        for name in ("token_embeddings", "last_hidden_state"):
            if name in by_rank[3]:
                return name, False
        if len(by_rank[3]) == 1:
            return by_rank[3][0], False
        if "sentence_embedding" in by_rank[2]:
            return "sentence_embedding", True
        given = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in self._outputs)[:300]
        raise failure(
            "model_invalid",
            f"the graph gives {given}; a text embedding model gives last_hidden_state of shape [texts, tokens, width]",
        )

    def _find_width(self) -> int:
        declared = next(spec for spec in self._outputs if spec.name == self._output).shape[-1]
        expected = self._layout.hidden_size
        if isinstance(declared, int) and expected is not None and declared != expected and not self._is_pooled:
            raise failure(
                "model_invalid",
                f"the graph's output {self._output} has vectors of {declared} numbers, and the folder says {expected}",
            )
        width = declared if isinstance(declared, int) else expected
        if width is None:
            raise failure("model_invalid", f"neither graph nor config.json says how long {self._output}'s vectors are")
        return width


def _portions(texts: Sequence[Text]) -> Generator[list[Text], None, None]:
    portion: list[Text] = []
    characters = 0
    for text in texts:
        portion.append(text)
        characters += len(text)
        if len(portion) == PORTION_TEXTS or characters >= PORTION_CHARACTERS:
            yield portion
            portion, characters = [], 0
    if portion:
        yield portion
