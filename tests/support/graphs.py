"""Small ONNX graphs that tests load: real files, made with the onnx package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save


def save_graph(path: Path, nodes: list, inputs: list, outputs: list, initializers: list | None = None) -> Path:
    """Writes a graph of opset 17 to `path`."""
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers or [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    path.parent.mkdir(parents=True, exist_ok=True)
    save(model, str(path))
    return path


def tiny(path: Path) -> Path:
    """y = 2x + 1 on float32 [batch, 4]."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    two = numpy_helper.from_array(np.array(2, np.float32), "two")
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    nodes = [helper.make_node("Mul", ["x", "two"], ["m"]), helper.make_node("Add", ["m", "one"], ["y"])]
    return save_graph(path, nodes, [x], [y], [two, one])


def slow(path: Path) -> Path:
    """y = x after `rounds` multiplications of 256x256 matrices: int64 `rounds` [] sets how long it runs."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [256, 256])
    rounds = helper.make_tensor_value_info("rounds", TensorProto.INT64, [])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [256, 256])
    eye = numpy_helper.from_array(np.eye(256, dtype=np.float32), "eye")
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "eye"], ["next"]),
            helper.make_node("Identity", ["going"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [256, 256]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [256, 256]),
        ],
    )
    true = numpy_helper.from_array(np.array(True), "true")
    loop = helper.make_node("Loop", ["rounds", "true", "x"], ["y"], body=body)
    return save_graph(path, [loop], [x, rounds], [y], [eye, true])


def tensor(array: np.ndarray) -> dict:
    """The wire form of an array, as `data`."""
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": array.tolist()}
