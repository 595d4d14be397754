"""A pipeline without a service around it: opened on a device and driven step by step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from workers import pipelines
from workers.devices.base import Device
from workers.devices.cpu import CpuDevice
from workers.devices.onnx.runtime import Cancel
from workers.pipelines.base import Pipeline, Result, RunContext, run_to_end


def opened(model_type: str, folder: Path, device: Device | None = None, **options: Any) -> Pipeline:
    """The pipeline of a folder, on the CPU unless said."""
    pipeline = pipelines.read(model_type, folder, folder if folder.is_dir() else folder.parent, options)
    pipeline.open(device or CpuDevice(), None)
    return pipeline


def context(
    request: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray] | None = None,
    files: Mapping[str, bytes] | None = None,
    kept: list[bytes] | None = None,
) -> RunContext:
    """A run whose tensors are `arrays` by field, and whose pictures are `files` by blob id; `kept` are its blobs."""

    def keep(data: bytes) -> str:
        store = kept if kept is not None else []
        store.append(data)
        return str(len(store) - 1)

    given = {name: {"dtype": "float32"} for name in arrays or {}} | dict(request)
    return RunContext(
        given, Cancel(), lambda name: (arrays or {})[name],
        lambda place: (files or {})[place["blob_id"]], keep,
    )  # fmt: skip


def made(pipeline: Pipeline, run: RunContext) -> Result:
    """What the run gives."""
    return run_to_end(pipeline.run(run))
