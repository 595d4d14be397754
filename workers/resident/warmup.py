"""A model's first run, on zeros: what it allocates and compiles then does not delay its first caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import structlog

from device_operations.errors import OperationError
from device_operations.tensors import numpy_dtype
from tasks.statements import Row
from workers.devices.onnx.runtime import Cancel, LoadedGraph
from workers.devices.onnx.tensors import Feed
from workers.resident import batching

if TYPE_CHECKING:
    pass


log = structlog.get_logger(__name__)

#: How long a warm-up may take where a model comes back after a death, before it is stopped.
WARMUP_AGAIN_SECONDS = 10.0


def warm_up(onnx: LoadedGraph, cancel: Cancel | None, again: bool, earlier: Row) -> str:
    """Runs the model once on zeros, and says what came of it.

    At a load a failure is the load's. Where the model comes back after a death, a failure leaves it unwarmed, what
    failed before is left out, and a run that takes long is stopped: no caller waits there who could cancel it.
    """
    if any(spec.dtype == "json" for spec in onnx.inputs):
        return "left out: there is no smallest sequence or map that every model takes"
    reason = batching.too_large(onnx, 1, 1)
    if reason is not None:
        return f"left out: {reason}"
    if not again:
        onnx.run(_zeros(onnx), cancel=cancel)
        return "done"
    if str(earlier.get("warmup", "")).startswith("failed"):
        return str(earlier["warmup"])
    with batching.Within(WARMUP_AGAIN_SECONDS, cancel) as limit:
        try:
            onnx.run(_zeros(onnx), cancel=limit)
        except OperationError as error:
            if error.code == "device_lost":
                raise
            log.warning("a model came back without its warm-up", error=error.message)
            return f"failed at a restart: {error.message}"
    return "done"


def _zeros(onnx: LoadedGraph) -> dict[str, Feed]:
    """Zeros in the smallest shape that the model takes."""
    feeds: dict[str, Feed] = {}
    for spec in onnx.inputs:
        shape = tuple(side if isinstance(side, int) else 1 for side in spec.shape)
        feeds[spec.name] = (
            np.full(shape, "", object) if spec.dtype == "string" else np.zeros(shape, numpy_dtype(spec.dtype))
        )
    return feeds
