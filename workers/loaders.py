"""How each type of model is made resident: the one registry that a new type is added to.

A loader takes the device, the model's file, the folder that it may read, the options as recorded, and a `Cancel`; it
returns a loaded model with the methods of `OnnxModel`. A pipeline of several graphs is another entry here, and another
name in `tasks.plans.inference.MODEL_TYPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from workers.devices.base import Device
from workers.devices.onnx import Cancel, OnnxModel
from workers.devices.values import ModelOptions

Loader = Callable[[Device, Path, Path, dict[str, Any], Cancel | None], OnnxModel]


def load_onnx(device: Device, file: Path, root: Path, options: dict[str, Any], cancel: Cancel | None) -> OnnxModel:
    """One ONNX graph."""
    wanted = ModelOptions(
        intra_op_threads=options.get("intra_op_threads"),
        graph_optimization=options.get("graph_optimization", "all"),
        free_dimensions=options.get("free_dimensions") or {},
        root=root,
    )
    return device.open_model(file, wanted, cancel)


LOADERS: dict[str, Loader] = {"onnx": load_onnx}
