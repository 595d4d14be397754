"""Small ONNX graphs for the conformance suite, made of operators that every backend (and the rig) can run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING

ONNX_TYPES = {
    "bool": TensorProto.BOOL, "int8": TensorProto.INT8, "int16": TensorProto.INT16, "int32": TensorProto.INT32,
    "int64": TensorProto.INT64, "uint8": TensorProto.UINT8, "uint16": TensorProto.UINT16,
    "uint32": TensorProto.UINT32, "uint64": TensorProto.UINT64, "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE,
}  # fmt: skip

Named = Sequence[tuple[str, int, Sequence[int | str]]]


def build(
    nodes: Sequence[Any], inputs: Named, outputs: Named, weights: Sequence[Any] = (), opset: int = 17, domain: str = ""
) -> bytes:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        list(weights),
    )
    sets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    model = helper.make_model(graph, opset_imports=sets)
    model.ir_version = 9
    return bytes(model.SerializeToString())


def weight(name: str, *shape: int, seed: int = 0, scale: float = 0.3) -> Any:
    values = np.random.default_rng([seed, *name.encode()]).standard_normal(shape) * scale
    return numpy_helper.from_array(values.astype(np.float32), name)


def constant(name: str, values: Any, dtype: Any = np.int64) -> Any:
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def linear() -> bytes:
    """x[n, 16] @ w + bias, the one whose symbols promise the output's shape."""
    return build(
        [node("MatMul", "x w", "p"), node("Add", "p b", "y")],
        [("x", FLOAT, ["n", 16])],
        [("y", FLOAT, ["n", 8])],
        [weight("w", 16, 8), weight("b", 8)],
    )


def convnet(takes: str = "x") -> bytes:
    return build(
        [
            node("Conv", f"{takes} w b", "c", pads=[1, 1, 1, 1]),
            node("Relu", "c", "r"),
            node("MaxPool", "r", "m", kernel_shape=[2, 2], strides=[2, 2]),
            node("Flatten", "m", "f"),
            node("Gemm", "f v", "g"),
            node("Softmax", "g", "y", axis=1),
        ],
        [(takes, FLOAT, [2, 3, 8, 8])],
        [("y", FLOAT, [2, 5])],
        [weight("w", 4, 3, 3, 3), weight("b", 4), weight("v", 64, 5)],
    )


def attention() -> bytes:
    """Self-attention with layer norm and without a residual."""
    return build(
        [
            node("MatMul", "x q", "Q"),
            node("MatMul", "x k", "K"),
            node("Transpose", "K", "T", perm=[0, 2, 1]),
            node("MatMul", "Q T", "s"),
            node("Softmax", "s", "p", axis=2),
            node("MatMul", "p x", "o"),
            node("LayerNormalization", "o g h", "y", axis=-1),
        ],
        [("x", FLOAT, [1, 6, 16])],
        [("y", FLOAT, [1, 6, 16])],
        [weight("q", 16, 16), weight("k", 16, 16), weight("g", 16), weight("h", 16)],
    )


def recurrent() -> bytes:
    """h' = tanh(concat(x, h) @ w), the state wired from output `next` to input `h`; `y` shows it."""
    return build(
        [node("Concat", "x h", "c", axis=1), node("MatMul", "c w", "m"), node("Tanh", "m", "next"),
         node("Identity", "next", "y")],
        [("x", FLOAT, [1, 3]), ("h", FLOAT, [1, 5])],
        [("y", FLOAT, [1, 5]), ("next", FLOAT, [1, 5])],
        [weight("w", 8, 5, scale=0.8)],
    )  # fmt: skip


def identity(dtypes: Sequence[str]) -> bytes:
    """One input and one output `y_…` of each dtype."""
    return build(
        [node("Identity", name, f"y_{name}") for name in dtypes],
        [(name, ONNX_TYPES[name], ["n", 3]) for name in dtypes],
        [(f"y_{name}", ONNX_TYPES[name], ["n", 3]) for name in dtypes],
    )


