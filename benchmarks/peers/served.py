"""What a peer serves: one ONNX model with one ONNX Runtime thread, as a JSON file says. Only peers import this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Served:
    """A model as `case.json` describes it: `{model, inputs: [[name, dtype, shape]], outputs: [name], batch, port}`.

    Shapes are those of one row, without the batch axis.
    """

    def __init__(self, description: str) -> None:
        told = json.loads(Path(description).read_text())
        self.inputs: list[tuple[str, str, list[int]]] = told["inputs"]
        self.outputs: list[str] = told["outputs"]
        self.batch: int = told["batch"]
        self.port: int = told["port"]
        self._path: str = told["model"]
        self._session: onnxruntime.InferenceSession | None = None

    def load(self) -> None:
        """Opens the session, in the process that runs it."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        """The outputs in their order, each with the batch axis first."""
        assert self._session is not None
        return self._session.run(self.outputs, feeds)  # type: ignore[no-any-return]

    def unpack(self, raw: bytes) -> dict[str, Any]:
        """One row's inputs from their elements, one input after the other: arrays with a batch axis of 1."""
        arrays = {}
        at = 0
        for name, dtype, shape in self.inputs:
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(raw, dtype, count, at).reshape(1, *shape)
            at += arrays[name].nbytes
        return arrays
