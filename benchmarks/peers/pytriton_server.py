"""PyTriton with an ONNX model: Triton's own HTTP, its dynamic batcher, and Python behind it. `… case.json`"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers.served import Served


def main() -> None:
    """Serves until stopped."""
    served = Served(sys.argv[1])
    served.load()

    @batch  # type: ignore[untyped-decorator]
    def infer(**feeds: Any) -> list[Any]:
        return served.run(feeds)

    config = TritonConfig(
        http_address="127.0.0.1", http_port=served.port, allow_grpc=False, allow_metrics=False, log_verbose=0
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="model",
            infer_func=infer,
            inputs=[Tensor(name=name, dtype=np.dtype(dtype).type, shape=shape) for name, dtype, shape in served.inputs],
            outputs=[Tensor(name=name, dtype=np.float32, shape=(-1,) * rank) for name, rank in _ranks(served)],
            config=ModelConfig(max_batch_size=served.batch, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
            strict=False,
        )
        triton.serve()


def _ranks(served: Served) -> list[tuple[str, int]]:
    """The outputs and how many axes a row of each has."""
    row = {name: np.zeros((1, *shape), dtype) for name, dtype, shape in served.inputs}
    return [(name, array.ndim - 1) for name, array in zip(served.outputs, served.run(row), strict=True)]


if __name__ == "__main__":
    main()
