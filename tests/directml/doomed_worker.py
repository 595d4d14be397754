"""A worker whose adapter is truly removed (887A0005) by a run of a model that takes `doom`; otherwise as any other.

In the rig, binding a tensor that lies on the device removes the device. Only this fault is put in; what the worker does
about it is its own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime

from workers.__main__ import main
from workers.devices.onnx import Cancel, OnnxModel

_as_it_is = OnnxModel._call


def _call(self: OnnxModel, names: list[str], feeds: Mapping[str, Any], cancel: Cancel | None) -> Sequence[Any]:
    if "doom" not in feeds:
        return _as_it_is(self, names, feeds, cancel)
    session = self._live()
    binding = session.io_binding()
    binding.bind_ortvalue_input("doom", onnxruntime.OrtValue.ortvalue_from_numpy(feeds["doom"], "dml", 0))
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    outputs: Sequence[Any] = binding.copy_outputs_to_cpu()
    return outputs


OnnxModel._call = _call  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())
