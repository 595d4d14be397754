"""device-operations: jobs on GPUs for a whole team. This package is the public face and is safe to import anywhere."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from device_operations.client import AsyncClient, Client
    from device_operations.errors import OperationError
    from device_operations.jobs import Job, Kind, State
    from device_operations.producer import Producer

__all__ = ["AsyncClient", "Client", "Job", "Kind", "OperationError", "Producer", "State"]

#: Where each name is; imported when it is first used, so that no process loads what it does not need.
_MODULES = {
    "AsyncClient": "client",
    "Client": "client",
    "Job": "jobs",
    "Kind": "jobs",
    "OperationError": "errors",
    "Producer": "producer",
    "State": "jobs",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
