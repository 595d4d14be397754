"""The values of the device layer's interface: a device's facts and figures, how a model is to be loaded and run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Description:
    """What a device is. `total_bytes` and `driver` are None if the backend cannot say."""

    backend: str
    ordinal: int
    name: str
    vendor: str | None = None
    driver: str | None = None
    total_bytes: int | None = None
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    providers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """How a device's memory stands now, in bytes; None is "not measurable" and never stands for 0.

    `used_bytes` counts every process, `process_bytes` this one alone; `budget_bytes` is what the operating system lets
    this process have; `busy_share` is the device's utilisation from 0 to 1.
    """

    total_bytes: int | None = None
    free_bytes: int | None = None
    used_bytes: int | None = None
    process_bytes: int | None = None
    budget_bytes: int | None = None
    busy_share: float | None = None


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a model is to be loaded.

    `graph_optimization` is one of ONNX Runtime's levels, disable, basic, extended or all, or rewrite: all, of a graph
    that `onnx_rewrite` wrote anew, or fused: all, of a graph whose operators `onnx_diffusion` joined.
    `free_dimensions` fixes symbolic dimensions by name.
    `root` is the folder that external data must not leave; the model's own folder unless said.
    """

    intra_op_threads: int | None = None
    graph_optimization: str = "all"
    free_dimensions: Mapping[str, int] = field(default_factory=dict)
    deterministic: bool = False
    root: Path | None = None


@dataclass(frozen=True, slots=True)
class Provider:
    """An ONNX Runtime execution provider as a backend wants it: its options, and the session settings it demands."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    memory_pattern: bool = True
    #: Session settings of the backend's own, by ONNX Runtime's names.
    settings: Mapping[str, str] = field(default_factory=dict)
    #: What ONNX Runtime calls the device's memory in I/O binding; None where it cannot bind the backend's tensors.
    binding: str | None = None
    device_id: int = 0
    #: Where a backend may not run two sessions at once, the lock that every run holds.
    lock: threading.RLock | None = None
