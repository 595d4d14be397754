"""Graphs of diffusion models joined for ONNX Runtime's CUDA provider once, and kept next to the model.

The file kept, `.NAME.HASH.fused`, holds the graph alone and refers to the weights of the model's own files. Its name
says by the hash of the graph's file which content it was made of, so that a changed model gets another.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import structlog

from device_operations.errors import failure
from workers.devices.libraries import installed, tidy

log = structlog.get_logger(__name__)

#: Counts up with what the rules make, so that files kept by an earlier version are made anew.
VERSION = 1

#: Bytes of a graph's file above which it is left as it is: weights inside it would be copied.
MAX_GRAPH_BYTES = 1 << 29

SUFFIX = ".fused"


def fused(source: Path) -> Path | bytes:
    """The graph with what fits joined: the file kept of it, or its bytes where the folder cannot be written to.

    `source` itself where nothing fits. Raises `model_invalid`, and `device_unavailable` where onnxscript is missing.
    """
    if source.stat().st_size > MAX_GRAPH_BYTES:
        return source
    content = source.read_bytes()
    digest = hashlib.sha256(b"%d\n" % VERSION + content).hexdigest()[:24]
    kept = source.with_name(f".{source.name}.{digest}{SUFFIX}")
    if kept.is_file():
        return kept if kept.stat().st_size else source
    made = joined(content, source)
    return _keep(kept, source, made)


def joined(content: bytes, source: Path) -> bytes | None:
    """The graph's bytes with what fits joined, None where nothing does. External data stays where it is."""
    if not installed("onnxscript"):
        raise failure("device_unavailable", "joining a graph's operators needs onnxscript: pip install onnxscript.")
    import onnx
    import onnx_ir
    from onnx_ir.passes import common as passes

    from workers.devices.onnx.fusions import channels_last as onnx_channels_last
    from workers.devices.onnx.fusions import rules as onnx_fusions

    try:
        proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(content), data_prop=True)
        model = onnx_ir.from_proto(proto)
        onnx_ir.external_data.set_base_dir(model.graph, source.parent)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        if not onnx_fusions.fuse(model.graph):
            return None
        onnx_channels_last.spread(model.graph)
        model.opset_imports[onnx_fusions.DOMAIN] = 1
        passes.RemoveUnusedNodesPass()(model)
        return bytes(onnx_ir.to_proto(model).SerializeToString())
    except Exception as error:
        remedy = "Load it with graph_optimization 'extended' instead."
        raise failure("model_invalid", f"{source.name} cannot be joined: {tidy(error)}. {remedy}") from error


def _keep(kept: Path, source: Path, made: bytes | None) -> Path | bytes:
    """Writes the file at once or not at all, and removes those made of other contents. An empty one: nothing fits."""
    try:
        number, name = tempfile.mkstemp(dir=kept.parent, prefix=f".{source.name}.", suffix=".part")
    except OSError as error:
        log.info("fused graph not kept", model=source.name, error=str(error))
        return source if made is None else made
    try:
        with os.fdopen(number, "wb") as file:
            file.write(made or b"")
        os.replace(name, kept)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        log.info("fused graph not kept", model=source.name, error=str(error))
        return source if made is None else made
    for other in kept.parent.glob(f".{source.name}.*{SUFFIX}"):
        if other != kept:
            other.unlink(missing_ok=True)
    return source if made is None else kept