def text() -> bytes:
    return build([node("Identity", "x", "y")], [("x", STRING, ["n"])], [("y", STRING, ["n"])])


def reshaped() -> bytes:
    """Takes a shape, and gives one: what graphics providers leave to the processor."""
    return build(
        [node("Relu", "x", "r"), node("Reshape", "r shape", "y"), node("Shape", "y", "size")],
        [("x", FLOAT, ["n", 4]), ("shape", INT64, [2])],
        [("y", FLOAT, ["rows", "columns"]), ("size", INT64, [2])],
    )


def chosen() -> bytes:
    """Rows of x where their mask is set: the output's shape is known only once the model has run."""
    return build(
        [node("Compress", "x mask", "y", axis=0)],
        [("x", FLOAT, ["n", 4]), ("mask", TensorProto.BOOL, ["n"])],
        [("y", FLOAT, ["chosen", 4])],
    )


def promise_breaker() -> bytes:
    """Says that its output has as many rows as its input, and gives twice as many."""
    return build([node("Concat", "x x", "y", axis=0)], [("x", FLOAT, ["n", 4])], [("y", FLOAT, ["n", 4])])


def same_symbol_twice() -> bytes:
    """Names one dimension of both inputs n, and lets them differ all the same."""
    return build(
        [node("Identity", "z", "y"), node("Identity", "x", "w")],
        [("x", FLOAT, ["n", 4]), ("z", FLOAT, ["n", 4])],
        [("y", FLOAT, ["n", 4]), ("w", FLOAT, ["n", 4])],
    )


def picky() -> bytes:
    """Fails in the middle of its graph where an index lies outside its table of four rows."""
    return build(
        [node("Relu", "x", "r"), node("Gather", "r i", "y", axis=0)],
        [("x", FLOAT, [4, 2]), ("i", INT64, ["n"])],
        [("y", FLOAT, ["n", 2])],
    )


def one_row() -> bytes:
    """The row of a table of four that a scalar says: an input and, of a table of scalars, an output without axes."""
    return build(
        [
            node("Relu", "x", "r"),
            node("Gather", "r i", "y", axis=0),
            node("Relu", "v", "w"),
            node("Gather", "w i", "z", axis=0),
        ],
        [("x", FLOAT, [4, 2]), ("v", FLOAT, [4]), ("i", INT64, [])],
        [("y", FLOAT, [2]), ("z", FLOAT, [])],
    )


def slow(rounds: int = 10_000_000, width: int = 512) -> bytes:
    """A loop of matrix products, each a node at which a run can stop.

    The loop looks at its condition on the processor, so a graphics device cannot be given all rounds at once.
    """
    body = helper.make_graph(
        [node("MatMul", "state w", "next"), node("Identity", "going", "still")],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, [width, width]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, [width, width]),
        ],
    )
    return build(
        [helper.make_node("Loop", ["rounds", "true", "x"], ["y"], body=body)],
        [("x", FLOAT, [width, width])],
        [("y", FLOAT, [width, width])],
        [
            weight("w", width, width, scale=0.04),
            constant("rounds", rounds),
            numpy_helper.from_array(np.array(True), "true"),
        ],
    )


def heavy(megabytes: int = 64) -> bytes:
    """A model of that many megabytes of weights."""
    return build(
        [node("MatMul", "x w", "y")],
        [("x", FLOAT, ["n", 1024])],
        [("y", FLOAT, ["n", megabytes * 256])],
        [weight("w", 1024, megabytes * 256)],
    )


def external(location: str, length: int = 64) -> bytes:
    """A model whose weight of 16 floats lies in the file `location`."""
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[16, 1], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": str(length)}.items():
        tensor.external_data.add(key=key, value=value)
    return build([node("MatMul", "x w", "y")], [("x", FLOAT, [1, 16])], [("y", FLOAT, [1, 1])], [tensor])
