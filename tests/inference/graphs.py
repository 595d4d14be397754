"""Small ONNX graphs with a known answer, for tests of inference over HTTP."""

from __future__ import annotations

import itertools

import numpy as np
from onnx import TensorProto, helper

from tests.devices.graphs import FLOAT, INT64, STRING, Named, build, constant, external, node, recurrent, slow, weight

__all__ = ["FLOAT", "INT64", "STRING", "Named", "build", "external", "node", "recurrent", "slow", "weight"]

FLOAT16, BOOL = TensorProto.FLOAT16, TensorProto.BOOL


def affine(scale: float = 2.0, width: int = 4) -> bytes:
    """y[n, width] = x * scale + 1: rows do not touch each other."""
    return build(
        [node("Mul", "x s", "p"), node("Add", "p o", "y")],
        [("x", FLOAT, ["n", width])],
        [("y", FLOAT, ["n", width])],
        [constant("s", np.float32(scale), np.float32), constant("o", np.float32(1), np.float32)],
    )


def scaled() -> bytes:
    """y = x * k with a scalar k."""
    return build([node("Mul", "x k", "y")], [("x", FLOAT, ["n", 2]), ("k", FLOAT, [])], [("y", FLOAT, ["n", 2])])


def difference() -> bytes:
    """y = a - b, row by row."""
    sides = ["n", 4]
    return build([node("Sub", "a b", "y")], [("a", FLOAT, sides), ("b", FLOAT, sides)], [("y", FLOAT, sides)])


def mixing() -> bytes:
    """Each row less the mean of all rows: an open first axis that is no batch."""
    return build(
        [node("ReduceMean", "x", "m", axes=[0], keepdims=1), node("Sub", "x m", "y")],
        [("x", FLOAT, ["n", 3])],
        [("y", FLOAT, ["n", 3])],
        opset=17,
    )


def renamed() -> bytes:
    """Rows that do not touch each other, whose first axis has another name in the output."""
    return build([node("Relu", "x", "y")], [("x", FLOAT, ["batch", 3])], [("y", FLOAT, ["unk__1", 3])])


def fixed() -> bytes:
    """A batch of exactly two rows."""
    return build([node("Relu", "x", "y")], [("x", FLOAT, [2, 3])], [("y", FLOAT, [2, 3])])


def counter() -> bytes:
    """total = before + x: the state is a sum."""
    return build([node("Add", "x before", "total")], [("x", FLOAT, [1]), ("before", FLOAT, [1])],
                 [("total", FLOAT, [1])])  # fmt: skip


def open_state() -> bytes:
    """A state whose size no other input tells."""
    return build([node("Concat", "x before", "all", axis=0)], [("x", FLOAT, ["a"]), ("before", FLOAT, ["b"])],
                 [("all", FLOAT, ["c"])])  # fmt: skip


def everything() -> bytes:
    """One of each: text, half precision and truth values go in and out."""
    return build(
        [node("Identity", "text", "text_out"), node("Identity", "half", "half_out"), node("Not", "flag", "flag_out")],
        [("text", STRING, ["n"]), ("half", FLOAT16, ["n", 2]), ("flag", BOOL, ["n"])],
        [("text_out", STRING, ["n"]), ("half_out", FLOAT16, ["n", 2]), ("flag_out", BOOL, ["n"])],
    )


def picky() -> bytes:
    """Fails in the middle of its graph where an index lies outside its table of four rows."""
    return build(
        [node("Gather", "table i", "r", axis=0), node("Relu", "r", "y")],
        [("i", INT64, ["n"])],
        [("y", FLOAT, ["n", 2])],
        [weight("table", 4, 2)],
    )


def custom_operator() -> bytes:
    return build([helper.make_node("Mystery", ["x"], ["y"], domain="com.example")], [("x", FLOAT, ["n"])],
                 [("y", FLOAT, ["n"])], domain="com.example")  # fmt: skip


def too_new() -> bytes:
    return build([node("Relu", "x", "y")], [("x", FLOAT, ["n"])], [("y", FLOAT, ["n"])], opset=9999)


def wide(width: int) -> bytes:
    """y = x + 1 on rows of `width` numbers: for tensors that leave the row."""
    return build([node("Add", "x o", "y")], [("x", FLOAT, ["n", width])], [("y", FLOAT, ["n", width])],
                 [constant("o", np.float32(1), np.float32)])  # fmt: skip


def busy(steps: int = 60, width: int = 192) -> bytes:
    """Some tens of milliseconds of matrix products on rows that do not touch each other."""
    names = ["x", *(f"v{n}" for n in range(steps - 1)), "y"]
    return build(
        [node("MatMul", f"{a} w", b) for a, b in itertools.pairwise(names)],
        [("x", FLOAT, ["n", width, width])],
        [("y", FLOAT, ["n", width, width])],
        [weight("w", width, width, scale=0.05)],
    )


def heavy(megabytes: int) -> bytes:
    """A model of that many megabytes of weights that differ, so that no page of them is shared or compressed."""
    return build(
        [node("MatMul", "x w", "y")],
        [("x", FLOAT, ["n", 1024])],
        [("y", FLOAT, ["n", megabytes * 256])],
        [weight("w", 1024, megabytes * 256, seed=megabytes)],
    )
