"""LitServe with an ONNX model: raw bytes in and out, in batches, over its ZeroMQ queue. `… case.json`

Annotations are values here, not text: LitServe hands `decode_request`'s own to FastAPI.
"""

import sys
from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body, Response

from benchmarks.peers.served import Served


class Api(litserve.LitAPI):
    """One row's inputs as bytes give its outputs as bytes: the cheapest body that LitServe takes."""

    def __init__(self, served: Served, **options: Any) -> None:
        super().__init__(**options)
        self.served = served

    def setup(self, device: str) -> None:
        self.served.load()

    def decode_request(self, request: Annotated[bytes, Body()]) -> dict[str, Any]:
        return self.served.unpack(request)

    def predict(self, x: dict[str, Any]) -> Any:
        return self.served.run(x)

    def encode_response(self, output: list[Any]) -> Response:
        return Response(b"".join(array.tobytes() for array in output), media_type="application/octet-stream")


class Batched(Api):
    """The same in batches."""

    def batch(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if len(inputs) == 1:
            return inputs[0]
        return {name: np.concatenate([row[name] for row in inputs]) for name in inputs[0]}

    def unbatch(self, output: Any) -> list[Any]:
        return [[array[row] for array in output] for row in range(len(output[0]))]


def main() -> None:
    """Serves until stopped."""
    served = Served(sys.argv[1])
    batched = {"max_batch_size": served.batch, "batch_timeout": 0.001} if served.batch > 1 else {}
    api = (Batched if batched else Api)(served, **batched)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, fast_queue=True, timeout=False)
    server.run(
        host="127.0.0.1", port=served.port, num_api_servers=1, log_level="warning", generate_client_file=False,
        access_log=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
