"""MLServer's custom runtime for ONNX: numbers as JSON where they are few, else base64 in a BYTES tensor.

MLServer's HTTP takes no raw bytes behind the JSON (only its gRPC does), so base64 is its cheapest form of many numbers.
"""

from __future__ import annotations

import asyncio
import base64
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput, ResponseOutput

from benchmarks.peers.served import Served


class OnnxRuntime(MLModel):
    """One ONNX model; runs go to one thread, so that the event loop goes on reading requests.

    To one: `asyncio.to_thread` would run several at once, and every contender has one ONNX Runtime thread.
    """

    async def load(self) -> bool:
        self.served = Served(os.environ["PEER_CASE"])
        self.served.load()
        self.thread = ThreadPoolExecutor(1)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        shapes = {name: (dtype, shape) for name, dtype, shape in self.served.inputs}
        feeds = {one.name: _array(one, *shapes[one.name]) for one in payload.inputs}
        outputs = await asyncio.get_running_loop().run_in_executor(self.thread, self.served.run, feeds)
        told = [_told(name, array) for name, array in zip(self.served.outputs, outputs, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=told)


def _array(given: RequestInput, dtype: str, shape: list[int]) -> Any:
    data: Any = given.data.root
    if given.datatype == "BYTES":
        rows = [base64.b64decode(row) for row in data]
        return np.frombuffer(rows[0] if len(rows) == 1 else b"".join(rows), dtype).reshape(-1, *shape)
    return np.array(data, dtype).reshape(-1, *shape)


def _told(name: str, array: Any) -> ResponseOutput:
    if array[0].size <= 64:
        return ResponseOutput(name=name, shape=list(array.shape), datatype="FP32", data=array.ravel().tolist())
    rows = [base64.b64encode(row).decode() for row in array]
    return ResponseOutput(name=name, shape=[len(rows), 1], datatype="BYTES", data=rows)
