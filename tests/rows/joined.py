"""Rows run joined and alone by ONNX Runtime itself, compared: what a verdict of `proven` promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort

Rows = Mapping[str, np.ndarray]


def session_of(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session on one thread, quiet."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def difference(session: ort.InferenceSession, callers: Sequence[Rows], tolerance: float = 2e-4) -> str | None:
    """How a joined run differs from the callers' own runs; None where it does not.

    Where a caller's own run fails there is nothing to compare: "".
    """
    names = [found.name for found in session.get_outputs() if found.type.startswith("tensor")]
    try:
        alone = [session.run(names, dict(rows)) for rows in callers]
    except Exception:
        return ""
    joined_rows = {
        name: np.concatenate([rows[name] for rows in callers]) if array.ndim else array
        for name, array in callers[0].items()
    }
    try:
        joined = session.run(names, joined_rows)
    except Exception as error:
        return f"the joined run fails: {error}"
    for index, name in enumerate(names):
        if len({outputs[index].shape for outputs in alone}) > 1 or not alone[0][index].ndim:
            return f"{name} has shapes {[outputs[index].shape for outputs in alone]} alone"
        expected = np.concatenate([outputs[index] for outputs in alone])
        if joined[index].shape != expected.shape:
            return f"{name} has shape {joined[index].shape} joined and {expected.shape} alone"
        if not _equal(joined[index], expected, tolerance):
            return f"{name} differs"
    return None


def _equal(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    if a.dtype.kind not in "fc":
        return bool(np.array_equal(a, b))
    tolerance = max(tolerance, 1e-2 if a.dtype == np.float16 else 0)
    scale = float(np.abs(b[np.isfinite(b)]).max(initial=1))
    return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True))
