"""Small ONNX graphs whose inputs or outputs are no plain tensors, or such as NumPy has no dtype for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper, numpy_helper

FLOAT, INT64, STRING, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.BOOL
BFLOAT16, FLOAT8, INT4 = TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.INT4


def graph(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: Sequence[Any] = ()) -> bytes:
    """A model of nodes between values of any type."""
    made = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(weights))
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(made, opset_imports=sets)
    model.ir_version = 10
    return bytes(model.SerializeToString())


def tensor(name: str, kind: int = FLOAT, shape: Sequence[int | str | None] = ("n",)) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def sequence(name: str, kind: int = FLOAT) -> Any:
    return helper.make_tensor_sequence_value_info(name, kind, None)


def optional(name: str, kind: int = FLOAT, *, of_sequence: bool = False) -> Any:
    inner = helper.make_tensor_type_proto(kind, [None])
    if of_sequence:
        inner = helper.make_sequence_type_proto(helper.make_tensor_type_proto(kind, None))
    return helper.make_value_info(name, helper.make_optional_type_proto(inner))


def mapping(name: str, key: int, value: int) -> Any:
    made = ValueInfoProto()
    made.name = name
    made.type.map_type.key_type = key
    made.type.map_type.value_type.tensor_type.elem_type = value
    return made


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def with_default() -> bytes:
    """y = x * w, where w is [1, 2, 3, 4] unless a caller gives another: an initializer that is an input too."""
    w = numpy_helper.from_array(np.array([1, 2, 3, 4], np.float32), "w")
    inputs = [tensor("x", FLOAT, ["n", 4]), tensor("w", FLOAT, [4])]
    return graph([node("Mul", "x w", "y")], inputs, [tensor("y", FLOAT, ["n", 4])], [w])


def sequence_alone() -> bytes:
    """A sequence of float tensors as it is, and how many they are."""
    return graph(
        [node("Identity", "s", "same"), node("SequenceLength", "s", "length")],
        [sequence("s")],
        [sequence("same"), tensor("length", INT64, [])],
    )


def split() -> bytes:
    """The rows of x as a sequence, and their sum."""
    return graph(
        [node("SplitToSequence", "x", "rows", axis=0, keepdims=0), node("ReduceSum", "x", "sum", keepdims=0)],
        [tensor("x", FLOAT, ["n", 2])],
        [sequence("rows"), tensor("sum", FLOAT, [])],
    )


def of_a_map() -> bytes:
    """[a, b] of an object that has them: a map of texts to floats as an input."""
    made = node("DictVectorizer", "m", "y", domain="ai.onnx.ml", string_vocabulary=["a", "b"])
    return graph([made], [mapping("m", STRING, FLOAT)], [tensor("y", FLOAT, [1, 2])])


def of_an_optional() -> bytes:
    """Whether x was given, and x itself where it was: an optional tensor both ways."""
    return graph(
        [node("OptionalHasElement", "x", "there"), node("Identity", "x", "same")],
        [optional("x")],
        [tensor("there", BOOL, []), optional("same")],
    )


def cast(source: int, target: int) -> bytes:
    """y = x, as another type."""
    return graph([node("Cast", "x", "y", to=target)], [tensor("x", source)], [tensor("y", target)])


def beside(kind: int) -> bytes:
    """`plain` = x, and `odd` = x as another type."""
    return graph(
        [node("Identity", "x", "plain"), node("Cast", "x", "odd", to=kind)],
        [tensor("x")],
        [tensor("plain"), tensor("odd", kind)],
    )
