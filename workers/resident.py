"""What lies on the device between jobs: allocations, models, sessions. Only the runner's thread changes it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine

from device_operations.settings import Settings
from tasks.blobs import BlobStore
from workers.devices.base import Buffer, Device
from workers.devices.onnx import Kept, OnnxModel


@dataclass(slots=True, eq=False)
class ResidentModel:
    """A loaded model. `max_batch_size` 1 or `batchable` False: every run goes alone."""

    model_id: str
    name: str
    onnx: OnnxModel
    pinned: bool = False
    max_batch_size: int = 1
    max_delay_ms: float = 0.0
    batchable: bool = False
    memory_bytes: int = 0
    last_used: float = 0.0

    def batch_of(self, inputs: dict[str, Any], outputs: list[str] | None) -> tuple[Hashable, int] | None:
        """The key under which runs may be joined, and how many; None for a run that goes alone.

        Joined runs have the same inputs, dtypes and shapes, at least one row, and equal scalars.
        """
        if not self.batchable:
            return None
        rows = None
        key: list[Hashable] = [self.model_id, tuple(outputs) if outputs else None]
        for name in sorted(inputs):
            tensor = inputs[name]
            shape = tensor["shape"]
            if tensor.get("allocation_id"):
                return None
            if not shape:
                key.append(
                    (name, tensor["dtype"], tensor.get("base64") or repr(tensor.get("data")), tensor.get("blob_id"))
                )
                continue
            rows = shape[0] if rows is None else rows
            if shape[0] != rows or math.prod(shape) == 0:
                return None
            key.append((name, tensor["dtype"], tuple(shape)))
        if not rows or rows * 2 > self.max_batch_size:
            return None
        return tuple(key), self.max_batch_size // rows


@dataclass(slots=True, eq=False)
class ResidentSession:
    """A session's state tensors, by the input that each feeds next."""

    session_id: str
    model_id: str
    state_map: dict[str, str]
    state: dict[str, Kept | Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Resident:
    """Everything that one epoch of one device holds, and what operations need to reach beyond it."""

    device_id: str
    epoch: int
    device: Device
    engine: Engine
    settings: Settings
    blobs: BlobStore
    allocations: dict[str, Buffer] = field(default_factory=dict)
    models: dict[str, ResidentModel] = field(default_factory=dict)
    sessions: dict[str, ResidentSession] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def cpu_fallback_ops(self) -> int:
        """How many operators of the resident models run on the CPU instead of the device."""
        return sum(model.onnx.cpu_fallback_ops or 0 for model in self.models.values())
