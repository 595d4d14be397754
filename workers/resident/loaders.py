"""How a single graph is made resident, with the options of its load; for pipelines see `workers.pipelines`."""

from __future__ import annotations

from pathlib import Path

from tasks.jobs.model import StoredRequest
from workers.devices.base import Device
from workers.devices.onnx.runtime import Cancel, LoadedGraph
from workers.devices.values import SessionOptions


def load_onnx(device: Device, file: Path, root: Path, options: StoredRequest, cancel: Cancel | None) -> LoadedGraph:
    """One ONNX graph."""
    wanted = SessionOptions(
        intra_op_threads=options.get("intra_op_threads"),
        graph_optimization=options.get("graph_optimization", "all"),
        free_dimensions=options.get("free_dimensions") or {},
        root=root,
    )
    return device.open_model(file, wanted, cancel)
