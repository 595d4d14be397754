"""A worker on the CPU whose loads hold the interpreter for HOLD_SECONDS, as ONNX Runtime 1.24 does on DirectML.

Only this is put in, by the C library's own sleep; what the worker does about it is its own.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import sys
from pathlib import Path

from workers.__main__ import main
from workers.devices.cpu import CpuDevice
from workers.devices.onnx.runtime import Cancel, LoadedGraph
from workers.devices.values import Description, SessionOptions

_described, _opened = CpuDevice.describe, CpuDevice.open_model


def _describe(self: CpuDevice) -> Description:
    about = _described(self)
    return dataclasses.replace(about, capabilities={**about.capabilities, "load_holds_interpreter": True})


def _open_model(
    self: CpuDevice, path: Path, options: SessionOptions | None = None, cancel: Cancel | None = None
) -> LoadedGraph:
    # A function called through PyDLL keeps the interpreter's lock: no other thread runs until it returns.
    ctypes.PyDLL(None).sleep(int(os.environ["HOLD_SECONDS"]))
    return _opened(self, path, options, cancel)


CpuDevice.describe = _describe  # type: ignore[method-assign]
CpuDevice.open_model = _open_model  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())
